"""Progress bars for anything that may pass ten seconds. Silent when nobody looks at a terminal.

The first step of a loop over compiled programs is compilation, so until it is done the bar says so.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_T = TypeVar("_T")


class Bar:
    """One progress bar; made by `bar`."""

    def __init__(self, progress: Progress, total: int | None, *, compiles: bool) -> None:
        self._progress = progress
        self._note = " [dim](compiling)[/]" if compiles else ""
        self._description = ""
        self._task = progress.add_task("", total=total)

    def begin(self, description: str) -> None:
        """Say what is being done; until the next `advance` it also says that it compiles."""
        self._description = description
        self._progress.update(self._task, description=f"{description}{self._note}", refresh=True)

    def advance(self, steps: int = 1) -> None:
        """Count `steps` as done; after the first, what had to be compiled is compiled."""
        self._progress.update(self._task, advance=steps, description=self._description)


@contextmanager
def bar(
    description: str, total: int | None = None, *, compiles: bool = True, console: Console | None = None
) -> Generator[Bar, None, None]:
    """Show a bar while the block runs.

    Args:
        description: What is being done, such as `"Patching the residual stream"`.
        total: How many steps there are; None where that is not known.
        compiles: Whether the first step includes compilation.
        console: Where to draw; standard error by default. Nothing is drawn unless it is a terminal.
    """
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns = (*columns, TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown = Bar(progress, total, compiles=compiles)
        shown.begin(description)
        yield shown


def track(
    steps: Sequence[_T] | Iterable[_T], description: str, *, console: Console | None = None
) -> Iterator[_T]:
    """Yield from `steps`, showing how far the loop has come."""
    total = len(steps) if isinstance(steps, Sequence) else None
    with bar(description, total, console=console) as progress:
        for step in steps:
            yield step
            progress.advance()
