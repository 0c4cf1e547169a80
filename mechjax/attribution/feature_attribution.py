"""Feature attribution. What is a transcoder's latent made of, on this input?

    z_j(t) = sum over l < l', i of f_i^l(t) (W_dec^l[i] . d) / scale      latents: input-dependent times input-invariant
           + sum over heads h, s of pattern_h[t, s] v_h(s) W_O^h . d / scale
           + (embeddings, skips, errors, b_dec, b_O) . d / scale + bias    d = C(w * W_enc^l'[:, j])

with `scale` what the norm before the MLP divided by in the run, w its weight and C taking the mean away. The sum is
z_j(t), what the encoder gives, before anything is cut off. Each part is what the latent would lose without it, all
other writes and the scale held.

Reference: Dunefsky, Chlenski and Nanda (2024), "Transcoders find interpretable LLM feature circuits", arXiv:2406.11944,
"attribution between transcoder feature pairs" and "through attention heads".
Differs from the authors' code: norms are linear at their measured scale, weights, centring and biases apart. Theirs
scale each direction v by (v . norm(x)) / (v . x) (`get_ln_constant`): the same only where norms are folded and the
stream has no mean, and undefined where v . x is 0. Errors, biases and skips are parts like others; so is every source
position (theirs leaves out the first, and cuts the list off at as many as there are heads, `get_top_contribs`).
Cost: one forward, which records patterns, and `d_model` products for each latent of all transcoders.
Exact: the sum, in any decoder; each part, with patterns and scales held.    Misleads when: errors are a large part, or
a part acts by moving a pattern or the scale, which is nobody's share.
"""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int

from mechjax.attribution.asked_latent import columns
from mechjax.attribution.frozen_reads import Reads, Run
from mechjax.attribution.latent_parts import SHARED, LatentParts, Node, parts_of
from mechjax.attribution.transcoders import Given, stack_transcoders
from mechjax.base.meshes import on_any_mesh
from mechjax.models.decoder import Decoder, as_tokens
from mechjax.models.needs import needs_decoder
from mechjax.tasks.pairing import batched


class FeatureAttribution(LatentParts):
    """The parts of a latent's pre-activation, which is `total`, in each example.

    Attributes:
        activation: The latent itself: its pre-activation where it is active, else 0.
        layer: Its layer.
        feature: Its number.
    """

    activation: Float[Array, " batch"]
    layer: Int[Array, ""]
    feature: Int[Array, ""]

    def chain(self, where: tuple[int, ...]) -> tuple[Node, ...]:
        """The latent."""
        return (
            Node("latents", (self.layers.index(int(self.layer)), int(self.feature)), int(self.at[where])),
        )


@needs_decoder("transcoders")
@on_any_mesh
def feature_attribution(
    model: Decoder, transcoders: Given, prompts: Any, *, layer: Any, feature: Any, pos: Any = -1
) -> FeatureAttribution:
    """Take a latent's pre-activation at one position of each prompt apart into all that writes to what it reads.

    Args:
        model: The decoder.
        transcoders: Layer -> its transcoder, or a cross-layer one, or what `stack_transcoders` made of them.
        prompts: `Prompts` or ids (batch, pos).
        layer: The layer of the latent.
        feature: Its number.
        pos: The position, one for all prompts or one for each: a column, or counted from the last real token.

    Returns:
        The parts, of which `top` names the largest; `gap` is rounding.

    Raises:
        ArgumentError: A latent or a position that there is not, or transcoders that cannot be taken apart.
        ShapeError: More than one latent, positions for other prompts, or transcoders of another model.
        UnsupportedModelError: A model without MLPs, or one whose stream is no sum.
    """
    reads = Reads(model, stack_transcoders(model, transcoders))
    latent = reads.transcoders.latent(layer, feature)
    ids, mask = as_tokens(batched(prompts), None, model.config)
    parts, activation = _attributed(reads, ids, mask, latent, columns(pos, ids, mask))
    return FeatureAttribution(
        **parts, place=("batch",), layers=reads.transcoders.layers, activation=activation,
        layer=latent[0], feature=latent[1],
    )  # fmt: skip


@eqx.filter_jit
def _attributed(
    reads: Reads, ids: Array, mask: Array | None, latent: tuple[Array, Array], at: Array
) -> tuple[dict[str, Array], Array]:
    def of(run: Run, at: Array) -> tuple[dict[str, Array], Array]:
        total, activation = reads.measured(run, *latent, at)
        return parts_of(reads, run, reads.latent(run, *latent, at)) | {"total": total}, activation

    return jax.vmap(of, out_axes=(SHARED, 0))(reads.record(ids, mask), at)
