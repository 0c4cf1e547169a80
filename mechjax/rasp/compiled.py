"""A RASP program as a transformer, and what is true of it."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import compress
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mechjax.base.errors import ArgumentError, SiteError, TokenError, did_you_mean
from mechjax.base.prompts import Prompts
from mechjax.base.records import Record
from mechjax.graph.build import Graph
from mechjax.graph.truth import Truth, whole
from mechjax.metrics.answers import logit_diff
from mechjax.models.decoder import Decoder
from mechjax.rasp.circuit import Touched
from mechjax.rasp.variables import Variable


class Compiled(Record):
    """A compiled program. `compiled(inputs)` runs it; `compiled.model` is an ordinary decoder for every tool.

    Attributes:
        basis: Directions of the residual stream, orthonormal; a variable has those from `start` to `stop`.
            Shape (direction, d_model).
        model: The decoder. Logit i at each position is the coordinate of the program's value i, 1 for the one it
            gives and 0 for the others; of a numerical program, logit 0 is the number.
        circuit: Whether each edge of `graph` carries something.
        constant: Whether what it carries is the same for all inputs of one length, such as positions: resampling such
            an edge changes nothing, though the circuit needs it. (Found by trying inputs, all short ones among them.)
        graph: The graph of the model, whose edges `circuit` and `constant` are about.
        vocabulary: The tokens; token i has the id i.
        variables: Every sequence of the program, with its values and directions. The last is what it gives.
        writes: For each node (`input`, `a0.h1`, `m0`) the variables that it writes.
        reads: For each MLP, each side of a head (`a0.h1<q>`) and `logits` the variables that they read.
    """

    basis: Float[Array, "direction d_model"]
    model: Decoder
    circuit: Bool[Array, " edge"]
    constant: Bool[Array, " edge"]
    graph: Graph = eqx.field(static=True)
    vocabulary: tuple[Any, ...] = eqx.field(static=True)
    variables: tuple[Variable, ...] = eqx.field(static=True)
    writes: Touched = eqx.field(static=True)
    reads: Touched = eqx.field(static=True)

    def axis_labels(self) -> Mapping[str, Sequence[str]]:
        """Names of edges."""
        return {"edge": self.graph.edges}

    @property
    def edges(self) -> tuple[str, ...]:
        """The circuit by name, `writer->reader`, constant edges among it."""
        return tuple(compress(self.graph.edges, np.asarray(self.circuit)))

    def __call__(self, inputs: Sequence[Sequence[Hashable]]) -> list[list[Any]]:
        """The program's values for each input."""
        prompts = self.encode(inputs)
        return self.decode(self.model(prompts), prompts)

    def encode(self, inputs: Sequence[Sequence[Hashable]]) -> Prompts:
        """Inputs as prompts, the shorter ones padded at their end.

        Raises:
            TokenError: A token that is not in the vocabulary, or an input of a length that the model was not made for.
        """
        ids = {token: i for i, token in enumerate(self.vocabulary)}
        longest, found = self.model.config.n_ctx, []
        for text in inputs:
            if not 1 <= len(text) <= longest:
                raise TokenError(
                    f"An input has {len(text)} tokens; the program was compiled for 1 to {longest} (`max_length`)."
                )
            if unknown := [token for token in text if token not in ids]:
                raise TokenError(
                    f"{unknown[0]!r} is not in the vocabulary that the program was compiled for: {self.vocabulary}."
                )
            found.append([ids[token] for token in text])
        if not found:
            raise TokenError("There is no input: give a list of sequences of tokens.")
        width = max(map(len, found))
        return Prompts(
            jnp.array([row + [0] * (width - len(row)) for row in found], jnp.int32),
            jnp.array([[i < len(row) for i in range(width)] for row in found]),
        )

    def truth(
        self, clean: Sequence[Sequence[Hashable]], corrupt: Sequence[Sequence[Hashable]], pos: int = -1
    ) -> Truth:
        """The circuit with pairs of inputs and a metric, as other models of known circuits have them.

        Args:
            clean: Inputs, all of one length.
            corrupt: As many others, of the same length.
            pos: The position whose value the metric reads: the logit of the clean value less that of the corrupt one;
                of a numerical program, the number.

        Raises:
            ArgumentError: Inputs of different lengths or numbers, or a pair with one value there.
            TokenError: An input that the program was not compiled for.
        """
        if len({len(text) for text in (*clean, *corrupt)}) > 1 or len(clean) != len(corrupt):
            raise ArgumentError(
                f"{len(clean)} clean and {len(corrupt)} corrupt inputs, of lengths "
                f"{sorted({len(text) for text in (*clean, *corrupt)})}: give as many of each, all of one length."
            )
        one, other = (np.asarray(self.encode(inputs).tokens) for inputs in (clean, corrupt))
        same = ~_differ(self._says(one), self._says(other))[:, pos]
        if same.any():
            i = int(np.flatnonzero(same)[0])
            raise ArgumentError(
                f"pair {i}, {list(clean[i])} and {list(corrupt[i])}: the program gives the same at position {pos} for "
                "both, so the metric would see nothing. Choose inputs that differ there, or another `pos`."
            )
        return self._truth(one, other, pos)

    def sample(self, n: int, *, seed: int, pos: int | None = -1) -> Truth:
        """The circuit with `n` random pairs of the longest inputs, of those that differ at `pos`; as `truth`.

        Of a program that gives numbers, the clean input of each pair has the larger one.

        Args:
            n: How many pairs.
            seed: Of the inputs.
            pos: The position whose value the metric reads; None for the one where most random pairs differ.

        Raises:
            ArgumentError: Fewer than `n` of `100 * n` random pairs differ there.
        """
        whole("n", n, 1)
        size = (2, 100 * n, self.model.config.n_ctx)
        pairs = np.random.default_rng(seed).integers(0, len(self.vocabulary), size, np.int32)
        says = [self._says(side) for side in pairs]
        differ = _differ(*says)
        pos = int(differ.sum(0).argmax()) if pos is None else pos
        chosen = np.flatnonzero(differ[:, pos])[:n]
        if len(chosen) < n:
            raise ArgumentError(
                f"of {100 * n} random pairs of inputs only {len(chosen)} differ at position {pos} in what the program "
                f"gives, n={n} were asked for: choose inputs yourself, `truth(clean, corrupt)`, or another `pos`."
            )
        one, other = pairs[:, chosen]
        if self.variables[-1].numerical:
            larger = (says[0] > says[1])[chosen, pos][:, None]
            one, other = np.where(larger, one, other), np.where(larger, other, one)
        return self._truth(one, other, pos)

    def _says(self, ids: np.ndarray) -> np.ndarray:
        """What the program gives at each position: numbers, or the places of categories among the output's values."""
        logits = np.asarray(self.model(ids))
        return logits[..., 0] if self.variables[-1].numerical else logits.argmax(-1)

    def _truth(self, one: np.ndarray, other: np.ndarray, pos: int) -> Truth:
        of = lambda side: self._says(side)[:, pos]
        answers = (0, 1) if self.variables[-1].numerical else (of(one), of(other))
        sides = jnp.asarray(one), jnp.asarray(other)
        return Truth(self.circuit, self.constant, *sides, logit_diff(*answers, pos), self.model, self.graph)

    def decode(self, logits: Float[Array, "batch pos d_vocab"], prompts: Prompts) -> list[list[Any]]:
        """The values that logits stand for, at the real positions of prompts."""
        return self._decoded(self.variables[-1], np.asarray(logits), prompts)

    def read(self, resid: Float[Array, "batch pos d_model"], name: str, prompts: Prompts) -> list[list[Any]]:
        """The values of a variable in a residual stream: what the program holds there, where the stream has it yet.

        Args:
            resid: A residual stream that leaves the node that writes the variable, or a later one.
            name: The variable's name.
            prompts: The prompts that were run.

        Raises:
            SiteError: No such variable.
        """
        known = {variable.name: variable for variable in self.variables}
        if name not in known:
            raise SiteError(
                f"There is no variable `{name}`: there are {', '.join(known)}.{did_you_mean(name, known)}"
            )
        own = self.basis[known[name].start : known[name].stop]
        along = jnp.einsum("bpm,vm->bpv", resid, own, precision="highest")
        return self._decoded(known[name], np.asarray(along), prompts)

    def _decoded(self, variable: Variable, x: np.ndarray, prompts: Prompts) -> list[list[Any]]:
        real = np.asarray(prompts.mask)
        return [
            [variable.decode(at[: variable.size]) for at in row[there]]
            for row, there in zip(x, real, strict=True)
        ]


def _differ(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return ~np.isclose(one, other, atol=1e-4)


def check_inputs(vocabulary: Any, max_length: Any) -> tuple[Hashable, ...]:
    """The vocabulary as a tuple.

    Raises:
        ArgumentError: None of a token, the same one twice, or no whole number of positions.
    """
    found = tuple(vocabulary)
    if not found or len(set(found)) != len(found):
        raise ArgumentError(
            f"`vocabulary` = {vocabulary!r} must have at least one token, and each of them once."
        )
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
        raise ArgumentError(f"`max_length` = {max_length!r} must be a whole number from 1.")
    return found
