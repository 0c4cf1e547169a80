"""The sites on request: what one head reads and writes, edited alone."""

import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from tests.tolerances import TOL

READS = {"q_input": "q", "k_input": "k", "v_input": "v"}


@pytest.fixture(scope="module")
def runs(tiny_model, tiny_tokens):
    """Two different runs and all that they compute."""
    sites = ["attn_in", "ln1.normalized", "q", "k", "v", "z", "result", "attn_out"]
    capture = mj.capture(tiny_model, sites)
    return [capture(tokens)[1] for tokens in (tiny_tokens, 49 - tiny_tokens)]


@pytest.mark.parametrize("site", READS)
def test_head_inputs__replaced_in_one_head__change_what_that_head_reads_alone(
    tiny_model, tiny_tokens, runs, site
):
    here, there = runs
    head, layer = 2, 1
    value = there["attn_in"][layer]
    axis = "head" if site == "q_input" else "kv_head"
    edit = mj.replace(site, value[..., None, :], layer=layer, **{axis: head})
    _, edited = mj.run(tiny_model, tiny_tokens, edits=[edit], capture=list(READS.values()))
    for name in READS.values():
        expected = here[name][layer]
        if name == READS[site]:
            expected = expected.at[..., head, :].set(there[name][layer][..., head, :])
        assert_allclose(edited[name][layer], expected, **TOL["float32", "layout"])


def test_shared_norm__edited_while_heads_are_split__still_reaches_every_head(tiny_model, tiny_tokens, runs):
    here, there = runs
    swap = mj.replace("ln1.normalized", there["ln1.normalized"][0], layer=0)
    split = mj.add("q_input", jnp.zeros(16), layer=0)
    _, edited = mj.run(tiny_model, tiny_tokens, edits=[swap, split], capture=["q", "k"])
    assert_allclose(edited["q"][0], there["q"][0], **TOL["float32", "layout"])
    assert_allclose(edited["k"][0], there["k"][0], **TOL["float32", "layout"])
    assert jnp.abs(here["q"][0] - there["q"][0]).max() > 1e-3


def test_result__one_head_silenced__equals_silencing_its_z(tiny_model, tiny_tokens, runs):
    here, _ = runs
    silenced = [
        mj.run(tiny_model, tiny_tokens, edits=[mj.zero(site, layer=1, head=3)]) for site in ("result", "z")
    ]
    assert_allclose(silenced[0], silenced[1], **TOL["float32", "layout"])
    _, acts = mj.run(
        tiny_model, tiny_tokens, edits=[mj.zero("result", layer=1, head=3)], capture=["attn_out"]
    )
    expected = here["attn_out"][1] - here["result"][1][..., 3, :]
    assert_allclose(acts["attn_out"][1], expected, **TOL["float32", "layout"])
