"""Images as patches, and positions of patches for images of another size.

Interpolation is bicubic with Keys' kernel for a = -0.75, points standing in the middle of their part of a side, those
beyond the border repeated: torch's `interpolate(mode="bicubic", align_corners=False)`, which transformers uses (Keys
1981, IEEE Transactions on Acoustics, Speech, and Signal Processing 29:6; `jax.image` has a = -0.5). It is a product
with one small matrix per side, which depends on the sizes alone.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.models.contraction import widened
from mechjax.models.vit_config import ViTConfig

_A = -0.75  # torch's parameter of Keys' kernel


def as_pixels(
    pixels: Any, config: ViTConfig, dtype: DTypeLike, *, any_size: bool
) -> Float[Array, "*batch channel height width"]:
    """Pixels as an array of the weights' dtype, checked as far as can be seen."""
    if not isinstance(pixels, (np.ndarray, jnp.ndarray)):
        try:
            pixels = np.asarray(pixels)
        except ValueError:
            raise ShapeError(
                "Images of different sizes make no array: resize them first, or call the model on each."
            ) from None
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ArgumentError(
            "Pixels must be floating-point numbers, normalised as the checkpoint's image processor does; got "
            f"{pixels.dtype}. Of raw pixels give (pixels / 255 - image_mean) / image_std, whose numbers per channel "
            "stand in preprocessor_config.json."
        )
    shape, (height, width) = pixels.shape, config.image_size
    right = f"(*batch, {config.n_channels}, {height}, {width})"
    if len(shape) < 3:
        raise ShapeError(f"Pixels need a shape {right}: channels, rows, columns; got {shape}.")
    if shape[-3] != config.n_channels:
        last = " They seem to stand last: np.moveaxis(pixels, -1, -3) puts them there."
        raise ShapeError(
            f"Pixels have the shape {shape}, but the model has {config.n_channels} channels, before rows and columns: "
            f"{right}.{last if shape[-1] == config.n_channels else ''}"
        )
    if shape[-2:] != config.image_size:
        _check_size(shape[-2:], config, any_size)
    return jnp.asarray(pixels, dtype)


def _check_size(size: tuple[int, ...], config: ViTConfig, any_size: bool) -> None:
    """Refuse images that are smaller than a patch, or of another size that nobody asked for."""
    found, right = (" x ".join(map(str, pair)) for pair in (size, config.image_size))
    if not (any_size or config.any_size):
        raise ShapeError(
            f"Images are {found} pixels (height x width), but the model's positions are those of {right}: resize them, "
            "or pass interpolate_pos_encoding=True to interpolate the positions."
        )
    if size[0] < config.patch_size[0] or size[1] < config.patch_size[1]:
        raise ShapeError(
            f"Images are {found} pixels (height x width), smaller than a patch of "
            f"{' x '.join(map(str, config.patch_size))}: give larger ones, such as {right}."
        )


def patches(
    pixels: Float[Array, "*batch channel height width"], patch_size: tuple[int, int]
) -> Float[Array, "*batch row channel patch_height column patch_width"]:
    """Pixels by patch; those right of and below the last whole patch are left out, as a strided convolution does."""
    height, width = patch_size
    rows, columns = pixels.shape[-2] // height, pixels.shape[-1] // width
    whole = pixels[..., : rows * height, : columns * width]
    cut = whole.reshape(*whole.shape[:-2], rows, height, columns, width)
    return jnp.moveaxis(cut, -5, -4)


def interpolated(
    W_pos: Float[Array, "row d_model"], n_special: int, grid: tuple[int, int], wanted: tuple[int, int]
) -> Float[Array, "pos d_model"]:
    """Embeddings of the positions of `wanted` rows and columns of patches, from those of `grid`.

    Args:
        W_pos: The learned ones: `n_special` of class tokens, which stay as they are, then of patches row by row.
        n_special: How many class tokens there are.
        grid: Rows and columns that were learned.
        wanted: Rows and columns that there are.
    """
    if grid == wanted:
        return W_pos
    learned = widened(W_pos[n_special:].reshape(*grid, -1))
    for axis in (0, 1):
        weights = jnp.asarray(_bicubic(grid[axis], wanted[axis]), learned.dtype)
        learned = jnp.moveaxis(
            jnp.tensordot(weights, learned, ((1,), (axis,)), precision=lax.Precision.HIGHEST), 0, axis
        )
    rows = learned.reshape(-1, W_pos.shape[-1]).astype(W_pos.dtype)
    return jnp.concatenate((W_pos[:n_special], rows))


def _bicubic(n: int, wanted: int) -> Float[np.ndarray, "wanted n"]:
    """How much each of `n` points counts at each of `wanted` points spread over the same length."""
    where = (np.arange(wanted) + 0.5) * n / wanted - 0.5
    left = np.floor(where).astype(int)
    weights = np.zeros((wanted, n))
    for offset in (-1, 0, 1, 2):
        far = np.abs(where - (left + offset))
        near = ((_A + 2) * far - (_A + 3)) * far**2 + 1
        beyond = ((_A * far - 5 * _A) * far + 8 * _A) * far - 4 * _A
        np.add.at(
            weights, (np.arange(wanted), np.clip(left + offset, 0, n - 1)), np.where(far <= 1, near, beyond)
        )
    return weights
