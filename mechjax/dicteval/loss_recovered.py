"""How much of what a model knows passes through a dictionary?

    ce_recovered = (CE_ablated - CE_spliced) / (CE_ablated - CE)      kl_recovered = 1 - KL_spliced / KL_ablated

where *spliced* is the model with what the dictionary makes in place of the site, its error left out, and *ablated* has
0 or the site's mean there. Next tokens are predicted from real tokens alone; padding counts nowhere. What predicts no
next tokens (images, classes, hidden tokens) has a loss of its own in the place of CE, and no KL.

Reference: Bricken et al. (2023); the name is that of SAELens' and SAEBench's scores. Differs from them in saying which
ablation: zeros flatter late layers, so means stand beside. Misleads when: ratios near 1 are compared; the plain
differences `ce_spliced - ce` tell them apart. Or when a function that is not causal is measured by next tokens, which
it sees.
Cost: three forwards of the model for each batch.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.base.inputs import Inputs
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.dictionaries import Dictionary
from mechjax.dictionaries.splice import layers_of, splice
from mechjax.metrics.of_output import logits_of
from mechjax.models.encoder import Encoder
from mechjax.models.structures import Model
from mechjax.store.calls import Batch, Reader, batch_of, reading
from mechjax.transform.edits import mean_ablate, zero
from mechjax.transform.means import means
from mechjax.transform.static import hold, unhold
from mechjax.transform.transforms import intervene

Loss = Callable[[Any, Inputs], Float[Array, " batch"]]
"""A loss of an output and of the call that gave it, one number per example."""


class LossRecovered(Record):
    """The model's loss with its site as it is, through dictionaries, and ablated.

    Attributes:
        ce: Cross-entropy of the model, in nats for each token; the mean of `loss` over examples, where one was given.
        ce_spliced: Through the dictionaries.
        ce_ablated: With the site ablated.
        ce_recovered: The part of the difference that is left.
        kl_spliced: Divergence of what is predicted through the dictionaries from what the model predicts; NaN beside a
            loss of one's own.
        kl_ablated: The same with the site ablated.
        kl_recovered: The part of it that is not lost.
        tokens: Tokens that were predicted; examples, where a loss was given.
    """

    ce: Float[Array, ""]
    ce_spliced: Float[Array, ""]
    ce_ablated: Float[Array, ""]
    ce_recovered: Float[Array, ""]
    kl_spliced: Float[Array, ""]
    kl_ablated: Float[Array, ""]
    kl_recovered: Float[Array, ""]
    tokens: Int[Array, ""]


@on_any_mesh
def loss_recovered(
    model: Model | Callable[..., Any],
    prompts: Iterable[Any],
    dictionaries: Mapping[int, Dictionary] | Mapping[None, Dictionary],
    *,
    site: str = "resid_post",
    ablation: Literal["zero", "mean"] = "zero",
    loss: Loss | None = None,
) -> LossRecovered:
    """Measure dictionaries by what the model still predicts through them.

    Args:
        model: The model, a subject (`mechjax.interop`), or any function with sites.
        prompts: Batches of prompts as `mechjax.dictlearn.activations` takes them. Of two texts the last is predicted.
        dictionaries: Layer -> its dictionary; all are in place at once. `{None: dictionary}` outside the layers.
        site: Where they stand.
        ablation: "zero", or "mean": the site's mean over all of these prompts, for which a subject's site has names of
            axes.
        loss: `loss(output, inputs)`, one number per example, with the call as `inputs.args` and `inputs.kwargs`; None
            for the cross-entropy of next tokens, of causal models whose output is logits or holds `logits`.

    Raises:
        ArgumentError: No prompts, an unknown ablation, what `splice` refuses, or an output that predicts no next tokens
            where no loss is given.
        ShapeError: A dictionary of another width.
        SiteError: A site or layer that there is not.
        NeedsDecoderError: Something that cannot be called.
    """
    batches = list(prompts)
    if not batches or ablation not in ("zero", "mean"):
        raise ArgumentError(
            f"{len(batches)} batches of prompts and ablation={ablation!r}: give at least one batch, and 'zero' or "
            "'mean'."
        )
    if loss is None and isinstance(model, Encoder):
        raise ArgumentError(
            "an encoder sees the next token, so predicting it measures nothing: give `loss`, such as that of tokens "
            "that were hidden from it."
        )
    reader = reading(model, batches).model
    layer = layers_of(dictionaries)
    through = splice(reader, dictionaries, site=site, error=False)
    if ablation == "zero":
        without = intervene(reader, [zero(site, layer=layer)])
    else:
        without = intervene(reader, [mean_ablate(site, means(reader, batches, [site]), layer=layer)])
    runs, sums = (reader, through, without), np.zeros(6)
    for some in batches:
        batch = batch_of(reader, some, skip_first=False)
        found = _next_tokens(runs, batch) if loss is None else _own_loss(runs, batch.given, hold(loss))
        sums += whole(found, np.float64)
    n = sums[0]
    ce, ce_spliced, ce_ablated, kl_spliced, kl_ablated = sums[1:] / n
    over = lambda part, whole: part / whole if abs(whole) > 1e-6 else np.nan
    numbers = {
        "ce": ce,
        "ce_spliced": ce_spliced,
        "ce_ablated": ce_ablated,
        "ce_recovered": over(ce_ablated - ce_spliced, ce_ablated - ce),
        "kl_spliced": kl_spliced,
        "kl_ablated": kl_ablated,
        "kl_recovered": over(kl_ablated - kl_spliced, kl_ablated),
    }
    kept = {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()}
    return LossRecovered(**kept, tokens=jnp.asarray(int(n), jnp.int32))


def _next_tokens(runs: tuple[Reader, Any, Any], batch: Batch) -> Float[Array, "6"]:
    """Tokens predicted, and over these the cross-entropies and divergences.

    Raises:
        ArgumentError: No text.
    """
    if not batch.texts:
        raise ArgumentError(
            "the call has no text, tokens of shape (batch, pos), whose next tokens could be predicted: give `loss`, a "
            "function of the output and the inputs that gives one number per example."
        )
    ids = batch.texts[-1]
    return _sums(runs, batch.given, ids, jnp.asarray(batch.real(ids.shape)).reshape(ids.shape))


@eqx.filter_jit
def _sums(runs: tuple[Reader, Any, Any], given: Inputs, ids: Array, real: Array) -> Float[Array, "6"]:
    counted = (real[..., :-1] & real[..., 1:]).astype(jnp.float32)
    found = [logits_of(f(*given.args, **given.kwargs)) for f in runs]
    if found[0].ndim != 3 or found[0].shape[:2] != ids.shape:
        raise ArgumentError(
            f"the output has logits of shape {found[0].shape} and the text is {ids.shape}, so they predict no next "
            "tokens of it: give `loss`, a function of the output and the inputs that gives one number per example."
        )
    own, spliced, ablated = (jax.nn.log_softmax(x[..., :-1, :].astype(jnp.float32), -1) for x in found)
    chosen = lambda logs: -jnp.take_along_axis(logs, ids[..., 1:, None], -1)[..., 0]
    away = lambda logs: (jnp.exp(own) * (own - logs)).sum(-1)
    told = [jnp.ones_like(counted), *map(chosen, (own, spliced, ablated)), away(spliced), away(ablated)]
    return jnp.stack([(counted * x).sum() for x in told])


@eqx.filter_jit
def _own_loss(runs: tuple[Reader, Any, Any], given: Inputs, loss: Any) -> Float[Array, "6"]:
    """Examples, and sums over them of a loss.

    Raises:
        ArgumentError: Anything but one number per example.
    """
    found = [jnp.asarray(unhold(loss)(f(*given.args, **given.kwargs), given)) for f in runs]
    if found[0].ndim != 1 or not jnp.issubdtype(found[0].dtype, jnp.floating):
        raise ArgumentError(
            f"the loss gives {found[0].dtype}{list(found[0].shape)}: a function of the output and the inputs gives one "
            "real number per example, (batch,)."
        )
    sums = [x.astype(jnp.float32).sum() for x in found]
    return jnp.stack([jnp.float32(len(found[0])), *sums, jnp.float32(jnp.nan), jnp.float32(jnp.nan)])
