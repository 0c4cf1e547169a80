"""What a Hugging Face model computes at our sites, read by hooks on its modules.

Which module that is `models/families/modules.py` says, and a fused matrix splits its output as its rows. So a new
family needs nothing here. Attention patterns are what `output_attentions` returns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from mechjax.base.catalogue import SITES
from mechjax.base.errors import UnsupportedModelError
from mechjax.base.optional import require
from mechjax.models.families import EVERY, Family, Rule
from mechjax.models.families.modules import Module, fused, modules, read_and_given
from mechjax.models.marks import axes_of

Sites = dict[tuple[str, int | None], np.ndarray]
"""(site, layer) -> its numbers, of shape (batch, pos, ...) or (batch, head, query, key); the layer may be None."""


def hf_sites(hf: Any, config: Any, tokens: np.ndarray, **inputs: Any) -> Sites:
    """Every site that the modules of a Hugging Face model expose, and its logits.

    Args:
        hf: A transformers model of a family that mechjax knows, in evaluation mode. Patterns need its eager attention.
        config: Our config of it.
        tokens: Ids, of shape (batch, pos), or pixels (batch, channel, height, width).
        **inputs: What else the model is called with, as arrays, such as `attention_mask` or `decoder_input_ids`.

    Returns:
        (site, layer) -> numbers, in float32 (float64 where the model computes in it).

    Raises:
        UnsupportedModelError: A model of no family that mechjax knows.
        MissingExtraError: torch is not installed.
    """
    torch = require("torch", extra="torch")
    family, sites = _family(hf), Sites()
    eager = hf.config._attn_implementation == "eager"  # asked for patterns, others turn eager
    n_batch = len(tokens)

    def keep(site: str, layer: int | None, value: np.ndarray) -> None:
        own = _own_shape(value, site, config)
        if not own:  # one vector for each example
            sites[site, layer] = value.reshape(n_batch, -1)
            return
        if (
            value.ndim < len(own) + 2 or value.shape[-len(own) :] != own
        ):  # merged, or embedded once for all examples
            n_pos = tokens.shape[1] if tokens.ndim == 2 else value.shape[-len(own) - 1]
            value = value.reshape(-1, n_pos, *own)
        sites[site, layer] = np.broadcast_to(value, (n_batch, *value.shape[1:]))

    readers = _readers(family, config, keep)
    bare = {path.removeprefix(family.prefix): read for path, read in readers.items()}
    handles = [
        module.register_forward_hook(partial(_hook, torch, read), with_kwargs=True)
        for path, module in hf.named_modules()
        if (read := readers.get(path, bare.get(path))) is not None
    ]
    try:
        with torch.no_grad():
            given = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
            output = hf(
                torch.from_numpy(np.asarray(tokens)), use_cache=False, output_attentions=eager, **given
            )
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(output, "logits", getattr(output, "prediction_logits", None))
    if logits is not None:
        sites["logits" if logits.ndim == 3 else "class_logits", None] = _array(torch, logits)
    for name, site in family.patterns.items():
        for layer, pattern in enumerate(getattr(output, name, None) or ()):
            if pattern is not None:
                sites[site, layer] = _array(torch, pattern)
    return sites


_Keep = Callable[[str, int | None, np.ndarray], None]
_Read = Callable[[np.ndarray | None, np.ndarray | None], None]


def _hook(
    torch: Any, read: _Read, _module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
) -> None:
    entering = inputs[0] if inputs else named.get("hidden_states")
    leaving = output[0] if isinstance(output, tuple) else output
    read(*(_array(torch, x) if isinstance(x, torch.Tensor) else None for x in (entering, leaving)))


def _array(torch: Any, tensor: Any) -> np.ndarray:
    """A copy (the model may reuse the memory) in a dtype that numpy has."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(dtype, copy=True).cpu().numpy()


def _family(hf: Any) -> Family:
    name = type(hf).__name__
    for family in EVERY:
        if name in family.architectures:
            return family
    known = ", ".join(name for family in EVERY for name in family.architectures)
    raise UnsupportedModelError(f"A {name} has no family whose modules are known; known are {known}.")


