"""Which layer computes what: every expression as early as what it reads allows, attention before the MLP of its layer.

The depth is the longest chain of expressions. A `SelectorWidth` is two steps: a head that writes d / (1 + d) of d
selected keys, and neurons that read d off it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mechjax.base.errors import ArgumentError
from mechjax.rasp.expressions import (
    NOTHING,
    Aggregate,
    Expression,
    Indices,
    LinearSequenceMap,
    Map,
    Select,
    SelectorWidth,
    SequenceMap,
    SOp,
    Tokens,
    ordered,
)
from mechjax.rasp.heads import Head, counting, mixing
from mechjax.rasp.neurons import Neurons, adding, looking_up, looking_up_pairs, room, stepping
from mechjax.rasp.values import Values, given
from mechjax.rasp.variables import Variable

_ENOUGH = 0.02
"""Attention that goes astray blurs categories by as much; with so little they are told apart a few layers later too."""
_EMBEDDED = -1


@dataclass
class Schedule:
    """Variables, and the heads and neurons that compute them, while they are being placed.

    Attributes:
        values: The values that sequences can take.
        variables: All variables, in the order of their directions; the program's own is the last.
        made_for: For each variable's name, the identity of the expression whose values it holds or is read off.
        embedded: Which of them are the tokens, and which the indices.
        heads, neurons: What computes them, each with its layer.
        causal: Whether positions see only those up to themselves.
        rooms: For numbers that a map tells apart, by identity: how far each may be off.
    """

    values: Values
    causal: bool
    rooms: dict[int, float]
    variables: list[Variable] = field(default_factory=list)
    made_for: dict[str, int] = field(default_factory=dict)
    embedded: list[tuple[type, Variable]] = field(default_factory=list)
    heads: list[tuple[int, Head]] = field(default_factory=list)
    neurons: list[tuple[int, Neurons]] = field(default_factory=list)
    _made: dict[int, tuple[Variable, int]] = field(default_factory=dict)

    @property
    def output(self) -> Variable:
        """The program's variable."""
        return self.variables[-1]

    @property
    def n_layers(self) -> int:
        """How many layers there are; at least one."""
        return 1 + max((layer for layer, _ in (*self.heads, *self.neurons)), default=0)

    def place(self, node: SOp) -> None:
        """Give an expression its variable, and what computes it a layer."""
        before = self._ready(node)
        if isinstance(node, SelectorWidth):
            self._made[id(node)] = self._count(node, before)
            return
        target = self._target(node)
        time = _EMBEDDED
        if isinstance(node, Aggregate):
            time = self._attend(before, self._mixing(node, target))
        elif node.operands:
            time = self._compute(before, self._mapping(node, target))
        else:
            self.embedded.append((type(node), target))
        self._made[id(node)] = target, time

    def _count(self, node: SelectorWidth, before: int) -> tuple[Variable, int]:
        counts = range(self.values.max_length + 1)
        shares = [d / (1 + d) for d in counts]
        share, target = self._variable(node, f"{node.label}.share", (), numerical=True), self._target(node)
        head = counting(
            node.selector, self._sides(node.selector), share, room(shares, counts), causal=self.causal
        )
        time = self._attend(before, head)
        return target, self._compute(time, stepping(node.label, share, target, shares, counts))

    def _target(self, node: SOp) -> Variable:
        values = () if node.numerical else self.values.of(node)
        return self._variable(node, node.label, values, numerical=node.numerical)

    def _variable(self, node: SOp, name: str, values: tuple[Any, ...], *, numerical: bool) -> Variable:
        """One after all others, under a name of its own."""
        taken, unique, i = {variable.name for variable in self.variables}, name, 1
        while unique in taken:
            unique, i = f"{name} {i + 1}", i + 1
        start = self.variables[-1].stop if self.variables else 0
        self.variables.append(Variable(unique, start, values, numerical))
        self.made_for[unique] = id(node)
        return self.variables[-1]

    def _ready(self, node: Expression) -> int:
        """The time at which the last of what it reads is there: layer i attends at 2i, and its MLP is at 2i + 1."""
        times = [self._ready(x) if isinstance(x, Select) else self._made[id(x)][1] for x in node.operands]
        return max(times, default=_EMBEDDED)

    def _attend(self, before: int, head: Head) -> int:
        layer = (before + 2) // 2
        self.heads.append((layer, head))
        return 2 * layer

    def _compute(self, before: int, neurons: Neurons) -> int:
        layer = (before + 1) // 2
        self.neurons.append((layer, neurons))
        return 2 * layer + 1

    def _of(self, node: SOp) -> Variable:
        return self._made[id(node)][0]

    def _sides(self, selector: Select) -> tuple[Variable, Variable]:
        return self._of(selector.keys), self._of(selector.queries)

    def _mixing(self, node: Aggregate, target: Variable) -> Head:
        tolerance = _ENOUGH
        if id(node) in self.rooms:
            default = () if node.default is NOTHING else (node.default,)
            mixed = (*self.values.of(node.values), *default)
            span = max(mixed) - min(mixed)
            tolerance = min(tolerance, self.rooms[id(node)] / span if span else 1.0)
        return mixing(
            node, self._sides(node.selector), self._of(node.values), target, tolerance, causal=self.causal
        )

    def _mapping(self, node: SOp, target: Variable) -> Neurons:
        if isinstance(node, Map) and node.of.numerical:
            return stepping(node.label, self._of(node.of), target, *_numbers(node, self.values))
        reads = [self._of(x) for x in node.operands if isinstance(x, SOp)]
        make: Callable[..., Neurons] = _MAKERS[type(node)]
        return make(node, *reads, target)


