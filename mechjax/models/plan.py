"""What a model will cost before anything is allocated: sites, parameters, memory and arithmetic, from shapes alone.

Operations are those of the program that JAX traces, edits and captures included; a loop over layers counts by its
length. Cost of planning: tracing, under two seconds for 70 billion parameters. Exact for shapes and bytes of
parameters, sites and captures; `cost.peak_bytes` is an estimate, and a described chip (`chip=`) is what a compiler
says. Misleads about time: it knows nothing of bandwidth or of how well a device is used.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from mechjax.base.catalogue import SITES
from mechjax.base.errors import ArgumentError, CheckpointError
from mechjax.base.inputs import Inputs, inputs_of
from mechjax.base.records import Record
from mechjax.base.units import in_bytes, in_flop, in_words
from mechjax.hub import Checkpoint, read_config
from mechjax.interop import Subject
from mechjax.models.load import load_config, locate
from mechjax.models.model_config import ModelConfig
from mechjax.models.quantized import is_quantized, nbytes
from mechjax.models.rewrite.quantize import quantize
from mechjax.models.rounding import Scheme, named_scheme
from mechjax.models.share import Share, Sizes, arranged, shared
from mechjax.models.structures import build
from mechjax.parallel.described import ChipMemory, Placed, memory_per_chip
from mechjax.parallel.layout import layout
from mechjax.transform.captured import Activations
from mechjax.transform.cost import Cost, jaxpr_cost, traced
from mechjax.transform.edits import Edit
from mechjax.transform.static import unhold
from mechjax.transform.transforms import Transformed, capture, intervene, list_sites

_LARGEST, _POSITIONS = 3, 128


@dataclass(frozen=True)
class Planned:
    """A site, or what is captured of it.

    Attributes:
        name: Its name.
        axes: Names of the axes, `layer` first where there are layers.
        shape: Its shape, all layers together.
        dtype: Name of its dtype.
        bytes: What it takes, all layers together.
        on_request: Whether it is formed only when somebody asks for it.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    on_request: bool


class Plan(Record):
    """What a call of a model takes. All fields are static.

    Attributes:
        name: The model.
        tokens: Shape of the tokens, (batch, pos); of what takes none, of its first input, such as pixels.
        dtype: Of the parameters; several where they differ.
        n_params: Number of parameters.
        param_bytes: What they take.
        sites: Every site, in forward order.
        captured: What the call captures.
        cost: Operations of the call, edits and captures included, and memory in between.
        share: What one device holds, where devices were named.
        chip: Memory of one chip of the described topology, where one was given.
        inputs: The dtype of the first input: whole numbers are tokens.
    """

    name: str = eqx.field(static=True)
    tokens: tuple[int, ...] = eqx.field(static=True)
    dtype: str = eqx.field(static=True)
    n_params: int = eqx.field(static=True)
    param_bytes: int = eqx.field(static=True)
    sites: tuple[Planned, ...] = eqx.field(static=True)
    captured: tuple[Planned, ...] = eqx.field(static=True)
    cost: Cost = eqx.field(static=True)
    share: Share | None = eqx.field(static=True, default=None)
    chip: ChipMemory | None = eqx.field(static=True, default=None)
    inputs: str = eqx.field(static=True, default="int32")

    @property
    def flops(self) -> int:
        """Floating-point operations of the call."""
        return self.cost.flops

    @property
    def captured_bytes(self) -> int:
        """Bytes of everything that is captured."""
        return sum(site.bytes for site in self.captured)

    @property
    def site_bytes(self) -> int:
        """Bytes of every site at once, but for those that are formed on request."""
        return sum(site.bytes for site in self.sites if not site.on_request)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per site; where devices were named, with what splits each of its axes."""
        rows = [
            {"site": s.name, "shape": s.shape, "dtype": s.dtype, "bytes": s.bytes, "on_request": s.on_request}
            for s in self.sites
        ]
        if self.share is not None:
            for row, s in zip(rows, self.sites, strict=True):
                row["split"] = self.share.spec(s.axes, s.shape)
        return rows

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The `n` sites that take most, as (name, bytes)."""
        return [(s.name, float(s.bytes)) for s in sorted(self.sites, key=lambda s: -s.bytes)[:n]]

    def facts(self) -> list[tuple[str, str]]:
        """What matters, as (word, sentence)."""
        shape, count = " × ".join(map(str, self.tokens)), math.prod(self.tokens)
        what, each, said = "tokens", "token", f"{shape} = {count:,}"
        if not jnp.issubdtype(self.inputs, jnp.integer):
            what, each, said, count = (
                "inputs",
                "example",
                f"{shape} {self.inputs}",
                math.prod(self.tokens[:1]),
            )
        plain = sorted((s for s in self.sites if not s.on_request), key=lambda s: -s.bytes)[:_LARGEST]
        largest = ", ".join(f"{s.name} {in_bytes(s.bytes)}" for s in plain)
        lines = [
            ("parameters", f"{in_words(self.n_params)}, {in_bytes(self.param_bytes)} in {self.dtype}"),
            (what, said),
            ("forward", f"{in_flop(self.flops)}, {in_flop(self.flops / count)} per {each}; "
                        f"{self.cost.contractions / max(1, self.flops):.1%} in matrix products"),
            ("in between", f"about {in_bytes(self.cost.peak_bytes)} at once, outputs included"),
            ("sites", f"{len(self.sites)}, {in_bytes(self.site_bytes)} together; largest: {largest}"),
        ]  # fmt: skip
        if self.captured:
            names = ", ".join(f"{s.name} {in_bytes(s.bytes)}" for s in self.captured)
            lines.append(("captured", f"{in_bytes(self.captured_bytes)}: {names}"))
        if self.cost.unknown:
            lines.append(("unknown", "; ".join(self.cost.unknown)))
        if self.share is not None:
            lines.append(("per device", self.share.said()))
        if self.chip is not None:
            lines.append(("per chip", _of_chip(self.chip)))
        return lines

    def __repr__(self) -> str:
        return "\n".join([f"Plan of {self.name}", *(f"  {word:<10}  {said}" for word, said in self.facts())])


