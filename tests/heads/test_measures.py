"""Head measures against loops over queries and keys, on heads made by hand, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import ArgumentError
from mechjax.heads import (
    copying,
    detect_heads,
    duplicate_token,
    in_context_learning,
    induction,
    previous_token,
    repeated_tokens,
)
from mechjax.models import Config, assemble, init, parameters
from tests.tolerances import TOL


def brute_force(pattern, tokens, mask, kind: str) -> np.ndarray:
    """The score of one layer's pattern [batch, head, query, key], one query and key at a time."""
    total, counted = np.zeros(pattern.shape[1]), 0
    for b, (row, real) in enumerate(zip(np.asarray(tokens), np.asarray(mask), strict=True)):
        places = np.flatnonzero(real)
        for n, q in enumerate(places):
            earlier = [i for i in range(n) if row[places[i]] == row[q]]
            keys = {
                "previous_token": [places[n - 1]] if n else [],
                "duplicate_token": [places[i] for i in earlier],
                "induction": [places[i + 1] for i in earlier],
            }[kind]
            counted += bool(keys)
            total += sum(pattern[b, :, q, k] for k in keys)
    return total / counted


@pytest.fixture(scope="module")
def prompts():
    """Few kinds of tokens, padding at the left, the right and between."""
    tokens = jax.random.randint(jax.random.key(3), (3, 12), 0, 5)
    mask = np.ones((3, 12), bool)
    mask[0, :3] = mask[1, 9:] = mask[2, 4:6] = False
    return mj.Prompts(tokens, jnp.asarray(mask))


@pytest.mark.parametrize("measure", [previous_token, duplicate_token, induction])
def test_measure__of_random_heads__is_the_loop_over_queries_and_keys(tiny_model, prompts, measure):
    pattern = np.asarray(mj.capture(tiny_model, "pattern")(prompts)[1]["pattern"], np.float64)
    found = measure(tiny_model, prompts)
    expected = [brute_force(layer, prompts.tokens, prompts.mask, found.kind) for layer in pattern]
    assert_allclose(found.scores, expected, **TOL["float32", "layout"])
    grouped = mj.Prompts(prompts.tokens[None], prompts.mask[None])
    assert_allclose(measure(tiny_model, grouped).scores, found.scores, **TOL["float32", "layout"])


def test_detect_heads__of_random_heads__stacks_the_three(tiny_model, prompts):
    found = detect_heads(tiny_model, prompts)
    assert found.kinds == ("previous_token", "duplicate_token", "induction")
    for i, measure in enumerate((previous_token, duplicate_token, induction)):
        assert_allclose(found.scores[i], measure(tiny_model, prompts).scores, **TOL["any", "exact"])
    named = found.heads(float(jnp.sort(found.scores[2].ravel())[-2]))["induction"]
    place = jnp.unravel_index(found.scores[2].argmax(), found.scores[2].shape)
    assert named == (f"L{place[0]}.H{place[1]}",)
    assert found.top(1)[0][0].startswith(tuple(f"{kind}.L" for kind in found.kinds))


def test_measures__without_anything_to_look_at__say_which_prompts_have(tiny_model):
    with pytest.raises(
        ArgumentError, match=r"induction heads cannot be told.*no token occurs twice.*repeated_tokens"
    ):
        induction(tiny_model, [[1, 2, 3]])
    with pytest.raises(ArgumentError, match="duplicate_token heads cannot be told"):
        duplicate_token(tiny_model, [[1, 2, 3]])
    with pytest.raises(ArgumentError, match="every prompt has one token only"):
        previous_token(tiny_model, [[1], [2]])


