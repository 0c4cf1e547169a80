"""SAELens' side of the comparison on SynthSAEBench's world: `python -m benchmarks.peers.saelens_synth_bench FOLDER`.

Reads `FOLDER/settings.json`, then batches from stdin: float32, one after another, as many as there are steps. Every
recipe and seed is a trainer of its own and takes each batch. At the end each dictionary is written to
`FOLDER/KIND-SEED` as SAELens writes it for use, is loaded again, and is scored by SAELens on `FOLDER/held_out.npz`.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import (
    SAE,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.synthetic import evals
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks import synth_recipes as recipes
from benchmarks.peers import saelens

KINDS = saelens.KINDS | {
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    "relu": (StandardTrainingSAE, StandardTrainingSAEConfig),
}


def made(kind: str, seed: int, d_model: int, steps: int) -> Any:
    """A fresh training SAE: unit rows, but for the standard kind, whose own heuristic is 0.1."""
    recipe, warm_up = recipes.RECIPES[kind], int(recipes.WARM_UP * steps)
    own = {
        "jump_relu": lambda: {
            "jumprelu_init_threshold": recipe["threshold"], "jumprelu_bandwidth": recipe["bandwidth"],
            "l0_coefficient": recipe["coefficient"], "l0_warm_up_steps": warm_up,
        },
        "relu": lambda: {"l1_coefficient": recipe["coefficient"], "l1_warm_up_steps": warm_up},
        "matryoshka": lambda: {"k": recipe["k"], "matryoshka_widths": list(recipe["prefixes"])},
    }.get(kind, lambda: {"k": recipe["k"]})()  # fmt: skip
    cls, config = KINDS[kind]
    torch.manual_seed(seed)
    return cls(
        config(
            d_in=d_model, d_sae=recipes.N_FEATURES, device="cpu", decoder_init_norm=0.1 if kind == "relu" else 1.0,
            apply_b_dec_to_input=kind not in ("jump_relu", "relu"), **own,
        )
    )  # fmt: skip


def trainer(sae: Any, steps: int) -> Any:
    """SAELens' trainer, told to take what it is given."""
    cfg = SAETrainerConfig(
        total_training_samples=steps * recipes.BATCH, train_batch_size_samples=recipes.BATCH, device="cpu",
        lr=recipes.LEARNING_RATE, lr_end=recipes.LEARNING_RATE, lr_decay_steps=round(steps / 3),
        dead_feature_window=recipes.DEAD_AFTER,
    )  # fmt: skip
    return SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))


@torch.no_grad()
def scored(folder: Path, held_out: dict[str, np.ndarray]) -> dict[str, float]:
    """SAELens' own scores of a dictionary that it wrote."""
    sae = SAE.load_from_disk(folder)
    features, a, x = (torch.from_numpy(held_out[name]) for name in ("features", "activations", "x"))
    latents = sae.encode(x)
    explained = evals.ExplainedVarianceCalculator()
    explained.add_batch(sae.decode(latents), x)
    found = evals.compute_classification_metrics(latents, a, sae.W_dec, features)
    return {
        "f1": found.f1_score,
        "precision": found.precision,
        "recall": found.recall,
        "mcc": evals.mean_correlation_coefficient(sae.W_dec, features),
        "unique": evals.feature_uniqueness(sae.W_dec, features),
        "explained": explained.compute(),
        "l0": float((latents != 0).float().sum(-1).mean()),
        "dead": float((~(latents != 0).any(0)).float().mean()),
    }


def main() -> None:
    """Train on what comes in, write and score."""
    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text())
    steps, d_model = settings["steps"], settings["d_model"]
    runs = {
        f"{kind}-{seed}": trainer(made(kind, seed, d_model, steps), steps)
        for kind in recipes.RECIPES
        for seed in range(settings["seeds"])
    }
    size = recipes.BATCH * d_model * 4
    for step in range(steps):
        given = sys.stdin.buffer.read(size)
        if len(given) != size:
            raise SystemExit(f"the stream ended at step {step} of {steps}")
        x = torch.frombuffer(bytearray(given), dtype=torch.float32).reshape(recipes.BATCH, d_model)
        for run in runs.values():
            run.step(x)
            if settings.get("unit_rows"):  # as mechjax has them; SAELens lets them grow
                with torch.no_grad():
                    run.sae.W_dec.div_(run.sae.W_dec.norm(dim=1, keepdim=True))
            run.n_training_steps += 1
    scores = {}
    held_out = dict(np.load(folder / "held_out.npz"))
    for name, run in runs.items():
        run.sae.save_inference_model(str(folder / name))
        scores[name] = scored(folder / name, held_out)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "sae-lens")}
    (folder / "scores.json").write_text(json.dumps({"versions": versions, "scores": scores}))


if __name__ == "__main__":
    main()
