"""What every test runs under: CPU with eight simulated devices, strict dtypes, no network, compiled programs kept."""

import gc
import os
import socket
from importlib.metadata import version
from pathlib import Path

# Before JAX is imported. A caller's own choice of platform wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import jaxtyping
import pytest

# Programs that took a while to compile are kept between runs, in the user's cache folder.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechjax" / "tests-xla"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    """Tell the compiler to hurry, as what is tiny is compiled for longer than it runs.

    Programs are not cut into pieces for several threads; loops are emitted the older way, which jaxlib had until 0.10
    and which takes half the time; and nothing is optimised but in the slow tests, which train. XLA ends the process for
    a flag that it does not know, and reads them when JAX starts its backend. A caller's own win.
    """
    level = 0 if "not slow" in config.option.markexpr else 1
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count=8 --xla_backend_optimization_level={level} "
        "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1 "
        + "--xla_cpu_use_fusion_emitters=false " * (version("jaxlib").startswith("0.10."))
        + os.environ.get("XLA_FLAGS", "")
    ).strip()


_connect = socket.socket.connect


def _connect_here_only(self, address):
    here = self.family == getattr(socket, "AF_UNIX", None) or address[0] in ("127.0.0.1", "::1", "localhost")
    if not here:
        raise PermissionError(f"a test tried to connect to {address}: tests must not need a network")
    return _connect(self, address)


socket.socket.connect = _connect_here_only


@pytest.fixture(scope="module", autouse=True)
def _programs_that_fit():
    """Drops compiled programs before they are too many.

    XLA maps memory for each, Linux gives a process 65,530 maps, and past these a compilation crashes the process.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny_config():
    """A decoder in the manner of GPT-2, small enough that compiling it is the only cost."""
    from mechjax.models import Config

    return Config(d_vocab=50, n_ctx=24, d_model=16, n_layers=3, n_heads=4, n_kv_heads=4, d_head=4, d_mlp=32)


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """A randomly initialised `tiny_config` decoder."""
    from mechjax.models import init

    return init(tiny_config, key=jax.random.key(0))


@pytest.fixture(scope="session")
def tiny_tokens():
    """Four prompts of six tokens of `tiny_config`'s vocabulary. Shape (batch, pos)."""
    return jax.random.randint(jax.random.key(1), (4, 6), 0, 50)


@pytest.fixture
def as_a_user():
    """Run-time type checks off, as outside the tests: what a user sees for a wrong type is our own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