def test_repeated_tokens__are_distinct_repeated_and_reproducible(tiny_model):
    prompts = repeated_tokens(tiny_model, key=jax.random.key(0), n=5, period=8, bos=0, ids=range(3, 20))
    tokens = np.asarray(prompts.tokens)
    assert tokens.shape == (5, 17)
    assert (tokens[:, 0] == 0).all()
    assert (tokens[:, 1:9] == tokens[:, 9:]).all()
    assert all(len(set(row)) == 8 for row in tokens[:, 1:9])
    assert tokens[:, 1:].min() >= 3 and tokens.max() < 20
    assert len({tuple(row) for row in tokens}) == 5
    again = repeated_tokens(tiny_model, key=jax.random.key(0), n=5, period=8, bos=0, ids=range(3, 20))
    assert_allclose(again.tokens, tokens, **TOL["any", "exact"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"period": 13}, "makes 26 tokens; the model has 24 positions. Ask for period=12 at most"),
        ({"ids": [50]}, "draw from at least one of the model's tokens, 0 to 49"),
        ({"ids": [3], "bos": 3}, "draw from at least one"),
        ({"times": 1}, "times=1: at least 1, 1 and 2"),
    ],
)
def test_repeated_tokens__that_cannot_be__are_refused(tiny_model, asked, message):
    with pytest.raises(ArgumentError, match=message):
        repeated_tokens(tiny_model, key=jax.random.key(0), **asked)


def test_copying__heads_that_copy_or_suppress__score_one_and_minus_one():
    config = Config(d_vocab=11, n_ctx=8, d_model=8, n_layers=1, n_heads=2, d_head=4, mlp="none", tied=True)
    model = init(config, key=jax.random.key(0))
    params = parameters(model)
    gains = 0.5 + jnp.arange(8) / 8
    W_V = jax.random.normal(jax.random.key(1), (1, 8, 2, 4))
    W_O = jnp.moveaxis(W_V, 1, 3) * jnp.array([1.0, -1.0])[:, None, None]
    params |= {
        "blocks.attn.W_V": W_V,
        "blocks.attn.W_O": W_O,
        "blocks.ln1.w": gains[None],
        "ln_final.w": gains,
    }
    assert_allclose(copying(assemble(config, params)).scores, [[1.0, -1.0]], rtol=1e-4)


def test_copying__of_any_heads__is_that_of_the_whole_circuit(tiny_model):
    params = parameters(tiny_model)
    keys = jax.random.split(jax.random.key(1), 2)
    params |= {
        f"{n}.w": 1 + jax.random.normal(k, params[f"{n}.w"].shape)
        for n, k in zip(("blocks.ln1", "ln_final"), keys, strict=True)
    }
    model = assemble(tiny_model.config, params)
    V, O = (np.asarray(x, np.float64) for x in (model.blocks.attn.W_V, model.blocks.attn.W_O))
    E = np.asarray(model.W_E, np.float64)
    for layer in range(3):
        for head in range(4):
            read = E * np.asarray(model.blocks.ln1.w[layer])
            circuit = read @ V[layer, :, head] @ O[layer, head] @ (E * np.asarray(model.ln_final.w)).T
            values = np.linalg.eigvals(circuit)
            expected = values.real.sum() / np.abs(values).sum()
            assert float(copying(model).scores[layer, head]) == pytest.approx(expected, abs=1e-4)


def test_in_context_learning__of_ragged_prompts__is_late_loss_less_early_loss(tiny_model, prompts):
    found = in_context_learning(tiny_model, prompts, early=2, late=7)
    losses = []
    for tokens, mask in zip(prompts.tokens, prompts.mask, strict=True):
        alone = tokens[np.asarray(mask)]
        logits = np.asarray(jax.nn.log_softmax(tiny_model(alone), -1))
        losses.append([-logits[i - 1, int(alone[i])] for i in (2, 7)])
    expected = np.mean(losses, 0)
    assert_allclose(found.losses[jnp.array([2, 7])], expected, **TOL["float32", "layout"])
    assert_allclose(found.score, expected[1] - expected[0], **TOL["float32", "layout"])
    with pytest.raises(ArgumentError, match="early=2, late=9: the shortest prompt has 9 tokens"):
        in_context_learning(tiny_model, prompts, early=2, late=9)
