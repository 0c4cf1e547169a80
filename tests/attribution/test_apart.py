"""Scores of edges where a graph takes positions apart, or units of MLPs: against masks, patches by hand, and sums."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.attribution import RELP
from mechjax.base.errors import ArgumentError, ShapeError, UnsupportedModelError
from mechjax.models.backward_rules import backward_rules
from tests.tolerances import TOL

SWEEP, LAYOUT, DOUBLE = TOL["float32", "sweep"], TOL["float32", "layout"], TOL["float64", "gradient"]
POST = {"norms": "both", "out_bias": False, "norm": "rms", "residual_scale": 0.5, "mlp": "gated"}
SHARED = {"residual": "parallel_shared", "positions": "rotary"}
SPANS = {"first": np.array([0, 1, 0], np.int32), "rest": np.arange(5) >= np.array([3, 2, 3])[:, None]}
UNITS = {0: (1, 7), 1: (0, 3, 11)}


class Rectified(eqx.Module):
    """A dictionary, as small as one can be."""

    W_enc: jax.Array
    b_enc: jax.Array
    W_dec: jax.Array

    def encode(self, x):
        return jax.nn.relu(x @ self.W_enc + self.b_enc)


def rectified(model, n=9):
    keys = jax.random.split(jax.random.key(5), 3)
    layers, d, dtype = model.config.n_layers, model.config.d_model, model.W_E.dtype
    draw = lambda key, *shape: 0.6 * jax.random.normal(key, (layers, *shape), dtype)
    return Rectified(draw(keys[0], d, n), draw(keys[1], n), draw(keys[2], n, d))


def subject(small, draw, kind, dtype=np.float32):
    """A model and its graph, the graph's spans, and rules."""
    changes = {"norms after": POST, "one norm": SHARED, "ruled": {"mlp": "gated"}}.get(kind, {})
    model = draw(small(**changes), dtype)
    if kind == "positions":
        return model, mj.graph.build(model, positions=5), None
    if kind in ("latents", "transcoder"):
        reads = {"latents": "mlp_out", "transcoder": "ln2.normalized"}[kind]
        model = mj.graph.with_dictionary(model, rectified(model), reads=reads)
        return model, mj.graph.build(model, units={0: (2, 5), 1: (8, 0)}), None
    if kind == "spans":
        return model, mj.graph.build(model, positions=tuple(SPANS), units=UNITS), SPANS
    return model, mj.graph.build(model, units=UNITS), None


@pytest.mark.parametrize(
    "kind",
    ["spans", *(pytest.param(kind, marks=pytest.mark.slow) for kind in (
        "positions", "neurons", "norms after", "one norm", "latents", "transcoder", "ruled"))],
)  # fmt: skip
def test_eap__of_what_is_apart__is_the_slope_of_the_mask(small, draw, pair, metric, kind):
    with jax.enable_x64(True):
        model, graph, positions = subject(small, draw, kind, np.float64)
        rules = RELP if kind == "ruled" else mj.attribution.GRADIENT
        found = mj.attribution.eap(model, *pair, metric, graph=graph, positions=positions, rules=rules)
        ablated = mj.graph.writes(model, pair[1], graph=graph)

        @eqx.filter_jit
        def slope(model, kept):
            run = lambda kept: metric(
                mj.graph.masked_forward(model, pair[0], kept, ablated, graph=graph, positions=positions)
            ).mean()
            return run(kept), run(jnp.zeros_like(kept)), jax.grad(run)(kept)

        whole, none, expected = slope(backward_rules(model, rules), jnp.ones(len(graph.edges), np.float64))
        np.testing.assert_allclose(whole, metric(model(pair[0])).mean(), **DOUBLE)
        if positions is None:
            np.testing.assert_allclose(none, metric(model(pair[1])).mean(), **DOUBLE)
        np.testing.assert_allclose(found.scores, expected, **DOUBLE)
        assert np.abs(expected).max() > 0.05
        assert len(set(graph.edges)) == len(graph.edges) == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spans", "latents"])
