"""Models whose circuits are known, with prompts on which to look for them: what methods of circuits are judged by."""

from collections.abc import Callable

import jax
import numpy as np

from mechjax.graph import GATES, Truth, gate, planted
from mechjax.rasp import STANDARD, compile_program

COLDNESS = 12.0
"""Attention of compiled programs: warm, as gradients vanish through a cold one."""
LENGTH = 6
PAIRS = 16
_WORDS = 512


def program(name: str, seed: int) -> Truth:
    """A standard RASP program, compiled in a random basis, on pairs of random inputs whose outputs differ.

    The metric is the logit difference of the two outputs (of a program that gives numbers, the number, of which the
    clean one is larger), at the position where most pairs differ.
    """
    standard, rng = STANDARD[name], np.random.default_rng(seed)
    compiled = compile_program(
        standard.make(), standard.vocabulary, LENGTH, causal=standard.causal, coldness=COLDNESS,
        rotation=jax.random.key(seed),
    )  # fmt: skip
    letters = rng.integers(0, len(standard.vocabulary), (_WORDS, LENGTH))
    words = [[standard.vocabulary[i] for i in row] for row in letters]
    output = compiled.variables[-1]
    says = np.asarray(compiled.model(compiled.encode(words)))[..., : output.size]
    says = says[..., 0].round(3) if output.numerical else says.argmax(-1)
    pairs = rng.integers(0, _WORDS, (50 * PAIRS, 2))
    gap = says[pairs[:, 0]] - says[pairs[:, 1]]
    pos = int((gap != 0).sum(0).argmax())
    chosen = pairs[gap[:, pos] > 0 if output.numerical else gap[:, pos] != 0][:PAIRS]
    clean, corrupt = ([words[i] for i in side] for side in chosen.T)
    return compiled.truth(clean, corrupt, pos)


MODELS: dict[str, Callable[[int], Truth]] = {
    # Of inputs of one length all have that length: there is nothing to tell.
    **{f"rasp/{name}": lambda seed, name=name: program(name, seed) for name in STANDARD if name != "length"},
    "planted/2x4": lambda seed: planted(2, 4, key=jax.random.key(seed)),
    "planted/6x8": lambda seed: planted(6, 8, key=jax.random.key(seed)),
    **{f"gate/{name}": lambda seed, name=name: gate(name, 3) for name in GATES},
}
"""Name -> the model, given a seed. Another kind of ground truth is another row."""