def plan(
    model: Any,
    tokens: Any = None,
    *,
    capture: str | Sequence[str] | None = None,
    edits: Edit | Sequence[Edit] = (),
    dtype: Any = None,
    devices: str | None = None,
    chip: str | None = None,
    mesh: Sizes = None,
    weights: Literal["int8", "int4"] | None = None,
    group: int | None = None,
) -> Plan:
    """What `run(model, tokens, edits=edits, capture=capture)` takes, before anything is allocated.

    Args:
        model: A name or folder as `load` takes it (of which only the config and the headers of the weights' files are
            read), a config, a subject of `mechjax.interop`, or any callable pytree with sites, transformed ones
            included.
        tokens: A shape such as (batch, pos), or tokens, of which only the shape is looked at. By default one
            prompt of 128 tokens, or of as many as the model has positions, or one image. An encoder-decoder reads as
            many twice. Of what takes no tokens, its inputs, arrays or `jax.ShapeDtypeStruct`s: one, a tuple of
            arguments, or a dictionary of named ones, examples first.
        capture: Sites to capture.
        edits: What to change.
        dtype: Of the parameters, such as "bfloat16"; None keeps the model's own (float32 for a `Config`).
        devices: What it would run on, such as "v5e-256" or "8xH200": the plan says what each of these would hold,
            whether that fits, and which batch would.
        chip: A TPU topology such as "v5e:2x4": the program is compiled for it by `libtpu`, which takes from seconds to
            a minute, and the plan says what one chip must hold. No TPU is needed.
        mesh: How many of those divide the batch and how many the model, or a size for each axis by name; by default as
            many divide the model as can, the others the batch.
        weights: "int8" or "int4" rounds the matrices of blocks, as `load` would.
        group: How many of their neighbours share a scale, as `load` says.

    Returns:
        The plan.

    Raises:
        ArgumentError: A dtype, chip, mesh, `weights` or group that cannot be used.
        SiteError: A site that the model does not have.
        ShapeError: More positions than the model has, or an edit that does not fit.
        MissingExtraError: `chip=` without libtpu.
    """
    if chip is None and devices is None and mesh is not None:
        raise ArgumentError(
            f"mesh={mesh} divides described devices, but none were named: say devices='v5e-8' or chip='v5e:2x4'."
        )
    name, subject = subject_of(model, dtype, named_scheme(weights, group))
    given = _shapes(tokens, subject)
    first = _first(given)
    plain = unhold(subject.fn) if isinstance(subject, Transformed) else subject
    call = intervene(subject, edits)
    if capture:
        call = _capture(call, capture)
    params = weights_of(plain)
    shapes, rest = eqx.partition(call, _is_shape)  # edits keep their numbers, so that they are checked
    out = eqx.filter_eval_shape(lambda shapes, t: _called(eqx.combine(shapes, rest), t), shapes, given)
    taken = out[1] if isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Activations) else None
    return Plan(
        name=name,
        tokens=first.shape,
        inputs=str(first.dtype),
        dtype=", ".join(sorted({f"int{x.bits}" if is_quantized(x) else str(x.dtype) for x in params})),
        n_params=sum(math.prod(x.shape) for x in params),
        param_bytes=nbytes(params),
        sites=_sites(plain, given),
        captured=() if taken is None else _captured(taken),
        cost=jaxpr_cost(traced(_called, call, given)),
        share=None if devices is None else _shared(devices, mesh, plain, call, given),
        chip=None if chip is None else _compiled(call, given, mesh, chip),
    )


