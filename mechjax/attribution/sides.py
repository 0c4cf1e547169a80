"""What every method of activations is given, checked and run: a whole run, and what stands in at its sites."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mechjax.attribution.subject import check_ablation
from mechjax.base.errors import ArgumentError, ShapeError, SiteError
from mechjax.graph.writes import writes
from mechjax.interop.unmapped import unmapped
from mechjax.metrics.measured import Measured, itself, measured
from mechjax.metrics.of_output import Reads, of_output
from mechjax.models.contraction import widened
from mechjax.models.decoder import Decoder, as_tokens, through
from mechjax.tasks.pairing import batched, paired, paired_inputs
from mechjax.transform.edits import Edit
from mechjax.transform.finite import check_sites_finite
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
        clean: What it is called on: of a decoder the prompts and their mask, of other functions their inputs.
        other: The same of the corrupt side; None where the ablation needs none.
        intact: Site -> the activations of the clean run. Shape ([layer,] batch, *axes).
        ablated: Site -> what stands in for them; the same shapes.
        named: The columns of named positions, per example.
        sites: The sites that are attributed (static).
    """

    run: Any
    clean: tuple[Any, ...]
    other: tuple[Any, ...] | None
    intact: dict[str, Array]
    ablated: dict[str, Array]
    named: Int[Array, "role batch"] | None
    sites: tuple[SiteInfo, ...] = eqx.field(static=True)

    @property
    def ids(self) -> Int[Array, "batch pos"]:
        """The clean prompts of a decoder."""
        return self.clean[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(info.name for info in self.sites)


def sides(
    model: Decoder | Callable[..., Any],
    clean: Any,
    corrupt: Any,
    metric: Reads,
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
    activations of further sites: both of decoders.

    Raises:
        ArgumentError: An unknown ablation or reduction, a mean without a reference set, something that is no metric.
        PairingError: Clean and corrupt prompts that do not line up.
        SiteError: A site that the model does not have, that has no gradient, or no axis of examples in front.
        ShapeError: Reference prompts of another length where the mean is per position.
    """
    check_ablation(ablation, reference, corrupt, reduce)
    pair = (clean, clean if corrupt is None else corrupt)
    if isinstance(model, Decoder):
        asked = _of_decoder(model, *pair, metric, sites, unembeds=unembeds)
    else:
        asked = _of_function(model, *pair, metric, sites)
    for info in asked.sites:
        if not jnp.issubdtype(info.dtype, jnp.floating):
            raise SiteError(
                f"site `{info.name}` holds {info.dtype}, which has no gradient: attribute a site of real numbers."
            )
    named = named_positions(positions, asked.examples, *asked.sites)
    names = tuple(dict.fromkeys((*(info.name for info in asked.sites), *beside)))
    intact = _recorded(asked.run, names, asked.clean)
    if ablation == "resample":
        ablated = _recorded(asked.run, names, asked.other)
    elif ablation == "zero":
        ablated = jax.tree.map(jnp.zeros_like, intact)
    else:
        ablated = _means(model, reference, asked.sites, ablation, intact)
    other = asked.other if ablation == "resample" else None
    return Sides(asked.run, asked.clean, other, intact, ablated, named, asked.sites)


class _Asked(NamedTuple):
    """Sites of a run, and what it is called on."""

    sites: tuple[SiteInfo, ...]
    run: Any
    clean: tuple[Any, ...]
    other: tuple[Any, ...]
    examples: int


def _of_decoder(
    model: Decoder, clean: Any, corrupt: Any, metric: Any, sites: Sequence[str], *, unembeds: bool
) -> _Asked:
    (ids, mask), (other, _) = paired(clean, corrupt, model.config)
    infos = tuple(swept_site(model, site, ids) for site in sites)
    read = measured(metric, ids, mask, model.config.d_vocab)
    run = Run(model, read, unembeds or any(info.name in UNEMBEDS for info in infos))
    return _Asked(infos, run, (ids, mask), (other, mask), len(ids))


def _of_function(
    fn: Callable[..., Any], clean: Any, corrupt: Any, metric: Reads, sites: Sequence[str]
) -> _Asked:
    inputs, other = paired_inputs(clean, corrupt)
    run = of_output(unmapped(fn), metric, inputs)
    n = eqx.filter_eval_shape(run, inputs).shape[0]
    infos = tuple(swept_site(run, site, inputs) for site in sites)
    for info in infos:
        if info.local[: min(1, info.n_batch)] != (n,):
            raise SiteError(
                f"site `{info.name}` is {info.describe()}, without an axis of the {n} examples in front, so its scores "
                "are not apart for each. Use `activation_patch`, which needs none, or a site that has one."
            )
    return _Asked(infos, run, (inputs,), (other,), n)


@eqx.filter_jit
def _recorded(run: Any, names: tuple[str, ...], given: tuple[Any, ...]) -> dict[str, Array]:
    return capture(run, names)(*given)[1].arrays


def _means(
    model: Any, reference: Any, infos: tuple[SiteInfo, ...], ablation: str, like: dict[str, Array]
) -> dict[str, Array]:
    """Means over the real tokens of a reference set, at every place of `like`."""
    per, prompts = ("all" if ablation == "mean" else "pos"), reference
    if isinstance(model, Decoder):
        prompts = batched(reference)
        _check_length(as_tokens(prompts, None, model.config)[0].shape[-1], infos, ablation)
    found = means(
        model if isinstance(model, Decoder) else unmapped(model), prompts, [i.name for i in infos], per=per
    )
    out: dict[str, Array] = {}
    for info in infos:
        x = found[info.name].astype(info.dtype)
        x = jnp.expand_dims(x, tuple(info.stacked + i for i in range(info.n_batch)))
        if per == "all" and "pos" in info.axes:
            x = jnp.expand_dims(x, info.stacked + info.n_batch + info.axes.index("pos"))
        there = like[info.name].shape
        if any(n not in (1, m) for n, m in zip(x.shape, there, strict=True)):
            raise ShapeError(
                f"ablation={ablation!r}: over the reference `{info.name}` has the mean {x.shape}, and the pairs have "
                f"{there}. Use a reference of the same shape but for its examples."
            )
        out[info.name] = jnp.broadcast_to(x, there)
    return out


def _check_length(n_pos: int, infos: tuple[SiteInfo, ...], ablation: str) -> None:
    """Whether means of prompts of that length stand for what the sites have."""
    for info in infos:
        n = next((info.size(axis) for axis in ("pos", "query") if axis in info.axes), n_pos)
        if n != n_pos and (ablation == "mean_per_pos" or "pos" not in info.axes):
            raise ShapeError(
                f"ablation={ablation!r}: the reference prompts have {n_pos} tokens and the pairs {n}. Use prompts of "
                "one length" + (", or ablation='mean'." if "pos" in info.axes else ".")
            )


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
    of_decoder = isinstance(given.run, Run)
    for side in (given.clean, *(() if given.other is None else (given.other,))):
        if of_decoder:
            writes(given.run.model, side[0], mask=side[1])
        else:
            check_sites_finite(given.run, *side)
    raise ArgumentError(
        f"scores at {', '.join(f'`{name}`' for name in given.names)} are not finite, though "
        f"{'what nodes write' if of_decoder else 'every site'} is: the metric or its gradient overflows, or a named "
        "position is out of range."
    )


def product(given: Sides, site: str, slope: Array) -> Array:
    """What each number of a site does to first order, in float32 at least."""
    return (widened(given.intact[site]) - widened(given.ablated[site])) * widened(slope)


def per_place(
    x: Float[Array, "..."], info: SiteInfo, over: Sequence[str], named: Int[Array, "role batch"] | None
) -> Float[Array, "*over batch"]:
    """Sums over the axes that are not in `over`; at named positions, those columns."""
    unnamed = ("",) * (info.n_batch - 1)
    axes = [*(("layer",) if info.stacked else ()), "batch", *unnamed, *info.axes]
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
    value, slopes = value_and_grad_at(intervene(given.run, edits), itself, name)(*given.clean)
    return per_place(product(given, name, slopes[name]), info, over, given.named), value
