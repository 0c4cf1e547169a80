"""What a sweep from the command line sweeps: a JSON object, every key of which is checked before anything is loaded."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mechjax.tasks
from mechjax.base.errors import ArgumentError, did_you_mean
from mechjax.hub.json_files import read_object

TASKS = ("agreement", "greater_than", "induction", "ioi", "pronouns")
METRICS = ("logit_diff", "prob", "nll", "rank")


@dataclass(frozen=True)
class SweepSpec:
    """A sweep of activation patching, of many pairs of prompts.

    Attributes:
        model: A shipped model, a folder in Hugging Face layout, or a name on the Hub.
        site: The site to patch.
        over: The axes to sweep.
        mode: "denoise" or "noise".
        task: A task of `mechjax.tasks` that gives the prompts, in place of texts; None for texts.
        n: How many pairs of the task.
        seed: Which.
        split: "train" or "test".
        clean: Texts that show the behaviour.
        corrupt: Texts that do not, each as long as its clean one.
        answer: The next word of each clean text, or one for all; of a task its own.
        wrong: The next word of each corrupt text, or one for all; of a task its own.
        metric: "logit_diff" of `answer` over `wrong`, or "prob", "nll" or "rank" of `answer`.
        positions: Names of the task's positions to sweep in place of every column, or (for texts) each name with the
            column of every text; None for every column.
        chunk_size: Cells that run at once, which are one unit; None plans it from their memory.
        batch: Pairs that run at once, which are one part; None for all.
        dtype: Of the weights; None keeps the checkpoint's.
        revision: Of a name on the Hub.
        mesh: How many devices divide the pairs of a part, and how many the model; None for one device.
    """

    model: str
    site: str = "resid_pre"
    over: tuple[str, ...] = ("layer", "pos")
    mode: str = "denoise"
    task: str | None = None
    n: int | None = None
    seed: int = 0
    split: str = "test"
    clean: tuple[str, ...] | None = None
    corrupt: tuple[str, ...] | None = None
    answer: tuple[str, ...] | None = None
    wrong: tuple[str, ...] | None = None
    metric: str = "logit_diff"
    positions: tuple[str, ...] | Mapping[str, tuple[int, ...]] | None = None
    chunk_size: int | None = None
    batch: int | None = None
    dtype: str | None = None
    revision: str | None = None
    mesh: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self._check_prompts()
        self._check_answers()
        self._check_positions()

    @property
    def pairs(self) -> int:
        """How many pairs of prompts there are."""
        return len(self.clean) if self.clean is not None else self.n or 0

    @property
    def parts(self) -> int:
        """How many parts: the pairs of each run at once."""
        return math.ceil(self.pairs / (self.batch or self.pairs))

    def part(self, index: int) -> slice:
        """Which pairs a part has."""
        size = self.batch or self.pairs
        return slice(index * size, min((index + 1) * size, self.pairs))

    def page(self) -> dict[str, Any]:
        """As JSON, every key of it."""
        plain = lambda x: list(x) if isinstance(x, tuple) else x
        page = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if isinstance(self.positions, Mapping):
            page["positions"] = {name: list(at) for name, at in self.positions.items()}
        return page

    def _check_prompts(self) -> None:
        texts = self.clean is not None or self.corrupt is not None
        if texts == (self.task is not None):
            raise _wrong(
                "prompts come from `task` (with `n`, `seed`, `split`) or from `clean` and `corrupt`: give one of "
                "the two."
            )
        if self.task is not None and self.n is None:
            raise _wrong(f"`task` is {self.task!r} and `n` is missing: say how many pairs, such as 64.")
        if texts and (self.clean is None or self.corrupt is None or len(self.clean) != len(self.corrupt)):
            counts = [0 if side is None else len(side) for side in (self.clean, self.corrupt)]
            raise _wrong(
                f"`clean` has {counts[0]} texts and `corrupt` {counts[1]}: they are pairs, so as many."
            )
        if texts and self.n is not None:
            raise _wrong("`n` is for tasks; of texts there are as many as are listed. Leave it out.")

    def _check_answers(self) -> None:
        if self.task is not None and (self.answer is not None or self.wrong is not None):
            raise _wrong("`answer` and `wrong` are for texts; a task has its own. Leave them out.")
        if self.task is None:
            for name in ("answer", *(("wrong",) if self.metric == "logit_diff" else ())):
                given = getattr(self, name)
                if given is None:
                    raise _wrong(
                        f"`{name}` is missing: the next word, one for all texts or a list of one each."
                    )
            for name in ("answer", "wrong"):
                given = getattr(self, name)
                if given is not None and len(given) not in (1, self.pairs):
                    raise _wrong(
                        f"`{name}` has {len(given)} words for {self.pairs} texts: give one for all, or one each."
                    )

    def _check_positions(self) -> None:
        if self.positions is None:
            return
        if isinstance(self.positions, Mapping) == (self.task is not None):
            raise _wrong(
                '`positions` of a task is a list of its names, such as ["S2", "END"]; of texts it is an object that '
                'gives every name the column of each text, such as {"subject": [3, 4]}.'
            )
        if isinstance(self.positions, Mapping):
            for name, at in self.positions.items():
                if len(at) != self.pairs:
                    raise _wrong(f"position `{name}` has {len(at)} columns for {self.pairs} texts: one each.")


def _is_whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _are_words(value: Any) -> bool:
    return _is_text(value) or _are_texts(value)


def _is_mesh(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole(1), value))


def _are_positions(value: Any) -> bool:
    columns = lambda at: isinstance(at, list) and all(type(i) is int for i in at)
    return _are_texts(value) or (
        isinstance(value, dict) and bool(value) and all(map(columns, value.values()))
    )


def _one_of(known: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in known, f"one of {', '.join(known)}"


_TEXT = (_is_text, "a text")
_WORDS = (_are_words, "a word, or a list of words")
_COUNT = (_is_whole(1), "a whole number from 1")
_RIGHT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is_text, 'a text, such as "tasks-4l"'),
    "site": (_is_text, 'a text, such as "resid_pre"'),
    "over": (_are_texts, 'a list of axes, such as ["layer", "pos"]'),
    "mode": _one_of(("denoise", "noise")),
    "task": _one_of(TASKS),
    "n": _COUNT,
    "seed": (_is_whole(0), "a whole number from 0"),
    "split": _one_of(("train", "test")),
    "clean": (_are_texts, "a list of texts"),
    "corrupt": (_are_texts, "a list of texts"),
    "answer": _WORDS,
    "wrong": _WORDS,
    "metric": _one_of(METRICS),
    "positions": (_are_positions, "a list of names, or an object of lists of columns"),
    "chunk_size": _COUNT,
    "batch": _COUNT,
    "dtype": (_is_text, 'a text, such as "bfloat16"'),
    "revision": _TEXT,
    "mesh": (_is_mesh, "two whole numbers, such as [1, 8]: devices for the pairs, and for the model"),
}


def read_spec(path: str | os.PathLike[str]) -> SweepSpec:
    """The specification in a JSON file.

    Raises:
        CheckpointError: No such file, or not one JSON object.
        ArgumentError: A key that is not known, missing, or of another type; what would be right is said.
    """
    return spec_of(read_object(Path(path)))


def spec_of(page: Mapping[str, Any]) -> SweepSpec:
    """The specification that a JSON object says. A key that is null is as if it were not there.

    Raises:
        ArgumentError: As `read_spec`.
    """
    found: dict[str, Any] = {}
    for key, value in page.items():
        if key not in _RIGHT:
            raise _wrong(f"there is no key `{key}`.{did_you_mean(key, _RIGHT)} Keys are {', '.join(_RIGHT)}.")
        if value is None:
            continue
        right, says = _RIGHT[key]
        if not right(value):
            close = did_you_mean(value, TASKS + METRICS) if isinstance(value, str) else ""
            raise _wrong(f"`{key}` is {_brief(value)}; right would be {says}.{close}")
        found[key] = _held(value, one_is_list=key in ("answer", "wrong"))
    if "model" not in found:
        raise _wrong(
            '`model` is missing: a shipped model, a folder, or a name on the Hub, such as "tasks-4l".'
        )
    return SweepSpec(**found)


def _held(value: Any, *, one_is_list: bool) -> Any:
    if isinstance(value, dict):
        return {name: tuple(at) for name, at in value.items()}
    if one_is_list and isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def task_of(name: str) -> Callable[..., mechjax.tasks.Pairs]:
    """The task of that name."""
    return getattr(mechjax.tasks, name)


def _wrong(what: str) -> ArgumentError:
    return ArgumentError(f"the specification of the sweep: {what}")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
