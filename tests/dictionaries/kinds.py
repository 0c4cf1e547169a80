"""One small dictionary of each kind, and data for it."""

import jax
import jax.numpy as jnp

from mechjax.dictionaries import BatchTopK, Gated, JumpReLU, Matryoshka, PAnneal, ReLU, Stage, Switch, TopK

D, F, B = 12, 80, 24

KINDS = {
    "relu": lambda **o: ReLU.init(d_model=D, n_features=F, **o),
    "relu, l1": lambda **o: ReLU.init(d_model=D, n_features=F, penalty="l1", **o),
    "gated": lambda **o: Gated.init(d_model=D, n_features=F, **o),
    "top_k": lambda **o: TopK.init(d_model=D, n_features=F, k=4, **o),
    "top_k, multi": lambda **o: TopK.init(d_model=D, n_features=F, k=4, multi=1 / 8, **o),
    "batch_top_k": lambda **o: BatchTopK.init(d_model=D, n_features=F, k=2, **o),
    "matryoshka": lambda **o: Matryoshka.init(d_model=D, n_features=F, k=2, prefixes=(5, 30, F), **o),
    "jump_relu": lambda **o: JumpReLU.init(d_model=D, n_features=F, threshold=1.0, bandwidth=0.5, **o),
    "jump_relu, quadratic": lambda **o: JumpReLU.init(
        d_model=D, n_features=F, penalty="quadratic", target=4.0, threshold=1.0, bandwidth=0.5, **o
    ),
    "jump_relu, tanh": lambda **o: JumpReLU.init(
        d_model=D, n_features=F, penalty="tanh", threshold=0.1, bandwidth=2.0, **o
    ),
    "p_anneal": lambda **o: PAnneal.init(d_model=D, n_features=F, first=0.5, last=0.5, **o),
    "switch": lambda **o: Switch.init(d_model=D, n_features=F, n_experts=4, k=3, **o),
}


def drawn(name, seed=0, **options):
    """A dictionary of one kind with every array drawn, so that none is 0 by chance of its start."""
    fresh = KINDS[name](key=jax.random.key(seed), **options)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 20))
    trained = {"b_enc", "b_dec", "W_skip", "r", "b_size", "b_router"}

    def moved(path, x):
        name = path[-1].name
        return x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype) if name in trained else x

    return jax.tree_util.tree_map_with_path(moved, fresh)


def tokens(seed=0, n=B, d=D):
    """Data of mean square near 1 and a mean that is not 0."""
    return jax.random.normal(jax.random.key(100 + seed), (n, d)) + 0.3


def stage(dead=()):
    """The end of a run."""
    late = Stage.late(F)
    return Stage(late.dead.at[jnp.array(dead, int)].set(True), late.sparsity, late.progress)
