"""What the nodes of a graph write to the residual stream, kept small: heads before their output weights."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mechjax.base.errors import ArgumentError
from mechjax.models.config import Config
from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder, Tokens, as_tokens, through
from mechjax.models.norms import Norm
from mechjax.transform.captured import Activations
from mechjax.transform.select import is_concrete
from mechjax.transform.transforms import capture


class Writes(eqx.Module):
    """What every node writes in one run. What heads write is linear in `heads`: sums and means of runs are runs.

    Attributes:
        input: Token and position embeddings. Shape (*batch, pos, d_model).
        heads: Each head's `z`, over the scale of the norm after attention, if there is one. Shape (layer, *batch, pos,
            head, d_head).
        mlps: What MLPs (or experts) write; None without. Shape (layer, *batch, pos, d_model).
    """

    input: Float[Array, "*batch pos d_model"]
    heads: Float[Array, "layer *batch pos head d_head"]
    mlps: Float[Array, "layer *batch pos d_model"] | None

    def examples(self, rows: slice) -> "Writes":
        """Those of some examples of a batch."""
        mlps = None if self.mlps is None else self.mlps[:, rows]
        return Writes(self.input[rows], self.heads[:, rows], mlps)

    def vectors(self, model: Decoder) -> Float[Array, "node *batch pos d_model"]:
        """What every node writes, as vectors of the stream, in the order of `graph.nodes`."""
        blocks, config = model.blocks, model.config

        def of_layer(W_O: Array, post: Norm | None, z: Array) -> Array:
            return jnp.moveaxis(head_vectors(W_O, post, z, config), -2, 0)

        own = jax.vmap(of_layer)(blocks.attn.W_O, blocks.ln1_post, self.heads)
        if self.mlps is not None:
            own = jnp.concatenate((own, self.mlps[:, None]), 1)
        return jnp.concatenate((self.input[None], own.reshape(-1, *self.input.shape)))


def head_vectors(
    W_O: Float[Array, "head d_head d_model"],
    post: Norm | None,
    z: Float[Array, "*batch pos head d_head"],
    config: Config,
) -> Float[Array, "*batch pos head d_model"]:
    """What the heads of a layer write: `z W_O`, through the norm after attention, whose scale `z` is already over."""
    out = contract("...hd,hdm->...hm", z, W_O, config)
    if post is not None:
        if config.norm == "layer":
            out = out - out.mean(-1, keepdims=True)
        if post.w is not None:
            out = out * (post.w + jnp.asarray(config.norm_offset, post.w.dtype))
    return out if config.residual_scale == 1.0 else out * jnp.asarray(config.residual_scale, out.dtype)


class Blocks(eqx.Module):
    """The blocks of a model alone: from what enters the first to what the unembedding reads."""

    model: Decoder

    def __call__(
        self, start: Float[Array, "*batch pos d_model"], mask: Any
    ) -> Float[Array, "*batch pos d_model"]:
        """The final residual stream."""
        return through(self.model, start, self.model.arrange(start.shape[-2], mask=mask))[0]


def sites(model: Decoder) -> tuple[str, ...]:
    """The sites that writes are made of, beside what enters the first block."""
    post, mlp = model.blocks.ln1_post is not None, model.config.mlp != "none"
    return ("z", *("ln1_post.scale",) * post, *("mlp_out",) * mlp)


def writes(model: Decoder, tokens: Tokens, *, mask: Bool[Array, "*batch pos"] | None = None) -> Writes:
    """What every node writes in the run of `tokens`. Costs one forward without its unembedding.

    Raises:
        ArgumentError: Activations that are not finite, where that can be seen; the first site is named.
    """
    ids, mask = as_tokens(tokens, mask, model.config)
    return writes_from(model, model.embed(ids, mask=mask), mask)


def writes_from(
    model: Decoder, start: Float[Array, "*batch pos d_model"], mask: Bool[Array, "*batch pos"] | None = None
) -> Writes:
    """What every node writes in the run that begins with `start`.

    Raises:
        ArgumentError: Activations that are not finite, where that can be seen; the first site is named.
    """
    return recorded(start, _captured(model, start, mask))


@eqx.filter_jit
def _captured(model: Decoder, start: Array, mask: Array | None) -> Activations:
    return capture(Blocks(model), sites(model))(start, mask)[1]


def recorded(start: Float[Array, "*batch pos d_model"], acts: Activations) -> Writes:
    """The writes in a capture of `sites` of the run that begins with `start`.

    Raises:
        ArgumentError: Activations that are not finite, where that can be seen; the first site is named.
    """
    z = acts["z"]
    if "ln1_post.scale" in acts:
        z = z / acts["ln1_post.scale"][..., None].astype(z.dtype)
    found = Writes(start, z, acts.arrays.get("mlp_out"))
    _check_finite(found)
    return found


def _check_finite(found: Writes) -> None:
    """Names the first node site that is not finite."""
    if not is_concrete(found.input):
        return
    if not bool(jnp.isfinite(found.input).all()):
        raise _not_finite("resid_pre", 0)
    stacks = [("z", found.heads)] + ([] if found.mlps is None else [("mlp_out", found.mlps)])
    fine = [np.asarray(jnp.isfinite(x).all(tuple(range(1, x.ndim)))) for _, x in stacks]
    for layer in range(len(fine[0])):
        for (site, _), whole in zip(stacks, fine, strict=True):
            if not whole[layer]:
                raise _not_finite(site, layer)


def _not_finite(site: str, layer: int) -> ArgumentError:
    return ArgumentError(
        f"`{site}` of layer {layer} is not finite in this run, though all before it is: scores would all be NaN. Look "
        f"at mj.capture(model, '{site}')(prompts); half precision that overflows is the usual cause."
    )
