"""The Linen network of `networks`, with what its MLPs give changed by Flax's own interceptors: an oracle without mechjax."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import mechjax as mj
from mechjax.interop import from_linen
from tests.interop.networks import LAYERS, POS, TOKENS, VOCAB, D, linen

CLEAN, CORRUPT = TOKENS, (TOKENS + 3) % VOCAB
METRIC = mj.metrics.logit_diff(jnp.array([1, 2]), jnp.array([3, 4]))
SITES = {"mlp_out": ("blocks.mlp.output", ("pos", "d_model"))}
NOTHING = jnp.zeros((LAYERS, POS), bool)
EMPTY = jnp.zeros((LAYERS, *TOKENS.shape, D))


def read(logits):
    """The metric, written out."""
    rows = jnp.arange(2)
    return logits[rows, -1, jnp.array([1, 2])] - logits[rows, -1, jnp.array([3, 4])]


@functools.cache
def module():
    return linen(layout="loop")


@functools.cache
def subject():
    """The network as a subject that names the axes of what its MLPs give."""
    return from_linen(*module(), sites=SITES)


@jax.jit
def forward(tokens, put, where):
    """Logits, and what each MLP gives, with `put` (layer, batch, pos, d) in its place `where` (layer, pos)."""
    net, variables = module()
    outs = []

    def intercept(run, args, kwargs, context):
        out = run(*args, **kwargs)
        if context.method_name != "__call__" or context.module.path[1:] != ("mlp",):
            return out
        layer = int(context.module.path[0].removeprefix("blocks_"))
        outs.append(jnp.where(where[layer][:, None], put[layer], out))
        return outs[-1]

    with nn.intercept_methods(intercept):
        return net.apply(variables, tokens), jnp.stack(outs)


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
