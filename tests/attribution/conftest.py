"""Small models of every kind that a graph tells apart, with prompts and a metric."""

import dataclasses

import equinox as eqx
import jax
import numpy as np
import pytest

import mechjax as mj
from mechjax.models import Config, init

SMALL = Config(d_vocab=20, n_ctx=8, d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, d_head=4, d_mlp=12)


def redrawn(config, dtype=np.float32):
    """A model of which every parameter is random: zero biases would hide where they are lost."""
    leaves, tree = jax.tree.flatten(init(config, key=jax.random.key(0), dtype=dtype))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = lambda key, x: 0.8 * jax.random.normal(key, x.shape, x.dtype) + 0.1
    return tree.unflatten([draw(k, x) for k, x in zip(keys, leaves, strict=True)])


def straightened(model):
    """Attention that looks everywhere alike, MLPs that never bend, norms that divide by one and the same number."""
    blocks = model.blocks
    still = lambda norm: eqx.tree_at(lambda n: n.w, norm, norm.w * 1e9)
    model = eqx.tree_at(lambda m: (m.blocks.ln1, m.blocks.ln2, m.ln_final), model,
                        (still(blocks.ln1), still(blocks.ln2), still(model.ln_final)))  # fmt: skip
    return eqx.tree_at(
        lambda m: (m.blocks.attn.W_Q, m.blocks.attn.b_Q, m.blocks.mlp.b_in, m.blocks.mlp.W_out),
        model,
        (blocks.attn.W_Q * 0, blocks.attn.b_Q * 0, blocks.mlp.b_in + 1e3, blocks.mlp.W_out * 1e-2),
    )


@pytest.fixture(scope="session")
def small():
    """A config with shared keys, changed as asked."""
    return lambda **changes: dataclasses.replace(SMALL, **changes)


@pytest.fixture(scope="session")
def draw():
    return redrawn


@pytest.fixture(scope="session")
def affine():
    return straightened


@pytest.fixture(scope="module")
def model():
    return redrawn(SMALL)


@pytest.fixture(scope="module")
def graph(model):
    return mj.graph.build(model)


@pytest.fixture(scope="session")
def pair():
    """Three pairs of five tokens."""
    return tuple(np.random.default_rng(2).integers(0, 20, (2, 3, 5)).astype(np.int32))


@pytest.fixture(scope="session")
def metric():
    return mj.metrics.logit_diff(np.array([1, 2, 3], np.int32), np.array([4, 5, 4], np.int32))
