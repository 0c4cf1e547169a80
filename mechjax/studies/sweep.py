"""A sweep of many pairs of prompts, by any number of workers that come and go: each runs this, with one folder.

The pairs are cut into parts, which run at once, and each part's cells into units, which are what workers share
(`mechjax.patching.units`, in `part-000003/` of the folder). Nothing is done but by workers; there is no server, and
whoever starts the processes is no matter: SLURM, GKE, `xargs`.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mechjax import metrics
from mechjax.base.digests import tree_digest
from mechjax.base.errors import ArgumentError, CheckpointError
from mechjax.base.prompts import Prompts
from mechjax.models.decoder import Decoder
from mechjax.models.encoder import Encoder
from mechjax.models.load import load
from mechjax.models.mamba import Mamba
from mechjax.parallel import make_mesh, shard
from mechjax.patching.kept import RUNS, State, kept_in, problems_of, scores_in, state_of
from mechjax.patching.planned import Planned, planned
from mechjax.patching.scores import PatchScores
from mechjax.patching.units import fill
from mechjax.studies.sweep_spec import SweepSpec, task_of
from mechjax.tasks.answer import answer_token
from mechjax.workers import ALONE, Sharing, Store, Worked, check_sharing, opened, team_of_processes
from mechjax.workers.agree import SPECIFICATION, agree, specification_of
from mechjax.workers.turns import left, try_again

FORMAT = "mechjax sweep of parts 1"
_PARTS, _MOST = "part-", 1_000_000


@dataclass(frozen=True)
class SweepStatus:
    """How far a sweep is.

    Attributes:
        parts: Name of each part, and how far it is; None where no worker has begun it, so that its units are not known.
    """

    parts: tuple[tuple[str, State | None], ...]

    @property
    def done(self) -> bool:
        """Whether every unit is there."""
        return all(s is not None and not (s.left or s.leased or s.failed) for _, s in self.parts)

    @property
    def failed(self) -> tuple[tuple[str, str], ...]:
        """Units that were set aside, each with its error."""
        return tuple((f"{part}{unit}", error) for part, s in self.parts if s for unit, error in s.failed)

    @property
    def quarantined(self) -> tuple[str, ...]:
        """Results that differ from what was there first."""
        return tuple(f"{part}{key}" for part, s in self.parts if s for key in s.quarantined)


def run(
    spec: SweepSpec,
    folder: str | os.PathLike[str],
    *,
    sharing: Sharing | None = None,
    retry: bool = False,
) -> Worked:
    """Be a worker of a sweep: until it is done, or (by numbers) until this worker's own units are.

    Args:
        spec: What is swept; the same for every worker.
        folder: A folder or URL that all workers reach.
        sharing: How units are shared; by leases unless it says otherwise.
        retry: Whether units that were set aside are tried again.

    Returns:
        What this worker did. What failed is in `status`.

    Raises:
        ArgumentError: The folder of another sweep; what differs is named. A specification that cannot be.
        CheckpointError: The model or a file of the folder cannot be read, or a file was changed.
        PairingError: Texts that do not line up.
        SweepError: A unit raised in a worker of several processes.
        WriteError: The folder cannot be written, or has no room; what is done stays.
    """
    sharing, store = sharing or Sharing(), opened(folder)
    team = team_of_processes() if spec.mesh else ALONE
    check_sharing(store, sharing)
    agree(store, {"format": FORMAT, **spec.page(), "parts": spec.parts}, units=_PARTS)
    parts = [store.within(name.rstrip("/")) for name in _names(spec.parts)]
    if retry and team.first:
        for part in parts:
            if (kept := kept_in(part)) is not None:
                try_again(part, [unit.name for unit in kept.units])
    if team.told(int(all(map(_is_done, parts)))):
        return Worked()
    plans, model = _plans(spec)
    # Workers begin at different parts, as each runs both sides of a part that it has units of.
    first = team.told(np.random.default_rng(list(sharing.owner.encode())).integers(spec.parts).item())
    order = [(first + i) % spec.parts for i in range(spec.parts)]
    found: list[tuple[str, Worked]] = []
    for waits in (False,) if sharing.worker is not None else (False, True):
        for i in order:
            if not team.told(int(_is_done(parts[i]))):
                did = fill(parts[i], plans(i), sharing=sharing, waits=waits, shift=i, model=model)
                found.append((_names(spec.parts)[i], did))
    of = lambda field: tuple(f"{name}{unit}" for name, part in found for unit in getattr(part, field))
    return Worked(of("done"), of("again"), of("quarantined"))


def status(folder: str | os.PathLike[str]) -> SweepStatus:
    """How far the sweep of a folder is, also one of `activation_patch(folder=)`; nothing is loaded.

    Raises:
        CheckpointError: No sweep, or one whose specification is not whole.
    """
    states = ((name, kept_in(store)) for name, store in _parts(opened(folder)))
    return SweepStatus(tuple((name, None if kept is None else state_of(kept)) for name, kept in states))


def verify(folder: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """What is wrong with the files of a sweep: each with `missing`, `damaged`, `doubled` or `not of this sweep`.

    Every file is read and its checksum compared, also of a sweep of `activation_patch(folder=)`.

    Raises:
        CheckpointError: No sweep, or one whose specification is not whole.
    """
    found: list[tuple[str, str]] = []
    for name, store in _parts(opened(folder)):
        kept = kept_in(store)
        problems = [(SPECIFICATION, "missing")] if kept is None else problems_of(kept)
        found += [(f"{name}{key}", what) for key, what in problems]
    return found


def result(folder: str | os.PathLike[str]) -> PatchScores:
    """The scores of a sweep that is done, of all its pairs; also one of `activation_patch(folder=)`.

    Raises:
        CheckpointError: No sweep, or one that is not done or whose files were changed.
        SweepError: Units that were set aside.
    """
    found = [scores_in(store) for _, store in _parts(opened(folder))]
    per_example = jnp.concatenate([part.per_example for part in found], -1)
    sides = [jnp.concatenate([getattr(part, side) for part in found]) for side in ("clean", "corrupt")]
    where = lambda s: (s.scores, s.per_example, s.clean, s.corrupt)
    return eqx.tree_at(where, found[0], (per_example.mean(-1), per_example, *sides))


def _is_done(store: Store) -> bool:
    """Whether nothing of a part is left to do."""
    kept = kept_in(store)
    return kept is not None and RUNS in store and not left(store, [unit.name for unit in kept.units])


def _parts(store: Store) -> Iterator[tuple[str, Store]]:
    """The parts of a folder, each with what stands before its files' names."""
    data = store.read(SPECIFICATION).value
    if data is None:
        raise CheckpointError(
            f"`{store.place}` holds no `{SPECIFICATION}`: no sweep was begun there. `mechjax sweep run SPEC "
            f"{store.place}` begins one."
        )
    page = specification_of(data, store.path(SPECIFICATION))
    if page.get("format") != FORMAT:  # one that `activation_patch` has begun
        yield "", store
        return
    n = page.get("parts")
    if type(n) is not int or not 0 < n <= _MOST:
        raise CheckpointError(
            f"`{store.path(SPECIFICATION)}` says that there are {n!r} parts, which cannot be."
        )
    yield from ((name, store.within(name.rstrip("/"))) for name in _names(n))


