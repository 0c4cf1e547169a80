"""`mechjax verify PATH`: is what lies there what was written."""

from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechjax.artefacts import verify as run_verify
from mechjax.base.units import in_bytes


def verify(path: tyro.conf.Positional[Path]) -> int:
    """Compare what mechjax wrote with its checksums, file by file, and say where it comes from.

    Exits with 0 where all is whole, 1 where something is damaged or missing, 2 where nothing is recognised.

    Args:
        path: A saved record, an activation store, a sweep, checkpoints, an exported or any other model's folder.
    """
    found = run_verify(path)
    console, n = Console(), len(found.damaged)
    good = Text("whole", "green") if found.summed else Text("consistent", "yellow")
    state = good if found.ok else Text(f"{n} damaged", "bold red")
    table = Table("what", "files", "bytes", "state", box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_row(Text(found.kind, "bold"), str(len(found.files)), in_bytes(int(found.sizes.sum())), state)
    console.print(table)
    for problem in found.problems:
        console.print(Text(problem, "bold red"), soft_wrap=True)
    for note in found.notes:
        console.print(Text(note, "yellow"), soft_wrap=True)
    for made in found.provenance:
        facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for word, said in made.lines():
            facts.add_row(Text(word, "dim"), Text(said))
        console.print(facts)
    return 0 if found.ok else 1
