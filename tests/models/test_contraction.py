from dataclasses import replace

import jax
import jax.numpy as jnp

from mechjax.models import assemble, parameters


def dots(model, tokens):
    """Every contraction of the forward run and its gradient, as the compiler is given it."""
    loss = lambda model, tokens: model(tokens).astype(jnp.float32).sum()
    text = (
        jax.jit(lambda model, tokens: (model(tokens), jax.grad(loss)(model, tokens)))
        .lower(model, tokens)
        .as_text()
    )
    return [line for line in text.splitlines() if "dot_general" in line]


def test_float32__every_contraction__is_at_highest_precision(tiny_model, tiny_tokens):
    lines = dots(tiny_model, tiny_tokens)
    assert len(lines) > 20
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in lines)


def test_default_precision_and_bfloat16__no_contraction__asks_for_more(tiny_model, tiny_tokens):
    config = replace(tiny_model.config, precision="default")
    fast = assemble(config, parameters(tiny_model))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), fast)
    for model in (fast, half):
        assert not any("HIGHEST" in line for line in dots(model, tiny_tokens))
