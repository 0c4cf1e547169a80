"""Contextual decomposition against its sums, a frozen run with edits, and the rules written out in numpy."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.attribution.contextual_decomposition import capture_frozen, decomposed
from mechjax.attribution.subject import subject
from mechjax.base.errors import ArgumentError, UnsupportedModelError
from mechjax.models.experts import Experts
from tests.compilations import assert_numbers_are_data
from tests.tolerances import TOL

BARE = {"qkv_bias": False, "out_bias": False, "mlp_bias": False, "norm_bias": False}
GATED = {"mlp": "gated", "norm": "rms", "norm_offset": 1.0, "qkv_clip": 1.5, "residual_scale": 0.5}
SHARED = {"residual": "parallel_shared", "positions": "rotary", "qk_norm": "per_head"}
POST = {"norms": "both", "out_bias": False, "activation": "silu"}


@pytest.mark.parametrize(
    "changes",
    [GATED, *(pytest.param(c, marks=pytest.mark.slow) for c in ({}, SHARED, POST, {"mlp": "none"}))],
    ids=["gated", "plain", "one norm", "norms after", "attention only"],
)
def test_decomposed__every_node__sums_to_the_stream(small, draw, pair, metric, changes):
    model = draw(small(**changes))
    graph = mj.graph.build(model)

    @eqx.filter_jit
    def last(given):
        held = jnp.eye(len(graph.nodes), dtype=bool)
        return jax.vmap(lambda row: decomposed(given, capture_frozen(given)[1], row, True, jnp.int32(0)))(
            held
        )

    found = last(subject(model, *pair, metric, graph, "resample", None))
    stream = np.asarray(mj.capture(model, "resid_post")(pair[0])[1]["resid_post"][-1])
    size = np.abs(stream).max()
    np.testing.assert_allclose(
        found.total / size, np.broadcast_to(stream / size, found.own.shape), **TOL["float32", "decomposition"]
    )
    assert np.abs(found.own).max((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [{}, *(pytest.param(c, marks=pytest.mark.slow) for c in (GATED, SHARED | {"qk_norm": "none"}, POST))],
    ids=["plain", "gated", "one norm", "norms after"],
)
@pytest.mark.slow
def test_contextual_decomposition__without_biases__is_a_run_with_patterns_and_scales_frozen(
    small, draw, pair, metric, changes
):
    model = draw(small(**(changes | BARE)))
    graph = mj.graph.build(model)
    found = mj.attribution.contextual_decomposition(
        model, *pair, metric, graph=graph, settle=False, chunk_size=4
    )
    sites = list(mj.list_sites(model, pair[0]))
    frozen = ["pattern", *(s for s in sites if s.startswith("ln") and s.endswith("scale"))]
    nodes = {"a0.h1": ("z", 0, {"head": 1}), "m0": ("mlp_out", 0, {}), "a1.h2": ("z", 1, {"head": 2})}
    acts, other = (mj.capture(model, [*frozen, "z", "mlp_out"])(ids)[1] for ids in pair)
    still = [mj.replace(s, acts[s], per_layer=acts.layers[s] is not None) for s in frozen]
    for node, (site, layer, head) in nodes.items():
        value = other[site][layer]
        if (
            site == "z" and "ln1_post.scale" in acts
        ):  # what a head writes is its share at the scale of its own run
            value = value * (acts["ln1_post.scale"][layer] / other["ln1_post.scale"][layer])[..., None]
        edited = mj.intervene(model, [*still, mj.replace(site, value, layer=layer, **head)])
        expected = (metric(model(pair[0])) - metric(edited(pair[0]))).mean()
        np.testing.assert_allclose(found.scores[graph.nodes.index(node)], expected, **TOL["float32", "sweep"])
        assert abs(expected) > 1e-2
    same = mj.attribution.contextual_decomposition(
        model, pair[0], pair[0], metric, graph=graph, settle=False, chunk_size=4
    )
    np.testing.assert_allclose(same.scores, 0, atol=1e-5)


def by_hand(model, ids, z_ablated, layer_head, pattern):
    """The shares of the stream that the unembedding reads, in numpy: two layers, LayerNorm, plain MLPs."""
    b = jax.tree.map(np.asarray, model.blocks)

    def bias(own, rest, bias, sizes=None):
        x, y = np.abs(own if sizes is None else sizes[0]), np.abs(rest if sizes is None else sizes[1])
        part = bias * np.divide(x, x + y, out=np.zeros_like(x), where=x > 0)
        return own + part, rest + bias - part

    def settle(own, rest):
        own, rest, total, clash = own.copy(), rest.copy(), own + rest, own * rest < 0
        first = clash & (np.abs(own) >= np.abs(rest))
        second = clash & ~first
        own[first], rest[first] = total[first], 0
        own[second], rest[second] = 0, total[second]
        return own, rest

    def norm(own, rest, n, i):
        sigma = np.sqrt((own + rest).var(-1, keepdims=True) + 1e-5)
        out = [(x - x.mean(-1, keepdims=True)) / sigma * n.w[i] for x in (own, rest)]
        return bias(*out, n.b[i], (own, rest))

    start = np.asarray(mj.capture(model, "resid_pre")(ids)[1]["resid_pre"][0])
    own, rest = np.zeros_like(start), start
    for i in range(2):
        v = bias(
            *(np.einsum("btm,mhd->bthd", x, b.attn.W_V[i]) for x in norm(own, rest, b.ln1, i)), b.attn.b_V[i]
        )
        z = settle(*(np.einsum("bhqk,bkhd->bqhd", pattern[i], x.repeat(2, 2)) for x in v))
        if i == layer_head[0]:
            h = layer_head[1]
            z[0][:, :, h] = z[0][:, :, h] + z[1][:, :, h] - z_ablated[:, :, h]
            z[1][:, :, h] = z_ablated[:, :, h]
        attn = settle(*bias(*(np.einsum("bqhd,hdm->bqm", x, b.attn.W_O[i]) for x in z), b.attn.b_O[i]))
        own, rest = settle(own + attn[0], rest + attn[1])
        pre = settle(*bias(*(x @ b.mlp.W_in[i] for x in norm(own, rest, b.ln2, i)), b.mlp.b_in[i]))
        gelu = lambda x: np.asarray(jax.nn.gelu(x, approximate=True))
        post = gelu(pre[0] + pre[1]) - gelu(pre[1]), gelu(pre[1])
        mlp = settle(*bias(*(x @ b.mlp.W_out[i] for x in post), b.mlp.b_out[i]))
        own, rest = settle(own + mlp[0], rest + mlp[1])
    n = model.ln_final
    _, rest = norm(own, rest, eqx.tree_at(lambda n: (n.w, n.b), n, (n.w[None], n.b[None])), 0)
    return rest @ np.asarray(model.W_E).T


def test_contextual_decomposition__with_biases_and_settled_signs__is_the_rules_by_hand(
    model, graph, pair, metric
):
    found = mj.attribution.contextual_decomposition(model, *pair, metric, graph=graph)
    pattern = np.asarray(mj.capture(model, "pattern")(pair[0])[1]["pattern"])
    ablated = np.asarray(mj.capture(model, "z")(pair[1])[1]["z"])
    for layer, head in ((0, 1), (1, 2)):
        logits = by_hand(model, pair[0], ablated[layer], (layer, head), pattern)
        expected = (metric(model(pair[0])) - metric(jnp.asarray(logits))).mean()
        np.testing.assert_allclose(
            found.scores[graph.nodes.index(f"a{layer}.h{head}")], expected, **TOL["float32", "attribution"]
        )
    assert (found.over, found.method) == (("node",), "contextual_decomposition")


def test_contextual_decomposition__other_numbers__compile_nothing_and_equal_prompts_give_zero(
    model, graph, pair, metric, caplog
):
    run = partial(mj.attribution.contextual_decomposition, model, graph=graph)
    # Rounding would be settled too, by its sign, and grow.
    assert_numbers_are_data(run, pair, metric, caplog)


def test_contextual_decomposition__of_an_adder_without_norms__is_what_each_node_adds():
    truth = mj.graph.gate("adder", 2)
    sides = (truth.clean, truth.corrupt, truth.metric)
    found = mj.attribution.contextual_decomposition(truth.model, *sides, graph=truth.graph)
    expected = {"input": 2, "a0.h0": 1, "a0.h1": 1, "m1": 2}
    expected = [expected.get(name, 0) for name in truth.graph.nodes]
    np.testing.assert_allclose(found.scores, expected, **TOL["float32", "attribution"])


def test_contextual_decomposition__bad_input__is_explained(small, draw, model, graph, pair, metric):
    experts = draw(small(mlp="gated", experts=Experts(n_experts=4, top_k=2, d_expert=6)))
    with pytest.raises(UnsupportedModelError, match="no rule for mixtures of experts; gradients"):
        mj.attribution.contextual_decomposition(experts, *pair, metric, graph=graph)
    with pytest.raises(ArgumentError, match="chunk_size=0: at least one node"):
        mj.attribution.contextual_decomposition(model, *pair, metric, graph=graph, chunk_size=0)
