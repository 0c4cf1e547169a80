"""Which heads wrote it? What every attention head wrote to the residual stream, from `z` and `W_O`.

    attn_out[l] = sum_h z[l, h] @ W_O[l, h] + b_O[l]

The costly site `result` is not needed. Heads that share keys and values have their own `z`. Where a norm stands after
attention, each head's part of its output, with the scale of the run.
"""

from mechjax.base.meshes import on_any_mesh
from mechjax.decompose.parts import parts_of
from mechjax.decompose.recorded import reader_of
from mechjax.decompose.stack import Stack
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.transform.captured import Activations


@needs_decoder("decompose")
@on_any_mesh
def head_results(
    model: Decoder, acts: Activations, *, layer: int | None = None, mlp_input: bool = False
) -> Stack:
    """What each head wrote. Memory: `n_layers * n_heads` residual streams; `project` needs none of it.

    Args:
        model: The decoder that was run.
        acts: A capture of `z` and of the stream (and of `ln1_post.scale`, where there is one).
        layer: Heads before what this layer's attention reads; None for all.
        mlp_input: Heads before what that layer's MLP reads.

    Returns:
        Components "L0.H0", "L0.H1", ...; `gap` is what all else wrote, and `with_remainder` makes it a component.

    Raises:
        SiteError: Sites that were not captured.
        ArgumentError: A layer that there is not.
    """
    return parts_of(model, acts, reader_of(model, layer, mlp_input), "heads", "head_results").stack(model)
