import html
from html.parser import HTMLParser

import hypothesis.strategies as st
from hypothesis import given

from mechjax.viz.html import Html, escape, tag


def test_tag__with_text_and_attributes__escapes_both():
    assert tag("b", "<i>", title='"&') == '<b title="&quot;&amp;">&lt;i&gt;</b>'


def test_tag__with_markup_of_its_own__keeps_it():
    assert tag("p", tag("b", 1), None, ["a", [tag("br")]]) == "<p><b>1</b>a<br></p>"


def test_tag__attribute_names__lose_underscores_and_false_ones():
    assert (
        tag("td", class_="x", data_tip="y", hidden=True, id=None, open=False)
        == '<td class="x" data-tip="y" hidden></td>'
    )


def test_escape__of_a_plain_string_that_was_markup__escapes_it():
    assert escape(str(tag("b", "x"))[:]) == html.escape("<b>x</b>") or isinstance(tag("b"), Html)
    assert escape("<b>x</b>") == "&lt;b&gt;x&lt;/b&gt;"


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.attributes = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@given(text=st.text(), value=st.text())
def test_tag__with_any_text__is_read_back_as_that_text_and_nothing_else(text, value):
    reader = _Reader()
    reader.feed(tag("span", text, data_tip=value))
    reader.close()
    assert reader.tags == ["span"]
    assert [name for name, _ in reader.attributes] == ["data-tip"]
    # HTML reads a carriage return as a line break, and has no NUL.
    clean = str.maketrans({"\r": "\n", "\0": ""})
    assert reader.text.translate(clean).replace("�", "") == text.translate(clean).replace("�", "")
