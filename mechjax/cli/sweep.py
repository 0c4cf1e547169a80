r"""`mechjax sweep run SPEC FOLDER`: patch many pairs of prompts, by any number of workers that share a folder.

Start the same command as often as you like, wherever the folder can be reached: each is a worker, takes units that
nobody is at, and ends when all are done. Whoever is killed may be started again; nothing is done twice but the unit
that it was at. What starts workers is yours:

    SLURM, one worker per task, started again when its node is lost:

        sbatch --array=0-15 --requeue --gpus=1 --wrap "mechjax sweep run spec.json /shared/sweep"

    SLURM, workers of 4 processes that hold one model together ("mesh": [1, 8] in the specification):

        sbatch --array=0-3 --requeue --nodes=2 --ntasks-per-node=2 --gpus-per-task=2 \
            --wrap "srun mechjax sweep run spec.json /shared/sweep --distributed"

    GKE, by xpk, four workers, each a slice of its own that is one mesh ("mesh": [1, 16]):

        seq 4 | xargs -I{} xpk workload create --cluster=mine --workload=sweep-{} --tpu-type=v5litepod-16 \
            --num-slices=1 --docker-image=IMAGE --max-restarts=10 \
            --command "mechjax sweep run spec.json gs://bucket/sweep --distributed"

    One machine, three workers:

        seq 3 | xargs -P 3 -I{} mechjax sweep run spec.json sweep

    Storage without leases (S3): each worker says which it is.

        sbatch --array=0-15 --requeue \
            --wrap 'mechjax sweep run spec.json s3://bucket/sweep --worker $SLURM_ARRAY_TASK_ID --of 16'

A specification, in JSON:

    {"model": "tasks-4l", "task": "ioi", "n": 64, "site": "z", "over": ["layer", "head"], "batch": 16}

or with texts, in place of the task:

    {"model": "tasks-4l", "clean": ["..."], "corrupt": ["..."], "answer": ["Mary"], "wrong": ["John"]}

Cloud storage goes by what Google and Amazon document of it, and was not tried: the tests run on folders.
"""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechjax.base.errors import ArgumentError
from mechjax.studies import sweep as study
from mechjax.studies.sweep_spec import read_spec
from mechjax.viz import scores_text
from mechjax.workers import Sharing, opened, team_of_processes

_SHOWN = 20  # rows of a table, or lines of a list


def run(
    spec: tyro.conf.Positional[Path],
    folder: tyro.conf.Positional[str],
    *,
    worker: int | None = None,
    of: int | None = None,
    expiry: float = 60.0,
    retry: bool = False,
    distributed: bool = False,
    top: int = 10,
) -> int:
    """Be a worker of a sweep until it is done, then show what matters most.

    Exits with 0 where all is done, 1 where units failed or two workers found different results, 2 where it cannot be
    run, 130 where it was interrupted: what is done stays, and the same command goes on.

    Args:
        spec: A JSON file that says what is swept.
        folder: Where workers share it: a folder, `gs://bucket/prefix`, or (with `--worker`) `s3://bucket/prefix`.
        worker: Which worker this is, from 0, where units are shared by numbers and not by leases.
        of: How many workers there are, with `--worker`.
        expiry: Seconds after which a worker that gives no sign is taken for dead.
        retry: Try units again that failed three times.
        distributed: This worker is several processes, of SLURM, a TPU slice or MPI, which tell JAX of each other.
        top: How many leading places to name.
    """
    asked = read_spec(spec)
    sharing = Sharing(worker=worker, of=of, expiry=expiry)
    if distributed:
        _meet()
    with _stopped_by_sigterm():
        did = study.run(asked, folder, sharing=sharing, retry=retry)
    if asked.mesh and not team_of_processes().first:
        return 0
    found, console = study.status(folder), Console()
    if not (kind := opened(folder).kind).tried:
        console.print(Text(kind.promise, style="dim"), soft_wrap=True)
    console.print(
        f"this worker did {len(did.done)} units"
        + (f", and {len(did.again)} that another was quicker with" if did.again else "")
    )
    if found.failed:
        console.print(_failures(found.failed, spec, folder), soft_wrap=True)
    if found.quarantined:
        console.print(_listed("Two workers found different results", found.quarantined), soft_wrap=True)
    if found.done:
        console.print(scores_text(study.result(folder), top=top))
    elif not found.failed:
        console.print(Text(f"Other workers' units are left: mechjax sweep status {folder}"), soft_wrap=True)
    return 1 if found.failed or found.quarantined else 0


