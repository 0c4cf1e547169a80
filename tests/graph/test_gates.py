"""Gates: what each edge does, and which of the usual methods misses it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import ArgumentError
from mechjax.graph import GATES, gate
from tests.cut_edges import cut_one_by_one
from tests.tolerances import TOL

CLOSE = TOL["float32", "parity"]
N = 2
BIT, MLP, QUERY = "input->a0.h1<v>", "a0.h1->m1", "a0.h1->a1.h0<q>"
CUT = {  # gate -> effect of resampling one edge on the clean prompt, and of restoring it on the corrupt one
    "or": ({BIT: 0, MLP: 0, "m1->logits": 1}, {BIT: -1, MLP: -1, "m1->logits": -1}),
    "and": ({BIT: 1, MLP: 1, "m1->logits": 1}, {BIT: 0, MLP: 0, "m1->logits": -1}),
    "adder": ({BIT: 1, MLP: 1, "m1->logits": 2}, {BIT: -1, MLP: -1, "m1->logits": -2}),
    "saturated": ({BIT: 1, QUERY: 1, "a1.h0->logits": 1}, {BIT: 0, QUERY: 0, "a1.h0->logits": -1}),
    "saturated_or": ({BIT: 0, QUERY: 0, "a1.h0->logits": 1}, {BIT: -1, QUERY: -1, "a1.h0->logits": -1}),
    "cancelling_and": (
        {BIT: 0.75, "a0.h1->logits": 1, MLP: -0.25, "m1->logits": -1.25},
        {BIT: 0, "a0.h1->logits": -1, MLP: 1, "m1->logits": 1.25},
    ),
    "cancelling_or": (
        {BIT: 0, "a0.h1->logits": 1, MLP: -1, "m1->logits": -1.25},
        {BIT: -0.75, "a0.h1->logits": -1, MLP: 0.25, "m1->logits": 1.25},
    ),
    "cancelling": (
        {BIT: 0.75, "a0.h1->logits": 1, MLP: -0.25, "m1->logits": -0.25},
        {BIT: -1, "a0.h1->logits": -1, MLP: 0, "m1->logits": 0.25},
    ),
}


@pytest.mark.parametrize("name", GATES)
def test_gate__edges__do_what_the_gate_says_and_no_others_do_anything(name):
    truth = gate(name, N)
    graph = truth.graph
    assert (truth.circuit | ~truth.constant).all()
    assert {graph.edges[i] for i in np.flatnonzero(truth.varying)} == {
        e for edge in CUT[name][0] for e in (edge, edge.replace("a0.h1", "a0.h0"))
    }
    sides = (truth.clean, truth.corrupt)
    for (one, other), known in zip((sides, sides[::-1]), CUT[name], strict=True):
        effects = cut_one_by_one(truth.model, one, other, truth.metric, graph)[:, 0]
        expected = np.zeros(len(graph.edges))
        for edge, effect in known.items():
            for head in range(N):
                expected[graph.number(edge.replace("a0.h1", f"a0.h{head}"))] = effect
        assert_allclose(effects, expected, **CLOSE)


@pytest.mark.parametrize("name", ["and", "saturated", "saturated_or"])
def test_gate__of_constant_edges__is_needed_though_resampling_does_not_see_it(name):
    """With zeros in their place the heads no longer know where to look."""
    truth = gate(name, N)
    nothing = jax.tree.map(jnp.zeros_like, mj.graph.writes(truth.model, truth.corrupt))
    kept = jnp.where(truth.circuit, 1.0, 0.0)
    run = lambda kept: truth.metric(
        mj.graph.masked_forward(truth.model, truth.clean, kept, nothing, graph=truth.graph)
    )
    assert_allclose(run(kept), truth.metric(truth.model(truth.clean)), **CLOSE)
    assert abs(float(run(jnp.where(truth.varying, 1.0, 0.0))[0] - run(kept)[0])) > 0.2


@pytest.mark.parametrize(
    ("name", "effect"), [("saturated", 1), ("cancelling", 0.75), ("cancelling_and", 0.75), ("adder", 1)]
)
def test_gradients__at_the_clean_prompt__miss_saturated_and_cancelling_gates(name, effect):
    truth = gate(name, N)
    score = lambda tokens: truth.metric(truth.model(tokens))[0]
    z = lambda tokens: mj.capture(truth.model, "z", layers=0)(tokens)[1]["z"][0]
    grad = mj.value_and_grad_at(truth.model, truth.metric, "z", layers=0)(truth.clean)[1]["z"][0]
    move = z(truth.clean) - z(truth.corrupt)
    first_order = np.asarray((grad * move)[0, -1, :, 0])
    exact = [
        score(truth.clean)
        - truth.metric(
            mj.intervene(truth.model, [mj.replace("z", z(truth.corrupt), layer=0, head=head)])(truth.clean)
        )[0]
        for head in range(N)
    ]
    assert_allclose(np.array(exact), effect, **CLOSE)
    if name == "adder":
        assert_allclose(first_order, 1, **CLOSE)
    else:
        np.testing.assert_array_equal(first_order, 0)


def test_gate__of_three_bits__is_one_too():
    truth = gate("saturated", 3)
    prompts = jnp.asarray([[1, 1, 1, 2], [1, 0, 1, 2], [0, 0, 0, 2]])
    assert_allclose(truth.metric(truth.model(prompts)), [1, 0, 0], **CLOSE)


def test_gate__that_is_none__is_explained(as_a_user):
    with pytest.raises(ArgumentError, match=r"no gate 'nor': there are or, and.*Did you mean `or`"):
        gate("nor")
    with pytest.raises(ArgumentError, match=r"n_inputs=0: give a whole number from 1"):
        gate("or", 0)
