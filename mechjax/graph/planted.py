"""Circuits planted in random transformers: the truth is known at any size, and everything else is noise.

Each path is a chain of nodes from the input to the logits, no node on two of them. Every node of a path has a direction
of the stream to itself, in which it writes a signal, about 1 on clean prompts and -1 on corrupt ones; the next node
reads that direction and no other, by rank-one weights:

- an MLP passes it on, by two neurons: `act(s) - act(-s) = s`,
- a head reads it as values, or as queries or keys that turn its attention from the first position, whose value is -1,
  to the others, whose value is 1.

So an edge of a path carries all of that path, about 2 of the metric, which is the sum of the paths' signals. To this
the weights of a freshly initialised decoder are added, `noise` times, everywhere: through them every edge does
something, and the more of them there are, the less is known. With `noise` = 0 the effect of every other edge is zero;
at the default, for 2 layers of 4 heads, 6 of 8 and 12 of 12, resampling a planted edge costs at least 1.4 of the
metric, any other at most 0.15 (`tests/graph/test_planted.py`). Differs from trained models: no norms, no superposition
beyond the noise, every path needed by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from mechjax.base.errors import ArgumentError
from mechjax.graph.build import build
from mechjax.graph.truth import Truth, whole
from mechjax.metrics.answers import logit_diff
from mechjax.models.config import Config
from mechjax.models.init import init
from mechjax.models.params import assemble, parameters

_SHARP = 4.0
"""Score of what attention turns to."""
_WORDS = 4
"""Words of each kind."""
_SIGNAL, _PLACE, _OWN = 0, 1, 2
"""Directions: the words' signal; -1 at the first position and 1 at the others; then one for each node of a path."""

Params = dict[str, Float[np.ndarray, "..."]]


@dataclass(frozen=True)
class _Node:
    layer: int
    head: int | None
    side: str

    @property
    def name(self) -> str:
        return f"m{self.layer}" if self.head is None else f"a{self.layer}.h{self.head}"

    @property
    def reader(self) -> str:
        return self.name if self.head is None else f"{self.name}<{self.side}>"


def planted(
    n_layers: int,
    n_heads: int,
    *,
    key: Key[Array, ""] | Array,
    n_paths: int = 3,
    length: int | None = None,
    d_model: int = 64,
    noise: float = 0.5,
    n_prompts: int = 4,
    n_pos: int = 4,
) -> Truth:
    """A random decoder with a planted circuit of `n_paths * (length + 1)` edges.

    Args:
        n_layers: How many layers it has, each with an MLP of `2 * d_model` neurons.
        n_heads: Heads of each, of 8 dimensions.
        key: A random key, for the weights, the paths and the prompts.
        n_paths: Paths from the input to the logits.
        length: Nodes on each; as many as layers by default.
        d_model: Width of the stream.
        noise: Random weights, in units of GPT-2's initialisation (deviation 0.02).
        n_prompts: Pairs of prompts.
        n_pos: Tokens of each.

    Returns:
        The model with its circuit. Every edge in it that varies does about 2 for the metric.

    Raises:
        ArgumentError: Sizes that are no whole numbers, or too small for the paths.
    """
    least = {"n_layers": 1, "n_heads": 1, "n_paths": 1, "length": 1, "n_prompts": 1, "n_pos": 2, "d_model": 1}
    given = (n_layers, n_heads, n_paths, n_layers if length is None else length, n_prompts, n_pos, d_model)
    n_layers, n_heads, n_paths, length, n_prompts, n_pos, d_model = (
        whole(name, value, least[name]) for name, value in zip(least, given, strict=True)
    )
    if noise < 0:
        raise ArgumentError(f"noise={noise:g}: give a factor on random weights, from 0.")
    if (needed := _OWN + n_paths * length) > d_model:
        raise ArgumentError(
            f"d_model={d_model} has no room for {n_paths} paths of {length} nodes, which need {needed} directions: "
            "widen it, or plant less."
        )
    config = Config(
        d_vocab=1 + 2 * _WORDS, n_ctx=n_pos, d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_head=8,
        d_mlp=2 * d_model, norms="none", tied=False, attn_scale=1.0,
    )  # fmt: skip
    of_weights, of_paths = jax.random.split(jnp.asarray(key))
    rng = np.random.default_rng(np.asarray(jax.random.bits(of_paths, (4,))))
    params: Params = {
        path: noise * np.asarray(W, np.float64)
        for path, W in parameters(init(config, key=of_weights)).items()
    }
    directions = np.linalg.qr(rng.normal(size=(d_model, d_model)))[0]
    paths = _paths(rng, n_layers, n_heads, n_paths, length)
    varying, constant = _plant(params, paths, directions)
    model = assemble(config, {path: jnp.asarray(W, jnp.float32) for path, W in params.items()})
    graph = build(model)
    chosen = lambda names: jnp.asarray([edge in names for edge in graph.edges])
    words = rng.integers(1, 1 + _WORDS, (n_prompts, n_pos))
    words[:, 0] = 0
    corrupt = np.where(words > 0, words + _WORDS, 0)
    return Truth(
        chosen(varying | constant), chosen(constant - varying), jnp.asarray(words, jnp.int32),
        jnp.asarray(corrupt, jnp.int32), logit_diff(1, 1 + _WORDS), model, graph,
    )  # fmt: skip


