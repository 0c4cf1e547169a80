"""EAP against the gradient of the masked forward, exact scores of affine models, and each example by itself."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.attribution import GIM, RELP, subject
from mechjax.base.errors import ArgumentError, PairingError, ShapeError
from mechjax.graph import Writes, masked_forward
from mechjax.metrics import Metric
from mechjax.models.backward_rules import backward_rules
from mechjax.models.experts import Experts
from tests.compilations import nothing_compiles
from tests.tolerances import TOL

EXPERTS = {"mlp": "gated", "experts": Experts(n_experts=4, top_k=2, d_expert=6, layers=(1,))}
SHARED = {"residual": "parallel_shared", "positions": "rotary", "qk_norm": "per_head"}
POST = {"norms": "both", "out_bias": False, "norm": "rms", "residual_scale": 0.5, "mlp": "none"}
BARE = {"norms": "none", "qkv_clip": 1.0, "mlp": "none"}
DOUBLE = TOL["float64", "gradient"]


def slope_of_the_mask(model, clean, ablated, metric, graph, mask=None):
    @eqx.filter_jit
    def slope(model, kept):
        run = lambda kept: metric(
            masked_forward(model, clean, kept, ablated, graph=graph, mask=mask), mask
        ).mean()
        return jax.grad(run)(kept)

    return slope(model, jnp.ones(len(graph.edges), ablated.input.dtype))


@pytest.mark.parametrize(
    ("changes", "grouped"),
    [
        pytest.param({}, True, marks=pytest.mark.slow),
        (POST, True),
        pytest.param({}, False, marks=pytest.mark.slow),
        pytest.param(SHARED, True, marks=pytest.mark.slow),
        pytest.param(BARE, True, marks=pytest.mark.slow),
        pytest.param(EXPERTS, True, marks=pytest.mark.slow),
    ],
    ids=["grouped", "norms after", "keys apart", "one norm, rotary", "no norms, clipped", "experts"],
)
def test_eap__in_double_precision__is_the_slope_of_the_mask_where_all_edges_are_kept(
    small, draw, pair, metric, changes, grouped
):
    with jax.enable_x64(True):
        model = draw(small(**changes), np.float64)
        graph = mj.graph.build(model, grouped=grouped)
        found = mj.attribution.eap(model, *pair, metric, graph=graph)
        ablated = mj.graph.writes(model, pair[1])
        expected = slope_of_the_mask(model, pair[0], ablated, metric, graph)
        assert found.scores.dtype == np.float64
        np.testing.assert_allclose(found.scores, expected, **DOUBLE)
        assert np.abs(expected).max() > 0.05


@pytest.mark.parametrize("rules", [RELP, pytest.param(GIM, marks=pytest.mark.slow)], ids=repr)
@pytest.mark.slow
def test_eap__under_backward_rules__is_the_slope_of_the_mask_of_the_model_that_obeys_them(
    small, draw, pair, metric, rules
):
    with jax.enable_x64(True):
        model = draw(small(mlp="gated"), np.float64)
        graph = mj.graph.build(model)
        found = mj.attribution.eap(model, *pair, metric, graph=graph, rules=rules)
        ablated = mj.graph.writes(model, pair[1])
        ruled = backward_rules(model, rules)
        expected = slope_of_the_mask(ruled, pair[0], ablated, metric, graph)
        np.testing.assert_allclose(found.scores, expected, **DOUBLE)
        plain = mj.attribution.eap(model, *pair, metric, graph=graph)
        assert np.abs(plain.scores - found.scores).max() > 0.05
    assert found.method == f"eap(rules={rules!r})"


@pytest.mark.slow
def test_eap__examples_in_parts__changes_nothing(model, graph, pair, metric, monkeypatch):
    whole = mj.attribution.eap(model, *pair, metric, graph=graph)
    monkeypatch.setattr(subject, "PART_BYTES", 2 * 4 * 2 * 5 * (8 * 8 + 3 * 12 + 3 * 4 * 5))  # two of three
    parts = mj.attribution.eap(model, *pair, metric, graph=graph)
    np.testing.assert_allclose(parts.scores, whole.scores, **TOL["float32", "gradient"])
    np.testing.assert_allclose(parts.clean, whole.clean, **TOL["float32", "law"])


@pytest.mark.parametrize(
    "ablation",
    ["mean_per_pos", *(pytest.param(ablation, marks=pytest.mark.slow) for ablation in ("zero", "mean"))],
)
@pytest.mark.slow
def test_eap__other_ablations__are_the_slope_of_the_mask_with_them(model, graph, pair, metric, ablation):
    prompts = jax.random.randint(jax.random.key(7), (4, 5), 0, 20)
    mask = jnp.arange(5) < jnp.array([5, 5, 4, 2])[:, None]
    reference = None if ablation == "zero" else mj.Prompts(prompts, mask)
    found = mj.attribution.eap(
        model, pair[0], None, metric, graph=graph, ablation=ablation, reference=reference
    )
    parts = [mj.graph.writes(model, row[None, : int(m.sum())]) for row, m in zip(prompts, mask, strict=True)]

    def mean(*xs, pos):
        if ablation == "zero":
            return np.zeros_like(xs[0])
        if ablation == "mean":
            return np.concatenate(xs, pos).mean(pos, keepdims=True)
        rows = [[x.take([i], pos) for x in xs if x.shape[pos] > i] for i in range(5)]
        return np.concatenate([np.concatenate(r, pos - 1).mean(pos - 1, keepdims=True) for r in rows], pos)

    like = mj.graph.writes(model, pair[0])
    names = {"input": 1, "heads": 2, "mlps": 2}
    by_hand = Writes(
        *(
            jnp.broadcast_to(
                mean(*(np.asarray(getattr(p, n)) for p in parts), pos=pos), getattr(like, n).shape
            )
            for n, pos in names.items()
        )
    )
    expected = slope_of_the_mask(model, pair[0], by_hand, metric, graph)
    np.testing.assert_allclose(found.scores, expected, **TOL["float32", "gradient"])


def test_gradient_methods__of_an_affine_model__are_exact(small, draw, affine, pair, metric):
    with jax.enable_x64(True):
        model = affine(draw(small(activation="relu", norm_eps=1e18), np.float64))
        graph = mj.graph.build(model)
        exact = mj.attribution.exact(model, *pair, metric, graph=graph)
        eap = mj.attribution.eap(model, *pair, metric, graph=graph)
        integrate = partial(mj.attribution.eap_ig, model, *pair, metric, graph=graph, quadrature="left")
        for found in (eap, *(integrate(path=path, steps=1) for path in ("inputs", "activations"))):
            np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-8, atol=1e-8)
            assert found.compare(exact).pearson > 0.9999
    assert np.abs(exact.scores).max() > 0.05


@pytest.mark.slow
def test_eap__of_an_ordinary_model__agrees_with_exact_but_is_not_exact(model, graph, pair, metric):
    exact = mj.attribution.exact(model, *pair, metric, graph=graph)
    found = mj.attribution.eap(model, *pair, metric, graph=graph).compare(exact)
    assert 0.3 < float(found.pearson) < 0.999
    assert float(found.auroc) > 0.6


def test_eap__clean_equals_corrupt__is_zero(model, graph, pair, metric):
    assert not np.any(mj.attribution.eap(model, pair[0], pair[0], metric, graph=graph).scores)


def test_eap__grouped__is_the_sum_over_the_heads_that_share(model, graph, pair, metric):
    apart = mj.graph.build(model, grouped=False)
    parts = mj.attribution.eap(model, *pair, metric, graph=apart).scores
    sums = np.zeros(len(graph.edges))
    for score, edge in zip(np.asarray(parts), apart.edges, strict=True):
        node, _, reader = edge.partition("->")
        if reader[-3:] in ("<k>", "<v>"):
            layer, head = reader[:-3].split(".h")
            reader = f"{layer}.kv{int(head) // 2}{reader[-3:]}"
        sums[graph.number(f"{node}->{reader}")] += score
    found = mj.attribution.eap(model, *pair, metric, graph=graph).scores
    np.testing.assert_allclose(found, sums, **TOL["float32", "gradient"])


def test_eap__sizes_before_and_after_the_mean__are_those_of_each_example(model, graph, pair, metric):
    alone = []
    for i in range(3):
        own = mj.metrics.logit_diff(metric.correct[i], metric.wrong[i])
        alone.append(mj.attribution.eap(model, pair[0][i], pair[1][i], own, graph=graph).scores)
    alone = np.stack(alone)
    expected = {
        "mean": alone.mean(0), "abs_of_mean": np.abs(alone.mean(0)), "mean_of_abs": np.abs(alone).mean(0),
    }  # fmt: skip
    for reduce, scores in expected.items():
        found = mj.attribution.eap(model, *pair, metric, graph=graph, reduce=reduce, chunk_size=2)
        np.testing.assert_allclose(found.scores, scores, **TOL["float32", "gradient"])
    assert not np.allclose(expected["abs_of_mean"], expected["mean_of_abs"], atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_eap__padding__changes_nothing(model, graph, pair, metric, side):
    pad = ((0, 0), (2, 0) if side == "left" else (0, 2))
    mask = jnp.asarray(np.pad(np.ones((3, 5), bool), pad))
    padded = [mj.Prompts(jnp.asarray(np.pad(ids, pad, constant_values=9)), mask) for ids in pair]
    found = mj.attribution.eap(model, *padded, metric, graph=graph, chunk_size=4)
    expected = mj.attribution.eap(model, *pair, metric, graph=graph)
    np.testing.assert_allclose(found.scores, expected.scores, **TOL["float32", "gradient"])


def test_nodes__of_eap__are_gradients_times_what_nodes_send(model, graph, pair, metric):
    found = mj.attribution.eap(model, *pair, metric, graph=graph).nodes()
    _, grads = mj.value_and_grad_at(model, metric, ["z", "mlp_out"])(pair[0])
    sent = [mj.capture(model, ["z", "mlp_out"])(ids)[1] for ids in pair]
    z, mlp = ((sent[0][s] - sent[1][s]) * grads[s] for s in ("z", "mlp_out"))
    own = np.concatenate((z.sum((1, 2, 4)), mlp.sum((1, 2, 3))[:, None]), 1).ravel() / 3
    np.testing.assert_allclose(found.scores[1:], own, **TOL["float32", "gradient"])
    assert found.over == ("node",)


def test_scores__print_and_are_saved__by_the_names_of_edges(model, graph, pair, metric, tmp_path):
    found = mj.attribution.eap(model, *pair, metric, graph=graph)
    (name, score), *_ = found.top(3)
    assert float(found.scores[graph.number(name)]) == pytest.approx(score)
    assert f"highest at {graph.edges[int(found.scores.argmax())]}" in str(found)
    assert found.rows()[1]["edge"] == graph.edges[1]
    back = mj.restore(mj.save(found, tmp_path / "scores"))
    assert back.graph == graph
    np.testing.assert_array_equal(back.scores, found.scores)


class Total(Metric):
    """One number for the whole batch."""

    def of(self, logits):
        return logits.sum()


def test_eap__bad_input__is_explained(model, graph, pair, metric, as_a_user):
    def refused(error, message, *, clean=pair[0], corrupt=pair[1], metric=metric, **more):
        with pytest.raises(error, match=message):
            mj.attribution.eap(model, clean, corrupt, metric, **{"graph": graph} | more)

    refused(PairingError, "pair 0 has 5 clean and 4 corrupt tokens", corrupt=pair[1][:, :4])
    masks = [jnp.arange(5) < 4, jnp.arange(5) > 0]
    sides = [mj.Prompts(jnp.asarray(i), jnp.tile(m, (3, 1))) for i, m in zip(pair, masks, strict=True)]
    refused(PairingError, "padded at different places", clean=sides[0], corrupt=sides[1])
    refused(ArgumentError, r"Total gives shape \(\) for a batch of 3", metric=Total(jnp.int32(-1)))
    refused(ArgumentError, "the metric is a function; give one of mj.metrics", metric=lambda x: x)
    refused(ArgumentError, "reads token 99; the model has 20", metric=mj.metrics.logit_diff(99, 1))
    refused(ArgumentError, "ablation='mean' needs `reference=`", ablation="mean")
    refused(ArgumentError, "ablation='zero' takes no `reference=`", ablation="zero", reference=pair[0])
    refused(ArgumentError, "ablation='noise': expected one of 'resample', 'zero'", ablation="noise")
    refused(ArgumentError, "reduce='sum': expected one of 'mean', 'abs_of_mean'", reduce="sum")
    refused(ArgumentError, "give `corrupt`", corrupt=None)
    refused(ShapeError, "the reference prompts have 3 tokens and the pairs 5", ablation="mean_per_pos",
            reference=pair[0][:, :3])  # fmt: skip
    refused(
        ArgumentError,
        "graph is of another model: it has n_layers 3",
        graph=mj.graph.Graph(3, 4, 2, True, True, True),
    )
    broken = eqx.tree_at(lambda m: m.blocks.attn.W_V, model, model.blocks.attn.W_V.at[1].set(jnp.inf))
    with pytest.raises(ArgumentError, match="`z` of layer 1 is not finite in this run"):
        mj.attribution.eap(broken, *pair, metric, graph=graph)


def test_compare_and_nodes__of_what_does_not_fit__are_refused(model, graph, pair, metric):
    exact = mj.attribution.exact(model, *pair, metric, graph=graph)
    zero = mj.attribution.eap(model, *pair, metric, graph=graph, ablation="zero")
    with pytest.raises(ArgumentError, match="these scores have ablation='zero' and those to compare with"):
        zero.compare(exact)
    with pytest.raises(ArgumentError, match=r"sums over edges where those are gradients.*method='exact'"):
        exact.nodes()


def test_eap__other_prompts_answers_and_means__compile_nothing(model, graph, pair, metric, caplog):
    """And a mean over one prompt is that prompt: the same scores as where it stands in."""
    one = np.tile(pair[1][:1], (3, 1))
    expected = mj.attribution.eap(model, pair[0], one, metric, graph=graph).scores
    ablate = partial(mj.attribution.eap, model, graph=graph, ablation="mean_per_pos")
    found = ablate(pair[0], None, metric, reference=one).scores
    np.testing.assert_allclose(found, expected, **TOL["float32", "gradient"])
    answers = mj.metrics.logit_diff(np.array([6, 7, 8], np.int32), np.array([9, 5, 1], np.int32))
    with nothing_compiles(caplog):
        mj.attribution.eap(model, *pair[::-1], answers, graph=graph)
        other = ablate(pair[1], None, answers, reference=pair[0]).scores
    assert np.abs(other - found).max() > 0.01


def test_eap__padding_between_tokens__changes_nothing(model, graph, pair, metric):
    at = np.array([0, 1, 4, 5, 6])
    mask, padded = jnp.asarray(np.tile(np.isin(np.arange(7), at), (3, 1))), []
    for ids in pair:
        wider = np.full((3, 7), 9, np.int32)
        wider[:, at] = ids
        padded.append(mj.Prompts(jnp.asarray(wider), mask))
    found = mj.attribution.eap(model, *padded, metric, graph=graph, chunk_size=4)
    expected = mj.attribution.eap(model, *pair, metric, graph=graph)
    np.testing.assert_allclose(found.scores, expected.scores, **TOL["float32", "gradient"])
