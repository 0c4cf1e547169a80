"""Workers that are killed, stopped, slow, out of room or fed with poison: every unit once, nothing lost."""

import collections
import json
import os
import random
import signal
import time

import pytest

from mechjax.base.errors import SweepError, WriteError
from mechjax.workers import Sharing, Team, opened, work
from tests.workers.apart import begun, ended, names, result

AS_ELSEWHERE = {"process": None}  # a worker whose end nobody sees, as if it ran on another machine


def stamps(folder):
    """When each unit was written, to the nanosecond, and which file it is."""
    found = folder.glob("unit-*[0-9]")
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


def executions(folder):
    """How often each unit was begun, by anybody."""
    lines = (line for log in folder.parent.glob("log-*") for line in log.read_text().split())
    return collections.Counter(map(int, lines))


def check_whole(folder, n):
    """Every unit is there, is what it should be, and there is nothing else."""
    assert {path.name for path in folder.iterdir()} == {".leases", *names(n)}
    assert opened(folder / ".leases").names() == []
    assert all((folder / name).read_bytes() == result(i) for i, name in enumerate(names(n)))


def settled(folder, n):
    return len(stamps(folder)) >= n


def test_work__300_units_4_workers_8_kills__300_valid_none_lost_none_doubled(tmp_path):
    n, folder, rng, kept = 300, tmp_path / "sweep", random.Random(7), {}
    start = lambda: begun(folder, n=n, expiry=2, seconds=0.02, **AS_ELSEWHERE)
    workers, kills = [start() for _ in range(4)], 0
    while not stamps(folder):
        time.sleep(0.01)
    while kills < 8:
        time.sleep(rng.uniform(0.05, 0.3))
        assert not settled(folder, n), f"all was done after {kills} kills"
        chosen = rng.randrange(4)
        workers[chosen].send_signal(signal.SIGKILL)
        assert ended(workers[chosen]) is None
        kills += workers[chosen].returncode == -signal.SIGKILL
        workers[chosen] = start()
        assert kept.items() <= stamps(folder).items()  # what was done is never done again
        kept = stamps(folder)
    said = [ended(worker) for worker in workers]
    assert kept.items() <= stamps(folder).items()
    check_whole(folder, n)
    assert all(page["quarantined"] == [] and page["said"] == [] for page in said)
    done = collections.Counter(name for page in said for name in page["done"])
    assert max(done.values()) == 1
    assert set(executions(folder)) == set(range(n))
    assert sum(executions(folder).values()) <= n + 8  # a kill costs at most the unit that it hits


def test_work__with_a_wall_clock_an_hour_off__shares_as_well(tmp_path):
    folder = tmp_path / "sweep"
    how = {"n": 40, "expiry": 10, "seconds": 0.01, **AS_ELSEWHERE}
    said = [ended(worker) for worker in [begun(folder, skew=hours * 3600, **how) for hours in (-1, 0, 1)]]
    check_whole(folder, 40)
    assert sum(len(page["done"]) for page in said) == 40 == sum(executions(folder).values())


@pytest.mark.parametrize("other", ["", "of another device"])
def test_work__stopped_in_the_middle_of_a_unit__is_taken_over_and_changes_nothing(tmp_path, other):
    folder = tmp_path / "sweep"
    slow = begun(folder, n=1, expiry=0.5, seconds=2, other=other, **AS_ELSEWHERE)
    while not executions(folder):
        time.sleep(0.01)
    slow.send_signal(signal.SIGSTOP)
    quick = ended(begun(folder, n=1, expiry=0.5, **AS_ELSEWHERE))
    assert quick["done"] == names(1)
    before = stamps(folder)
    slow.send_signal(signal.SIGCONT)
    page = ended(slow)
    assert page["done"] == [] and page["again"] == names(1)
    assert stamps(folder) == before
    if not other:
        assert page["quarantined"] == page["said"] == []
        check_whole(folder, 1)
        return
    assert page["quarantined"] == names(1)
    assert "two workers have done" in page["said"][0] and "the first result stays" in page["said"][0]
    [kept] = (folder / "quarantine").iterdir()
    assert kept.read_bytes() == result(0) + other.encode()
    assert (folder / names(1)[0]).read_bytes() == result(0)


def test_work__of_a_unit_that_raises__sets_it_aside_after_three_and_does_the_rest(tmp_path):
    folder = tmp_path / "sweep"
    workers = [begun(folder, n=12, raises=5, expiry=5, seconds=0.01) for _ in range(2)]
    said = [ended(worker) for worker in workers]
    assert sorted(name for page in said for name in page["done"]) == [*names(5), *names(12)[6:]]
    page = json.loads((folder / "failed" / "unit-000005.json").read_text())
    assert page["attempts"] == 3 == executions(folder)[5]
    assert page["error"] == "ValueError: poison" and "in do" in page["traceback"]
    assert ended(begun(folder, n=12))["done"] == []  # it stays aside
    (folder / "failed" / "unit-000005.json").unlink()
    assert ended(begun(folder, n=12))["done"] == names(12)[5:6]
    (folder / "failed").rmdir()
    check_whole(folder, 12)


