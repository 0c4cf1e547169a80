"""A sweep from what a user says, checked before anything runs; and its record from what was found."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.metrics.measured import measured
from mechjax.metrics.of_output import Reads
from mechjax.models.decoder import Decoder
from mechjax.models.room import runs_that_fit
from mechjax.patching.scores import PatchScores
from mechjax.patching.sweep import Sweep, starts_of
from mechjax.patching.whole_runs import WholeSweep, whole_sweep
from mechjax.tasks.pairing import paired, paired_inputs
from mechjax.transform.swept import named_positions, swept_axes, swept_site

CHUNK_BYTES = (
    256e6  # activations of the cells that run at once; larger chunks are no faster on CPU (measured)
)


@dataclass(frozen=True)
class Planned:
    """A sweep, with how the user named its parts.

    Attributes:
        sweep: What is swept.
        mode: "denoise" (clean into corrupt) or "noise" (the reverse).
        names: Of named positions.
    """

    sweep: Sweep | WholeSweep
    mode: str
    names: tuple[str, ...]

    def scores(
        self,
        found: Float[Array, "*over batch"],
        of_donor: Float[Array, " batch"],
        of_base: Float[Array, " batch"],
    ) -> PatchScores:
        """The record, of the scores of every cell per example and the metric of both runs."""
        of_clean, of_corrupt = (of_donor, of_base) if self.mode == "denoise" else (of_base, of_donor)
        labels = (("pos", self.names),) if self.names else ()
        site, over = self.sweep.site, self.sweep.over
        return PatchScores(found.mean(-1), found, of_clean, of_corrupt, site, over, self.mode, labels)


def planned(
    model: Decoder | Callable[..., Any],
    clean: Any,
    corrupt: Any,
    metric: Reads,
    *,
    site: str,
    over: Sequence[str],
    positions: Mapping[str, Int[Array, " batch"]] | None,
    mode: Literal["denoise", "noise"],
    chunk_size: int | None,
) -> Planned:
    """The sweep that `activation_patch` runs; arguments and errors are its own."""
    if mode not in ("denoise", "noise"):
        raise ArgumentError(
            f"mode={mode!r}: expected 'denoise' (clean into corrupt) or 'noise' (corrupt into clean)."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"chunk_size={chunk_size}: at least one cell must run at once.")
    if not isinstance(model, Decoder):
        donor, base = paired_inputs(clean, corrupt)[:: 1 if mode == "denoise" else -1]
        sweep = whole_sweep(
            model, donor, base, metric, site=site, over=over, positions=positions, chunk_size=chunk_size,
            room=CHUNK_BYTES,
        )  # fmt: skip
        return Planned(sweep, mode, tuple(positions or ()))
    (ids, mask), (other, _) = paired(clean, corrupt, model.config)
    info = swept_site(model, site, ids)
    name, axes = info.name, swept_axes(info, over, positions)
    of = measured(metric, ids, mask, model.config.d_vocab)
    sizes = tuple(len(positions) if a == "pos" and positions else info.size(a) for a in axes)
    named = named_positions(positions, len(ids))
    starts = starts_of(model.config, name, tuple(over), sizes, ids.shape, positions)
    chunk = min(chunk_size or runs_that_fit(CHUNK_BYTES, model, ids.shape), max(1, math.prod(sizes)))
    donor, base = (ids, other) if mode == "denoise" else (other, ids)
    sweep = Sweep(
        model, of.metric, donor, base, mask, of.at, of.tokens, named, name, tuple(over), sizes, starts, chunk
    )
    return Planned(sweep, mode, tuple(positions or ()))
