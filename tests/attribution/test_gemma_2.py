"""Edges of Gemma 2, read as from its checkpoint: norms after attention and MLP, caps, a window, a gate, shared keys.

Per-head writes pass a norm there. Exact scores and gradients are held against edits of the plain model, whose change of
what a reader reads is formed by hand, and against the gradient of the masked forward.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.models.families.known import config_from_hf
from tests.tolerances import TOL

HF = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 20, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "max_position_embeddings": 16, "query_pre_attn_scalar": 5, "sliding_window": 3, "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}  # fmt: skip
DOUBLE = TOL["float64", "gradient"]


@pytest.fixture(scope="module", autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def model(draw):
    config, family = config_from_hf(HF)
    assert (family.name, config.norms, config.norm_offset, config.windows) == (
        "gemma2",
        "both",
        1.0,
        (3, None),
    )
    return draw(config, np.float64)


def sent(model, acts, other, layer, head):
    """By hand: what resampling a head adds to the stream, a share of the norm's output at the scale of either run."""
    attn, post = model.blocks.attn, model.blocks.ln1_post
    writes = [
        np.einsum("bpd,dm->bpm", a["z"][layer, :, :, head], attn.W_O[layer, head])
        / np.asarray(a["ln1_post.scale"][layer])
        * (1 + np.asarray(post.w[layer]))
        for a in (acts, other)
    ]
    return jnp.asarray(writes[1] - writes[0])


@pytest.mark.slow
def test_edges__of_gemma_2__are_edits_of_what_readers_read(model, graph, pair, metric):
    exact = mj.attribution.exact(model, *pair, metric, graph=graph)
    acts, other = (mj.capture(model, ["z", "ln1_post.scale", "mlp_out"])(ids)[1] for ids in pair)
    head, mlp = sent(model, acts, other, 0, 1), other["mlp_out"][0] - acts["mlp_out"][0]
    reads = {
        "a0.h1->m0": mj.add("mlp_in", head, layer=0),
        "a0.h1->a1.h2<q>": mj.add("q_input", head[..., None, :], layer=1, head=2),
        "m0->a1.kv0<k>": mj.add("k_input", mlp[..., None, :], layer=1, kv_head=0),
        "m0->logits": mj.add("resid_post", mlp, layer=1),
    }
    clean = metric(model(pair[0]))
    for edge, edit in reads.items():
        effect = (clean - metric(mj.intervene(model, [edit])(pair[0]))).mean()
        np.testing.assert_allclose(exact.scores[graph.number(edge)], effect, rtol=1e-9, atol=1e-11)
        assert abs(effect) > 1e-4, edge


@pytest.mark.slow
def test_eap__of_gemma_2__is_the_slope_of_small_steps_of_the_mask(model, graph, pair, metric):
    found = mj.attribution.eap(model, *pair, metric, graph=graph)
    ablated, step = mj.graph.writes(model, pair[1]), 1e-5
    run = lambda kept: metric(mj.graph.masked_forward(model, pair[0], kept, ablated, graph=graph)).mean()
    for direction in np.random.default_rng(0).normal(size=(3, len(graph.edges))):
        high, low = (run(jnp.asarray(1 + by * direction)) for by in (step, -step))
        slope = (high - low) / (2 * step)
        np.testing.assert_allclose(found.scores @ direction, slope, rtol=1e-6, atol=1e-9)
        assert abs(slope) > 0.01


@pytest.mark.slow
def test_eap__of_gemma_2__is_the_slope_of_the_mask(model, graph, pair, metric):
    found = mj.attribution.eap(model, *pair, metric, graph=graph)
    ablated = mj.graph.writes(model, pair[1])

    @eqx.filter_jit
    def slope(model, kept):
        run = lambda kept: metric(mj.graph.masked_forward(model, pair[0], kept, ablated, graph=graph)).mean()
        return jax.grad(run)(kept)

    np.testing.assert_allclose(found.scores, slope(model, jnp.ones(len(graph.edges))), **DOUBLE)


@pytest.mark.slow
def test_eap_ig__of_gemma_2__sums_to_the_difference_of_the_runs(model, graph, pair, metric):
    gap = float((metric(model(pair[0])) - metric(model(pair[1]))).mean())
    on_the_mask = mj.attribution.eap_ig(model, *pair, metric, graph=graph, path="mask", steps=80)
    on_inputs = mj.attribution.eap_ig(model, *pair, metric, graph=graph, steps=80)
    first = graph.table[:, 0] == 0
    assert float(on_the_mask.scores.sum()) == pytest.approx(gap, abs=2e-3 * max(1, abs(gap)))
    assert float(on_inputs.scores[first].sum()) == pytest.approx(gap, abs=2e-3 * max(1, abs(gap)))


@pytest.mark.slow
def test_exact__of_all_edges_of_gemma_2__equals_a_loop_of_masked_runs(model, graph, pair, metric):
    found = mj.attribution.exact(model, *pair, metric, graph=graph)
    ablated, clean, n = mj.graph.writes(model, pair[1]), metric(model(pair[0])), len(graph.edges)
    for edge in range(n):
        kept = jnp.where(jnp.arange(n) == edge, 0.0, 1.0)
        effect = clean - metric(mj.graph.masked_forward(model, pair[0], kept, ablated, graph=graph))
        np.testing.assert_allclose(found.scores[edge], effect.mean(), rtol=1e-9, atol=1e-11)
