"""What is called again and again, with new numbers, leaves nothing behind."""

import gc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from tests.needs import LINUX

TIMES, WARM = 200, 80  # the allocator takes more for some sixty calls, and no more then


def resident():
    """Bytes of anonymous memory in use."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.slow
@LINUX
def test_calls__two_hundred_of_every_kind__leave_memory_as_it_was(tiny_model, tiny_tokens):
    """Each call captures 0.6 MB, so keeping all would be 72 MB."""
    wide = jnp.tile(tiny_tokens, (16, 4))  # 64 prompts of 24 tokens
    few, metric = np.asarray(tiny_tokens), mj.metrics.logit_diff(1, 2)
    last = lambda logits: logits[:, -1, 3]

    def call(i):
        edits = [
            mj.replace("z", np.full(4, i, np.float32), layer=i % 3, head=i % 4),
            mj.scale("mlp_post", i / 100),
        ]
        logits, acts = mj.run(tiny_model, wide, edits=edits, capture=["resid_post", "z"])
        _, grads = mj.value_and_grad_at(tiny_model, last, ["resid_pre"])(wide)
        swept = mj.patching.activation_patch(
            tiny_model, few, np.roll(few, i, 0), metric, site="z", over=("layer", "head")
        )
        return float(logits[0, 0, 0] + acts["z"].sum() + grads["resid_pre"].sum() + swept.scores.sum())

    seen = []
    for i in range(TIMES):
        call(i)
        if i >= WARM and i % 20 == 0:
            gc.collect()
            seen.append((len(jax.live_arrays()), resident()))
    arrays, used = (np.array(column) for column in zip(*seen, strict=True))
    assert arrays.max() == arrays.min()
    assert used[-1] - used[0] < 40e6
