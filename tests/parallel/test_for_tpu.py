"""Programs for described TPUs, by the text that the compiler made of them, and programs for GPUs as far as lowering."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import mechjax as mj
from mechjax.parallel.layout import split
from tests.needs import CHIPS
from tests.parallel import for_tpu, program_text

ONE_LAYER = (
    {"all-reduce": 1},
    {"all-reduce": 2},
)  # the embedding; what attention writes, and what the MLP writes
# Of each program what crosses between chips: outside loops, in a loop, in a loop inside that, and so on.
CROSSING = {
    "forward": ONE_LAYER,
    "capture": ONE_LAYER,
    "intervene": ONE_LAYER,
    "integrated_gradients": ({"all-reduce": 1}, {}, {"all-reduce": 4}),  # forward and backward, two each
    "sweep": ({"all-reduce": 4}, {"all-reduce": 6}, {"all-reduce": 2}),
    "eap": ({"all-reduce": 2, "collective-permute": 6, "all-gather": 5}, {"all-reduce": 6}),
    "generate": (
        {"all-reduce": 2, "all-gather": 2},
        {"all-reduce": 7, "all-gather": 2},
        {"all-reduce": 2},
    ),
    "dictionary step": (
        {},
        {"all-reduce": 12, "all-gather": 1},
        {"all-reduce": 6, "all-gather": 1},
        {"all-reduce": 1},
    ),
}
WRONG = ("to the host", "large constant", "low precision", "float64")
METHODS = ("eap_ig", "eap under rules", "eap_ig on activations", "eap_ig on the mask", "exact edges", "exact nodes",
           "contextual_decomposition", "path_patching", "attribution_patch", "direct_logit_attribution", "atp_star",
           "information_flow", "causal_trace", "attention_knockout", "masked_forward")  # fmt: skip
MEGABYTE = 2**20


def faults(facts):
    """What a program has that none may have."""
    asked, made = facts["products"]
    found = {
        "to the host": facts["to_the_host"], "float64": facts["doubles"],
        "large constant": facts["largest_constant"] > MEGABYTE, "low precision": facts["loose"],
        "no product": not (asked and made),
    }  # fmt: skip
    return [fault for fault, there in found.items() if there]


@pytest.fixture(scope="module")
def small():
    """What one process found for eight chips, 2 for the batch and 4 for the model."""
    return for_tpu.compiled("v5e:2x4", "2x4", *CROSSING, *WRONG)


@CHIPS
@pytest.mark.parametrize("name", CROSSING)
def test_for_eight_chips__of_a_public_method__has_no_fault_and_crosses_as_often_as_it_must(small, name):
    found, said = small
    assert name in found, said
    assert faults(found[name]) == [], found[name]
    assert tuple(found[name]["collectives"]) == CROSSING[name]


@CHIPS
@pytest.mark.parametrize("name", WRONG)
def test_for_eight_chips__of_a_program_with_a_fault__is_found_out(small, name):
    found, said = small
    assert name in found, said
    assert name in faults(found[name])


def _per_chip(axes, shape, sizes):
    """Bytes of a float32 array on one chip, by the layout's table."""
    over = [axis for axis in split(tuple(axes.split()), shape, sizes) if axis]
    return 4 * math.prod(shape) // math.prod(sizes[axis] for axis in over)


def _outputs(sizes, batch):
    """Bytes per chip of the logits, and of these with what the capture takes."""
    c, n_pos = for_tpu.WIDE, 8
    logits = _per_chip("batch pos d_vocab", (batch, n_pos, c.d_vocab), sizes)
    z = _per_chip("layer batch pos head d_head", (c.n_layers, batch, n_pos, c.n_heads, c.d_head), sizes)
    resid = c.n_layers * _per_chip("batch pos", (batch, n_pos), sizes) * c.d_model
    return {"forward": logits, "capture": logits + z + resid}


@CHIPS
@pytest.mark.parametrize("name", ["forward", "capture"])
def test_for_eight_chips__bytes_of_a_chip__are_those_of_the_layout(small, name):
    facts, outputs = small[0][name], _outputs({"data": 2, "model": 4}, 8)[name]
    assert facts["arguments"] == pytest.approx(facts["predicted"], rel=0.15)
    assert facts["outputs"] == pytest.approx(outputs, rel=0.15)
    whole = 4 * for_tpu.WIDE.n_params
    assert abs(facts["arguments"] - whole) > 0.5 * whole  # were weights whole on each chip, it would be seen


@CHIPS
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_for_256_chips__of_public_methods__has_no_fault_and_crosses_as_often_as_for_eight():
    found, said = for_tpu.compiled("v5e:16x16", "64x4", *CROSSING, seconds=880)
    assert found.keys() == CROSSING.keys(), said
    assert {name: faults(facts) for name, facts in found.items()} == {name: [] for name in CROSSING}
    for name in ("forward", "capture", "intervene"):
        assert tuple(found[name]["collectives"]) == ONE_LAYER
    for name, outputs in _outputs({"data": 64, "model": 4}, 64).items():
        assert found[name]["arguments"] == pytest.approx(found[name]["predicted"], rel=0.15)
        assert found[name]["outputs"] == pytest.approx(outputs, rel=0.15)


@CHIPS
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_for_eight_chips__of_every_other_method__has_no_fault():
    found, said = for_tpu.compiled("v5e:2x4", "2x4", *METHODS, seconds=880)
    assert found.keys() == {*METHODS}, said
    assert {name: faults(facts) for name, facts in found.items()} == {name: [] for name in METHODS}


@pytest.mark.parametrize("name", ["forward", "sweep", "eap", "dictionary step"])
def test_for_gpus__of_a_public_method__is_lowered_at_highest_precision_without_the_host(name):
    if name == for_tpu.TRAINING:
        fn, given = for_tpu.training(mj.make_mesh(data=1))
    else:
        shapes = jax.eval_shape(lambda key: mj.init(for_tpu.NARROW, key=key), jax.random.key(0))
        fn, given = for_tpu.methods(None, 8)[name], (shapes, jax.ShapeDtypeStruct((8, 8), jnp.int32))
    arrays, static = eqx.partition(given, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    run = jax.jit(
        lambda arrays: [x for x in jax.tree.leaves(fn(*eqx.combine(arrays, static))) if eqx.is_array(x)]
    )
    text = jax.export.export(run, platforms=["cuda"])(arrays).mlir_module()
    asked, _, loose = program_text.products(text, "")
    assert asked and not loose
    assert not program_text.to_the_host(text, "") and not program_text.doubles(text, "")
    assert program_text.largest_constant(text, "") < MEGABYTE