_capture = capture


def weights_of(model: Any) -> list[Any]:
    """The parameters of a model of shapes: floats, and matrices in few bits."""
    leaves = jax.tree.leaves(model, is_leaf=is_quantized)
    return [x for x in leaves if hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.inexact)]


def subject_of(model: Any, dtype: Any, how: Scheme | None = None) -> tuple[str, Any]:
    """What the model is called, and the model with shapes in place of arrays, its matrices rounded as `how` says."""
    if how is not None:
        name, subject = subject_of(model, dtype)
        return name, eqx.filter_eval_shape(quantize, subject, how.bits, group=how.group)
    if isinstance(model, Transformed):
        name, fn = subject_of(model.fn, dtype)
        return name, Transformed(fn, model.edits, model.reads)
    held = unhold(model) if callable(model) else model
    name = str(getattr(held, "__name__", type(held).__name__)).lstrip("_")
    if isinstance(model, (str, os.PathLike)):
        name, model, dtype = os.fspath(model), load_config(model), dtype or _stored_dtype(model)
    kind = None if dtype is None else _float(dtype)
    if isinstance(model, ModelConfig):
        config, of = model, kind or jnp.float32
        params = {path: jax.ShapeDtypeStruct(shape, of) for path, shape in config.shapes.items()}
        return name, jax.eval_shape(lambda params: build(config, params), params)

    def shape(x: Any) -> Any:
        if not (eqx.is_array(x) or _is_shape(x)):
            return x
        changed = kind is not None and jnp.issubdtype(x.dtype, jnp.inexact)
        return jax.ShapeDtypeStruct(x.shape, kind if changed else x.dtype)

    return name, jax.tree.map(shape, model)


def _stored_dtype(name_or_folder: str | os.PathLike[str]) -> str:
    """The dtype that `load` would find: as the headers of the weights say or, where there are none, the config."""
    folder = locate(name_or_folder, weights=False)
    try:
        entries = Checkpoint(folder).entries.values()
    except CheckpointError:  # only its small files are here
        config = read_config(folder)
        return str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return max(entries, key=lambda entry: math.prod(entry.shape)).dtype.name


def _float(dtype: Any) -> Any:
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or not jnp.issubdtype(kind, jnp.floating) or jax.dtypes.canonicalize_dtype(kind) != kind:
        raise ArgumentError(
            f"dtype={dtype!r} is no floating dtype that JAX computes with here. Use float32, bfloat16 or float16 "
            "(float64 needs jax_enable_x64)."
        )
    return kind


def _shapes(tokens: Any, subject: Any) -> Inputs:
    """What a model is called with, as shapes."""
    if tokens is None and isinstance(subject, Subject):
        raise ArgumentError(
            f"{type(subject).__name__.lstrip('_')} is a subject, which may take anything: say what, by shapes, such as "
            "plan(subject, (8, 128)) of tokens, or plan(subject, {'pixels': jax.ShapeDtypeStruct((8, 32, 32, 3), "
            "'float32')})."
        )
    config = getattr(subject, "config", None)
    n_pos = min(_POSITIONS, getattr(config, "n_ctx", _POSITIONS))
    usual = (jax.ShapeDtypeStruct((1, n_pos), jnp.int32),)
    one = config.inputs(1, n_pos) if isinstance(config, ModelConfig) else usual
    if tokens is None:
        return inputs_of(one)
    if isinstance(tokens, tuple) and all(isinstance(n, int) for n in tokens):
        if not tokens or min(tokens) < 1:
            raise ArgumentError(f"tokens={tokens} is no shape of tokens: (batch, pos), both at least 1.")
        return inputs_of(tuple(jax.ShapeDtypeStruct(tokens, x.dtype) for x in one))
    given = inputs_of(tokens)
    if not any(eqx.is_array(x) or _is_shape(x) for x in jax.tree.leaves(given)):
        raise ArgumentError(
            f"tokens must be a shape such as (8, 1024), an array or Prompts, not a {type(tokens).__name__}. Of what "
            "takes no tokens: its arguments, as arrays or jax.ShapeDtypeStruct, one, a tuple or a dictionary of them."
        )
    if len(given.args) == 1 and not given.kwargs:  # of a model of two texts, both
        given = Inputs(given.args * len(one), {})
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) or _is_shape(x) else x, given
    )


