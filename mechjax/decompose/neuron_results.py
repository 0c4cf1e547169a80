"""Which neurons wrote it? What every neuron of the MLPs wrote to the residual stream.

    mlp_out[l] = sum_n mlp_post[l, n] W_out[l, n] + b_out[l]

In experts, `mlp_post` is `expert_post` times the weight with which its expert was chosen (0 where it was not), and what
the shared ones hold is `shared_post`.

Where a norm stands after the MLP, each neuron's part of its output, with the scale of the run.
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
def neuron_results(
    model: Decoder, acts: Activations, *, layer: int | None = None, mlp_input: bool = False
) -> Stack:
    """What each neuron wrote. Memory: `n_layers * d_mlp` residual streams.

    That is much: capture one position (`mj.capture(model, sites, pos=-1)`), or use `project` or `logit_attribution`,
    which form no vectors.

    Args:
        model: The decoder that was run.
        acts: A capture of `mlp_post` (with experts `expert_post`, `expert_indices`, `expert_weights`, `shared_post`)
            and of the stream (and of `ln2_post.scale`, where there is one).
        layer: Neurons before what this layer's attention reads; None for all.
        mlp_input: Neurons before what that layer's MLP reads.

    Returns:
        Components "L0.N0", "L0.N1", ... (of experts "L0.E0.N0", ..., "L0.shared.N0", ...); `gap` is what all else
        wrote, and `with_remainder` makes it a component.

    Raises:
        SiteError: Sites that were not captured.
        ArgumentError: A layer that there is not, or gated shared experts.
    """
    return parts_of(model, acts, reader_of(model, layer, mlp_input), "neurons", "neuron_results").stack(model)
