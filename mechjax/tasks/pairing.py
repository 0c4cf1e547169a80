"""Whether clean and corrupt prompts line up, as patching needs them to."""

from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Array, Bool, Int

from mechjax.base.errors import PairingError
from mechjax.base.inputs import Inputs, inputs_of
from mechjax.base.prompts import Prompts
from mechjax.base.whole import whole
from mechjax.models.config import Config
from mechjax.models.decoder import as_tokens
from mechjax.transform.select import is_concrete

Batch = tuple[Int[Array, "batch pos"], Bool[Array, "batch pos"] | None]


def paired(clean: Any, corrupt: Any, config: Config) -> tuple[Batch, Batch]:
    """Ids and masks of both sides, which must have the same tokens at the same places.

    Raises:
        PairingError: another number of prompts or tokens; the first pair that differs is shown aligned.
    """
    sides = [as_tokens(batched(side), None, config) for side in (clean, corrupt)]
    (ids, mask), (other, other_mask) = sides
    if ids.shape[0] != other.shape[0]:
        raise PairingError(
            f"clean has {ids.shape[0]} prompts and corrupt has {other.shape[0]}: patching puts one prompt's "
            "activations into another's run, so give them in pairs."
        )
    if ids.shape == other.shape and not all(m is None or is_concrete(m) for m in (mask, other_mask)):
        return sides[0], sides[1]  # inside jit masks cannot be looked at
    lengths = [_lengths(i, m) for i, m in sides]
    differs = np.flatnonzero(lengths[0] != lengths[1])
    if differs.size or ids.shape != other.shape:
        example = int(differs[0]) if differs.size else 0
        raise PairingError(
            f"pair {example} has {lengths[0][example]} clean and {lengths[1][example]} corrupt tokens (padded to "
            f"{ids.shape[-1]} and {other.shape[-1]}); positions must correspond, so use prompts of equal length:\n"
            f"{aligned(_real(ids, mask, example), _real(other, other_mask, example))}"
        )
    if not _same_mask(mask, other_mask):
        raise PairingError(
            "clean and corrupt are padded at different places, so their positions do not correspond. Pad both on the "
            "same side."
        )
    return sides[0], sides[1]


def paired_inputs(clean: Any, corrupt: Any) -> tuple[Inputs, Inputs]:
    """Both sides of any function, as arguments, which must be of the same shapes and real at the same places.

    Raises:
        PairingError: they are not; the first array that differs is named.
    """
    sides = inputs_of(clean), inputs_of(corrupt)
    arrays, other = (
        {keystr(path): x for path, x in tree_leaves_with_path((side.args, side.kwargs))} for side in sides
    )
    names = ", ".join(arrays) or "nothing"
    if jax.tree.structure(sides[0]) != jax.tree.structure(sides[1]):
        raise PairingError(
            f"clean and corrupt are different calls: {names} and {', '.join(other) or 'nothing'}. Give both the same "
            "arguments: an array, a tuple of arguments, or a dictionary of named ones."
        )
    for name, x in arrays.items():
        shapes = [(np.shape(a), getattr(a, "dtype", type(a))) for a in (x, other[name])]
        if shapes[0] != shapes[1]:
            raise PairingError(
                f"{name} is {shapes[0][1]}{list(shapes[0][0])} in clean and {shapes[1][1]}{list(shapes[1][0])} in "
                "corrupt: patching puts one run's activations into the other's, so give both the same shapes."
            )
    masks = [side.mask for side in sides]
    if all(map(is_concrete, masks)) and not _same_mask(*masks):
        raise PairingError(
            "clean and corrupt are padded at different places, so their positions do not correspond. Use inputs of "
            "equal length, padded on the same side."
        )
    return sides


def batched(prompts: Any) -> Any:
    """One prompt is a batch of one."""
    if isinstance(prompts, Prompts):
        if prompts.tokens.ndim == 1:
            return Prompts(prompts.tokens[None], prompts.mask[None])
        if prompts.tokens.ndim > 2:
            raise PairingError(
                f"prompts must be [batch, pos], got {prompts.tokens.shape}; flatten the batch axes."
            )
        return prompts
    array = prompts if isinstance(prompts, jax.Array) else np.asarray(prompts)
    if array.ndim > 2:
        raise PairingError(f"prompts must be [batch, pos], got {array.shape}; flatten the batch axes.")
    return array[None] if array.ndim == 1 else array


def _lengths(ids: Array, mask: Array | None) -> Any:
    return np.full(ids.shape[0], ids.shape[-1]) if mask is None else whole(mask).sum(-1)


def _real(ids: Array, mask: Array | None, example: int) -> list[str]:
    if not is_concrete(ids):  # inside jit, with a mask that is known
        return ["?"] * int(_lengths(ids, mask)[example])
    row = whole(ids)[example]
    return [str(i) for i in (row if mask is None else row[whole(mask)[example]])]


def _same_mask(mask: Array | None, other: Array | None) -> bool:
    if mask is None or other is None:
        given = mask if other is None else other
        return given is None or bool(whole(given).all())
    return bool((whole(mask) == whole(other)).all())


def aligned(clean: list[str], corrupt: list[str]) -> str:
    """Two token sequences, one above the other, piece by piece."""
    rows = max(len(clean), len(corrupt))
    sides = [side + ["-"] * (rows - len(side)) for side in (clean, corrupt)]
    widths = [max(len(a), len(b)) for a, b in zip(*sides, strict=True)]
    lines = [" | ".join(t.ljust(w) for t, w in zip(side, widths, strict=True)).rstrip() for side in sides]
    return f"  clean:   {lines[0]}\n  corrupt: {lines[1]}"
