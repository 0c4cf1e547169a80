"""What had been written by when? The residual stream at every layer, one row each, as the lenses read it."""

import jax.numpy as jnp
from jaxtyping import Array

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.decompose.recorded import place_of, read, reader_of
from mechjax.decompose.stack import Stack
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.transform.captured import Activations


@needs_decoder("decompose")
@on_any_mesh
def accumulated_resid(
    model: Decoder,
    acts: Activations,
    *,
    layer: int | None = None,
    incl_mid: bool = False,
    mlp_input: bool = False,
) -> Stack:
    """The residual streams up to what a layer reads.

    Each is the sum of the components before it, so two rows differ by what was written between them. They are not
    parts of one sum: `gap` is refused. `apply_norm` divides all of them by the one scale that was recorded; for the
    logit lens, where each has its own, it is `model.unembed(streams.values)`.

    Args:
        model: The decoder that was run.
        acts: A capture of `resid_pre`, `resid_post` (where the unembedding's input is asked for) and, for `incl_mid`
            and `mlp_input`, `resid_mid`.
        layer: The last stream is what this layer's attention reads; None for what the unembedding reads.
        incl_mid: Also the streams between attention and MLP.
        mlp_input: Also what the MLP of that layer reads.

    Returns:
        Rows "resid_pre 0", "resid_mid 0", "resid_pre 1", ..., "resid_post 11".

    Raises:
        SiteError: Sites that were not captured.
        ArgumentError: A layer that there is not, or streams between attention and MLP where nothing stands between.
    """
    reader, config = reader_of(model, layer, mlp_input), model.config
    if (incl_mid or mlp_input) and (config.residual != "serial" or config.mlp == "none"):
        raise ArgumentError(
            "incl_mid and mlp_input ask for `resid_mid`, but in this model nothing stands between attention and MLP "
            f"(residual={config.residual!r}, mlp={config.mlp!r}): leave them out."
        )
    last = config.n_layers
    mids = (*range(reader.layer * incl_mid), *(reader.layer,) * mlp_input)
    pres, posts = range(min(reader.layer + 1, last)), (last - 1,) * (reader.layer == last)
    found = read(acts, {"resid_pre": pres, "resid_mid": mids, "resid_post": posts}, "accumulated_resid")
    streams: dict[str, Array] = {}
    for i in pres:
        streams[f"resid_pre {i}"] = found["resid_pre"][i]
        if i in mids:
            streams[f"resid_mid {i}"] = found["resid_mid"][mids.index(i)]
    if posts:
        streams[f"resid_post {last - 1}"] = found["resid_post"][0]
    place = place_of(acts, "resid_pre", 1)
    return Stack(jnp.stack(list(streams.values())), None, tuple(streams), place, reader.layer, mlp_input)
