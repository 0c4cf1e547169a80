"""The scoreboard as a page of markdown, made from its committed rows alone."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mechjax.base.atomic import replace_file
from mechjax.base.errors import CheckpointError, WriteError
from mechjax.base.provenance import provenance_of
from mechjax.base.signed import signed, unsigned
from mechjax.studies.scoreboard import Scoreboard

Row = dict[str, Any]

FORMAT = "mechjax scoreboard 1"
DRAWS = 2000
"""Resamplings of a bootstrap interval."""

_COLUMNS = {"edge_auroc": "edge AUROC", "node_auroc": "node AUROC", "pearson": "Pearson with exact",
            "spearman": "rank correlation with exact"}  # fmt: skip
_ABOUT = """# Scoreboard

How well methods find circuits that are known. Made by `mechjax scoreboard`; the tests make it again from
`results/scoreboard.json` and compare.

AUROC is the chance that an edge (node) of the true circuit gets a larger size than one that is not in it, ties as half:
0.5 is chance, 1 is right. Nodes are heads and MLPs, by what they write. Edges of the circuit that carry the same in
both prompts of every pair, such as positions, are left out, and nodes with only such edges. Correlations are with exact
effects, over all edges; for methods that give no edges, over nodes; for those that give sizes, with the exact sizes.
Each number is a mean with its 95 % bootstrap interval (percentiles), where that is wider than what is printed: over
models, whole models drawn anew, in the first table; over seeds in the others. Passes are counted for the scores of
edges (of nodes where there are none), a backward pass as two. Seconds are for edges and nodes on two cores that had
other work, without compilation (median). All is in double precision: gradients of saturated softmaxes are smaller than
what float32 rounds.

`rasp/`: programs, compiled at a coldness of 12 in a random basis. `planted/`: circuits in random transformers of so
many layers x heads. `gate/`: what single edges or gradients are known to miss (`mechjax.graph.gates`). A cell is empty
where a method gives no such scores, where all nodes of a model are in its circuit, or where a method has no rules for
it: GIM has none for attention sinks, which most programs need. So means of GIM are over other models than those beside.
"""


def page(rows: Sequence[Row]) -> str:
    """The page: methods over all models, then each of its columns, and the cost, model by model."""
    methods, models = (list(dict.fromkeys(row[what] for row in rows)) for what in ("method", "model"))
    seeds = len({row["seed"] for row in rows})
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["method"]), []).append(row)
    overall = [[name, *_overall([cells[model, name] for model in models])] for name in methods]
    parts = [
        _ABOUT,
        f"## All {len(models)} models, {seeds} seeds\n",
        *_table(["method", *_COLUMNS.values(), "passes", "seconds"], overall),
    ]
    for title, cell in {
        **{label: _mean_of(column) for column, label in _COLUMNS.items()},
        "cost": _cost,
    }.items():
        given = [name for name in methods if any(cell(cells[model, name]) for model in models)]
        body = [[model, *(cell(cells[model, name]) for name in given)] for model in models]
        parts += [f"\n## {title[0].upper()}{title[1:]}, model by model\n", *_table(["model", *given], body)]
    return "\n".join([*parts, ""])


def _mean_of(column: str) -> Callable[[Sequence[Row]], str]:
    return lambda rows: _mean(_values(rows, column))


def _cost(rows: Sequence[Row]) -> str:
    """Passes and seconds of one method on one model, nothing where it has no rules for it."""
    if math.isnan(_seconds(rows)):
        return ""
    return f"{int(rows[0]['passes']):,}, {_told(_seconds(rows))} s"


def _overall(cells: Sequence[Sequence[Row]]) -> list[str]:
    """The cells of one method, from its rows on each model."""
    means = [_mean(np.array([_known_mean(_values(rows, column)) for rows in cells])) for column in _COLUMNS]
    passes = sorted({int(rows[0]["passes"]) for rows in cells})
    spread = f"{passes[0]:,}" if len(passes) == 1 else f"{passes[0]:,} to {passes[-1]:,}"
    return [*means, spread, _told(float(np.nanmedian([_seconds(rows) for rows in cells])))]


def _seconds(rows: Sequence[Row]) -> float:
    """The median, but for the first seed, which is compiled for."""
    return float(np.median(_values([row for row in rows if row["seed"] > 0] or rows, "seconds")))


def _told(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _values(rows: Sequence[Row], column: str) -> Float[np.ndarray, " row"]:
    return np.array([math.nan if row[column] is None else row[column] for row in rows], np.float64)


def interval(values: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean, NaN left out."""
    known = values[~np.isnan(values)]
    if not known.size:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).integers(0, known.size, (DRAWS, known.size))
    low, high = np.percentile(known[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def _known_mean(values: Float[np.ndarray, " draw"]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _mean(values: Float[np.ndarray, " draw"]) -> str:
    low, mean, high = (f"{x:.2f}" for x in (interval(values)[0], _known_mean(values), interval(values)[1]))
    if mean == "nan":
        return ""
    return mean if low == mean == high else f"{mean} [{low}, {high}]"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def write(found: Scoreboard, folder: str | Path, **made_from: Any) -> Path:
    """Write `results/scoreboard.json`, one row per model, method and seed, and the page `scoreboard.md`.

    Args:
        found: What to write.
        folder: Where to.
        **made_from: What it was made from, as `mj.save` takes it; stands with the rows, beside their checksum.

    Returns:
        The page's path.

    Raises:
        WriteError: The folder cannot be written.
    """
    folder = Path(folder)
    tidy = lambda value: (
        (None if math.isnan(value) else round(value, 6)) if isinstance(value, float) else value
    )
    rows = [{key: tidy(value) for key, value in row.items()} for row in found.rows()]
    try:
        (folder / "results").mkdir(parents=True, exist_ok=True)
        told = {"format": FORMAT, "rows": rows, "provenance": provenance_of(**made_from).page()}
        replace_file(folder / "results" / "scoreboard.json", signed(told, "lines"))
        replace_file(folder / "scoreboard.md", page(rows).encode())
    except OSError as error:
        raise WriteError(f"cannot write the scoreboard to `{folder}`: {error.strerror or error}.") from error
    return folder / "scoreboard.md"


def read(folder: str | Path) -> list[Row]:
    """The rows that `write` wrote, or an earlier version, which wrote rows alone.

    Raises:
        CheckpointError: There are none, or they were changed.
    """
    path = Path(folder) / "results" / "scoreboard.json"
    try:
        data = path.read_bytes()
        return json.loads(data) if data.startswith(b"[") else unsigned(data)["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"`{path}` holds no scoreboard: {error}. Make one with `mechjax scoreboard`."
        ) from error