def test_exact__of_what_is_apart__equals_a_loop_of_masked_runs(small, draw, pair, metric, kind):
    model, graph, positions = subject(small, draw, kind)
    which = np.random.default_rng(0).choice(len(graph.edges), 60, replace=False)
    into_units = [i for i, name in enumerate(graph.edges) if name.startswith("a1") and "->m1." in name][:4]
    which = np.unique([*which, *into_units])
    found = mj.attribution.exact(
        model, *pair, metric, graph=graph, positions=positions, edges=which, chunk_size=16
    )
    ablated = mj.graph.writes(model, pair[1], graph=graph)

    @eqx.filter_jit
    def of(edge):
        kept = jnp.where(jnp.arange(len(graph.edges)) == edge, 0.0, 1.0)
        run = mj.graph.masked_forward(model, pair[0], kept, ablated, graph=graph, positions=positions)
        return (found.clean - metric(run)).mean()

    np.testing.assert_allclose(found.scores[which], jax.lax.map(of, which), **SWEEP)
    assert np.isnan(found.scores).sum() == len(graph.edges) - len(which)
    assert np.abs(found.scores[which]).max() > 0.05
    estimate = mj.attribution.eap(model, *pair, metric, graph=graph, positions=positions)
    assert 0.3 < float(estimate.compare(found).pearson) < 1.0
    by_name = mj.attribution.exact(
        model, *pair, metric, graph=graph, positions=positions, edges=[graph.edges[which[3]]]
    )
    np.testing.assert_allclose(by_name.scores[which[3]], found.scores[which[3]], **SWEEP)


def test_masked_forward__edges_of_neurons_and_of_positions__are_patches_by_hand(small, draw, pair):
    """Into a neuron, out of one, and into a head at one position: patched with `intervene`, the norm by hand."""
    model, graph, positions = subject(small, draw, "spans")
    clean, acts = mj.capture(model, ["resid_mid", "mlp_post", "resid_pre"])(pair[0])
    other = mj.capture(model, ["resid_mid", "mlp_post", "resid_pre"])(pair[1])[1]
    ablated = mj.graph.writes(model, pair[1], graph=graph)
    inside = np.arange(5) == SPANS["first"][:, None]

    def cut(*names):
        kept = jnp.ones(len(graph.edges)).at[jnp.array([graph.number(name) for name in names])].set(0.0)
        return mj.graph.masked_forward(model, pair[0], kept, ablated, graph=graph, positions=positions)

    mlp, norm = jax.tree.map(lambda x: x[1], (model.blocks.mlp, model.blocks.ln2))
    x = acts["resid_mid"][1] + np.where(inside[..., None], other["resid_pre"][0] - acts["resid_pre"][0], 0)
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.norm_eps) * norm.w + norm.b
    edit = mj.replace("mlp_pre", (x @ mlp.W_in + mlp.b_in)[..., 3:4], layer=1, d_mlp=3)
    expected = mj.intervene(model, [edit])(pair[0])
    np.testing.assert_allclose(cut("input->m1.n3 @ first"), expected, **LAYOUT)

    gone = (other["mlp_post"] - acts["mlp_post"])[0, ..., 7, None] * model.blocks.mlp.W_out[0, 7]
    gone = np.where(SPANS["rest"][..., None], gone, 0)[..., None, :]
    expected = mj.intervene(model, [mj.add("q_input", gone, layer=1, head=2)])(pair[0])
    np.testing.assert_allclose(cut("m0.n7->a1.h2<q> @ rest"), expected, **LAYOUT)
    assert np.abs(expected - clean).max() > 10 * LAYOUT["atol"]


@pytest.mark.slow
def test_eap__of_parts__adds_up_to_that_of_the_whole(small, draw, pair, metric):
    """Positions and units share what they make together: first order is linear."""
    model = subject(small, draw, "spans")[0]
    coarse = mj.graph.build(model)
    whole = mj.attribution.eap(model, *pair, metric, graph=coarse)
    fine = mj.graph.build(model, positions=5, units=UNITS)
    for found in (
        mj.attribution.eap(model, *pair, metric, graph=fine),
        mj.attribution.eap(model, *pair, metric, graph=fine, chunk_size=2, reduce="mean_of_abs"),
    ):
        owner = lambda name: name.partition(".")[0] if name.startswith("m") else name
        total = np.zeros(len(coarse.edges))
        for name, score in zip(fine.edges, np.asarray(found.scores), strict=True):
            node, reader = name.partition(" @ ")[0].split("->")
            total[coarse.number(f"{owner(node)}->{owner(reader)}")] += score
        if found.reduce == "mean":
            np.testing.assert_allclose(total, whole.scores, **TOL["float32", "gradient"])
        else:
            assert (total >= np.abs(whole.scores) - 1e-6).all()
    sums = mj.attribution.eap(model, *pair, metric, graph=fine).nodes()
    assert dict(sums.rows()[0])["node"] == "input @ 0"
    np.testing.assert_allclose(sums.scores[:5].sum(), whole.nodes().scores[0], **TOL["float32", "gradient"])


