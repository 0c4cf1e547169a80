"""Architectures of transformers: logits, every module's input and output, gradients and edits, against torch's hooks."""

import equinox as eqx
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, UnsupportedModelError
from tests.interop.pytorch.architectures import ARCHITECTURES, EXAMPLES, REFUSED, built, torch
from tests.interop.pytorch.hooks import candidates, run_hooked, seen
from tests.interop.pytorch.parity import bridged, compare, matched, numbers, worst
from tests.tolerances import TOL

_QUICK = ("vit",)
_PARITY = TOL["float32", "parity"]["atol"]
_GRADIENT = TOL["float32", "gradient"]["rtol"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in ARCHITECTURES]
)
def test_from_torch__architecture__equals_torch_at_every_module(name):
    found = compare(name)
    assert found.logits < _PARITY and found.sites < _PARITY and found.edits < _PARITY
    assert found.gradients < _GRADIENT
    assert found.moved > 0.01 and found.n_sites > 30  # the edits do something; there are sites


def test_compare__sites_off_by_one_layer__are_told_apart():
    model, kwargs = built("vit")
    subject, arrays = bridged("vit")
    _, values = seen(model, kwargs)
    names = matched(mj.list_sites(subject, **arrays), values)
    site = "vit.layers.mlp.output"
    _, record = mj.capture(subject, site)(**arrays)
    at = {layer: numbers(values[key]) for key, (name, layer) in names.items() if name == site}
    for layer, value in at.items():
        assert worst(record[site][layer], value) < _PARITY
        assert worst(record[site][1 - layer], value) > 1e-2


def test_candidates__of_numbered_modules__name_each_reading():
    found = candidates(("h.3.mlp.layers.0", 1, "output", ""), 2)
    assert found == [
        ("h_3.mlp.layers_0.call_1.output", None),
        ("h.mlp.layers_0.call_1.output", 3),
        ("h_3.mlp.layers.call_1.output", 0),
    ]
    found = candidates(("block.1.0.norm", 0, "input", ""), 1)
    assert found == [("block_1_0.norm.input", None), ("block_0.norm.input", 1)]


@pytest.mark.parametrize("name", ["jetmoe", pytest.param("dbrx", marks=pytest.mark.slow)])
def test_from_torch__an_architecture_that_cannot_be_carried__is_refused_by_name(name):
    model, kwargs = built(name)
    made, message = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=message):
        mj.interop.from_torch(model, kwargs, dynamic=False, **made.fixed)


def test_from_torch__a_model_that_returns_its_cache__says_how_to_switch_it_off():
    model, kwargs = built("gpt_bigcode")
    with pytest.raises(ArgumentError, match=r"`output\.\w+`.*a DynamicCache.*use_cache=False"):
        mj.interop.from_torch(model, kwargs, dynamic=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distilbert", "mamba", "t5", "phimoe", "vit"])
def test_from_torch__architecture__serves_other_batches(name):
    model, kwargs = built(name)
    made = ARCHITECTURES[name]
    subject = mj.interop.from_torch(model, kwargs, output=made.output, **made.fixed)
    more = {key: torch.cat([x, x.flip(0), x[:1]]) for key, x in EXAMPLES[made.example]().items()}
    with torch.no_grad():
        expected = numbers(getattr(model(**more, **made.fixed), made.output))
    found = subject(**{key: np.asarray(x) for key, x in more.items()})
    assert worst(found, expected) < _PARITY


SWEPT = {
    "granitemoe": "model.layers.0.self_attn",  # before a router: each value sends tokens to other experts
    "qwen2_moe": "model.layers.0.self_attn",
    "mamba2": "backbone.layers.0.mixer.in_proj",
    "llava": "model.multi_modal_projector",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEPT)
def test_from_torch__edits_under_vmap__equal_hooks_one_by_one(name):
    model, kwargs = built(name)
    subject, arrays = bridged(name)
    whole = kwargs | ARCHITECTURES[name].fixed
    _, values = seen(model, whole)
    key = (SWEPT[name], 0, "output", "")
    site, layer = matched(mj.list_sites(subject, **arrays), values)[key]
    put = np.random.default_rng(0).normal(size=(3, *values[key].shape)).astype(np.float32)
    run = lambda f, x, arrays: mj.intervene(f, mj.replace(site, x, layer=layer))(**arrays)
    swept = eqx.filter_jit(eqx.filter_vmap(run, in_axes=(None, 0, None)))(subject, put, arrays)
    for found, value in zip(swept, put, strict=True):
        with torch.no_grad():
            expected = run_hooked(model, whole, lambda k, x: torch.tensor(value) if k == key else x)  # noqa: B023
        assert worst(found, numbers(getattr(expected, ARCHITECTURES[name].output))) < _PARITY
    assert worst(swept[0], swept[1]) > 1e-2
