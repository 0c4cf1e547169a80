"""Scores of the EAP-IG repository on the same weights (`tests/oracles/make_eap_ig.py`): the same, or why they differ.

Its scores are of corrupt - clean, and those from gradients divide a mean over the batch by the batch once more:
`theirs` undoes both. Where it departs from its own definition, three things are compared: its recorded scores equal
what we say it computes; ours equal the definition, from gradients of the transform and products in numpy; the two are
far apart.
"""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from numpy.testing import assert_allclose

import mechjax as mj
from tests.tolerances import TOL

CLOSE = TOL["float64", "gradient"]
READS = ("q_input", "k_input", "v_input", "mlp_in")
STEPS = 5
ATTRIBUTION = mj.attribution


def put(x, info, here, values):
    """The layers of `here` write `values`."""
    return jnp.where(here[info.layer], values[info.layer], x)


class Given(SimpleNamespace):
    """The model, its prompts, and what the repository found."""

    def theirs(self, name):
        """Their scores, from gradients, with our sign and size, in our order."""
        return -len(self.pair[0]) * self.raw(name)

    def raw(self, name):
        """Their scores of edges, in our order."""
        return self.found[f"edge/{name}"][self.order]

    def writes(self, ids):
        """What nodes write, and that as they have it, without positions. Shape (node, batch, pos, d_model), each."""
        whole = np.asarray(mj.graph.writes(self.model, ids).vectors(self.model))
        return whole, np.concatenate([whole[:1] - self.positions, whole[1:]])

    def slopes(self, ids, edits=()):
        """The metric, and its gradients at what all readers read and at what MLPs write.

        Shapes (batch), (reader, batch, pos, d_model) and (layer, batch, pos, d_model).
        """
        edited = mj.intervene(self.model, list(edits))
        value, grads = mj.value_and_grad_at(edited, self.metric, (*READS, "mlp_out", "resid_post"))(ids)
        heads = [np.moveaxis(grads[site], -2, 1) for site in READS[:3]]
        readers = np.concatenate([*heads, grads["mlp_in"][:, None]], 1)
        readers = readers.reshape(-1, *readers.shape[2:])
        return value, np.concatenate([readers, grads["resid_post"][-1:]]), np.asarray(grads["mlp_out"])

    def writing(self, start, sublayer):
        """Edits that let one sublayer write `start`: one at every site, so that all sublayers share a program."""
        n, config = self.graph.n_layers, self.model.config
        layer, at = divmod(sublayer - 1, 2) if sublayer else (0, None)
        edits = []
        for site, own in (("resid_pre", sublayer == 0), ("z", at == 0), ("mlp_out", at == 1)):
            axes = (config.n_heads, config.d_head) if site == "z" else (config.d_model,)
            values = np.broadcast_to(start if own else 0.0, (n, *self.pair[0].shape, *axes))
            here = np.arange(n) == (layer if own else -1)
            edits.append(mj.apply(site, put, here, jnp.asarray(values)))  # or they are made float32
        return edits

    def contracted(self, sent, slopes):
        """Scores of each example's edges. Shape (example, edge)."""
        square = np.einsum("ubpd,vbpd->buv", sent, slopes)
        return square[:, *self.graph.table.T[:2]]


