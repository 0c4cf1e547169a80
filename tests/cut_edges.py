"""What each edge does, by brute force: a masked run per edge, all in one program."""

import jax
import jax.numpy as jnp
import numpy as np

import mechjax as mj


def cut_one_by_one(model, clean, corrupt, metric, graph, which=None):
    """The metric of each example less that with one edge resampled, for all edges or some; shape (edge, batch)."""
    ablated, n = mj.graph.writes(model, corrupt), len(graph.edges)
    which = jnp.arange(n) if which is None else jnp.asarray(which)

    def of(edge):
        kept = (jnp.arange(n) != edge).astype(jnp.float32)
        return metric(mj.graph.masked_forward(model, clean, kept, ablated, graph=graph))

    found = jax.lax.map(of, which, batch_size=min(64, len(which)))
    return np.asarray(metric(model(clean)) - found)
