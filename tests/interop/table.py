"""Write the README's table of what runs on subjects of other libraries: `python -m tests.interop.table`.

What runs is `rows`, which compare each with an oracle; what does not says so itself (`mechjax.models.needs`).
"""

import inspect
import re
from pathlib import Path

import mechjax as mj
from mechjax.models.needs import REASONS
from tests.interop.rows import NO_SUBJECT, RUNS

README = Path(__file__).parents[2] / "README.md"
BETWEEN = re.compile(
    r"(<!-- subjects: python -m tests.interop.table -->\n).*?(<!-- end of subjects -->)", re.DOTALL
)
PACKAGES = (
    "patching", "attribution", "decompose", "heads", "dictlearn", "dicteval", "store", "graph", "models", "metrics",
    "dictionaries", "fit", "viz", "tasks", "parallel", "interop",
)  # fmt: skip


def functions():
    """Every public function that takes a model or function, by its name below `mechjax`."""
    found = {}
    for package in ("", *PACKAGES):
        module = getattr(mj, package) if package else mj
        for name in dir(module):
            value = getattr(module, name)
            if not inspect.isfunction(value) or name.startswith("_") or value in found.values():
                continue
            if {"model", "fn"} & set(inspect.signature(value).parameters):
                found[f"{package}.{name}" if package else name] = value
    return found


def refused():
    """Of these, those that need a decoder: name -> the reason."""
    return {name: fn.needs for name, fn in functions().items() if hasattr(fn, "needs")}


def table() -> str:
    """The table: a row for each group of functions that are alike."""
    rows = ["| function | on a subject |", "| --- | --- |"]
    said: dict[str, list[str]] = {}
    for name, row in RUNS.items():
        said.setdefault(f"runs: {row.said}", []).append(name)
    for name, reason in refused().items():
        need = REASONS[reason]
        said.setdefault(f"refused: {need.why}. Instead: {need.instead}", []).append(name)
    rows += [f"| {', '.join(f'`{n}`' for n in names)} | {what} |" for what, names in said.items()]
    return "\n".join(rows) + "\n"


def covered():
    """Names that the table, or `NO_SUBJECT`, has something to say of."""
    return {*RUNS, *refused(), *NO_SUBJECT}


if __name__ == "__main__":
    text = README.read_text()
    README.write_text(BETWEEN.sub(lambda found: found[1] + table() + found[2], text))
