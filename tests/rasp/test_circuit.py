"""The true edges: what the weights carry, and what removing an edge does."""

from itertools import compress, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import SiteError
from mechjax.rasp import STANDARD, compile_program, interpret
from tests.cut_edges import cut_one_by_one
from tests.tolerances import TOL

LONGEST = 4
SMALL = ["double_hist"]
MORE = ["reverse", "shift", "after_first", "dyck", "frac_prevs"]
CLOSE = TOL["float32", "parity"]


@pytest.fixture(
    scope="module", params=[*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def case(request):
    standard = STANDARD[request.param]
    rotation = jax.random.key(3) if request.param in ("shift", "reverse") else None
    compiled = compile_program(
        standard.make(), standard.vocabulary, LONGEST, causal=standard.causal, rotation=rotation
    )
    words = [w for n in range(1, LONGEST + 1) for w in product(standard.vocabulary, repeat=n)]
    return compiled, compiled.encode(words)


def streams(compiled, prompts, without=None):
    """By hand, in float64: what nodes write, and logits, where each reader gets all before it but for one edge."""
    model = jax.tree.map(lambda x: np.asarray(x, np.float64), compiled.model)
    config, attn, mlp = model.config, model.blocks.attn, model.blocks.mlp
    tokens, real = np.asarray(prompts.tokens), np.asarray(prompts.mask)
    seen = real[:, :, None] == real[:, None, :]
    if config.causal:
        seen = seen & np.tri(tokens.shape[-1], dtype=bool)
    wrote = {"input": model.W_E[tokens] + model.W_pos[np.maximum(np.cumsum(real, -1) - 1, 0)]}
    biases = np.zeros((*tokens.shape, config.d_model))

    def read(reader):
        return biases + sum(x for writer, x in wrote.items() if f"{writer}->{reader}" != without)

    for i in range(config.n_layers):
        results = {}
        for h in range(config.n_heads):
            sides = {"q": (attn.W_Q, attn.b_Q), "k": (attn.W_K, attn.b_K), "v": (attn.W_V, attn.b_V)}
            q, k, v = (read(f"a{i}.h{h}<{s}>") @ W[i, :, h] + b[i, h] for s, (W, b) in sides.items())
            powers = np.where(seen, np.exp(q @ k.swapaxes(1, 2) * config.attn_scale), 0.0)
            sink = np.exp(attn.sinks[i, h]) if config.attn_sinks else 0.0
            pattern = powers / (powers.sum(-1, keepdims=True) + sink)
            results[f"a{i}.h{h}"] = pattern @ v @ attn.W_O[i, h]
        wrote |= results
        biases = biases + attn.b_O[i]
        hidden = np.maximum(read(f"m{i}") @ mlp.W_in[i] + mlp.b_in[i], 0.0)
        wrote[f"m{i}"] = hidden @ mlp.W_out[i] + mlp.b_out[i]
    return {name: x[real] for name, x in (wrote | {"logits": read("logits") @ model.W_U}).items()}


def test_masked_forward__with_all_edges__is_the_model(case):
    compiled, prompts = case
    assert_allclose(streams(compiled, prompts)["logits"], compiled.model(prompts)[prompts.mask], **CLOSE)


def test_edges__removed_one_by_one__matter_to_their_reader_exactly_where_they_are_true(case):
    compiled, prompts = case
    graph = compiled.graph
    whole = streams(compiled, prompts)
    assert not np.any(np.asarray(compiled.constant) & ~np.asarray(compiled.circuit))
    for (_, v, _), edge in zip(graph.table, graph.edges, strict=True):
        reader = graph.readers[v].partition("<")[0]
        change = np.abs(streams(compiled, prompts, edge)[reader] - whole[reader]).max()
        if edge in compiled.edges:
            assert change > 0.01, f"{edge} carries nothing"
        else:
            assert change < CLOSE["atol"], f"{edge} is missing"


def test_edges__of_the_weights__are_those_whose_product_is_not_zero(case):
    compiled, _ = case
    model, graph = compiled.model, compiled.graph
    attn, mlp = model.blocks.attn, model.blocks.mlp
    out = {"input": jnp.concatenate((model.W_E, model.W_pos))}
    into = {"logits": model.W_U}
    for i in range(graph.n_layers):
        for h in range(graph.n_heads):
            out[f"a{i}.h{h}"] = attn.W_O[i, h]
            into |= {
                f"a{i}.h{h}<{s}>": W[i, :, h] for s, W in (("q", attn.W_Q), ("k", attn.W_K), ("v", attn.W_V))
            }
        out[f"m{i}"] = jnp.concatenate((mlp.W_out[i], mlp.b_out[i][None]))
        into[f"m{i}"] = mlp.W_in[i]
    sizes = [np.abs(out[graph.nodes[u]] @ into[graph.readers[v]]).max() for u, v, _ in graph.table]
    np.testing.assert_array_equal(np.array(sizes) > 1e-4, compiled.circuit)


def pairs(compiled, prompts):
    """Inputs of the full length in pairs that end in different answers, and the metric between these."""
    full = np.asarray(prompts.tokens)[np.asarray(prompts.mask).all(-1)]
    other = np.random.default_rng(0).permutation(full)
    answers = [np.asarray(compiled.model(ids))[:, -1].argmax(-1) for ids in (full, other)]
    differ = answers[0] != answers[1] if compiled.variables[-1].size > 1 else np.ones(len(full), bool)
    right, wrong = (a[differ] if compiled.variables[-1].size > 1 else i for i, a in enumerate(answers))
    return full[differ], other[differ], mj.metrics.logit_diff(right, wrong)


@pytest.mark.parametrize("by_masks", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_effects__of_resampled_edges__are_zero_outside_the_circuit_and_where_it_is_constant(case, by_masks):
    compiled, graph = case[0], case[0].graph
    clean, corrupt, metric = pairs(*case)
    if by_masks:
        effects = np.abs(cut_one_by_one(compiled.model, clean, corrupt, metric, graph)).mean(-1)
    else:
        found = mj.attribution.exact(
            compiled.model, clean, corrupt, metric, graph=graph, reduce="mean_of_abs"
        )
        effects = np.asarray(found.scores)
    matters = np.asarray(compiled.circuit & ~compiled.constant)
    assert matters.any()
    assert effects[~matters].max() < CLOSE["atol"]
    assert effects[matters].min() > 1e-3


def test_reverse__circuit__is_the_one_the_program_says():
    standard = STANDARD["reverse"]
    compiled = compile_program(standard.make(), standard.vocabulary, LONGEST)
    assert set(compiled.edges) == {
        "a0.h0->m0", "m0->m1", "input->m1", "m1->a2.h0<q>", "input->a2.h0<k>", "input->a2.h0<v>", "a2.h0->logits",
    }  # fmt: skip
    moving = np.asarray(compiled.circuit & ~compiled.constant)
    assert [*compress(compiled.graph.edges, moving)] == ["input->a2.h0<v>", "a2.h0->logits"]
    assert dict(compiled.writes) == {
        "input": ("indices", "tokens"), "a0.h0": ("length.share",), "a2.h0": ("reverse",), "m0": ("length",),
        "m1": ("opposite",),
    }  # fmt: skip
    assert dict(compiled.reads)["m1"] == ("length", "indices")


def test_read__of_a_stream__gives_what_the_program_holds_there():
    standard = STANDARD["reverse"]
    program = standard.make()
    compiled = compile_program(program, standard.vocabulary, LONGEST, rotation=jax.random.key(1))
    words = [tuple("abca"), tuple("cb")]
    prompts = compiled.encode(words)
    acts = mj.capture(compiled.model, "resid_post")(prompts)[1]
    opposite = program.selector.queries
    assert compiled.read(acts["resid_post"][1], "opposite", prompts) == [
        interpret(opposite, w) for w in words
    ]
    with pytest.raises(
        SiteError, match=r"no variable `oposite`: there are indices, tokens.*Did you mean `opposite`"
    ):
        compiled.read(acts["resid_post"][1], "oposite", prompts)


def test_sites__of_a_compiled_model__are_edited_and_captured():
    standard = STANDARD["reverse"]
    compiled = compile_program(standard.make(), standard.vocabulary, LONGEST)
    model, prompts = compiled.model, compiled.encode([tuple("abcb")])
    pattern = mj.capture(model, "pattern")(prompts)[1]["pattern"]
    assert_allclose(pattern[2, 0, 0], np.eye(4)[::-1], atol=1e-6)
    # The program's `opposite` is wherever the last layer looks: with it swapped, the output is the input.
    opposite = next(v for v in compiled.variables if v.name == "opposite")
    identity = jnp.stack([jnp.asarray(opposite.encode(i), jnp.float32) for i in range(4)])
    found = mj.capture(model, "resid_post", layers=1)(prompts)[1]["resid_post"][0]
    swapped = found.at[..., opposite.start : opposite.stop].set(identity)
    edited = mj.intervene(model, [mj.replace("resid_post", swapped, layer=1)])
    assert compiled.decode(model(prompts), prompts) == [list("bcba")]
    assert compiled.decode(edited(prompts), prompts) == [list("abcb")]
    assert "ln_final.scale" not in mj.list_sites(model, prompts)


def test_compiled__saved__comes_back(tmp_path):
    standard = STANDARD["shift"]
    compiled = compile_program(standard.make(), standard.vocabulary, LONGEST, causal=True)
    again = mj.restore(mj.save(compiled, tmp_path / "shift"))
    assert (again.edges, again.variables, again.vocabulary) == (
        compiled.edges,
        compiled.variables,
        compiled.vocabulary,
    )
    assert again([tuple("abca")]) == [[None, None, "a", "b"]]
    assert len(repr(compiled).splitlines()) < 20
