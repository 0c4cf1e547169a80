"""Which kernels stand in programs for TPUs and GPUs that are not here."""

import importlib.util

import pytest

from tests.models.kernels.for_devices import FMHA, answers, for_cuda
from tests.needs import CHIPS

FORWARD, BACKWARD = FMHA
TPU = {
    "bfloat16": 1, "float32": 0, "float32, fast": 1, "soft-cap": 1, "sinks": 0, "alibi": 0, "windows": 2,
    "odd width": 1, "pattern": 0, "short": 0, "cache": 0, "gradient": 4,
}  # fmt: skip
CUDA = {
    "bfloat16": [FORWARD], "float32": [], "float32, fast": [], "soft-cap": [], "sinks": [], "alibi": [],
    "windows": [FORWARD, FORWARD], "odd width": [], "pattern": [], "short": [], "cache": [],
    "gradient": [FORWARD, FORWARD, BACKWARD],
}  # fmt: skip


@CHIPS
def test_lowered_for_tpus__each_case__has_the_kernels_of_the_table():
    found, said = answers("tpu", *TPU)
    assert {name: answer["kernels"] for name, answer in found.items()} == TPU, said


def test_lowered_for_gpus__each_case__has_the_kernels_of_the_table():
    found, said = answers("cuda", *CUDA)
    assert {name: answer["kernels"] for name, answer in found.items()} == CUDA, said


@pytest.mark.skipif(
    any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)),
    reason="where JAX has its CUDA plugin it finds a cuDNN, and this is of a machine without",
)
def test_lowered_for_gpus__where_jax_finds_no_cudnn__has_none():
    assert for_cuda("bfloat16")["kernels"] == []


@CHIPS
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("mesh", 2),
        pytest.param("mesh, gradient", 4, marks=pytest.mark.slow),
        pytest.param("mesh, heads that do not divide", 0, marks=pytest.mark.slow),
    ],
)
def test_compiled_for_a_described_mesh__heads_and_batch_divided__moves_no_queries_keys_or_values(
    name, kernels
):
    found, said = answers("tpu", name)
    assert found == {name: {"kernels": kernels, "moves": []}}, said
