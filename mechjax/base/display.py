"""How a record shows itself: a short text, a small table for notebooks, labelled rows and extremes."""

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, get_args

import jax
import numpy as np
from jax.core import Tracer

from mechjax.base.axes import label, names_from_annotation
from mechjax.base.errors import ArgumentError
from mechjax.base.whole import whole

_MOST_LINES = 17
_WIDEST = 40  # rows or columns of a heat map
LEADING = 12  # of many numbers with names, how many are shown
_MANY = {"batch", "d_model", "d_vocab"}  # axes along which single numbers say little
_STYLE = "border-collapse:collapse;font:13px system-ui,sans-serif"
_CELL = "padding:.15em .8em .15em 0;text-align:left;vertical-align:top;border:0"
_HEAT = "padding:.25em .5em;text-align:center;font-weight:400;border:0"


def is_array(value: object) -> bool:
    """Whether `value` has numbers to show: an array that is neither traced nor abstract nor spread over hosts."""
    if isinstance(value, jax.Array):
        return not isinstance(value, Tracer) and value.is_fully_addressable
    return isinstance(value, np.ndarray)


def names_by_annotation(record: Any, field: str, key: str | None = None) -> tuple[str, ...] | None:
    """Names of the axes of an array field, from its annotation; a starred name may be a static field (`over`)."""
    value: Any = getattr(record, field) if key is None else getattr(record, field)[key]
    annotation: Any = next(f.type for f in dataclasses.fields(record) if f.name == field)
    if key is not None:  # a table of arrays: the annotation of its values
        annotation = next(reversed(get_args(annotation)), None)
    dims = getattr(annotation, "dim_str", None)
    if dims is None or not hasattr(value, "ndim"):
        return None
    words = [w[1:] for w in dims.split() if w.startswith("*")]
    return names_from_annotation(
        dims, value.ndim, {w: getattr(record, w) for w in words if hasattr(record, w)}
    )


def main_field(record: Any) -> str:
    """The first array field with named axes: what a record is about.

    Raises:
        ArgumentError: The record has none.
    """
    for field in dataclasses.fields(record):
        if is_array(getattr(record, field.name)) and record.axis_names(field.name):
            return field.name
    raise ArgumentError(f"{type(record).__name__} has no array with named axes, so it has no rows to list.")