_MAKERS: dict[type, Callable[..., Neurons]] = {
    Map: looking_up,
    SequenceMap: looking_up_pairs,
    LinearSequenceMap: adding,
}


def schedule(program: SOp, values: Values, *, causal: bool) -> Schedule:
    """The schedule of a program.

    Raises:
        ArgumentError: An expression that cannot be compiled, by name, and why.
    """
    nodes = ordered(program)
    for node in nodes:
        _check_encodings(node)
    for node in nodes:
        if isinstance(node, SOp) and not isinstance(node, Aggregate | LinearSequenceMap):
            values.of(node)
    plan = Schedule(values, causal, _rooms(nodes, values))
    for node in nodes:
        if isinstance(node, SOp):
            plan.place(node)
    return plan


def _numbers(node: Map, values: Values) -> tuple[Sequence[float], Sequence[Any]]:
    """The numbers that a map reads, and what each gives."""
    numbers = values.of(node.of)
    return numbers, [given(node.fn, x) for x in numbers]


def _rooms(nodes: Sequence[Expression], values: Values) -> dict[int, float]:
    """How far numbers may be off before a map gives another value, back through the sums that they are in."""
    rooms: dict[int, float] = {}
    for node in reversed(nodes):
        if isinstance(node, Map) and node.of.numerical:
            own = room(*_numbers(node, values))
        elif isinstance(node, LinearSequenceMap) and id(node) in rooms:
            own = rooms[id(node)] / max(abs(node.weight_first) + abs(node.weight_second), 1e-9)
        else:
            continue
        for operand in node.operands:
            rooms[id(operand)] = min(own, rooms.get(id(operand), math.inf))
    return rooms


_READS_CATEGORIES = {
    Select: "compares one-hot keys and queries",
    SequenceMap: "looks up pairs of categories",
}
_ENCODED = {Tokens: "categorical", Indices: "categorical", LinearSequenceMap: "numerical"}


def _check_encodings(node: Expression) -> None:
    kind = type(node)
    for operand in node.operands:
        if not isinstance(operand, SOp):
            continue
        if kind in _READS_CATEGORIES and operand.numerical:
            raise ArgumentError(
                f"`{node.label}` ({kind.__name__}) cannot be compiled: it {_READS_CATEGORIES[kind]}, and "
                f"`{operand.label}` is numerical. Make it categorical first: Map(lambda x: x, {operand.label})."
            )
        if isinstance(node, LinearSequenceMap) and not operand.numerical:
            raise ArgumentError(
                f"`{node.label}` (LinearSequenceMap) cannot be compiled: it adds numbers, and `{operand.label}` is "
                f'categorical. Make it numerical first: Map(lambda x: x, {operand.label}, encoding="numerical").'
            )
    if isinstance(node, SOp) and node.encoding != _ENCODED.get(kind, node.encoding):
        raise ArgumentError(
            f"`{node.label}` ({kind.__name__}) cannot be compiled: it is always {_ENCODED[kind]}, not {node.encoding}. "
            f'Map it: Map(lambda x: x, {node.label}, encoding="{node.encoding}").'
        )
