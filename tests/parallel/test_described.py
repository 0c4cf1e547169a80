"""Memory of chips that are not here, as their compiler sees it."""

import sys

import jax
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, MissingExtraError
from mechjax.models import Config
from mechjax.models.plan import plan
from mechjax.parallel.described import environment, memory_per_chip
from tests.needs import CHIPS

WIDE = Config(d_vocab=1024, n_ctx=64, d_model=512, n_layers=4, n_heads=8, d_mlp=2048)


@CHIPS
def test_described_chip__of_a_model_that_fits__holds_its_share():
    model = jax.eval_shape(lambda key: mj.init(WIDE, key=key), jax.random.key(0))
    found = plan(model, (8, 64), capture="z", edits=mj.zero("z", layer=1), chip="v5e:2x4", mesh=(2, 4)).chip
    assert found.fits and (found.kind, found.mesh) == ("TPU v5 lite", (2, 4))
    share = 4 * WIDE.n_params / 4
    assert (
        share < found.arguments < 1.1 * share
    )  # positions, norms and biases are whole, and chips pad small arrays
    logits, z = 4 * 8 * 64 * 1024, 4 * 4 * 8 * 64 * 512
    assert (logits + z) / 8 <= found.outputs <= (logits + z) / 2
    assert found.total == found.arguments + found.outputs + found.temporaries


@CHIPS
def test_described_chip__of_a_model_that_does_not_fit__says_so():
    large = Config(d_vocab=32000, n_ctx=2048, d_model=8192, n_layers=48, n_heads=64)
    found = plan(large, (1, 128), dtype="bfloat16", chip="v5e:2x2")
    assert not found.chip.fits and found.chip.total is None
    assert "does not fit on v5e:2x2 (TPU v5 lite)" in repr(found)
    assert "Ran out of memory on HBM" in repr(found) and "HLO module" not in repr(found)


def test_environment__of_another_process__has_no_flags_for_other_platforms(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2 --xla_dump_to=here --xla_gpu_autotune_level=0")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    found = environment()
    assert found["XLA_FLAGS"] == "--xla_dump_to=here"
    assert found["PYTHONPATH"].endswith("elsewhere") and found["JAX_PLATFORMS"] == "cpu"


@CHIPS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chip": "v9:2x4"}, r"chip='v9:2x4' is no topology that libtpu knows"),
        ({"chip": "v5e:2x4", "mesh": (1, 4)}, r"mesh=\(1, 4\) has 4 devices, chip='v5e:2x4' has 8"),
        (
            {"chip": "v5e:2x4", "edits": mj.apply("z", lambda x, _: x)},
            "can be sent models and edits of mechjax, but no functions",
        ),
    ],
)
def test_described_chip__of_what_cannot_be__is_refused(tiny_model, options, message):
    with pytest.raises(ArgumentError, match=message):
        plan(tiny_model, (8, 8), **options)


def test_described_chip__without_libtpu__names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mechjax\[tpu-aot\]'"):
        memory_per_chip([len], "v5e:2x4")
