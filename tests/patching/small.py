"""One small model with every parameter random, pairs of prompts, and a metric: what the tests of this folder share."""

import dataclasses

import jax
import numpy as np

import mechjax as mj
from mechjax.models import Config, init

SMALL = Config(d_vocab=20, n_ctx=8, d_model=8, n_layers=3, n_heads=2, n_kv_heads=1, d_head=4, d_mlp=12)
PAIR = tuple(np.random.default_rng(2).integers(0, 20, (2, 3, 5)).astype(np.int32))
METRIC = mj.metrics.logit_diff(np.array([1, 2, 3], np.int32), np.array([4, 5, 4], np.int32))


def redrawn(dtype=np.float32, **changes):
    """A model of which every parameter is random: zero biases would hide where they are lost."""
    config = dataclasses.replace(SMALL, **changes)
    leaves, tree = jax.tree.flatten(init(config, key=jax.random.key(0), dtype=dtype))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = lambda key, x: 0.8 * jax.random.normal(key, x.shape, x.dtype) + 0.1
    return tree.unflatten([draw(k, x) for k, x in zip(keys, leaves, strict=True)])
