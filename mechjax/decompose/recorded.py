"""What a run has to record for its streams to be taken apart: who reads them, and rows of captured sites."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from mechjax.base.errors import ArgumentError, SiteError
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.transform.captured import Activations

Layers = Sequence[int] | None
"""The layers of which a site is read; None for a site outside the layers."""


@needs_decoder("decompose")
def sites(model: Decoder, *, neurons: bool = True) -> tuple[str, ...]:
    """The sites that the functions of this package read: `mj.capture(model, mj.decompose.sites(model))(tokens)`.

    With `pos=-1` in that `capture`, everything is stored and taken apart at one position only.

    Args:
        model: The decoder.
        neurons: Whether neurons, and experts one by one, will be asked for: their sites are the largest, and send every
            token through every expert.
    """
    config, blocks = model.config, model.blocks
    mlps, moe = config.mlp != "none", blocks.moe is not None and neurons
    shared = moe and blocks.moe is not None and blocks.moe.shared is not None
    there = {
        "embed": True, "pos_embed": model.W_pos is not None, "resid_pre": True, "ln1.scale": blocks.ln1 is not None,
        "z": True, "ln1_post.scale": blocks.ln1_post is not None, "attn_out": True,
        "resid_mid": mlps and config.residual == "serial", "ln2.scale": blocks.ln2 is not None,
        "mlp_post": blocks.mlp is not None and neurons, "expert_indices": moe, "expert_weights": moe,
        "expert_post": moe, "expert_out": moe, "shared_post": shared, "shared_out": shared,
        "ln2_post.scale": blocks.ln2_post is not None, "mlp_out": mlps,
        "resid_post": True, "ln_final.scale": model.ln_final is not None,
    }  # fmt: skip
    return tuple(name for name, has in there.items() if has)


@dataclass(frozen=True)
class Reader:
    """What reads a residual stream: attention or MLP of a layer, or, with the number of layers, the unembedding.

    Attributes:
        layer: The layer.
        mlp_input: Whether its MLP reads.
        n_attn: How many layers' attention has written to what it reads.
        n_mlp: How many layers' MLPs have.
        stream: The site of the stream that it reads, and its layer.
        norm: Its norm: "ln1", "ln2" or "ln_final".
    """

    layer: int
    mlp_input: bool
    n_attn: int
    n_mlp: int
    stream: tuple[str, int]
    norm: Literal["ln1", "ln2", "ln_final"]


def reader_of(model: Decoder, layer: int | None, mlp_input: bool) -> Reader:
    """The reader that `layer` and `mlp_input` name.

    Raises:
        ArgumentError: A layer that the model does not have, or an MLP's input where there is no MLP.
    """
    config = model.config
    last, mlps = config.n_layers, config.mlp != "none"
    at = last if layer is None else layer
    if not 0 <= at <= last:
        raise ArgumentError(
            f"layer={layer}: the model has {last} layers, so 0 to {last - 1} name a layer's input and {last} (or None) "
            "the unembedding's."
        )
    if not mlp_input:
        stream, norm = (("resid_post", last - 1), "ln_final") if at == last else (("resid_pre", at), "ln1")
        return Reader(at, False, at, at * mlps, stream, norm)
    if at == last or not mlps:
        why = "the unembedding is no layer" if mlps else "this model is attention only"
        raise ArgumentError(
            f"mlp_input=True asks for what an MLP reads at layer={layer}, but {why}: leave it out."
        )
    if config.residual == "serial":
        return Reader(at, True, at + 1, at, ("resid_mid", at), "ln2")
    # In parallel, the MLP reads the block's input, as attention does.
    return Reader(
        at, True, at, at, ("resid_pre", at), "ln1" if config.residual == "parallel_shared" else "ln2"
    )


def read(acts: Activations, wanted: Mapping[str, Layers], asked: str) -> dict[str, Array]:
    """The rows of each site, in the order of the layers wanted; sites of which no layer is wanted are left out.

    Raises:
        SiteError: Sites or layers that were not captured, all of them named, with the call that captures them.
    """
    wanted = {name: layers for name, layers in wanted.items() if layers is None or len(layers)}
    missing = [named for name, layers in wanted.items() if (named := _missing(acts, name, layers))]
    if missing:
        raise SiteError(
            f"`{asked}` reads {', '.join(wanted)}. This record lacks {', '.join(missing)}; it holds "
            f"{', '.join(acts) or 'nothing'}. Capture all of them: mj.capture(model, {list(wanted)})(tokens)."
        )
    return {name: _rows(acts, name, layers) for name, layers in wanted.items()}


def place_of(acts: Activations, name: str, own: int) -> tuple[str, ...]:
    """Names of a site's axes between the layer and the last `own`: batch axes, and "pos" unless one was captured."""
    names = acts.axis_names("arrays", name) or ()
    return names[names[:1] == ("layer",) : len(names) - own]


def _missing(acts: Activations, name: str, layers: Layers) -> str:
    """How to name what a record lacks of a site; empty where it lacks nothing."""
    if name not in acts:
        return f"`{name}`"
    have = acts.layers[name] or ()
    left = [layer for layer in layers or () if layer not in have]
    return f"`{name}` of layer{'s' * (len(left) > 1)} {', '.join(map(str, left))}" if left else ""


def _rows(acts: Activations, name: str, layers: Layers) -> Array:
    have = acts.layers[name]
    if layers is None or have is None or tuple(layers) == have:
        return acts[name]
    at = [have.index(layer) for layer in layers]
    return (
        acts[name][at[0] : at[-1] + 1] if at == list(range(at[0], at[-1] + 1)) else acts[name][jnp.array(at)]
    )
