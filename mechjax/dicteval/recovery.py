"""Were the features of a world found whose features are known?

With cosines of each feature and each latent's row of the decoder:

- `mcc`: mean size of the cosine, features and latents matched one to one so that it is largest (Hungarian method).
- `found`: for each feature the largest cosine of any latent, signed: a latent that writes the opposite has not found
  it. Its mean is `mmcs` (Sharkey et al. 2022).
- `unique`: part of latents whose nearest feature is nearest to no other latent.

Misleads when: a good reconstruction is taken for recovery; the two may point in opposite directions.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mechjax.base.errors import ShapeError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.dictionaries import Dictionary


class Recovery(Record):
    """How well known features were found.

    Attributes:
        found: For each known feature the largest cosine of any latent.
        mcc: Mean size of cosines, matched one to one.
        mmcs: Mean of `found`.
        above: Part of features that some latent has a cosine of more than 0.9 with.
        unique: Part of latents whose nearest feature is nearest to no other.
    """

    found: Float[Array, "known"]
    mcc: Float[Array, ""]
    mmcs: Float[Array, ""]
    above: Float[Array, ""]
    unique: Float[Array, ""]


@on_any_mesh
def recovery(dictionary: Dictionary, features: Float[Array, "known d_out"]) -> Recovery:
    """Compare a dictionary's decoder with known features.

    Args:
        dictionary: The dictionary.
        features: Their directions, of any length but 0.

    Raises:
        ShapeError: Features of another width.
    """
    from scipy.optimize import linear_sum_assignment  # here: it takes 0.1 s to import

    if features.ndim != 2 or features.shape[1] != dictionary.W_dec.shape[-1]:
        raise ShapeError(
            f"the features have shape {features.shape}; this dictionary writes vectors of length "
            f"{dictionary.W_dec.shape[-1]}: give (feature, {dictionary.W_dec.shape[-1]})."
        )
    unit = lambda rows: (
        rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    )
    cosines = unit(np.asarray(features, np.float64)) @ unit(whole(dictionary.W_dec, np.float64)).T
    matched = np.abs(cosines)[linear_sum_assignment(-np.abs(cosines))].mean()
    found = cosines.max(1)
    nearest = np.bincount(np.abs(cosines).argmax(0), minlength=len(features))
    unique = (nearest == 1).sum() / cosines.shape[1]
    numbers = {
        "found": found,
        "mcc": matched,
        "mmcs": found.mean(),
        "above": (found > 0.9).mean(),
        "unique": unique,
    }
    return Recovery(**{name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()})