def _readers(family: Family, config: Any, keep: _Keep) -> dict[str, _Read]:
    """Path of a module -> what is read where it is entered and left."""
    readers = {}
    for module in modules(family, config):
        for path, layer in _places(module.path, config):
            readers[path] = partial(_whole, module, layer, config, keep)
    for pattern, rule in fused(family, config).items():
        for path, layer in _places(pattern, config):
            readers[path] = partial(_apart, rule, family, layer, config, keep, readers.get(path))
    return readers


def _places(pattern: str, config: Any) -> list[tuple[str, int | None]]:
    if "{}" not in pattern:
        return [(pattern, None)]
    return [(pattern.format(layer), layer) for layer in config.layers_of(pattern)]


def _whole(
    module: Module,
    layer: int | None,
    config: Any,
    keep: _Keep,
    entering: np.ndarray | None,
    leaving: np.ndarray | None,
) -> None:
    """A module that reads and gives whole sites."""
    if module.reads is not None and entering is not None:
        keep(module.reads, layer, _own_axes(entering, module.reads, config))
    for site in module.gives:
        if leaving is not None and not _undecided(leaving, site):
            keep(site, layer, _own_axes(leaving, site, config))


def _apart(
    rule: Rule,
    family: Family,
    layer: int | None,
    config: Any,
    keep: _Keep,
    whole: _Read | None,
    entering: np.ndarray | None,
    leaving: np.ndarray | None,
) -> None:
    """A module whose output several parameters make, or that is clipped outside of it."""
    if whole is not None:
        whole(entering, leaving)
    if leaving is None:
        return
    for path, part in _parts(leaving, rule, config).items():
        for site in read_and_given(path, family, config)[1]:
            clip = config.qkv_clip if site in ("q", "k", "v") else None  # done outside of the module
            keep(site, layer, part if clip is None else np.clip(part, -clip, clip))


def _undecided(value: np.ndarray, site: str) -> bool:
    """Whether heads may stand before or after positions: there are as many of both."""
    return SITES[site].axes[-1] == "d_head" and value.ndim == 4 and value.shape[1] == value.shape[2]


def _own_shape(value: np.ndarray, site: str, config: Any) -> tuple[int, ...]:
    """Sizes of a site's axes after positions; a Mamba-2's heads and groups come merged."""
    axes = axes_of(site, config)[1:]
    if not (getattr(config, "in_heads", False) and axes[:1] in (("head",), ("group",))):
        return value.shape[-len(axes) :] if axes else ()
    sizes = {
        "head": config.n_heads,
        "d_head": config.d_head,
        "group": config.n_groups,
        "d_state": config.d_state,
    }
    return tuple(sizes[axis] for axis in axes)


def _own_axes(value: np.ndarray, site: str, config: Any) -> np.ndarray:
    """Heads apart and after positions, where a module has them merged or before."""
    axes = SITES[site].axes
    if axes[0] == "patch" and value.ndim == 4:  # a convolution has rows and columns, behind the width
        value = value.reshape(*value.shape[:2], -1).swapaxes(1, 2)
    if axes[-1] != "d_head":
        return value
    heads = config.n_heads if "head" in axes else config.n_kv_heads
    if value.ndim == 4 and value.shape[2] != heads:
        value = value.swapaxes(1, 2)
    return value.reshape(*value.shape[:2], heads, -1)


def _parts(value: np.ndarray, rule: Rule, config: Any) -> dict[str, np.ndarray]:
    """A module's output by the parameters that made it: laid out as its weight, tokens for what it reads."""
    rows = value.reshape(-1, value.shape[-1])
    stored_in_out = rule.layout.startswith("m ")
    read = "m" if stored_in_out else rule.layout.partition("->")[0].split()[-1]
    return rule.split(rows if stored_in_out else rows.T, config, **{read: len(rows)})
