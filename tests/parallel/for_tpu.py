"""Public methods compiled for TPUs that are not here: `python -m tests.parallel.for_tpu TOPOLOGY SIZES NAME...`.

It runs in a process of its own, as libtpu is for one at a time, and writes one line of JSON for each program: what is in
its text, what crosses between chips, and what a chip holds. Weights are split as `mj.shard` splits them.
"""

import json
import math
import subprocess
import sys
import time
from contextlib import nullcontext

import mechjax as mj
from mechjax.parallel.collectives import collectives
from mechjax.parallel.described import environment
from tests.parallel import program_text

WIDE = mj.models.Config(
    d_vocab=4096, n_ctx=64, d_model=1024, n_layers=5, n_heads=8, n_kv_heads=4, d_head=128, d_mlp=4096
)
NARROW = mj.models.Config(  # for programs that take long to compile
    d_vocab=128, n_ctx=32, d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, d_head=16, d_mlp=128
)


def methods(model, batch):
    """Name -> the config that it is compiled for, and a function of the model and tokens."""
    import jax
    import jax.numpy as jnp

    attribution, patching, key = mj.attribution, mj.patching, jax.random.key(0)
    metric, subject = mj.metrics.logit_diff(1, 2), jnp.ones(batch, jnp.int32)

    def edges(method, **how):
        return lambda model, t: method(model, t, t, metric, graph=mj.graph.build(model), **how).scores

    def site(method, **how):
        return lambda model, t: method(model, t, t, metric, **how).per_example

    def generated(model, t):
        vector = jnp.ones(model.config.d_model)
        found = mj.generate(model, t, 6, edits=[mj.add("resid_pre", vector, layer=1)], capture="z")
        return found.tokens, found.log_probs, jax.tree.leaves(found.acts)

    return {
        "forward": lambda model, t: model(t),
        "capture": lambda model, t: mj.capture(model, ["z", "resid_post"])(t),
        "intervene": lambda model, t: mj.intervene(model, [mj.zero("z", layer=1, head=2)])(t),
        "sweep": site(patching.activation_patch, site="resid_pre"),
        "eap": edges(attribution.eap),
        "eap_ig": edges(attribution.eap_ig),
        "integrated_gradients": site(attribution.integrated_gradients),
        "generate": generated,
        "eap under rules": edges(attribution.eap, rules=attribution.GIM),
        "eap_ig on activations": edges(attribution.eap_ig, path="activations", steps=2),
        "eap_ig on the mask": edges(attribution.eap_ig, path="mask"),
        "exact edges": edges(attribution.exact),
        "exact nodes": edges(attribution.exact, over="node"),
        "contextual_decomposition": edges(attribution.contextual_decomposition),
        "path_patching": edges(patching.path_patching),
        "attribution_patch": site(attribution.attribution_patch, site="z"),
        "direct_logit_attribution": site(attribution.direct_logit_attribution),
        "atp_star": lambda model, t: attribution.atp_star(model, t, t, metric).scores,
        "information_flow": lambda model, t: (
            attribution.information_flow(model, t, graph=mj.graph.build(model)).importance
        ),
        "causal_trace": lambda model, t: (
            patching.causal_trace(model, t, metric, subject=subject, n_samples=2, key=key).scores
        ),
        "attention_knockout": lambda model, t: (
            patching.attention_knockout(model, t, metric, queries=-1, keys=subject).scores
        ),
        "masked_forward": lambda model, t: masked(model, t),
    }


def masked(model, t):
    """The masked forward, every edge kept by half."""
    import jax.numpy as jnp

    graph = mj.graph.build(model)
    kept = jnp.full(len(graph.edges), 0.5)
    return mj.graph.masked_forward(model, t, kept, mj.graph.writes(model, t), graph=graph)


