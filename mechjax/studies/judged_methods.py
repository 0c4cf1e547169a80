"""The methods that the scoreboard judges: what each says of the edges and nodes of a model whose circuit is known.

A head or an MLP is scored by what it writes, `z` and `mlp_out`, which is what exact scores of nodes ablate. Its queries
and keys are activations within it: whatever they do, its output does, so they find no head that `z` does not. What
AtP*'s fix of the softmax adds is which of a head's inputs matters, and shows on gates
(`tests/attribution/test_atp_star.py`); what GradDrop adds shows here. The input, which is in every circuit, is no node
of AtP* and is left out for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mechjax.attribution import (
    ATTNLRP,
    GIM,
    RELP,
    Scores,
    SiteScores,
    atp_star,
    attribution_patch,
    contextual_decomposition,
    direct_logit_attribution,
    eap,
    eap_ig,
    exact,
    information_flow,
    integrated_gradients,
)
from mechjax.graph import Graph, Truth

DRAWS = 200
"""Random scores of which the mean is taken: it then lies within 0.01 of one half."""


class Found(eqx.Module):
    """Scores of edges and of nodes, in the graph's order; None of what a method does not score."""

    edges: Float[Array, "*draw edge"] | None = None
    nodes: Float[Array, "*draw node"] | None = None


@dataclass(frozen=True)
class Method:
    """A row of the scoreboard.

    Attributes:
        score: What it finds in a model, given a key.
        passes: How many passes of the model its scores of edges take, or of nodes where it has none of edges; a
            backward pass counts as two.
        signed: Whether its scores say who helps and who harms; sizes are compared with the sizes of exact ones.
    """

    score: Callable[[Truth, Key[Array, ""]], Found]
    passes: Callable[[Graph], int]
    signed: bool = True


def _pair(known: Truth) -> tuple[Any, ...]:
    return known.model, known.clean, known.corrupt, known.metric


def _random(known: Truth, key: Key[Array, ""]) -> Found:
    edges, nodes = jax.random.split(key)
    draw = lambda key, names: jax.random.normal(key, (DRAWS, len(names)), jnp.float32)
    return Found(draw(edges, known.graph.edges), draw(nodes, known.graph.nodes))


def _exact(known: Truth, key: Key[Array, ""]) -> Found:
    of = lambda over: exact(*_pair(known), graph=known.graph, over=over).scores
    return Found(of("edge"), of("node"))


def _flow(known: Truth, key: Key[Array, ""]) -> Found:
    return Found(information_flow(known.model, known.clean, graph=known.graph).importance)


def _of_edges(method: Callable[..., Scores], **how: Any) -> Callable[[Truth, Key[Array, ""]], Found]:
    """A method whose scores of nodes are sums over their edges."""

    def score(known: Truth, key: Key[Array, ""]) -> Found:
        edges = method(*_pair(known), graph=known.graph, **how)
        return Found(edges.scores, edges.nodes().scores)

    return score


def _of_nodes(method: Callable[..., Scores]) -> Callable[[Truth, Key[Array, ""]], Found]:
    """A method of the nodes of a graph."""
    return lambda known, key: Found(nodes=method(*_pair(known), graph=known.graph).scores)


def _of_sites(method: Callable[..., SiteScores]) -> Callable[[Truth, Key[Array, ""]], Found]:
    """A method of activations, called at what heads write and at what MLPs do."""

    def score(known: Truth, key: Key[Array, ""]) -> Found:
        at = {"z": ("layer", "head"), "mlp_out": ("layer",)}
        found = [method(*_pair(known), site=site, over=at[site]).scores for site in _sites(known.graph)]
        return Found(nodes=_in_order(*found))

    return score


def _atp_star(known: Truth, key: Key[Array, ""]) -> Found:
    found = atp_star(
        *_pair(known), sites=_sites(known.graph), per_position=False, grad_drop=_drops(known.graph)
    ).scores
    return Found(nodes=_in_order(*(found[site] for site in _sites(known.graph))))


def _sites(graph: Graph) -> tuple[str, ...]:
    return ("z", *("mlp_out",) * graph.mlp)


def _drops(graph: Graph) -> bool:
    """Whether there is a layer beside the one that GradDrop drops."""
    return graph.n_layers > 1


def _in_order(heads: Float[Array, "layer head"], *mlps: Float[Array, " layer"]) -> Float[Array, " node"]:
    """Scores in the order of nodes, none for the input."""
    own = jnp.concatenate([heads, *(x[:, None] for x in mlps)], 1).ravel()
    return jnp.concatenate([jnp.full(1, jnp.nan, own.dtype), own])


STEPS = 5  # of an integral, as is the default of those who take one

METHODS: dict[str, Method] = {
    "random": Method(_random, lambda graph: 0),
    "exact": Method(_exact, lambda graph: 2 + len(graph.edges)),
    "eap": Method(_of_edges(eap), lambda graph: 1 + 3),
    "eap/relp": Method(_of_edges(eap, rules=RELP), lambda graph: 1 + 3),
    "eap/attnlrp": Method(_of_edges(eap, rules=ATTNLRP), lambda graph: 1 + 3),
    "eap/gim": Method(_of_edges(eap, rules=GIM), lambda graph: 1 + 3),
    "eap_ig": Method(_of_edges(eap_ig), lambda graph: 2 + STEPS * 3),
    "eap_ig/activations": Method(
        _of_edges(eap_ig, path="activations"), lambda graph: 2 + (1 + graph.n_layers * (1 + graph.mlp)) * STEPS * 3
    ),
    "eap_ig/mask": Method(_of_edges(eap_ig, path="mask"), lambda graph: 2 + STEPS * 3),
    "information_flow": Method(_flow, lambda graph: 1, signed=False),
    "contextual_decomposition": Method(
        _of_nodes(contextual_decomposition), lambda graph: 2 + 2 * len(graph.nodes)
    ),
    "attribution_patch": Method(_of_sites(attribution_patch), lambda graph: 5 * len(_sites(graph))),
    "atp_star": Method(
        _atp_star, lambda graph: 3 + 2 * (graph.n_layers if _drops(graph) else 1), signed=False
    ),
    "integrated_gradients": Method(
        _of_sites(integrated_gradients),
        lambda graph: (3 + graph.n_layers * STEPS * 3) * len(_sites(graph)),
    ),
    "direct_logit_attribution": Method(
        _of_sites(direct_logit_attribution), lambda graph: 5 * len(_sites(graph))
    ),
}  # fmt: skip
"""Name -> a method. Adding one is one line."""
