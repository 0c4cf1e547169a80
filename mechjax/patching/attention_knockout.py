"""Attention knockout. Through which layers does information flow from these tokens to those?

For every layer l, in a window of layers around it, no head lets a position of `queries` look at one of `keys`:

    s[q, k] <- -inf    for q in queries, k in keys, before the softmax, which so renormalises over what is left
    score[l] = m(f) - m(f with the window around l blocked)

Positive where the metric needs what flows there.

Reference: Geva et al. (2023), "Dissecting recall of factual associations in auto-regressive language models",
arXiv:2304.14767; there m is the answer's probability, and the change is shown relative to it.
Differs from the paper: nothing; the window holds layers from `l - window // 2` on, cut off at both ends.
Cost: for each layer the layers from its window's first one on, one layer after the other.
Exact: always.    Misleads when: information takes a detour over tokens that are not blocked, or over earlier layers.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.metrics.measured import FromLayer, FromStart, measured
from mechjax.metrics.metric import Metric
from mechjax.models.decoder import Decoder, as_tokens
from mechjax.models.needs import needs_decoder
from mechjax.models.positions import varying
from mechjax.models.scores import visible
from mechjax.patching.chosen import chosen
from mechjax.patching.finite import check_numbers
from mechjax.patching.windows import windows
from mechjax.tasks.pairing import batched
from mechjax.transform.edits import add
from mechjax.transform.transforms import capture, intervene


class KnockoutScores(Record):
    """What a metric loses where attention is blocked around each layer.

    Attributes:
        scores: Mean over examples, at the layer on which the window is centred.
        per_example: The same per example.
        clean: Metric of the whole run, per example.
        window: How many layers are blocked at once (static).
    """

    scores: Float[Array, " layer"]
    per_example: Float[Array, "layer batch"]
    clean: Float[Array, " batch"]
    window: int = eqx.field(static=True)

    @property
    def relative(self) -> Float[Array, " layer"]:
        """Mean over examples of the share of the metric that is lost, as the paper shows probabilities."""
        return (self.per_example / self.clean).mean(-1)


@needs_decoder("attention")
@on_any_mesh
def attention_knockout(
    model: Decoder,
    prompts: Any,
    metric: Metric,
    *,
    queries: Any,
    keys: Any,
    window: int | None = None,
) -> KnockoutScores:
    """Block attention from some tokens to others, in windows of layers, and read the metric.

    Args:
        model: The decoder.
        prompts: Prompts whose answers the model knows, `Prompts` or ids (batch, pos).
        metric: A metric of `mechjax.metrics`.
        queries: Tokens that may not look: a mask (batch, pos), or positions, one for all, (batch,) or (batch, k).
        keys: Tokens that they may not look at.
        window: How many layers are blocked at once; by default 9, as in the paper (or all, where fewer).

    Returns:
        The scores `[layer]`.

    Raises:
        ArgumentError: A window outside the model, a query that would see no key at all, tokens that are not there, or a
            run whose activations are not finite.
        ShapeError: Masks or positions for other prompts.
    """
    ids, mask = as_tokens(batched(prompts), None, model.config)
    window = min(9, model.config.n_layers) if window is None else window
    held = windows(window, model.config.n_layers)
    with jax.ensure_compile_time_eval():  # which tokens are meant is known, inside jit too
        blocked = chosen("queries", queries, ids, mask)[:, :, None] & chosen("keys", keys, ids, mask)[:, None]
        _check_left(model, blocked, mask)
    run = FromStart(model, measured(metric, ids, mask, model.config.d_vocab))
    clean, found = _blocked(run, ids, mask, blocked, held)
    check_numbers(model, (ids,), mask, clean, found)
    effect = clean - found
    return KnockoutScores(effect.mean(-1), effect, clean, window)


def _check_left(model: Decoder, blocked: Bool[Array, "batch query key"], mask: Array | None) -> None:
    """Every query sees some key in every layer: a softmax over nothing would spread over keys that are masked.

    Raises:
        ArgumentError: A query of which every key is blocked.
    """
    if model.config.attn_sinks:
        return  # then something is always left
    sequence, per_layer = model.arrange(blocked.shape[-1], mask=mask), varying(model.config).window
    layers = [None] if per_layer is None else per_layer
    for window in layers:
        seen = jnp.broadcast_to(visible(sequence.queries, sequence.keys, window), blocked.shape)
        empty = np.argwhere(whole(~(seen & ~blocked).any(-1)))
        if empty.size:
            example, at = map(int, empty[0])
            raise ArgumentError(
                f"queries= and keys= block every key that position {at} of example {example} sees, so that its softmax "
                "would be over nothing. Leave it some key, such as the first token or itself."
            )


@eqx.filter_jit
def _blocked(
    run: FromStart, ids: Array, mask: Array | None, blocked: Array, held: Bool[Array, "center layer"]
) -> tuple[Float[Array, " batch"], Float[Array, "center batch"]]:
    """The metric of the whole run, and with each window blocked."""
    clean, acts = capture(run, "resid_pre")(run.model.embed(ids, mask=mask), mask)
    rest = FromLayer(run.model, run.measured)
    bar = jnp.where(blocked, -jnp.inf, 0.0)[:, None]  # for every head

    def centre(held: Array) -> Array:
        first = jnp.argmax(held).astype(jnp.int32)
        edit = add("attn_scores", bar, layer=held)
        return intervene(rest, [edit])(acts["resid_pre"][first], first, mask)

    return clean, jax.lax.map(centre, held)
