"""The tour's page, as a reader and as a browser see it."""

import html
import re

import numpy as np
import pytest

from mechjax.viz.heatmap import number
from tests.needs import NO_BROWSER
from tests.studies.handmade import TOKENS, handmade_tour
from tests.viz.chromium import BINARY, browser

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
HEADS = 'table[aria-label^="How much of the answer comes back with one head"]'


@pytest.fixture(scope="module")
def tour():
    return handmade_tour()


@pytest.fixture(scope="module")
def page(tour, tmp_path_factory):
    return tour.page.write(tmp_path_factory.mktemp("tour") / "tour.html")


def test_page__size__is_far_below_a_megabyte(page):
    assert page.stat().st_size < 200_000


def test_page__findings__are_filled_in_from_the_record(page):
    text = re.sub(r"<[^>]+>", "", page.read_text())
    assert "How does this model know that the answer is Mary?" in text
    assert "Take them away, and 87% of" in text
    assert "starts at S2 (the repeated name, second time) and has moved to END" in text
    for sentence in (
        "L3.H0 does its work at END.",
        "L2.H3 does its work at END.",
        "L1.H2 does its work at S2.",
    ):
        assert sentence in text.replace("  ", " ")


def test_page__hostile_tokens__are_escaped_everywhere():
    text = handmade_tour((*TOKENS[:3], HOSTILE, *TOKENS[4:]), answer=HOSTILE).page.html
    assert HOSTILE not in text
    assert "<img" not in text
    assert text.count("<script>") == 1


def test_tour__as_a_record__prints_briefly_and_shows_itself_as_the_page(tour):
    assert len(repr(tour).splitlines()) < 20
    assert "L3.H0" in repr(tour)
    assert tour.top(1) == [("L3.H0", pytest.approx(0.72))]
    assert tour._repr_html_().startswith("<iframe")
    assert tour.drop == pytest.approx(1 - 0.74 / 5.83)
    assert abs(tour.random_drop) < 0.1


@pytest.fixture(scope="module")
def tab():
    if BINARY is None:
        pytest.skip(NO_BROWSER)
    with browser() as opened:
        yield opened


@pytest.mark.browser
def test_browser__opening_the_page__asks_for_nothing_and_has_no_complaint(tab, page):
    tab.open(page)
    assert tab.requests == []
    assert tab.complaints == []


@pytest.mark.browser
def test_browser__five_cells__read_as_the_array(tab, page, tour):
    tab.open(page)
    for layer, head in ((0, 0), (1, 2), (2, 3), (3, 0), (3, 3)):
        text = tab.js(
            f"document.querySelector('{HEADS}').tBodies[0].rows[{layer}].cells[{head + 1}].innerText"
        )
        assert text == number(float(tour.heads[layer, head]))
    assert tab.js("document.title") == "mechjax tour: L3.H0, L2.H3 and L1.H2"


@pytest.mark.browser
def test_browser__light_dark_and_the_button__change_the_paper(tab, page):
    tab.open(page)
    paper = "getComputedStyle(document.body).backgroundColor"
    tab.look(dark=False)
    light = tab.js(paper)
    tab.look(dark=True)
    dark = tab.js(paper)
    tab.js("document.getElementById('theme').click()")
    assert (light, dark, tab.js(paper)) == ("rgb(251, 250, 247)", "rgb(20, 22, 26)", light)


@pytest.mark.browser
def test_browser__on_a_phone__nothing_sticks_out(tab, page):
    tab.look(width=360, height=700, mobile=True)
    tab.open(page)
    assert tab.js("document.documentElement.scrollWidth") == 360


@pytest.mark.browser
def test_browser__pointing_at_a_cell__says_what_it_means(tab, page, tour):
    tab.open(page)
    tab.js(
        f"document.querySelector('{HEADS} td[data-mark]').dispatchEvent(new Event('pointerover', {{bubbles: true}}))"
    )
    said = tab.js("document.getElementById('tip').innerText")
    assert said == f"L1.H2: putting this head back recovers {number(float(tour.heads[1, 2]))} of the answer."


@pytest.mark.browser
def test_browser__choosing_a_token__shows_where_it_looks(tab, page, tour):
    tab.open(page)
    look = "document.querySelector('.attention .look')"
    tab.js(f"{look}.children[4].click()")
    shares = tab.js(f"[...{look}.children].map(token => token.style.getPropertyValue('--v'))")
    np.testing.assert_allclose(np.asarray(shares, float), np.asarray(tour.story.patterns[0, 4]), atol=0.00501)
    assert tab.js(f"{look}.children[4].classList.contains('from')")


@pytest.mark.browser
def test_browser__hostile_tokens__do_not_run_and_a_raw_copy_does(tab, tmp_path):
    """Escaping alone keeps them out, and so does the policy alone; without either they run."""
    text = handmade_tour((*TOKENS[:3], HOSTILE, *TOKENS[4:])).page.html
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text)[0]
    raw = text.replace(html.escape(HOSTILE, quote=True), HOSTILE)
    titles = {}
    for name, copy in {
        "shipped": text,
        "escaped": text.replace(policy, ""),
        "guarded": raw,
        "raw": raw.replace(policy, ""),
    }.items():
        path = tmp_path / f"{name}.html"
        path.write_text(copy, encoding="utf-8")
        tab.open(path)
        tab.js("new Promise(done => setTimeout(done, 200))")
        titles[name] = tab.js("document.title") == "taken"
    assert titles == {"shipped": False, "escaped": False, "guarded": False, "raw": True}
