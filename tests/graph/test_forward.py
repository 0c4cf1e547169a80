"""The masked forward against plain runs and against patches made with `intervene`."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError, UnsupportedModelError
from mechjax.graph import Writes
from mechjax.models import Config, init
from mechjax.models.experts import Experts
from tests.tolerances import TOL

LAYOUT = TOL["float32", "layout"]
SMALL = Config(
    d_vocab=20,
    n_ctx=8,
    d_model=8,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=4,
    d_mlp=12,
    precision="highest",
)
FAMILIES = {
    "grouped": {},
    "attention only": {"mlp": "none", "n_kv_heads": 4},
    "parallel, one norm, rotary": {"residual": "parallel_shared", "positions": "rotary"},
    "norms after, scaled": {
        "norms": "both",
        "out_bias": False,
        "residual_scale": 0.5,
        "norm": "rms",
        "mlp": "gated",
    },
    "some experts": {"mlp": "gated", "experts": Experts(n_experts=4, top_k=2, d_expert=6, layers=(1,))},
}


def model_of(name):
    config = dataclasses.replace(SMALL, **FAMILIES[name])
    model = init(config, key=jax.random.key(0))
    leaves, tree = jax.tree.flatten(model)  # everything redrawn: zero biases would hide where they are lost
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten(
        [0.8 * jax.random.normal(k, x.shape) + 0.1 for k, x in zip(keys, leaves, strict=True)]
    )


QUICK = ("grouped", "norms after, scaled")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in FAMILIES],
)
def subject(request):
    model = model_of(request.param)
    clean, corrupt = jax.random.randint(jax.random.key(2), (2, 2, 5), 0, 20)
    return model, mj.graph.build(model), clean, corrupt, mj.graph.writes(model, corrupt)


def test_masked_forward__all_edges_kept_or_all_cut__is_the_clean_or_the_corrupt_run(subject):
    model, graph, clean, corrupt, ablated = subject
    run = lambda kept: mj.graph.masked_forward(model, clean, kept, ablated, graph=graph)
    np.testing.assert_allclose(run(jnp.ones(len(graph.edges))), model(clean), **LAYOUT)
    np.testing.assert_allclose(run(jnp.zeros(len(graph.edges))), model(corrupt), **LAYOUT)


def test_writes__of_a_run__sum_to_the_stream_but_for_biases(subject):
    model, _, clean, corrupt, ablated = subject
    last = [mj.capture(model, "resid_post")(ids)[1]["resid_post"][-1] for ids in (clean, corrupt)]
    vectors = [w.vectors(model).sum(0) for w in (mj.graph.writes(model, clean), ablated)]
    np.testing.assert_allclose(last[0] - last[1], vectors[0] - vectors[1], **LAYOUT)


def test_masked_forward__some_edges_cut__are_the_patches_that_their_names_say(subject):
    """Into one reader of each kind, from the input and from a head: a patch of what that reader reads."""
    model, graph, clean, _, ablated = subject
    sent = ablated.vectors(model) - mj.graph.writes(model, clean).vectors(model)
    last = len(graph.readers) - 1
    kinds = {"q": "q_input", "k": "k_input", "v": "v_input"}
    for reader, name in enumerate(graph.readers[:-1]):
        if not name.startswith(("a1", "m1")) or name.startswith("a1.h2"):
            continue
        cut = [u for u in (0, 2, graph.before[reader] - 1) if u < graph.before[reader]]
        numbers = [graph.number(f"{graph.nodes[u]}->{name}") for u in cut]
        kept = jnp.ones(len(graph.edges)).at[jnp.array(numbers)].set(0.0)
        given = sent[jnp.array(cut)].sum(0)
        where = {"layer": 1}
        site = "mlp_in" if name == "m1" else kinds[name[-2]]
        if site != "mlp_in":
            head = name.partition(".")[2].partition("<")[0].lstrip("hkv")
            where[{"q_input": "head"}.get(site, "kv_head")] = int(head)
            given = given[..., None, :]
        expected = mj.intervene(model, [mj.add(site, given, **where)])(clean)
        actual = mj.graph.masked_forward(model, clean, kept, ablated, graph=graph)
        np.testing.assert_allclose(actual, expected, **LAYOUT, err_msg=name)
        assert not np.allclose(actual, model(clean), atol=1e-4), name
    assert graph.readers[last] == "logits"


def test_masked_forward__a_node_with_all_edges_cut__is_that_node_ablated():
    model = model_of("grouped")
    clean, corrupt = jax.random.randint(jax.random.key(2), (2, 2, 5), 0, 20)
    graph, ablated = mj.graph.build(model), mj.graph.writes(model, corrupt)
    kept = jnp.array([float(not e.startswith("a0.h3->")) for e in graph.edges])
    z = mj.capture(model, "z")(corrupt)[1]
    expected = mj.intervene(model, [mj.replace("z", z, layer=0, head=3)])(clean)
    np.testing.assert_allclose(
        mj.graph.masked_forward(model, clean, kept, ablated, graph=graph), expected, **LAYOUT
    )


def test_masked_forward__padding__changes_no_real_position():
    model = model_of("parallel, one norm, rotary")
    clean, corrupt = jax.random.randint(jax.random.key(2), (2, 2, 4), 0, 20)
    graph = mj.graph.build(model)
    kept = jax.random.uniform(jax.random.key(5), (len(graph.edges),))
    alone = mj.graph.masked_forward(model, clean, kept, mj.graph.writes(model, corrupt), graph=graph)
    mask = jnp.array([[False, True, True, True, True]] * 2)
    clean, corrupt = (
        mj.Prompts(jnp.pad(ids, ((0, 0), (1, 0)), constant_values=7), mask) for ids in (clean, corrupt)
    )
    padded = mj.graph.masked_forward(model, clean, kept, mj.graph.writes(model, corrupt), graph=graph)
    np.testing.assert_allclose(padded[:, 1:], alone, **LAYOUT)


def test_masked_forward__a_graph_with_keys_for_every_head__equals_the_grouped_one():
    model = model_of("grouped")
    clean, corrupt = jax.random.randint(jax.random.key(2), (2, 2, 5), 0, 20)
    graph, apart = (mj.graph.build(model, grouped=grouped) for grouped in (True, False))
    kept = jax.random.uniform(jax.random.key(5), (len(graph.edges),))
    names = []
    for edge in apart.edges:
        node, _, reader = edge.partition("->")
        if reader[-3:] in ("<k>", "<v>"):
            layer, head = reader[:-3].split(".h")
            reader = f"{layer}.kv{int(head) // 2}{reader[-3:]}"
        names.append(graph.number(f"{node}->{reader}"))
    ablated = mj.graph.writes(model, corrupt)
    expected = mj.graph.masked_forward(model, clean, kept, ablated, graph=graph)
    actual = mj.graph.masked_forward(model, clean, kept[jnp.array(names)], ablated, graph=apart)
    np.testing.assert_allclose(actual, expected, **LAYOUT)


def test_build__gpt2_small__has_the_edges_that_the_field_counts():
    config = Config(d_vocab=10, n_ctx=4, d_model=24, n_layers=12, n_heads=12, d_mlp=4)
    graph = mj.graph.build(init(config, key=jax.random.key(0)))
    assert (len(graph.nodes), len(graph.readers), len(graph.edges)) == (157, 445, 32_491)
    assert graph.edges[graph.number("a0.h1->a1.h2<q>")] == "a0.h1->a1.h2<q>"
    assert {"input->m0", "m1->logits", "a3.h2->m3"} <= set(graph.edges)
    assert str(graph) == "Graph of 12 layers of 12 heads and an MLP: 157 nodes, 445 readers, 32491 edges"


def test_graph__bad_input__is_explained():
    model = model_of("grouped")
    graph, ids = mj.graph.build(model), jnp.zeros((1, 3), jnp.int32)
    ablated = mj.graph.writes(model, ids)
    run = lambda graph, n: mj.graph.masked_forward(model, ids, jnp.ones(n), ablated, graph=graph)
    with pytest.raises(ShapeError, match=r"a mask of shape \(7,\) for \d+ edges: give one number per edge"):
        run(graph, 7)
    other = mj.graph.build(model_of("attention only"))
    with pytest.raises(
        ArgumentError, match=r"graph is of another model: it has n_kv_heads 4 \(the model: 2\), mlp"
    ):
        run(other, len(other.edges))
    with pytest.raises(ArgumentError, match=r"no edge `a0.h0->a1.h0<k>`.*Did you mean `a0.h0->a1.h0<q>`"):
        graph.number("a0.h0->a1.h0<k>")
    with pytest.raises(
        UnsupportedModelError, match="a norm stands after attention, and a bias before that norm"
    ):
        mj.graph.build(init(dataclasses.replace(SMALL, norms="post"), key=jax.random.key(0)))
    broken = eqx.tree_at(lambda m: m.blocks.mlp.W_out, model, model.blocks.mlp.W_out.at[1].set(jnp.nan))
    with pytest.raises(ArgumentError, match="`mlp_out` of layer 1 is not finite in this run"):
        mj.graph.writes(broken, ids)


def test_writes__is_a_pytree__whose_sums_are_runs():
    model = model_of("norms after, scaled")
    one, two = (mj.graph.writes(model, jnp.full((1, 3), i)) for i in (1, 2))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, two)
    assert isinstance(mean, Writes)
    np.testing.assert_allclose(mean.vectors(model), (one.vectors(model) + two.vectors(model)) / 2, **LAYOUT)
