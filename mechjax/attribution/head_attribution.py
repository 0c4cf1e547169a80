"""Attention attribution. Which latents at which positions does a latent read through a head?

    part[s, l, i] = gain(s) f_i^l(s) (W_dec^l[i] . C(w_m * W_V W_O d))   gain(s) = pattern[t, s] / scale_m(s) / scale(t)

of a head of layer m > l, for a latent that reads its stream along d = C(w * W_enc[:, j]) at position t. Beside latents
the head moves all that was written to the stream at s: what earlier heads brought there, embeddings, skips, errors and
biases. They sum to what `feature_attribution` says that the head adds from s.

Reference: Dunefsky, Chlenski and Nanda (2024), "Transcoders find interpretable LLM feature circuits", arXiv:2406.11944,
"attribution through attention heads": the OV circuit, the pattern held as it is.
Differs: the norm before attention is linear at its measured scale and centres; the head's biases are a part.
Cost: one forward, and for each source position an encoding of all layers. Memory: an activation of each latent for
each source: name the sources of long prompts.
Exact: the sum, with patterns and scales held.    Misleads when: what matters is why the head looks there: queries and
keys are no part of it.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mechjax.attribution.asked_latent import Head, check_head, columns
from mechjax.attribution.frozen_reads import Reading, Reads, Run
from mechjax.attribution.latent_parts import SHARED, LatentParts, Node, parts_of
from mechjax.attribution.transcoders import Given, entry, stack_transcoders
from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.meshes import on_any_mesh
from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder, as_tokens
from mechjax.models.needs import needs_decoder
from mechjax.models.quantized import full
from mechjax.tasks.pairing import batched
from mechjax.transform.select import is_concrete


class HeadAttribution(LatentParts):
    """The parts of what a head adds to a latent's pre-activation from each source, which is `total`.

    Attributes:
        layer: The layer of the latent.
        feature: Its number.
        head: Layer and number of the head.
        target: The position of the latent, a column of the prompt; `at` are the sources.
    """

    layer: Int[Array, ""]
    feature: Int[Array, ""]
    head: Int[Array, " two"]
    target: Int[Array, " batch"]

    def chain(self, where: tuple[int, ...]) -> tuple[Node, ...]:
        """The latent, and the head."""
        latent, to = (self.layers.index(int(self.layer)), int(self.feature)), int(self.target[where[0]])
        layer, head = self.head.tolist()
        return Node("latents", latent, to), Node("heads", (layer, head, int(self.at[where])), to)


@needs_decoder("transcoders")
@on_any_mesh
def head_attribution(
    model: Decoder,
    transcoders: Given,
    prompts: Any,
    *,
    layer: Any,
    feature: Any,
    head: Head,
    pos: Any = -1,
    sources: Any = None,
) -> HeadAttribution:
    """Take what a head adds to a latent's pre-activation apart, source by source, into what it moves from there.

    Args:
        model: The decoder.
        transcoders: Layer -> its transcoder, or a cross-layer one, or what `stack_transcoders` made of them.
        prompts: `Prompts` or ids (batch, pos).
        layer: The layer of the latent.
        feature: Its number.
        head: Layer and number of the head.
        pos: The position of the latent, as in `feature_attribution`.
        sources: Columns from which the head moves something, the same for all prompts; None for all.

    Returns:
        The parts, with axes (batch, source) before their own.

    Raises:
        ArgumentError: A latent, head or position that there is not, or transcoders that cannot be taken apart.
        ShapeError: More than one latent, positions for other prompts, or transcoders of another model.
        UnsupportedModelError: A model without MLPs, or one whose heads' values are not linear in what these are given.
    """
    reads = Reads(model, stack_transcoders(model, transcoders))
    latent, through = reads.transcoders.latent(layer, feature), check_head(model, head, layer)
    ids, mask = as_tokens(batched(prompts), None, model.config)
    at, among = columns(pos, ids, mask), _sources(sources, ids.shape[1])
    return HeadAttribution(
        **_attributed(reads, ids, mask, latent, through, at, among), place=("batch", "source"),
        layers=reads.transcoders.layers, layer=latent[0], feature=latent[1], head=jnp.stack(through), target=at,
    )  # fmt: skip


def _sources(sources: Any, n_pos: int) -> Int[Array, " source"]:
    among = jnp.arange(n_pos, dtype=jnp.int32) if sources is None else jnp.asarray(sources)
    if among.ndim != 1 or not jnp.issubdtype(among.dtype, jnp.integer):
        raise ShapeError(
            f"sources= has shape {among.shape} and type {among.dtype}: give a list of columns, such as [0, 5]."
        )
    if is_concrete(among) and bool(((among < 0) | (among >= n_pos)).any()):
        raise ArgumentError(
            f"sources= names columns that are not there: prompts have {n_pos}, 0 to {n_pos - 1}."
        )
    return among.astype(jnp.int32)


@eqx.filter_jit
def _attributed(
    reads: Reads, ids: Array, mask: Array | None, latent: tuple[Array, Array], head: tuple[Array, Array], at: Array,
    sources: Array,
) -> dict[str, Array]:  # fmt: skip
    def of(run: Run, at: Array) -> dict[str, Array]:
        target = reads.latent(run, *latent, at)

        def moved(source: Array) -> dict[str, Array]:
            found = parts_of(reads, run, reads.head(run, target, *head, source))
            return found | {"total": _measured(reads, run, target, head, source)}

        return jax.vmap(moved, out_axes=SHARED)(sources)

    return jax.vmap(of, out_axes=SHARED)(reads.record(ids, mask), at)


def _measured(reads: Reads, run: Run, target: Reading, head: tuple[Array, Array], source: Array) -> Array:
    """What the head adds, from the values that it moved."""
    layer, number = head
    shared = number // (reads.model.config.n_heads // reads.model.config.n_kv_heads)
    reader = reads.written(target.direction, layer)
    if run.post_scale is not None:
        reader = reader / entry(run.post_scale, layer, target.at, 0)
    W_O = entry(full(reads.model.blocks.attn.W_O), layer, number).astype(reads.dtype)
    out = contract("dm,m->d", W_O, reader, reads.model.config)
    value = contract("d,d->", entry(run.values, layer, source, shared), out, reads.model.config)
    looks = jnp.where(layer < target.n_attn, entry(run.pattern, layer, number, target.at, source), 0)
    return target.gain * looks * value