def _paths(
    rng: np.random.Generator, n_layers: int, n_heads: int, n_paths: int, length: int
) -> list[list[_Node]]:
    """Nodes of each path, in forward order, none of them twice."""
    free: dict[int, list[int | None]] = {}
    for layer in range(n_layers):
        free[2 * layer], free[2 * layer + 1] = [*map(int, rng.permutation(n_heads))], [None]
    sides = _turns(rng)
    found: list[list[_Node]] = []
    for _ in range(n_paths):
        times = [time for time, nodes in free.items() if nodes]
        if len(times) < length:
            raise ArgumentError(
                f"n_paths={n_paths} of length={length} do not fit {n_layers} layers of {n_heads} heads and an MLP: a "
                "path takes one head, or the MLP, at a step, and no node is on two. Plant fewer or shorter ones."
            )
        chosen = sorted(map(int, rng.choice(times, length, replace=False)))
        found.append([_Node(time // 2, free[time].pop(), next(sides)) for time in chosen])
    return found


def _turns(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield from rng.permutation(list("qkv")).tolist()


def _plant(
    params: Params, paths: list[list[_Node]], directions: Float[np.ndarray, "d_model direction"]
) -> tuple[set[str], set[str]]:
    """Adds the paths to the weights; gives the names of their edges, and of those that tell heads the positions."""
    signal, place, own = directions[:, _SIGNAL], directions[:, _PLACE], iter(directions.T[_OWN:])
    kinds = np.repeat([-1.0, 1.0, -1.0], [1, _WORDS, _WORDS])
    params["W_E"] += np.outer(kinds, signal)
    params["W_pos"] += np.outer(np.where(np.arange(len(params["W_pos"])), 1.0, -1.0), place)
    varying: set[str] = set()
    constant: set[str] = set()
    for path in paths:
        writer, read = "input", signal
        for node in path:
            written = next(own)
            if node.head is None:
                _plant_mlp(params, node, read, written)
            else:
                _plant_head(params, node, read, written, place)
                constant |= {f"input->{node.name}<{side}>" for side in ("k" if node.side == "v" else "kv")}
            varying.add(f"{writer}->{node.reader}")
            writer, read = node.name, written
        varying.add(f"{writer}->logits")
        params["W_U"][:, 1] += read / 2
        params["W_U"][:, 1 + _WORDS] -= read / 2
    return varying, constant


def _plant_mlp(params: Params, node: _Node, read: np.ndarray, written: np.ndarray) -> None:
    signs = np.array([1.0, -1.0])
    params["blocks.mlp.W_in"][node.layer, :, :2] += np.outer(read, signs)
    params["blocks.mlp.W_out"][node.layer, :2] += np.outer(signs, written)


def _plant_head(
    params: Params, node: _Node, read: np.ndarray, written: np.ndarray, place: np.ndarray
) -> None:
    """Scores are query times key: the place's or the signal's, and the first position's own signal, -1, is undone."""
    at = (node.layer, slice(None), node.head, 0)
    if node.side == "q":
        params["blocks.attn.W_Q"][at] += _SHARP * read
    else:
        params["blocks.attn.b_Q"][node.layer, node.head, 0] += _SHARP
    if node.side == "k":
        params["blocks.attn.W_K"][at] += read - place / 2
        params["blocks.attn.b_K"][node.layer, node.head, 0] += 0.5
    else:
        params["blocks.attn.W_K"][at] += place
    params["blocks.attn.W_V"][at] += read if node.side == "v" else place
    params["blocks.attn.W_O"][node.layer, node.head, 0] += written
