"""Killed from outside at any moment, and continued: the same bytes, no row lost or doubled."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import pytest

import mechjax as mj
from mechjax.store.manifest import NAME, read_manifest
from tests.store import small

SCRIPT = """
import importlib, sys, time
import jax
import mechjax as mj
from tests.store import small

jax.config.update("jax_numpy_dtype_promotion", "strict")
writing = importlib.import_module("mechjax.store.write")
for name in ("write_shard", "write_manifest"):
    real = getattr(writing, name)
    setattr(writing, name, lambda *args, real=real: (real(*args), time.sleep(0.01))[0])
model = mj.init(mj.models.Config(d_vocab=50, n_ctx=24, d_model=16, n_layers=3, n_heads=4, n_kv_heads=4, d_head=4,
    d_mlp=32), key=jax.random.key(0))
small.write(sys.argv[1], model, shard_rows=10)
"""

SHARDS = 25


@pytest.fixture(scope="module")
def unbroken(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "store"
    return folder, small.write(folder, tiny_model, shard_rows=10)


def shards_in(folder):
    return len(read_manifest(folder).shards) if (folder / NAME).exists() else 0


def killed(folder, shards, later):
    """A process that writes, and is killed a little after there are so many shards."""
    programs = {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], env=os.environ | {"PYTHONPATH": "."} | programs
    )
    while process.poll() is None and shards_in(folder) < shards:
        time.sleep(0.002)
    time.sleep(later)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def check(folder, unbroken, model):
    """Continued here, every file, every row and every moment is that of the unbroken run."""
    store = small.write(folder, model, shard_rows=10)
    assert len(store) == small.ROWS and len(store.manifest.shards) == SHARDS
    assert small.digests(store) == small.digests(unbroken[1])
    assert small.files(folder) == small.files(unbroken[0])
    assert not mj.store.verify(folder).problems


def kept_by(folder):
    """Files of the shards that count."""
    done = shards_in(folder)
    return {k: v for k, v in small.stamps(folder).items() if int(k.split("/")[2]) < done}


def test_write__killed_twice__goes_on(unbroken, tiny_model, tmp_path):
    folder, kept = tmp_path / "store", {}
    for shards, later in [(3, 0.003), (11, 0.008)]:
        assert killed(folder, shards, later) == -signal.SIGKILL
        assert shards <= shards_in(folder) < SHARDS
        assert kept.items() <= small.stamps(folder).items()  # what was done is never done again
        kept = kept_by(folder)
        assert len(mj.store.read(folder, partial=True)) == 10 * shards_in(folder)
    check(folder, unbroken, tiny_model)


@pytest.mark.slow
def test_write__killed_at_ten_random_moments__loses_and_doubles_nothing(unbroken, tiny_model, tmp_path):
    folder, rng, kept, died = tmp_path / "store", random.Random(0), {}, 0
    for i in range(10):
        died += killed(folder, 2 * i, rng.random() * 0.1) == -signal.SIGKILL
        assert kept.items() <= small.stamps(folder).items()
        kept = kept_by(folder)
    assert died >= 9
    check(folder, unbroken, tiny_model)
