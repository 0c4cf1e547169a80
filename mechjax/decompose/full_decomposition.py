"""Who wrote it, to the last head and neuron? The residual stream as the sum of everything that writes to it.

resid = sum heads + sum neurons (or MLPs) + embed + pos_embed + biases
"""

from mechjax.base.meshes import on_any_mesh
from mechjax.decompose.parts import unit_parts
from mechjax.decompose.recorded import reader_of
from mechjax.decompose.stack import Stack
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.transform.captured import Activations


@needs_decoder("decompose")
@on_any_mesh
def full_decomposition(
    model: Decoder,
    acts: Activations,
    *,
    layer: int | None = None,
    mlp_input: bool = False,
    neurons: bool = True,
) -> Stack:
    """What everything wrote: heads, neurons or MLPs, embeddings, and the biases of all layers as one component.

    Args:
        model: The decoder that was run.
        acts: A capture of `z`, `mlp_post` (or `mlp_out`), `embed`, `pos_embed` (with learned positions) and the stream;
            `sites(model)` names all.
        layer: Take apart what this layer's attention reads; None for what the unembedding reads.
        mlp_input: Take apart what that layer's MLP reads.
        neurons: Whether MLPs are taken apart into neurons; each costs a residual stream.

    Returns:
        Components "L0.H0", ..., "L0.N0", ... (or "mlp 0", ..., their biases included), "embed", "pos_embed", "bias";
        `gap` is rounding.

    Raises:
        SiteError: Sites that were not captured.
        ArgumentError: A layer that there is not, or neurons of gated shared experts.
    """
    reader = reader_of(model, layer, mlp_input)
    parts = unit_parts(model, acts, reader, "full_decomposition", heads=True, neurons=neurons, rest=True)
    return parts.stack(model)
