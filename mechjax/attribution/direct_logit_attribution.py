"""Direct logit attribution of a metric: what does each activation say to the unembedding itself?

    score[i] = (a_i(clean) - a_i(ablated)) . dm/da_i along the residual stream alone

that is attribution patching whose gradients do not enter any later attention or MLP, the scales of the last norm (and
of norms after attention and MLP) held as they are.

Reference: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits"; Wang et al. (2022),
arXiv:2211.00593.
Beside `mechjax.decompose.logit_attribution`, which splits a logit into what components add to it: any metric, against
any ablation, at any site, in the record that other methods give. With "zero" and `logit_diff` the two are equal.
Cost: a forward for each side, and one forward and backward; all logits are formed.
Exact when: the metric is affine in the logits and the last norm's scale does not move.    Misleads when: a later
component erases what an earlier one says (McGrath et al. 2023, arXiv:2307.15771).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, Int

from mechjax.attribution.scores import Reduce
from mechjax.attribution.sides import check_finite, first_order, place_labels, sides
from mechjax.attribution.site_scores import SiteScores, site_scores
from mechjax.attribution.subject import Ablation
from mechjax.base.meshes import on_any_mesh
from mechjax.metrics.metric import Metric
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.transform.edits import apply
from mechjax.transform.swept import swept_axes
from mechjax.transform.transforms import list_sites

STILL = ("attn_in", "mlp_in", "ln_final.scale", "ln1_post.scale", "ln2_post.scale")
"""Where gradients stop, of what a model has of these."""


@needs_decoder("decompose")
@on_any_mesh
def direct_logit_attribution(
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    *,
    site: str = "z",
    over: Sequence[str] = ("layer", "head"),
    positions: Mapping[str, Int[Array, " batch"]] | None = None,
    ablation: Ablation = "resample",
    reference: Any = None,
    reduce: Reduce = "mean",
) -> SiteScores:
    """Score every place of a site by what it says to the unembedding directly.

    Args:
        model: The decoder.
        clean: Prompts that show the behaviour, `Prompts` or ids (batch, pos).
        corrupt: Prompts that do not, with the same tokens at the same places; None where the ablation needs none.
        metric: A metric of `mechjax.metrics`: one number per example.
        site: The site, such as "z", "mlp_out" or "mlp_post".
        over: The axes of the places, as in `attribution_patch`; places left out add up.
        positions: Named positions, one per example, in place of every column ("pos" must be in `over`).
        ablation: What stands in, as in `attribution_patch`.
        reference: The prompts of a mean.
        reduce: How examples become one number, as in `attribution_patch`.

    Returns:
        The scores, `[*over]`.

    Raises:
        ArgumentError: An argument outside its range, or a run whose activations are not finite.
        PairingError: Clean and corrupt prompts that do not line up.
        SiteError: A site or axis that this model does not have.
        ShapeError: Positions or reference prompts of another length.
    """
    given = sides(
        model, clean, corrupt, metric, [site], unembeds=True,
        ablation=ablation, reference=reference, reduce=reduce, positions=positions,
    )  # fmt: skip
    info = given.sites[0]
    swept_axes(info, over, positions)
    have = list_sites(model, given.ids)
    found, value = first_order(given, [apply(name, _still) for name in STILL if name in have], tuple(over))
    check_finite(given, found, value)
    return site_scores(
        found, value, site=info.name, over=tuple(over), labels=place_labels(info, positions),
        method="direct_logit_attribution", ablation=ablation, reduce=reduce,
    )  # fmt: skip


def _still(x: Array, info: Any) -> Array:
    return jax.lax.stop_gradient(x)
