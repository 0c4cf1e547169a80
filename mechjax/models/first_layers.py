"""The first layers of a model, for what needs no more of it."""

from dataclasses import replace
from typing import Any

import jax

from mechjax.base.errors import ArgumentError
from mechjax.models.decoder import Decoder
from mechjax.models.params import assemble, parameters
from mechjax.models.shapes import layers_of


def first_layers(model: Decoder, n: int) -> Decoder:
    """The model without its blocks from `n` on: their sites are the same to the bit, and the rest is not run.

    Its logits are those of a logit lens: the stream behind block `n - 1`, normed and unembedded. Inside `jit` weights
    are cut there, so no second copy is kept.

    Args:
        model: The decoder.
        n: How many of its blocks are left, 1 to all.

    Raises:
        ArgumentError: Another number.
    """
    config = model.config
    if not 1 <= n <= config.n_layers:
        raise ArgumentError(
            f"first_layers(model, {n}): the model has {config.n_layers} blocks, so ask for 1 to that."
        )
    if n == config.n_layers:
        return model
    experts = config.experts
    if experts is not None and experts.layers is not None:
        left = tuple(layer for layer in experts.layers if layer < n)
        experts = replace(experts, layers=left) if left else None
    cut = replace(
        config, n_layers=n, windows=None if config.windows is None else config.windows[:n],
        experts=experts,
        rope=config.rope[:n] if isinstance(config.rope, tuple) else config.rope,
    )  # fmt: skip
    counts = {
        path: sum(layer < n for layer in layers_of(path, config))
        for path in config.shapes
        if path.startswith("blocks.")
    }
    params = parameters(model)

    def first(path: str) -> Any:
        return jax.tree.map(lambda leaf: leaf[: counts[path]] if path in counts else leaf, params[path])

    return assemble(cut, {path: first(path) for path in cut.shapes})
