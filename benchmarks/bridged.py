"""GPT-2 as transformers wrote it, through `mj.interop.from_torch`: its forward, and a sweep over its MLPs' outputs.

The module is exported and its weights are copied before any clock starts.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import mechjax as mj
from benchmarks.worker import Job


def bridged_jobs(checkpoint: str) -> dict[str, Job]:
    """The jobs of the bridged model."""

    @functools.cache
    def subject(shape: tuple[int, int], kept: int) -> Any:
        import transformers

        model = transformers.GPT2LMHeadModel.from_pretrained(checkpoint).eval()
        return mj.interop.from_torch(
            model, {"input_ids": np.zeros(shape, np.int32)}, output="logits", dynamic=False, use_cache=False,
            logits_to_keep=kept, sites={"mlp_out": ("transformer.h.mlp.output", ("pos", "d_model"))},
        )  # fmt: skip

    def forward(tokens: np.ndarray):
        model, ids = subject(tokens.shape, 0), jnp.asarray(tokens)
        return lambda: jax.block_until_ready(model(ids)), lambda logits: {"logits": np.asarray(logits)}

    def sweep(clean: np.ndarray, corrupt: np.ndarray, n_prompts: int):
        model, (clean, corrupt) = (
            subject((n_prompts, clean.shape[1]), 1),
            (clean[:n_prompts], corrupt[:n_prompts]),
        )

        def work() -> Any:
            return jax.block_until_ready(_swept(model, jnp.asarray(clean), jnp.asarray(corrupt)))

        return work, lambda scores: {"scores": np.asarray(scores)}

    return {"bridged_forward": forward, "bridged_sweep": sweep}


@eqx.filter_jit
def _swept(model: Any, clean: Any, corrupt: Any) -> Any:
    """Every MLP's output of the clean run put into the corrupt run, at one layer and position at a time."""
    _, acts = mj.capture(model, "mlp_out")(clean)
    values = acts["mlp_out"]
    layers, _, positions, _ = values.shape

    def score(layer: Any, pos: Any) -> Any:
        patch = mj.replace("mlp_out", jnp.take(values, layer, axis=0), layer=layer, pos=pos)
        logits = mj.intervene(model, patch)(corrupt)
        return (logits[:, -1, 5] - logits[:, -1, 7]).mean()

    grid = jnp.meshgrid(jnp.arange(layers), jnp.arange(positions), indexing="ij")
    return jax.vmap(score)(*(x.ravel() for x in grid)).reshape(layers, positions)
