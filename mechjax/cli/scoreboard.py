"""`mechjax scoreboard`: how well methods find circuits that are known, as a table."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from mechjax.studies import scoreboard_page
from mechjax.studies.ground_truth import MODELS
from mechjax.studies.judged_methods import METHODS
from mechjax.studies.scoreboard import scoreboard as run_scoreboard


def scoreboard(
    folder: Path = Path("benchmarks"),
    seeds: int = 5,
    models: tuple[str, ...] = tuple(MODELS),
    methods: tuple[str, ...] = tuple(METHODS),
) -> None:
    """Judge every method on every model whose circuit is known, and write the table.

    Args:
        folder: Where to write `results/scoreboard.json` and the page `scoreboard.md`.
        seeds: How many draws of inputs for each model.
        models: Which models.
        methods: Which methods.
    """
    path = scoreboard_page.write(run_scoreboard(models, methods, n_seeds=seeds), folder, seeds=seeds)
    console = Console()
    console.print(Text(path.read_text(encoding="utf-8")), soft_wrap=True)
    console.print(Text.assemble("The page: ", (str(path.absolute()), "bold underline")), soft_wrap=True)
