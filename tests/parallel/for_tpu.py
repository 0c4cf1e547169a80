"""Public methods compiled for TPUs that are not here: `python -m tests.parallel.for_tpu NAME...`, in a process of its own.

Of each program: every float32 product is at the highest precision, and no array of the model is a constant.
"""

import math
import re
import subprocess
import sys

import mechjax as mj
from mechjax.parallel.described import environment

LARGEST = 1024  # numbers of a constant that is not one number over and over
CONFIG = mj.models.Config(
    d_vocab=128, n_ctx=32, d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, d_head=16, d_mlp=128
)


def programs(model, metric, graph):
    """Name -> a function of the model and tokens; model and graph here are for their shapes."""
    import jax
    import jax.numpy as jnp

    attribution, patching, key = mj.attribution, mj.patching, jax.random.key(0)
    subject = jnp.ones(8, jnp.int32)

    def edges(method, **how):
        return lambda model, t: method(model, t, t, metric, graph=graph, **how).scores

    def site(method, **how):
        return lambda model, t: method(model, t, t, metric, **how).per_example

    return {
        "forward": lambda model, t: model(t),
        "capture": lambda model, t: mj.capture(model, ["z", "resid_post"], layers=[1])(t),
        "edit": lambda model, t: mj.intervene(model, [mj.zero("z", layer=1, head=2)])(t),
        "sweep": site(patching.activation_patch, site="resid_pre"),
        "eap": edges(attribution.eap),
        "eap under rules": edges(attribution.eap, rules=attribution.GIM),
        "eap_ig on inputs": edges(attribution.eap_ig),
        "eap_ig on activations": edges(attribution.eap_ig, path="activations", steps=2),
        "eap_ig on the mask": edges(attribution.eap_ig, path="mask"),
        "exact edges": edges(attribution.exact),
        "exact nodes": edges(attribution.exact, over="node"),
        "contextual_decomposition": edges(attribution.contextual_decomposition),
        "path_patching": edges(patching.path_patching),
        "attribution_patch": site(attribution.attribution_patch, site="z"),
        "integrated_gradients": site(attribution.integrated_gradients),
        "direct_logit_attribution": site(attribution.direct_logit_attribution),
        "atp_star": lambda model, t: attribution.atp_star(model, t, t, metric).scores,
        "information_flow": lambda model, t: attribution.information_flow(model, t, graph=graph).importance,
        "causal_trace": lambda model, t: (
            patching.causal_trace(model, t, metric, subject=subject, n_samples=2, key=key).scores
        ),
        "attention_knockout": lambda model, t: (
            patching.attention_knockout(model, t, metric, queries=-1, keys=subject).scores
        ),
        "masked_forward": lambda model, t: mj.graph.masked_forward(
            model, t, jnp.full(len(graph.edges), 0.5), mj.graph.writes(model, t), graph=graph
        ),
    }


def main(names):
    """Lowers, reads and compiles programs; says so, one line each."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = Mesh(np.array(chips.devices).reshape(2, 4), ("data", "model"))
    model = mj.init(CONFIG, key=jax.random.key(0))

    def there(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    arrays, static = eqx.partition(model, eqx.is_array)
    arrays = jax.tree.map(lambda x: there(x, P()), arrays)
    tokens = there(jnp.zeros((8, 16), jnp.int32), P("data"))
    known = programs(model, mj.metrics.logit_diff(1, 2), mj.graph.build(model))
    for name in names:
        run = jax.jit(lambda arrays, t, fn=known[name]: jax.tree.leaves(fn(eqx.combine(arrays, static), t)))
        lowered = run.lower(arrays, tokens)
        check(name, lowered.as_text())
        lowered.compile()
        sys.stdout.write(f"compiled {name}\n")
        sys.stdout.flush()


def check(name, text):
    """The precision of products, and the size of constants."""
    dots = re.findall(r"stablehlo.dot_general[^\n]*", text)
    loose = [dot for dot in dots if "f32" in dot and "precision = [HIGHEST, HIGHEST]" not in dot]
    if not dots or loose:
        raise SystemExit(f"{name}: {len(dots)} products, of which not at the highest precision: {loose[:2]}")
    for shape in re.findall(r'stablehlo\.constant dense<["\[][^\n]*tensor<([\dx]+)x(?:f32|bf16|f64)>', text):
        if math.prod(map(int, shape.split("x"))) > LARGEST:
            raise SystemExit(f"{name}: a constant of shape {shape}, where an argument would do")


def compiled(*names):
    """The names of those that a process of its own compiled, and what it said of others."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.for_tpu", *names],
        env=environment(),
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    return [line.removeprefix("compiled ") for line in done.stdout.splitlines()], done.stderr[-3000:]


if __name__ == "__main__":
    main(sys.argv[1:])
