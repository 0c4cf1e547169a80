"""Rewritten weights against those of TransformerLens' own processing of the same checkpoint."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from mechjax.models import Decoder, parameters
from mechjax.models.rewrite import center_unembed, center_writing, fold_norm, fold_value_bias, refactor_qk_ov
from tests.models.rewrite.oracle import oracle
from tests.tolerances import TOL

STEPS = [
    *(
        ("gpt2", step)
        for step in (fold_norm, center_writing, center_unembed, fold_value_bias, refactor_qk_ov)
    ),
    *(("llama", step) for step in (fold_norm, center_unembed)),
]


def in_their_axes(model: Decoder) -> dict[str, np.ndarray]:
    """Every weight under TransformerLens' name and axes, an unembedding and its bias always there."""
    named = {path.rpartition(".")[2]: np.asarray(leaf) for path, leaf in parameters(model).items()}
    named |= {f"W_{letter}": named[f"W_{letter}"].swapaxes(1, 2) for letter in "QKV"}
    return {"W_U": named["W_E"].T, "b_U": np.zeros(model.config.d_vocab, np.float32)} | named


@pytest.mark.parametrize(("family", "rewrite"), STEPS, ids=lambda step: getattr(step, "__name__", step))
def test_rewrite__against_transformerlens__gives_its_weights(family, rewrite):
    found, model = oracle(family)
    prefix = f"{rewrite.__name__}/"
    theirs = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    ours = in_their_axes(rewrite(model))
    assert theirs.keys() <= ours.keys()
    assert theirs.keys() >= {"W_E", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_U", "b_U"}
    if rewrite is fold_norm and family == "gpt2":
        # They also center what reads LayerNorms, which cannot see it.
        ours |= {
            f"W_{name}": ours[f"W_{name}"] - ours[f"W_{name}"].mean(-2, keepdims=True)
            for name in (*"QKVU", "in")
        }
    if rewrite is refactor_qk_ov:  # signs of singular vectors are free
        theirs, ours = ({name: np.abs(value) for name, value in side.items()} for side in (theirs, ours))
    for name, expected in theirs.items():
        assert_allclose(ours[name], expected, err_msg=name, **TOL["float32", "parity"])
    changed = [
        name
        for name in theirs
        if not np.allclose(in_their_axes(model)[name], found[prefix + name], atol=1e-3)
    ]
    assert changed
