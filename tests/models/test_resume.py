import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import SiteError
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
