"""How much of what a model knows passes through a dictionary?

    ce_recovered = (CE_ablated - CE_spliced) / (CE_ablated - CE)      kl_recovered = 1 - KL_spliced / KL_ablated

where *spliced* is the model with what the dictionary makes in place of the site, its error left out, and *ablated* has
0 or the site's mean there. Next tokens are predicted from real tokens alone; padding counts nowhere.

Reference: Bricken et al. (2023); the name is that of SAELens' and SAEBench's scores. Differs from them in saying which
ablation: zeros flatter late layers, so means stand beside. Misleads when: ratios near 1 are compared; the plain
differences `ce_spliced - ce` tell them apart.
Cost: three forwards of the model for each batch.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.dictionaries import Dictionary
from mechjax.dictionaries.splice import splice
from mechjax.models.decoder import Decoder, as_tokens
from mechjax.models.needs import needs_decoder
from mechjax.transform.edits import mean_ablate, zero
from mechjax.transform.means import means
from mechjax.transform.transforms import intervene


class LossRecovered(Record):
    """The model's loss with its site as it is, through dictionaries, and ablated.

    Attributes:
        ce: Cross-entropy of the model, in nats for each token.
        ce_spliced: Through the dictionaries.
        ce_ablated: With the site ablated.
        ce_recovered: The part of the difference that is left.
        kl_spliced: Divergence of what is predicted through the dictionaries from what the model predicts.
        kl_ablated: The same with the site ablated.
        kl_recovered: The part of it that is not lost.
        tokens: Tokens that were predicted.
    """

    ce: Float[Array, ""]
    ce_spliced: Float[Array, ""]
    ce_ablated: Float[Array, ""]
    ce_recovered: Float[Array, ""]
    kl_spliced: Float[Array, ""]
    kl_ablated: Float[Array, ""]
    kl_recovered: Float[Array, ""]
    tokens: Int[Array, ""]


@needs_decoder("dictionaries")
@on_any_mesh
def loss_recovered(
    model: Decoder,
    prompts: Iterable[Any],
    dictionaries: Mapping[int, Dictionary],
    *,
    site: str = "resid_post",
    ablation: Literal["zero", "mean"] = "zero",
) -> LossRecovered:
    """Measure dictionaries by what the model still predicts through them.

    Args:
        model: The decoder.
        prompts: Batches of prompts, `Prompts` or ids (batch, pos).
        dictionaries: Layer -> its dictionary; all are in place at once.
        site: Where they stand.
        ablation: "zero", or "mean": the site's mean over all of these prompts.

    Raises:
        ArgumentError: No prompts, an unknown ablation, or what `splice` refuses.
        ShapeError: A dictionary of another width.
    """
    batches = list(prompts)
    if not batches or ablation not in ("zero", "mean"):
        raise ArgumentError(
            f"{len(batches)} batches of prompts and ablation={ablation!r}: give at least one batch, and 'zero' or "
            "'mean'."
        )
    layers = sorted(dictionaries)
    through = splice(model, dictionaries, site=site, error=False)
    if ablation == "zero":
        without = intervene(model, [zero(site, layer=layers)])
    else:
        without = intervene(model, [mean_ablate(site, means(model, batches, [site]), layer=layers)])
    sums = np.zeros(6)
    for batch in batches:
        ids, mask = as_tokens(batch, None, model.config)
        sums += whole(_sums(model, through, without, ids, mask), np.float64)
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


@eqx.filter_jit
def _sums(model: Decoder, through: Any, without: Any, ids: Array, mask: Array | None) -> Array:
    """Tokens predicted, and over these the cross-entropies and divergences."""
    real = jnp.ones(ids.shape, bool) if mask is None else mask
    counted = (real[..., :-1] & real[..., 1:]).astype(jnp.float32)
    own, spliced, ablated = (
        jax.nn.log_softmax(f(ids, mask=mask)[..., :-1, :].astype(jnp.float32), -1)
        for f in (model, through, without)
    )
    chosen = lambda logs: -jnp.take_along_axis(logs, ids[..., 1:, None], -1)[..., 0]
    away = lambda logs: (jnp.exp(own) * (own - logs)).sum(-1)
    found = [jnp.ones_like(counted), *map(chosen, (own, spliced, ablated)), away(spliced), away(ablated)]
    return jnp.stack([(counted * x).sum() for x in found])
