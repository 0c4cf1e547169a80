"""Activations as rows: one for each token, of several sites and layers from one run of the model.

Of an image, one for each position. A decoder is run up to the last layer that is asked for, and what nobody reads there
is left out by the compiler. Of an encoder-decoder the encoder alone is run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError, SiteError
from mechjax.base.prompts import Prompts
from mechjax.base.whole import whole
from mechjax.models.decoder import Decoder, as_tokens
from mechjax.models.first_layers import first_layers
from mechjax.models.mamba import Mamba
from mechjax.models.patches import as_pixels
from mechjax.models.structures import Model
from mechjax.models.t5 import T5
from mechjax.models.vit import ViT
from mechjax.transform import capture
from mechjax.transform.static import hold
from mechjax.transform.transforms import Transformed, reads_of

NUMPY = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The dtypes that rows are stored in."""


@runtime_checkable
class Packed(Protocol):
    """Prompts with positions of their own, such as `mechjax.text.pack` gives."""

    @property
    def prompts(self) -> Prompts:
        """Tokens and mask."""
        ...

    @property
    def positions(self) -> Int[Array, "batch pos"]:
        """Each token's position."""
        ...


@dataclass(frozen=True)
class Column:
    """A site at a layer, whose activations are rows.

    Attributes:
        site: Its name.
        layer: The layer; None for a site outside the layers.
        width: Numbers of a row.
    """

    site: str
    layer: int | None
    width: int

    def __str__(self) -> str:
        return f"`{self.site}`" if self.layer is None else f"`{self.site}` of layer {self.layer}"


Inputs = Int[Array, "batch pos"] | Float[Array, "batch channel height width"]
"""What a model is called with."""


@dataclass(frozen=True)
class Batch:
    """Prompts, or images, as the model takes them.

    Attributes:
        ids: Tokens, or pixels.
        mask: True at real ones; None where all are.
        positions: Where they are not those that the model counts itself.
        real: Which tokens give a row, in the order of rows.
    """

    ids: Inputs
    mask: Bool[Array, "batch pos"] | None
    positions: Int[Array, "batch pos"] | None
    real: Bool[np.ndarray, "token"]

    @property
    def n_pos(self) -> int:
        """Positions of each example."""
        return self.real.size // max(1, len(self.ids))


def batch_of(model: Model, prompts: Any, *, skip_first: bool) -> Batch:
    """Prompts as arrays, and which of their tokens give a row.

    Args:
        model: What is run.
        prompts: `Prompts`, ids, a batch of packed documents, or normalised images.
        skip_first: Whether the first real token of each text (of an image, the class token) is left out.

    Raises:
        TokenError, ShapeError: Prompts that the model cannot take.
        ArgumentError: Pixels that are integers, or packed documents for a model without positions.
    """
    if isinstance(model, ViT):
        pixels = as_pixels(prompts, model.config, model.W_patch.dtype, any_size=False)
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        height, width = (
            n // patch for n, patch in zip(pixels.shape[-2:], model.config.patch_size, strict=True)
        )
        real = np.arange(model.config.n_special + height * width) >= int(skip_first)
        return Batch(pixels, None, None, np.tile(real, len(pixels)))
    positions = None
    if isinstance(prompts, Packed):
        if isinstance(model, Mamba):
            raise ArgumentError(
                "Packed documents go by the positions of their tokens, and a Mamba has none: its states would run on "
                "from one document into the next. Give it padded prompts (`Prompts`)."
            )
        prompts, positions = prompts.prompts, prompts.positions
    ids, mask = as_tokens(prompts, None, model.config)
    ids = ids.reshape(-1, ids.shape[-1])
    mask = None if mask is None else mask.reshape(ids.shape)
    real = np.ones(ids.shape, bool) if mask is None else whole(mask)
    if skip_first:
        real = real & (np.cumsum(real, -1) > 1)
    return Batch(ids, mask, positions, real.reshape(-1))


def filled(batch: Batch, examples: int) -> Batch:
    """A batch with repeats of its last example in the place of missing ones, which give no rows.

    So the last batch of a text, where it is smaller, needs no program of its own.
    """
    missing = examples - len(batch.ids)
    if missing <= 0:
        return batch
    longer = lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)])
    mask, positions = (None if x is None else longer(x) for x in (batch.mask, batch.positions))
    real = np.concatenate([batch.real, np.zeros(missing * batch.n_pos, bool)])
    return Batch(longer(batch.ids), mask, positions, real)


@eqx.filter_jit
def captured(
    model: Model,
    batch: tuple[Inputs, Array | None, Array | None],
    columns: tuple[Column, ...],
    dtype: str | None = None,
) -> tuple[Float[Array, "token _"], ...]:
    """Rows of each column, one for each token, from one run.

    Args:
        model: What is run.
        batch: Tokens (or pixels), mask and positions.
        columns: Sites at layers.
        dtype: What rows are cast to; None leaves them.
    """
    ids, mask, positions = batch
    layers: dict[str, list[int]] = {column.site: [] for column in columns}
    for column in columns:
        layers[column.site] += () if column.layer is None else (column.layer,)
    reads = tuple(read for site, some in layers.items() for read in reads_of(site, some or None))
    more = {} if isinstance(model, ViT) else {"mask": mask}
    more |= {} if isinstance(model, ViT | Mamba) else {"positions": positions}  # which these do not have
    _, acts = Transformed(hold(_needed(model, columns)), (), reads)(ids, **more)
    rows = []
    for site, layer in ((column.site, column.layer) for column in columns):
        one = acts[site] if layer is None else acts[site][layers[site].index(layer)]
        rows.append(one.reshape(math.prod(one.shape[:2]), -1).astype(dtype or one.dtype))
    return tuple(rows)


def _reader(model: Model) -> Model:
    """What reads prompts: of an encoder-decoder, its encoder."""
    return model.encoder_alone() if isinstance(model, T5) else model


def _needed(model: Model, columns: tuple[Column, ...]) -> Model:
    """The model up to the last layer that is asked for; all of it for a site outside the layers."""
    layers = [column.layer for column in columns if column.layer is not None]
    if not isinstance(model, Decoder) or len(layers) < len(columns):
        return _reader(model)
    return first_layers(model, max(layers) + 1)


def columns_of(
    model: Model, sites: str | Sequence[str], layers: int | Sequence[int] | None
) -> tuple[Column, ...]:
    """The columns that `captured` gives, in its order. Nothing is computed.

    Raises:
        SiteError: A site or layer that is not there, one that is asked for twice, or a site that has no vector at each
            position.
    """
    model = _reader(model)
    _, acts = eqx.filter_eval_shape(capture(model, sites, layers=layers), *model.config.inputs(1, 1))
    columns = []
    for site in acts.sites:
        array = acts.arrays[site.name]
        if site.axes[:1] != ("pos",):
            raise SiteError(
                f"`{site.name}` has the axes ({', '.join(site.axes)}): a row is what a site has at one position, so "
                "its axes begin with pos, as those of resid_post, mlp_out or z do."
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise SiteError(f"`{site.name}` holds {array.dtype}: rows are floating-point numbers.")
        shape = array.shape[int(site.layers is not None) :]
        columns += [Column(site.name, layer, math.prod(shape[2:])) for layer in site.layers or (None,)]
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise SiteError(f"{twice} is asked for twice. Name each site and layer once.")
    return tuple(columns)
