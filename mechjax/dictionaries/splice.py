"""A dictionary inside a model: its latents as sites that are captured, edited and differentiated like any other.

    x -> x + (decode(f') - decode(f)) + (e' - e)        f = encode(x), e = x - decode(f)

where f' and e' are what edits leave of f and e, at the sites `<site>.latents` and `<site>.error`. Where nothing edits
them nothing changes, to the bit: what the dictionary misses goes on as it was, and gradients pass as in the model.
Without its error a site holds `decode(f')` alone: what the dictionary makes of it.

Reference: Marks et al. (2024), "Sparse feature circuits", arXiv:2403.19647, sections 2 and 3 (their gradients pass the
dictionary by, as these do). Cost: an encoding and two decodings at each layer that has one.
Misleads when: effects of latents are read with the error left out, whose share may be large: see `error=`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.dictionaries.dictionary import Dictionary
from mechjax.transform.edits import Edit, apply
from mechjax.transform.site import site as named
from mechjax.transform.transforms import intervene


class Spliced(eqx.Module):
    """A model with dictionaries in it; called as the model is.

    Attributes:
        model: The model.
        edit: What puts them in.
    """

    model: Any
    edit: Edit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        return intervene(self.model, [self.edit])(*args, **kwargs)


class _Spliced(eqx.Module):
    """What is done at the site.

    Attributes:
        stack: The dictionaries, one after another.
        layers: The layer of each; None where the site is outside the layers (static).
        error: Whether what they miss is kept (static).
    """

    stack: Dictionary
    layers: tuple[int, ...] | None = eqx.field(static=True)
    error: bool = eqx.field(static=True)

    def __call__(self, x: Array, info: Any) -> Array:
        row, at = 0, {}
        if self.layers is not None:
            row = jnp.searchsorted(jnp.array(self.layers, jnp.int32), jnp.asarray(info.layer, jnp.int32))
            at = {"layer": info.layer, "layers": info.layers, "having": self.layers}
        own = jax.tree.map(lambda leaf: leaf[row] if eqx.is_array(leaf) else leaf, self.stack)
        axes = info.axes[:-1]
        f = own.encode(x)
        edited = named(f, f"{info.name}.latents", axes=(*axes, "feature"), **at)
        made = own.completed(own.decode(edited), x)
        if not self.error:
            return made
        plain = own.completed(own.decode(f), x)
        missed = x - plain
        return x + (made - plain) + (named(missed, f"{info.name}.error", axes=info.axes, **at) - missed)


def layers_of(dictionaries: Mapping[Any, Dictionary]) -> list[int] | None:
    """The layers that dictionaries stand in; None for one that stands outside the layers."""
    return None if tuple(dictionaries) == (None,) else sorted(dictionaries)


def splice(
    model: Callable[..., Any],
    dictionaries: Mapping[int, Dictionary] | Mapping[None, Dictionary],
    *,
    site: str = "resid_post",
    error: bool = True,
) -> Spliced:
    """The model with dictionaries at a site, one at each of some layers.

    Args:
        model: The model, a subject (`mechjax.interop`), or any function with sites.
        dictionaries: Layer -> its dictionary; all of one kind and size. `{None: dictionary}` for a site outside the
            layers.
        site: What they read and put back, along its last axis.
        error: Whether what they miss is kept; else what they make stands alone.

    Returns:
        A callable with the sites `<site>.latents` and, where the error is kept, `<site>.error`.

    Raises:
        ArgumentError: No dictionary, one of a layer that there is not, or such that differ in kind or size.
        ShapeError: One that reads or writes another width than the model's.
        SiteError: When called, for a site or layer that a function does not have.
    """
    config = getattr(model, "config", None)
    layers, last = layers_of(dictionaries), getattr(config, "n_layers", None)
    if layers is not None and (
        not layers or (last is not None and any(i not in range(last) for i in layers))
    ):
        where = "" if last is None else f", at layers 0 to {last - 1}"
        raise ArgumentError(
            f"dictionaries of layers {layers}: give at least one{where}, as {{layer: dictionary}}."
        )
    some = [dictionary for _, dictionary in sorted(dictionaries.items(), key=lambda item: item[0] or 0)]
    if len({(jax.tree.structure(d), tuple(x.shape for x in jax.tree.leaves(d))) for d in some}) > 1:
        raise ArgumentError(
            "these dictionaries differ in kind or size: those of one splice are stacked over layers. Splice others in "
            "another call, around this one's result."
        )
    widths = some[0].d_model, some[0].b_dec.shape[-1]
    d_model = getattr(config, "d_model", widths[0])
    if widths != (d_model, d_model):
        raise ShapeError(
            f"these dictionaries read {widths[0]} numbers and write {widths[1]}, and the model's stream has {d_model}: "
            "a dictionary is put where it was trained, and puts back what it read."
        )
    stack = jax.tree.map(lambda *x: jnp.stack(x), *some)
    held = _Spliced(stack, None if layers is None else tuple(layers), error)
    return Spliced(model, apply(site, held, layer=layers))
