"""Models whose circuits are known, with prompts on which to look for them: what methods of circuits are judged by."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from mechjax.base.prompts import Prompts
from mechjax.graph import Graph, build, writes
from mechjax.metrics import Metric, logit_diff
from mechjax.models.decoder import Decoder
from mechjax.rasp import STANDARD, Compiled, compile_program

COLDNESS = 12.0
"""Attention of compiled programs: warm, as gradients vanish through a cold one."""
LENGTH = 6
PAIRS = 16
_WORDS = 512
_MOVED = 1e-3  # variables differ by 1 or by shares of a few tokens, rounding and stray attention by less


@dataclass(frozen=True)
class Known:
    """A model with its true circuit.

    Attributes:
        model: The model.
        graph: Its graph.
        clean: Prompts.
        corrupt: Prompts that differ at random.
        metric: What the model says of the clean prompt less what it says of the corrupt one.
        circuit: Whether each edge is in the circuit.
        counted: Whether it counts: not where an edge of the circuit carries the same in both prompts of all pairs,
            such as positions, since no effect shows that it is there.
    """

    model: Decoder
    graph: Graph
    clean: Prompts
    corrupt: Prompts
    metric: Metric
    circuit: Bool[np.ndarray, " edge"]
    counted: Bool[np.ndarray, " edge"]


def program(name: str, seed: int) -> Known:
    """A standard RASP program, compiled in a random basis, on pairs of random inputs whose outputs differ.

    The metric is the logit difference of the two outputs, at a position where they differ.
    """
    standard, rng = STANDARD[name], np.random.default_rng(seed)
    compiled = compile_program(
        standard.make(), standard.vocabulary, LENGTH, causal=standard.causal, coldness=COLDNESS,
        rotation=jax.random.key(seed),
    )  # fmt: skip
    words = Prompts(
        jnp.asarray(rng.integers(0, len(standard.vocabulary), (_WORDS, LENGTH)), jnp.int32),
        jnp.ones((_WORDS, LENGTH), bool),
    )
    says = np.asarray(compiled.model(words)[..., : compiled.variables[-1].size].argmax(-1))
    pairs = rng.integers(0, _WORDS, (50 * PAIRS, 2))
    pairs = pairs[(says[pairs[:, 0]] != says[pairs[:, 1]]).any(1)][:PAIRS]
    here, there = says[pairs[:, 0]], says[pairs[:, 1]]
    at = np.where(here != there, rng.random(here.shape), -1.0).argmax(1)
    correct, wrong = (np.take_along_axis(side, at[:, None], 1)[:, 0] for side in (here, there))
    clean, corrupt = (Prompts(words.tokens[i], words.mask[i]) for i in pairs.T)
    graph = build(compiled.model)
    circuit = np.isin(graph.edges, compiled.edges)
    moved = _moved(compiled, graph, clean, corrupt)
    return Known(
        compiled.model, graph, clean, corrupt, logit_diff(correct, wrong, at), circuit, moved | ~circuit
    )


def _moved(compiled: Compiled, graph: Graph, clean: Prompts, corrupt: Prompts) -> Bool[np.ndarray, " edge"]:
    """Whether what each edge of the circuit carries differs between the prompts of any pair."""
    sent = [writes(compiled.model, side.tokens).vectors(compiled.model) for side in (clean, corrupt)]
    along = jnp.einsum("ubpm,vm->vubp", sent[0] - sent[1], compiled.basis, precision="highest")
    moved = np.asarray(jnp.abs(along).max((2, 3)) > _MOVED)
    reads, gives = dict(compiled.reads), dict(compiled.writes)
    rows = {variable.name: slice(variable.start, variable.stop) for variable in compiled.variables}

    def carries(u: int, v: int) -> bool:
        shared = set(gives.get(graph.nodes[u], ())) & set(reads.get(graph.readers[v], ()))
        return any(bool(moved[rows[name], u].any()) for name in shared)

    return np.array([carries(u, v) for u, v in graph.table.tolist()])


PROGRAMS = tuple(name for name in STANDARD if name not in ("length", "frac_prevs", "pair_balance"))
"""Those whose output differs between inputs of one length, and is one of several values, not a number."""

MODELS: dict[str, Callable[[int], Known]] = {
    f"rasp/{name}": lambda seed, name=name: program(name, seed) for name in PROGRAMS
}
"""Name -> the model, given a seed. Another kind of ground truth is another row."""
