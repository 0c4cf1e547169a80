"""The page for those who come from other libraries: every name in its tables is one that mechjax takes or has."""

import re
from functools import reduce
from pathlib import Path

import pytest

import mechjax as mj
from mechjax.base.catalogue import SITES, canonical
from mechjax.models.families import config_from_hf
from mechjax.models.families.modules import own_name

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
_GPT2 = {"architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_layer": 4, "n_head": 2, "vocab_size": 9}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4,
    "num_attention_heads": 2, "vocab_size": 9,
}  # fmt: skip


def meant(name: str, family: dict) -> tuple[str, int | None]:
    """The site and layer that a name means in a model of a family."""
    known, layer = canonical(name)
    return own_name(known, config_from_hf(family)[0]), layer


@pytest.mark.parametrize("row", SITE_TABLE[1:], ids=lambda row: row[0])
def test_page__spellings_of_a_site__are_taken(row):
    (ours,) = names(row[0])
    assert ours in SITES
    spelled = [
        (name, family)
        for cell, family in zip(row[1:], (_GPT2, _GPT2, _LLAMA), strict=True)
        for name in names(cell)
    ]
    assert spelled
    for name, family in spelled:
        assert meant(name, family) == (ours, 3 if "3" in name else None)


@pytest.mark.parametrize("row", PYVENE_TABLE[1:], ids=lambda row: row[0])
def test_page__modules_behind_pyvene_components__are_the_sites(row):
    assert [meant(name, _GPT2) for name in names(row[1])] == [(name, 3) for name in names(row[2])]


def test_page__every_name_of_ours__exists():
    used = set(re.findall(r"\bmj((?:\.\w+)+)", PAGE))
    assert len(used) > 20
    for path in used:
        reduce(getattr, path.strip(".").split("."), mj)


def test_page__every_site_that_is_always_formed__is_in_the_table():
    listed = {name for row in SITE_TABLE[1:] for name in names(row[0])}
    assert {"embed", "resid_pre", "z", "pattern", "mlp_post", "resid_post", "logits"} <= listed
    assert [len(table) > 3 for table in CALL_TABLES] == [True] * 3
