"""Activations as rows: one for each token, of several sites and layers from one run of the model.

Of an image, one for each position. A decoder is run up to the last layer that is asked for, and what nobody reads there
is left out by the compiler. Of an encoder-decoder that is given one text the encoder alone is run. Any other function
is run whole.

Axes of examples and positions become rows, in their order: those without a name and those in `PLACES`. All others are
laid side by side. Where no axis has a name, as in a subject without `sites=`, the last one is the row's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from mechjax.base.errors import ArgumentError, SiteError
from mechjax.base.inputs import Inputs, inputs_of
from mechjax.interop.unmapped import Unmapped
from mechjax.models.decoder import Decoder
from mechjax.models.first_layers import first_layers
from mechjax.models.t5 import T5
from mechjax.store.calls import Reader, Reading
from mechjax.transform import capture
from mechjax.transform.captured import Captured
from mechjax.transform.static import hold
from mechjax.transform.transforms import Transformed, reads_of

PLACES = ("pos", "patch", "height", "width")
"""Names of axes along which an activation has a vector at each place."""
NUMPY = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The dtypes that rows are stored in."""


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


@eqx.filter_jit
def captured(
    model: Reader, given: Inputs, columns: tuple[Column, ...], dtype: str | None = None
) -> tuple[tuple[Float[Array, "token _"], ...], tuple[int, ...]]:
    """Rows of each column from one run, and how many there are along each of the axes that they are of.

    Args:
        model: What is run.
        given: The call.
        columns: Sites at layers.
        dtype: What rows are cast to; None leaves them.

    Raises:
        SiteError: Columns of unlike rows.
    """
    layers: dict[str, list[int]] = {column.site: [] for column in columns}
    for column in columns:
        layers[column.site] += () if column.layer is None else (column.layer,)
    reads = tuple(read for site, some in layers.items() for read in reads_of(site, some or None))
    _, acts = Transformed(hold(_needed(model, columns)), (), reads)(*given.args, **given.kwargs)
    found = []
    for site, layer in ((column.site, column.layer) for column in columns):
        one = acts[site] if layer is None else acts[site][layers[site].index(layer)]
        found.append(_laid_out(one.astype(dtype or one.dtype), acts.axes[site]))
    places = found[0].shape[:-1]
    for column, one in zip(columns, found, strict=True):
        if one.shape[:-1] != places:
            raise SiteError(
                f"{columns[0]} has rows {places} and {column} has {one.shape[:-1]}: rows of a store stand beside each "
                "other, one of each site for every token. Store them in two folders."
            )
    return tuple(one.reshape(-1, one.shape[-1]) for one in found), places


def _laid_out(x: Float[Array, "..."], axes: tuple[str, ...]) -> Float[Array, "*place width"]:
    """An activation with its axes of examples and positions in front, and all others side by side."""
    names = ("",) * (x.ndim - len(axes)) + axes if axes else ("",) * (x.ndim - 1) + ("feature",)
    rows = [i for i, name in enumerate(names) if name in ("", *PLACES)]
    rest = [i for i in range(x.ndim) if i not in rows]
    shape = [x.shape[i] for i in rows]
    return jnp.transpose(x, (*rows, *rest)).reshape(*shape, math.prod(x.shape[i] for i in rest))


def _encoder(model: Reader) -> Reader:
    """What reads prompts: of an encoder-decoder, its encoder."""
    return model.encoder_alone() if isinstance(model, T5) else model


def _needed(model: Reader, columns: tuple[Column, ...]) -> Reader:
    """The decoder up to the last layer that is asked for; all of it for a site outside the layers."""
    layers = [column.layer for column in columns if column.layer is not None]
    if not isinstance(model, Decoder) or len(layers) < len(columns):
        return _encoder(model)
    return first_layers(model, max(layers) + 1)


def columns_of(
    model: Reader, sites: str | Sequence[str], layers: int | Sequence[int] | None, first: Any = None
) -> tuple[Column, ...]:
    """The columns that `captured` gives, in its order. Nothing is computed.

    Args:
        model: What is run.
        sites: Names of the sites.
        layers: Of which layers, every site; None for all.
        first: A batch, which shows what the sites of a function are; those of mechjax's own models are known.

    Raises:
        SiteError: A site or layer that is not there, one that is asked for twice, or a site that has no vector at each
            position.
        ArgumentError: No batch, where one is needed.
    """
    model = _encoder(model)
    if isinstance(model, Unmapped):
        if first is None:
            raise ArgumentError(
                "there is no batch of prompts, and what a function's sites are is seen in a call: give at least one."
            )
        given = inputs_of(first)
    else:
        given = Inputs(model.config.inputs(1, 1), {})
    found = capture(model, sites, layers=layers)
    _, acts = eqx.filter_eval_shape(lambda f, given: f(*given.args, **given.kwargs), found, given)
    columns = []
    for site in acts.sites:
        array = acts.arrays[site.name]
        shape = array.shape[int(site.layers is not None) :]
        _check_vectors(site, shape, isinstance(model, Unmapped))
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise SiteError(f"`{site.name}` holds {array.dtype}: rows are floating-point numbers.")
        laid_out = jax.eval_shape(
            partial(_laid_out, axes=site.axes), jax.ShapeDtypeStruct(shape, array.dtype)
        )
        columns += [Column(site.name, layer, laid_out.shape[-1]) for layer in site.layers or (None,)]
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise SiteError(f"{twice} is asked for twice. Name each site and layer once.")
    return tuple(columns)


def column_of(read: Reading, site: str, layer: int | None) -> tuple[Column]:
    """The one column of a site at a layer.

    Raises:
        SiteError: As `columns_of`, and a site of several layers of which none is said.
        ArgumentError: No batch, where one is needed.
    """
    columns = columns_of(read.model, site, layer, read.first)
    first, *others = columns
    if others:
        raise SiteError(
            f"`{site}` has layers {', '.join(str(column.layer) for column in columns)}: rows are of one of them, so "
            "give `layer`."
        )
    return (first,)


def _check_vectors(site: Captured, shape: tuple[int, ...], of_function: bool) -> None:
    """Whether a site has a vector at each place.

    Raises:
        SiteError: It has none.
    """
    if not of_function and site.axes[:1] != ("pos",):
        raise SiteError(
            f"`{site.name}` has the axes ({', '.join(site.axes)}): a row is what a site has at one position, so "
            "its axes begin with pos, as those of resid_post, mlp_out or z do."
        )
    if len(shape) < 2 or (site.axes and len(shape) == len(site.axes) and not set(site.axes) & set(PLACES)):
        raise SiteError(
            f"`{site.name}` has the shape {shape}"
            + (f" and the axes ({', '.join(site.axes)})" if site.axes else "")
            + ": a row is what a site has of one example or at one position, so axes without a name, or named "
            f"{', '.join(PLACES)}, stand beside those of its vector."
        )
