"""What may have been missed? The best nodes patched exactly, and a bound on the others.

Estimates order nodes. The first `verify` of them are ablated one at a time, exactly. The others are ablated together in
random subsets S, each node in as many of them, and for each of these nodes

    effect(n) = mean of m(intact) - m(S ablated) over subsets with n, less that mean over subsets without n

which is the node's own effect where effects add up. `chance(theta)` then tests whether some node has an effect of theta
or more: had any, subsets that show as little as these would come up with at most this probability. That is the largest
of all nodes' p-values (Welch's t), which needs no correction for their number: to say that no node has such an effect,
each one's test must reject (Berger 1982, intersection-union tests). `largest(chance)` turns it round.

Reference: Kramár et al. (2024), arXiv:2403.00745, section 3.3.
Differs from the paper: each node is in equally many subsets, so none is left untested; effects are means over examples,
with their signs, and subsets are the same for all examples.
Cost: a forward for each side, one for each verified node and one for each subset, `chunk_size` of them at a time.
Exact: the verified effects always; the bound where effects add up and their means are distributed as t.
Misleads when: nodes back each other up, so that one does more, or less, with others ablated than alone.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mechjax.attribution.node_scores import NodeScores
from mechjax.attribution.sides import Sides, check_finite, sides
from mechjax.attribution.site_scores import SAME_RUN, reduce_examples
from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.metrics.metric import Metric
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.models.room import backs_off, runs_that_fit
from mechjax.transform.edits import apply
from mechjax.transform.transforms import intervene

CHUNK_BYTES = 256e6
Nodes = dict[str, Array]
"""Site -> which of its nodes are ablated. Shape (*axes of its nodes)."""


class Diagnosis(Record):
    """Exact effects of the nodes that came out on top, and how much any other could do.

    Attributes:
        exact: Effects of the verified nodes, examples reduced as in the estimates.
        estimated: Their estimates, which gave the order.
        effects: What ablating each subset of the others takes from the metric, mean over examples.
        others: For every other node, the difference of the subsets with and without it.
        errors: The standard errors of these differences.
        freedom: Their degrees of freedom.
        nodes: Names of the verified nodes (static).
    """

    exact: Float[Array, " node"]
    estimated: Float[Array, " node"]
    effects: Float[Array, " subset"]
    others: Float[Array, " other"]
    errors: Float[Array, " other"]
    freedom: Float[Array, " other"]
    nodes: tuple[str, ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """Names of the verified nodes."""
        return {"node": self.nodes}

    def chance(self, theta: float) -> float:
        """At most how likely subsets as quiet as these are, if some other node has an effect of `theta` or more.

        Raises:
            ArgumentError: A threshold that is not positive.
        """
        from scipy import stats

        if not theta > 0:
            raise ArgumentError(f"theta={theta}: an effect is missed where it exceeds a threshold above 0.")
        if not self.others.size:
            return 0.0
        short = theta - np.abs(whole(self.others, np.float64))
        errors = whole(self.errors, np.float64)
        # Subsets without any noise leave no doubt.
        tail = stats.t.sf(np.where(errors > 0, short / np.where(errors > 0, errors, 1), np.inf), self.freedom)
        return float(np.where(short > 0, tail, 1.0).max())

    def largest(self, chance: float = 0.05) -> float:
        """The smallest threshold whose `chance` is at most this: no other node does more, with that confidence.

        Raises:
            ArgumentError: A chance outside 0 to 1/2.
        """
        from scipy import stats

        if not 0 < chance < 0.5:
            raise ArgumentError(f"chance={chance}: a probability between 0 and 1/2, such as 0.05.")
        reach = np.abs(self.others) + stats.t.isf(chance, self.freedom) * whole(self.errors)
        return float(reach.max(initial=0.0))


@needs_decoder("attention")
@on_any_mesh
@backs_off
def diagnose(
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    *,
    found: NodeScores,
    verify: int = 20,
    subsets: int = 100,
    share: float = 0.2,
    reference: Any = None,
    chunk_size: int | None = None,
    key: PRNGKeyArray,
) -> Diagnosis:
    """Verify the first nodes of `found` exactly, in order, and bound the effects of the others.

    Args:
        model: The decoder.
        clean: The clean prompts that `found` was made of.
        corrupt: Its corrupt prompts; None where the ablation needs none.
        metric: Its metric.
        found: Scores of nodes, from `atp_star`.
        verify: How many nodes are ablated one at a time, from the largest score in size down.
        subsets: How many random subsets of the others are ablated.
        share: The share of subsets that each node is in.
        reference: The prompts of a mean.
        chunk_size: Runs at once; None plans it from their memory.
        key: Random key.

    Returns:
        Exact effects in order, and the bound.

    Raises:
        ArgumentError: An argument outside its range, other prompts or another metric, or activations that are not
            finite.
        PairingError: Clean and corrupt prompts that do not line up.
    """
    scores = whole(found.flat())
    each = round(share * subsets)
    if not 0 < verify <= len(scores):
        raise ArgumentError(f"verify={verify}: between 1 and all {len(scores)} nodes can be verified.")
    if not 2 <= each <= subsets - 2:
        raise ArgumentError(
            f"subsets={subsets}, share={share}: each node is in {each} subsets; a difference of means needs two with "
            "the node and two without."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"chunk_size={chunk_size}: at least one run at once.")
    names = tuple(site for site, _ in found.axes)
    given = sides(
        model, clean, corrupt, metric, names,
        ablation=found.ablation, reference=reference, reduce=found.reduce,
    )  # fmt: skip
    given = eqx.tree_at(lambda g: g.named, given, found.named, is_leaf=lambda x: x is None)
    order = np.argsort(-np.abs(scores), kind="stable")
    first = order[:verify]
    alone = jnp.arange(len(scores)) == jnp.asarray(first)[:, None]
    together = _subsets(key, jnp.asarray(np.isin(np.arange(len(scores)), first)), subsets, each)
    chunk = chunk_size or runs_that_fit(CHUNK_BYTES, model, given.ids.shape)
    value, ran = _ablated(given, _of_sites(found, jnp.concatenate((alone, together))), found.axes, chunk)
    of_nodes, of_subsets = ran[:verify], ran[verify:]
    check_finite(given, ran)
    if value.shape != found.clean.shape or not np.allclose(
        whole(value), whole(found.clean), SAME_RUN, SAME_RUN
    ):
        raise ArgumentError(
            "the clean metric is not that of the scores: give the prompts and metric of `found`."
        )
    effects = (value - of_subsets).mean(-1)
    others = _differences(effects, together[:, order[verify:]])
    exact = reduce_examples(value - of_nodes, found.reduce)
    return Diagnosis(exact, found.flat()[first], effects, *others, tuple(found.name(int(i)) for i in first))


def _subsets(key: PRNGKeyArray, left_out: Array, subsets: int, each: int) -> Array:
    """Which nodes each subset has: every node that is not left out in `each` of them, drawn apart."""
    ranks = jax.random.uniform(key, (subsets, left_out.size)).argsort(0).argsort(0)
    return (ranks < each) & ~left_out


def _differences(effects: Array, inside: Array) -> tuple[Array, Array, Array]:
    """For each node the mean effect with less that without it, its standard error, and its degrees of freedom."""
    n = [mask.sum(0).astype(effects.dtype) for mask in (inside, ~inside)]
    means, variances = [], []
    for mask, count in zip((inside, ~inside), n, strict=True):
        mean = jnp.where(mask, effects[:, None], 0).sum(0) / count
        means.append(mean)
        squares = jnp.where(mask, (effects[:, None] - mean) ** 2, 0)
        variances.append(squares.sum(0) / (count - 1) / count)
    total = variances[0] + variances[1]
    parts = [v / jnp.where(total > 0, total, 1) for v in variances]  # squares of variances could underflow
    split = sum(part**2 / (count - 1) for part, count in zip(parts, n, strict=True))
    freedom = jnp.where(total > 0, 1 / jnp.where(total > 0, split, 1), effects.size - 2)
    return means[0] - means[1], jnp.sqrt(total), freedom


def _of_sites(found: NodeScores, flat: Array) -> Nodes:
    """(set, node) as (set, *axes) of each site."""
    out, start = {}, 0
    for site, _ in found.axes:
        shape = found.scores[site].shape
        size = int(np.prod(shape))
        out[site] = flat[:, start : start + size].reshape(-1, *shape)
        start += size
    return out


@eqx.filter_jit
def _ablated(given: Sides, sets: Nodes, axes: Any, chunk: int) -> tuple[Array, Float[Array, "set batch"]]:
    """The clean metric, and the metric with each set of nodes ablated, what comes after them following."""

    def metric(sets: Nodes) -> Array:
        edits = [
            apply(info.name, _put, _whole(sets[info.name], over, info.axes, given), given.ablated[info.name])
            for info, (_, over) in zip(given.sites, axes, strict=True)
        ]
        return intervene(given.run, edits)(*given.clean)

    n = next(iter(sets.values())).shape[0]
    return given.run(*given.clean), jax.lax.map(metric, sets, batch_size=min(chunk, n))


def _put(x: Array, info: Any, which: Array, value: Array) -> Array:
    return jnp.where(which[info.layer], value[info.layer], x)


def _whole(which: Array, over: tuple[str, ...], axes: tuple[str, ...], given: Sides) -> Array:
    """A set of a site's nodes as a mask of the site, (layer, batch, *axes), of size 1 where it does not vary."""
    named: Int[Array, "role batch"] | None = given.named
    if named is None:
        which = which[:, None]
    else:  # a role stands at another column in each example
        here = named[..., None] == jnp.arange(given.ids.shape[-1])
        which = jnp.einsum("lr...,rbp->lbp...", which.astype(jnp.float32), here.astype(jnp.float32)) > 0
    sizes = iter(which.shape[2:])
    return which.reshape(*which.shape[:2], *(next(sizes) if axis in over else 1 for axis in axes))
