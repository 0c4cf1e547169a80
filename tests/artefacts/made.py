"""One tiny artefact of each kind, as its writer writes it, and its reader."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mechjax as mj
from mechjax.base.prompts import Prompts
from mechjax.dictionaries.formats.write_saelens import write_saelens
from mechjax.fit import restore_all, save_checkpoint
from mechjax.graph.mib import from_mib, to_mib
from mechjax.models import Config
from mechjax.studies import scoreboard_page
from mechjax.studies.scoreboard import Scoreboard


@dataclass(frozen=True)
class Made:
    """An artefact.

    Attributes:
        write: Writes it to a path; another number gives other content.
        read: What is read back, to be compared; None where its reader makes again what is damaged.
    """

    write: Callable[[Path, int], Any]
    read: Callable[[Path], Any] | None


def model(number: int = 0):
    """A decoder whose folders are small."""
    return mj.init(Config(d_vocab=7, n_ctx=4, d_model=4, n_layers=1, n_heads=2), key=jax.random.key(number))


def prompts(number: int = 0) -> Prompts:
    """Two prompts of three tokens."""
    tokens = (jnp.arange(6).reshape(2, 3) + number) % 7
    return Prompts(tokens, jnp.ones((2, 3), bool))


def _store(path: Path, number: int) -> None:
    some = [prompts(number), prompts(number + 1), prompts(number + 2)]
    mj.store.write(path, model(), some, "resid_post", shard_rows=8)


def _rows(path: Path) -> Any:
    return mj.store.read(path, partial=True).rows(slice(None)).tolist()


def _step(path: Path, number: int) -> None:
    numbers = {"a": {"w": jnp.arange(6.0) + number, "b": jnp.ones(3, jnp.bfloat16)}, "s": jnp.float32(number)}
    save_checkpoint(path, 1, numbers, beside={"seen": np.arange(4)}, about={"number": number})


def _stepped(path: Path) -> Any:
    like = {"a": {"w": jnp.zeros(6), "b": jnp.ones(3, jnp.bfloat16)}, "s": jnp.float32(0)}
    found = restore_all(path, 1, like)
    return found.model["a"]["w"].tolist(), found.beside["seen"].tolist(), found.about


def _sweep(path: Path, number: int) -> None:
    metric = mj.metrics.logit_diff(1, 2)
    mj.patching.activation_patch(
        model(number),
        prompts(),
        prompts(3),
        metric,
        site="resid_pre",
        over=("layer", "pos"),
        chunk_size=2,
        folder=path,
    )


def _board(path: Path, number: int) -> None:
    numbers = np.full((1, 1, 2), 0.5 + number)
    scoreboard_page.write(Scoreboard(*[numbers] * 6, models=("m",), methods=("random",)), path, seeds=2)


def _circuit(path: Path, number: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    graph = mj.graph.build(model(), grouped=False)
    scores = jnp.linspace(-1e-5, 1.0, len(graph.edges)) + number
    to_mib(graph, path / "circuit.json", scores=scores, kept=scores > 0.5, d_model=4, model=model())


def _scores(path: Path) -> Any:
    return [x.tolist() for x in from_mib(mj.graph.build(model(), grouped=False), path / "circuit.json")]


def _saelens(path: Path, number: int) -> None:
    top = mj.dictionaries.TopK.init(d_model=4, n_features=8, k=2, key=jax.random.key(number))
    write_saelens(top, path, hook_name="blocks.0.hook_resid_post", seed=number)


MADE = {
    "record": Made(
        lambda path, number: mj.save(prompts(number), path, model=model(), seed=number),
        lambda path: mj.restore(path).tokens.tolist(),
    ),
    "model": Made(
        lambda path, number: mj.export(model(number), path, family="mechjax", overwrite=True),
        lambda path: mj.load(path)[0].W_E.tolist(),
    ),
    "saelens": Made(_saelens, lambda path: mj.dictionaries.load(path).W_enc.tolist()),
    "store": Made(_store, _rows),
    "step": Made(_step, _stepped),
    "sweep": Made(_sweep, None),
    "scoreboard": Made(_board, scoreboard_page.read),
    "circuit": Made(_circuit, _scores),
}


def place(kind: str, path: Path) -> Path:
    """What of an artefact's path is verified."""
    return {"step": path / "1", "circuit": path / "circuit.json"}.get(kind, path)


def files(path: Path) -> list[Path]:
    """Its files, but for locks and what people alone read."""
    every = [path] if path.is_file() else sorted(path.rglob("*"))
    return [file for file in every if file.is_file() and file.name not in (".lock", "scoreboard.md")]
