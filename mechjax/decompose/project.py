"""How much did each component write along a direction? Inner products, without the vectors of heads and neurons."""

from jaxtyping import Array, Float

from mechjax.base.meshes import on_any_mesh
from mechjax.decompose.parts import Kind, parts_of
from mechjax.decompose.recorded import reader_of
from mechjax.decompose.stack import Projection
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.transform.captured import Activations


@needs_decoder("decompose")
@on_any_mesh
def project(
    model: Decoder,
    acts: Activations,
    onto: Float[Array, "*onto d_model"],
    *,
    of: Kind = "layers",
    layer: int | None = None,
    mlp_input: bool = False,
) -> Projection:
    """Inner product of what each component wrote with a direction, such as a probe's, in float32.

    The weights are contracted with the direction first, so that neurons cost no more memory than their activations.

    Args:
        model: The decoder that was run.
        acts: A capture of `sites(model)`, or of what `of` needs.
        onto: One direction, or one for each place of the stream. Shape (d_model) or (*place, d_model).
        of: The components: "layers", "heads", "neurons", "experts", or "everything" (heads, neurons, embeddings
            and biases).
        layer: Take apart what this layer's attention reads; None for what the unembedding reads.
        mlp_input: Take apart what that layer's MLP reads.

    Returns:
        A number per component and place; `total` is the stream's.

    Raises:
        SiteError: Sites that were not captured.
        ArgumentError: A layer or kind that there is not.
    """
    return parts_of(model, acts, reader_of(model, layer, mlp_input), of, "project").onto(onto, model)
