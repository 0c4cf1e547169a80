"""The page of all latents: a line and a card for each, sorted and filtered, and no larger than asked."""

import re

import pytest

from mechjax.base.errors import ArgumentError
from mechjax.viz.dashboard import dashboard
from tests.needs import BROWSER
from tests.viz.chromium import browser
from tests.viz.latents import Spelling, made

CONTEXTS = made(30, dead=(4, 7))
ENTRY = re.compile(
    r'<details class="latent" id="l(\d+)" data-id="\1" data-density="([^"]+)" data-largest="([^"]+)"'
)


@pytest.fixture(scope="module")
def page():
    return dashboard(CONTEXTS, Spelling(), names={2: "<i>she</i>"}, title="D & d")


def test_dashboard__has_a_line_and_a_card_for_every_latent(page):
    entries = ENTRY.findall(page.body)
    assert [int(i) for i, _, _ in entries] == list(range(30))
    for i, density, largest in entries:
        assert float(density) == pytest.approx(float(CONTEXTS.density[int(i)]), rel=5e-3)
        assert float(largest) == pytest.approx(float(CONTEXTS.largest[int(i)]), rel=5e-4)
    assert page.body.count('class="inside"') == 28 and page.body.count("It is never active") == 2
    assert page.body.count("<figure") == 3 + 28


def test_dashboard__says_what_all_of_them_are(page):
    chips = dict(re.findall(r"<li><b>([^<]*)</b>([^<]*)</li>", page.body))
    assert chips == {
        "30": "latents", "12,345": "tokens looked at", "2": "never active here",
        f"{float(CONTEXTS.density.sum()):.2f}": "active at a token, on average",
    }  # fmt: skip
    few = dashboard(made(3, numbers=[5, 900, 7]), Spelling()).body
    assert "<b>3</b>of 901 latents" in few and "of these active at a token" in few


def test_dashboard__of_hostile_tokens_and_names__holds_no_markup_of_theirs(page):
    assert "<em>&lt;i&gt;she&lt;/i&gt;: </em>" in page.body and "<h1>D &amp; d</h1>" in page.body
    assert "<script>alert" not in page.html and page.html.count("<script>") == 1
    assert not re.search(r"(src|href)=\"(?!data:|#)|@import|url\(|https?:", page.html)
    assert page.html == dashboard(CONTEXTS, Spelling(), names={2: "<i>she</i>"}, title="D & d").html


def test_dashboard__larger_than_asked__leaves_latents_out_and_says_so():
    page = dashboard(CONTEXTS, Spelling(), max_bytes=30_000)
    n = len(ENTRY.findall(page.body))
    assert 1 < n < 30 and f"Shown are the first {n} of 30 latents" in page.body
    assert len(page.body.encode()) < 40_000
    with pytest.raises(ArgumentError, match="max_bytes=10: not even one latent's card fits"):
        dashboard(CONTEXTS, Spelling(), max_bytes=10)


def test_dashboard__of_many_latents__stays_small():
    page = dashboard(made(60, n=8), Spelling())
    assert len(ENTRY.findall(page.body)) == 60
    assert len(page.body.encode()) / 60 < 10_000, "of a thousand latents, less than 10 MB"


def test_dashboard__with_names_of_others__is_refused():
    with pytest.raises(ArgumentError, match="names has latent 99, which is not among the 30"):
        dashboard(CONTEXTS, Spelling(), names={99: "x"})


def test_dashboard__without_lens_or_neighbours__stands():
    page = dashboard(made(3, lens=False, near=False), Spelling())
    assert page.body.count("<figure") == 2 + 3 and len(ENTRY.findall(page.body)) == 3


IDS = "[...document.querySelectorAll('.latent')].filter((x) => !x.hidden).map((x) => Number(x.dataset.id))"


@pytest.mark.browser
@BROWSER
def test_dashboard__in_a_browser__sorts_filters_and_opens(page, tmp_path):
    path = page.write(tmp_path / "dashboard.html")
    with browser() as tab:
        tab.look()
        tab.open(path)
        assert not tab.requests and not tab.complaints
        click = lambda by: tab.js(f"document.querySelector('[data-by={by}]').click()")
        density = CONTEXTS.density.tolist()
        click("density")
        assert tab.js(IDS) == sorted(range(30), key=lambda i: (-float(f"{density[i]:.3g}"), i))
        click("density")
        assert tab.js(IDS) == sorted(range(30), key=lambda i: (float(f"{density[i]:.3g}"), i))
        click("id")
        assert tab.js(IDS) == list(range(30))
        tab.js(
            "(() => { const i = document.querySelector('.tools input'); i.value = '<I>SHE';"
            " i.dispatchEvent(new Event('input')); })()"
        )
        assert tab.js(IDS) == [2]
        assert tab.js("document.querySelector('.count').textContent") == "1 of 30"
        link = "document.querySelector('#l2 .near a')"
        to = int(tab.js(f"{link}.hash")[2:])
        tab.js(f"{link}.click()")
        assert tab.js(f"document.getElementById('l{to}').open") and len(tab.js(IDS)) == 30


@pytest.mark.browser
@BROWSER
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_dashboard__in_a_browser__fits(page, tmp_path, width, dark):
    path = page.write(tmp_path / "dashboard.html")
    with browser() as tab:
        tab.look(width=width, dark=dark, mobile=width < 500)
        tab.open(path)
        tab.js("document.querySelectorAll('.latent').forEach((one) => { one.open = true; })")
        assert tab.js("document.documentElement.scrollWidth") <= width
