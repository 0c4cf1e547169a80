"""What a reader meets first: `__init__` files that only re-export, public names with docstrings, a light import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mechjax"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)
EXTRAS = ("torch", "torchax", "transformers", "plotly", "matplotlib")


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=_id)
def test_init__of_a_package__only_re_exports(path: Path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a package says in one sentence what it is"
    for node in tree.body[1:]:
        # PEP 562: the root loads what is heavy when it is first asked for, from private tables.
        is_table = isinstance(node, ast.Assign) and all(
            t.id == "__all__" or t.id[0] == "_" for t in node.targets
        )
        is_lazy = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
        assert isinstance(node, ast.Import | ast.ImportFrom) or is_table or is_lazy, ast.unparse(node)[:80]


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_docstrings__of_public_names__exist(path: Path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module says what it is for"
    assert not _undocumented(tree), f"public names without a docstring: {_undocumented(tree)}"


def _undocumented(tree: ast.Module) -> list[str]:
    missing: list[str] = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            missing.append(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_"))
            missing += [f"{node.name}.{m.name}" for m in methods if not ast.get_docstring(m)]
    return missing


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_import__mechjax__loads_no_extra():
    loaded = _python(f"import sys, mechjax; print([m for m in {EXTRAS} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_import__mechjax__stays_within_half_a_second_of_jax():
    code = """
import time
start = time.process_time(); import jax
between = time.process_time(); import mechjax
print((time.process_time() - between) / (between - start))
"""
    # CPU time, in units of what jax itself takes: half a second is where that is 0.7 s, and machines and their load
    # differ. The best of three, since the first writes the byte code.
    assert min(float(_python(code)) for _ in range(3)) < 0.5 / 0.7


def test_errors__every_class__is_raised_and_matched_somewhere():
    errors = re.findall(r"^class (\w+)\(MechjaxError", (PACKAGE / "base" / "errors.py").read_text(), re.M)
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    unmatched = [e for e in errors if not re.search(rf"raises\(\s*([\w.]+\.)?{e}\b[^)]*match=", tests)]
    assert not unmatched, f"no test matches the message of {unmatched}"
