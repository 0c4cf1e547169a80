"""Which transformer computes this RASP program, and by which circuit? Ground truth for methods that look for circuits.

    scores(query, key) = coldness * predicate(key, query)      attention picks what is selected, equally
    mlp(x) = W_out relu(W_in x + b_in) + b_out                 maps, as tables of neurons

RASP: Weiss et al. 2021, "Thinking like transformers", arXiv:2106.06981. Compilation: Lindner et al. 2023, "Tracr:
Compiled transformers as a laboratory for interpretability", arXiv:2301.05062, section 3. What is different from theirs:
the model is an ordinary `Decoder` (learned positions, ReLU, norms or none); sinks take the place of a token before the
text, so that no layer has to clean up after it and no head reads anything but what the program says; numbers may be
negative; counting is causal where the model is; ramps are as steep as their values need; shorter inputs are padded, not
compiled anew.

Cost: directions, heads and neurons as many as the program's values, pairs of values for maps of two sequences.
Exact to rounding, in float32 (bfloat16 is too coarse), at the default coldness. A warm model (10 to 20) has gradients
through its attention, which a cold one has not, and is less exact: it is refused where attention to what is not
selected could change a value. Misleads as a benchmark where a method needs superposition or several ways to one result:
compiled models have neither.
"""

from collections.abc import Collection, Hashable, Iterator, Sequence
from itertools import product
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mechjax.base.errors import ArgumentError
from mechjax.graph.build import build
from mechjax.models.checked import check_positive
from mechjax.models.params import assemble
from mechjax.rasp.circuit import carrying, reads, writes
from mechjax.rasp.compiled import Compiled, check_inputs
from mechjax.rasp.expressions import SOp
from mechjax.rasp.interpret import check_sequence, evaluate
from mechjax.rasp.schedule import Schedule, schedule
from mechjax.rasp.values import Values
from mechjax.rasp.weights import NormKind, basis_of, config_of, turned, weights

_REHEARSED = 100
"""Inputs of each length on which the interpreter tries the program before it is compiled."""


def compile_program(
    program: SOp,
    vocabulary: Sequence[Hashable],
    max_length: int,
    *,
    causal: bool = False,
    coldness: float = 100.0,
    rotation: Key[Array, ""] | Array | None = None,
    norm: NormKind = "none",
) -> Compiled:
    """A transformer that gives what `interpret` gives, on every input over `vocabulary` of up to `max_length` tokens.

    Args:
        program: The program.
        vocabulary: The tokens.
        max_length: The most tokens of an input.
        causal: Whether a position sees only those up to itself, in the interpreter's sense and the model's.
        coldness: Score of a selected key, of which others have 0; softmax picks the selected ones the more sharply.
        rotation: A random key, by which the residual stream is turned, so that no variable lies along an axis; None
            leaves each direction on an axis of its own. The circuit is the same.
        norm: Norms of the model: "none", or "rms" or "layer" before attention, MLP and unembedding, whose scale a long
            constant part of the stream holds still. The embedding writes it, every norm needs it, and `circuit` leaves
            it out: ablate such models by other prompts or means, not by zero.

    Returns:
        The model with its vocabulary, variables and true circuit.

    Raises:
        ArgumentError: An expression that cannot be compiled, by name, and why: encodings that do not fit, values that
            are no numbers or too many or too close, a function that raises on all or on met values, selected
            positions that hold different categories or none; or a coldness at which attention is too blurred.
    """
    check_sequence(program)
    vocabulary = check_inputs(vocabulary, max_length)
    check_positive("coldness", coldness)
    if norm not in get_args(NormKind):
        raise ArgumentError(f"`norm` = {norm!r} is not one of {', '.join(map(repr, get_args(NormKind)))}.")
    plan = schedule(program, Values(vocabulary, max_length), causal=causal)
    varying = _rehearse(program, vocabulary, max_length, causal=causal)
    _check_coldness(plan, coldness)
    config = config_of(plan, coldness=coldness, norm=norm)
    n = plan.output.stop
    basis = basis_of(n, norm, None if rotation is None else _orthogonal(rotation, n))
    params = turned(weights(plan, config), basis, config)
    as_jax = lambda x: jnp.asarray(x, jnp.float32)
    model = assemble(config, {path: as_jax(W) for path, W in params.items()})
    graph, written, read = build(model), writes(plan), reads(plan)
    circuit = carrying(graph, written, read)
    moving = carrying(graph, written, read, [name for name, node in plan.made_for.items() if node in varying])
    return Compiled(
        as_jax(basis), model, jnp.asarray(circuit), jnp.asarray(circuit & ~moving), graph, vocabulary,
        tuple(plan.variables), written, read,
    )  # fmt: skip


def _rehearse(
    program: SOp, vocabulary: tuple[Hashable, ...], max_length: int, *, causal: bool
) -> Collection[int]:
    """Tries the program; gives the expressions, by identity, that differed between two inputs of one length."""
    first: dict[int, dict[int, Any]] = {}
    varying: set[int] = set()
    for inputs in _rehearsal(vocabulary, max_length):
        found = evaluate(program, inputs, causal=causal)
        like = first.setdefault(len(inputs), found)
        varying.update(node for node, value in found.items() if value != like[node])
    return varying


def _rehearsal(vocabulary: tuple[Hashable, ...], max_length: int) -> Iterator[Sequence[Any]]:
    """Inputs of every length: all where they are few, else random ones."""
    rng = np.random.default_rng(0)
    for length in range(1, max_length + 1):
        if len(vocabulary) ** length <= _REHEARSED:
            yield from product(vocabulary, repeat=length)
        else:
            for ids in rng.integers(0, len(vocabulary), (_REHEARSED, length)):
                yield tuple(vocabulary[i] for i in ids)


def _check_coldness(plan: Schedule, coldness: float) -> None:
    longest = plan.values.max_length
    for _, head in plan.heads:
        if (astray := head.astray(coldness, longest)) > head.tolerance:
            raise ArgumentError(
                f"`coldness` = {coldness:g} is too warm for `{head.writes.name}`: up to {min(astray, 1.0):.1%} of its "
                f"attention could go to keys that it does not select, and beyond {head.tolerance:.2%} what it writes "
                f"may be read as another value. Give at least {head.coldest(longest):.1f}."
            )


def _orthogonal(key: Array, n: int) -> np.ndarray:
    """A random rotation or reflection, orthogonal in float64."""
    q, r = np.linalg.qr(np.asarray(jax.random.normal(key, (n, n), jnp.float32), np.float64))
    return q * np.sign(np.diagonal(r))
