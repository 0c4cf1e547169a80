"""Weight rules: one Hugging Face tensor, the parameters that it holds, and how its axes are laid out. Invertible.

A layout is written as in einops: "m (part h d) -> part m h d" cuts a fused GPT-2 matrix into `part` parameters, and
read from right to left it fuses them again. The letters are sizes of the config, its `letters`; a decoder's are v
vocabulary, m d_model, h heads, n key heads, g heads per key head, d d_head, f d_mlp, r rows of the position embedding,
e experts, x neurons of an expert, s of the shared ones, q and c ranks of latent attention, o, t and u its d_nope,
d_rope and d_value; `part` counts the rule's parameters, and 1 is an axis that we do not have. Where parts differ in
size, their sizes are added: in "(h+n+n d) m -> m h+n+n d" the first parameter takes h of the heads, the others n each.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mechjax.models.model_config import ModelConfig


@dataclass(frozen=True)
class Rule:
    """How one Hugging Face tensor (of each layer) maps to our parameters.

    Attributes:
        name: The tensor's name, `{}` for the layer; `{head}`, `{kv_head}` or `{expert}` where each has its own
            tensor (the config's `apart`).
        paths: Our parameters that it holds, as in the config's `shapes`.
        layout: "theirs -> ours"; or one side where both are equal.
        when: Whether models of a config have this tensor, beside having these parameters.
    """

    name: str
    paths: tuple[str, ...]
    layout: str
    when: Callable[[Any], bool] = lambda _: True

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"\\{\w*\\}", r"(\\d+)", re.escape(self.name)))

    @property
    def layered(self) -> bool:
        """Whether each layer has such a tensor."""
        return "{}" in self.name

    def places(self, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every such tensor's name, and where it stands in our parameters: layer and head or expert, if any."""
        within = next((word for word in config.apart if f"{{{word}}}" in self.name), None)
        n = 1 if within is None else config.apart[within]
        for place, layer in enumerate(config.layers_of(self.paths[0]) if self.layered else (0,)):
            for i in range(n):
                index = (place,) * self.layered + (i,) * (within is not None)
                yield self.name.format(layer, **({} if within is None else {within: i})), index

    def names(self, config: ModelConfig) -> tuple[str, ...]:
        """The tensor's name in every layer."""
        return tuple(name for name, _ in self.places(config))

    def match(self, name: str) -> tuple["Rule", int | None] | None:
        """(this rule, the layer) where `name` is such a tensor; the layer is None for tensors outside the blocks."""
        if not (found := self._regex.fullmatch(name)):
            return None
        return self, int(found.group(1)) if self.layered else None

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor."""
        sizes = self._sizes(config)
        return tuple(math.prod(sizes[axis] for axis in group) for group in _groups(self._sides[0]))

    def split(self, array: Any, config: ModelConfig, **sizes_here: int) -> dict[str, Any]:
        """Our parameters (of one layer, without layer axis) by path; views of `array` where its library makes views.

        `sizes_here` are letters of the layout that have another size than the config says.
        """
        (theirs, ours), sizes = self._sides, self._sizes(config) | sizes_here
        if "+" not in self.layout:
            result = rearrange(array, theirs, ours, sizes)
            return dict(zip(self.paths, result if len(self.paths) > 1 else (result,), strict=True))
        axes = [axis for group in _groups(theirs) for axis in group]
        array = array.reshape([sizes[axis] for axis in axes])
        before = (slice(None),) * next(i for i, axis in enumerate(axes) if "+" in axis)
        parts, start = {}, 0
        for i, path in enumerate(self.paths):
            stop = start + sizes[_summand(next(axis for axis in axes if "+" in axis), i)]
            parts[path] = rearrange(
                array[*before, start:stop], _summand(" ".join(axes), i), _summand(ours, i), sizes
            )
            start = stop
        return parts

    def join(self, params: Mapping[str, Any], config: ModelConfig) -> Any:
        """The Hugging Face tensor made of our parameters (of one layer); the inverse of `split`."""
        (theirs, ours), sizes = self._sides, self._sizes(config)
        arrays = [params[path] for path in self.paths]
        library = arrays[0].__array_namespace__()
        if "+" not in self.layout:
            return rearrange(library.stack(arrays) if len(arrays) > 1 else arrays[0], ours, theirs, sizes)
        axes = [axis for group in _groups(theirs) for axis in group]
        parts = [
            rearrange(array, _summand(ours, i), _summand(" ".join(axes), i), sizes)
            for i, array in enumerate(arrays)
        ]
        whole = library.concat(parts, axis=next(i for i, axis in enumerate(axes) if "+" in axis))
        return whole.reshape(self.shape(config))

    @property
    def _sides(self) -> tuple[str, str]:
        theirs, _, ours = self.layout.partition("->")
        return theirs.strip(), (ours or theirs).strip()

    def _sizes(self, config: ModelConfig) -> dict[str, int]:
        sizes = {**config.letters, "part": len(self.paths), "1": 1}
        sums = re.findall(r"\w+(?:\+\w+)+", self.layout)
        return sizes | {fused: sum(sizes[part] for part in fused.split("+")) for fused in sums}


def _summand(side: str, i: int) -> str:
    """A side of a layout, as the `i`-th parameter has it: "m h+n+n d" is "m n d" for the second."""
    return re.sub(r"\w+(?:\+\w+)+", lambda found: found.group().split("+")[i], side)


def rearrange(array: Any, source: str, target: str, sizes: Mapping[str, int]) -> Any:
    """Split, permute and merge axes as in einops; every axis's size is known, so a wrong shape cannot pass."""
    split, merged = _groups(source), _groups(target)
    before, after = ([a for group in side for a in group if a != "1"] for side in (split, merged))
    array = array.reshape([sizes[axis] for axis in before]).transpose([before.index(axis) for axis in after])
    return array.reshape([math.prod(sizes[axis] for axis in group) for group in merged])


def _groups(side: str) -> list[list[str]]:
    """Axes by group: [["m"], ["h", "d"]] of "m (h d)"."""
    return [(group or axis).split() for group, axis in re.findall(r"\(([^)]*)\)|([\w+]+)", side)]
