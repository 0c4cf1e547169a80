"""Does each latent fire where its feature is there?

Each latent is a detector of one feature: the one whose direction has the largest cosine with the latent's row of the
decoder, whatever its sign. Of all samples, with both there (hits), the latent alone (false alarms) and the feature
alone (misses),

    precision = hits / (hits + false alarms)      recall = hits / (hits + misses)
    f1 = 2 precision recall / (precision + recall)

each 0 where there is nothing to divide by: a latent that never fires has none of them. What SynthSAEBench reports is
their mean over all latents, dead ones too.

`unique` is the number of features that are some latent's, over the number of latents: SynthSAEBench's uniqueness. Two
latents of one feature count once there; in `recovery`, whose `unique` asks for latents that are alone, not at all.

Reference: Chanin and Garriga-Alonso (2026), arXiv:2602.14687, and `sae_lens.synthetic.evals` of SAELens 6.54. Of a
`BatchTopK` dictionary the published numbers take the largest latents of each batch of 1,024 samples; here, as anywhere,
a latent fires where it is above its threshold.

Cost: an `encode` of each batch; features by latents once. Misleads when: features outnumber latents by far, as a latent
that stands for several has a nearest one all the same; read `cosine` beside `f1`.
"""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.dictionaries import Dictionary


class Detection(Record):
    """Each latent as a detector of its feature.

    Attributes:
        f1: Harmonic mean of precision and recall.
        precision: Of samples where the latent fires, the part where the feature is there.
        recall: Of samples where the feature is there, the part where the latent fires.
        matched: Which feature is the latent's.
        cosine: Size of the cosine between the two.
        unique: Features that are some latent's, over latents.
        tokens: How many samples were looked at.
    """

    f1: Float[Array, "feature"]
    precision: Float[Array, "feature"]
    recall: Float[Array, "feature"]
    matched: Int[Array, "feature"]
    cosine: Float[Array, "feature"]
    unique: Float[Array, ""]
    tokens: Int[Array, ""]


@on_any_mesh
def detection(
    dictionary: Dictionary, batches: Iterable[tuple[Any, Any]], features: Float[Array, "known d_model"]
) -> Detection:
    """Compare when latents fire with when known features are there.

    Args:
        dictionary: The dictionary, as it is used.
        batches: Pairs of samples (batch, d_model) and the activations of the features they are made of (batch, known),
            above 0 (or True) where a feature is there.
        features: Directions of the features, of any length but 0.

    Raises:
        ArgumentError: No sample.
        ShapeError: Features or activations that fit neither the dictionary nor each other.
    """
    width = dictionary.W_dec.shape[-1]
    if features.ndim != 2 or features.shape[1] != width or not len(features):
        raise ShapeError(
            f"the features have shape {features.shape}; this dictionary writes vectors of length {width}: give "
            f"(known, {width})."
        )
    matched, cosine = nearest(dictionary.W_dec, features)
    total = np.zeros((3, len(matched)))
    tokens = 0
    for x, activations in batches:
        if activations.shape != (len(x), len(features)):
            raise ShapeError(
                f"activations have shape {activations.shape} beside {len(x)} samples and {len(features)} features: "
                f"give ({len(x)}, {len(features)}), one number for each sample and feature."
            )
        total += whole(_counts(dictionary, jnp.asarray(x), jnp.asarray(activations), matched))
        tokens += len(x)
    if not tokens:
        raise ArgumentError("`batches` holds no sample: give at least one pair of samples and activations.")
    both, fired, there = total
    over = lambda part, whole: np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    numbers = {
        "f1": over(2 * both, fired + there),  # the harmonic mean of both quotients below
        "precision": over(both, fired),
        "recall": over(both, there),
        "unique": len(np.unique(matched)) / len(matched),
    }
    kept = {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()}
    return Detection(**kept, matched=matched, cosine=cosine, tokens=jnp.asarray(tokens, jnp.int32))


@eqx.filter_jit
def nearest(
    rows: Float[Array, "feature d_model"], features: Float[Array, "known d_model"]
) -> tuple[Int[Array, "feature"], Float[Array, "feature"]]:
    """For each row the feature with the largest cosine, whatever its sign, and the size of that."""
    tiny = jnp.finfo(jnp.float32).tiny
    unit = lambda z: z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), tiny)
    own, known = (unit(z.astype(jnp.float32)) for z in (rows, features))
    size = jnp.abs(jnp.dot(own, known.T, precision="highest"))
    return size.argmax(-1), size.max(-1)


@eqx.filter_jit
def _counts(
    dictionary: Dictionary, x: Array, activations: Array, matched: Array
) -> Int[Array, "count feature"]:
    """For each latent the samples where it fires and its feature is there, where it fires, where the feature is."""
    fires = dictionary.encode(x) != 0
    there = activations[:, matched].astype(jnp.float32) > 0
    return jnp.stack([(fires & there).sum(0), fires.sum(0), there.sum(0)])
