"""Large models compiled for TPUs that are not here: how long that takes, and what each chip holds.

The compiler is libtpu, in a process of its own (`python -m benchmarks.for_chips`), which reads the question from stdin.
"""

import json
import math
import subprocess
import sys
import time
from typing import Any

import mechjax as mj
from mechjax.parallel.collectives import collectives
from mechjax.parallel.described import environment

LLAMA = {
    "n_ctx": 8192, "d_vocab": 128256, "norm": "rms", "positions": "rotary", "mlp": "gated", "activation": "silu",
    "qkv_bias": False, "out_bias": False, "mlp_bias": False, "d_head": 128, "n_kv_heads": 8,
}  # fmt: skip
SHAPES = {
    "8B": {"d_model": 4096, "n_layers": 32, "n_heads": 32, "d_mlp": 14336},
    "70B": {"d_model": 8192, "n_layers": 80, "n_heads": 64, "d_mlp": 28672},
}
_SECONDS = 900
_GB = 1e9


def tpu_job(**question: Any) -> tuple[Any, Any]:
    """Lower and compile one method of one model for a described topology."""

    def work() -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.for_chips"], input=json.dumps(question), capture_output=True,
            text=True, env=environment(), timeout=_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return json.loads(done.stdout.splitlines()[-1])

    return work, lambda facts: facts


def methods() -> dict[str, Any]:
    """Name -> a function of the model and tokens."""
    import jax

    metric, patch = mj.metrics.logit_diff(1, 2), mj.patching.activation_patch
    return {
        "forward": lambda model, t: model(t),
        "capture": lambda model, t: jax.tree.leaves(mj.capture(model, "resid_post")(t)),
        "sweep": lambda model, t: (
            patch(model, t, t, metric, site="z", over=("layer", "head"), chunk_size=4).per_example
        ),
    }


def compiled(model: str, method: str, chip: str, mesh: dict[str, int], batch: list[int]) -> dict[str, Any]:
    """Compile, and say what was found."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices
    devices = jax.sharding.Mesh(np.array(chips).reshape(tuple(mesh.values())), tuple(mesh))
    config, fn = mj.models.Config(**LLAMA, **SHAPES[model]), methods()[method]
    shapes = jax.eval_shape(lambda key: mj.init(config, key=key, dtype=jnp.bfloat16), jax.random.key(0))
    tokens = mj.shard(jax.ShapeDtypeStruct(tuple(batch), jnp.int32), devices, axes="batch pos")
    arrays, static = eqx.partition(mj.shard(shapes, devices), lambda x: isinstance(x, jax.ShapeDtypeStruct))
    predicted = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves((arrays, tokens))
    )

    def traced(arrays: Any, t: Any) -> Any:
        with jax.sharding.use_abstract_mesh(devices.abstract_mesh):  # where `fsdp` shares examples, too
            return fn(eqx.combine(arrays, static), t)

    start = time.perf_counter()
    try:
        program = jax.jit(traced).lower(arrays, tokens).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "problem": str(error).partition("\n")[0][:300]}
    took, memory, crossing = (
        time.perf_counter() - start,
        program.memory_analysis(),
        collectives(program.as_text()),
    )
    sizes = {
        "arguments": memory.argument_size_in_bytes, "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }  # fmt: skip
    gigabytes = {f"{name}_gb": round(size / _GB, 3) for name, size in sizes.items()}
    return {
        "fits": True, "compile_s": round(took, 1), **gigabytes, "total_gb": round(sum(sizes.values()) / _GB, 3),
        "predicted_arguments_gb": round(predicted / _GB, 3),
        "arguments_over_predicted": round(sizes["arguments"] / predicted, 3),
        "collectives_of_a_layer": ", ".join(f"{n} {kind}" for kind, n in crossing.inner.items()),
    }  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compiled(**json.load(sys.stdin))) + "\n")
