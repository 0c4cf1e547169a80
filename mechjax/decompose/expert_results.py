"""Which experts wrote it? What every expert, and the shared ones, wrote to the residual stream.

    mlp_out[l] = sum_e weight[l, e] * expert[l, e](x) + shared[l](x)

An expert that a token does not go to wrote nothing there. Where a norm stands after the experts, each one's part of its
output, with the scale of the run. Shazeer et al. 2017, arXiv:1701.06538.
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
def expert_results(
    model: Decoder, acts: Activations, *, layer: int | None = None, mlp_input: bool = False
) -> Stack:
    """What each expert wrote, its bias included. Memory: a residual stream for each expert of each layer.

    Args:
        model: The decoder that was run.
        acts: A capture of `expert_out`, of `shared_out` (with shared experts) and of the stream (and of
            `ln2_post.scale`, where there is one).
        layer: Experts before what this layer's attention reads; None for all.
        mlp_input: Experts before what that layer's MLP reads.

    Returns:
        Components "L0.E0", "L0.E1", ..., "L0.shared", ...; `gap` is what all else wrote, and `with_remainder` makes it
        a component.

    Raises:
        SiteError: Sites that were not captured.
        ArgumentError: A layer that there is not, or a model without experts.
    """
    return parts_of(model, acts, reader_of(model, layer, mlp_input), "experts", "expert_results").stack(model)
