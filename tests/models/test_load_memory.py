"""What memory a load needs: its weights, and in few bits not the model in full, not even for a while."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mechjax.models.load import load
from mechjax.models.quantized import nbytes
from tests.needs import LINUX

BESIDE = 6
"""Copies in float32 of the largest tensor, or of the 4 million numbers rounded at once; measured: 4.1."""


def write_llama(folder: Path, *, d_model: int, n_layers: int, d_mlp: int, d_vocab: int) -> int:
    """A random Llama in three shards, tensors dealt in turn; returns the bytes of its weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": d_vocab,
        "hidden_size": d_model,
    }
    config |= {"num_hidden_layers": n_layers, "num_attention_heads": 8, "intermediate_size": d_mlp}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (d_vocab, d_model), "lm_head.weight": (d_vocab, d_model)}
    shapes["model.norm.weight"] = (d_model,)
    for layer in range(n_layers):
        block = {f"self_attn.{name}_proj": (d_model, d_model) for name in "qkvo"}
        block |= {
            "mlp.gate_proj": (d_mlp, d_model),
            "mlp.up_proj": (d_mlp, d_model),
            "mlp.down_proj": (d_model, d_mlp),
        }
        block |= {"input_layernorm": (d_model,), "post_attention_layernorm": (d_model,)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    weight_map = {name: f"model-{place % 3 + 1:05}-of-00003.safetensors" for place, name in enumerate(shapes)}
    for shard in sorted(set(weight_map.values())):
        mine = [name for name in shapes if weight_map[name] == shard]
        save_file({name: rng.standard_normal(shapes[name], np.float32) for name in mine}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(4 * int(np.prod(shape)) for shape in shapes.values())


def peak_of_a_load(folder: Path, weights: str | None = None) -> tuple[int, int]:
    """(anonymous bytes before the load, the most there ever were), of a fresh process that loads `folder`."""
    code = f"""
import sys
from mechjax.models.load import load
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")), flush=True)
sys.stdin.readline()
model, _ = load({str(folder)!r}, weights={weights!r})
"""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=env, **pipes) as child:
        before = peak = int(child.stdout.readline())
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text()
            peak = max(
                [peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))]
            )
            time.sleep(0.002)
    assert child.returncode == 0
    return before * 1024, peak * 1024


@LINUX
def test_load__shards__needs_no_more_memory_than_its_weights(tmp_path):
    weights = write_llama(tmp_path / "m", d_model=512, n_layers=6, d_mlp=2048, d_vocab=12_000)
    before, peak = peak_of_a_load(tmp_path / "m")
    assert weights > 140e6
    assert peak - before <= 1.2 * weights


@pytest.mark.slow
@LINUX
def test_load__a_gigabyte_in_three_shards__peaks_at_most_a_fifth_above_its_weights(tmp_path, record_property):
    weights = write_llama(tmp_path / "m", d_model=1024, n_layers=12, d_mlp=4096, d_vocab=32_000)
    _, peak = peak_of_a_load(tmp_path / "m")
    record_property("peak_over_weights", peak / weights)
    assert weights > 1e9
    assert peak <= 1.2 * weights  # the interpreter and JAX included


@pytest.mark.parametrize("weights", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_load__in_few_bits__holds_one_tensor_in_full_at_a_time(tmp_path, weights):
    in_full = write_llama(tmp_path / "m", d_model=128, n_layers=12, d_mlp=512, d_vocab=50)
    load(tmp_path / "m", weights=weights, group=32)  # what is imported and kept on first use

    def peak(**how):
        tracemalloc.start()
        model = load(tmp_path / "m", **how)[0]
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, nbytes(model)

    ours, held = peak(weights=weights, group=32)
    assert held < in_full / 3
    assert ours < held + BESIDE * 4 * 128 * 512 < in_full / 2
    if jax.default_backend() == "cpu":
        assert peak()[0] > in_full  # the control: what a load holds is seen


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_load__half_a_gigabyte_in_few_bits__peaks_at_little_more_than_what_is_held(tmp_path, weights):
    in_full = write_llama(tmp_path / "m", d_model=1024, n_layers=8, d_mlp=4096, d_vocab=2000)
    before, peak = peak_of_a_load(tmp_path / "m", weights)
    held = nbytes(load(tmp_path / "m", weights=weights)[0])
    assert in_full > 550e6 > 3 * held
    assert held < peak - before < held + BESIDE * 4 * 1024 * 4096