def status(folder: tyro.conf.Positional[str]) -> None:
    """Say how far a sweep is: done, being done and by whom, failed, left.

    Args:
        folder: Of the sweep.
    """
    found, console = study.status(folder), Console()
    console.print(_table(found), soft_wrap=True)
    waiting = sum(state is None for _, state in found.parts)
    if waiting:
        console.print(Text(f"{waiting} of {len(found.parts)} parts are not begun.", style="dim"))
    for unit, error in found.failed[:_SHOWN]:
        console.print(Text.assemble((f"{unit} ", "red"), error), soft_wrap=True)
    if found.quarantined:
        console.print(_listed("Two workers found different results", found.quarantined), soft_wrap=True)


def verify(folder: tyro.conf.Positional[str]) -> int:
    """Read every file of a sweep and compare its checksum. Exits with 0 where all is whole, else with 1.

    Args:
        folder: Of the sweep.
    """
    problems, console = study.verify(folder), Console()
    if not problems:
        console.print(Text("every unit is there and whole", style="green"))
        return 0
    table = Table("file", "what is wrong", box=None, pad_edge=False)
    for name, what in problems[:_SHOWN]:
        table.add_row(Text(name), Text(what, style="bold red"))
    console.print(table)
    more = f", of which {_SHOWN} are shown" * (len(problems) > _SHOWN)
    console.print(
        Text(
            f"{len(problems)} problems{more}. `mechjax sweep run SPEC {folder}` does what is missing; delete what is "
            "damaged, and it is done again."
        ),
        soft_wrap=True,
    )
    return 1


def sweep(
    verb: Annotated[
        Annotated[Any, tyro.conf.subcommand("run", constructor=run)]
        | Annotated[Any, tyro.conf.subcommand("status", constructor=status)]
        | Annotated[Any, tyro.conf.subcommand("verify", constructor=verify)],
        tyro.conf.arg(name=""),  # so that options stand without the name of this argument
    ],
) -> int | None:
    """What the verb returns."""
    return verb


sweep.__doc__ = __doc__  # what `mechjax sweep --help` shows


def _meet() -> None:
    import jax

    try:
        jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"`--distributed`: JAX finds no other processes of this worker ({error}). Start it under SLURM, MPI or on "
            "a TPU slice, or leave `--distributed` out where a worker is one process."
        ) from error


@contextmanager
def _stopped_by_sigterm() -> Generator[None, None, None]:
    """What ends a worker before its machine is taken away is as Ctrl-C: its unit is given back at once."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _table(found: study.SweepStatus) -> Table:
    table = Table("part", box=None, pad_edge=False, header_style="dim")
    for name in ("done", "at work", "failed", "left"):
        table.add_column(name, justify="right")
    table.add_column("by")
    begun = [(name, state) for name, state in found.parts if state is not None]
    counts = lambda s: (len(s.done), len(s.leased), len(s.failed), len(s.left))
    unfinished = [(name, s) for name, s in begun if len(found.parts) <= _SHOWN or any(counts(s)[1:])]
    for name, state in unfinished[:_SHOWN]:
        owners = ", ".join(dict.fromkeys(owner for _, owner in state.leased))
        table.add_row(Text(name.rstrip("/") or "all"), *map(str, counts(state)), Text(owners))
    if len(found.parts) > 1:
        sums = [sum(column) for column in zip(*(counts(s) for _, s in begun), strict=True)] or [0] * 4
        table.add_row(Text("all begun", style="bold"), *map(str, sums), "")
    return table


def _failures(failed: tuple[tuple[str, str], ...], spec: Path, folder: str) -> Text:
    said = Text(f"{len(failed)} units failed three times and were set aside:\n", style="bold red")
    for unit, error in failed[:_SHOWN]:
        said.append(f"  {unit}: {error}\n", style="not bold default")
    return said.append(
        f"Tracebacks are in `failed/` beside them. Try again: mechjax sweep run {spec} {folder} --retry",
        style="not bold default",
    )


def _listed(what: str, names: tuple[str, ...]) -> Text:
    return Text(f"{what}: {', '.join(names[:_SHOWN])}. Compare each with the unit that it is called after.")
