"""Weight rules: one Hugging Face tensor, the parameters that it holds, and how its axes are laid out. Invertible.

A layout is written as in einops: "m (part h d) -> part m h d" cuts a fused GPT-2 matrix into `part` parameters, and
read from right to left it fuses them again. The letters are sizes of the config: v vocabulary, p positions, m d_model,
h heads, n key heads, d d_head, f d_mlp; `part` counts the rule's parameters.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mechjax.models.config import Config


@dataclass(frozen=True)
class Rule:
    """How one Hugging Face tensor (of each layer) maps to our parameters.

    Attributes:
        name: The tensor's name, `{}` for the layer.
        paths: Our parameters that it holds, as in `Config.shapes`.
        layout: "theirs -> ours"; or one side where both are equal.
    """

    name: str
    paths: tuple[str, ...]
    layout: str

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.name).replace(r"\{\}", r"(\d+)"))

    @property
    def layered(self) -> bool:
        """Whether each layer has such a tensor."""
        return "{}" in self.name

    def names(self, config: Config) -> tuple[str, ...]:
        """The tensor's name in every layer."""
        return (
            tuple(self.name.format(layer) for layer in range(config.n_layers))
            if self.layered
            else (self.name,)
        )

    def match(self, name: str) -> tuple["Rule", int | None] | None:
        """(this rule, the layer) where `name` is such a tensor; the layer is None for tensors outside the blocks."""
        if not (found := self._regex.fullmatch(name)):
            return None
        return self, int(found.group(1)) if self.layered else None

    def shape(self, config: Config) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor."""
        sizes = self._sizes(config)
        return tuple(math.prod(sizes[axis] for axis in group) for group in _groups(self._sides[0]))

    def split(self, array: Any, config: Config) -> dict[str, Any]:
        """Our parameters (of one layer, without layer axis) by path; views of `array` where its library makes views."""
        theirs, ours = self._sides
        result = rearrange(array, theirs, ours, self._sizes(config))
        return dict(zip(self.paths, result if len(self.paths) > 1 else (result,), strict=True))

    def join(self, params: Mapping[str, Any], config: Config) -> Any:
        """The Hugging Face tensor made of our parameters (of one layer); the inverse of `split`."""
        theirs, ours = self._sides
        arrays = [params[path] for path in self.paths]
        stacked = arrays[0].__array_namespace__().stack(arrays) if len(arrays) > 1 else arrays[0]
        return rearrange(stacked, ours, theirs, self._sizes(config))

    @property
    def _sides(self) -> tuple[str, str]:
        theirs, _, ours = self.layout.partition("->")
        return theirs.strip(), (ours or theirs).strip()

    def _sizes(self, config: Config) -> dict[str, int]:
        return {
            "v": config.d_vocab, "p": config.n_ctx, "m": config.d_model, "h": config.n_heads, "n": config.n_kv_heads,
            "d": config.d_head, "f": config.d_mlp, "part": len(self.paths),
        }  # fmt: skip


def rearrange(array: Any, source: str, target: str, sizes: Mapping[str, int]) -> Any:
    """Split, permute and merge axes as in einops; every axis's size is known, so a wrong shape cannot pass."""
    split, merged = _groups(source), _groups(target)
    before, after = [a for group in split for a in group], [a for group in merged for a in group]
    array = array.reshape([sizes[axis] for axis in before]).transpose([before.index(axis) for axis in after])
    return array.reshape([math.prod(sizes[axis] for axis in group) for group in merged])


def _groups(side: str) -> list[list[str]]:
    """Axes by group: [["m"], ["h", "d"]] of "m (h d)"."""
    return [(group or axis).split() for group, axis in re.findall(r"\(([^)]*)\)|(\w+)", side)]
