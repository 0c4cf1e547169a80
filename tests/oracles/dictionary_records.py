"""What `make_dictionaries.py` fills dictionaries with, and how it records what they compute."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent / "dictionaries"
D, OUT, F, K, BATCH = 6, 5, 12, 4, 7


def draw(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random numbers of these shapes; thresholds are positive, and no length of a row is 1."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        scale = 0.4 if len(shape) == 1 else 1.2 * shape[-2] ** -0.5
        x = rng.normal(0.0, scale, shape)
        made[name] = torch.from_numpy(np.abs(x) + 0.05 if "threshold" in name else x).float()
    return made


def fill(module: torch.nn.Module, seed: int) -> None:
    """Every parameter anew."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    with torch.no_grad():
        for name, value in draw(seed, **{n.replace(".", "__"): s for n, s in shapes.items()}).items():
            module.get_parameter(name.replace("__", ".")).copy_(value)


def inputs(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1000 + seed).normal(0.2, 1.5, shape)).float()


def record(path: Path, x: torch.Tensor, f: torch.Tensor, made: torch.Tensor, y: torch.Tensor) -> None:
    """Outputs beside their dictionary; a case in which all or none is active says little."""
    share = float((f != 0).float().mean())
    assert 0.02 < share < 0.9, (path, share)
    arrays = {"x": x, "f": f, "made": made, "y": y}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path.with_name(path.name + ".npz"),
        **{name: a.detach().to_dense().float().numpy() for name, a in arrays.items()},
    )


def note(section: str, *packages: str) -> None:
    path = HERE / "versions.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    known[section] = {name: version(name) for name in packages}
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
