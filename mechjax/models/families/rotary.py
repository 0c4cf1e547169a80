"""How Hugging Face configs say how positions rotate, and back."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.families.family import HfConfig
from mechjax.models.rope import Banded, Linear, LongRope, Rope, Stretch, Yarn

ROTARY_DEFAULTS: dict[str, Any] = {
    "rope_theta": 10000.0, "rope_parameters": None, "rope_scaling": None, "partial_rotary_factor": None
}  # fmt: skip
"""What configs may leave out."""


def rotation(
    hf: HfConfig,
    *,
    theta_key: str = "rope_theta",
    part_key: str = "partial_rotary_factor",
    part_default: float = 1.0,
    alias: Mapping[str, str] | None = None,
) -> tuple[Rope, float]:
    """The rope and the part of the head that rotates, from transformers 5's `rope_parameters` or the older spellings.

    Args:
        hf: The config.
        theta_key: Where older configs keep the base.
        part_key: Where older configs keep the part.
        part_default: The part, where the config says nothing.
        alias: Names that this family has for kinds of rope.

    Raises:
        UnsupportedModelError: A kind of rope, or a key of it, that is not implemented.
    """
    nested = of_object(hf, "rope_scaling") or of_object(hf, "rope_parameters")
    part = nested.pop("partial_rotary_factor", hf[part_key])
    rope = rope_of(hf, nested, hf[theta_key], alias or {})
    part = part_default if part is None else part
    if not isinstance(part, (int, float)) or not 0 < part <= 1:
        raise UnsupportedModelError(
            f"The config rotates {part!r} of each head; it must be a number above 0, at most 1."
        )
    return rope, float(part)


def whole_rotation(hf: HfConfig) -> Rope:
    """The rope of a family whose heads rotate whole."""
    rope, part = rotation(hf)
    if part != 1.0:
        raise UnsupportedModelError(
            f"The config has `partial_rotary_factor` = {part}: transformers' own {hf.family} ignores it, so what is "
            "meant is unclear; only 1.0 is accepted."
        )
    return rope


def rotary_dim(hf: HfConfig, part: float) -> int:
    """How many dimensions of each head rotate, where a config gives their part."""
    d_head = hf["head_dim"] if "head_dim" in hf.defaults else None
    d_model, n_heads = (hf.count(key, 2**31 - 1) for key in ("hidden_size", "num_attention_heads"))
    return int((d_head or d_model // n_heads) * part)


def of_object(hf: HfConfig, key: str) -> dict[str, Any]:
    """A copy of the object under `key`, empty where there is none."""
    if not isinstance(given := hf[key] or {}, dict):
        raise UnsupportedModelError(f"The config has `{key}` = {given!r}; it must be an object.")
    return dict(given)


def rope_of(hf: HfConfig, nested: dict[str, Any], base: Any, alias: Mapping[str, str]) -> Rope:
    """The rope of a config's (or one kind of layer's) object of rotary numbers."""
    kind = nested.pop("type", "default")
    kind = nested.pop("rope_type", kind)
    base = nested.pop("rope_theta", base)
    kind = alias.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in _STRETCHES:
        raise UnsupportedModelError(
            f"The config rescales its rotary positions (`rope_type` = {kind!r}), which is not implemented: "
            f"{', '.join(map(repr, _STRETCHES))} are."
            + (
                " In `dynamic` ropes the longest sequence of a batch changes all numbers."
                if kind == "dynamic"
                else ""
            )
        )
    stretch = _STRETCHES[kind](_Numbers(kind, nested, hf))
    if nested:
        listed = ", ".join(f"`{key}` = {value!r}" for key, value in nested.items())
        raise UnsupportedModelError(
            f"The config rescales its rotary positions (`rope_type` = {kind!r}) with keys that are unknown for that "
            f"kind: {listed}. They may change what the model computes, so they are refused."
        )
    return Rope(base=base, stretch=stretch)


class _Numbers:
    """The numbers of a rope; those that are read are taken out, so that what is left is unknown."""

    def __init__(self, kind: str, nested: dict[str, Any], hf: HfConfig) -> None:
        self.kind, self.nested, self.hf = kind, nested, hf

    def need(self, key: str) -> Any:
        """A number that must be there."""
        if self.nested.get(key) is None:
            raise UnsupportedModelError(
                f"The config rescales its rotary positions (`rope_type` = {self.kind!r}) without `{key}`, which that "
                "kind needs."
            )
        return self.nested.pop(key)

    def may(self, key: str, default: Any = None) -> Any:
        """A number that may be left out."""
        value = self.nested.pop(key, None)
        return default if value is None else value

    @property
    def trained(self) -> Any:
        """Length of the contexts of the first training."""
        outside = self.hf["original_max_position_embeddings"] if "original_max_position_embeddings" in (
            self.hf.given.keys() | self.hf.defaults.keys()
        ) else None  # fmt: skip
        inside = self.may("original_max_position_embeddings")
        return outside or inside or self.hf["max_position_embeddings"]

    def factor(self, trained: Any) -> Any:
        """How much longer contexts became."""
        return self.may("factor") or self.hf["max_position_embeddings"] / trained


def _llama3(numbers: _Numbers) -> Stretch:
    return Banded(
        factor=numbers.need("factor"), low=numbers.need("low_freq_factor"), high=numbers.need("high_freq_factor"),
        trained=numbers.trained,
    )  # fmt: skip


def _yarn(numbers: _Numbers) -> Stretch:
    trained = numbers.trained
    factor = numbers.factor(trained)

    def growth(strength: float) -> float:
        return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0

    one, all_dims = numbers.may("mscale"), numbers.may("mscale_all_dim")
    derived = growth(one) / growth(all_dims) if one and all_dims else growth(1.0)
    return Yarn(
        factor=factor, trained=trained, fast=numbers.may("beta_fast", 32.0), slow=numbers.may("beta_slow", 1.0),
        truncate=numbers.may("truncate", True), amplitude=numbers.may("attention_factor", derived),
    )  # fmt: skip


def _longrope(numbers: _Numbers) -> Stretch:
    trained = numbers.trained
    factor = numbers.factor(trained)
    derived = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return LongRope(
        short=tuple(numbers.need("short_factor")), long=tuple(numbers.need("long_factor")), trained=trained,
        amplitude=numbers.may("attention_factor", derived),
    )  # fmt: skip


_STRETCHES: dict[str, Callable[[_Numbers], Stretch | None]] = {
    "default": lambda numbers: None,
    "linear": lambda numbers: Linear(factor=numbers.need("factor")),
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def rope_to_hf(rope: Any) -> dict[str, Any]:
    """`rope_theta` and, where it is stretched, `rope_scaling`: the spelling that every transformers reads."""
    if not isinstance(rope, Rope):  # one for each layer: what a family can say is seen when it is read back
        rope = next((r for r in rope if r is not None), Rope())
    scaling = stretch_to_hf(rope.stretch)
    return {"rope_theta": rope.base} | ({"rope_scaling": scaling} if scaling else {})


def stretch_to_hf(stretch: Stretch | None) -> dict[str, Any]:
    """The object of rotary numbers of a stretch, without the base."""
    match stretch:
        case Linear():
            return {"rope_type": "linear", "factor": stretch.factor}
        case Banded():
            return {
                "rope_type": "llama3", "factor": stretch.factor, "low_freq_factor": stretch.low,
                "high_freq_factor": stretch.high, "original_max_position_embeddings": stretch.trained,
            }  # fmt: skip
        case Yarn():
            return {
                "rope_type": "yarn", "factor": stretch.factor, "beta_fast": stretch.fast, "beta_slow": stretch.slow,
                "truncate": stretch.truncate, "attention_factor": stretch.amplitude,
                "original_max_position_embeddings": stretch.trained,
            }  # fmt: skip
        case LongRope():
            return {
                "rope_type": "longrope", "short_factor": list(stretch.short), "long_factor": list(stretch.long),
                "attention_factor": stretch.amplitude, "original_max_position_embeddings": stretch.trained,
            }  # fmt: skip
    return {}
