"""Every notebook runs from top to bottom, and what it asserts holds."""

import json
from pathlib import Path

import jax
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def code(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook__as_committed__was_run_and_asserts(path):
    cells = code(path)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)], (
        "from the top, with outputs"
    )
    assert any("assert" in "".join(cell["source"]) for cell in cells), "it ends in asserted numbers"
    assert path.stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook__run_from_the_top__asserts_what_holds(path):
    cells = code(path)
    space: dict = {}
    with jax.numpy_dtype_promotion("standard"):  # as readers have it
        for cell in cells:
            exec(compile("".join(cell["source"]), path.name, "exec"), space)
