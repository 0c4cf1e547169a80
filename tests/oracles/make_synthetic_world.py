"""Write what SAELens' synthetic model does and how it scores, at 1/64 of SynthSAEBench's size.

    python tests/oracles/make_synthetic_world.py        # in an environment with sae-lens 6.54

`synthetic_world.npz`, beside this script, holds

- the numbers that the model is made of (`wanted` frequencies, `drawn` after SAELens' compensation for the hierarchy,
  `mean`, `spread`, `factor`), with a second `drawn_whole` of the world at its full size;
- moments of `samples` of its samples: how often each feature is there (`rate`), how large it is then (`size`,
  `size_squared`), how often the first `PAIRS` are there two at a time (`both`), and the L0;
- where SAELens pushes random directions to, along one more direction (`pushed`), and the mean square of their cosines;
- what its evaluation says of directions and firings that the test draws again from `SEED`.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sae_lens.synthetic import evals
from sae_lens.synthetic.feature_dictionary import orthogonalize_embeddings
from sae_lens.synthetic.firing_magnitudes import FoldedNormalMagnitudeConfig, LinearMagnitudeConfig
from sae_lens.synthetic.synthetic_model import (
    HierarchyConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)

HERE = Path(__file__).parent
SEED, PAIRS, SAMPLES, BATCH = 11, 96, 500_000, 4000


def config(n_features: int, d_model: int, roots: int, lr: float) -> SyntheticModelConfig:
    """SynthSAEBench's configuration, at a size."""
    return SyntheticModelConfig(
        num_features=n_features,
        hidden_dim=d_model,
        firing_probability=ZipfianFiringProbabilityConfig(max_prob=0.4, min_prob=5e-4, exponent=0.5),
        hierarchy=HierarchyConfig(
            total_root_nodes=roots,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        correlation=LowRankCorrelationConfig(correlation_scale=0.1, rank=25),
        orthogonalization=OrthogonalizationConfig(num_steps=100, lr=lr),
        bias=0.5,
        seed=3,
    )


def mean_square_cosine(rows: torch.Tensor) -> float:
    """Of each two different rows."""
    unit = (rows / rows.norm(dim=-1, keepdim=True)).double()
    n = len(unit)
    return float(((unit @ unit.T).pow(2).sum() - n) / (n * (n - 1)))


def world() -> dict[str, np.ndarray]:
    """The model's numbers and its samples' moments."""
    lr = 3e-4 * 8**0.5
    made = config(256, 96, 2, lr)
    model = SyntheticModel(made)
    generator = model.activation_generator
    torch.manual_seed(SEED)
    rate, size, squared = (torch.zeros(256, dtype=torch.float64) for _ in range(3))
    both, l0_squared = torch.zeros(PAIRS, PAIRS, dtype=torch.float64), 0.0
    for _ in range(SAMPLES // BATCH):
        a = generator.sample(BATCH).double()
        there = (a > 0).double()
        rate += there.sum(0)
        size += a.sum(0)
        squared += a.pow(2).sum(0)
        both += there[:, :PAIRS].T @ there[:, :PAIRS]
        l0_squared += float(there.sum(-1).pow(2).sum())
    rng = np.random.default_rng(SEED)
    rows, along = (
        torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((256, 96), 96)
    )
    apart = orthogonalize_embeddings(rows, num_steps=100, lr=lr)
    whole = config(16_384, 768, 128, 3e-4)
    whole.orthogonalization = None
    factor, own = generator.low_rank_correlation
    found = {
        "wanted": made.firing_probability.generate(256),
        "drawn": generator.firing_probabilities,
        "drawn_whole": SyntheticModel(whole).activation_generator.firing_probabilities[:11_000:7],
        "mean": generator.mean_firing_magnitudes,
        "spread": generator.std_firing_magnitudes,
        "factor": factor,
        "own": own,
        "rate": rate / SAMPLES,
        "size": size / rate,
        "size_squared": squared / rate,
        "both": (both / SAMPLES).float(),
        "samples": torch.tensor(SAMPLES),
        "l0_squared": torch.tensor(l0_squared / SAMPLES),
        "pushed": apart @ along,
        "cosines": torch.tensor([mean_square_cosine(rows), mean_square_cosine(apart)]),
    }
    return {name: np.asarray(value) for name, value in found.items()}


def drawn(n_features: int = 40, known: int = 150, d: int = 24, n: int = 3000) -> tuple[np.ndarray, ...]:
    """Directions and firings of latents and of features; the test draws the same."""
    rng = np.random.default_rng(SEED)
    features = rng.standard_normal((known, d)).astype(np.float32)
    rows = (
        features[:n_features] * rng.choice([-1, 1], (n_features, 1)) + rng.normal(0, 0.4, (n_features, d))
    ).astype(np.float32)
    rows[5] = rows[4]
    activations = np.where(rng.random((n, known)) < 0.2, rng.random((n, known)), 0).astype(np.float32)
    latents = activations[:, :n_features] * (rng.random((n, n_features)) < 0.8)
    latents = np.where(rng.random((n, n_features)) < 0.05, 1, latents).astype(np.float32)
    latents[:, 7] = 0
    return features, rows, activations, latents


def scores() -> dict[str, np.ndarray]:
    """What SAELens' evaluation says of `drawn`."""
    features, rows, activations, latents = map(torch.from_numpy, drawn())
    found = evals.compute_classification_metrics(latents, activations, rows, features)
    return {
        "scores": np.array(
            [
                found.f1_score,
                found.precision,
                found.recall,
                evals.feature_uniqueness(rows, features),
                evals.mean_correlation_coefficient(rows, features),
            ]
        )
    }


if __name__ == "__main__":
    versions = {name: version(name) for name in ("sae-lens", "torch", "numpy")}
    np.savez_compressed(
        HERE / "synthetic_world.npz", versions=np.array(json.dumps(versions)), **world(), **scores()
    )
