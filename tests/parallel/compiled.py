"""Compiled programs, and what their text says: products, with loops by their length, and what crosses devices."""

import math
import re

import equinox as eqx
import jax

import mechjax as mj
from mechjax.parallel.collectives import KINDS
from mechjax.parallel.operations import operations


def text_of(fn, model, ids, mesh=None):
    """The text of `fn(model, ids)`, compiled for shapes alone; on a mesh, for a model and prompts that `mj.shard` split."""
    arrays, static = eqx.partition(model, lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (arrays, ids))
    if mesh is not None:
        shapes = mj.shard(shapes[0], mesh), mj.shard(shapes[1], mesh, axes="batch pos")
    run = jax.jit(lambda arrays, ids: jax.tree.leaves(fn(eqx.combine(arrays, static), ids)))
    return run.lower(*shapes).compile().as_text()


def flops(text):
    """Floating-point operations of all matrix products of one device."""
    total = 0
    for step in operations(text):
        if step.kind == "dot":
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", step.line)[1]
            (left,) = step.operands[0]
            terms = math.prod(left.shape[int(i)] for i in summed.split(",") if i)
            total += 2 * step.times * math.prod(step.results[0].shape) * terms
        elif step.kind in ("convolution", "custom-call") and "matmul" in step.line:
            raise AssertionError(f"a product that is not counted: {step.line[:300]}")
    return total


def crossing(text):
    """What crosses devices: (kind, depth, shapes of its results), each once."""
    return [
        (step.kind.removesuffix("-start"), step.depth, [array.shape for array in step.results])
        for step in operations(text) if step.kind.removesuffix("-start") in KINDS
    ]  # fmt: skip
