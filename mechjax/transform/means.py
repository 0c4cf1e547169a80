"""Mean activations over prompts, the reference of mean ablation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array

from mechjax.base.errors import ArgumentError, SiteError
from mechjax.base.inputs import inputs_of
from mechjax.base.meshes import on_any_mesh
from mechjax.base.prompts import Prompts
from mechjax.transform.captured import Activations, Captured
from mechjax.transform.select import is_concrete
from mechjax.transform.transforms import capture


@on_any_mesh
def means(
    fn: Callable[..., Any],
    prompts: Any | Iterable[Any],
    sites: str | Sequence[str],
    *,
    per: Literal["pos", "all"] = "all",
) -> Activations:
    """Mean of activations over examples, for `mean_ablate`.

    Padding (the mask of `Prompts`) does not count. Sums are kept in float32 and only they are stored, so prompts may
    come in as many batches as there are.

    Args:
        fn: A function or module with sites.
        prompts: A batch (`Prompts`, token ids `[batch, pos]`, or whatever array `fn` takes, examples first), or a list
            of batches. A dictionary is a batch of named arguments, of which `attention_mask` says what is padding; in a
            list, a tuple is a batch of several arguments.
        sites: Names of the sites.
        per: "pos": one mean per position (positions count from the left of each batch, so align your prompts);
            "all": one mean over positions too.

    Returns:
        A record per site, `[layer, *axes]`, without the `pos` axis for "all".

    Raises:
        ArgumentError: no prompts, another `per`, or batches of different length with `per="pos"`.
        SiteError: a site without `pos` axis over padded prompts: which of its numbers are padding is not known. A
            subject's site whose axes have no names: which of them are examples is not known.
    """
    if per not in ("pos", "all"):
        raise ArgumentError(f"per={per!r}: expected 'pos' or 'all'.")
    batches = list(prompts) if isinstance(prompts, (list, tuple)) and _are_batches(prompts) else [prompts]
    total: dict[str, Array] = {}
    count: dict[str, Array] = {}
    sites_known: tuple[Captured, ...] = ()
    for batch in batches:
        given = inputs_of(batch)
        _, acts = capture(fn, sites)(*given.args, **given.kwargs)
        mask = given.mask
        for site in acts.sites:
            summed, n = _summed(acts[site.name], site, mask, per)
            if site.name in total and total[site.name].shape != summed.shape:
                raise ArgumentError(
                    f"means(per='pos') of `{site.name}`: batches differ in shape, {total[site.name].shape} and "
                    f"{summed.shape}. Pad them to one length, or use per='all'."
                )
            total[site.name] = total.get(site.name, jnp.zeros((), jnp.float32)) + summed
            count[site.name] = count.get(site.name, jnp.zeros((), jnp.float32)) + n
        sites_known = acts.sites
    arrays = {name: total[name] / count[name] for name in total}
    kept = tuple(replace(s, axes=_kept(s.axes, per)) for s in sites_known)
    return Activations(
        arrays, {n: jnp.isfinite(a).any(tuple(range(_has(n, kept), a.ndim))) for n, a in arrays.items()}, kept
    )


def _has(name: str, sites: tuple[Captured, ...]) -> int:
    return int(next(s for s in sites if s.name == name).layers is not None)


def _are_batches(prompts: Sequence[Any]) -> bool:
    return bool(prompts) and all(isinstance(p, Prompts | Mapping | tuple) or jnp.ndim(p) > 1 for p in prompts)


def _kept(axes: tuple[str, ...], per: str) -> tuple[str, ...]:
    return tuple(a for a in axes if a != "pos") if per == "all" else axes


def _summed(x: Array, site: Captured, mask: Any, per: str) -> tuple[Array, Array]:
    """Sum over batch axes (and `pos`), with how many numbers went into each, ready to divide."""
    lead, n_axes = int(site.layers is not None), len(site.axes)
    batch = tuple(range(lead, x.ndim - n_axes))
    if len(batch) > 1 and not n_axes:
        raise SiteError(
            f"means of `{site.name}`: its value has shape {x.shape[lead:]} and its axes have no names, so which of "
            "them are examples is not known. Name the last ones where the subject is made: sites={'mine': "
            f"('{site.name}', ('pos', 'd_model'))}}, then ask for 'mine'."
        )
    if not batch:
        raise ArgumentError(f"means of `{site.name}`: prompts have no batch axis; give [batch, pos].")
    pos = x.ndim - n_axes + site.axes.index("pos") if "pos" in site.axes else None
    over = (*batch, pos) if per == "all" and pos is not None else batch
    weight = jnp.ones((1,) * x.ndim, jnp.float32)
    if mask is not None and pos is not None:
        shape = [1] * x.ndim
        for dim, n in zip((*batch, pos), mask.shape, strict=True):
            shape[dim] = n
        weight = mask.reshape(shape).astype(jnp.float32)
    elif mask is not None and is_concrete(mask) and not bool(mask.all()):
        raise SiteError(
            f"means of `{site.name}` over padded prompts: the site has no `pos` axis, so its padding is not known. "
            "Use prompts of one length."
        )
    weight = jnp.broadcast_to(
        weight, [n if d in over else w for d, (n, w) in enumerate(zip(x.shape, weight.shape, strict=True))]
    )
    kept = jnp.where(weight > 0, x.astype(jnp.float32), 0.0)  # padding may hold anything
    n = jnp.broadcast_to(weight.sum(over), kept.sum(over).shape)
    return kept.sum(over), n
