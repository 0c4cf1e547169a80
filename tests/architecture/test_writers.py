"""Whatever is written appears whole or not at all: nothing writes to disk but through `base/atomic`, or says here why."""

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mechjax"
WRITES = re.compile(
    r"""\.write_(text|bytes)\(|save_file\(|np\.savez?\(|json\.dump\(|\bopen\([^)\n]*["'][rbt]*[wax+][rwbt+]*["']"""
)
MAY = {
    "base/atomic.py": "the one place that does",
    "models/export.py": "into a folder that `replace_folder` puts in place",
    "dictionaries/formats/write_saelens.py": "into a folder that `replace_folder` puts in place",
    "dictlearn/loop.py": "a log that only grows: a line that is cut off is dropped when the run goes on",
    "store/lock.py": "an empty file that is locked",
    "viz/page.py": "a pipe, where one was asked for; and an error, for its words",
}


def test_writers__of_all_files__are_known():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if WRITES.search(path.read_text("utf-8"))
    }
    assert found == set(MAY)


def test_writers__that_would_be_new__are_seen():
    seen = [
        'p.write_text("x")',
        'open(p, "w")',
        'p.open("ab")',
        "np.savez(p)",
        "save_file(x, p)",
        "p.open('r+')",
    ]
    assert all(map(WRITES.search, seen))
    assert not any(
        map(WRITES.search, ['p.open("rb")', "open(p)", "replace_file(p, b)", "webbrowser.open(x)"])
    )
