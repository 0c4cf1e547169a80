"""A worker: it claims a unit, does it, publishes the result, and goes on until none is left.

A unit is done at least once, and published exactly once: of a unit that two have done (one was taken for dead), the
first result counts, and the second must be the same bytes. A unit that raises, or that ends its worker, is tried three
times in all, by whoever comes, and then set aside, so that it takes neither the sweep nor all workers with it.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from mechjax.base.errors import SweepError, WriteError
from mechjax.workers.lease import Leases
from mechjax.workers.sharing import Sharing
from mechjax.workers.store import Store
from mechjax.workers.team import ALONE, Team
from mechjax.workers.turns import DONE, ENDED, WAIT, Allotted, Leased, left


@dataclass(frozen=True)
class Worked:
    """What came of a worker's turns.

    Attributes:
        done: The units that it did and published first.
        again: Those that somebody else had published meanwhile.
        quarantined: Those of `again` whose bytes differ.
    """

    done: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()


def work(
    store: Store,
    names: Sequence[str],
    do: Callable[[int], bytes],
    *,
    sharing: Sharing,
    team: Team = ALONE,
    waits: bool = True,
    shift: int = 0,
    settled: Callable[[int, int], None] = lambda n, of: None,
) -> Worked:
    """Do units until none is left to do.

    Args:
        store: Where results go, each under its unit's name.
        names: Of all units, the same for every worker.
        do: The result of a unit, by its number; the same bytes whoever does it.
        sharing: How units are shared with other workers.
        team: The processes of this worker, all of which call this, and `do`.
        waits: Whether to stay until the units that others are at are done too, to do them if they are not.
        shift: Added to units' numbers where these say whose they are.
        settled: Called with how many units are done or set aside, as far as this worker knows, and of how many.

    Returns:
        What this worker did. Which units failed is in the store.

    Raises:
        ArgumentError: Storage that does not do what `sharing` asks of it.
        SweepError: A unit raised in a team, whose processes cannot know of each other whether they raised too.
        WriteError: A result cannot be written: what was published is whole, and the same call goes on from there.
    """
    done: list[str] = []
    again: list[str] = []
    with ExitStack() as stack:
        turns: Leased | Allotted | None = None
        if team.first and sharing.worker is None:
            turns = Leased(store, names, sharing, stack.enter_context(Leases(store, sharing)))
        elif team.first:
            turns = Allotted(store, names, sharing, shift)
        try:
            while (at := _told(team, turns, settled)) != DONE and (waits or at != WAIT):
                if at == WAIT:
                    if turns:
                        turns.rest()
                elif (data := _done(at, names[at], do, turns, team)) is not None and turns:
                    with _heard(team):
                        (done if turns.publish(data) else again).append(names[at])
        except BaseException as error:
            if turns:  # others need not wait for this worker; where nothing can be written they do
                with suppress(WriteError):
                    turns.give_back()
            if isinstance(error, WriteError):
                raise _ended(store, names, error) from error
            raise
        return Worked(tuple(done), tuple(again), tuple(turns.quarantined) if turns else ())


def _told(team: Team, turns: Leased | Allotted | None, settled: Callable[[int, int], None]) -> int:
    """What is to be done next, in every process of the team."""
    at = DONE
    if turns:
        with _heard(team):
            at = turns.next()
            settled(*turns.settled())
    if (at := team.told(at)) == ENDED and not team.first:
        raise SweepError("the first process of this worker has ended; what it printed says why.")
    return at


def _done(
    at: int, name: str, do: Callable[[int], bytes], turns: Leased | Allotted | None, team: Team
) -> bytes | None:
    """The result of a unit; None where it raised, and may be tried again."""
    try:
        return do(at)
    except WriteError:
        raise
    except Exception as error:
        if turns:
            turns.failed(error)
        if team.size > 1:
            raise _broken(name, team, error) from error
        return None


@contextmanager
def _heard(team: Team) -> Generator[None, None, None]:
    """What ends the first process while the others wait for its word, they are told."""
    try:
        yield
    except BaseException:
        if team.size > 1:
            team.told(ENDED)
        raise


def _ended(store: Store, names: Sequence[str], error: WriteError) -> WriteError:
    whole = len(names) - len(left(store, names))
    return WriteError(
        f"{error} {whole} of {len(names)} units in `{store.place}` are done, and stay; the same call goes on from "
        "there."
    )


def _broken(name: str, team: Team, error: Exception) -> SweepError:
    return SweepError(
        f"`{name}` failed in a worker of {team.size} processes ({type(error).__name__}: {error}), which "
        "cannot go on: some of them may wait for others. Start the worker again; a unit that fails three times is set "
        "aside."
    )
