"""What a capture returns: activations by site name, with their axes and the layers they stand for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool

from mechjax.base.catalogue import spelled_out
from mechjax.base.errors import SiteError, did_you_mean
from mechjax.base.records import Record
from mechjax.transform.table import known_as


@dataclass(frozen=True)
class Captured:
    """The trailing axes of a captured site, the layers of its rows (None outside the layers), and its other names."""

    name: str
    axes: tuple[str, ...]
    layers: tuple[int, ...] | None
    also: tuple[str, ...] = ()


class Activations(Record, Mapping[str, Array]):
    """Captured activations. `acts["resid_post"]` has shape `[layer, *batch, pos, d_model]`.

    Names are ours, TransformerLens' (`acts["blocks.3.hook_resid_post"]` is one layer's row) or the checkpoint's
    modules'. Axes are right-aligned: extra leading axes are batch or mapped ones. Rows of layers that did not run are
    NaN (zero for integers).

    Attributes:
        arrays: Name -> array.
        ran: Name -> whether each row ran, `[layer]`, or a scalar for a site outside the layers.
        sites: What is known of each site (static).
    """

    arrays: dict[str, Array]
    ran: dict[str, Bool[Array, "..."]]
    sites: tuple[Captured, ...] = eqx.field(static=True)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Name -> names of the trailing dimensions."""
        return {site.name: site.axes for site in self.sites}

    @property
    def layers(self) -> dict[str, tuple[int, ...] | None]:
        """Name -> the layers of the rows, or None for a site outside the layers."""
        return {site.name: site.layers for site in self.sites}

    def axis_names(self, field: str, key: str | None = None) -> tuple[str, ...] | None:
        """Layer, batch, then the site's own axes."""
        site = next((site for site in self.sites if site.name == key), None)
        if site is None:
            return None
        lead, own = ("layer",) * (site.layers is not None), site.axes if field == "arrays" else ()
        return (*lead, *("batch",) * (getattr(self, field)[key].ndim - len(lead) - len(own)), *own)

    def __getitem__(self, name: str) -> Array:
        """The activation of a site; of one layer where the name says which."""
        known, layer = self._known(name)
        if known not in self.arrays:
            raise SiteError(f"`{name}` was not captured; this record holds {', '.join(self.arrays)}."
                            f"{did_you_mean(known, self.arrays)}")  # fmt: skip
        if layer is None:
            return self.arrays[known]
        rows = self.layers[known]
        if rows is None or layer not in rows:
            raise SiteError(f"`{name}` asks for layer {layer} of `{known}`; captured are layers {rows}.")
        return self.arrays[known][rows.index(layer)]

    def __contains__(self, name: object) -> bool:
        known, layer = self._known(name) if isinstance(name, str) else ("", None)
        return known in self.arrays and (layer is None or layer in (self.layers[known] or ()))

    def _known(self, name: str) -> tuple[str, int | None]:
        known, layer = spelled_out(name)
        return known_as(known, {site.name: site for site in self.sites}), layer

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def layered(self, name: str) -> tuple[Array, bool, tuple[int, ...] | None]:
        """The array of a site, whether its first axis is the layer, and of which layers: what edits take."""
        name = self._known(name)[0]
        rows = self.layers.get(name)
        return self[name], rows is not None, rows

    def map(self, fn: Any) -> "Activations":
        """The record with `fn` applied to every array."""
        changed = {name: jnp.asarray(fn(value)) for name, value in self.arrays.items()}
        return Activations(changed, self.ran, self.sites)
