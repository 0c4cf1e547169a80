import pytest

from tests.store import small


@pytest.fixture(scope="session")
def whole(tiny_model, tmp_path_factory):
    """A folder that was written at once, and its store. Not to be changed."""
    folder = tmp_path_factory.mktemp("store") / "whole"
    return folder, small.write(folder, tiny_model)


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of it, to be damaged."""
    import shutil

    return shutil.copytree(whole[0], tmp_path / "copied")
