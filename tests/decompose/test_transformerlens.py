"""The same numbers as TransformerLens' ActivationCache, on the same weights (`tests/oracles/make_cache_algebra.py`)."""

import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.decompose import (
    accumulated_resid,
    apply_norm,
    decompose_resid,
    full_decomposition,
    head_results,
    logit_attribution,
    neuron_results,
    sites,
)
from tests.tolerances import TOL

ORACLES = Path(__file__).parents[1] / "oracles"
FAMILIES = ("gpt2", "llama")


@cache
def _found(family: str) -> dict[str, np.ndarray]:
    with np.load(ORACLES / f"cache_algebra_{family}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, tmp_path_factory):
    """The model, its capture, and what TransformerLens found."""
    found, folder = _found(request.param), tmp_path_factory.mktemp(request.param)
    weights = {key.removeprefix("weight/"): x for key, x in found.items() if key.startswith("weight/")}
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(str(found["config"]))
    model, _ = mj.load(folder)
    logits, acts = mj.capture(model, sites(model))(found["tokens"])
    return SimpleNamespace(model=model, acts=acts, logits=logits, found=found)


def _ours(label: str) -> str:
    """TransformerLens' label in our spelling."""
    for pattern, ours in (
        (r"L(\d+)([HN])(\d+)", r"L\1.\2\3"), (r"(\d+)_(attn|mlp)_out", r"\2 \1"), (r"(\d+)_(pre|mid)", r"resid_\2 \1"),
        ("final_post", "resid_post 1"),
    ):  # fmt: skip
        label = re.sub(f"^{pattern}$", ours, label)
    return label


CASES = {
    "decompose_resid": lambda m, a: decompose_resid(m, a),
    "decompose_resid_1": lambda m, a: decompose_resid(m, a, layer=1),
    "decompose_resid_1_mlp_input": lambda m, a: decompose_resid(m, a, layer=1, mlp_input=True),
    "decompose_resid_attn": lambda m, a: decompose_resid(m, a, mode="attn"),
    "decompose_resid_mlp": lambda m, a: decompose_resid(m, a, mode="mlp"),
    "accumulated_resid": lambda m, a: accumulated_resid(m, a),
    "accumulated_resid_mid": lambda m, a: accumulated_resid(m, a, layer=1, incl_mid=True, mlp_input=True),
    "head_results": lambda m, a: head_results(m, a).with_remainder(),
    "head_results_1": lambda m, a: head_results(m, a, layer=1),
    "neuron_results": lambda m, a: neuron_results(m, a).with_remainder(),
    "neuron_results_1": lambda m, a: neuron_results(m, a, layer=1),
    "full_decomposition": lambda m, a: full_decomposition(m, a),
    "full_decomposition_1_mlp_input": lambda m, a: full_decomposition(
        m, a, layer=1, mlp_input=True, neurons=False
    ),
}


def test_fixture__logits__are_those_of_the_loaded_model(run):
    assert_allclose(run.logits, run.found["logits"], **TOL["float32", "parity"])


@pytest.mark.parametrize("case", CASES)
def test_stack__of_both__is_equal_with_its_labels(run, case):
    stack = CASES[case](run.model, run.acts)
    assert stack.labels == tuple(_ours(str(label)) for label in run.found[f"{case}/labels"])
    assert_allclose(stack.values, run.found[f"{case}/values"], **TOL["float32", "parity"])


@pytest.mark.parametrize(
    ("case", "reader"),
    {"final": {}, "1": {"layer": 1}, "1_mlp_input": {"layer": 1, "mlp_input": True}}.items(),
)
def test_apply_norm__without_weights__is_theirs(run, case, reader):
    stack = decompose_resid(run.model, run.acts, **reader)
    normed = apply_norm(run.model, run.acts, stack, weighted=False)
    assert_allclose(normed.values, run.found[f"apply_norm_{case}/values"], **TOL["float32", "parity"])


@pytest.mark.parametrize("of", ["layers", "heads", "neurons"])
def test_logit_attribution__of_both__is_equal(run, of):
    suffix = "" if of == "layers" else f"_{of}"
    ours = logit_attribution(run.model, run.acts, run.found["right"], run.found["wrong"], of=of)
    assert_allclose(ours.values, run.found[f"logit_attribution{suffix}"], **TOL["float32", "parity"])


def test_logit_attribution__of_one_token__is_equal(run):
    ours = logit_attribution(run.model, run.acts, run.found["right"])
    assert_allclose(ours.values, run.found["logit_attribution_token"], **TOL["float32", "parity"])