@pytest.mark.slow
def test_transcoder__that_is_the_mlp__has_the_scores_of_its_neurons(small, draw, pair, metric):
    model = draw(small(activation="relu"))
    mlp = model.blocks.mlp
    spliced = mj.graph.with_dictionary(
        model, Rectified(mlp.W_in, mlp.b_in[:, None], mlp.W_out), reads="ln2.normalized"
    )
    np.testing.assert_array_equal(spliced(pair[0]), model(pair[0]))
    for score in (mj.attribution.eap, mj.attribution.eap_ig, mj.attribution.exact):
        neurons, latents = (
            score(m, *pair, metric, graph=mj.graph.build(m, units=UNITS)) for m in (model, spliced)
        )
        np.testing.assert_allclose(neurons.scores, latents.scores, **TOL["float32", "gradient"])
    assert latents.graph.edges[-1].startswith("m1->") and "m1.f3" in latents.graph.readers


@pytest.mark.slow
def test_exact__nodes_of_neurons__equal_patches_of_their_values(small, draw, pair, metric):
    model, graph, _ = subject(small, draw, "neurons")
    found = mj.attribution.exact(model, *pair, metric, graph=graph, over="node")
    acts = mj.capture(model, "mlp_post")(pair[1])[1]["mlp_post"]
    clean = metric(model(pair[0]))
    for layer, units in UNITS.items():
        for unit in units:
            edit = mj.replace("mlp_post", acts[layer], layer=layer, d_mlp=unit)
            expected = (clean - metric(mj.intervene(model, [edit])(pair[0]))).mean()
            place = graph.places.index(f"m{layer}.n{unit}")
            np.testing.assert_allclose(found.scores[place], expected, **SWEEP)


@pytest.mark.slow
def test_eap_ig__of_what_is_apart__sums_to_the_difference_of_the_runs(small, draw, pair, metric):
    model, graph, _ = subject(small, draw, "latents")
    gap = (metric(model(pair[0])) - metric(model(pair[1]))).mean()
    of_mask = mj.attribution.eap_ig(model, *pair, metric, graph=graph, path="mask", steps=64)
    np.testing.assert_allclose(of_mask.scores.sum(), gap, rtol=2e-3)
    of_inputs = mj.attribution.eap_ig(model, *pair, metric, graph=graph, steps=64)
    from_input = np.array([name.startswith("input->") for name in graph.edges])
    np.testing.assert_allclose(of_inputs.scores[from_input].sum(), gap, rtol=2e-3)


def test_graph__of_units_and_positions__names_and_saves_them(small, draw, tmp_path):
    model, graph, _ = subject(small, draw, "spans")
    assert repr(graph) == (
        "Graph of 2 layers of 4 heads and an MLP, 5 neurons apart, at 2 spans: 16 nodes, 24 readers, 302 edges"
    )
    assert {"m0.n7->m1.n11 @ rest", "a1.h3->m1 @ first", "m1.n0->logits @ first"} <= set(graph.edges)
    assert not any(name.startswith("m1.n0->m1") for name in graph.edges)
    scores = mj.attribution.Scores(
        jnp.arange(302.0), jnp.zeros(3), graph, ("edge",), "eap", "resample", "mean"
    )
    mj.save(scores, tmp_path / "scores")
    assert mj.restore(tmp_path / "scores").graph == graph
    everything = mj.graph.build(model, units="all")
    assert len(everything.nodes) == 1 + 2 * (4 + 12 + 1)


