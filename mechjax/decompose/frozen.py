"""Norms with their scale held as it was in a run, which makes them linear."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.base.errors import ArgumentError
from mechjax.decompose.recorded import Reader, read
from mechjax.models.config import Config
from mechjax.models.decoder import Decoder
from mechjax.models.norms import Norm
from mechjax.transform.captured import Activations


def centred(x: Float[Array, "... d_model"], config: Config) -> Float[Array, "... d_model"]:
    """Less its mean where the norms are LayerNorms, in float32."""
    x = x.astype(jnp.float32)
    return x - x.mean(-1, keepdims=True) if config.norm == "layer" else x


def gain(norm: Norm, config: Config) -> Float[Array, "*layer d_model"]:
    """What the norm multiplies by, in float32; a single one where it has no weights."""
    return jnp.ones(1) if norm.w is None else norm.w.astype(jnp.float32) + config.norm_offset


def norm_of(model: Decoder, reader: Reader, asked: str) -> Norm:
    """The norm through which `reader` reads.

    Raises:
        ArgumentError: It reads the stream as it is.
    """
    last = reader.norm == "ln_final"
    norm: Norm | None = model.ln_final if last else getattr(model.blocks, reader.norm)
    if norm is None:
        where = f"layer {reader.layer}'s {'MLP' if reader.mlp_input else 'attention'}"
        fix = "Leave `layer` out for the last norm."
        if model.ln_final is None:
            fix = "This model has no norms: use the stack as it is."
        raise ArgumentError(
            f"`{asked}` asks for the norm before {'the unembedding' if last else where}, "
            f"which reads the stream as it is (norms={model.config.norms!r}). {fix}"
        )
    if last:
        return norm
    w, b = (None if x is None else x[reader.layer] for x in (norm.w, norm.b))
    return Norm(w, b)


def scale_of(acts: Activations, reader: Reader, asked: str) -> Float[Array, "*place 1"]:
    """What that norm divided by in the run."""
    name, layers = f"{reader.norm}.scale", None if reader.norm == "ln_final" else (reader.layer,)
    scale = read(acts, {name: layers}, asked)[name]
    return scale if layers is None else scale[0]
