"""A function fits a screen, a file fits a sitting, and every name says what lives there."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for folder in ("mechjax", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
MAX_FILE, MAX_FUNCTION = 500, 80
VAGUE = {"utils", "util", "common", "misc", "helpers", "helper"}


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_file__length__fits_a_sitting(path: Path):
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_FILE
    functions = (
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    too_long = {
        f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > MAX_FUNCTION
    }
    assert not too_long, f"functions of more than {MAX_FUNCTION} lines: {too_long}"


def test_names__of_files_and_folders__say_what_lives_there():
    assert not [
        _id(p) for p in FILES if VAGUE & {part.removesuffix(".py") for part in p.parts[len(ROOT.parts) :]}
    ]