def training(mesh):
    """Two steps of a dictionary's training, as the loop of `dictlearn` compiles them."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from mechjax.dictlearn.loop import advance
    from mechjax.dictlearn.placement import placed, spread_batches
    from mechjax.dictlearn.plan import planned
    from mechjax.dictlearn.step import begun

    plan = planned(10, 2, 1e-3, 0, 0.3, 0.0, None, 1000, None, True)
    make = lambda key: mj.dictionaries.TopK.init(d_model=128, n_features=1024, k=8, key=key)
    state = eqx.filter_eval_shape(lambda key: begun(make(key), plan.optimizer), jax.random.key(0))
    x = spread_batches(jax.ShapeDtypeStruct((2, 256, 128), jnp.float32), mesh, False)
    step = lambda state, x: advance((plan, jnp.ones(2), jnp.int32(0), (x, None)), state)
    return step, (placed(state, plan.optimizer, mesh), x)


def wrong(mesh):
    """Programs that each have one thing that no program may have."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mechjax.parallel.shard import spread

    x = spread(
        jax.ShapeDtypeStruct((1024, 1024), jnp.float32), jax.NamedSharding(mesh, jax.P("data", "model"))
    )
    numbers = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    return {
        "to the host": (lambda x: eqx.error_if(x, x.sum() > 0, "too much"), (x,)),
        "large constant": (lambda x: x + numbers, (x,)),
        "low precision": (lambda x: x @ x, (x,)),
        "float64": (lambda x: jnp.sin(x.astype(jnp.float64)).astype(jnp.float32), (x,)),
    }


def held(given):
    """Bytes of arguments that one chip holds, by how they are split."""
    import jax

    leaves = [x for x in jax.tree.leaves(given) if isinstance(x, jax.ShapeDtypeStruct)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def compiled_here(name, fn, given, mesh):
    """One program: what was found of it."""
    import equinox as eqx
    import jax

    arrays, static = eqx.partition(given, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    traced = lambda arrays: [x for x in jax.tree.leaves(fn(*eqx.combine(arrays, static))) if eqx.is_array(x)]
    start = time.perf_counter()
    # Training says where arrays lie by the mesh in its context. Float64 is seen only where it is allowed.
    with jax.set_mesh(mesh) if name == TRAINING else nullcontext(), jax.enable_x64(name == "float64"):
        lowered = jax.jit(traced).lower(arrays)
        program = lowered.compile()
    memory, texts = program.memory_analysis(), (lowered.as_text(), program.as_text())
    n_asked, n_made, loose = program_text.products(*texts)
    crossing = collectives(texts[1])
    return {
        "name": name, "seconds": round(time.perf_counter() - start, 2), "products": [n_asked, n_made], "loose": loose,
        "to_the_host": program_text.to_the_host(*texts), "doubles": program_text.doubles(*texts),
        "largest_constant": program_text.largest_constant(*texts), "collectives": crossing.counts,
        "crossing": crossing.bytes, "largest_crossing": crossing.largest, "predicted": held(given),
        "arguments": memory.argument_size_in_bytes, "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }  # fmt: skip


def described(topology, sizes):
    """A mesh of chips that are not here."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(chips).reshape(tuple(map(int, sizes.split("x")))), ("data", "model"))


def main(topology, sizes, names):
    """Compiles programs, and writes what was found, one line each."""
    import jax
    import jax.numpy as jnp

    mesh = described(topology, sizes)
    batch = max(8, mesh.shape["data"])
    tokens = mj.shard(jax.ShapeDtypeStruct((batch, 8), jnp.int32), mesh, axes="batch pos")
    known, controls = methods(None, batch), wrong(mesh)
    for name in names:
        if name in known:
            config = WIDE if name in ON_WIDE else NARROW
            shapes = jax.eval_shape(lambda key, config=config: mj.init(config, key=key), jax.random.key(0))
            fn, given = known[name], (mj.shard(shapes, mesh), tokens)
        else:
            fn, given = training(mesh) if name == TRAINING else controls[name]
        sys.stdout.write(json.dumps(compiled_here(name, fn, given, mesh)) + "\n")
        sys.stdout.flush()


TRAINING = "dictionary step"
ON_WIDE = ("forward", "capture")


def compiled(topology, sizes, *names, seconds=280, script="tests.parallel.for_tpu"):
    """Name -> what a process of its own found of each program; and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", script, topology, sizes, *names],
        env=environment(),
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    found = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return {facts["name"]: facts for facts in found}, done.stderr[-3000:]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