def test_work__of_a_unit_that_kills__takes_three_workers_and_no_more(tmp_path):
    folder = tmp_path / "sweep"
    assert [ended(begun(folder, n=3, kills=1, expiry=600)) for _ in range(3)] == [None] * 3  # seen at once
    page = ended(begun(folder, n=3, kills=1, expiry=600))
    assert page["done"] == names(3)[2:]
    failed = json.loads((folder / "failed" / "unit-000001.json").read_text())
    assert failed["attempts"] == 3 == executions(folder)[1]
    assert "ended, or was stopped, without a word" in failed["error"]


def test_work__by_numbers__does_its_own_units_alone(tmp_path):
    folder = tmp_path / "sweep"
    for worker in range(3):
        page = ended(begun(folder, n=10, worker=worker, of=3, raises=4))
        assert page["done"] == [name for i, name in enumerate(names(10)) if i % 3 == worker and i != 4]
    assert json.loads((folder / "failed" / "unit-000004.json").read_text())["attempts"] == 3
    assert not (folder / ".leases").exists()


def test_work__on_a_full_disk__says_what_is_done_and_leaves_nothing_half_written(tmp_path):
    folder = tmp_path / "sweep"
    error = ended(begun(folder, n=40, largest=600))["error"]  # unit 15 and those behind it are larger
    assert error.startswith("WriteError: cannot write") and "File too large" in error and "make room" in error
    assert "15 of 40 units in" in error and "the same call goes on from there" in error
    assert sorted(stamps(folder)) == names(15)
    assert ended(begun(folder, n=40))["done"] == names(40)[15:]
    check_whole(folder, 40)


def test_work__on_what_cannot_be_written__says_so():
    with pytest.raises(
        WriteError, match=r"cannot write `/proc/nothing/.*Choose a folder that can be written"
    ):
        work(opened("/proc/nothing"), names(2), result, sharing=Sharing())
    with pytest.raises(WriteError, match="0 of 2 units in `/proc/nothing` are done"):
        work(opened("/proc/nothing"), names(2), result, sharing=Sharing(worker=0, of=1))


def test_work__interrupted__gives_its_unit_back_untried(tmp_path):
    asked = []

    def stops(index):
        asked.append(index)
        raise KeyboardInterrupt

    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            work(opened(tmp_path), names(1), stops, sharing=Sharing())
    assert asked == [0] * 5 and not any((tmp_path / ".leases").iterdir())
    assert work(opened(tmp_path), names(1), result, sharing=Sharing()).done == ("unit-000000",)


def test_work__while_others_are_at_the_rest__waits_or_does_not(tmp_path):
    other = begun(tmp_path / "sweep", n=1, seconds=0.7, expiry=600)
    while not executions(tmp_path / "sweep"):
        time.sleep(0.01)
    here = lambda waits: work(
        opened(tmp_path / "sweep"), names(1), result, sharing=Sharing(expiry=0.2), waits=waits
    )
    assert here(False).done == () and not stamps(tmp_path / "sweep")
    assert here(True).done == () and stamps(tmp_path / "sweep")
    assert ended(other)["done"] == names(1)


def test_work__in_a_team__ends_with_the_unit_that_raised(tmp_path):
    told = []
    team = Team(2, True, lambda number: told.append(number) or number)

    def raises(index):
        raise ValueError("poison")

    with pytest.raises(
        SweepError, match=r"`unit-000000` failed in a worker of 2 processes \(ValueError: poison"
    ):
        work(opened(tmp_path), names(2), raises, sharing=Sharing(), team=team)
    assert told == [0]
    with pytest.raises(WriteError, match="0 of 2 units"):
        work(opened("/proc/nothing"), names(2), result, sharing=Sharing(), team=team)
    follower = Team(2, False, lambda number: told[-1])  # it is told that the first has ended
    with pytest.raises(SweepError, match="the first process of this worker has ended"):
        work(opened(tmp_path), names(2), result, sharing=Sharing(), team=follower)


def test_logs__of_workers__are_where_the_tests_look(tmp_path):
    assert ended(begun(tmp_path / "sweep", n=2))["done"] == names(2)
    assert executions(tmp_path / "sweep") == {0: 1, 1: 1} and os.listdir(tmp_path / "sweep")
