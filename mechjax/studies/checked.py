"""What a check of a checkpoint found: one row per comparison, with its verdict."""

from typing import Any, Literal, get_args

import equinox as eqx
from jaxtyping import Array, Float

from mechjax.base.records import Record
from mechjax.viz import tag

Verdict = Literal["supported", "degraded", "wrong", "skipped"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

TOLERANCES: dict[str, tuple[float, float]] = {
    "float64": (1e-5, 1e-4),  # scores and norms are float32 whatever the model's dtype
    "float32": (1e-5, 1e-4),
    "float16": (2.5e-3, 1e-2),  # three bits of mantissa more than bfloat16
    "bfloat16": (2e-2, 6e-2),
}
"""Dtype of the weights -> the largest relative difference that is right, and the largest that is rounding added up."""

_MOST_BAD = 6


class Checked(Record):
    """Whether a checkpoint computes in mechjax what it should, row by row.

    A difference is the largest number's absolute error over the largest number: `max|ours - theirs| / max|theirs|`,
    the worst over layers. A row is `supported` within the tolerance, `degraded` within ten (in half precision three or
    four) times it, where rounding may have added up, `wrong` beyond, and `skipped` where nothing could be compared.

    Attributes:
        difference: Of each row; NaN where it was skipped, infinite where a side is not finite.
        checks: What each row compares (static).
        verdicts: What came out (static).
        where: In which layer the difference is largest, or why a row was skipped (static).
        first: The first site in forward order beyond the tolerance, such as "k in layer 1", or None (static).
        tolerance: The largest difference that is right (static).
        dtype: Of the weights, on both sides (static).
        model: Its name (static).
        reference: What it was compared with, such as "transformers 5.23.0", or None (static).
        notes: What these prompts could not exercise (static).
    """

    difference: Float[Array, " check"]
    checks: tuple[str, ...] = eqx.field(static=True)
    verdicts: tuple[Verdict, ...] = eqx.field(static=True)
    where: tuple[str, ...] = eqx.field(static=True)
    first: str | None = eqx.field(static=True)
    tolerance: float = eqx.field(static=True)
    dtype: str = eqx.field(static=True)
    model: str = eqx.field(static=True)
    reference: str | None = eqx.field(static=True)
    notes: tuple[str, ...] = eqx.field(static=True)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return "wrong" not in self.verdicts

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """The rows by what they compare."""
        return {"check": self.checks}

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per row: check, verdict, difference, where."""
        cells = zip(self.checks, self.verdicts, self.difference.tolist(), self.where, strict=True)
        return [dict(zip(("check", "verdict", "difference", "where"), cell, strict=True)) for cell in cells]

    @property
    def summary(self) -> str:
        """One sentence: how many rows came out how, and where the two sides first differ."""
        counts = ", ".join(f"{n} {v}" for v in VERDICTS if (n := self.verdicts.count(v)))
        said = f"{self.model} ({self.dtype}) against {self.reference or 'itself alone'}: {counts}."
        return said + (f" The first site that differs is {self.first}." if self.first else "")

    def __repr__(self) -> str:
        bad = [row for row in self.rows() if row["verdict"] != "supported"]
        lines = [
            f"Checked {self.summary}",
            f"  tolerance {self.tolerance:.0e}, relative to the largest number",
        ]
        if good := [row for row in self.rows() if row["verdict"] == "supported"]:
            worst = max(good, key=lambda row: row["difference"])
            lines.append(
                f"  supported: {', '.join(row['check'] for row in good)}; at most {worst['difference']:.1e} "
                f"({worst['check']})"
            )
        lines += [f"  {line_of(row)}" for row in bad[:_MOST_BAD]]
        lines += [f"  … and {len(bad) - _MOST_BAD} more rows"] if len(bad) > _MOST_BAD else []
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        return tag("pre", repr(self), style="white-space:pre-wrap")


def line_of(row: dict[str, Any]) -> str:
    """A row in words."""
    said = "" if row["verdict"] == "skipped" else f"{row['difference']:.1e} "
    return f"{row['verdict']}: {row['check']}  {said}{row['where']}".rstrip()


def verdict_of(difference: float, dtype: str) -> Verdict:
    """What a difference means for weights of this dtype."""
    right, rounding = TOLERANCES[dtype]
    if difference <= right:
        return "supported"
    return "degraded" if difference <= rounding else "wrong"
