"""What a Hugging Face model computes at our sites, read by hooks on its modules.

Which module that is follows from the family's weight rules: the module that holds `W_O` reads `z` and gives `attn_out`,
and a fused matrix splits its output as its rows. So a new family needs nothing here. Attention patterns are what
`output_attentions` returns, the residual stream is what enters and leaves a block, and where no parameter decides, a
module's path is looked up in the catalogue.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mechjax.base.catalogue import SITES, canonical
from mechjax.base.errors import UnsupportedModelError
from mechjax.base.optional import require
from mechjax.models.config import Config
from mechjax.models.encoder_config import EncoderConfig
from mechjax.models.families import ENCODERS, FAMILIES, Family, Rule

Sites = dict[tuple[str, int | None], np.ndarray]
"""(site, layer) -> its numbers, of shape (batch, pos, ...) or (batch, head, query, key); the layer may be None."""

READ_AND_GIVEN: Mapping[str, tuple[str | None, str | None]] = {
    "W_E": (None, "embed"),
    "ln_embed.w": (None, "embed"),
    "W_pos": (None, "pos_embed"),
    "W_type": (None, "token_type_embed"),
    "blocks.ln1.w": ("attn_in", "ln1.normalized"),
    "blocks.attn.W_Q": (None, "q"),
    "blocks.attn.W_K": (None, "k"),
    "blocks.attn.W_V": (None, "v"),
    "blocks.attn.q_norm.w": (None, "q_norm.normalized"),
    "blocks.attn.k_norm.w": (None, "k_norm.normalized"),
    "blocks.attn.W_O": ("z", "attn_out"),
    "blocks.ln1_post.w": (None, "attn_out"),
    "blocks.ln2.w": ("mlp_in", "ln2.normalized"),
    "blocks.mlp.W_in": (None, "mlp_pre"),
    "blocks.mlp.W_gate": (None, "mlp_pre"),
    "blocks.mlp.W_out": ("mlp_post", "mlp_out"),
    "blocks.ln2_post.w": (None, "mlp_out"),
    "ln_final.w": (None, "ln_final.normalized"),
}
"""Parameter -> the sites that its module reads and gives. Where two give one site, the later entry is the one."""

_ENCODER = {
    "ln_embed.w": (None, "ln_embed.normalized"),
    "blocks.attn.W_Q": ("attn_in", "q"),
    "blocks.ln1.w": (None, "ln1.normalized"),
    "blocks.mlp.W_in": ("mlp_in", "mlp_pre"),
    "blocks.ln2.w": (None, "ln2.normalized"),
}
"""Where an encoder differs: its norms stand on the stream itself, after the sums."""

_ORDER = {path: i for i, path in enumerate(READ_AND_GIVEN)}


def hf_sites(hf: Any, config: Config, tokens: np.ndarray, **inputs: Any) -> Sites:
    """Every site that the modules of a Hugging Face model expose, and its logits.

    Args:
        hf: A transformers model of a family that mechjax knows, in evaluation mode. Patterns need its eager attention.
        config: Our config of it.
        tokens: Ids. Shape (batch, pos).
        **inputs: What else the model is called with, as arrays, such as `attention_mask`.

    Returns:
        (site, layer) -> numbers, in float32 (float64 where the model computes in it).

    Raises:
        UnsupportedModelError: A model of no family that mechjax knows.
        MissingExtraError: torch is not installed.
    """
    torch = require("torch", extra="torch")
    family, found = _family(hf), dict[tuple[str, int | None], tuple[int, np.ndarray]]()
    eager = hf.config._attn_implementation == "eager"  # asked for patterns, others turn eager
    n_batch, n_pos = tokens.shape

    def keep(rank: int, site: str, layer: int | None, value: np.ndarray) -> None:
        own = value.shape[-len(SITES[site].axes) + 1 :]  # positions may be embedded once for all examples
        rows = np.broadcast_to(value.reshape(-1, n_pos, *own), (n_batch, n_pos, *own))
        if (site, layer) not in found or rank >= found[site, layer][0]:
            found[site, layer] = rank, rows

    handles = [
        module.register_forward_hook(partial(_hook, torch, read), with_kwargs=True)
        for path, module in hf.named_modules()
        for read in _readers(path, family, config, keep)
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
    sites = {place: value for place, (_, value) in found.items()}
    logits = getattr(output, "logits", getattr(output, "prediction_logits", None))
    if logits is not None:
        sites["logits", None] = _array(torch, logits)
    for layer, pattern in enumerate(output.attentions or ()):
        if pattern is not None:
            sites["pattern", layer] = _array(torch, pattern)
    return sites


_Keep = Callable[[int, str, int | None, np.ndarray], None]
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
    for family in (*FAMILIES, *ENCODERS):
        if name in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise UnsupportedModelError(f"A {name} has no family whose modules are known; known are {known}.")


def _readers(path: str, family: Family, config: Config, keep: _Keep) -> list[_Read]:
    """What is read where the module at `path` enters and leaves."""
    if match := family.match(f"{path}.weight", config):
        rule, layer = match
        return [partial(_by_parameter, rule, layer, config, keep)] if _known(rule) else []
    blocks = _blocks(family, config)
    for spelled in (path, family.prefix + path):  # the bare model lacks the prefix
        if spelled in blocks:
            return [partial(_by_name, ("resid_pre", "resid_post"), blocks.index(spelled), keep)]
    (entering, layer), (leaving, again) = (canonical(f"{path}.{end}") for end in ("input", "output"))
    sites = (
        entering if _by_position(entering) else None,
        leaving if _by_position(leaving) and leaving != "logits" and _is_written(leaving, config) else None,
    )
    return [partial(_by_name, sites, again if layer is None else layer, keep)] if any(sites) else []


def _by_position(name: str) -> bool:
    return name in SITES and SITES[name].axes[0] == "pos"


def _known(rule: Rule) -> bool:
    return all(path in READ_AND_GIVEN for path in rule.paths) and "head}" not in rule.name


def _is_written(site: str, config: Config, *, after_norm: bool = False) -> bool:
    """Whether a module that gives `site` by its name gives what is written: nothing is done to it afterwards."""
    if site == "embed":
        return config.embed_scale == 1.0 and (after_norm or not config.embed_norm)
    if site in ("attn_out", "mlp_out"):
        return config.residual_scale == 1.0 and (after_norm or config.norms == "pre")
    return True


def _blocks(family: Family, config: Config) -> list[str]:
    """Paths of the blocks: what stands before the first dot after the layer's number."""
    name = next(rule.name for rule in family.weights if rule.layered)
    return [f"{name.partition('{}')[0]}{layer}" for layer in range(config.n_layers)]


