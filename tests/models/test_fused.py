"""Attention block by block against attention through its pattern, which is formed because it is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.models import Cache, Config, fused
from mechjax.models.attention import Attention
from mechjax.models.latent import Latent
from mechjax.models.marks import marks_of
from mechjax.models.positions import Places, Sequence, Varying, arrange
from tests.tolerances import TOL

POS = 11
REAL = np.arange(POS) < np.array([[POS], [7]])
CASES = {
    "windows, grouped keys": ({"windows": (5,), "n_kv_heads": 2}, REAL),
    "sinks, soft-cap, alibi, one key head": (
        {"attn_sinks": True, "attn_softcap": 2.0, "positions": "alibi", "n_kv_heads": 1, "attn_scale": 0.7},
        REAL[:, ::-1],
    ),
}


def config_of(choices, **sizes):
    return Config(d_vocab=31, n_ctx=24, d_model=16, n_layers=1, n_heads=4, **choices, **sizes)


def attend_of(config, n_pos, mask=None, sequence=None):
    """Attention as a function of queries, keys, values and sinks."""
    sequence = arrange(config, n_pos, mask, None) if sequence is None else sequence
    here = Varying(None if config.windows is None else jnp.int32(config.windows[0]), None)
    mark = marks_of(0, config)
    return lambda x: Attention._attend(*x[:3], sequence, here, config, mark, x[3])


def inputs_of(config, seed, n_pos=POS, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
    q, k, v = (
        jax.random.normal(key, (2, n_pos, n, config.d_head), dtype)
        for key, n in zip(keys, heads, strict=False)
    )
    return q, 2 * k, v, jax.random.normal(keys[3], (config.n_heads,)) if config.attn_sinks else None


def dense(f):
    return lambda x: mj.capture(f, ["pattern"])(x)[0]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(fused, "_BLOCK", 4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", CASES)
def test_fused__values_and_derivatives__are_those_through_the_pattern(name):
    choices, mask = CASES[name]
    config = config_of(choices)
    f = attend_of(config, POS, jnp.asarray(mask))
    x, dx = inputs_of(config, 0), inputs_of(config, 1)

    @jax.jit
    def everything(x, dx):
        def derivatives(f):
            z, dz = jax.jvp(f, (x,), (dx,))
            loss = lambda x: jnp.sin(jax.checkpoint(f)(x)).sum()
            gradient, curved = jax.jvp(jax.grad(loss), (x,), (dx,))
            return z, dz, gradient, curved

        return derivatives(f), derivatives(dense(f))

    assert "pattern" in mj.list_sites(f, x) and "scan" in str(jax.make_jaxpr(f)(x))
    for ours, theirs in zip(*everything(x, dx), strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert_allclose(a, b, **TOL["float32", "parity"])


@pytest.mark.usefixtures("small_blocks")
def test_fused__where_all_see_all__is_the_same():
    places = Places(jnp.zeros(POS, jnp.int32), jnp.asarray(REAL))
    config = config_of({})
    f = attend_of(config, POS, sequence=Sequence(jnp.arange(POS), places, places, None))
    x = inputs_of(config, 0)
    assert_allclose(f(x), dense(f)(x), **TOL["float32", "parity"])


@pytest.mark.usefixtures("small_blocks")
def test_fused__in_bfloat16__keeps_scores_and_sums_in_float32():
    config = config_of({})
    f, x = attend_of(config, POS), inputs_of(config, 0, dtype=jnp.bfloat16)
    gradient = lambda f: jax.grad(lambda x: jnp.square(f(x).astype(jnp.float32)).mean())
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)
    for ours, exact in ((f(x), dense(f)(wide)), (gradient(f)(x), gradient(dense(f))(wide))):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
            assert a.dtype == jnp.bfloat16
            assert_allclose(a.astype(jnp.float32), b, **TOL["bfloat16", "parity"])


@pytest.mark.usefixtures("small_blocks")
def test_fused__keys_that_no_query_of_a_block_sees__are_left_out():
    config = config_of({})
    q, k, v, _ = inputs_of(config, 0)
    f = attend_of(config, POS)
    unseen = f((q, k.at[:, 8:].set(jnp.nan), v.at[:, 8:].set(jnp.nan), None))
    assert_allclose(unseen[:, :8], f((q, k, v, None))[:, :8], **TOL["any", "exact"])
    assert jnp.isnan(unseen[:, 8:]).all()


@pytest.mark.usefixtures("small_blocks")
def test_fused__every_contraction__is_at_highest_precision():
    config = config_of({})
    loss = lambda x: attend_of(config, POS)(x).sum()
    text = jax.jit(jax.value_and_grad(loss)).lower(inputs_of(config, 0)).as_text()
    lines = [line for line in text.splitlines() if "dot_general" in line]
    assert len(lines) >= 7
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in lines)


def test_fused__of_a_long_text__takes_memory_that_grows_as_the_text():
    config = config_of({"windows": (700,)})

    def taken(n_pos, route):
        mask = jnp.ones((1, n_pos), bool)
        loss = lambda x: route(attend_of(config, n_pos, mask))(x).sum()
        program = jax.jit(jax.value_and_grad(loss)).lower(inputs_of(config, 0, n_pos))
        return program.compile().memory_analysis().temp_size_in_bytes

    long = taken(4096, lambda f: f)
    assert long < 4.5 * taken(1024, lambda f: f)
    assert taken(4096, dense) > 16 * long


MODELS = {
    "rotary, windows of layers": {"positions": "rotary", "n_kv_heads": 2, "windows": (4, None)},
    "latent": {
        "positions": "rotary", "mlp": "gated", "d_head": 6, "rotary_dim": 2,
        "latent": Latent(q_rank=5, kv_rank=3, d_nope=4, d_rope=2, d_value=5),
    },
}  # fmt: skip


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "latent")) for name in MODELS]
)
def test_models__fused__give_the_same_logits_however_they_are_run(name):
    config = Config(d_vocab=31, n_ctx=24, d_model=16, n_layers=2, n_heads=4, **MODELS[name])
    model = mj.init(config, key=jax.random.key(0))
    model = jax.tree.map(lambda leaf: 3 * leaf, model)
    tokens, mask = jax.random.randint(jax.random.key(1), (2, POS), 0, 31), jnp.asarray(REAL)
    plain = model(tokens, mask=mask)
    formed, acts = mj.capture(model, ["attn_scores", "pattern"])(tokens, mask=mask)
    assert acts["pattern"].shape == acts["attn_scores"].shape == (2, 2, 4, POS, POS)
    assert_allclose(plain, formed, **TOL["float32", "parity"])

    logits, cache = model(tokens[:, :7], cache=Cache.empty(config, 2, 16))  # no padding yet
    later, _ = model(tokens[:, 7:], mask=mask[:, 7:], cache=cache)
    assert_allclose(jnp.concatenate((logits, later), 1), plain, **TOL["float32", "parity"])


@pytest.mark.usefixtures("small_blocks")
def test_sweep__over_edits_outside__is_the_same_as_one_by_one_with_the_pattern_formed():
    config = config_of({"mlp": "none"})
    model = jax.tree.map(lambda leaf: 3 * leaf, mj.init(config, key=jax.random.key(0)))
    tokens, values = jax.random.randint(jax.random.key(1), (2, POS), 0, 31), jnp.linspace(-1, 1, 3)
    edited = lambda f, value: mj.intervene(f, [mj.add("v", value, layer=0, pos=1)])(tokens)
    swept = jax.vmap(edited, (None, 0))(model, values)
    formed = edited(lambda tokens: mj.capture(model, ["pattern"])(tokens)[0], values[2])
    assert_allclose(swept[2], formed, **TOL["float32", "parity"])
    assert jnp.abs(swept[2] - swept[1]).max() > 1e-3
