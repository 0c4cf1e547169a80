"""SynthSAEBench: how well do dictionaries find the features of a world in which they are known?

Dictionaries are trained side by side on one stream of samples of a world (`mechjax.tasks.synth_sae_bench`) and judged
on samples that none of them has seen:

- `f1`, `precision`, `recall`: each latent as a detector of its nearest feature, the mean over latents
  (`mechjax.dicteval.detection`).
- `mcc`: cosines of latents and features, matched one to one (`mechjax.dicteval.recovery`).
- `unique`: features that are some latent's, over latents.
- `explained`: of the variance, 1 - FVU; `l0`, `dead`, `gamma` as in `mechjax.dicteval.reconstruction`.

Reference: Chanin and Garriga-Alonso (2026), "SynthSAEBench: evaluating sparse autoencoders on scalable realistic
synthetic data", arXiv:2602.14687, who train 4,096 latents on 200 million samples of the world at its full size.
Differs: latents above their thresholds count as firing, as in use; the published numbers of BatchTopK kinds take the
largest of each batch. Cost: that of `train_many`, and for each sample two random numbers for each feature of the world.
Misleads when: a single run is compared with another; dictionaries of other seeds differ by up to a hundredth.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record
from mechjax.dicteval import detection, reconstruction, recovery
from mechjax.dictionaries import Dictionary
from mechjax.dictlearn import train_many
from mechjax.tasks.synthetic_world import World

SAMPLES = 65_536
BATCH = 1024


class SynthBench(Record):
    """What each dictionary found.

    Attributes:
        f1: Mean over latents of the harmonic mean of precision and recall.
        precision: Of samples where a latent fires, the part where its feature is there.
        recall: Of samples where a feature is there, the part where its latent fires.
        mcc: Mean cosine of latents and features, matched one to one.
        unique: Features that are some latent's, over latents.
        explained: Part of the variance that is explained.
        l0: Mean number of active latents.
        dead: Part of latents that are never active.
        gamma: Size of what is made over what it should be.
        names: Of the dictionaries (static).
    """

    f1: Float[Array, "dictionary"]
    precision: Float[Array, "dictionary"]
    recall: Float[Array, "dictionary"]
    mcc: Float[Array, "dictionary"]
    unique: Float[Array, "dictionary"]
    explained: Float[Array, "dictionary"]
    l0: Float[Array, "dictionary"]
    dead: Float[Array, "dictionary"]
    gamma: Float[Array, "dictionary"]
    names: tuple[str, ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """Names of the dictionaries."""
        return {"dictionary": self.names}


def synth_bench(
    world: World,
    dictionaries: Mapping[str, Dictionary],
    *,
    key: Key[Array, ""] | Array,
    steps: int,
    learning_rate: float,
    batch: int = BATCH,
    samples: int = SAMPLES,
    **training: Any,
) -> SynthBench:
    """Train dictionaries on one stream of a world's samples, and judge them.

    Args:
        world: Whose features are to be found.
        dictionaries: Name -> where its training begins.
        key: Draws the stream and the samples to judge by.
        steps: Of training.
        learning_rate: Its peak.
        batch: Samples of a step.
        samples: How many to judge by.
        **training: What `mechjax.dictlearn.train_many` takes besides.

    Raises:
        ArgumentError: No dictionary, or fewer samples than one batch.
        ShapeError: A dictionary of another width than the world's.
    """
    if not dictionaries:
        raise ArgumentError('`dictionaries` is empty: give at least one, such as {"top_k": TopK.init(...)}.')
    drawn, held_out = jax.random.split(key)
    runs = train_many(
        list(dictionaries.values()), stream(world, drawn, batch=batch, steps=steps), steps=steps,
        learning_rate=learning_rate, **training,
    )  # fmt: skip
    found = {name: cast("Dictionary", run.dictionary) for name, run in zip(dictionaries, runs, strict=True)}
    return judged(world, found, key=held_out, samples=samples)


def stream(
    world: World, key: Key[Array, ""] | Array, *, batch: int = BATCH, steps: int
) -> Iterator[Float[Array, "batch d_model"]]:
    """What dictionaries read, step after step; each step's samples hang on the key and the step alone.

    Args:
        world: Whose samples.
        key: Draws them.
        batch: Samples of a step.
        steps: How many steps.
    """
    for step in range(steps):
        yield world.sample(jax.random.fold_in(key, step), batch)[0]


def judged(
    world: World,
    dictionaries: Mapping[str, Dictionary],
    *,
    key: Key[Array, ""] | Array,
    samples: int = SAMPLES,
    batch: int = 4096,
) -> SynthBench:
    """Judge dictionaries by fresh samples, all by the same ones.

    Args:
        world: Whose features were to be found.
        dictionaries: Name -> the dictionary as it is used, trained here or elsewhere.
        key: Draws the samples.
        samples: How many; whole batches are drawn and held, one byte for each sample and feature of the world.
        batch: How many at a time.

    Raises:
        ArgumentError: Fewer samples than one batch.
        ShapeError: A dictionary of another width than the world's.
    """
    batch = min(batch, samples)
    if batch < 2:
        raise ArgumentError(
            f"samples={samples}, batch={batch}: variance needs two, and many more to mean much."
        )
    drawn = [_there(*world.sample(jax.random.fold_in(key, n), batch)) for n in range(samples // batch)]
    columns: dict[str, list[Array]] = {}
    for dictionary in dictionaries.values():
        made = reconstruction(dictionary, (x for x, _ in drawn))
        fires = detection(dictionary, drawn, world.features)
        row = {
            "f1": fires.f1.mean(),
            "precision": fires.precision.mean(),
            "recall": fires.recall.mean(),
            "mcc": recovery(dictionary, world.features).mcc,
            "unique": fires.unique,
            "explained": 1 - made.fvu,
            "l0": made.l0,
            "dead": made.dead,
            "gamma": made.gamma,
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return SynthBench(
        **{name: jnp.stack(values) for name, values in columns.items()}, names=tuple(dictionaries)
    )


def _there(x: Array, activations: Array) -> tuple[Array, Array]:
    """Samples, and which features are there: a quarter of the activations' bytes."""
    return x, activations > 0
