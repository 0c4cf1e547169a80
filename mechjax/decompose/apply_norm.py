"""How much of each component does the reader see? A stack through the norm that reads it, with the run's own scale.

    y_c = (x_c - mean(x_c)) / scale * w          scale = sqrt(mean((x - mean(x))^2) + eps) of the whole stream x

With its scale frozen a norm is linear, so the components still sum: to what the norm gave the reader, less its bias.
RMSNorm has no mean. Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
Exact for what the run did; misleads about what a change would do, since a change moves the scale too.
"""

from jaxtyping import Array

from mechjax.base.meshes import on_any_mesh
from mechjax.decompose.frozen import centred, gain, norm_of, scale_of
from mechjax.decompose.recorded import reader_of
from mechjax.decompose.stack import Stack
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.transform.captured import Activations


@needs_decoder("decompose")
@on_any_mesh
def apply_norm(
    model: Decoder,
    acts: Activations,
    stack: Stack,
    *,
    layer: int | None = None,
    mlp_input: bool | None = None,
    weighted: bool = True,
) -> Stack:
    """Each component, centred (LayerNorm) and divided by the scale that the norm had in the run.

    Args:
        model: The decoder that was run.
        acts: A capture of the norm's scale: `ln_final.scale`, `ln1.scale` or `ln2.scale`.
        stack: Components of what the norm reads.
        layer: Whose norm: a layer's, or with the number of layers the last one; None for that of the stack's reader.
        mlp_input: Whether it is the one before that layer's MLP; None for that of the stack's reader.
        weighted: Multiply by the norm's weights too. TransformerLens leaves them out, and folds them into the reader.

    Returns:
        The stack, in float32, as its reader gets it; only the norm's bias is not in it.

    Raises:
        SiteError: A scale that was not captured.
        ArgumentError: A layer that there is not, or one that reads without a norm.
    """
    layer = stack.layer if layer is None else layer
    reader = reader_of(model, layer, stack.mlp_input if mlp_input is None else mlp_input)
    norm, config = norm_of(model, reader, "apply_norm"), model.config
    factor = (gain(norm, config) if weighted else 1.0) / scale_of(acts, reader, "apply_norm")

    def through(x: Array) -> Array:
        return centred(x, config) * factor

    total = None if stack.total is None else through(stack.total)
    return Stack(through(stack.values), total, stack.labels, stack.place, reader.layer, reader.mlp_input)
