"""A dictionary inside a model: its latents as sites that are captured, edited and differentiated like any other.

    x -> x + (decode(f') - decode(f)) + (e' - e)        f = encode(x), e = x - decode(f)

where f' and e' are what edits leave of f and e, at the sites `<site>.latents` and `<site>.error`. Where nothing edits
them nothing changes, to the bit: what the dictionary misses goes on as it was, and gradients pass as in the model.
Without its error a site holds `decode(f')` alone: what the dictionary makes of it.

Reference: Marks et al. (2024), "Sparse feature circuits", arXiv:2403.19647, sections 2 and 3 (their gradients pass the
dictionary by, as these do). Cost: an encoding and two decodings at each layer that has one.
Misleads when: effects of latents are read with the error left out, whose share may be large: see `error=`.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.dictionaries.dictionary import Dictionary
from mechjax.models.needs import needs_decoder
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
        layers: The layer of each (static).
        error: Whether what they miss is kept (static).
        n_layers: Layers of the model (static).
    """

    stack: Dictionary
    layers: tuple[int, ...] = eqx.field(static=True)
    error: bool = eqx.field(static=True)
    n_layers: int = eqx.field(static=True)

    def __call__(self, x: Array, info: Any) -> Array:
        row = jnp.searchsorted(jnp.array(self.layers, jnp.int32), jnp.asarray(info.layer, jnp.int32))
        own = jax.tree.map(lambda leaf: leaf[row] if eqx.is_array(leaf) else leaf, self.stack)
        at: dict[str, Any] = {"layer": info.layer, "layers": self.n_layers, "having": self.layers}
        axes = info.axes[:-1]
        f = own.encode(x)
        edited = named(f, f"{info.name}.latents", axes=(*axes, "feature"), **at)
        made = own.completed(own.decode(edited), x)
        if not self.error:
            return made
        plain = own.completed(own.decode(f), x)
        missed = x - plain
        return x + (made - plain) + (named(missed, f"{info.name}.error", axes=info.axes, **at) - missed)


@needs_decoder("dictionaries", or_config=True)
def splice(
    model: Any, dictionaries: Mapping[int, Dictionary], *, site: str = "resid_post", error: bool = True
) -> Spliced:
    """The model with dictionaries at a site, one at each of some layers.

    Args:
        model: A decoder, or any callable with a `config` that says its `n_layers` and `d_model`.
        dictionaries: Layer -> its dictionary; all of one kind and size.
        site: What they read and put back.
        error: Whether what they miss is kept; else what they make stands alone.

    Returns:
        A callable with the sites `<site>.latents` and, where the error is kept, `<site>.error`.

    Raises:
        ArgumentError: No dictionary, one of a layer that there is not, or such that differ in kind or size.
        ShapeError: One that reads or writes another width than the model's.
    """
    n_layers, d_model = model.config.n_layers, model.config.d_model
    layers = tuple(sorted(dictionaries))
    if not layers or any(layer not in range(n_layers) for layer in layers):
        raise ArgumentError(
            f"dictionaries of layers {list(layers)}: give at least one, at layers 0 to {n_layers - 1}, as "
            "{layer: dictionary}."
        )
    some = [dictionaries[layer] for layer in layers]
    if len({(jax.tree.structure(d), tuple(x.shape for x in jax.tree.leaves(d))) for d in some}) > 1:
        raise ArgumentError(
            "these dictionaries differ in kind or size: those of one splice are stacked over layers. Splice others in "
            "another call, around this one's result."
        )
    widths = some[0].d_model, some[0].b_dec.shape[-1]
    if widths != (d_model, d_model):
        raise ShapeError(
            f"these dictionaries read {widths[0]} numbers and write {widths[1]}, and the model's stream has {d_model}: "
            "a dictionary is put where it was trained, and puts back what it read."
        )
    stack = jax.tree.map(lambda *x: jnp.stack(x), *some)
    return Spliced(model, apply(site, _Spliced(stack, layers, error, n_layers), layer=list(layers)))