@pytest.fixture(scope="module", autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    with np.load(Path(__file__).parents[1] / "oracles" / "eap_ig.npz") as file:
        found = dict(file)
    folder = tmp_path_factory.mktemp("gpt2")
    weights = {
        key.removeprefix("weight/"): x.astype(np.float64)
        for key, x in found.items()
        if key.startswith("weight/")
    }
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(str(found["config"]))
    model, _ = mj.load(folder)
    graph = mj.graph.build(model)
    names = found["edges"].tolist()
    assert sorted(names) == sorted(graph.edges)
    assert tuple(found["nodes"]) == graph.nodes
    clean, corrupt, reference, right, wrong = (
        found[name].astype(np.int32) for name in ("clean", "corrupt", "reference", "right", "wrong")
    )
    return Given(
        found=found,
        model=model,
        graph=graph,
        order=np.array([names.index(edge) for edge in graph.edges]),
        pair=(clean, corrupt),
        reference=reference,
        metric=mj.metrics.logit_diff(right, wrong),
        positions=weights["transformer.wpe.weight"][: clean.shape[1]],
    )


@pytest.fixture(scope="module")
def slopes(given):
    """Gradients of the clean run."""
    return given.slopes(given.pair[0])


@pytest.fixture(scope="module")
def plain(given):
    """EAP."""
    return ATTRIBUTION.eap(given.model, *given.pair, given.metric, graph=given.graph)


@pytest.fixture(scope="module")
def integrals(given):
    """EAP-IG of the inputs, by each rule."""
    return {
        rule: ATTRIBUTION.eap_ig(
            given.model, *given.pair, given.metric, graph=given.graph, steps=STEPS, quadrature=rule
        )
        for rule in ("left", "right", "midpoint")
    }


def apart(ours, theirs):
    """How far, of what ours are in all."""
    return np.linalg.norm(theirs - ours) / np.linalg.norm(ours)


def test_eap__every_edge__equals_the_repository_and_the_definition(given, plain, slopes):
    assert_allclose(plain.scores, given.theirs("eap"), **CLOSE)
    sent = given.writes(given.pair[0])[0] - given.writes(given.pair[1])[0]
    assert_allclose(plain.scores, given.contracted(sent, slopes[1]).mean(0), **CLOSE)
    assert np.median(np.abs(plain.scores)) > 0.02


def test_eap_ig__left_ends__equal_the_repository(given, integrals):
    assert_allclose(integrals["left"].scores, given.theirs("eap_ig_inputs"), **CLOSE)
    assert apart(integrals["midpoint"].scores, given.theirs("eap_ig_inputs")) > 0.01


def test_eap_ig__one_trapezoid__equals_the_repositorys_clean_corrupted(given):
    found = ATTRIBUTION.eap_ig(
        given.model, *given.pair, given.metric, graph=given.graph, steps=1, quadrature="trapezoid"
    )
    assert_allclose(found.scores, given.theirs("clean_corrupted"), **CLOSE)


@pytest.mark.slow
def test_exact__every_edge__equals_the_repository(given):
    """Here it does not divide by the batch once more, so that its own methods differ by that factor."""
    found = ATTRIBUTION.exact(given.model, *given.pair, given.metric, graph=given.graph)
    assert_allclose(found.scores, -given.raw("exact"), **CLOSE)


def test_eap__mean_of_each_position__equals_the_repository(given):
    found = ATTRIBUTION.eap(given.model, given.pair[0], None, given.metric, graph=given.graph,
                            ablation="mean_per_pos", reference=given.reference)  # fmt: skip
    assert_allclose(found.scores, given.theirs("eap_mean_positional"), **CLOSE)


def test_eap__zero__takes_positions_from_the_input_too(given, slopes):
    """Their input writes token embeddings alone: no node writes positions, and no ablation takes them away."""
    found = ATTRIBUTION.eap(
        given.model, given.pair[0], None, given.metric, graph=given.graph, ablation="zero"
    )
    ours, theirs = (given.contracted(sent, slopes[1]).mean(0) for sent in given.writes(given.pair[0]))
    assert_allclose(found.scores, ours, **CLOSE)
    assert_allclose(given.theirs("eap_zero"), theirs, **CLOSE)
    of_input = given.graph.table[:, 0] == 0
    assert_allclose(found.scores[~of_input], given.theirs("eap_zero")[~of_input], **CLOSE)
    assert apart(found.scores[of_input], given.theirs("eap_zero")[of_input]) > 0.1


def test_eap__mean__is_each_nodes_own_where_theirs_is_one_vector_for_all(given, slopes):
    """They sum the last position alone, divide by all positions, and take the mean over nodes as well."""
    found = ATTRIBUTION.eap(given.model, given.pair[0], None, given.metric, graph=given.graph,
                            ablation="mean", reference=given.reference)  # fmt: skip
    clean, reference = given.writes(given.pair[0]), given.writes(given.reference)
    own = clean[0] - reference[0].mean((1, 2), keepdims=True)
    assert_allclose(found.scores, given.contracted(own, slopes[1]).mean(0), **CLOSE)
    one = clean[1] - reference[1][:, :, -1].mean((0, 1)) / reference[1].shape[2]
    assert_allclose(given.theirs("eap_mean"), given.contracted(one, slopes[1]).mean(0), **CLOSE)
    assert apart(found.scores, given.theirs("eap_mean")) > 0.1


def test_nodes__of_eap__meet_the_gradient_where_mlps_write(given, plain, slopes):
    """Theirs multiply the change of what an MLP writes by the gradient at what it reads; heads and input are right."""
    ours, theirs = np.asarray(plain.nodes().scores), -len(given.pair[0]) * given.found["node/eap"]
    mlps = np.array([node.startswith("m") for node in given.graph.nodes])
    assert_allclose(ours[~mlps], theirs[~mlps], **CLOSE)
    sent = (given.writes(given.pair[0])[0] - given.writes(given.pair[1])[0])[mlps]
    read = slopes[1][[reader.startswith("m") for reader in given.graph.readers]]
    at = {"write": slopes[2], "read": read}
    found = {name: np.einsum("lbpd,lbpd->lb", sent, grads).mean(-1) for name, grads in at.items()}
    assert_allclose(ours[mlps], found["write"], **CLOSE)
    assert_allclose(theirs[mlps], found["read"], **CLOSE)
    assert apart(ours[mlps], theirs[mlps]) > 0.1


def sublayers(given, ids):
    """What each sublayer writes: what enters the first layer, then heads and MLP of every layer."""
    acts = mj.capture(given.model, ["resid_pre", "z", "mlp_out"])(ids)[1]
    pairs = zip(np.asarray(acts["z"]), np.asarray(acts["mlp_out"]), strict=True)
    return [np.asarray(acts["resid_pre"][0]), *(x for pair in pairs for x in pair)]


@pytest.mark.slow
def test_eap_ig__on_activations__scores_only_what_leaves_the_sublayer_that_moves(given):
    """While one sublayer moves they score the edges of all, and so every edge from runs that leave its node alone."""
    found = ATTRIBUTION.eap_ig(given.model, *given.pair, given.metric, graph=given.graph, path="activations",
                               steps=STEPS, quadrature="right")  # fmt: skip
    sent = given.writes(given.pair[0])[0] - given.writes(given.pair[1])[0]
    ends = list(zip(*(sublayers(given, ids) for ids in given.pair), strict=True))
    moving = []
    for sublayer, (clean, corrupt) in enumerate(ends):
        starts = [corrupt + k / STEPS * (clean - corrupt) for k in range(1, STEPS + 1)]
        runs = [given.slopes(given.pair[0], given.writing(start, sublayer))[1] for start in starts]
        moving.append(given.contracted(sent, np.mean(runs, 0)).mean(0))
    place = {"input": 0} | {f"a{i}": 1 + 2 * i for i in range(3)} | {f"m{i}": 2 + 2 * i for i in range(3)}
    own = np.array([place[edge.split("->")[0].split(".")[0]] for edge in given.graph.edges])
    assert_allclose(found.scores, np.array(moving)[own, np.arange(len(own))], **CLOSE)
    assert_allclose(given.theirs("eap_ig_activations"), np.mean(moving, 0), **CLOSE)
    assert apart(found.scores, given.theirs("eap_ig_activations")) > 0.1


def test_eap_ig__nodes_and_edges__take_one_rule(given, integrals):
    """Theirs take left ends for edges and right ends for nodes: neither sums to what the corrupt run takes."""
    heads = np.array([not node.startswith("m") for node in given.graph.nodes])
    theirs = -len(given.pair[0]) * given.found["node/eap_ig_inputs"]
    nodes = {rule: np.asarray(found.nodes().scores) for rule, found in integrals.items()}
    assert_allclose(nodes["right"][heads], theirs[heads], **CLOSE)
    assert apart(nodes["left"][heads], theirs[heads]) > 0.01
    clean, corrupt = (given.slopes(ids)[0].mean() for ids in given.pair)
    error = {rule: abs(float(found[0] - (clean - corrupt))) for rule, found in nodes.items()}
    assert error["midpoint"] < min(error["left"], error["right"]) / 2


def test_eap__two_examples_twice__score_the_same_where_theirs_halve(given, slopes):
    """They divide a mean by the number of examples, but not exact scores: no threshold fits both, or two batches."""
    sent = given.writes(given.pair[0])[0] - given.writes(given.pair[1])[0]
    once, rows = given.contracted(sent, slopes[1])[:2].mean(0), [0, 1, 0, 1]
    metric = mj.metrics.logit_diff(*(given.found[name].astype(np.int32)[rows] for name in ("right", "wrong")))
    twice = ATTRIBUTION.eap(given.model, *(ids[rows] for ids in given.pair), metric, graph=given.graph)
    assert_allclose(twice.scores, once, **CLOSE)
    assert_allclose(given.raw("eap_two"), -once / 2, **CLOSE)
    assert_allclose(given.raw("eap_two_twice"), -once / 4, **CLOSE)
    assert_allclose(given.raw("exact_two_twice"), given.raw("exact_two"), **CLOSE)


def test_eap__batches_of_three_and_of_one__weigh_examples_alike_where_theirs_do_not(given, plain, slopes):
    sent = given.writes(given.pair[0])[0] - given.writes(given.pair[1])[0]
    each = given.contracted(sent, slopes[1])
    weighed = np.array([1 / 3, 1 / 3, 1 / 3, 1]) @ each / 4
    assert_allclose(-given.raw("eap_in_parts"), weighed, **CLOSE)
    assert apart(plain.scores / 2, weighed) > 0.1  # the weights sum to 2 for four examples
