"""Which tokens does a latent speak for? Its row of the decoder, read by the unembedding.

    logit(t) = (W_dec,i - mean(W_dec,i)) * w . W_U[:, t]

with w the weights of the last norm, whose mean is taken out where it is a LayerNorm: what a unit of activation adds to
each logit directly, times the last norm's scale, which differs from token to token and leaves the order as it is. What
the row does through later layers is not in it.

Reference: nostalgebraist (2020), "interpreting GPT: the logit lens", of rows of decoders as in Bricken et al. (2023).
Differs from SAELens' and Neuronpedia's, which take no mean out where norms were not folded into weights.
Cost: features by vocabulary, some rows at a time. Exact for what the row adds to the last stream with its scale held.
Misleads when: the site stands early, and later layers do something else with the row than pass it on.
"""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ShapeError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.decompose.frozen import centred, gain
from mechjax.dicteval.chosen_latents import chosen_latents, single
from mechjax.dictionaries import Dictionary, Normalized
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder

_AT_ONCE = 64  # rows whose logits are held at a time


class DecoderLens(Record):
    """The tokens that each latent speaks for and against, the strongest first.

    Attributes:
        promoted: What is added to the logits that grow most.
        promoted_tokens: Their tokens.
        suppressed: The same of those that fall most.
        suppressed_tokens: Their tokens.
        latents: Whose they are.
    """

    promoted: Float[Array, "feature token"]
    promoted_tokens: Int[Array, "feature token"]
    suppressed: Float[Array, "feature token"]
    suppressed_tokens: Int[Array, "feature token"]
    latents: Int[Array, "feature"]

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """The latents' numbers."""
        return {"feature": tuple(map(str, self.latents.tolist()))}


@needs_decoder("weights")
@on_any_mesh
def decoder_lens(
    model: Decoder, dictionary: Dictionary | Normalized, *, latents: Sequence[int] | None = None, n: int = 10
) -> DecoderLens:
    """The tokens whose logits latents raise and lower most, directly.

    Args:
        model: The decoder.
        dictionary: A dictionary that writes to the residual stream.
        latents: Whose tokens to look for; None for all.
        n: How many of each side; fewer where the vocabulary has not as many.

    Raises:
        ArgumentError: A latent that there is not, `n` below 1, or a dictionary of several sites.
        ShapeError: A dictionary that writes vectors of another length.
    """
    rows = single(dictionary).W_dec
    chosen = chosen_latents(dictionary, latents, n=n)
    if rows.shape[1] != model.config.d_model:
        raise ShapeError(
            f"this dictionary writes vectors of length {rows.shape[1]}, and the model's stream has "
            f"{model.config.d_model}: only what is added to the stream is read by the unembedding."
        )
    most, those, least, these = _lens(model, rows[chosen], min(n, model.config.d_vocab))
    return DecoderLens(most, those, least, these, jnp.asarray(chosen))


@eqx.filter_jit
def _lens(model: Decoder, rows: Array, n: int) -> tuple[Array, ...]:
    config, norm = model.config, model.ln_final
    rows = rows.astype(jnp.float32)
    read = rows if norm is None else centred(rows, config) * gain(norm, config)
    table = (model.W_E.T if model.W_U is None else model.W_U).astype(jnp.float32)

    def of(row: Float[Array, " d_model"]) -> tuple[Array, ...]:
        logits = config.logit_scale * jnp.dot(row, table, precision=lax.Precision.HIGHEST)
        (most, those), (least, these) = lax.top_k(logits, n), lax.top_k(-logits, n)
        return most, those, -least, these

    return lax.map(of, read, batch_size=min(_AT_ONCE, len(rows)))
