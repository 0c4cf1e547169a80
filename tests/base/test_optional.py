import sys

import pytest

from mechjax.base.errors import MissingExtraError
from mechjax.base.optional import require


def test_require__of_what_is_there__imports_it():
    assert require("json", extra="torch").dumps([1]) == "[1]"


def test_require__of_what_is_missing__names_the_command():
    with pytest.raises(MissingExtraError, match=r"pip install 'mechjax\[viz\]'"):
        require("no_such_package_at_all", extra="viz")


def test_require__of_a_broken_package__lets_its_own_error_through(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import its_missing_friend")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "half_there", raising=False)
    with pytest.raises(ModuleNotFoundError, match="its_missing_friend"):
        require("half_there", extra="viz")
