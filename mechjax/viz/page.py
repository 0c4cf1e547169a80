"""One self-contained page: style, script and numbers in a single file that asks nothing of any network.

A content security policy names the one script that may run by its hash and forbids every request, so the page stays
what it is wherever it is opened.
"""

import base64
import hashlib
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any
from uuid import uuid4

import equinox as eqx

from mechjax.base.atomic import replace_file
from mechjax.base.errors import WriteError
from mechjax.base.provenance import Provenance, provenance_of
from mechjax.viz.html import Html, escape, tag

_MARK = re.compile(r"\{\{ (\w+) \}\}")


class Page(eqx.Module):
    """A page that shows itself in a notebook and can be written to a file.

    Attributes:
        title: What stands in the window's title.
        body: What stands on the page.
        more: Templates whose style and script it needs beside those of every page.
    """

    title: str = eqx.field(static=True)
    body: Html = eqx.field(static=True)
    more: tuple[str, ...] = eqx.field(static=True, default=())

    @property
    def html(self) -> str:
        """The whole file."""
        return self._html(None)

    def _html(self, made: Provenance | None) -> str:
        script, style = (
            "".join(_template(f"{name}.{kind}") for name in ("page", *self.more)) for kind in ("js", "css")
        )
        return _fill(
            _template("page.html"),
            {
                "title": escape(self.title),
                "policy": _policy(script),
                "style": style,
                "script": script,
                "body": self.body if made is None else escape([self.body, _made_from(made)]),
            },
        )

    def write(self, path: str | Path, **made_from: Any) -> Path:
        """Write the page, in one step; folders on the way are made.

        Args:
            path: Where to; a link is followed.
            **made_from: What it was made from, as `mj.save` takes it; where there is any, the page ends with where it
                comes from.

        Returns:
            The file's absolute path.

        Raises:
            ArgumentError: It was made from something that cannot be told.
            WriteError: The file cannot be written.
        """
        path = Path(path).expanduser().absolute()
        text = self._html(provenance_of(**made_from) if made_from else None).encode()
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():  # a pipe, say; of a folder this is the error
                path.write_bytes(text)
            else:
                replace_file(path.resolve(), text)
        return path

    def __repr__(self) -> str:
        return f"Page: {self.title}"  # not the page itself: notebooks keep this beside the frame

    def _repr_html_(self) -> str:
        # A frame of its own: the notebook's style and the page's leave each other alone.
        frame = tag(
            "iframe", srcdoc=self.html, sandbox="allow-scripts", title=self.title, width="100%", height="720",
            style="border:1px solid #8884;border-radius:8px",
        )  # fmt: skip
        return str(frame)


def check_writable(path: str | Path) -> None:
    """Find out before a long computation whether its page can be written; changes nothing that is there.

    Raises:
        WriteError: It cannot.
    """
    path = Path(path).expanduser().absolute()
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            path.open("a").close()  # which is the error
        if not path.exists() or path.is_file():
            replace_file(probe := path.resolve().with_name(f".{uuid4().hex}"), b"")
            probe.unlink()


@contextmanager
def _writing(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        why = (
            f"`{error.filename}` is no folder"
            if isinstance(error, FileExistsError)
            else error.strerror or str(error)
        )
        raise WriteError(
            f"cannot write the page to `{path}`: {why}. Choose a file in a folder that you may write to."
        ) from error


def section(title: str, *children: Html | str | None, id_: str | None = None) -> Html:
    """A part of a page under a heading; plain text becomes a paragraph."""
    parts = [tag("p", child) if not isinstance(child, Html) else child for child in children if child]
    return tag("section", tag("h2", title), parts, id=id_)


def _made_from(made: Provenance) -> Html:
    """Where a page comes from, folded up."""
    rows = [tag("tr", tag("th", word, scope="row"), tag("td", said)) for word, said in made.lines()]
    return tag("details", tag("summary", "Where this comes from"), tag("table", rows), class_="made-from")


def _template(name: str) -> str:
    return (resources.files("mechjax.viz") / "templates" / name).read_text(encoding="utf-8")


def _fill(template: str, values: Mapping[str, str]) -> str:
    # One pass: what is filled in is never looked at again, whatever it contains.
    return _MARK.sub(lambda mark: values[mark[1]], template)


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
