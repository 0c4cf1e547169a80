"""The kinds of artefacts that can be verified, as a table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mechjax.artefacts import checkpoints, folders, pages, records, stores, sweeps
from mechjax.artefacts.found import Found


@dataclass(frozen=True)
class Kind:
    """A kind of artefact.

    Attributes:
        name: What it is called.
        told: By which files it is known, and who writes them.
        fits: Whether one lies at a path, be it damaged.
        check: Compares it with its checksums.
    """

    name: str
    told: str
    fits: Callable[[Path], bool]
    check: Callable[[Path], Found]


FOLDERS = (
    Kind("record", "record.json (mj.save)", records.fits, records.check),
    Kind("activation store", "manifest.json and array-*/ (mj.store.write)", stores.fits, stores.check),
    Kind("sweep", "sweep.json (a sweep with folder=)", sweeps.fits, sweeps.check),
    Kind("checkpoint", "checksums.*.json (one step of a run)", checkpoints.is_step, checkpoints.check_step),
    Kind("training run", "folders of steps (checkpoints=)", checkpoints.is_run, checkpoints.check_run),
    Kind(
        "exported folder", "mechjax.json (mj.export, write_saelens)", folders.is_listed, folders.check_listed
    ),
    Kind("model", "config.json and safetensors (Hugging Face)", folders.is_model, folders.check_model),
    Kind(
        "scoreboard",
        "results/scoreboard.json (mechjax scoreboard)",
        pages.is_scoreboard,
        pages.check_scoreboard,
    ),
)
FILES = (
    Kind(
        "circuit",
        "a .json with cfg, nodes and edges (mj.graph.to_mib)",
        pages.is_circuit,
        pages.check_circuit,
    ),
)