def rows(record: Any, names: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """One dictionary per cell of the main field: its place, then every array field with the same axes."""
    main = main_field(record)
    axes = record.axis_names(main) or ()
    fields = [f.name for f in dataclasses.fields(record) if is_array(getattr(record, f.name))]
    arrays = {f: whole(getattr(record, f)) for f in fields if record.axis_names(f) == axes}
    places = np.ndindex(arrays[main].shape)
    return [
        {axis: names[axis][i] if axis in names else i for axis, i in zip(axes, place, strict=True)}
        | {field: array[place].item() for field, array in arrays.items()}
        for place in places
    ]


def top(record: Any, n: int, names: Mapping[str, Sequence[str]]) -> list[tuple[str, float]]:
    """The `n` cells of the main field that are largest in size (NaN never is), as (label, value)."""
    main = main_field(record)
    return largest(getattr(record, main), record.axis_names(main) or (), n, names)


def largest(
    values: Any, axes: Sequence[str], n: int, names: Mapping[str, Sequence[str]]
) -> list[tuple[str, float]]:
    """The `n` cells of an array that are largest in size (NaN never is), as (label, value)."""
    values = whole(values, np.float64)
    size = np.where(np.isnan(values), -1.0, np.abs(values)).ravel()
    order = [i for i in np.argsort(-size, kind="stable")[:n] if size[i] >= 0]
    places = [tuple(int(j) for j in np.unravel_index(i, values.shape)) for i in order]
    return [(label(axes, place, names), float(values[place])) for place in places]


def _kind(value: Any, axes: tuple[str, ...] | None) -> str:
    sizes = (
        [f"{a}={s}" for a, s in zip(axes, value.shape, strict=True)]
        if axes
        else [str(s) for s in value.shape]
    )
    return f"{value.dtype}[{', '.join(sizes)}]"


def _range(value: Any, axes: tuple[str, ...] | None, names: Mapping[str, Sequence[str]]) -> str:
    """Where an array's extremes are, in one phrase."""
    if not is_array(value) or value.size == 0 or not jax.numpy.issubdtype(value.dtype, np.number):
        return ""
    numbers = whole(value, np.float64)
    gaps = int(np.isnan(numbers).sum())
    if gaps == numbers.size:
        return "all NaN"
    if numbers.ndim == 0:
        return f"{numbers.item():.4g}"
    low, high = int(np.nanargmin(numbers)), int(np.nanargmax(numbers))
    text = f"{numbers.flat[low]:.4g} to {numbers.flat[high]:.4g}"
    if axes and "d_model" not in axes:
        place = [int(i) for i in np.unravel_index(high, numbers.shape)]
        text += f", highest at {label(axes, place, names)}"
    return text + (f", {gaps} NaN" if gaps else "")


def _short(value: object, width: int = 72) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        leaves = [x for x in jax.tree.leaves(value) if hasattr(x, "shape")]
        if leaves:
            return f"{type(value).__name__} of {len(leaves)} arrays"
    text = " ".join(repr(value).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def facts(record: Any, names: Mapping[str, Sequence[str]]) -> list[tuple[str, str, str]]:
    """(field, what it is, where its extremes are) for every field, arrays first; a table of arrays line by line."""
    lines: list[tuple[str, str, str]] = []
    plain: list[tuple[str, str, str]] = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        arrays: dict[Any, Any] = value if isinstance(value, dict) and value else {None: value}
        if not all(hasattr(array, "shape") and hasattr(array, "dtype") for array in arrays.values()):
            plain.append((field.name, _short(value), ""))
            continue
        for key, array in arrays.items():
            axes = record.axis_names(field.name, key)
            spelled = field.name if key is None else f"{field.name}[{key!r}]"
            lines.append((spelled, _kind(array, axes), _range(array, axes, names)))
    return lines + plain


def as_text(record: Any, names: Mapping[str, Sequence[str]]) -> str:
    """Under 20 lines: what it is, shapes, where the extremes are."""
    lines = facts(record, names)
    shown = list(islice(lines, _MOST_LINES))
    wide = max((len(f) for f, _, _ in shown), default=0)
    kinds = max((len(k) for _, k, r in shown if r), default=0)
    text = [type(record).__name__, *(f"  {f:<{wide}}  {k:<{kinds}}  {r}".rstrip() for f, k, r in shown)]
    if len(lines) > len(shown):
        text.append(f"  … and {len(lines) - len(shown)} more fields")
    return "\n".join(text)


def as_html(
    record: Any, names: Mapping[str, Sequence[str]], leading: Sequence[tuple[str, float]] | None = None
) -> str:
    """The same for notebooks, with a picture of the main field. All text is escaped.

    Two axes make a heat map. Numbers with names, and those over more axes than two, are told by those that are largest
    in size; `leading` gives others.
    """
    lines = islice(facts(record, names), _MOST_LINES)
    table = "".join(_row(f"<td style={_CELL!r}>{html.escape(cell)}</td>" for cell in line) for line in lines)
    title = f"<b>{html.escape(type(record).__name__)}</b>"
    picture = _picture(record, names) if leading is None else _leading(leading)
    return f"<div>{title}<table style={_STYLE!r}>{table}</table>{picture}</div>"


def _picture(record: Any, names: Mapping[str, Sequence[str]]) -> str:
    try:
        main = main_field(record)
    except ArgumentError:
        return ""
    axes, values = record.axis_names(main) or (), whole(getattr(record, main), np.float64)
    named = values.ndim == 1 and values.size > 1 and set(axes) <= set(names)
    if named or (values.ndim > 2 and values.size and not _MANY & set(axes)):
        return _leading(record.top(LEADING))
    if values.ndim != 2 or max(values.shape) > _WIDEST or not values.size:
        return ""
    full = float(np.abs(np.nan_to_num(values)).max(initial=0.0))
    heads = [
        [label((axis,), (i,), names) for i in range(n)] for axis, n in zip(axes, values.shape, strict=True)
    ]
    top_row = _row(f"<th style={_HEAT!r}>{html.escape(head)}</th>" for head in ("", *heads[1]))
    rows = (
        _row([f"<th style={_HEAT!r}>{html.escape(h)}</th>", *(_heat(x, full, f"{x:.2f}") for x in v)])
        for h, v in zip(heads[0], values, strict=True)
    )
    return f"<div style='overflow-x:auto'><table style={_STYLE!r}>{top_row}{''.join(rows)}</table></div>"


def _leading(found: Sequence[tuple[str, float]]) -> str:
    """Numbers with their names, as a table."""
    full = max((abs(value) for _, value in found), default=0.0)
    lines = (
        _row([f"<td style={_CELL!r}>{html.escape(name)}</td>", _heat(value, full, f"{value:.4g}")])
        for name, value in found
    )
    return f"<table style={_STYLE!r}>{''.join(lines)}</table>"


def _heat(value: float, full: float, text: str) -> str:
    hue, share = (
        ("#2f7bd6" if value >= 0 else "#d9602e"),
        0.0 if np.isnan(value) else abs(value) / (full or 1.0),
    )
    # Mixed with nothing, so that it suits light and dark notebooks alike.
    style = f"{_HEAT};background:color-mix(in srgb,{hue} {80 * share:.0f}%,transparent)"
    return f"<td style={style!r}>{text}</td>"


def _row(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>"
