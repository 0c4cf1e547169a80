"""Which components speak for this token? Direct logit attribution.

    logit(t) = sum_c y_c . W_U[:, t] + b . W_U[:, t] + b_U[t]

where y_c is component c through the last norm with the scale of the run, and b that norm's bias (without norms, y_c is
the component): an exact sum, of what the components say to the unembedding directly. What they do through later
components is counted as those components'.
Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2022, arXiv:2211.00593.
Logits are before a soft-cap, which is no sum. Misleads where a later component erases what an earlier one says
(McGrath et al. 2023, arXiv:2307.15771): the ablation of either changes less than its share.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError, TokenError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.whole import whole
from mechjax.decompose.frozen import centred, gain, scale_of
from mechjax.decompose.parts import Kind, parts_of
from mechjax.decompose.recorded import Reader, read, reader_of
from mechjax.decompose.stack import Projection, Stack
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.transform.captured import Activations
from mechjax.transform.select import is_concrete


@needs_decoder("decompose")
@on_any_mesh
def logit_attribution(
    model: Decoder,
    acts: Activations,
    tokens: Any,
    wrong: Any = None,
    *,
    of: Kind | Stack = "layers",
) -> Projection:
    """What each component adds to the logit of a token, or to the difference of two tokens' logits.

    Args:
        model: The decoder that was run.
        acts: A capture of `sites(model)`, or of `ln_final.scale`, `resid_post` and what `of` needs.
        tokens: Token ids: one, one per example, or one per place (such as the next token at every position).
        wrong: Ids of the tokens whose logits are subtracted; the same shapes.
        of: The components: "layers", "heads", "neurons", "experts", "everything", or a stack of what the unembedding
            reads.

    Returns:
        A number per component and place. `total` is the logit (difference) that the recorded stream gives through the
        norm and the unembedding, and `gap` is rounding where no component is missing.

    Raises:
        SiteError: Sites that were not captured.
        ArgumentError: A stack of what some layer reads.
        ShapeError: Tokens for another number of examples.
        TokenError: Ids that are no tokens.
    """
    name = "logit_attribution"
    reader = reader_of(model, None, mlp_input=False)
    if isinstance(of, Stack) and (of.layer, of.mlp_input) != (reader.layer, False):
        raise ArgumentError(
            f"The stack takes apart what layer {of.layer}'s {'MLP' if of.mlp_input else 'attention'} reads; logits are "
            "read from the last stream: make the stack without `layer` and `mlp_input`."
        )
    scale, (stream, row) = _scale(model, acts, reader), reader.stream
    final = read(acts, {stream: (row,)}, name)[stream][0]
    named = acts.axis_names("arrays", stream) or ()
    batch = final.shape[: -2 if "pos" in named else -1]
    columns, bias_U = _column(model, tokens, "tokens", batch, final.shape[:-1])
    if wrong is not None:
        column, bias = _column(model, wrong, "wrong", batch, final.shape[:-1])
        columns, bias_U = columns - column, bias_U - bias
    config, norm = model.config, model.ln_final
    columns, bias_U = config.logit_scale * columns, config.logit_scale * bias_U
    # Centring a component and reading it is reading it along a centred direction.
    direction = columns if norm is None else centred(gain(norm, config) * columns, config) / scale
    found = (
        of.project(direction)
        if isinstance(of, Stack)
        else parts_of(model, acts, reader, of, name).onto(direction, model)
    )
    bias = (
        bias_U if norm is None or norm.b is None else bias_U + (norm.b.astype(jnp.float32) * columns).sum(-1)
    )
    normalized = final if norm is None else norm(final, config)
    logit = (normalized.astype(jnp.float32) * columns).sum(-1) + bias_U
    total = None if found.total is None else logit
    return Projection(found.values, jnp.broadcast_to(bias, logit.shape), total, found.labels, found.place)


def _scale(model: Decoder, acts: Activations, reader: Reader) -> Array | float:
    """What the last norm divided by, where there is one."""
    return 1.0 if model.ln_final is None else scale_of(acts, reader, "logit_attribution")


def _column(
    model: Decoder, tokens: Any, what: str, batch: tuple[int, ...], place: tuple[int, ...]
) -> tuple[Float[Array, "*place d_model"], Float[Array, "*place"]]:
    """The tokens' columns of the unembedding and their biases, in float32, broadcastable to the place."""
    ids = _ids(tokens, what, model.config.d_vocab, batch, place)
    table = model.W_E if model.W_U is None else model.W_U.T
    take = lambda x: x.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    bias = jnp.zeros(ids.shape) if model.b_U is None else take(model.b_U).astype(jnp.float32)
    return take(table).astype(jnp.float32), bias


def _ids(
    tokens: Any, what: str, d_vocab: int, batch: tuple[int, ...], place: tuple[int, ...]
) -> Int[Array, "..."]:
    ids = jnp.asarray(tokens)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TokenError(
            f"`{what}` must be token ids (integers), got {ids.dtype}. One id of a text: tokenizer.token(' Mary')."
        )
    if is_concrete(ids) and (outside := whole(ids)[(whole(ids) < 0) | (whole(ids) >= d_vocab)]).size:
        raise TokenError(f"`{what}` has the id {int(outside[0])}; the model's tokens are 0 to {d_vocab - 1}.")
    if ids.shape not in ((), batch, place):
        raise ShapeError(
            f"`{what}` has the shape {ids.shape}; the stream was recorded at {place}. Give one id, one per example "
            f"{batch}, or one per place {place}."
        )
    return ids[..., None] if ids.shape == batch and batch != place and batch else ids