def _names(n: int) -> list[str]:
    return [f"{_PARTS}{i:06d}/" for i in range(n)]


@dataclass(frozen=True)
class _Plans:
    """The plan of every part, made when it is needed."""

    spec: SweepSpec
    model: Decoder
    prompts: "_Prompts"
    mesh: Mesh | None

    def __call__(self, index: int) -> Planned:
        spec, of, prompts = self.spec, self.spec.part(index), self.prompts
        positions = {name: at[of] for name, at in prompts.positions.items()} if prompts.positions else None
        side = lambda p: self._placed(Prompts(p.tokens[of], p.mask[of]))
        return planned(
            self.model, side(prompts.clean), side(prompts.corrupt), prompts.metric(of), site=spec.site, over=spec.over,
            positions=positions, mode=cast(Any, spec.mode), chunk_size=spec.chunk_size,
        )  # fmt: skip

    def _placed(self, prompts: Prompts) -> Prompts:
        """Divided over the mesh, where they can be: the last part may be smaller."""
        if self.mesh is None or prompts.tokens.shape[0] % self.mesh.shape["data"]:
            return prompts
        return shard(prompts, self.mesh)


def _plans(spec: SweepSpec) -> tuple[_Plans, str]:
    """The plan of every part, and the checksum of the model."""
    mesh = _mesh(*spec.mesh) if spec.mesh else None
    model, tokenizer = load(spec.model, dtype=spec.dtype, revision=spec.revision, mesh=mesh)
    if isinstance(model, Encoder):
        raise ArgumentError(f"`{spec.model}` is an encoder: activation patching sweeps decoders.")
    if isinstance(model, Mamba):
        raise ArgumentError(f"`{spec.model}` is a state space model: activation patching sweeps decoders.")
    if tokenizer is None:
        raise ArgumentError(
            f"`{spec.model}` has no tokenizer.json, so it cannot read text. Add one to its folder."
        )
    return _Plans(spec, model, _prompts(spec, tokenizer), mesh), tree_digest(model)


