"""The scoreboard as a page of markdown, made from its committed rows alone."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mechjax.base.errors import CheckpointError, WriteError
from mechjax.studies.scoreboard import Scoreboard

Row = dict[str, Any]

DRAWS = 2000
"""Resamplings of a bootstrap interval."""

_COLUMNS = {"edge_auroc": "edge AUROC", "node_auroc": "node AUROC", "pearson": "Pearson with exact",
            "spearman": "rank correlation with exact"}  # fmt: skip
_ABOUT = """# Scoreboard

How well methods find circuits that are known. Made by `mechjax scoreboard`; the tests make it again from
`results/scoreboard.json` and compare.

AUROC is the chance that an edge (node) of the true circuit gets a larger size than one that is not in it, ties as half:
0.5 is chance, 1 is right. Edges of the circuit that carry the same in both prompts of every pair, such as positions,
are left out. Correlations are with exact effects, over all edges. Each number is a mean with its 95 % bootstrap
interval (percentiles): over models, whole models drawn anew, in the first table; over seeds in the second. Passes are
counted for the scores of edges, a backward pass as two; seconds are for edges and nodes, without compilation (median).

`rasp/`: programs, compiled at a coldness of 12 in a random basis. `planted/`: circuits in random transformers of so
many layers x heads. `gate/`: what single edges or gradients are known to miss: where any of three inputs is enough
(`or`), each alone does nothing, so that even exact effects do not show it.
"""


def page(rows: Sequence[Row]) -> str:
    """The page: methods over all models, then edge AUROC model by model."""
    methods, models = (list(dict.fromkeys(row[what] for row in rows)) for what in ("method", "model"))
    seeds = len({row["seed"] for row in rows})
    head = ["method", *_COLUMNS.values(), "passes", "seconds"]
    overall = [[name, *_overall([row for row in rows if row["method"] == name], models)] for name in methods]
    by_model = [
        [model, *(_mean(_values(rows, "edge_auroc", model=model, method=name)) for name in methods)]
        for model in models
    ]
    return "\n".join(
        [
            _ABOUT,
            f"## All {len(models)} models, {seeds} seeds\n",
            *_table(head, overall),
            "\n## Edge AUROC of each model\n",
            *_table(["model", *methods], by_model),
            "",
        ]
    )


def _overall(rows: Sequence[Row], models: Sequence[str]) -> list[str]:
    """The cells of one method."""
    of_models = {
        column: np.array([_known_mean(_values(rows, column, model=model)) for model in models])
        for column in _COLUMNS
    }
    cells = [_mean(values) for values in of_models.values()]
    passes = sorted({int(row["passes"]) for row in rows})
    spread = f"{passes[0]:,}" if len(passes) == 1 else f"{passes[0]:,} to {passes[-1]:,}"
    warm = [row["seconds"] for row in rows if row["seed"] > 0] or [row["seconds"] for row in rows]
    return [*cells, spread, f"{np.median(warm):.2g}"]


def _values(rows: Sequence[Row], column: str, **where: Any) -> Float[np.ndarray, " row"]:
    picked = (row[column] for row in rows if all(row[key] == value for key, value in where.items()))
    return np.array([math.nan if value is None else value for value in picked], np.float64)


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
    low, high = interval(values)
    return "" if math.isnan(low) else f"{_known_mean(values):.2f} [{low:.2f}, {high:.2f}]"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def write(found: Scoreboard, folder: str | Path) -> Path:
    """Write `results/scoreboard.json`, one row per model, method and seed, and the page `scoreboard.md`.

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
        (folder / "results" / "scoreboard.json").write_text(
            "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8"
        )
        (folder / "scoreboard.md").write_text(page(rows), encoding="utf-8")
    except OSError as error:
        raise WriteError(f"cannot write the scoreboard to `{folder}`: {error.strerror or error}.") from error
    return folder / "scoreboard.md"


def read(folder: str | Path) -> list[Row]:
    """The rows that `write` wrote.

    Raises:
        CheckpointError: There are none.
    """
    path = Path(folder) / "results" / "scoreboard.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"`{path}` holds no scoreboard: {error}. Make one with `mechjax scoreboard`."
        ) from error
