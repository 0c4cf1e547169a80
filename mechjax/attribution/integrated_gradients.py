"""Integrated gradients (IG): what does each activation do for the metric, on the whole way from ablated to clean?

    score[i] = (a_i(clean) - a_i(ablated)) . integral from 0 to 1 of dm/da_i at a(t) dt
    a(t) = a(ablated) + t (a(clean) - a(ablated))

where a is the activation at `site`, all of it moved together: layer by layer where "layer" is in `over`, else all
layers at once. `steps` and `quadrature` say at which t the integral is read. The default is the method as published, at
the token embeddings.

Reference: Sundararajan et al. (2017), "Axiomatic attribution for deep networks", arXiv:1703.01365, Eq. 1 and 3; at
inner layers, Dhamdhere et al. (2019), "How important is a neuron?", arXiv:1805.12233; from a corrupt run, Marks et al.
(2024), arXiv:2403.19647.
Differs from the papers: the midpoint rule by default, where the first paper takes right ends; the baseline is an
ablation, as in every method here.
Cost: two forwards of the clean side and one of the other, and for each step a forward and a backward: for each layer
too, where "layer" is in `over`.
Exact when: the metric is affine in the site. As steps grow, the scores of one layer always sum to m(clean) - m(that
layer ablated).    Misleads when: the way between the two leaves what the model was trained on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mechjax.attribution.quadrature import Quadrature, nodes_of
from mechjax.attribution.scores import Reduce
from mechjax.attribution.sides import Sides, check_finite, per_place, place_labels, product, sides
from mechjax.attribution.site_scores import SiteScores, site_scores
from mechjax.attribution.subject import Ablation
from mechjax.base.meshes import on_any_mesh
from mechjax.metrics.of_output import Reads
from mechjax.models.contraction import widened
from mechjax.models.decoder import Decoder
from mechjax.transform.edits import replace
from mechjax.transform.swept import swept_axes
from mechjax.transform.transforms import intervene


@on_any_mesh
def integrated_gradients(
    model: Decoder | Callable[..., Any],
    clean: Any,
    corrupt: Any,
    metric: Reads,
    *,
    site: str = "embed",
    over: Sequence[str] = ("pos",),
    positions: Mapping[str, Int[Array, " batch"]] | None = None,
    steps: int = 5,
    quadrature: Quadrature = "midpoint",
    ablation: Ablation = "resample",
    reference: Any = None,
    reduce: Reduce = "mean",
) -> SiteScores:
    """Score every place of a site from gradients on the way from the ablated activation to the clean one.

    Args:
        model: The decoder, a subject of `mechjax.interop`, or any function with sites.
        clean: What shows the behaviour: of a decoder `Prompts` or ids (batch, pos), of others what they take, as in
            `activation_patch`.
        corrupt: What does not, with the same tokens at the same places; None where the ablation needs none.
        metric: A metric of `mechjax.metrics`, or where not a decoder runs any function of its output that gives one
            number per example, as in `activation_patch`.
        site: The site; "embed" is the token embedding.
        over: The axes of the places, as in `attribution_patch`.
        positions: Named positions, one per example, in place of every column ("pos" must be in `over`).
        steps: How many intervals the way is cut into.
        quadrature: Where in each interval gradients are taken: "midpoint", "left", "right", or "trapezoid" (both ends,
            so one run more).
        ablation: What stands in, as in `attribution_patch`: where the way begins.
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
    nodes = jnp.array(nodes_of(quadrature, steps))
    given = sides(
        model, clean, corrupt, metric, [site],
        ablation=ablation, reference=reference, reduce=reduce, positions=positions,
    )  # fmt: skip
    info = given.sites[0]
    swept_axes(info, over, positions)
    found, value = _integral(given, nodes, tuple(over))
    check_finite(given, found, value)
    method = f"integrated_gradients(steps={steps}, quadrature={quadrature!r})"
    return site_scores(
        found, value, site=info.name, over=tuple(over), labels=place_labels(info, positions),
        method=method, ablation=ablation, reduce=reduce,
    )  # fmt: skip


@eqx.filter_jit
def _integral(
    given: Sides, nodes: Float[Array, "step 2"], over: tuple[str, ...]
) -> tuple[Float[Array, "*over batch"], Float[Array, " batch"]]:
    (info,), (name,) = given.sites, given.names
    intact, ablated = given.intact[name], given.ablated[name]

    def way(intact: Array, ablated: Array, layer: Array | None) -> Array:
        """The integral of the slope, of one layer or of all."""

        def metric(x: Array) -> Array:
            edit = replace(name, x, per_layer=info.stacked and layer is None, layer=layer)
            return intervene(given.run, [edit])(*given.clean).sum()

        def step(total: Array, node: Array) -> tuple[Array, None]:
            at, weight = node.astype(total.dtype)
            x = widened(ablated) + at * (widened(intact) - widened(ablated))
            return total + weight * widened(jax.grad(metric)(x.astype(intact.dtype))), None

        return jax.lax.scan(step, jnp.zeros_like(widened(intact)), nodes)[0]

    if info.stacked and "layer" in over:
        rows = jnp.asarray(info.rows, jnp.int32)
        slopes = jax.lax.map(lambda xs: way(*xs), (intact, ablated, rows))
    else:
        slopes = way(intact, ablated, None)
    value = given.run(*given.clean)
    return per_place(product(given, name, slopes), info, over, given.named), value
