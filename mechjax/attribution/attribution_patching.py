"""Attribution patching (AtP): what does each activation do for the metric, to first order?

    score[i] = (a_i(clean) - a_i(ablated)) . dm/da_i at the clean run        for every place i of `over`

where a is the activation at `site`, a(ablated) what stands in for it (`ablation`), and m the metric: what patching
that place would take from m, were the model linear. Axes that are not in `over` are ablated together: a sum, but for
layers, of which later ones, ablated too, no longer pass on what earlier ones do.

Reference: Nanda (2023), "Attribution patching"; Kramár et al. (2024), "AtP*", arXiv:2403.00745, Eq. 4.
Differs from the paper: the sign is m(intact) - m(ablated), and sizes are taken only where `reduce` asks for it; the
paper's scores are reduce="mean_of_abs".
Cost: a forward for each side, and one forward and backward, however many places there are; without "layer" in `over`,
two forwards per place.
Exact when: the metric is affine in the site.    Misleads when: attention saturates, or direct and indirect effects
cancel (`atp_star` mends both), or norms rescale. Compare with `activation_patch(..., mode="noise")`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mechjax.attribution.scores import Reduce
from mechjax.attribution.sides import Sides, check_finite, first_order, place_labels, sides
from mechjax.attribution.site_scores import SiteScores, site_scores
from mechjax.attribution.subject import Ablation
from mechjax.base.meshes import on_any_mesh
from mechjax.metrics.of_output import Reads
from mechjax.models.decoder import Decoder
from mechjax.transform.edits import replace
from mechjax.transform.swept import swept_axes
from mechjax.transform.transforms import intervene


@on_any_mesh
def attribution_patch(
    model: Decoder | Callable[..., Any],
    clean: Any,
    corrupt: Any,
    metric: Reads,
    *,
    site: str,
    over: Sequence[str] = ("layer", "pos"),
    positions: Mapping[str, Int[Array, " batch"]] | None = None,
    ablation: Ablation = "resample",
    reference: Any = None,
    reduce: Reduce = "mean",
) -> SiteScores:
    """Score every place of a site from one gradient.

    Args:
        model: The decoder, a subject of `mechjax.interop`, or any function with sites.
        clean: What shows the behaviour: of a decoder `Prompts` or ids (batch, pos), of others what they take, as in
            `activation_patch`.
        corrupt: What does not, with the same tokens at the same places; None where the ablation needs none.
        metric: A metric of `mechjax.metrics`, or where not a decoder runs any function of its output that gives one
            number per example, as in `activation_patch`.
        site: The site, such as "resid_pre", "z" or "mlp_post".
        over: The axes of the places: "layer" and any of the site's axes. Axes left out are ablated whole; without
            "layer", all layers at once.
        positions: Named positions, one per example, in place of every column ("pos" must be in `over`).
        ablation: What stands in: "resample" (the activation on `corrupt`), "zero", "mean" over `reference` and its
            positions, or "mean_per_pos".
        reference: The prompts of a mean.
        reduce: "mean" over examples, signed; "abs_of_mean", its size; "mean_of_abs", the mean of the examples' sizes.

    Returns:
        The scores, `[*over]`.

    Raises:
        ArgumentError: An argument outside its range, or a run whose activations are not finite.
        PairingError: Clean and corrupt prompts that do not line up.
        SiteError: A site or axis that this model does not have.
        ShapeError: Positions or reference prompts of another length.
    """
    given = sides(
        model, clean, corrupt, metric, [site],
        ablation=ablation, reference=reference, reduce=reduce, positions=positions,
    )  # fmt: skip
    info = given.sites[0]
    swept_axes(info, over, positions)
    if info.stacked and "layer" not in over:
        found, value = _at_all_layers(given, tuple(over))
    else:
        found, value = first_order(given, [], tuple(over))
    check_finite(given, found, value)
    return site_scores(
        found, value, site=info.name, over=tuple(over), labels=place_labels(info, positions),
        method="attribution_patch", ablation=ablation, reduce=reduce,
    )  # fmt: skip


@eqx.filter_jit
def _at_all_layers(given: Sides, over: tuple[str, ...]) -> tuple[Array, Array]:
    """One derivative per place, that of moving it in all layers: none of them is moved by those before it."""
    (info,), (name,) = given.sites, given.names
    intact, moved = given.intact[name], given.ablated[name]
    sizes = [given.named.shape[0] if a == "pos" and given.named is not None else info.size(a) for a in over]

    def place(index: Array) -> tuple[Array, Array]:
        where: dict[str, Any] = dict(zip(over, index, strict=True))
        if given.named is not None:
            where["pos"] = given.named[where["pos"]][:, None]

        def metric(by: Array) -> Array:
            edit = replace(name, intact + by * (moved - intact), per_layer=True, **where)
            return intervene(given.run, [edit])(*given.clean)

        value, slope = jax.jvp(metric, (jnp.zeros((), intact.dtype),), (jnp.ones((), intact.dtype),))
        return value, -slope

    cells = jnp.indices(sizes).reshape(len(sizes), -1).T
    values, found = jax.lax.map(place, cells)
    return found.reshape(*sizes, -1), values[0]
