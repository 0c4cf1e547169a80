"""Architectures of transformers: logits, every module's input and output, gradients and edits, against torch's hooks."""

import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, UnsupportedModelError
from tests.interop.pytorch.architectures import ARCHITECTURES, EXAMPLES, REFUSED, built, torch
from tests.interop.pytorch.hooks import candidates, seen
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
