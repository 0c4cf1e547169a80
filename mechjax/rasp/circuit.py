"""The true circuit of a schedule: which node reads and writes which variable, and the edges that follow.

Nodes are `input` (token and position embeddings), heads `a0.h1`, MLPs `m0` and `logits`; an edge to a head says by
which side it reads: `input->a0.h1<k>`. Since variables share no direction, there is an edge exactly where the product
of what one writes and the other reads is not zero. What a layer's biases add belongs to no node.
"""

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


def edges(written: Touched, read: Touched) -> tuple[str, ...]:
    """Every edge that carries something, `writer->reader`."""
    return tuple(
        f"{writer}->{reader}"
        for reader, wanted in read
        for writer, given in written
        if not set(wanted).isdisjoint(given)
    )


def heads(plan: Schedule):
    """Every head with its node's name."""
    counted: dict[int, int] = {}
    for layer, head in plan.heads:
        i = counted.setdefault(layer, 0)
        counted[layer] += 1
        yield f"a{layer}.h{i}", head


def _frozen(found: dict[str, list[str]]) -> Touched:
    return tuple((node, tuple(dict.fromkeys(names))) for node, names in found.items())
