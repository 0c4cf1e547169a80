"""How Hugging Face configs say what differs from layer to layer."""

from collections.abc import Callable
from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.config import Config
from mechjax.models.families.family import HfConfig
from mechjax.models.families.rotary import of_object, rope_of, stretch_to_hf
from mechjax.models.rope import Rope

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_types(hf: HfConfig, sliding: Callable[[int], bool]) -> list[str]:
    """For each layer "sliding_attention" or "full_attention"; `sliding(layer)` says it where the config does not."""
    n_layers = hf.count("num_hidden_layers")
    types = hf["layer_types"]
    if types is None:
        return [SLIDING if sliding(layer) else FULL for layer in range(n_layers)]
    if not isinstance(types, list) or len(types) != n_layers or not set(types) <= {SLIDING, FULL}:
        raise UnsupportedModelError(
            f"The config has `layer_types` = {types!r}; it must say {SLIDING!r} or {FULL!r} for each of the {n_layers} "
            "layers."
        )
    return types


def windows(types: list[str], window: Any) -> tuple[Any, ...] | None:
    """`Config.windows`: `window` for sliding layers, None for others."""
    sizes = tuple(window if kind == SLIDING else None for kind in types)
    return sizes if any(size is not None for size in sizes) else None


def types_to_hf(config: Config) -> dict[str, Any]:
    """`layer_types` and `sliding_window` of a config whose sliding layers have one window."""
    sizes = config.windows or (None,) * config.n_layers
    window = next((size for size in sizes if size is not None), None)
    return {"layer_types": [FULL if size is None else SLIDING for size in sizes], "sliding_window": window}


def ropes_by_type(base: Any, local: Any) -> Callable[[HfConfig, list[str]], Rope | tuple[Rope, ...]]:
    """Reads the ropes of a family whose layers of different types rotate differently.

    Args:
        base: transformers' base for full layers.
        local: Its base for sliding ones.
    """

    def read(hf: HfConfig, types: list[str]) -> Rope | tuple[Rope, ...]:
        nested = of_object(hf, "rope_parameters")
        if unknown := nested.keys() - {FULL, SLIDING}:
            raise UnsupportedModelError(
                f"The config has `rope_parameters` for {', '.join(sorted(unknown))}; {hf.family} has {FULL!r} and "
                f"{SLIDING!r} layers."
            )
        full, sliding = (dict(nested.get(kind) or {}) for kind in (FULL, SLIDING))
        full |= of_object(hf, "rope_scaling")
        theta = hf["rope_theta"]
        ropes = {
            FULL: rope_of(hf, full, base if theta is None else theta, {}),
            SLIDING: rope_of(hf, sliding, local(hf) if callable(local) else local, {}),
        }
        each = tuple(ropes[kind] for kind in types)
        return each if len(set(each)) > 1 else each[0]

    return read


def ropes_to_hf(config: Config) -> dict[str, Any]:
    """`rope_parameters` by type of layer."""
    sizes = config.windows or (None,) * config.n_layers
    by_type = {FULL: Rope(), SLIDING: Rope()}
    by_type |= {
        FULL if size is None else SLIDING: rope
        for size, rope in zip(sizes, config.ropes, strict=True)
        if rope
    }
    objects = {
        kind: {"rope_type": "default", "rope_theta": rope.base} | stretch_to_hf(rope.stretch)
        for kind, rope in by_type.items()
    }
    return {"rope_parameters": objects}
