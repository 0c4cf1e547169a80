"""Compiled programs that processes share on disk (R9): whoever is first, all compute the same, and later ones find it."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, jax, numpy as np, mechjax as mj
config = mj.models.Config(d_vocab=11, n_ctx=8, d_model=8, n_layers=2, n_heads=2)
model = mj.init(config, key=jax.random.key(0))
ids = np.arange(16).reshape(2, 8) % 11
scores = mj.patching.activation_patch(model, ids, ids[::-1], mj.metrics.logit_diff(1, 2), site="z").per_example
print(hashlib.sha256(np.asarray(scores).tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_compile_cache__shared_by_four_processes__gives_each_the_same_and_a_fifth_compiles_nothing(tmp_path):
    settings = {
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path), "XLA_FLAGS": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip

    def begun():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", PROGRAM], env=os.environ | settings, **pipes)

    def ended(process):
        told, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors
        return told

    programs = lambda: {path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")}
    first = [ended(process) for process in [begun() for _ in range(4)]]
    there = programs()
    assert len(set(first)) == 1 and first[0] and there
    assert ended(begun()) == first[0] and programs() == there
    for path in tmp_path.iterdir():  # what is broken there is compiled again
        path.write_bytes(path.read_bytes()[:20])
    assert ended(begun()) == first[0]