def _mesh(data: int, model: int) -> Mesh:
    """The mesh of a worker: of all its devices, where it is several processes."""
    mesh, here = make_mesh(data=data, model=model), jax.device_count()
    if jax.process_count() > 1 and mesh.size != here:
        raise ArgumentError(
            f"mesh=[{data}, {model}] has {mesh.size} devices, and the processes of this worker have {here}: give a "
            f"mesh of all of them, such as [1, {here}]."
        )
    return mesh


@dataclass(frozen=True)
class _Prompts:
    """All pairs, tokenized, so that parts have one length."""

    clean: Prompts
    corrupt: Prompts
    kind: str
    answer: np.ndarray
    wrong: np.ndarray
    positions: Mapping[str, Any]

    def metric(self, of: slice) -> metrics.Metric:
        """The metric of some pairs."""
        given = (self.answer[of], self.wrong[of]) if self.kind == "logit_diff" else (self.answer[of],)
        return getattr(metrics, self.kind)(*given)


def _prompts(spec: SweepSpec, tokenizer: Any) -> _Prompts:
    if spec.task is not None:
        pairs = task_of(spec.task)(tokenizer, spec.n, seed=spec.seed, split=spec.split)
        names = spec.positions or ()
        if unknown := [name for name in names if name not in pairs.positions]:
            raise ArgumentError(
                f"`{spec.task}` has no position `{unknown[0]}`; it has {', '.join(pairs.positions)}."
            )
        answers = (np.asarray(pairs.correct), np.asarray(pairs.wrong))
        return _Prompts(
            pairs.clean, pairs.corrupt, spec.metric, *answers, {n: pairs.positions[n] for n in names}
        )
    clean, corrupt = cast(Any, spec.clean), cast(Any, spec.corrupt)

    def ids(words: tuple[str, ...] | None, texts: tuple[str, ...]) -> np.ndarray:
        words = (words or ("",)) * (len(texts) if len(words or ("",)) == 1 else 1)
        pairs = zip(texts, words, strict=True)
        return np.array(
            [answer_token(tokenizer, text, word) if word else 0 for text, word in pairs], np.int32
        )

    at = cast(Mapping[str, tuple[int, ...]], spec.positions or {})
    positions = {name: jnp.asarray(columns, jnp.int32) for name, columns in at.items()}
    return _Prompts(
        tokenizer(clean),
        tokenizer(corrupt),
        spec.metric,
        ids(spec.answer, clean),
        ids(spec.wrong, clean),
        positions,
    )
