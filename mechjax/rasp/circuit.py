"""The true circuit of a schedule: which node reads and writes which variable, and the edges that follow.

Nodes, readers and edges are those of the model's graph. Since variables share no direction, there is an edge exactly
where the product of what one writes and the other reads is not zero. What a layer's biases add belongs to no node.
"""

from collections.abc import Collection

import numpy as np
from jaxtyping import Bool

from mechjax.graph.build import Graph
from mechjax.rasp.schedule import Schedule

Touched = tuple[tuple[str, tuple[str, ...]], ...]
"""For each node, or side of a head, the names of the variables."""


def writes(plan: Schedule) -> Touched:
    """What each node writes."""
    found: dict[str, list[str]] = {}
    for _, variable in plan.embedded:
        found.setdefault("input", []).append(variable.name)
    for node, head in heads(plan):
        if head.W_O.any():
            found.setdefault(node, []).append(head.writes.name)
    for layer, neurons in plan.neurons:
        if neurons.W_out.any() or neurons.b_out.any():
            found.setdefault(f"m{layer}", []).append(neurons.writes.name)
    return _frozen(found)


def reads(plan: Schedule) -> Touched:
    """What each MLP, each side of a head and the logits read."""
    found: dict[str, list[str]] = {}
    for node, head in heads(plan):
        for letter, side in {"q": head.q, "k": head.k, "v": head.v}.items():
            if side.reads is not None and side.W.any():
                found.setdefault(f"{node}<{letter}>", []).append(side.reads.name)
    for layer, neurons in plan.neurons:
        for variable, W in zip(neurons.reads, neurons.W_in, strict=True):
            if W.any():
                found.setdefault(f"m{layer}", []).append(variable.name)
    return _frozen(found | {"logits": [plan.output.name]})


def carrying(
    graph: Graph, written: Touched, read: Touched, only: Collection[str] | None = None
) -> Bool[np.ndarray, " edge"]:
    """Whether each edge carries a variable, or one of `only` these."""
    gives, takes = dict(written), dict(read)
    pairs = ((graph.nodes[u], graph.readers[v]) for u, v, _ in graph.table)
    carried = (set(gives.get(u, ())) & set(takes.get(v, ())) for u, v in pairs)
    return np.array([bool(names if only is None else names.intersection(only)) for names in carried])


def heads(plan: Schedule):
    """Every head with its node's name."""
    counted: dict[int, int] = {}
    for layer, head in plan.heads:
        i = counted.setdefault(layer, 0)
        counted[layer] += 1
        yield f"a{layer}.h{i}", head


def _frozen(found: dict[str, list[str]]) -> Touched:
    return tuple((node, tuple(dict.fromkeys(names))) for node, names in found.items())
