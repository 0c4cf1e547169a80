"""Plans and dry runs of what takes more than tokens."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, NeedsDecoderError
from mechjax.interop import from_equinox

PIXELS = jax.ShapeDtypeStruct((16, 8), jnp.float32)


class Classifier(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __call__(self, pixels, *, strength=None):
        x = jnp.tanh(self.first(pixels))
        return self.last(x if strength is None else x * strength)


def subject():
    keys = jax.random.split(jax.random.key(0))
    return from_equinox(
        Classifier(eqx.nn.Linear(8, 6, key=keys[0]), eqx.nn.Linear(6, 5, key=keys[1]))
    ).batched()


def test_plan__of_a_classifier__counts_what_is_there():
    plan = mj.plan(subject(), PIXELS)
    assert plan.cost.contractions == 16 * 2 * (8 * 6 + 6 * 5)
    assert plan.n_params == 8 * 6 + 6 + 6 * 5 + 5
    assert {s.name: s.bytes for s in plan.sites}["first.output"] == 4 * 16 * 6
    said = dict(plan.facts())
    assert said["inputs"] == "16 × 8 float32" and "per example" in said["forward"] and "tokens" not in said


def test_plan__of_named_arguments_on_devices__has_the_model_on_each():
    strength = jax.ShapeDtypeStruct((16,), jnp.float32)
    plan = mj.plan(subject(), {"pixels": PIXELS, "strength": strength}, devices="8xH200")
    assert dict(plan.share.mesh) == {"data": 8, "model": 1}
    assert plan.share.params == plan.param_bytes


def test_plan__without_shapes_or_of_none__says_what_to_give():
    with pytest.raises(
        ArgumentError, match=r"Batched is a subject, which may take anything: say what, by shapes"
    ):
        mj.plan(subject())
    with pytest.raises(
        ArgumentError, match=r"tokens must be a shape .*, not a str\. Of what takes no tokens: its arg"
    ):
        mj.plan(subject(), "pixels")
    with pytest.raises(
        ArgumentError, match=r"chip='v5e:2x2' compiles calls of positional arguments alone; pixels came"
    ):
        mj.plan(subject(), {"pixels": PIXELS}, chip="v5e:2x2")


def test_dry_run__of_patching_a_classifier__counts_every_cell():
    def of(chunk):
        return mj.dry_run(
            mj.patching.activation_patch, named, PIXELS, PIXELS, mj.metrics.logit_diff(0, 1),
            site="hidden", over=("unit",), devices="8xH200", chunk_size=chunk,
        )  # fmt: skip

    named = from_equinox(subject().one.model, sites={"hidden": ("first.output", ("unit",))}).batched()
    dry = of(6)
    forward = mj.plan(named, PIXELS).cost.contractions
    # Both runs, and six cells of which the first layer, before the site, is run once.
    assert dry.cost.contractions == 2 * forward + 16 * 2 * (8 * 6 + 6 * 6 * 5)
    assert dict((name, shape) for name, shape, _ in dry.outputs)["scores"] == (6,)
    assert math.isclose(dry.share.params, dry.param_bytes)
    with pytest.raises(NeedsDecoderError, match="`eap` needs mechjax's own decoder"):
        mj.dry_run(mj.attribution.eap, named, PIXELS, PIXELS, None, graph=None)
