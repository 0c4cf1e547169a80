"""What every method of activations is given, checked and run: a whole run, and what stands in at its sites."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mechjax.attribution.subject import check_ablation
from mechjax.base.errors import ArgumentError, ShapeError, SiteError
from mechjax.graph.writes import writes
from mechjax.metrics.measured import Measured, itself, measured
from mechjax.metrics.metric import Metric
from mechjax.models.contraction import widened
from mechjax.models.decoder import Decoder, as_tokens, through
from mechjax.tasks.pairing import batched, paired
from mechjax.transform.edits import Edit
from mechjax.transform.gradients import value_and_grad_at
from mechjax.transform.means import means
from mechjax.transform.select import is_concrete
from mechjax.transform.swept import named_positions, swept_site
from mechjax.transform.table import SiteInfo
from mechjax.transform.transforms import capture, intervene

UNEMBEDS = frozenset({"ln_final.scale", "ln_final.normalized", "logits"})
"""Sites that only a run with all its logits has."""


class Run(eqx.Module):
    """The metric of a whole run, whose sites are the model's: without the unembedding's unless it `unembeds`."""

    model: Decoder
    measured: Measured
    unembeds: bool = eqx.field(static=True)

    def __call__(
        self, ids: Int[Array, "batch pos"], mask: Bool[Array, "batch pos"] | None
    ) -> Float[Array, " batch"]:
        """One number per example."""
        sequence = self.model.arrange(ids.shape[-1], mask=mask)
        resid = through(self.model, self.model.embed(ids, mask=mask), sequence)[0]
        if self.unembeds:
            return self.measured.of_logits(self.model.unembed(resid))
        return self.measured.of(self.model, resid)


class Sides(eqx.Module):
    """Both runs.

    Attributes:
        run: The metric of a run.
        ids: The clean prompts.
        mask: True for real tokens; None where all are.
        other: The corrupt prompts; None where the ablation needs none.
        intact: Site -> the activations of the clean run. Shape ([layer,] batch, *axes).
        ablated: Site -> what stands in for them; the same shapes.
        named: The columns of named positions, per example.
        sites: The sites that are attributed (static).
    """

    run: Run
    ids: Int[Array, "batch pos"]
    mask: Bool[Array, "batch pos"] | None
    other: Int[Array, "batch pos"] | None
    intact: dict[str, Array]
    ablated: dict[str, Array]
    named: Int[Array, "role batch"] | None
    sites: tuple[SiteInfo, ...] = eqx.field(static=True)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(info.name for info in self.sites)


def sides(
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    sites: Sequence[str],
    *,
    ablation: str,
    reference: Any,
    reduce: str,
    positions: Mapping[str, Any] | None = None,
    unembeds: bool = False,
    beside: tuple[str, ...] = (),
) -> Sides:
    """Both runs, checked. One program records either side, so that equal prompts give equal activations, to the bit.

    What methods are given goes in as it is; `unembeds` asks for runs with all logits, `beside` for the clean
    activations of further sites.

    Raises:
        ArgumentError: An unknown ablation or reduction, a mean without a reference set, something that is no metric.
        PairingError: Clean and corrupt prompts that do not line up.
        SiteError: A site that the model does not have, or that has no gradient.
        ShapeError: Reference prompts of another length where the mean is per position.
    """
    check_ablation(ablation, reference, corrupt, reduce)
    (ids, mask), (other, _) = paired(clean, clean if corrupt is None else corrupt, model.config)
    infos = tuple(swept_site(model, site, ids) for site in sites)
    for info in infos:
        if not jnp.issubdtype(info.dtype, jnp.floating):
            raise SiteError(
                f"site `{info.name}` holds {info.dtype}, which has no gradient: attribute a site of real numbers."
            )
    named = named_positions(positions, ids)
    read = measured(metric, ids, mask, model.config.d_vocab)
    run = Run(model, read, unembeds or any(info.name in UNEMBEDS for info in infos))
    names = tuple(dict.fromkeys((*(info.name for info in infos), *beside)))
    intact = _recorded(run, names, ids, mask)
    if ablation == "resample":
        ablated = _recorded(run, names, other, mask)
    elif ablation == "zero":
        ablated = jax.tree.map(jnp.zeros_like, intact)
    else:
        ablated = _means(model, reference, infos, ablation, intact)
    return Sides(run, ids, mask, other if ablation == "resample" else None, intact, ablated, named, infos)


@eqx.filter_jit
def _recorded(run: Run, names: tuple[str, ...], ids: Array, mask: Array | None) -> dict[str, Array]:
    return capture(run, names)(ids, mask)[1].arrays


def _means(
    model: Decoder, reference: Any, infos: tuple[SiteInfo, ...], ablation: str, like: dict[str, Array]
) -> dict[str, Array]:
    """Means over the real tokens of a reference set, at every place of `like`."""
    per, prompts = ("all" if ablation == "mean" else "pos"), batched(reference)
    n_pos = as_tokens(prompts, None, model.config)[0].shape[-1]
    out: dict[str, Array] = {}
    for info in infos:
        n = next((info.size(axis) for axis in ("pos", "query") if axis in info.axes), n_pos)
        if n != n_pos and (per == "pos" or "pos" not in info.axes):
            raise ShapeError(
                f"ablation={ablation!r}: the reference prompts have {n_pos} tokens and the pairs {n}. Use prompts of "
                "one length" + (", or ablation='mean'." if "pos" in info.axes else ".")
            )
    found = means(model, prompts, [info.name for info in infos], per=per)
    for info in infos:
        x = found[info.name].astype(info.dtype)
        x = jnp.expand_dims(x, int(info.stacked))  # the batch
        if per == "all" and "pos" in info.axes:
            x = jnp.expand_dims(x, info.stacked + 1 + info.axes.index("pos"))
        out[info.name] = jnp.broadcast_to(x, like[info.name].shape)
    return out


def place_labels(
    info: SiteInfo, positions: Mapping[str, Any] | None
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The names of positions and, where not every layer has the site, of layers."""
    layers = () if info.having is None else (("layer", tuple(f"L{i}" for i in info.rows)),)
    return (*((("pos", tuple(positions)),) if positions else ()), *layers)


