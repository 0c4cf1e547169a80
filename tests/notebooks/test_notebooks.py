"""Every notebook runs from top to bottom, and what it asserts holds."""

import json
from pathlib import Path

import jax
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook__run_from_the_top__asserts_what_holds(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells), "it is committed with its outputs"
    assert any("assert" in "".join(cell["source"]) for cell in cells), "it ends in asserted numbers"
    space: dict = {}
    with jax.numpy_dtype_promotion("standard"):  # as readers have it
        for cell in cells:
            exec(compile("".join(cell["source"]), path.name, "exec"), space)
