"""The page for those who come from other libraries: every name in its tables is one that mechjax takes or has."""

import re
from functools import reduce
from pathlib import Path

import pytest

import mechjax as mj
from mechjax.base.catalogue import SITES, canonical

PAGE = (Path(__file__).parents[2] / "notebooks" / "coming_from.md").read_text()


def tables() -> list[list[list[str]]]:
    """Each table as rows of cells, its header first."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", PAGE, re.MULTILINE)
    rows = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in b.splitlines()] for b in blocks
    ]
    return [[table[0], *table[2:]] for table in rows]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


SITE_TABLE, PYVENE_TABLE, *CALL_TABLES = tables()


@pytest.mark.parametrize("row", SITE_TABLE[1:], ids=lambda row: row[0])
def test_page__spellings_of_a_site__are_taken(row):
    (ours,) = names(row[0])
    assert ours in SITES
    spelled = [name for cell in row[1:] for name in names(cell)]
    assert spelled
    for name in spelled:
        assert canonical(name) == (ours, 3 if "3" in name else None)


@pytest.mark.parametrize("row", PYVENE_TABLE[1:], ids=lambda row: row[0])
def test_page__modules_behind_pyvene_components__are_the_sites(row):
    assert [canonical(name) for name in names(row[1])] == [(name, 3) for name in names(row[2])]


def test_page__every_name_of_ours__exists():
    used = set(re.findall(r"\bmj((?:\.\w+)+)", PAGE))
    assert len(used) > 20
    for path in used:
        reduce(getattr, path.strip(".").split("."), mj)


def test_page__every_site_that_is_always_formed__is_in_the_table():
    listed = {name for row in SITE_TABLE[1:] for name in names(row[0])}
    assert {"embed", "resid_pre", "z", "pattern", "mlp_post", "resid_post", "logits"} <= listed
    assert [len(table) > 3 for table in CALL_TABLES] == [True] * 3