def _first(given: Inputs) -> Any:
    """The first array that goes in, whose first axis is the examples."""
    return next(x for x in jax.tree.leaves(given) if _is_shape(x))


def _called(fn: Any, given: Inputs) -> Any:
    return fn(*given.args, **given.kwargs)


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def _sites(model: Any, tokens: Any) -> tuple[Planned, ...]:
    found = list_sites(_called, model, tokens)
    rows = []
    for name, info in found.items():
        layers = () if not info.stacked or info.layers is None else (info.layers,)
        axes = (*("layer",) * len(layers), *("batch",) * (len(info.shape) - len(info.axes)), *info.axes)
        array = jax.ShapeDtypeStruct((*layers, *info.shape), info.dtype)
        on_request = name in SITES and SITES[name].costly
        rows.append(Planned(name, axes, array.shape, str(array.dtype), _bytes(array), on_request))
    return tuple(rows)


def _captured(taken: Any) -> tuple[Planned, ...]:
    return tuple(
        Planned(name, taken.axis_names("arrays", name) or (), x.shape, str(x.dtype), _bytes(x), False)
        for name, x in ((site.name, taken.arrays[site.name]) for site in taken.sites)
    )


def _shared(devices: str, mesh: Sizes, model: Any, call: Any, tokens: Any) -> Share:
    """What one device holds of the call."""
    if _first(tokens).ndim < 2:
        raise ArgumentError(f"devices={devices!r} share examples: give tokens as (batch, pos).")

    def resized(x: Any, batch: int) -> Any:
        return jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) if _is_shape(x) else x

    def program(batch: int) -> Any:
        return traced(_called, call, jax.tree.map(lambda x: resized(x, batch), tokens))

    return shared(devices, mesh, eqx.filter(model, _is_shape), _first(tokens).shape[0], program)


def _compiled(call: Any, tokens: Inputs, mesh: Sizes, chip: str) -> ChipMemory:
    """What a chip's compiler says: weights over `model`, examples over `data`."""
    if tokens.kwargs:
        raise ArgumentError(
            f"chip={chip!r} compiles calls of positional arguments alone; {', '.join(tokens.kwargs)} came by name."
        )
    arrays, static = eqx.partition(call, lambda x: eqx.is_array(x) or _is_shape(x))
    batch = _first(tokens).shape[0]
    sizes = arranged(mesh, arrays, batch, _n_chips(chip), f"chip={chip!r}")
    n_data, n_model = sizes.get("data", 1), sizes.get("model", 1)
    if n_data * n_model != math.prod(sizes.values()):
        raise ArgumentError(f"mesh={mesh}: chip= compiles for the axes data and model alone.")
    if batch % n_data:
        raise ArgumentError(f"A batch of {batch} cannot be divided over {n_data} chips (mesh={mesh}).")

    def place(x: Any, spec: Any) -> Placed:
        return Placed(tuple(x.shape), str(x.dtype), spec)

    placed = jax.tree.map(place, arrays, layout(arrays, sizes))
    given = jax.tree.map(lambda x: place(x, ("data", *(None,) * (len(x.shape) - 1))), tokens.args)
    return memory_per_chip((eqx.combine(placed, static), *given), chip, (n_data, n_model))


def _n_chips(chip: str) -> int:
    """How many chips a topology's name describes; 1 where it cannot be read, which libtpu then refuses."""
    sizes = chip.partition(":")[2].split("x")
    return math.prod(int(n) for n in sizes) if all(n.isdecimal() for n in sizes) else 1


def _of_chip(chip: ChipMemory) -> str:
    where = f"{chip.chip} ({chip.kind}), {chip.mesh[0]} × {chip.mesh[1]} for batch × model"
    if not chip.fits or chip.total is None:
        return f"does not fit on {where}: {_shortened(chip.problem)}"
    parts = (("arguments", chip.arguments), ("outputs", chip.outputs), ("in between", chip.temporaries))
    split = ", ".join(f"{word} {in_bytes(n or 0)}" for word, n in parts)
    return f"{in_bytes(chip.total)} on {where}: {split}"


def _shortened(problem: str) -> str:
    """The compiler's sentence without codes before it and the name of the program after it."""
    said = re.search(r"Ran out of memory.*?(?= HLO module|$)", problem)
    return (said.group() if said else problem).rstrip(".")