def test_apart__bad_input__is_explained(small, draw, pair, metric, as_a_user):
    model = draw(small())
    graph, named = mj.graph.build(model), mj.graph.build(model, positions=("first", "rest"))
    eap = lambda graph, model=model, **how: mj.attribution.eap(model, *pair, metric, graph=graph, **how)
    refuse = [
        (ArgumentError, "give a number of tokens, at least one", lambda: mj.graph.build(model, positions=0)),
        (ArgumentError, "at least one and each of them once", lambda: mj.graph.build(model, positions=("a", "a"))),
        (ArgumentError, "the model has layers 0 to 1", lambda: mj.graph.build(model, units={2: [0]})),
        (ArgumentError, "layer 1 has 12 units, 0 to 11", lambda: mj.graph.build(model, units={1: [12]})),
        (ArgumentError, "names no unit", lambda: mj.graph.build(model, units={})),
        (ArgumentError, "this graph has positions summed", lambda: eap(graph, positions=SPANS)),
        (ArgumentError, "say of each, and of no other, where", lambda: eap(named)),
        (ArgumentError, "names 'first': say of each", lambda: eap(named, positions={"first": SPANS["first"]})),
        (
            ArgumentError, "position 0 of example 0 is in `first` and in `rest`",
            lambda: eap(named, positions={"first": [0, 0, 0], "rest": [0, 1, 1]}),
        ),
        (ArgumentError, "`first` has a position that prompts of 5", lambda: eap(named, positions=SPANS | {"first": [0, 5, 1]})),
        (ShapeError, "give one position per example", lambda: eap(named, positions=SPANS | {"first": [0, 1]})),
        (ShapeError, r"the mask of `first` has shape \(5,\)", lambda: eap(named, positions=SPANS | {"first": np.ones(5, bool)})),
        (ShapeError, "the graph has 4 positions and the prompts 5", lambda: eap(mj.graph.build(model, positions=4))),
        (
            ArgumentError, "information_flow takes heads and whole MLPs.*this graph has positions apart",
            lambda: mj.attribution.information_flow(model, pair[0], graph=named),
        ),
        (
            UnsupportedModelError, "need an MLP in every layer; this model has none",
            lambda: mj.graph.build(draw(small(mlp="none")), units={0: [0]}),
        ),
        (ArgumentError, "a dictionary encodes 'mlp_out'", lambda: mj.graph.with_dictionary(model, rectified(model), reads="z")),
        (ArgumentError, "is a dict without `encode`", lambda: mj.graph.with_dictionary(model, {})),
        (
            ShapeError, "stack one dictionary per layer",
            lambda: mj.graph.with_dictionary(model, jax.tree.map(lambda x: x[0], rectified(model))),
        ),
        (
            ShapeError, "encode maps",
            lambda: mj.graph.with_dictionary(model, eqx.tree_at(lambda d: d.W_dec, rectified(model), rectified(model).W_dec[:, :5])),
        ),
    ]  # fmt: skip
    for error, says, call in refuse:
        with pytest.raises(error, match=says):
            call()
    spliced = mj.graph.with_dictionary(model, rectified(model))
    latents = mj.graph.build(spliced, units={0: [1]})
    with pytest.raises(
        ArgumentError, match="the graph has latents of a dictionary as nodes, and the model has none"
    ):
        eap(latents)
    with pytest.raises(UnsupportedModelError, match="a dictionary is not carried over"):
        mj.graph.build(spliced, units={0: [1]}, grouped=False)
    with pytest.raises(UnsupportedModelError, match="MLPs of class Spliced, for which it has no rule here"):
        mj.attribution.eap(spliced, *pair, metric, graph=latents, rules=RELP)
    exact = lambda **how: mj.attribution.exact(model, *pair, metric, graph=graph, **how)
    with pytest.raises(ArgumentError, match="edges= is empty"):
        exact(edges=[])
    with pytest.raises(ArgumentError, match="edges= chooses edges, and over='node'"):
        exact(edges=[1], over="node")
    with pytest.raises(ArgumentError, match=r"give names such as `input->a0.h0<q>`, places from 0"):
        exact(edges=[len(graph.edges)])
    with pytest.raises(ArgumentError, match=r"the graph has no edge `a0.h9->logits`"):
        exact(edges=["a0.h9->logits"])
    with pytest.raises(ArgumentError, match=r"what units write hangs on the graph"):
        mj.graph.writes(model, pair[0], graph=mj.graph.build(model, units=UNITS)).vectors(model)
    apart, whole = mj.graph.build(model, units=UNITS), mj.graph.writes(model, pair[1])
    with pytest.raises(
        ArgumentError, match="has 3 units of an MLP as nodes and `ablated` says what 0 of them write"
    ):
        mj.graph.masked_forward(model, pair[0], jnp.ones(len(apart.edges)), whole, graph=apart)