def check_finite(given: Sides, *found: Any) -> None:
    """Whether scores are numbers, where that can be seen.

    Raises:
        ArgumentError: They are not. The first node that is not finite is named, in either run.
    """
    if all(not is_concrete(x) or bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found)):
        return
    for ids in (given.ids, *(() if given.other is None else (given.other,))):
        writes(given.run.model, ids, mask=given.mask)
    raise ArgumentError(
        f"scores at {', '.join(f'`{name}`' for name in given.names)} are not finite, though what nodes write is: the "
        "metric or its gradient overflows, or a named position is out of range."
    )


def product(given: Sides, site: str, slope: Array) -> Array:
    """What each number of a site does to first order, in float32 at least."""
    return (widened(given.intact[site]) - widened(given.ablated[site])) * widened(slope)


def per_place(
    x: Float[Array, "..."], info: SiteInfo, over: Sequence[str], named: Int[Array, "role batch"] | None
) -> Float[Array, "*over batch"]:
    """Sums over the axes that are not in `over`; at named positions, those columns."""
    axes = [*(("layer",) if info.stacked else ()), "batch", *info.axes]
    x = x.sum(tuple(i for i, axis in enumerate(axes) if axis not in (*over, "batch")))
    left = [axis for axis in axes if axis in (*over, "batch")]
    x = jnp.transpose(x, [left.index(axis) for axis in (*over, "batch")])
    if named is None:
        return x
    at = tuple(over).index("pos")
    x = jnp.moveaxis(x, at, -2)
    columns = named.reshape((1,) * (x.ndim - 2) + named.shape)
    return jnp.moveaxis(jnp.take_along_axis(x, columns, -2, mode="fill", fill_value=jnp.nan), -2, at)


@eqx.filter_jit
def first_order(given: Sides, edits: list[Edit], over: tuple[str, ...]) -> tuple[Array, Array]:
    """One gradient, of the run with these edits, for all places at once; and the metric."""
    (info,), (name,) = given.sites, given.names
    value, slopes = value_and_grad_at(intervene(given.run, edits), itself, name)(given.ids, given.mask)
    return per_place(product(given, name, slopes[name]), info, over, given.named), value
