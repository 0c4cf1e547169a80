"""What a metric is: one number per example, from logits at one position, reading only the tokens that it needs."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError, TokenError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.prompts import Prompts
from mechjax.base.whole import whole
from mechjax.transform.select import is_concrete


class Metric(eqx.Module):
    """A number per example, `metric(logits) -> [*batch]`.

    Attributes:
        pos: The position it reads: one for all examples, or one per example.
    """

    pos: Int[Array, "..."]

    def tokens(self) -> Int[Array, "*batch k"] | None:
        """The tokens whose logits it reads; None for all of the vocabulary."""
        return None

    @abc.abstractmethod
    def of(self, logits: Float[Array, "*batch token"]) -> Float[Array, "*batch"]:
        """The metric of the logits at its position: those of `tokens()`, or all."""

    def given(self) -> dict[str, tuple[int, ...]]:
        """The batch shapes of what it was given, by name: () where one serves all examples."""
        return {"pos": self.pos.shape}

    @on_any_mesh
    def __call__(
        self, logits: Float[Array, "*batch pos d_vocab"], mask: Bool[Array, "*batch pos"] | None = None
    ) -> Float[Array, "*batch"]:
        """The metric of full logits.

        Args:
            logits: Shape (*batch, pos, d_vocab).
            mask: True at real tokens; with it, positions count real tokens, without it columns.

        Raises:
            ShapeError: answers or positions for another number of examples.
            ArgumentError: a position that is not there, where it can be seen.
        """
        batch, n_pos = logits.shape[:-2], logits.shape[-2]
        at = self.where(batch, n_pos, mask)
        read = jnp.take_along_axis(logits, at[..., None, None], -2, mode="fill", fill_value=jnp.nan)[
            ..., 0, :
        ]
        columns = self.tokens()
        if columns is not None:
            columns = jnp.broadcast_to(columns, (*batch, columns.shape[-1]))
            # An id past the vocabulary reads NaN, never the last row; a negative one too.
            columns = jnp.where(columns < 0, logits.shape[-1], columns)
            read = jnp.take_along_axis(read, columns, -1, mode="fill", fill_value=jnp.nan)
        return self.of(read)

    def where(
        self, batch: tuple[int, ...], n_pos: int, mask: Bool[Array, "*batch pos"] | None = None
    ) -> Int[Array, "*batch"]:
        """The column that it reads in each example.

        Raises:
            ShapeError: positions or answers for another number of examples.
            ArgumentError: a position that is not there, where it can be seen.
        """
        self._check_batch(batch)
        if mask is None:
            at = jnp.broadcast_to(self.pos, batch)
            at = jnp.where(at < 0, at + n_pos, at)
        else:
            at = Prompts(jnp.zeros(mask.shape, jnp.int32), mask).resolve(jnp.broadcast_to(self.pos, batch))
        if is_concrete(at):
            wrong = whole((at < 0) | (at >= n_pos))
            if wrong.any():
                example, asked = (
                    int(np.flatnonzero(wrong.ravel())[0]),
                    np.broadcast_to(self.pos, batch).ravel(),
                )
                raise ArgumentError(
                    f"the metric reads position {asked[example]} of example {example}, "
                    f"which has {n_pos if mask is None else int(mask.reshape(-1, n_pos)[example].sum())} tokens."
                )
        return jnp.where((at < 0) | (at >= n_pos), n_pos, at)

    def _check_batch(self, batch: tuple[int, ...]) -> None:
        for what, shape in self.given().items():
            if shape not in ((), batch):
                raise ShapeError(
                    f"{type(self).__name__}: `{what}` has shape {shape} for a batch of shape {batch}; give one for all "
                    "examples, or one per example."
                )


def token_ids(ids: Any, what: str) -> Int[Array, "*batch"]:
    """Token ids, one for all examples or one per example, checked as far as they can be seen."""
    array = jnp.asarray(ids)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TokenError(
            f"{what} must be token ids (integers), got {array.dtype}. One id of a text: tokenizer.token(' Mary')."
        )
    if is_concrete(array) and array.size and int(array.min()) < 0:
        raise TokenError(f"{what}: {int(array.min())} is no token id; ids are 0 and up.")
    return array.astype(jnp.int32)


def position(pos: Any) -> Int[Array, "*batch"]:
    """A position, one for all examples or one per example."""
    array = jnp.asarray(pos)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ArgumentError(f"pos must be integers, got {array.dtype}.")
    return array.astype(jnp.int32)
