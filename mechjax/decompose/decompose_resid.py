"""Which layers wrote what a stream holds? The residual stream as the sum of what attention and MLPs wrote.

    resid = embed + pos_embed + sum_l (attn_out[l] + mlp_out[l])

Exact in every family, since `attn_out` and `mlp_out` are what is added. An edit at a stream itself is what `gap` shows.
Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from typing import Literal

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.decompose.parts import layer_parts
from mechjax.decompose.recorded import reader_of
from mechjax.decompose.stack import Stack
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.transform.captured import Activations


@needs_decoder("decompose")
@on_any_mesh
def decompose_resid(
    model: Decoder,
    acts: Activations,
    *,
    layer: int | None = None,
    mlp_input: bool = False,
    mode: Literal["all", "attn", "mlp"] = "all",
    embeds: bool = True,
) -> Stack:
    """What each layer wrote to a residual stream.

    Args:
        model: The decoder that was run.
        acts: A capture of `embed`, `pos_embed` (with learned positions), `attn_out`, `mlp_out` and the stream itself.
        layer: Take apart what this layer's attention reads; None for what the unembedding reads.
        mlp_input: Take apart what that layer's MLP reads.
        mode: Which writers: "all", or those of "attn" or "mlp" alone.
        embeds: Whether the embeddings are among the components.

    Returns:
        Components "embed", "pos_embed", "attn 0", "mlp 0", "attn 1", ...; with all of them, `gap` is rounding.

    Raises:
        SiteError: Sites that were not captured.
        ArgumentError: A layer or mode that there is not.
    """
    if mode not in ("all", "attn", "mlp"):
        raise ArgumentError(f"mode={mode!r}: the writers are 'all', 'attn' or 'mlp'.")
    reader = reader_of(model, layer, mlp_input)
    parts = layer_parts(
        model, acts, reader, "decompose_resid", attn=mode != "mlp", mlp=mode != "attn", embeds=embeds
    )
    return parts.stack(model)