def _by_name(
    sites: tuple[str | None, str | None],
    layer: int | None,
    keep: _Keep,
    entering: np.ndarray | None,
    leaving: np.ndarray | None,
) -> None:
    for site, value in zip(sites, (entering, leaving), strict=True):
        if site is not None and value is not None:
            keep(-1, site, layer, value)


def _by_parameter(
    rule: Rule,
    layer: int | None,
    config: Config,
    keep: _Keep,
    entering: np.ndarray | None,
    leaving: np.ndarray | None,
) -> None:
    for path in rule.paths:
        own = _ENCODER if isinstance(config, EncoderConfig) else {}
        read, given = own.get(path, READ_AND_GIVEN[path])
        rank = _ORDER[path]
        if read is not None and entering is not None:
            keep(rank, read, layer, _own_axes(entering, read, config))
        if given is None or leaving is None or not _is_written(given, config, after_norm=path.endswith(".w")):
            continue
        if path == "blocks.mlp.W_in" and config.mlp == "gated":
            given = "mlp_pre_linear"
        if SITES[given].axes[-1] == "d_model":
            keep(rank, given, layer, leaving)
        elif path.endswith("_norm.w"):
            keep(rank, given, layer, _heads_apart(leaving, path, config))
        else:
            part = _parts(leaving, rule, config)[path]
            clip = config.qkv_clip if given in ("q", "k", "v") else None  # done outside modules
            keep(rank, given, layer, part if clip is None else np.clip(part, -clip, clip))


def _own_axes(value: np.ndarray, site: str, config: Config) -> np.ndarray:
    """Heads apart, where a module reads them merged."""
    if SITES[site].axes[-1] != "d_head":
        return value
    return value.reshape(-1, config.n_heads, value.shape[-1] // config.n_heads)


def _heads_apart(value: np.ndarray, path: str, config: Config) -> np.ndarray:
    """Shape (batch, pos, head, d_head), of what may be merged or have heads before positions."""
    heads = config.n_heads if "q_norm" in path else config.n_kv_heads
    if value.ndim == 4 and value.shape[2] != heads:
        value = value.swapaxes(1, 2)
    return value.reshape(*value.shape[:2], heads, config.d_head)


def _parts(value: np.ndarray, rule: Rule, config: Config) -> dict[str, np.ndarray]:
    """A module's output by the parameters that made it: laid out as its weight, tokens for what it reads."""
    rows = value.reshape(-1, value.shape[-1])
    stored_in_out = rule.layout.startswith("m ")
    latent = config.latent and replace(config.latent, q_rank=config.latent.q_rank and len(rows))
    return rule.split(rows if stored_in_out else rows.T, replace(config, d_model=len(rows), latent=latent))
