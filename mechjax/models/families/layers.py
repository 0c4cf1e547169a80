"""How Hugging Face configs say what differs from layer to layer."""

from collections.abc import Callable
from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.config import Config
from mechjax.models.families.family import HfConfig

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
