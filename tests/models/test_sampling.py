import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.models.sampling import choose, log_probability

N_DRAWS = 20_000
LOGITS = np.array([0.1, 2.0, -1.0, 1.5, 1.4, -0.3, 0.9, -np.inf], np.float32)


def definition(logits, temperature, top_k=None, top_p=None):
    """The probabilities to draw from, by sorting: temperature, then top-k, then top-p of what is left."""
    order = np.argsort(-logits, kind="stable")
    scaled = logits[order].astype(np.float64) / temperature
    if top_k is not None:
        scaled[top_k:] = -np.inf
    p = np.exp(scaled - scaled[0])
    p /= p.sum()
    if top_p is not None:
        p[np.searchsorted(np.cumsum(p), top_p) + 1 :] = 0
        p /= p.sum()
    result = np.zeros_like(p)
    result[order] = p
    return result


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (3, None), (20, None), (None, 0.6), (4, 0.8), (None, 1.0)]
)
def test_choose__many_draws__are_as_often_as_defined(temperature, top_k, top_p):
    data = lambda x, dtype: None if x is None else dtype(x)
    logits = jnp.broadcast_to(LOGITS, (N_DRAWS, 8))
    drawn = choose(
        logits, jax.random.key(3), jnp.float32(temperature), data(top_k, jnp.int32), data(top_p, jnp.float32)
    )
    often = np.bincount(np.asarray(drawn), minlength=8) / N_DRAWS
    p = definition(LOGITS, temperature, top_k, top_p)
    assert (often[p == 0] == 0).all()
    spread = np.sqrt(p * (1 - p) / N_DRAWS)  # of the mean of as many draws
    assert (np.abs(often - p) <= 4.5 * spread).all()


@pytest.mark.slow
def test_choose__at_random_logits__keeps_what_is_defined():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (40, 60)).astype(np.float32)
    given = jnp.asarray(logits)
    for top_k, top_p in ((5, 0.9), (60, 0.3), (1, 1.0), (17, 0.99)):
        allowed = np.array([definition(row, 1.3, top_k, top_p) > 0 for row in logits])
        drawn = [
            choose(given, key, jnp.float32(1.3), jnp.int32(top_k), jnp.float32(top_p))
            for key in jax.random.split(jax.random.key(1), 30)
        ]
        assert np.take_along_axis(allowed, np.stack(drawn, 1), 1).all()


def test_choose__at_temperature_zero_or_without_key__takes_the_likeliest():
    logits = jax.random.normal(jax.random.key(0), (9, 30))
    likeliest = logits.argmax(-1)
    assert (choose(logits) == likeliest).all()
    assert (choose(logits, jax.random.key(1), jnp.float32(0.0)) == likeliest).all()
    assert (
        choose(logits, jax.random.key(1), jnp.float32(0.0), jnp.int32(4), jnp.float32(0.5)) == likeliest
    ).all()


def test_choose__of_nan__is_no_token():
    logits = jnp.array([[0.0, jnp.nan], [0.0, 1.0]])
    chosen = choose(logits)
    assert chosen.tolist() == [-1, 1]
    log_probs = log_probability(logits, chosen)
    assert jnp.isnan(log_probs).tolist() == [True, False]
