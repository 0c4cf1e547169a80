"""What TransformerLens made of two checkpoints (`tests/oracles/make_factored.py`), and the same in mechjax."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import safetensors.numpy

from mechjax.models import Decoder
from mechjax.models.load import load

_ORACLES = Path(__file__).parents[2] / "oracles"


@cache
def oracle(family: str) -> tuple[dict[str, np.ndarray], Decoder]:
    """Their numbers by name, and the model, untouched."""
    with np.load(_ORACLES / f"factored_{family}.npz") as file:
        found = dict(file)
    weights = {key.removeprefix("weight/"): found[key] for key in found if key.startswith("weight/")}
    if family == "gpt2":
        del weights["lm_head.weight"]  # tied
    with TemporaryDirectory() as folder:
        safetensors.numpy.save_file(weights, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(str(found["config"]))
        return found, load(folder)[0]
