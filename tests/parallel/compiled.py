"""Compiled programs, and what their text says: products, with loops by their length, and what crosses devices."""

import math
import re
from typing import NamedTuple

import equinox as eqx
import jax

import mechjax as mj

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.-]+)")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Step(NamedTuple):
    """An operation of a program.

    Attributes:
        times: How often it runs: the product of the lengths of the loops around it.
        depth: How many loops stand around it.
        kind: What it is.
        shapes: Of its results.
        operands: Shapes of what it is given.
        line: All that the text says of it.
    """

    times: int
    depth: int
    kind: str
    shapes: list[tuple[int, ...]]
    operands: list[list[tuple[int, ...]]]
    line: str


def text_of(fn, model, ids, mesh=None):
    """The text of `fn(model, ids)`, compiled for shapes alone; on a mesh, for a model and prompts that `mj.shard` split."""
    arrays, static = eqx.partition(model, lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (arrays, ids))
    if mesh is not None:
        shapes = mj.shard(shapes[0], mesh), mj.shard(shapes[1], mesh, axes="batch pos")
    run = jax.jit(lambda arrays, ids: jax.tree.leaves(fn(eqx.combine(arrays, static), ids)))
    return run.lower(*shapes).compile().as_text()


def steps(text):
    """Every operation of a program, those of computations that are called once for each call.

    A loop whose length is known only when it runs counts once.
    """
    bodies, entry = {}, None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := _LINE.match(line):
            lines.append(found)

    def walk(name, times, depth):
        shapes = {line[1]: _shapes(line[2]) for line in bodies[name]}
        for line in bodies[name]:
            said = line[4].partition(", metadata=")[0]
            given = [shapes.get(x, []) for x in re.findall(r"%([\w.-]+)", said.partition(")")[0])]
            yield Step(times, depth, line[3], shapes[line[1]], given, line[0])
            length = re.search(r"known_trip_count\W+n\W+(\d+)", line[4])
            inner = times * int(length[1]) if length else times
            for how, names in _CALLED.findall(said):
                inside = how in ("body", "condition")
                for called in names.strip("{}").split(","):
                    yield from walk(called.strip().lstrip("%"), inner if inside else times, depth + inside)

    return list(walk(entry, 1, 0))


def flops(text):
    """Floating-point operations of all matrix products of one device."""
    total = 0
    for step in steps(text):
        if step.kind == "dot":
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", step.line)[1]
            (left,) = step.operands[0]
            total += (
                2
                * step.times
                * math.prod(step.shapes[0])
                * math.prod(left[int(i)] for i in summed.split(",") if i)
            )
        elif step.kind in ("convolution", "custom-call") and "matmul" in step.line:
            raise AssertionError(f"a product that is not counted: {step.line[:300]}")
    return total


def crossing(text):
    """What crosses devices: (kind, depth, shapes of its results), each once."""
    return [
        (step.kind.removesuffix("-start"), step.depth, step.shapes)
        for step in steps(text) if step.kind.removesuffix("-start") in _COLLECTIVES
    ]  # fmt: skip


def _shapes(said):
    return [
        tuple(int(n) for n in dims.split(",") if n) for dims in re.findall(r"[a-z]+\d*\w*\[([\d,]*)\]", said)
    ]
