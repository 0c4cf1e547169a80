"""Transcoder connections. How much does one latent add to another, whatever the input?

    connection[l, i] = W_dec^l[i] . C(w * W_enc^l'[:, j])

is what a unit of latent i of layer l adds to the pre-activation of latent j of layer l' along the residual stream, the
norm before layer l' (its weight w, C taking the mean away) at a scale of 1; through a head of layer m

    connection[l, i] = W_dec^l[i] . C(w_m * W_V W_O C(w * W_enc^l'[:, j]))        l < m

In a run it counts its activation times `gain`: one over the scales of the norms on the way, and the head's pattern.
Cross-layer transcoders write to each layer from their own on, and the sum over those before l' counts.

Reference: Dunefsky, Chlenski and Nanda (2024), "Transcoders find interpretable LLM feature circuits", arXiv:2406.11944,
the factor f_dec . f_enc that hangs on no input.
Differs: the norms' weights and centring are in it; the authors fold them into the model's weights before.
Cost: `d_model` products for each latent of all transcoders. Exact: as a derivative with scales and patterns held, in
any decoder.    Misleads when: latents are never active together; `feature_attribution` says what counts on an input.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mechjax.attribution.asked_latent import Head, check_head
from mechjax.attribution.frozen_reads import Reads
from mechjax.attribution.transcoders import Given, stack_transcoders
from mechjax.base.display import LEADING, as_html
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder


class TranscoderConnections(Record):
    """What a unit of each latent adds to one latent's pre-activation, at norms' scales of 1.

    Attributes:
        connections: NaN of latents that do not come before.
        layer: The layer of the latent that reads.
        feature: Its number.
        head: Layer and number of the head between; None for none.
        layers: Of the transcoders (static).
    """

    connections: Float[Array, "transcoder feature"]
    layer: Int[Array, ""]
    feature: Int[Array, ""]
    head: Int[Array, " two"] | None
    layers: tuple[int, ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """The transcoders' names."""
        return {"transcoder": tuple(f"t{layer}" for layer in self.layers)}

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The `n` connections that are largest in size, as (label, value): `t2[137] -> L3.H1 -> t4[9]`."""
        reader = f"t{int(self.layer)}[{int(self.feature)}]"
        if self.head is not None:
            reader = "L{}.H{}".format(*whole(self.head).tolist()) + f" -> {reader}"
        flat = whole(self.connections, np.float64).ravel()
        order = np.argsort(-np.nan_to_num(np.abs(flat), nan=-1.0), kind="stable")[:n]
        places = ((int(i), divmod(int(i), self.connections.shape[1])) for i in order if not np.isnan(flat[i]))
        return [(f"t{self.layers[row]}[{own}] -> {reader}", float(flat[i])) for i, (row, own) in places]

    def _repr_html_(self) -> str:
        return as_html(self, self.axis_labels(), self.top(LEADING))


@needs_decoder("transcoders")
@on_any_mesh
def transcoder_connections(
    model: Decoder, transcoders: Given, *, layer: Any, feature: Any, head: Head | None = None
) -> TranscoderConnections:
    """The weights by which one latent reads all that come before it.

    Args:
        model: The decoder.
        transcoders: Layer -> its transcoder, or a cross-layer one, or what `stack_transcoders` made of them.
        layer: The layer of the latent that reads.
        feature: Its number.
        head: Layer and number of a head through which it reads; None for the stream at its own position.

    Returns:
        The connections, `[transcoder, feature]`.

    Raises:
        ArgumentError: A latent or a head that there is not, or transcoders that cannot be taken apart.
        ShapeError: More than one latent, or transcoders of another model.
        UnsupportedModelError: A model without MLPs, or a head whose values are not linear in what it is given.
    """
    reads = Reads(model, stack_transcoders(model, transcoders))
    latent = reads.transcoders.latent(layer, feature)
    through = None if head is None else check_head(model, head, layer)
    found = _connections(reads, latent, through)
    between = None if through is None else jnp.stack(through)
    return TranscoderConnections(found, *latent, between, reads.transcoders.layers)


@eqx.filter_jit
def _connections(reads: Reads, latent: tuple[Array, Array], head: tuple[Array, Array] | None) -> Array:
    here = jnp.zeros((), jnp.int32)
    reading = reads.latent(None, *latent, here)
    if head is not None:
        reading = reads.head(None, reading, *head, here)
    transcoders = reads.transcoders
    found = transcoders.of_each(transcoders.onto(reading.direction, reading.n_mlp, reads.model.config))
    before = jnp.array(transcoders.layers, jnp.int32) < reading.n_mlp
    return jnp.where(before[:, None], found, jnp.nan)
