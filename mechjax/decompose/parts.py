"""What a stream is made of, vectors formed or not: what every function of this package finishes in its own way."""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.base.errors import ArgumentError
from mechjax.decompose.factors import (
    Factors,
    biases,
    expert_vectors,
    head_factors,
    neuron_factors,
    neuron_sites,
)
from mechjax.decompose.recorded import Reader, place_of, read
from mechjax.decompose.stack import Projection, Stack
from mechjax.models.decoder import Decoder
from mechjax.transform.captured import Activations

Kind = Literal["layers", "heads", "neurons", "experts", "everything"]
"""How finely to take apart: each layer, head, neuron or expert, or each head and neuron and all else."""


class Parts(eqx.Module):
    """Components of a stream.

    Attributes:
        units: Heads and neurons.
        whole: Vectors that are not taken apart further, by label. Each of shape (*place, d_model).
        total: The recorded stream. Shape (*place, d_model).
        place: Names of its axes but the last.
        reader: Who reads it.
    """

    units: list[Factors]
    whole: dict[str, Array]
    total: Float[Array, "*place d_model"]
    place: tuple[str, ...] = eqx.field(static=True)
    reader: Reader = eqx.field(static=True)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the components, units first."""
        return (*(label for unit in self.units for label in unit.labels), *self.whole)

    def stack(self, model: Decoder) -> Stack:
        """The components as vectors."""
        rows = [unit.vectors(model) for unit in self.units] + [x[None] for x in self.whole.values()]
        return Stack(
            _joined(rows, self.total),
            self.total,
            self.labels,
            self.place,
            self.reader.layer,
            self.reader.mlp_input,
        )

    def onto(self, direction: Float[Array, "*onto d_model"], model: Decoder) -> Projection:
        """Their inner products with a direction; units form no vectors."""
        direction = direction.astype(jnp.float32)
        dot = lambda x: (x.astype(jnp.float32) * direction).sum(-1)
        total = dot(self.total)
        rows = [unit.onto(direction, model) for unit in self.units] + [
            dot(x)[None] for x in self.whole.values()
        ]
        return Projection(_joined(rows, total), None, total, self.labels, self.place)


def parts_of(model: Decoder, acts: Activations, reader: Reader, kind: Kind, asked: str) -> Parts:
    """The components of what `reader` reads.

    Raises:
        ArgumentError: Another `kind`, or experts where there are none.
    """
    if kind == "layers":
        return layer_parts(model, acts, reader, asked)
    if kind == "experts":
        stream, row = reader.stream
        total = read(acts, {stream: (row,)}, asked)[stream][0]
        return Parts(
            [], expert_vectors(model, acts, reader.n_mlp, asked), total, place_of(acts, stream, 1), reader
        )
    if kind not in ("heads", "neurons", "everything"):
        raise ArgumentError(
            f"{kind!r}: a stream is taken apart into 'layers', 'heads', 'neurons', 'experts' or 'everything'."
        )
    return unit_parts(
        model,
        acts,
        reader,
        asked,
        heads=kind != "neurons",
        neurons=kind != "heads",
        rest=kind == "everything",
    )


def layer_parts(
    model: Decoder,
    acts: Activations,
    reader: Reader,
    asked: str,
    *,
    attn: bool = True,
    mlp: bool = True,
    embeds: bool = True,
) -> Parts:
    """What embeddings, attention and MLPs wrote, in the order in which they did."""
    names = _embeds(model) if embeds else ()
    n_attn, n_mlp = reader.n_attn * attn, reader.n_mlp * mlp
    wanted = {**dict.fromkeys(names), "attn_out": range(n_attn), "mlp_out": range(n_mlp)}
    stream, row = reader.stream
    found = read(acts, wanted | {stream: (row,)}, asked)
    whole = {name: found[name] for name in names}
    for i in range(max(n_attn, n_mlp)):
        whole |= {f"attn {i}": found["attn_out"][i]} if i < n_attn else {}
        whole |= {f"mlp {i}": found["mlp_out"][i]} if i < n_mlp else {}
    return Parts([], whole, found[stream][0], place_of(acts, stream, 1), reader)


def unit_parts(
    model: Decoder,
    acts: Activations,
    reader: Reader,
    asked: str,
    *,
    heads: bool,
    neurons: bool,
    rest: bool,
) -> Parts:
    """What heads and neurons wrote, and where the `rest` is asked for, whatever else did, with all biases in one."""
    n_attn, n_mlp, (stream, row) = reader.n_attn, reader.n_mlp, reader.stream
    embeds, mlps = _embeds(model) if rest else (), range(n_mlp * (rest and not neurons))
    wanted = {"z": range(n_attn * heads)} | neuron_sites(model, n_mlp * neurons) | {"mlp_out": mlps}
    if rest:  # a norm after attention or MLP is needed for their units and their biases
        wanted |= dict.fromkeys(embeds)
    found = read(acts, wanted | {stream: (row,)}, asked)
    units = [head_factors(model, acts, n_attn, asked)] if heads and n_attn else []
    units += neuron_factors(model, acts, n_mlp, asked) if neurons else []
    whole = {f"mlp {i}": found["mlp_out"][i] for i in mlps} | {name: found[name] for name in embeds}
    total = found[stream][0]
    if rest:
        bias = biases(model, acts, "attn", n_attn, asked)
        bias = bias + biases(model, acts, "mlp", n_mlp * neurons, asked)
        whole["bias"] = jnp.broadcast_to(bias, total.shape).astype(total.dtype)
    return Parts(units, whole, total, place_of(acts, stream, 1), reader)


def _embeds(model: Decoder) -> tuple[str, ...]:
    return ("embed", *("pos_embed",) * (model.W_pos is not None))


def _joined(rows: list[Array], like: Array) -> Array:
    """Rows under each other; none of them is an array of no rows."""
    return (
        jnp.concatenate([x.astype(jnp.result_type(*rows)) for x in rows])
        if rows
        else jnp.zeros((0, *like.shape))
    )
