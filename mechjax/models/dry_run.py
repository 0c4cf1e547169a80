"""What a call of any method takes, before anything is allocated: `dry_run(method, model, ...)` in place of the call.

The method is traced with its model by shapes alone; prompts and what else is given are used as they are, so that the
program is the one that would run (but for what depends on the model's numbers). Cost: tracing, seconds for 70 billion
parameters. Exact for outputs, operations and parameters' bytes; memory in between is an estimate (`models/share`).
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record
from mechjax.base.units import in_bytes, in_flop, in_words
from mechjax.models.plan import subject_of, weights_of
from mechjax.models.quantized import nbytes
from mechjax.models.share import Share, Sizes, shared
from mechjax.transform.cost import Cost, jaxpr_cost, n_programs, traced


class DryRun(Record):
    """What a call takes. All fields are static.

    Attributes:
        method: What would be called.
        model: Of which model.
        n_params: Its number of parameters.
        param_bytes: What they take.
        outputs: The arrays that come out: (name, shape, dtype).
        output_bytes: What they take.
        cost: Operations, and memory in between.
        programs: How many programs with matrix products would be compiled.
        share: What one device holds, where devices were named.
    """

    method: str = eqx.field(static=True)
    model: str = eqx.field(static=True)
    n_params: int = eqx.field(static=True)
    param_bytes: int = eqx.field(static=True)
    outputs: tuple[tuple[str, tuple[int, ...], str], ...] = eqx.field(static=True)
    output_bytes: int = eqx.field(static=True)
    cost: Cost = eqx.field(static=True)
    programs: int = eqx.field(static=True)
    share: Share | None = eqx.field(static=True, default=None)

    def facts(self) -> list[tuple[str, str]]:
        """What matters, as (word, sentence)."""
        arrays = ", ".join(f"{name} {list(shape)}" for name, shape, _ in self.outputs[:4])
        more = f" and {len(self.outputs) - 4} more" if len(self.outputs) > 4 else ""
        lines = [
            ("parameters", f"{in_words(self.n_params)}, {in_bytes(self.param_bytes)}"),
            ("operations", f"{in_flop(self.cost.flops)}; "
                           f"{self.cost.contractions / max(1, self.cost.flops):.1%} in matrix products"),
            ("programs", f"{self.programs} to compile"),
            ("in between", f"about {in_bytes(self.cost.peak_bytes)} at once, outputs included"),
            ("gives", f"{in_bytes(self.output_bytes)}: {arrays}{more}"),
        ]  # fmt: skip
        if self.cost.unknown:
            lines.append(("unknown", "; ".join(self.cost.unknown)))
        if self.share is not None:
            lines.append(("per device", self.share.said()))
        return lines

    def __repr__(self) -> str:
        rows = [f"  {word:<10}  {said}" for word, said in self.facts()]
        return "\n".join([f"Dry run of {self.method} on {self.model}", *rows])


def dry_run(
    method: Callable[..., Any],
    model: Any,
    *args: Any,
    devices: str | None = None,
    mesh: Sizes = None,
    dtype: Any = None,
    **kwargs: Any,
) -> DryRun:
    """What `method(model, *args, **kwargs)` takes; nothing is allocated, and no weights are read.

    Args:
        method: A function of mechjax that takes a model first, such as `mj.patching.activation_patch`, or your own.
        model: A name or folder as `load` takes it, a `Config`, or a model, of arrays or of shapes.
        *args: What else the method takes. Prompts may be `jax.ShapeDtypeStruct`s.
        devices: What it would run on, such as "v5e-256" or "8xH200": the result says what each would hold, whether
            that fits, and which `chunk_size` would, where the method has one, or else which batch.
        mesh: How these are arranged: (data, model), or a size for each axis by name.
        dtype: Of the parameters; None keeps the model's own.
        **kwargs: What else the method takes.

    Returns:
        What it takes.

    Raises:
        ArgumentError: Devices or a mesh that cannot be used, or whatever the method refuses.
    """
    if mesh is not None and devices is None:
        raise ArgumentError(f"mesh={mesh} divides devices, but none were named: say devices='v5e-8'.")
    name, subject = subject_of(model, dtype)
    params = eqx.filter(subject, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    weights = weights_of(params)
    given = eqx.partition((args, kwargs), lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def call(subject: Any, shapes: Any, **more: Any) -> Any:
        args, kwargs = eqx.combine(shapes, given[1])
        return method(subject, *args, **(kwargs | more))

    def program(**more: Any) -> Any:
        return traced(eqx.Partial(call, **more), subject, given[0])

    closed = program()
    out = eqx.filter_eval_shape(call, subject, given[0])
    arrays = [(path, x) for path, x in jax.tree_util.tree_leaves_with_path(out) if hasattr(x, "shape")]
    return DryRun(
        method=getattr(method, "__name__", type(method).__name__),
        model=name,
        n_params=sum(math.prod(x.shape) for x in weights),
        param_bytes=nbytes(weights),
        outputs=tuple(
            (jax.tree_util.keystr(p).lstrip(".") or "it", tuple(x.shape), str(x.dtype)) for p, x in arrays
        ),
        output_bytes=sum(_bytes(x) for _, x in arrays),
        cost=jaxpr_cost(closed),
        programs=n_programs(closed),
        share=None if devices is None else _share(devices, mesh, params, method, given, closed, program),
    )


def _share(
    devices: str, mesh: Sizes, params: Any, method: Any, given: Any, closed: Any, program: Callable[..., Any]
) -> Share:
    """What one device holds; where that is too much, the chunk that would fit is found from two smaller ones."""
    batch = next((x.shape[0] for x in jax.tree.leaves(given) if getattr(x, "ndim", 0) > 1), 1)
    if "chunk_size" not in inspect.signature(method).parameters:
        return shared(devices, mesh, params, batch, lambda n: closed, what="smaller call")
    asked = given[1][1].get("chunk_size")
    sizes = lambda n: closed if n in (0, asked) else program(chunk_size=n)
    return shared(devices, mesh, params, batch, sizes, what="chunk_size", now=asked or 0)


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize
