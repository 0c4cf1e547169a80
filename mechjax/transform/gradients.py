"""Gradients with respect to activations."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from mechjax.base.catalogue import spelled_out
from mechjax.base.errors import ArgumentError, SiteError
from mechjax.base.meshes import on_any_mesh
from mechjax.transform.captured import Activations
from mechjax.transform.edits import add
from mechjax.transform.program import trace
from mechjax.transform.request import Read
from mechjax.transform.static import hold, unhold, with_static
from mechjax.transform.table import SiteInfo, known_as
from mechjax.transform.transforms import Transformed, intervene, reads_of


def value_and_grad_at(
    fn: Callable[..., Any],
    metric: Callable[[Any], Array],
    sites: str | Sequence[str],
    *,
    layers: int | Sequence[int] | None = None,
) -> Callable[..., tuple[Array, Activations]]:
    """The metric of `fn`'s output and its gradient with respect to activations, all sites in one backward pass.

    The gradient is that of the activation as it leaves the site (after edits). Nothing needs to be differentiable
    upstream: a zero is added at every requested site, so that tangents exist there although tokens are integers. A
    site that the metric does not depend on has gradient zero.

    Args:
        fn: Any JAX function or module with sites; edited ones too.
        metric: Maps the output to one number, or to one per example (then their sum is differentiated, which for
            examples that do not interact gives each example's own gradient).
        sites: Names of the sites.
        layers: The layers to keep; None for all.

    Returns:
        A callable with `fn`'s arguments that returns `(metric's value, gradients)`; the gradients are a record like a
        capture's, `[layer, *batch, *axes]` per site.

    Raises:
        SiteError: when called, for a site or layer that is not there.
        ArgumentError: when called, where the metric is not a real number per example.
    """
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    if not names or any("@" in name for name in names):
        raise SiteError(
            f"value_and_grad_at takes names of sites, got {names}; their cotangents are what it returns."
        )
    asked = tuple(dict.fromkeys(spelled_out(name)[0] for name in names))
    return _GradientsAt(_Objective(hold(fn), hold(metric), asked), reads_of(names, layers))


class _Objective(eqx.Module):
    """`metric(fn(...))` differentiated with respect to a zero added at every site, and what is read beside it.

    The zero is one scalar per site: adding it everywhere is free, and its own gradient is dropped by the compiler.
    Reads see the function itself: what nothing depends on is no longer in the program once that is differentiated.
    """

    fn: Any
    metric: Any
    sites: tuple[str, ...] = eqx.field(static=True)
    reads: tuple[Read, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Array, dict[str, Array]]:
        def total(zeros: list[Array]) -> tuple[Array, Any]:
            edits = [add(name, zero) for name, zero in zip(self.sites, zeros, strict=True)]
            edited = intervene(unhold(self.fn), edits)
            out, acts = Transformed(hold(edited), (), self.reads)(*args, **kwargs)
            value = jnp.asarray(unhold(self.metric)(out))
            if not jnp.issubdtype(value.dtype, jnp.floating):
                raise ArgumentError(
                    f"the metric returned {value.dtype}{list(value.shape)}; it must return one real number, or one "
                    "per example."
                )
            return value.sum(), (value, acts.ran)

        (_, value_and_ran), _ = jax.value_and_grad(total, has_aux=True)([jnp.zeros(()) for _ in self.sites])
        return value_and_ran


class _GradientsAt(eqx.Module):
    """Captures the cotangents of an objective, and fills in what it does not reach."""

    objective: _Objective
    reads: tuple[Read, ...]

    @on_any_mesh
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Array, Activations]:
        have = Transformed(self.objective.fn, (), self.reads).sites(*args, **kwargs)
        reads = [with_static(r, site=known_as(r.site, have)) for r in self.reads]
        for read in reads:
            _check_differentiable(have[read.site])
        noting = with_static(self.objective, reads=tuple(_whether(r, have[r.site]) for r in reads))
        reached = trace(noting, args, kwargs, frozenset(self.objective.sites))[0].sites
        wanted = [Read(name, r.layers) for r in reads if (name := _cotangent(r.site)) in reached]
        (value, ran), acts, _ = Transformed(noting, (), tuple(wanted)).observe(*args, **kwargs)
        arrays = {r.site: _gradient(r, ran[r.site], acts, have[r.site]) for r in reads}
        sites = tuple(r.captured(have[r.site]) for r in reads)
        return value, Activations(arrays, ran, sites)


def _check_differentiable(info: SiteInfo) -> None:
    """Refuse whole numbers and truth values, which have no derivative."""
    if not jnp.issubdtype(info.dtype, jnp.inexact):
        raise SiteError(
            f"value_and_grad_at: site `{info.name}` holds {jnp.dtype(info.dtype).name}, which has no gradient. Ask at "
            "a site of floating numbers that is made from it, such as the embedding of token ids."
        )


def _cotangent(site: str) -> str:
    return f"{site}@cotangent"


def _whether(read: Read, info: SiteInfo) -> Read:
    """Reads whether a site ran, and nothing of it."""
    if info.along is None:
        return Read(read.site, read.layers, {}, hold(_nothing))
    return Read(read.site, read.layers, {info.along: jnp.zeros(0, jnp.int32)})


def _nothing(x: Array, info: Any) -> Array:
    """A reducer that keeps nothing: only whether the site ran is of interest."""
    return jnp.zeros((), jnp.bool_)


def _gradient(read: Read, ran: Array, acts: Activations, info: SiteInfo) -> Array:
    """The gradient at a site: zero where it ran but the metric does not depend on it, NaN where it did not run."""
    name, rows = _cotangent(read.site), read.rows(info)
    shape = (*(() if rows is None else (len(rows),)), *info.shape)
    wide = ran.reshape(*ran.shape, *(1,) * (len(shape) - ran.ndim))
    untouched = jnp.where(wide, 0.0, jnp.nan).astype(info.dtype)
    if name not in acts:
        return jnp.broadcast_to(untouched, shape)
    reached = acts.ran[name].reshape(wide.shape)
    return jnp.where(reached, acts[name], untouched)
