"""Models whose circuits are known, with prompts on which to look for them: what methods of circuits are judged by."""

from collections.abc import Callable

import jax

from mechjax.graph import GATES, Truth, gate, planted
from mechjax.rasp import STANDARD, compile_program

COLDNESS = 12.0
"""Attention of compiled programs: warm, as gradients vanish through a cold one."""
LENGTH = 6
PAIRS = 16


def program(name: str, seed: int) -> Truth:
    """A standard RASP program, compiled in a random basis, on pairs of random inputs whose outputs differ.

    The metric is the logit difference of the two outputs (of a program that gives numbers, the number, of which the
    clean one is larger), at the position where most pairs differ.
    """
    standard = STANDARD[name]
    compiled = compile_program(
        standard.make(), standard.vocabulary, LENGTH, causal=standard.causal, coldness=COLDNESS,
        rotation=jax.random.key(seed),
    )  # fmt: skip
    return compiled.sample(PAIRS, seed=seed, pos=None)


MODELS: dict[str, Callable[[int], Truth]] = {
    # Of inputs of one length all have that length: there is nothing to tell.
    **{f"rasp/{name}": lambda seed, name=name: program(name, seed) for name in STANDARD if name != "length"},
    "planted/2x4": lambda seed: planted(2, 4, key=jax.random.key(seed)),
    "planted/6x8": lambda seed: planted(6, 8, key=jax.random.key(seed)),
    "planted/12x12": lambda seed: planted(12, 12, key=jax.random.key(seed)),
    **{f"gate/{name}": lambda seed, name=name: gate(name, 3) for name in GATES},
}
"""Name -> the model, given a seed. Another kind of ground truth is another row."""
