"""Dictionaries that mechjax writes for SAELens; `python -m tests.dictionaries.written` writes the committed folders.

What SAELens computes from those is recorded by `python tests/oracles/make_dictionaries.py read`.
"""

import shutil

import jax.numpy as jnp
import numpy as np

from mechjax.dictionaries import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from mechjax.dictionaries.formats import write_saelens
from mechjax.dictionaries.normalized import Normalized
from tests.dictionaries.places import ORACLES

D, OUT, F, K = 6, 5, 12, 4


def arrays(seed, out=D, *, skip=False, centred=True):
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, out), "b_dec": (out,)}
    shapes |= {"W_skip": (D, out)} if skip else {}
    drawn = {name: jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32) for name, shape in shapes.items()}
    return drawn | {"centred": centred}


def thresholds(seed):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.1, 0.6, F), jnp.float32)


def number(x):
    return jnp.asarray(x, jnp.float32)


def jump(**more):
    return JumpReLU(
        **arrays(**more), threshold=thresholds(7), bandwidth=number(0.1), coefficient=number(1), target=number(4),
        penalty="step",
    )  # fmt: skip


def batch(kind, seed, **more):
    return kind(
        **arrays(seed), threshold=number(0.35), n_observed=jnp.asarray(9, jnp.int32), aux=number(0), k=K, k_aux=0,
        **more,
    )  # fmt: skip


def top_k(seed):
    return TopK(**arrays(seed), aux=number(0), multi=number(0), k=K, k_aux=0, multi_k=0)


def relu(**more):
    return ReLU(**arrays(**more), coefficient=number(1))


def ours():
    """One of each that SAELens can hold, by name."""
    gated = Gated(**arrays(5), r=thresholds(8), b_size=thresholds(9), coefficient=number(1))
    return {
        "relu": relu(seed=0),
        "relu_raw": relu(seed=1, centred=False),
        "top_k": top_k(2),
        "batch_top_k": batch(BatchTopK, 3),
        "matryoshka": batch(Matryoshka, 4, prefixes=(3, F)),
        "gated": gated,
        "jump_relu": jump(seed=6, centred=False),
        "layer_norm": Normalized(top_k(10), "layer_norm"),
        "length": Normalized(relu(seed=11), "length"),
        "transcoder": relu(seed=12, out=OUT, centred=False),
        "skip_transcoder": relu(seed=13, out=OUT, skip=True, centred=False),
        "jump_transcoder": jump(seed=14, out=OUT, centred=False),
        "jump_skip_transcoder": jump(seed=15, out=OUT, skip=True, centred=False),
        "skip_centred": relu(seed=16, skip=True),
        "normalized_transcoder": Normalized(relu(seed=17, out=OUT, centred=False), "length", restores=False),
    }


if __name__ == "__main__":
    shutil.rmtree(ORACLES / "ours", ignore_errors=True)
    for case, dictionary in ours().items():
        write_saelens(
            dictionary, ORACLES / "ours" / case, model_name="tiny", hook_name="blocks.1.hook_mlp_in"
        )
