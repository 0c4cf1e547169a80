"""Mediation effects. How much of what a change of prompt does goes through this place, and how much around it?

From a sweep in both modes. y(x, z) is the metric on prompts x with the mediator as on prompts z; the change is from
`corrupt` (no treatment) to `clean`:

    total     TE  = y(clean, clean) - y(corrupt, corrupt)
    direct    NDE = y(clean, corrupt) - y(corrupt, corrupt)         the mediator held back: the "noise" sweep
    indirect  NIE = y(corrupt, clean) - y(corrupt, corrupt)         the mediator alone: the "denoise" sweep

and with `scale="ratio"` each as y / y(corrupt, corrupt) - 1, example by example. `interaction` is TE - NDE - NIE: zero
where the mediator and the rest add up, as in a linear model. Values are means over examples; intervals are percentiles
of means over examples drawn again with replacement.

Reference: Pearl (2001), "Direct and indirect effects"; Vig et al. (2020), arXiv:2004.12265 (there ratios);
Efron and Tibshirani (1993), chapter 13, for the intervals.
Differs from the paper: differences by default, since ratios of metrics that change sign mean nothing.
Cost: none beside the two sweeps.
Exact: always, for the examples at hand.    Misleads when: places stand in one another's way (the indirect effects of
several places do not add up), or there are few examples: the intervals are of the examples, not of the model.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from mechjax.base.errors import ArgumentError, PairingError
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.patching.scores import SAME, PatchScores

Scale = Literal["difference", "ratio"]
EFFECTS = ("total", "direct", "indirect", "interaction")


class MediationEffects(Record):
    """Effects of a change of prompts, by how they go; the first axis is `EFFECTS`.

    Attributes:
        values: Means over examples.
        low: Lower ends of their intervals.
        high: Upper ends.
        per_example: The effects of each example.
        site: The mediator's site (static).
        over: The axes that were swept (static).
        scale: "difference" or "ratio" (static).
        level: How likely the intervals are to hold the mean (static).
        labels: Axis -> the name of each index, where it has names (static).
    """

    values: Float[Array, "effect *over"]
    low: Float[Array, "effect *over"]
    high: Float[Array, "effect *over"]
    per_example: Float[Array, "effect *over batch"]
    site: str = eqx.field(static=True)
    over: tuple[str, ...] = eqx.field(static=True)
    scale: str = eqx.field(static=True)
    level: float = eqx.field(static=True)
    labels: tuple[tuple[str, tuple[str, ...]], ...] = eqx.field(static=True, default=())

    def axis_labels(self) -> Mapping[str, Sequence[str]]:
        """The names of the effects, and of the indices of some axes."""
        return {"effect": EFFECTS} | dict(self.labels)

    def __getitem__(self, effect: str) -> Float[Array, "*over"]:
        """One effect at every place.

        Raises:
            ArgumentError: There is no such effect.
        """
        if effect not in EFFECTS:
            raise ArgumentError(f"no effect is called {effect!r}; there are {', '.join(EFFECTS)}.")
        return self.values[EFFECTS.index(effect)]


def mediation_effects(
    denoise: PatchScores,
    noise: PatchScores,
    *,
    scale: Scale = "difference",
    n_bootstrap: int = 1000,
    level: float = 0.95,
    key: PRNGKeyArray,
) -> MediationEffects:
    """Total, direct and indirect effects of every place that two sweeps patched.

    Args:
        denoise: `activation_patch(..., mode="denoise")`: the mediator as on clean prompts, all else on corrupt ones.
        noise: The same sweep with `mode="noise"`: the reverse.
        scale: "difference" or "ratio".
        n_bootstrap: How often examples are drawn again.
        level: How likely an interval is to hold the mean.
        key: Of these draws.

    Returns:
        The effects, `[effect, *over]`.

    Raises:
        ArgumentError: Sweeps in other modes; ratios of a metric that is not positive on every corrupt prompt; a number
            outside its range.
        PairingError: Sweeps of different places or prompts.
    """
    if (denoise.mode, noise.mode) != ("denoise", "noise"):
        raise ArgumentError(
            f"the sweeps have mode={denoise.mode!r} and mode={noise.mode!r}: give the one with mode='denoise' first "
            "and the one with mode='noise' second."
        )
    for what in ("site", "over", "labels"):
        if getattr(denoise, what) != getattr(noise, what):
            raise PairingError(
                f"the sweeps have {what}={getattr(denoise, what)!r} and {what}={getattr(noise, what)!r}: sweep the "
                "same places in both modes."
            )
    for run in ("clean", "corrupt"):
        one, other = (whole(getattr(sweep, run)) for sweep in (denoise, noise))
        if one.shape != other.shape or not np.allclose(one, other, rtol=1e-4, atol=1e-4):
            raise PairingError(
                f"the sweeps' metrics of the {run} run differ: give both the same model, prompts, in the same order, "
                "and metric."
            )
    if scale not in get_args(Scale):
        raise ArgumentError(f"scale={scale!r}: expected 'difference' or 'ratio'.")
    if not 0 < level < 1:
        raise ArgumentError(f"level={level}: between 0 and 1, such as 0.95.")
    if n_bootstrap < 1:
        raise ArgumentError(f"n_bootstrap={n_bootstrap}: examples must be drawn again at least once.")
    null = denoise.corrupt
    if scale == "ratio" and not bool((null > SAME).all()):
        raise ArgumentError(
            f"scale='ratio' divides by the metric of the corrupt run, which is {float(null.min()):.4g} for one "
            "example: take a positive metric such as mj.metrics.prob, or scale='difference'."
        )
    unit = null if scale == "ratio" else jnp.ones_like(null)
    change = lambda y: (y - null) / unit
    total = jnp.broadcast_to(change(denoise.clean), denoise.per_example.shape)
    direct, indirect = change(noise.per_example), change(denoise.per_example)
    effects = jnp.stack([total, direct, indirect, total - direct - indirect])
    low, high = _interval(effects, n_bootstrap, level, key)
    return MediationEffects(
        effects.mean(-1), low, high, effects, denoise.site, denoise.over, scale, level, denoise.labels
    )


@eqx.filter_jit
def _interval(
    effects: Float[Array, "*cell batch"], n: int, level: float, key: PRNGKeyArray
) -> tuple[Float[Array, "*cell"], Float[Array, "*cell"]]:
    """Percentiles of the means over examples that are drawn with replacement, all cells with the same draws."""
    batch = effects.shape[-1]
    drawn = jax.random.randint(key, (n, batch), 0, batch)
    shares = jax.vmap(lambda row: jnp.bincount(row, length=batch))(drawn).astype(effects.dtype) / batch
    means = jnp.einsum("...b,nb->n...", effects, shares, precision=jax.lax.Precision.HIGHEST)
    ends = jnp.quantile(means, jnp.array([(1 - level) / 2, (1 + level) / 2], means.dtype), axis=0)
    return ends[0], ends[1]
