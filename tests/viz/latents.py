"""Contexts of made-up latents, with hostile tokens, and the tokenizer that spells them."""

import jax.numpy as jnp
import numpy as np

from mechjax.dicteval.contexts import Contexts, Examples
from mechjax.dicteval.decoder_lens import DecoderLens
from mechjax.dicteval.neighbours import Neighbours

WORDS = (
    "the",
    "<script>alert(1)</script>",
    "cat",
    '"&quoted"',
    "sat\non",
    "she",
    "her",
    "\tmat",
    "",
    "a" * 90,
)
BEFORE, AFTER = 4, 2


class Spelling:
    """Pieces of WORDS; with `space`, as BPE writes them."""

    def __init__(self, space: str = ""):
        self.space = space

    def str_tokens(self, ids):
        return [self.space + WORDS[int(i)] for i in ids]


def made(n_latents=6, n=8, *, dead=(), numbers=None, lens=True, near=True, seed=0):
    """Random contexts of `n_latents`, whose numbers are 0, 1, ... or `numbers`."""
    rng = np.random.default_rng(seed)
    alive = np.array([row not in dead for row in range(n_latents)])
    largest = np.where(alive, rng.uniform(0.5, 8, n_latents), 0).astype(np.float32)
    latents = np.arange(n_latents) if numbers is None else np.asarray(numbers)

    def examples(k):
        share = np.sort(rng.uniform(0.2, 1, (n_latents, k)))[:, ::-1]
        share[:, 0] = 1
        tokens = rng.integers(0, len(WORDS), (n_latents, k, BEFORE + 1 + AFTER))
        values = (
            rng.uniform(0, 1, tokens.shape) * (rng.uniform(size=tokens.shape) < 0.3) * largest[:, None, None]
        )
        tokens[:, -1, : BEFORE - 1], values[:, -1, : BEFORE - 1] = -1, 0  # a text that begins there
        tokens[:, 0, -1], values[:, 0, -1] = -1, 0
        values[..., BEFORE] = share * largest[:, None]
        fill = lambda x, nothing: np.where(alive.reshape(-1, *[1] * (x.ndim - 1)), x, nothing)
        number = jnp.asarray(fill(np.tile(np.arange(k), (n_latents, 1)), -1), jnp.int32)
        return Examples(
            jnp.asarray(fill(values[..., BEFORE], 0), jnp.float32), number, number,
            jnp.asarray(fill(tokens, -1), jnp.int32), jnp.asarray(fill(values, 0), jnp.float32), BEFORE,
        )  # fmt: skip

    numbers_of = jnp.asarray(latents, jnp.int32)
    logits = np.sort(np.abs(rng.normal(size=(n_latents, 4))))[:, ::-1].copy()
    spoken = lambda: jnp.asarray(rng.integers(0, len(WORDS), (n_latents, 4)), jnp.int32)
    return Contexts(
        density=jnp.asarray(np.where(alive, 10 ** rng.uniform(-4, -0.5, n_latents), 0), jnp.float32),
        largest=jnp.asarray(largest),
        mean=jnp.asarray(largest / 3),
        histogram=jnp.asarray(alive[:, None] * rng.integers(0, 50, (n_latents, 12)), jnp.int32),
        latents=numbers_of,
        strongest=examples(n),
        sample=examples(5),
        lens=DecoderLens(
            jnp.asarray(logits, jnp.float32), spoken(), jnp.asarray(-logits, jnp.float32), spoken(),
            numbers_of,
        ) if lens else None,
        near=Neighbours(
            jnp.asarray(np.sort(rng.uniform(0, 1, (n_latents, 3)))[:, ::-1].copy(), jnp.float32),
            jnp.asarray(rng.choice(latents, (n_latents, 3)), jnp.int32), numbers_of,
        ) if near else None,
        tokens=jnp.asarray(12_345, jnp.int32),
        n_features=max(int(latents.max()) + 1, n_latents),
        site="resid_post",
        layer=2,
    )  # fmt: skip
