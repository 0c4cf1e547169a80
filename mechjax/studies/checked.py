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
"""Dtype of the weights -> the largest relative difference that is right, and the largest that is rounding added up.

Those of half precision are for `_SHALLOW` layers; `tolerances_of` has those of deeper models.
"""
_SHALLOW = 2

_MOST_BAD = 6


class Checked(Record):
    """Whether a checkpoint computes in mechjax what it should, row by row.

    A difference is the largest number's absolute error over the largest number: `max|ours - theirs| / max|theirs|`,
    the worst over layers. A row is `supported` within the tolerance (which in half precision grows with depth),
    `degraded` within ten (in half precision three or four) times it, where rounding may have added up, `wrong` beyond,
    and `skipped` where nothing could be compared.

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


def tolerances_of(dtype: str, n_layers: int) -> tuple[float, float]:
    """`TOLERANCES` of a model of that depth: in half precision they grow with the square root of the layers.

    Every layer rounds what it adds to the stream once more, and errors that do not know of each other add up in
    squares. Measured in bfloat16 on twelve random Llama models per depth against transformers, with every parameter
    redrawn: the largest difference of any site of 2, 12 and 24 layers was in the median 1.8e-2, 3.2e-2 and 5.3e-2
    (tolerances 2.0e-2, 4.9e-2, 6.9e-2), at worst 2.2e-2, 5.2e-2 and 9.4e-2 (wrong from 6.0e-2, 1.5e-1, 2.1e-1).
    GPT-2 and GPT-NeoX differ less, float16 an eighth of that.
    """
    right, rounding = TOLERANCES[dtype]
    deeper = max(1.0, n_layers / _SHALLOW) ** 0.5 if dtype.endswith("16") else 1.0
    return right * deeper, rounding * deeper


def verdict_of(difference: float, dtype: str, n_layers: int) -> Verdict:
    """What a difference means for weights of this dtype in a model of this depth."""
    right, rounding = tolerances_of(dtype, n_layers)
    if difference <= right:
        return "supported"
    return "degraded" if difference <= rounding else "wrong"
