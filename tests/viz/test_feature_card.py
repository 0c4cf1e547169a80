"""The card of one latent: what stands on it, shaded how, and that no token is markup."""

import re

import numpy as np
import pytest

from mechjax.base.errors import ArgumentError
from mechjax.viz.feature_card import feature_card, log_counts, percent, plot
from tests.needs import BROWSER
from tests.viz.chromium import browser
from tests.viz.latents import BEFORE, WORDS, Spelling, made

CONTEXTS = made(dead=(3,))
ROW = re.compile(
    r"<tr><td>([\d.e+]+)</td><td><div><span>(.*?)</span></div></td><td><b>(.*?)</b>(.*?)</td></tr>", re.S
)


def plain(markup):
    return re.sub(r"<[^>]*>", "", markup)


def test_card__of_a_latent__shows_every_context_with_its_activation():
    page = feature_card(CONTEXTS, 1, Spelling())
    rows = ROW.findall(page.body)
    strongest = np.asarray(CONTEXTS.strongest.activation[1])
    assert [float(row[0]) for row in rows[:8]] == pytest.approx(
        strongest.tolist(), abs=0.0501
    )  # one digit is shown
    assert len(rows) == 8 + 5, "and those down the range"
    shade = lambda of: int(re.search(r'<i class="v(\d)"', of)[1])
    assert shade(rows[0][2]) == 9, "the largest takes the full colour"
    assert all(
        shade(row[2]) == int(np.ceil(9 * v / strongest[0])) for row, v in zip(rows, strongest, strict=False)
    )
    assert len({shade(row[2]) for row in rows}) > 3


def test_card__of_a_context__has_its_tokens_in_order_and_says_where_the_text_goes_on():
    page = feature_card(CONTEXTS, 1, Spelling())
    rows = ROW.findall(page.body)
    for j, (_, before, peak, after) in enumerate(rows[:8]):
        ids = np.asarray(CONTEXTS.strongest.tokens[1, j])
        drawn = lambda i: (
            WORDS[i].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
            .replace("\n", "↵").replace("\t", "⇥") or "∅"
        )  # fmt: skip
        assert plain(peak) == f" {drawn(ids[BEFORE])}"
        assert plain(after) == "".join(f" {drawn(i)}" for i in ids[BEFORE + 1 :] if i >= 0)
        text = "".join(f" {drawn(i)}" for i in ids[:BEFORE] if i >= 0)
        assert plain(before) == ("" if ids[0] < 0 else "…") + text


def test_card__of_hostile_tokens__holds_no_markup_of_theirs():
    page = feature_card(CONTEXTS, 1, Spelling(), name="<b>x</b>", note="a & b")
    assert page.title == "Latent 1: <b>x</b>"
    assert "<script>alert" not in page.html and "&lt;script&gt;alert(1)&lt;/script&gt;" in page.html
    assert "<h1>Latent 1: &lt;b&gt;x&lt;/b&gt;</h1><p>a &amp; b</p>" in page.body
    assert page.html.count("<script>") == 1
    assert not re.search(r"(src|href)=\"(?!data:|#)|@import|url\(|https?:", page.html)


def test_card__of_pieces_with_their_spaces__adds_none():
    plainly = lambda space: [
        re.sub(r"<[^>]*>", "", "".join(row))
        for row in ROW.findall(feature_card(CONTEXTS, 1, Spelling(space)).body)
    ]
    assert [row.replace("∅", "") for row in plainly("")] == plainly(" "), "one space, whoever writes it"


def test_card__says_what_the_latent_speaks_for_and_who_writes_alike():
    page = feature_card(CONTEXTS, 2, Spelling())
    values = re.findall(r'--v:([\d.]+)">[^<]*</td><td>([^<]+)</td>', page.body)
    assert len(values) == 8 and values[0][0] == "1.00"
    assert [v[1][0] for v in values] == ["+"] * 4 + ["−"] * 4
    near = re.findall(r"<span>(\d+) \(([\d.]+)\)</span>", page.body)
    assert [int(i) for i, _ in near] == CONTEXTS.near.nearest[2].tolist()
    assert f"Active at {percent(float(CONTEXTS.density[2]))} of 12,345 tokens" in page.body


def test_card__of_a_dead_latent__says_so():
    page = feature_card(CONTEXTS, 3, Spelling())
    assert "Never active in 12,345 tokens." in page.body and "kwic" not in page.body


def test_card__without_lens_or_neighbours__leaves_them_out():
    page = feature_card(made(lens=False, near=False), 0, Spelling())
    assert "Speaks" not in page.body and "Writes" not in page.body and "Strongest" in page.body


def test_card__of_a_latent_that_was_not_looked_for__says_how_to():
    with pytest.raises(
        ArgumentError, match=r"latent 5 is not among the 2 .* of 10: `contexts\(\.\.\., latents=\[5\]\)`"
    ):
        feature_card(made(2, numbers=[3, 9]), 5, Spelling())


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (0.5, "50%"), (0.031, "3.1%"), (0.00024, "0.024%"), (1.0, "100%")]
)
def test_percent__has_two_digits(share, text):
    assert percent(share) == text


def test_plot__of_counts__draws_each_bar_that_holds_anything():
    drawing = plot(np.array([0, 1, 1000, 500]), "c", "0", "<1>")
    bars = re.findall(r"M([\d.]+) 60v-([\d.]+)h", drawing)
    assert [(float(x), float(h)) for x, h in bars] == [(60, 1.5), (120, 60), (180, 30)]
    assert "&lt;1&gt;" in drawing


def test_log_counts__of_zeros__are_none():
    counts, low, high = log_counts(np.array([0.0, 0.02, 0.3]), 4)
    assert counts.tolist() == [1, 0, 1, 0] and (low, high) == (-2, 0)
    assert not log_counts(np.zeros(3), 4)[0].any()


@pytest.mark.browser
@BROWSER
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (390, False)])
def test_card__in_a_browser__asks_for_nothing_and_fits(tmp_path, width, dark):
    path = feature_card(CONTEXTS, 1, Spelling(), name="x").write(tmp_path / "card.html")
    with browser() as tab:
        tab.look(width=width, dark=dark, mobile=width < 500)
        tab.open(path)
        assert not tab.requests and not tab.complaints
        assert tab.js("document.documentElement.scrollWidth") <= width
        assert tab.js("document.querySelectorAll('.kwic i').length") > 10
        tab.js(
            "document.querySelector('.kwic i').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
        )
        assert tab.js("document.getElementById('tip').textContent") == tab.js(
            "document.querySelector('.kwic i').dataset.tip"
        )
