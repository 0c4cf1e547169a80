import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError, SiteError
from mechjax.models.rope import Rope
from tests.tolerances import TOL


@pytest.fixture(scope="module")
def mask():
    return jnp.array([[1] * 6, [0, 0, 1, 1, 1, 1], [1] * 4 + [0, 0], [1] * 6], bool)


@pytest.fixture(scope="module")
def whole(tiny_model, tiny_tokens, mask):
    return mj.capture(tiny_model, ["resid_pre", "resid_post", "z"])(tiny_tokens, mask=mask)


def test_resume__at_every_layer__equals_the_whole_run_in_one_program(tiny_model, mask, whole):
    logits, acts = whole
    traces = []

    @eqx.filter_jit
    def rest(model, layer, resid):
        traces.append(layer)
        resumed = mj.resume(model, layer)
        return resumed(resid, mask=mask), resumed.blocks(resid, mask=mask)

    starts = [*acts["resid_pre"], acts["resid_post"][-1]]
    for layer, resid in enumerate(starts):
        resumed, final = rest(tiny_model, jnp.int32(layer), resid)
        assert_allclose(resumed, logits, **TOL["float32", "layout"])
        assert_allclose(final, acts["resid_post"][-1], **TOL["float32", "layout"])
    assert len(traces) == 1


def test_resume__its_sites__are_the_models_where_it_ran(tiny_model, mask, whole):
    _, acts = whole
    _, resumed = mj.capture(mj.resume(tiny_model, 1), ["z", "resid_pre"])(acts["resid_pre"][1], mask=mask)
    for name in ("z", "resid_pre"):
        assert_allclose(resumed[name][1:], acts[name][1:], **TOL["float32", "layout"])
        assert jnp.isnan(resumed[name][0]).all()


def test_resume__mapped_over_layers__keeps_the_branch(tiny_model, mask, whole):
    logits, acts = whole
    each = lambda pair: mj.resume(tiny_model, pair[0])(pair[1], mask=mask)
    mapped = jax.lax.map(each, (jnp.arange(3), acts["resid_pre"]))
    assert_allclose(mapped, jnp.broadcast_to(logits, mapped.shape), **TOL["float32", "layout"])
    sweep = lambda model, x: jax.lax.map(lambda pair: mj.resume(model, pair[0])(pair[1]), (jnp.arange(3), x))
    assert "cond[" in str(jax.make_jaxpr(sweep)(tiny_model, acts["resid_pre"]))


@pytest.mark.parametrize("layer", [-1, 4])
def test_resume__at_a_layer_that_is_not_there__is_refused(tiny_model, layer):
    with pytest.raises(
        SiteError, match=rf"Cannot resume at layer {layer}: the model has 3, so 0 to 3 are possible"
    ):
        mj.resume(tiny_model, layer)


@pytest.fixture(scope="module")
def kept(rich, tiny_tokens, mask):
    """A run with windows, rotation, grouped keys and their norms, its cache and its sites."""
    cache = mj.models.Cache.empty(rich.config, 4, 6)
    logits, cache = rich(tiny_tokens, mask=mask, cache=cache)
    _, acts = mj.capture(rich, ["resid_pre", "z", "pattern", "logits"])(tiny_tokens, mask=mask)
    return logits, cache, acts


@pytest.fixture(scope="module")
def rich():
    config = mj.models.Config(
        d_vocab=50, n_ctx=24, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_head=4, d_mlp=32,
        positions="rotary", windows=(3, None, 4), qk_norm="shared", rope=(Rope(), None, Rope()),
    )  # fmt: skip
    return jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, mj.init(config, key=jax.random.key(0)))


