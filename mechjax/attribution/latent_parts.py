"""What a reading of a stream is the sum of: latents of earlier transcoders, heads by source, and all that is neither.

    gain * (sum_l,i f_i W_dec[i] + skips + errors + b_dec + sum_h,s pattern[t, s] v_s W_O + b_O + embeddings) . d + bias

The sum is exact: with norms at their scales and heads with their patterns a reading is linear, and the stream is the
sum of what was written. Errors are what is left of `mlp_out` by what transcoders make of it, all of it where an MLP has
none.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mechjax.attribution.frozen_reads import Reading, Reads, Run
from mechjax.attribution.transcoders import entry
from mechjax.base.display import LEADING, as_html
from mechjax.base.records import Record
from mechjax.models.contraction import contract

PARTS = ("latents", "heads", "skips", "errors", "embed", "pos_embed", "decoder_biases", "head_biases", "bias")
"""The fields that add up."""

SHARED = {
    **dict.fromkeys((*PARTS, "total", "activations", "gain", "at"), 0),
    "connections": None,
}
"""Along which axis `vmap` stacks what `parts_of` gives: weights alone are the same everywhere."""


@dataclass(frozen=True)
class Node:
    """One part of what reads a stream at a position.

    Attributes:
        part: Which field it is of.
        index: Its place there: (transcoder, feature) of a latent, (layer, head, source) of a head.
        at: The position that is read.
    """

    part: str
    index: tuple[int, ...]
    at: int

    def label(self, layers: tuple[int, ...], *, placed: bool = True) -> str:
        """Its name, such as `t2[137] @ 7`; `layers` are those of the transcoders."""
        first = self.index[0] if self.index else 0
        where = f" @ {self.index[2] if self.part == 'heads' else self.at}" if placed else ""
        match self.part:
            case "latents":
                name = f"t{layers[first]}[{self.index[1]}]"
            case "heads":
                name = f"L{first}.H{self.index[1]}"
            case "skips":
                name = f"skip {layers[first]}"
            case "errors":
                name = f"error {first}" if first in layers else f"mlp {first}"
            case "decoder_biases":
                name = f"b_dec {first}"
            case "head_biases":
                name = f"b_O {first}"
            case _:
                name = self.part
        return name + where


def path_label(nodes: Sequence[Node], layers: tuple[int, ...]) -> str:
    """A path, given from its end on: `t2[137] @ 5 -> L3.H1 -> t4[9] @ 7`. Heads read where what they read is."""
    told = [
        node.label(layers, placed=node.part != "heads" or i + 1 == len(nodes) or nodes[i + 1].part == "heads")
        for i, node in enumerate(nodes)
    ]
    return " -> ".join(reversed(told))


def example_label(example: int, n: int) -> str:
    """Which example, where there are several."""
    return f"example {example}: " if n > 1 else ""


class LatentParts(Record):
    """The parts of something that reads a stream.

    Attributes:
        latents: What latents of earlier transcoders add: `activations * connections * gain`.
        heads: What heads add that move values from each position; 0 of those that write later.
        skips: What `W_skip` of earlier transcoders add.
        errors: What earlier MLPs write beside what transcoders make of it.
        embed: What the token adds.
        pos_embed: What the position adds.
        decoder_biases: What `b_dec` of earlier transcoders add, at their layers.
        head_biases: What biases after attention add.
        bias: What is added whatever the stream holds.
        total: What all of these make, measured.
        activations: Of the latents, at the position that is read: the part that hangs on the input.
        connections: What a unit of each latent adds at a gain of 1: the part of weights alone.
        gain: One over the scales of the norms on the way, times the patterns of the heads on it.
        at: The position that is read, a column of the prompt.
        place: Names of the leading axes (static).
        layers: Of the transcoders (static).
    """

    latents: Float[Array, "*place transcoder feature"]
    heads: Float[Array, "*place layer head key"]
    skips: Float[Array, "*place transcoder"]
    errors: Float[Array, "*place layer"]
    embed: Float[Array, "*place"]
    pos_embed: Float[Array, "*place"]
    decoder_biases: Float[Array, "*place layer"]
    head_biases: Float[Array, "*place layer"]
    bias: Float[Array, "*place"]
    total: Float[Array, "*place"]
    activations: Float[Array, "*place transcoder feature"]
    connections: Float[Array, "transcoder feature"]
    gain: Float[Array, "*place"]
    at: Int[Array, "*place"]
    place: tuple[str, ...] = eqx.field(static=True)
    layers: tuple[int, ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """The transcoders' names."""
        return {"transcoder": tuple(f"t{layer}" for layer in self.layers)}

    @property
    def sum(self) -> Float[Array, "*place"]:
        """Of all parts."""
        lead = len(self.place)
        parts = (getattr(self, name) for name in PARTS)
        return jnp.stack([x.reshape(*x.shape[:lead], -1).sum(-1) for x in parts]).sum(0)

    @property
    def gap(self) -> Float[Array, "*place"]:
        """What the parts leave of `total`: rounding."""
        return self.total - self.sum

    @abstractmethod
    def chain(self, where: tuple[int, ...]) -> tuple[Node, ...]:
        """What reads the parts, from the last reader on."""

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The `n` parts that are largest in size, as (label, value), such as `t2[137] @ 7 -> t4[9] @ 7`."""
        lead = len(self.place)
        arrays = [np.asarray(getattr(self, name), np.float64) for name in PARTS]
        sizes = np.nan_to_num(np.abs(np.concatenate([x.ravel() for x in arrays])))
        ends = np.cumsum([x.size for x in arrays])
        found: list[tuple[str, float]] = []
        for i in np.argsort(-sizes, kind="stable")[:n]:
            part = int(np.searchsorted(ends, i, "right"))
            x = arrays[part]
            place = tuple(map(int, np.unravel_index(i - ends[part] + x.size, x.shape)))
            node = Node(PARTS[part], place[lead:], int(np.asarray(self.at)[place[:lead]]))
            text = path_label((*self.chain(place[:lead]), node), self.layers)
            found.append((example_label(place[0], self.total.shape[0]) + text, float(x[place])))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per part that is not 0: its label and its value."""
        n = sum(int(np.count_nonzero(np.asarray(getattr(self, name)))) for name in PARTS)
        return [{"part": name, "value": value} for name, value in self.top(n)]

    def _repr_html_(self) -> str:
        return as_html(self, self.axis_labels(), self.top(LEADING))


