from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.models import Cache, Config, init
from mechjax.models.rope import LongRope, Rope
from tests.tolerances import TOL

PIECES = ((0, 4), (4, 5), (5, 6), (6, 9))


@pytest.fixture(scope="module")
def rich_model():
    """Rotation, windows, grouped keys, soft-caps: everything that a cache could get wrong."""
    config = Config(
        d_vocab=50, n_ctx=24, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, norm="rms", positions="rotary",
        mlp="gated", activation="silu", tied=False, windows=(2, None, 4), attn_softcap=3.0, final_softcap=2.0,
    )  # fmt: skip
    model = init(config, key=jax.random.key(2))
    return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(3), leaf.shape), model)


@pytest.fixture(params=["tiny", "rich"])
def model(request, tiny_model, rich_model):
    return tiny_model if request.param == "tiny" else rich_model


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(5), (3, 9), 0, 50)


@pytest.fixture(scope="module")
def mask():
    """Nothing padded, the left, and here and there."""
    rows = [[1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 0, 1, 1]]
    return jnp.array(rows, bool)


def in_pieces(model, tokens, cache, mask=None, positions=None):
    """The logits of all tokens, which come a few at a time."""
    part = lambda x, start, end: None if x is None else x[..., start:end]
    logits = []
    for start, end in PIECES:
        piece, cache = model(
            tokens[..., start:end], mask=part(mask, start, end), positions=part(positions, start, end), cache=cache
        )  # fmt: skip
        logits.append(piece)
    return jnp.concatenate(logits, -2), cache


@pytest.mark.parametrize("padded", [False, True])
def test_pieces__of_any_size__equal_the_whole(model, tokens, mask, padded):
    mask = mask if padded else None
    logits, cache = in_pieces(model, tokens, Cache.empty(model.config, 3, 11), mask)
    real = jnp.ones((3, 9), bool) if mask is None else mask
    assert_allclose(logits[real], model(tokens, mask=mask)[real], **TOL["float32", "layout"])
    assert int(cache.length) == 9
    assert cache.real[:, :9].tolist() == real.tolist()
    assert not cache.real[:, 9:].any()


def test_pieces__without_the_cache__differ(model, tokens):
    """What the cache is for: the control of the test above."""
    alone = model(tokens[:, 5:6])
    assert jnp.abs(alone - model(tokens)[:, 5:6]).max() > 1e-3


@pytest.mark.slow
def test_batch_axes__none_or_two__agree_with_one(rich_model, tokens):
    logits, _ = in_pieces(rich_model, tokens, Cache.empty(rich_model.config, 3, 9))
    single, _ = in_pieces(rich_model, tokens[1], Cache.empty(rich_model.config, (), 9))
    double, _ = in_pieces(rich_model, tokens[None], Cache.empty(rich_model.config, (1, 3), 9))
    assert_allclose(single, logits[1], **TOL["float32", "layout"])
    assert_allclose(double[0], logits, **TOL["float32", "layout"])


def test_positions__given__replace_the_count(model, tokens):
    positions = jnp.broadcast_to(2 * jnp.arange(9), (3, 9))
    logits, cache = in_pieces(model, tokens, Cache.empty(model.config, 3, 9), positions=positions)
    assert_allclose(logits, model(tokens, positions=positions), **TOL["float32", "layout"])
    assert cache.positions.tolist() == positions.tolist()


def test_bfloat16__cache__has_the_models_dtype(tiny_model, tokens):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_model)
    logits, cache = in_pieces(half, tokens, Cache.empty(half.config, 3, 9, jnp.bfloat16))
    assert cache.keys.dtype == logits.dtype == jnp.bfloat16
    whole = half(tokens).astype(jnp.float32)
    assert_allclose(logits.astype(jnp.float32), whole, **TOL["bfloat16", "parity"])


def test_sites__with_a_cache__are_the_models_with_slots_as_keys(rich_model, tokens):
    names = ["resid_post", "z", "pattern", "rot_k"]
    cache = Cache.empty(rich_model.config, 3, 9)
    _, cache = rich_model(tokens[:, :6], cache=cache)
    (_, _), acts = mj.capture(rich_model, names)(tokens[:, 6:], cache=cache)
    _, whole = mj.capture(rich_model, names)(tokens)
    for name in ("resid_post", "z", "rot_k"):
        assert_allclose(acts[name], whole[name][:, :, 6:], **TOL["float32", "layout"])
    assert_allclose(acts["pattern"], whole["pattern"][..., 6:, :], **TOL["float32", "layout"])


