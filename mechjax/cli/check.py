"""`mechjax check MODEL`: is this checkpoint computed right, site by site."""

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechjax.studies.check import check as run_check

_COLOURS = {"supported": "green", "degraded": "yellow", "wrong": "bold red", "skipped": "dim"}


def check(
    model: tyro.conf.Positional[str], *, seed: int = 0, dtype: str | None = None, against: str | None = None
) -> int:
    """Check a model on its own weights: every site against transformers, padding, batches, sum of writes.

    Exits with 0 where all is right, 1 where something is wrong, 2 where it cannot be checked.

    Args:
        model: A shipped model, a folder in Hugging Face layout, or a name on the Hub.
        seed: Which random tokens.
        dtype: Of the weights on both sides, such as float32; the checkpoint's own by default.
        against: Another checkpoint of the same shape for transformers to load, such as the original of a converted one.
    """
    found = run_check(model, seed=seed, dtype=dtype, against=against)
    table = Table("check", "verdict", "difference", "largest", box=None, pad_edge=False)
    for row in found.rows():
        skipped = row["verdict"] == "skipped"
        table.add_row(
            Text(row["check"], style="bold"),
            Text(row["verdict"], style=_COLOURS[row["verdict"]]),
            "" if skipped else f"{row['difference']:.1e}",
            Text(row["where"]),
        )
    console = Console()
    console.print(table)
    console.print(f"\ntolerance {found.tolerance:.0e}, relative to the largest number of a site", style="dim")
    for note in found.notes:
        console.print(Text(note, style="dim"))
    console.print(Text(found.summary, style="green" if found.ok else "bold red"), soft_wrap=True)
    return 0 if found.ok else 1
