"""The arrays of one dictionary as a file has them, what is folded into them, and what is made of them.

Folds change no latent and no reconstruction but by rounding; they are done in the dtype that weights are read in.
What training alone uses (coefficients, windows, estimates) is not in files, or means something else there, and gets a
default.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from mechjax.base.errors import ArgumentError, CheckpointError
from mechjax.dictionaries.batch_top_k import BatchTopK
from mechjax.dictionaries.gated import Gated
from mechjax.dictionaries.jump_relu import JumpReLU
from mechjax.dictionaries.matryoshka import Matryoshka
from mechjax.dictionaries.relu import ReLU
from mechjax.dictionaries.top_k import TopK


@dataclass(frozen=True)
class Weights:
    """Encoder and decoder of a dictionary, in numpy.

    Attributes:
        W_enc: Shape (d_model, feature).
        b_enc: Shape (feature,).
        W_dec: Shape (feature, d_out).
        b_dec: Shape (d_out,).
        W_skip: Shape (d_model, d_out); None for none.
        centred: Whether `b_dec` is taken from the input.
    """

    W_enc: np.ndarray
    b_enc: np.ndarray
    W_dec: np.ndarray
    b_dec: np.ndarray
    W_skip: np.ndarray | None = None
    centred: bool = True

    def lengths(self) -> np.ndarray:
        """Length of each latent's row of the decoder, in float64."""
        return np.linalg.norm(self.W_dec.astype(np.float64), axis=1)

    def with_unit_rows(self, what: str) -> "Weights":
        """Latents times the lengths of their rows of the decoder, whose rows get length 1.

        Raises:
            CheckpointError: A row of zeros.
        """
        lengths = self.lengths()
        if not (lengths > 0).all():
            raise CheckpointError(
                f"{what} measures latents by their rows of the decoder, and row {int(lengths.argmin())} is zero."
            )
        of = lengths.astype(self.W_dec.dtype)
        return replace(self, W_enc=self.W_enc * of, b_enc=self.b_enc * of, W_dec=self.W_dec / of[:, None])

    def rescaled(self, read: float | int, written: float | int) -> "Weights":
        """For inputs that these weights want `read` times as large, and outputs that they give `written` times."""
        if not (np.isfinite([read, written]).all() and read > 0 and written > 0):
            raise ArgumentError(f"scales {read} and {written}: both must be positive.")
        r, w = (self.W_enc.dtype.type(x) for x in (read, written))
        skip = None if self.W_skip is None else self.W_skip * (r / w)
        return replace(self, W_enc=self.W_enc * r, W_dec=self.W_dec / w, b_dec=self.b_dec / w, W_skip=skip)

    def arrays(self) -> dict[str, Any]:
        """As the fields of a dictionary."""
        given = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")}
        arrays = {name: None if x is None else jnp.asarray(x) for name, x in given.items()}
        return arrays | {"centred": self.centred}


def relu(weights: Weights) -> ReLU:
    """A ReLU dictionary."""
    return ReLU(**weights.arrays(), coefficient=_like(weights, 5.0), penalty="weighted")


def gated(weights: Weights, r: np.ndarray, b_size: np.ndarray) -> Gated:
    """A gated dictionary, whose `b_enc` is the gate's."""
    return Gated(
        **weights.arrays(), r=jnp.asarray(r), b_size=jnp.asarray(b_size), coefficient=_like(weights, 1.0)
    )


def top_k(weights: Weights, k: int, what: str) -> TopK:
    """A TopK dictionary."""
    _check_k(weights, k, what)
    return TopK(**weights.arrays(), **_aux(weights), multi=_like(weights, 0.0), k=k, multi_k=0)


def batch_top_k(weights: Weights, k: int, threshold: float, what: str) -> BatchTopK:
    """A BatchTopK dictionary, with the threshold that it uses."""
    _check_k(weights, k, what)
    return BatchTopK(**weights.arrays(), **_aux(weights), **_estimate(weights, threshold), k=k)


def matryoshka(
    weights: Weights, k: int, threshold: float, prefixes: tuple[int, ...], what: str
) -> Matryoshka:
    """A Matryoshka dictionary, with the lengths of its prefixes."""
    _check_k(weights, k, what)
    rising = all(a < b for a, b in zip((0, *prefixes), prefixes, strict=False))
    if not rising or prefixes[-1:] != weights.b_enc.shape:
        raise CheckpointError(
            f"{what} has the prefixes {prefixes[:8]}; lengths that rise to all {len(weights.b_enc)} latents were "
            "expected."
        )
    return Matryoshka(
        **weights.arrays(), **_aux(weights), **_estimate(weights, threshold), k=k, prefixes=prefixes
    )


def jump_relu(weights: Weights, threshold: np.ndarray) -> JumpReLU:
    """A JumpReLU dictionary; thresholds are float32 at least."""
    kept = wide(weights.W_enc.dtype)
    return JumpReLU(
        **weights.arrays(),
        threshold=jnp.asarray(threshold, kept),
        bandwidth=jnp.asarray(0.001 * weights.W_enc.shape[0] ** 0.5, kept),
        coefficient=_like(weights, 1.0),
        target=_like(weights, 32.0),
        penalty="step",
    )


def wide(dtype: Any) -> Any:
    """A dtype of 4 bytes at least: what thresholds are kept in."""
    return dtype if np.dtype(dtype).itemsize >= 4 else np.dtype(np.float32)


def _like(weights: Weights, value: float) -> Any:
    return jnp.asarray(value, weights.W_enc.dtype)


def _aux(weights: Weights) -> dict[str, Any]:
    dead = min(max(1, weights.W_enc.shape[0] // 2), len(weights.b_enc))
    return {"aux": _like(weights, 1 / 32), "k_aux": dead}


def _estimate(weights: Weights, threshold: float) -> dict[str, Any]:
    """A threshold that counts as estimated from many batches: training moves it slowly."""
    kept = wide(weights.W_enc.dtype)
    return {"threshold": jnp.asarray(threshold, kept), "n_observed": jnp.asarray(1000, jnp.int32)}


def _check_k(weights: Weights, k: int, what: str) -> None:
    if not 1 <= k <= len(weights.b_enc):
        raise CheckpointError(f"{what} keeps k={k} latents of {len(weights.b_enc)}.")
