"""Leases: one owner at a time, whatever clocks say."""

import ast
import json
from pathlib import Path

import pytest

import mechjax.workers
from mechjax.base.errors import ArgumentError
from mechjax.workers import Leases, Sharing, opened
from mechjax.workers.process import is_gone, this_process

NAME = "unit-000000"


class Clock:
    """A clock that stands where it is put."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def store(tmp_path):
    return opened(tmp_path / "sweep")


def worker(store, owner, now=0.0, expiry=60.0, process=None):
    """The leases of a worker that renews nothing by itself, and its clock."""
    clock = Clock(now)
    return Leases(store, Sharing(owner=owner, expiry=expiry, process=process), clock=clock), clock


def owner(store):
    return json.loads(store.read(f".leases/{NAME}").value)["owner"]


def test_claim__of_two_workers__is_of_one(store):
    (one, _), (two, _) = worker(store, "one"), worker(store, "two")
    assert one.claim(NAME).attempt == 1
    assert two.claim(NAME) is None and owner(store) == "one"
    one.drop()
    assert two.claim(NAME).owner == "two"
    assert owner(store) == "two"


def test_claim__of_workers_whose_clocks_are_a_day_apart__waits_for_as_long_as_the_owner_promised(store):
    (one, _), (two, clock) = worker(store, "one", now=86_400.0), worker(store, "two", now=-7.0, expiry=1.0)
    assert one.claim(NAME)
    assert two.claim(NAME) is None  # seen for the first time
    clock.now += 59
    assert two.claim(NAME) is None
    one._renew_once()
    clock.now += 59
    assert two.claim(NAME) is None  # it has changed
    clock.now += 59
    assert two.claim(NAME) is None
    clock.now += 1
    taken = two.claim(NAME)
    assert taken.attempt == 2 and "one ended, or was stopped" in taken.error
    one._renew_once()
    assert owner(store) == "two"  # the first has noticed, and renews it no more
    one.drop()
    assert owner(store) == "two"


def test_wall_time__of_no_machine__is_read_anywhere(tmp_path):
    for path in Path(mechjax.workers.__file__).parent.glob("*.py"):
        called = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        }
        assert not {name for name in called if name in ("time.time", "time.time_ns") or "datetime" in name}
        assert not {name for name in called if name.endswith((".now", ".st_mtime", ".utcnow"))}


def test_failed__and_given_back__count_as_they_should(store):
    one, _ = worker(store, "one")
    two, _ = worker(store, "two")
    one.claim(NAME)
    one.failed("ValueError: poison")
    found = two.claim(NAME)  # nobody's, so nobody is waited for
    assert found.attempt == 2 and found.error == "ValueError: poison"
    two.give_back()
    assert one.claim(NAME).attempt == 2
    one.drop()
    assert one.claim(NAME).attempt == 1
    one.give_back()
    assert store.names() == []


def test_claim__of_a_lease_that_nobody_can_read__waits_and_takes_it_over(store):
    for broken in (b"", b"{", b"[]", b'{"owner": 3}', b'{"expiry": 1e999}'):
        store.write(f".leases/{NAME}", broken)
        one, clock = worker(store, "one", expiry=5.0)
        assert one.claim(NAME) is None
        clock.now += 5
        assert one.claim(NAME).attempt == 2
        one.drop()


def test_claim__of_a_process_of_this_machine_that_has_ended__waits_for_nobody(store):
    *here, number, began = this_process().split()
    assert not is_gone(this_process()) and not is_gone(None)
    assert is_gone(" ".join([*here, number, str(int(began) + 1)]))  # its number is somebody else's now
    assert not is_gone(" ".join(["another", here[1], number, "1"]))
    one, _ = worker(store, "one", process=" ".join([*here, number, "1"]))
    assert one.claim(NAME)
    two, _ = worker(store, "two", process=this_process())
    assert two.claim(NAME).attempt == 2


def test_leases__where_writes_are_not_atomic__are_refused_with_what_works():
    with pytest.raises(ArgumentError, match=r"deletes are not atomic.*`--worker 3 --of 16`"):
        Leases(opened("s3://bucket-of-mine/sweep"), Sharing())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"worker": 3}, "say both, such as `--worker 3 --of 16`"),
        (
            {"worker": 16, "of": 16},
            "workers are counted from 0, so of 16 the last is 15. Where tasks are counted",
        ),
        ({"worker": -1, "of": 2}, "workers are counted from 0"),
        ({"expiry": 0.0}, "seconds, more than 0"),
        ({"expiry": float("nan")}, "seconds, more than 0"),
    ],
)
def test_sharing__of_numbers_that_do_not_fit__teaches(given, message):
    with pytest.raises(ArgumentError, match=message):
        Sharing(**given)
