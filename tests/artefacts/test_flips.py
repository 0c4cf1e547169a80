"""Every flipped bit, cut, deletion and exchange of files, in every kind of artefact, is named."""

import gc
import random
import shutil
from contextlib import suppress
from itertools import pairwise

import pytest

from mechjax.artefacts import verify
from mechjax.base.errors import ArgumentError, MechjaxError
from tests.artefacts.made import MADE, files, place

PLACES = 20
# Without these nothing can be said of the rest.
LISTS = {"mechjax.json", "manifest.json", "record.json", "sweep.json"}
ORBAX = "ignore::pytest.PytestUnraisableExceptionWarning"  # it leaves coroutines behind where one fails


# The others are in layouts of other libraries, whose readers know of no checksums; a sweep's makes damaged units again.
CHECKED_BY_READERS = ["record", "store", "step", "scoreboard", "circuit"]


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """An artefact of each kind."""
    made = {kind: tmp_path_factory.mktemp(kind) / "a" for kind in MADE}
    for kind, folder in made.items():
        MADE[kind].write(folder, 0)
    return made


@pytest.fixture(params=list(MADE))
def copied(request, every, tmp_path):
    """One that may be damaged, and its kind."""
    shutil.copytree(every[request.param], tmp_path / "a")
    return request.param, tmp_path / "a"


def name_of(file, at):
    return file.name if at.is_file() else file.relative_to(at).as_posix()


def test_verify__of_what_was_written__finds_it_whole(copied):
    kind, folder = copied
    found = verify(place(kind, folder))
    assert found.ok and found.summed and not found.problems, found.problems
    assert {name_of(file, place(kind, folder)) for file in files(place(kind, folder))} == set(found.files)
    assert int(found.sizes.sum()) == sum(file.stat().st_size for file in files(place(kind, folder)))


def test_verify__of_any_flipped_bit__names_the_file(copied):
    kind, folder = copied
    at, rng = place(kind, folder), random.Random(0)
    for file in files(at):
        data = file.read_bytes()
        places = {0, len(data) - 1, *rng.choices(range(len(data)), k=PLACES)}
        for where in sorted(places):
            flipped = bytearray(data)
            flipped[where] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            found = verify(at)
            assert name_of(file, at) in found.damaged, (file, where, flipped[max(where - 20, 0) : where + 20])
        file.write_bytes(data)
    assert verify(at).ok


def test_verify__of_cut_emptied_and_deleted_files__names_each(copied):
    kind, folder = copied
    at = place(kind, folder)
    for file in files(at):
        data = file.read_bytes()
        for cut in (data[:-1], data[: len(data) // 2], b"", data + b"\0"):
            file.write_bytes(cut)
            if at.is_file() and not cut:  # a file alone that is empty may be anything
                with pytest.raises(ArgumentError, match="holds nothing that has checksums"):
                    verify(at)
            else:
                assert name_of(file, at) in verify(at).damaged, (file, len(cut))
        file.unlink()
        if at.exists() and not (kind == "sweep" and file.name.startswith("unit-")) and kind != "scoreboard":
            assert _missed(at, file), file
        file.write_bytes(data)
    assert verify(at).ok


def _missed(at, file):
    """Whether a deleted file is missed, be it that nothing is recognised any more."""
    try:
        found = verify(at)
    except MechjaxError:
        return True
    return not found.summed or (not found.ok and "missing" in " ".join(found.problems))


def test_verify__of_files_that_changed_places__names_both(copied):
    kind, folder = copied
    at = place(kind, folder)
    there = files(at)
    for one, other in pairwise(there):
        data = one.read_bytes(), other.read_bytes()
        if data[0] == data[1]:
            continue
        one.write_bytes(data[1])
        other.write_bytes(data[0])
        names = {name_of(one, at), name_of(other, at)}
        told_by = {name for name in names if name in LISTS or name.startswith("checksums.")}
        assert (told_by or names) <= set(verify(at).damaged), (one, other)
        one.write_bytes(data[0])
        other.write_bytes(data[1])


@pytest.mark.parametrize("copied", CHECKED_BY_READERS, indirect=True)
@pytest.mark.filterwarnings(ORBAX)
def test_readers__of_any_flipped_bit__refuse_it_or_read_what_was_written(copied):
    """What a reader takes is right; that `verify` finds all that is not is another test's."""
    kind, folder = copied
    read, rng = MADE[kind].read, random.Random(1)
    expected = read(folder)
    for file in files(place(kind, folder)):
        data = file.read_bytes()
        for where in sorted(
            {0, len(data) - 1, *rng.choices(range(len(data)), k=3 if kind == "step" else PLACES)}
        ):
            flipped = bytearray(data)
            flipped[where] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            with suppress(MechjaxError):
                assert read(folder) == expected, (file, where)
        file.write_bytes(data)
    gc.collect()
