"""AtP* against brute force: patterns with one query or key patched, backward passes with one layer stopped."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.attribution.softmax_effects import column_effect
from mechjax.base.errors import ArgumentError, SiteError
from mechjax.models import Config, init
from mechjax.models.experts import Experts
from mechjax.models.scores import MASKED
from mechjax.patching import PatchScores
from tests.compilations import nothing_compiles
from tests.tolerances import TOL

TURNED = {"positions": "rotary", "attn_softcap": 3.0, "qk_norm": "per_head", "attn_sinks": True}
POST = {"norms": "both", "out_bias": False, "norm": "rms", "residual": "parallel"}
GRADIENT = TOL["float32", "gradient"]


@pytest.fixture(scope="module")
def model(small, draw):
    return draw(small(**TURNED))


@pytest.fixture(scope="module")
def found(model, pair, metric):
    return mj.attribution.atp_star(model, *pair, metric, grad_drop=False, reduce="mean")


@pytest.fixture(scope="module")
def by_hand(model, pair, metric):
    return patcher(model, pair, metric)


def patcher(model, pair, metric):
    """Effects of single nodes: the model forms the pattern with a query or key, all that follows is linear."""
    (_, slopes), intact = mj.capture(mj.value_and_grad_at(model, metric, SITES), SITES)(pair[0])
    ablated = mj.capture(model, SITES)(pair[1])[1]

    @jax.jit
    def patterns(q, k):
        edits = [mj.replace("q", q, per_layer=True), mj.replace("k", k, per_layer=True)]
        return mj.capture(mj.intervene(model, edits), "pattern")(pair[0])[1]["pattern"]

    def effect(site, layer, pos, head):
        at = (layer, slice(None), pos, head)
        if site in ("v", "z"):
            return ((intact[site][at] - ablated[site][at]) * slopes[site][at]).sum(-1)
        stacks = {name: np.array(intact[name]) for name in ("q", "k")}
        stacks[site][at] = ablated[site][at]
        moved = patterns(**{name: jnp.asarray(x) for name, x in stacks.items()})
        return ((intact["pattern"] - moved) * slopes["pattern"])[layer].sum((1, 2, 3))

    return effect


SITES = ("q", "k", "v", "pattern", "z")
PLACES = [("q", 0, 1, 0), ("q", 1, 4, 3), ("q", 0, 0, 1), ("k", 0, 1, 0), ("k", 1, 2, 1), ("k", 1, 4, 0), ("v", 1, 2, 1),
          ("z", 0, 3, 2)]  # fmt: skip


def test_atp_star__nodes__equal_patterns_patched_one_by_one_and_gradients(found, by_hand):
    for site, *place in PLACES:
        expected = by_hand(site, *place)
        np.testing.assert_allclose(found.per_example[site][tuple(place)], expected, **GRADIENT)
    assert np.abs(found.scores["q"]).max() > 0.01 and np.abs(found.scores["k"]).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [TURNED, POST, {"positions": "alibi"}],
    ids=["rotary, caps, norms, sinks", "norms after", "alibi"],
)
def test_atp_star__queries_and_keys_of_other_models__equal_patterns_patched(
    small, draw, pair, metric, changes
):
    with jax.enable_x64(True):
        model = draw(small(**changes), np.float64)
        found = mj.attribution.atp_star(model, *pair, metric, grad_drop=False, reduce="mean")
        effect = patcher(model, pair, metric)
        for site, *place in PLACES:
            np.testing.assert_allclose(
                found.per_example[site][tuple(place)], effect(site, *place), **TOL["float64", "gradient"]
            )


@pytest.mark.slow
def test_atp_star__whole_heads__equal_patterns_patched_at_all_positions(model, pair, metric, by_hand):
    found = mj.attribution.atp_star(
        model, *pair, metric, per_position=False, grad_drop=False, reduce="abs_of_mean"
    )
    for site, layer, head in [("q", 0, 1), ("q", 1, 3), ("k", 0, 0), ("k", 1, 1)]:
        expected = by_hand(site, layer, slice(None), head)
        np.testing.assert_allclose(found.per_example[site][layer, head], expected, **GRADIENT)
        assert float(found.scores[site][layer, head]) == pytest.approx(abs(float(expected.mean())), rel=1e-4)


@pytest.mark.slow
def test_atp_star__where_all_after_the_pattern_is_linear__is_exact_though_attention_saturates(
    small, draw, pair, metric
):
    with jax.enable_x64(True):
        model = draw(small(mlp="none", norms="none", **TURNED | {"attn_softcap": 60.0}), np.float64)
        scale = lambda m: m.blocks.attn.q_norm.w
        model = eqx.tree_at(scale, model, scale(model) * 10)
        how = {"sites": ("q", "k"), "grad_drop": False, "reduce": "mean"}
        found = mj.attribution.atp_star(model, *pair, metric, **how)
        blind = mj.attribution.atp_star(model, *pair, metric, qk_fix=False, **how)
        for site, head in {"q": "head", "k": "kv_head"}.items():
            exact = mj.patching.activation_patch(
                model, *pair, metric, site=site, over=("layer", "pos", head), mode="noise"
            )
            truth = found[site].truth(exact)
            np.testing.assert_allclose(found.scores[site][1], truth[1], rtol=1e-9, atol=1e-9)
            assert np.abs(blind.scores[site][1] - truth[1]).max() > 0.3 * np.abs(truth[1]).max()


@pytest.mark.parametrize("scale", [1.0, 60.0, 1e6])
def test_column_effect__of_scores_of_any_size__equals_softmaxes_of_moved_rows(scale):
    rng = np.random.default_rng(0)
    s, moved = (scale * rng.normal(size=(2, 4, 6))).astype(np.float32)
    g = rng.normal(size=(4, 6)).astype(np.float32)
    s[1, 3:], moved[1, 3:] = MASKED, MASKED
    s[2, :2] = s[2].max() + 1  # two that are equally large

    def softmax(x):
        e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    one_by_one = []
    for k in range(6):
        row = s.copy()
        row[:, k] = moved[:, k]
        one_by_one.append(((softmax(row) - softmax(s)) * g).sum(-1))
    found = column_effect(jnp.asarray(s), jnp.asarray(moved), jnp.asarray(g))
    np.testing.assert_allclose(found, np.stack(one_by_one, -1), rtol=1e-4, atol=1e-5)


def test_column_effect__of_a_score_that_is_the_whole_row__keeps_what_the_others_say():
    """In float32 its share is 1: from 1 - p nothing would be left."""
    s = jnp.array([[60.0, 0.0, 1.0]])
    found = column_effect(s, s - 100.0, jnp.array([[1.0, 2.0, 3.0]]))
    others = (2 + 3 * np.e) / (1 + np.e)
    np.testing.assert_allclose(found[0, 0], others - 1, rtol=1e-6)


def still(x, info):
    return jax.lax.stop_gradient(x)


@pytest.mark.slow
def test_atp_star__grad_drop__is_the_mean_size_over_backward_passes_with_a_layer_stopped(
    small, draw, pair, metric
):
    model = draw(small(n_layers=3))
    found = mj.attribution.atp_star(model, *pair, metric, sites=("v", "z", "mlp_out"), chunk_size=2)

    @jax.jit
    def sizes(dropped):
        edits = [mj.apply(site, still, layer=dropped) for site in ("attn_out", "mlp_out")]
        slopes = mj.value_and_grad_at(mj.intervene(model, edits), metric, ["v", "z", "mlp_out"])(pair[0])[1]
        acts = [mj.capture(model, ["v", "z", "mlp_out"])(ids)[1] for ids in pair]
        moved = {site: ((acts[0][site] - acts[1][site]) * slopes[site]).sum(-1) for site in acts[0]}
        return {site: jnp.abs(x).at[dropped].set(0) for site, x in moved.items()}

    total = [sizes(layer) for layer in range(3)]
    for site in ("v", "z", "mlp_out"):
        expected = np.moveaxis(np.asarray(sum(x[site] for x in total)) / 2, 1, -1)
        np.testing.assert_allclose(found.per_example[site], expected, **TOL["float32", "gradient"])
        np.testing.assert_allclose(found.scores[site], expected.mean(-1), **TOL["float32", "gradient"])


@pytest.mark.slow
def test_atp_star__grad_drop_with_fixed_queries_and_keys__is_the_mean_size_over_stopped_layers(
    model, pair, metric
):
    found = mj.attribution.atp_star(model, *pair, metric, sites=("q", "k"), chunk_size=1)
    totals = np.zeros((len(PLACES), 3))
    for layer in range(2):
        edits = [mj.apply(site, still, layer=layer) for site in ("attn_out", "mlp_out")]
        stopped = patcher(mj.intervene(model, edits), pair, metric)
        for i, (site, *place) in enumerate(PLACES):
            if site in ("q", "k") and place[0] != layer:  # a layer that is dropped drops its own nodes
                totals[i] += np.abs(stopped(site, *place))
    for (site, *place), total in zip(PLACES, totals, strict=True):
        if site in ("q", "k"):
            np.testing.assert_allclose(found.per_example[site][tuple(place)], total, **GRADIENT)


def cancelling():
    """Head 0 writes +-1 to dimension 1, where it speaks for token 0; MLP 1 takes +1 back, but not -1. Layer 2 is idle."""
    config = Config(
        d_vocab=2, n_ctx=4, d_model=3, n_layers=3, n_heads=1, d_head=1, d_mlp=1, norms="none", positions="none",
        activation="relu", tied=False,
    )  # fmt: skip
    shapes = eqx.filter_eval_shape(init, config, key=jax.random.key(0))
    model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    at = lambda m: (m.W_E, m.W_U, m.blocks.attn.W_V, m.blocks.attn.W_O, m.blocks.mlp.W_in, m.blocks.mlp.W_out)
    E, U, V, O, into, out = at(model)
    values = (
        E.at[:, 0].set(jnp.array([1.0, -1.0])), U.at[1:, 0].set(1.0), V.at[0, 0].set(1.0),
        O.at[0, 0, 0, 1].set(1.0), into.at[1, 1].set(1.0), out.at[1, 0, 2].set(-1.0),
    )  # fmt: skip
    return eqx.tree_at(at, model, values)


def test_atp_star__effects_that_cancel_at_the_clean_run__are_found_where_atp_is_blind():
    model, metric = cancelling(), mj.metrics.logit_diff(0, 1)
    pair = np.array([[0]], np.int32), np.array([[1]], np.int32)
    clean, corrupt = metric(model(np.concatenate(pair)))
    assert float(clean - corrupt) == 1  # all of it what the head does, since nothing else reads the token
    how = {"sites": ("z", "mlp_out")}
    blind = mj.attribution.atp_star(model, *pair, metric, grad_drop=False, **how)
    found = mj.attribution.atp_star(model, *pair, metric, **how)
    # The head moves by 2. Without MLP 1 that is seen; without layer 0 or 2 it is not. 2 of 3 layers are not the MLP's own.
    np.testing.assert_array_equal(blind.scores["z"].ravel(), [0, 0, 0])
    np.testing.assert_array_equal(found.scores["z"].ravel(), [(0 + 2 + 0) / 2, 0, 0])
    np.testing.assert_array_equal(found.scores["mlp_out"].ravel(), [0, (1 + 0 + 1) / 2, 0])
    assert not np.any(mj.attribution.atp_star(model, pair[0], pair[0], metric, **how).flat())


BITS = ["z L0.H0", "z L0.H1", "z L0.H2"]
MISSED = {  # gate of 3 bits -> nodes, what each does on the clean prompt, and on the corrupt one
    "saturated": (["q L1.H0"], 1, -1),
    "saturated_or": (["q L1.H0"], 1, -1),
    "cancelling": (BITS, 0.75, None),  # gradients see it from there
    "cancelling_and": (BITS, 0.75, 0),
    "cancelling_or": (BITS, 0, -0.75),
}


@pytest.mark.parametrize("name", MISSED)
def test_atp_star__on_or_and_and_gates__finds_what_atp_misses(name):
    """Where resampling shows nothing, of a bit of an OR that is on or of an AND that is off, the other way does."""
    truth, (nodes, *effects) = mj.graph.gate(name, 3), MISSED[name]
    site = nodes[0][0]
    for pair, effect in zip((sides := (truth.clean, truth.corrupt), sides[::-1]), effects, strict=True):
        asked = truth.model, *pair, truth.metric
        exact = mj.patching.activation_patch(*asked, site=site, over=("layer", "head"), mode="noise")
        how = {"sites": ("q", "z"), "per_position": False, "reduce": "mean_of_abs"}
        atp = mj.attribution.atp_star(*asked, qk_fix=False, grad_drop=False, **how)[site]
        star = mj.attribution.atp_star(*asked, **how)[site]
        does = np.asarray(exact.clean - exact.per_example)[..., 0]
        at = tuple(np.array([[int(node[3]), int(node[6])] for node in nodes]).T)
        if effect is not None:
            np.testing.assert_allclose(does[at], effect, **TOL["float32", "parity"])
        if effect:
            np.testing.assert_array_equal(atp.scores[at], 0)
            assert [float(of.compare(exact, len(nodes)).auroc) for of in (atp, star)] == [0.5, 1]


def test_node_scores__compared_with_exact_ones__takes_all_nodes_together(found):
    site, own = "z", found["z"]
    exact = PatchScores(
        own.clean.mean() - own.scores,
        own.clean - own.per_example,
        own.clean,
        own.clean,
        site,
        own.over,
        "noise",
    )
    assert float(found.compare({site: exact}).pearson) == pytest.approx(1)
    assert float(found.compare(found, 5).overlap) == 1
    with pytest.raises(ArgumentError, match=r"no site to compare.*by their site"):
        found.compare({})


@pytest.mark.slow
def test_atp_star__named_positions_and_padding__are_those_columns(model, pair, metric, found):
    named = {"first": jnp.array([0, 1, 2]), "end": jnp.array([4, 4, 4])}
    pad = ((0, 0), (2, 0))
    mask = jnp.asarray(np.pad(np.ones((3, 5), bool), pad))
    padded = [mj.Prompts(jnp.asarray(np.pad(ids, pad, constant_values=9)), mask) for ids in pair]
    some = mj.attribution.atp_star(
        model, *padded, metric, positions={name: at + 2 for name, at in named.items()}, grad_drop=False,
        reduce="mean",
    )  # fmt: skip
    for site in some.scores:
        for j, at in enumerate(named.values()):
            columns = np.stack([found.per_example[site][:, at[i], ..., i] for i in range(3)], -1)
            np.testing.assert_allclose(some.per_example[site][:, j], columns, **GRADIENT)
    assert {name.split(" @ ")[1] for name, _ in some.top(20)} == {"first", "end"}


def test_node_scores__name_their_nodes_and_are_saved(found, tmp_path):
    back = mj.restore(mj.save(found, tmp_path / "scores"))
    (name, score), *_ = back.top(3)
    sizes = np.abs(np.asarray(found.flat()))
    assert found.name(int(sizes.argmax())) == name and abs(score) == sizes.max()
    assert len(back.rows()) == len(sizes) == 2 * 5 * (4 + 2 + 2 + 4 + 1)
    assert "scores['q']" in str(back)
    with pytest.raises(
        SiteError, match="no scores of `mlp_post` here; this record holds q, k, v, z, mlp_out"
    ):
        back["mlp_post"]


def test_atp_star__clean_equals_corrupt__is_zero(model, pair, metric):
    same = mj.attribution.atp_star(model, pair[0], pair[0], metric, grad_drop=False, reduce="mean")
    assert not np.any(same.flat())


def test_atp_star__other_prompts_and_answers__compile_nothing(model, pair, metric, found, caplog):
    other = mj.metrics.logit_diff(np.array([6, 7, 8], np.int32), np.array([9, 5, 1], np.int32))
    with nothing_compiles(caplog):
        turned = mj.attribution.atp_star(model, *pair[::-1], other, grad_drop=False, reduce="mean")
    assert np.abs(turned.flat() - found.flat()).max() > 0.01


def test_atp_star__bad_input__is_explained(model, small, pair, metric, as_a_user):
    def refused(message, model=model, **how):
        with pytest.raises(ArgumentError, match=message):
            mj.attribution.atp_star(model, *pair, metric, **how)

    of = lambda **changes: dataclasses.replace(model, config=small(**changes))
    refused(r"sites=\('resid_pre',\): name sites that have nodes", sites=("resid_pre",))
    refused("name sites that have nodes, each once", sites=())
    refused("reduce='mean': with grad_drop=True each example's score is a mean of sizes", reduce="mean")
    refused("chunk_size=0: at least one layer must be dropped at once", chunk_size=0)
    refused("per_position=False has none", per_position=False, positions={"end": jnp.array([4, 4, 4])})
    refused("needs two at least; this model has one", model=of(n_layers=1))
    refused("norms those of all heads together", model=of(qk_norm="joint"))
    experts = of(mlp="gated", experts=Experts(n_experts=4, top_k=2, d_expert=6, layers=(1,)))
    refused("sites has 'mlp_post', which not every layer", model=experts, sites=("mlp_post",))