def test_edit__of_an_earlier_key__is_remembered(rich_model, tokens):
    edit = mj.scale("rot_k", 3.0, layer=1, pos=2)
    cache = Cache.empty(rich_model.config, 3, 9)
    _, cache = mj.intervene(rich_model, edit)(tokens[:, :6], cache=cache)
    logits, _ = rich_model(tokens[:, 6:], cache=cache)
    expected = mj.intervene(rich_model, edit)(tokens)[:, 6:]
    assert_allclose(logits, expected, **TOL["float32", "layout"])
    assert jnp.abs(logits - rich_model(tokens)[:, 6:]).max() > 1e-4


def test_empty__without_slots__is_refused(tiny_config):
    with pytest.raises(ArgumentError, match="`n_slots` = 0: a cache needs one slot for every token"):
        Cache.empty(tiny_config, 3, 0)


def test_cache__of_another_batch__is_refused(tiny_model, tokens):
    cache = Cache.empty(tiny_model.config, 2, 9)
    with pytest.raises(ShapeError, match=r"Tokens of shape \(3, 9\) with a cache of \(2,\): the batch axes"):
        tiny_model(tokens, cache=cache)


def test_slots__too_few__are_refused_or_give_nan(tiny_model, tokens):
    _, cache = tiny_model(tokens[:, :6], cache=Cache.empty(tiny_model.config, 3, 7))
    with pytest.raises(
        ShapeError, match="3 tokens, but 1 of the cache's 7 slots are free: make it with more"
    ):
        tiny_model(tokens[:, 6:], cache=cache)
    go_on = eqx.filter_jit(lambda model, tokens, cache: model(tokens, cache=cache)[0])
    assert jnp.isnan(go_on(tiny_model, tokens[:, 6:], cache)).all()
    assert jnp.isfinite(go_on(tiny_model, tokens[:, 6:7], cache)).all()


def test_calls__one_token_after_another__compile_once(tiny_model, tokens, caplog):
    call = partial(tiny_model, cache=Cache.empty(tiny_model.config, 3, 9))
    _, cache = call(tokens[:, :1])
    _, cache = tiny_model(tokens[:, 1:2], cache=cache)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        tiny_model(tokens[:, 2:3], cache=cache)
    assert not [line for line in caplog.messages if "_continue" in line]


@pytest.fixture(scope="module")
def long_model():
    """Texts of more than four tokens are rotated by other angles."""
    stretch = LongRope(short=(1.0, 1.0), long=(9.0, 9.0), trained=4)
    config = Config(
        d_vocab=50, n_ctx=24, d_model=8, n_layers=1, n_heads=2, positions="rotary", rope=Rope(stretch=stretch)
    )
    return init(config, key=jax.random.key(0))


def test_pieces__past_the_length_where_angles_change__are_refused_or_give_nan(long_model, tokens):
    empty = Cache.empty(long_model.config, 3, 9)
    _, cache = long_model(tokens[:, :3], mask=jnp.arange(3) < jnp.array([[3], [1], [3]]), cache=empty)
    with pytest.raises(
        ShapeError,
        match="more than 4 tokens by other angles, and text 0 grows from 3 to 6 tokens: the keys it keeps",
    ):
        long_model(tokens[:, 3:6], cache=cache)
    assert jnp.isfinite(long_model(tokens[:, 3:4], cache=cache)[0]).all()
    go_on = eqx.filter_jit(lambda model, tokens, cache: model(tokens, cache=cache)[0])
    hidden = go_on(long_model, tokens[:, 3:6], cache)
    assert jnp.isnan(hidden).all((-1, -2)).tolist() == [True, False, True]


def test_pieces__that_begin_beyond_that_length__equal_the_whole(long_model, tokens):
    first, cache = long_model(tokens[:, :6], cache=Cache.empty(long_model.config, 3, 9))
    rest, _ = long_model(tokens[:, 6:], cache=cache)
    assert_allclose(jnp.concatenate([first, rest], 1), long_model(tokens), **TOL["float32", "layout"])
