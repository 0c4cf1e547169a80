"""Weights and batches that every side of a training case begins with. Only numpy: this runs in every environment."""

import numpy as np

STEPS = 4  # of one timed run
TOKENS = 1024  # of a batch


def start(d_model: int, n_features: int) -> np.ndarray:
    """Unit rows, from which encoder and decoder begin. Shape (feature, d_model)."""
    rows = np.random.default_rng(0).standard_normal((n_features, d_model), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def batches(d_model: int, n_features: int, active: int) -> np.ndarray:
    """Sparse sums of half as many random features, of mean square 1. Shape (step, token, d_model)."""
    rng = np.random.default_rng(1)
    features = start(d_model, n_features)[: n_features // 2]
    shape = (STEPS * TOKENS, n_features // 2)
    sizes = np.maximum(1 + 0.2 * rng.standard_normal(shape, dtype=np.float32), 0)
    x = np.where(rng.random(shape, dtype=np.float32) < active / shape[1], sizes, 0) @ features
    return (x / np.sqrt(np.mean(np.square(x)))).reshape(STEPS, TOKENS, d_model).astype(np.float32)
