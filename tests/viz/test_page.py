import re

import pytest

from mechjax.base.errors import WriteError
from mechjax.viz.html import tag
from mechjax.viz.page import Page, check_writable, section


@pytest.fixture(scope="module")
def page():
    return Page("T <1>", section("Heading", "a & b", tag("b", "c")))


def test_page__as_a_file__is_one_self_contained_document(page):
    text = page.html
    assert text.startswith("<!doctype html>")
    assert "<title>T &lt;1&gt;</title>" in text
    assert "<section><h2>Heading</h2><p>a &amp; b</p><b>c</b></section>" in text
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(|https?:", text)
    assert "{{" not in text
    assert len(text.encode()) < 100_000


def test_page__with_text_that_looks_like_a_template__leaves_it_alone():
    assert "{{ script }}" in Page("t", section("{{ script }}")).html


def test_page__policy__allows_no_request_and_one_script(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.html)[1]
    assert policy.startswith("default-src 'none'; ")
    assert re.search(r"script-src 'sha256-[\w+/]{43}='$", policy)


def test_page__in_a_notebook__is_a_frame_of_its_own(page):
    frame = page._repr_html_()
    assert frame.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert 'sandbox="allow-scripts"' in frame
    assert repr(page) == "Page: T <1>"


def test_write__into_a_new_folder__makes_it(page, tmp_path):
    path = page.write(tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8") == page.html


def test_write__where_it_cannot__says_so(page, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        WriteError, match=r"cannot write the page to .*file/page\.html`: .*file` is no folder\. Choose a file"
    ):
        page.write(tmp_path / "file" / "page.html")


def test_check_writable__of_a_folder__is_refused(tmp_path):
    with pytest.raises(WriteError, match="Is a directory"):
        check_writable(tmp_path)


def test_check_writable__of_good_paths__changes_nothing(tmp_path):
    (tmp_path / "old.html").write_text("old")
    check_writable(tmp_path / "old.html")
    check_writable(tmp_path / "new.html")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old.html", "old")]


def test_write__with_what_it_was_made_from__ends_with_that_escaped(page, tmp_path):
    text = page.write(tmp_path / "page.html", seed=3, name="<script>x</script>").read_text(encoding="utf-8")
    folded = text[text.index("<details") :]
    assert "Where this comes from" in folded and "&lt;script&gt;x" in folded and "<script>x" not in text
    assert re.search(r"<th[^>]*>seed</th><td>3</td>", folded) and "jaxlib" in folded
    assert "Where this comes from" not in page.html


def test_write__through_a_link_or_to_a_pipe__writes_there(page, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.html").symlink_to(tmp_path / "there" / "page.html")
    check_writable(tmp_path / "link.html")
    page.write(tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "there" / "page.html").read_text(encoding="utf-8") == page.html
    check_writable("/dev/null")
    page.write("/dev/null")
