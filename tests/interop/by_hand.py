"""A small Linen network, what its MLPs give changed by Flax's own interceptors: an oracle without mechjax."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import mechjax as mj
from mechjax.interop import from_linen

LAYERS, BATCH, POS, D, VOCAB = 2, 2, 4, 6, 11
CLEAN = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])
CORRUPT = (CLEAN + 3) % VOCAB
METRIC = mj.metrics.logit_diff(jnp.array([1, 2]), jnp.array([3, 4]))
SITES = {"mlp_out": ("blocks.mlp.output", ("pos", "d_model"))}
NOTHING = jnp.zeros((LAYERS, POS), bool)
EMPTY = jnp.zeros((LAYERS, BATCH, POS, D))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D)(jnp.tanh(x))


class Block(nn.Module):
    """Each position reads the mean of those up to it."""

    @nn.compact
    def __call__(self, x):
        seen = jnp.cumsum(x, -2) / jnp.arange(1.0, POS + 1)[:, None]
        return x + MLP(name="mlp")(seen)


class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, D)(tokens)
        for i in range(LAYERS):
            x = Block(name=f"blocks_{i}")(x)
        return nn.Dense(VOCAB)(x)


@functools.cache
def variables():
    return Net().init(jax.random.key(0), CLEAN)


@functools.cache
def subject():
    """The network as a subject that names the axes of what its MLPs give."""
    return from_linen(Net(), variables(), sites=SITES)


def read(logits):
    """The metric, written out."""
    rows = jnp.arange(BATCH)
    return logits[rows, -1, jnp.array([1, 2])] - logits[rows, -1, jnp.array([3, 4])]


@jax.jit
def forward(tokens, put, where):
    """Logits, and what each MLP gives, with `put` (layer, batch, pos, d) in its place `where` (layer, pos)."""
    outs = []

    def intercept(run, args, kwargs, context):
        out = run(*args, **kwargs)
        if context.method_name != "__call__" or context.module.path[1:] != ("mlp",):
            return out
        layer = len(outs)
        outs.append(jnp.where(where[layer][:, None], put[layer], out))
        return outs[-1]

    with nn.intercept_methods(intercept):
        return Net().apply(variables(), tokens), jnp.stack(outs)


@jax.jit
def slopes(tokens, put, where):
    """Gradient of the metric, all examples together, at what stands `where` something is put."""
    return jax.grad(lambda put: read(forward(tokens, put, where)[0]).sum())(put)


def activations(tokens):
    """What every MLP gives."""
    return forward(tokens, EMPTY, NOTHING)[1]


def patched(base, donor):
    """The metric with one layer and position of `donor` put into `base`, one at a time. Shape (layer, pos, batch)."""
    put = activations(donor)
    cells = [[NOTHING.at[i, p].set(True) for p in range(POS)] for i in range(LAYERS)]
    return jnp.stack([jnp.stack([read(forward(base, put, w)[0]) for w in row]) for row in cells])
