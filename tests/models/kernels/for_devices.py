"""Programs lowered for devices that are not here: `python -m tests.models.kernels.for_devices tpu|cuda NAME...`.

In a process of its own: one reads libtpu, which is for one process at a time, the other is told of a cuDNN before JAX
looks for it, so nothing here imports JAX at its top. Prints one line of JSON for each program: its kernels and, where it
is compiled for a mesh, its collectives.
"""

import dataclasses
import json
import re
import subprocess
import sys
import types

N_POS = 640
FMHA = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
CASES = {  # dtype, choices of the config, what is done
    "bfloat16": ("bfloat16", {}, "forward"),
    "float32": ("float32", {}, "forward"),
    "float32, fast": ("float32", {"precision": "default"}, "forward"),
    "soft-cap": ("bfloat16", {"attn_softcap": 30.0}, "forward"),
    "sinks": ("bfloat16", {"attn_sinks": True}, "forward"),
    "alibi": ("bfloat16", {"positions": "alibi"}, "forward"),
    "windows": ("bfloat16", {"windows": (100, None)}, "forward"),
    "odd width": ("bfloat16", {"d_head": 20, "rotary_dim": 20}, "forward"),
    "pattern": ("bfloat16", {}, "pattern"),
    "short": ("bfloat16", {}, "short"),
    "cache": ("bfloat16", {}, "cache"),
    "gradient": ("bfloat16", {}, "gradient"),
    "mesh": ("bfloat16", {"windows": (100, None)}, "forward"),
    "mesh, gradient": ("bfloat16", {}, "gradient"),
    "mesh, heads that do not divide": ("bfloat16", {"n_kv_heads": 2}, "forward"),
}


def pretend_cudnn():
    """What JAX reads of its CUDA plugin: the version of cuDNN."""
    plugin, versions = types.ModuleType("jax_cuda13_plugin"), types.ModuleType("jax_cuda13_plugin._versions")
    plugin.__path__, plugin._versions, versions.cudnn_get_version = [], versions, lambda: 91000
    sys.modules |= {plugin.__name__: plugin, versions.__name__: versions}


def program(name):
    """A model's shapes, its static part, and a function of arrays, tokens and which are real."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import mechjax as mj

    dtype, choices, does = CASES[name]
    base = mj.models.Config(
        d_vocab=256,
        n_ctx=1024,
        d_model=256,
        n_layers=2,
        n_heads=8,
        n_kv_heads=4,
        d_head=64,
        positions="rotary",
    )
    config = dataclasses.replace(base, **choices)
    model = jax.eval_shape(lambda: mj.init(config, key=jax.random.key(0), dtype=jnp.dtype(dtype)))
    arrays, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    runs = {
        "forward": lambda model, t, m: model(t, mask=m),
        "short": lambda model, t, m: model(t[:, :128], mask=m[:, :128]),
        "pattern": lambda model, t, m: mj.capture(model, ["pattern"])(t, mask=m)[0],
        "cache": lambda model, t, m: model(
            t, mask=m, cache=mj.models.Cache.empty(config, t.shape[0], 1024, jnp.dtype(dtype))
        )[0],
        "gradient": lambda model, t, m: mj.value_and_grad_at(
            model, lambda logits: logits.astype(jnp.float32).mean(), ["resid_pre"]
        )(t, mask=m)[1]["resid_pre"],
    }  # fmt: skip
    return arrays, lambda arrays, t, m: runs[does](eqx.combine(arrays, static), t, m)


def for_tpu(name):
    """Kernels and collectives of a program for described chips: one, or a mesh of eight."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from mechjax.parallel.layout import RULES, layout

    chips = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
    chips = chips.reshape(2, 4) if "mesh" in name else chips[:1].reshape(1, 1)
    mesh = Mesh(chips, ("data", "model"))
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec)))
    arrays, run = program(name)
    rules = (
        {"model": ("d_mlp", "d_vocab")} if "do not divide" in name else RULES
    )  # what a user would place by hand
    arrays = jax.tree.map(place, arrays, layout(arrays, {"model": chips.shape[1]}, rules))
    t, m = (place(jax.ShapeDtypeStruct((4, N_POS), kind), ("data",)) for kind in (jnp.int32, bool))
    lowered = jax.jit(run).lower(arrays, t, m)
    if "mesh" not in name:
        return {"kernels": lowered.as_text().count("@tpu_custom_call")}
    text = lowered.compile().as_text()
    moves = re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
    return {"kernels": text.count('custom_call_target="tpu_custom_call"'), "moves": moves}


def for_cuda(name):
    """Kernels of a program exported for CUDA."""
    import jax
    import jax.numpy as jnp
    from jax import export

    arrays, run = program(name)
    t, m = (jax.ShapeDtypeStruct((4, N_POS), kind) for kind in (jnp.int32, bool))
    allowed = [export.DisabledSafetyCheck.custom_call(target) for target in FMHA]
    text = export.export(jax.jit(run), platforms=["cuda"], disabled_checks=allowed)(
        arrays, t, m
    ).mlir_module()
    return {"kernels": re.findall(r"custom_call @(__cudnn\S*?)\(", text)}


def main(device, *names):
    """Says what is found, program by program."""
    if device == "cuda":
        pretend_cudnn()
    for name in names:
        found = {"tpu": for_tpu, "cuda": for_cuda}[device](name)
        sys.stdout.write(json.dumps([name, found]) + "\n")
        sys.stdout.flush()


def answers(device, *names):
    """What another process finds in programs, by name; and what it said of others."""
    from mechjax.parallel.described import environment

    done = subprocess.run(
        [sys.executable, "-m", "tests.models.kernels.for_devices", device, *names],
        env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    return dict(json.loads(line) for line in done.stdout.splitlines()), done.stderr[-3000:]


if __name__ == "__main__":
    main(*sys.argv[1:])