def test_resume__at_a_position__equals_the_whole_run_from_there_on(rich, mask, kept):
    logits, cache, acts = kept
    names = ["z", "pattern", "logits"]
    rest = eqx.filter_jit(lambda m, i, x, c: mj.capture(mj.resume(m, i, cache=c, start=2), names)(x))
    for layer in range(3):
        out, seen = rest(rich, jnp.int32(layer), acts["resid_pre"][layer][:, 2:], cache)
        assert_allclose(
            jnp.where(mask[:, 2:, None], out - logits[:, 2:], 0), 0 * out, **TOL["float32", "layout"]
        )
        for name in ("z", "pattern"):  # positions count from the text's first
            axis = 2 if name == "z" else 3
            first, others = (jnp.moveaxis(x, axis, 0) for x in (seen[name], acts[name]))
            assert jnp.isnan(first[:2]).all() and not jnp.isnan(first[2:, layer:]).any()
            real = jnp.moveaxis(mask, 1, 0)[2:, None, :, None, None]
            difference = jnp.where(real, first[2:, layer:] - others[2:, layer:], 0)
            assert_allclose(difference, 0 * difference, **TOL["float32", "layout"])
        assert seen["logits"].shape == logits.shape and jnp.isnan(seen["logits"][:, :2]).all()


def test_resume__edits_at_a_position__are_the_models_and_before_it_misses(rich, tiny_tokens, mask, kept):
    _, cache, acts = kept
    rest = mj.resume(rich, 1, cache=cache, start=2)
    tail = acts["resid_pre"][1][:, 2:]
    edit = mj.scale("z", 0.0, layer=1, pos=jnp.array([3, -1]))
    edited = mj.intervene(rich, [edit])(tiny_tokens, mask=mask)[:, 2:]
    out = mj.intervene(rest, [edit])(tail)
    assert_allclose(jnp.where(mask[:, 2:, None], out - edited, 0), 0 * out, **TOL["float32", "layout"])
    for where in ({}, {"pos": 1}, {"pos": -5}, {"pos": jnp.arange(6) > 0}):
        assert jnp.isnan(mj.intervene(rest, [mj.zero("z", layer=1, **where)])(tail)).all()


@pytest.mark.parametrize("name", ["rich", "tiny_model"])
def test_resume__final__is_the_stream_where_it_is_read(request, tiny_tokens, mask, name):
    model, at = request.getfixturevalue(name), jnp.array([5, 3, 2, 9])
    acts = mj.capture(model, ["resid_pre", "resid_post"])(tiny_tokens, mask=mask)[1]
    final = eqx.filter_jit(lambda m, i, x: mj.resume(m, i).final(x, at, mask=mask))
    for layer, stream in enumerate([*acts["resid_pre"], acts["resid_post"][-1]]):
        out = final(model, jnp.int32(layer), stream)
        assert_allclose(out[:3, 0], acts["resid_post"][-1][jnp.arange(3), at[:3]], **TOL["float32", "layout"])
        assert jnp.isnan(out[3]).all()


def test_resume__at_a_position__bad_arguments_teach(tiny_model, rich, kept):
    _, cache, acts = kept
    tail = acts["resid_pre"][1][:, 2:]
    with pytest.raises(ArgumentError, match=r"Cannot resume at position 2 without keys and values"):
        mj.resume(rich, 1, start=2)
    with pytest.raises(
        SiteError, match="Cannot resume at position 6: the cache has 6, so 0 to 5 are possible"
    ):
        mj.resume(rich, 1, cache=cache, start=6)
    with pytest.raises(ShapeError, match=r"A stream of shape \(3, 4, 16\) from position 2 on"):
        mj.resume(rich, 1, cache=cache, start=2)(tail[:3])
    with pytest.raises(ShapeError, match=r"its positions from 3 to 6"):
        mj.resume(rich, 1, cache=cache, start=3)(tail)
    with pytest.raises(ArgumentError, match="leave `mask=` and `positions=` out"):
        mj.resume(rich, 1, cache=cache, start=2)(tail, mask=jnp.ones((4, 4), bool))
    both_ways = mj.models.Config(
        d_vocab=50, n_ctx=24, d_model=16, n_layers=3, n_heads=4, d_mlp=32, causal=False
    )
    seeing = mj.init(both_ways, key=jax.random.key(0))
    with pytest.raises(
        ArgumentError, match=r"in this model \(`causal` = False\) tokens see those after them"
    ):
        mj.resume(seeing, 1, cache=cache, start=2)