def parts_of(reads: Reads, run: Run, reading: Reading) -> dict[str, Array]:
    """The parts of a reading, without leading axes; `total` aside."""
    transcoders, config, d = reads.transcoders, reads.model.config, reading.direction
    at, gain, number = reading.at, reading.gain, jnp.arange(transcoders.n_layers, dtype=jnp.int32)
    before = number < reading.n_mlp
    own = jnp.array(transcoders.layers, jnp.int32)
    f = reads.active(run, at)
    onto = transcoders.onto(d, reading.n_mlp, config)
    made = transcoders.to_each((f[transcoders.pairs[0]] * onto).sum(-1))
    biases = jnp.where(before, transcoders.at_layers(transcoders.biases(d, config)), 0)
    skips = jnp.where(before[own], transcoders.skips(d, run.read[own, at], config), 0)
    out = jnp.where(before, contract("lm,m->l", run.mlp_out[:, at], d, config), 0)
    connections = transcoders.of_each(onto)
    heads, head_biases = _attention(reads, run, reading)
    found = {
        "latents": f * connections, "heads": heads, "skips": skips,
        "errors": out - made - biases - transcoders.at_layers(skips),
        "embed": contract("m,m->", entry(run.embed, at), d, config),
        "pos_embed": jnp.zeros((), d.dtype),
        "decoder_biases": biases, "head_biases": head_biases,
    }  # fmt: skip
    if run.pos_embed is not None:
        found["pos_embed"] = contract("m,m->", entry(run.pos_embed, at), d, config)
    found = {name: gain * value for name, value in found.items()}
    return found | {
        "bias": reading.bias, "activations": f, "connections": connections, "gain": gain, "at": at,
    }  # fmt: skip


def _attention(
    reads: Reads, run: Run, reading: Reading
) -> tuple[Float[Array, "layer head key"], Float[Array, " layer"]]:
    """What heads add from each position, at a gain of 1, and what biases after them do."""
    attn, config, dtype = reads.model.blocks.attn, reads.model.config, reads.dtype
    number = jnp.arange(config.n_layers, dtype=jnp.int32)
    before = number < reading.n_attn
    readers = jax.vmap(lambda layer: reads.written(reading.direction, layer))(number)
    if run.post_scale is not None:
        readers = readers / run.post_scale[:, reading.at]
    out = contract("lhdm,lm->lhd", attn.W_O.astype(dtype), readers, config)
    grouped = out.reshape(config.n_layers, config.n_kv_heads, -1, out.shape[-1])
    moved = contract("lsnd,lngd->lngs", run.values, grouped, config)
    moved = moved.reshape(config.n_layers, config.n_heads, -1) * run.pattern[:, :, reading.at]
    biases = jnp.zeros(config.n_layers, dtype)
    if attn.b_O is not None:
        biases = biases + contract("lm,lm->l", attn.b_O.astype(dtype), readers, config)
    if (post := reads.model.blocks.ln1_post) is not None and post.b is not None:
        own = config.residual_scale * contract("lm,m->l", post.b.astype(dtype), reading.direction, config)
        biases = biases + own
    return jnp.where(before[:, None, None], moved, 0), jnp.where(before, biases, 0)
