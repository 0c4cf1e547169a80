"""Heads and neurons as the parameters of a decoder, in the basis of the variables or a rotated one.

Norms divide by a scale that hangs on the stream, which would blur every value. So where there are any, the embedding
adds a filler, in a direction that nobody reads, so long (`FILLER`) that next to it the rest of the stream does not
count: the scale is the same everywhere, to the square of their ratio, and the norms' weights undo it. LayerNorm also
takes the mean away: then the variables' directions sum to zero, and the filler is as long one way as the other.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mechjax.models.config import Config
from mechjax.models.shapes import norm_places
from mechjax.rasp.expressions import Indices, Tokens
from mechjax.rasp.heads import Head, Side
from mechjax.rasp.schedule import Schedule
from mechjax.rasp.variables import Variable

NormKind = Literal["none", "rms", "layer"]
FILLER = 4096.0
"""Length of the filler. Relative error of what is read: the square of the rest's length over it, halved."""
_FILLERS: dict[NormKind, tuple[float, ...]] = {"none": (), "rms": (1.0,), "layer": (0.5**0.5, -(0.5**0.5))}
"""The filler's direction, along axes of its own, which come last."""
_SILENT = -1.0
"""The sink of heads that need none, in units of the coldness: e^-2c of a selected key's share."""
_EMBEDDINGS: dict[type, str] = {Tokens: "W_E", Indices: "W_pos"}
_D_MODEL = {
    "W_E": 1, "W_pos": 1, "W_U": 0, "blocks.attn.W_Q": 1, "blocks.attn.W_K": 1, "blocks.attn.W_V": 1,
    "blocks.attn.W_O": 3, "blocks.attn.b_O": 1, "blocks.mlp.W_in": 1, "blocks.mlp.W_out": 2, "blocks.mlp.b_out": 1,
}  # fmt: skip
"""Path of a parameter -> its axis along the residual stream."""


def config_of(plan: Schedule, *, coldness: float, norm: NormKind = "none") -> Config:
    """The config of the decoder that a schedule needs: as wide as its widest layer, the rest zero."""
    heads = [[head for at, head in plan.heads if at == layer] for layer in range(plan.n_layers)]
    neurons = [sum(len(n.b_in) for at, n in plan.neurons if at == layer) for layer in range(plan.n_layers)]
    widths = [len(side.b) for _, head in plan.heads for side in (head.q, head.v)]
    return Config(
        d_vocab=max(len(plan.values.vocabulary), plan.output.size), n_ctx=plan.values.max_length,
        d_model=basis_of(plan.output.stop, norm).shape[1], n_layers=plan.n_layers, n_heads=max(1, *map(len, heads)),
        d_head=max([1, *widths]), d_mlp=max(1, *neurons), norms="none" if norm == "none" else "pre",
        norm="rms" if norm == "none" else norm, positions="learned", activation="relu", tied=False, causal=plan.causal,
        attn_scale=float(coldness), attn_sinks=any(head.sink is not None for _, head in plan.heads),
    )  # fmt: skip


def weights(plan: Schedule, config: Config) -> dict[str, Float[np.ndarray, "..."]]:
    """Every parameter by path, in float64, in the basis of the variables' directions."""
    narrow = dataclasses.replace(config, d_model=plan.output.stop)
    params = {path: np.zeros(shape) for path, shape in narrow.shapes.items()}
    _embed(plan, params)
    if config.attn_sinks:
        params["blocks.attn.sinks"][:] = _SILENT * config.attn_scale
    for layer in range(config.n_layers):
        for i, head in enumerate(head for at, head in plan.heads if at == layer):
            _write_head(params, layer, i, head, config)
        start = 0
        for neurons in (n for at, n in plan.neurons if at == layer):
            own = slice(start, start + len(neurons.b_in))
            for variable, W in zip(neurons.reads, neurons.W_in, strict=True):
                params["blocks.mlp.W_in"][layer, _of(variable), own] += W  # both operands may be one variable
            params["blocks.mlp.b_in"][layer, own] = neurons.b_in
            params["blocks.mlp.W_out"][layer, own, _of(neurons.writes)] = neurons.W_out
            params["blocks.mlp.b_out"][layer, _of(neurons.writes)] += neurons.b_out
            start = own.stop
    return params


def turned(
    params: dict[str, Any], basis: Float[np.ndarray, "direction d_model"], config: Config
) -> dict[str, Any]:
    """The same model with direction i of the residual stream turned to `basis[i]`; the filler, and norms it stills."""
    found = {
        path: np.moveaxis(np.tensordot(W, basis, (_D_MODEL[path], 0)), -1, _D_MODEL[path])
        if path in _D_MODEL
        else W
        for path, W in params.items()
    }
    if config.norms != "none":
        filler = FILLER * np.array(_FILLERS[config.norm])
        found["W_pos"][:, -len(filler) :] = filler
        parts = {"w": FILLER * config.d_model**-0.5, "b": 0.0}
        names = {f"{place}.{part}": x for place in norm_places(config) for part, x in parts.items()}
        found |= {path: np.full(config.shapes[path], x) for path, x in names.items() if path in config.shapes}
    return found


def basis_of(
    n: int, norm: NormKind, rotation: Float[np.ndarray, "direction direction"] | None = None
) -> Float[np.ndarray, "direction d_model"]:
    """Where `n` directions of variables lie: on axes, or turned; none of them where the filler is."""
    own = np.eye(n) if rotation is None else rotation
    if norm == "layer":  # Helmert's rows: orthonormal, each of them sums to zero
        size = np.arange(1, n + 1)[:, None]
        helmert = (np.tri(n, n + 1) - size * np.eye(n, n + 1, 1)) / np.sqrt(size * (size + 1))
        own = own @ helmert
    return np.pad(own, ((0, 0), (0, len(_FILLERS[norm]))))


def _embed(plan: Schedule, params: dict[str, Any]) -> None:
    for kind, variable in plan.embedded:
        params[_EMBEDDINGS[kind]][: variable.size, _of(variable)] = np.eye(variable.size)
    params["W_U"][_of(plan.output), : plan.output.size] = np.eye(plan.output.size)


def _write_head(params: dict[str, Any], layer: int, i: int, head: Head, config: Config) -> None:
    for letter, side in {"Q": head.q, "K": head.k, "V": head.v}.items():
        _write_side(params, f"blocks.attn.{{}}_{letter}", layer, i, side)
    params["blocks.attn.W_O"][layer, i, : len(head.W_O), _of(head.writes)] = head.W_O
    params["blocks.attn.b_O"][layer, _of(head.writes)] += head.b_O
    if head.sink is not None:
        params["blocks.attn.sinks"][layer, i] = head.sink * config.attn_scale


def _write_side(params: dict[str, Any], path: str, layer: int, i: int, side: Side) -> None:
    d = len(side.b)
    params[path.format("b")][layer, i, :d] = side.b
    if side.reads is not None:
        params[path.format("W")][layer, _of(side.reads), i, :d] = side.W


def _of(variable: Variable) -> slice:
    return slice(variable.start, variable.stop)
