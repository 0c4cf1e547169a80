"""Activation patching (also causal tracing, interchange intervention). Which activations carry a behaviour?

Run the model on a corrupt prompt, but with one activation as it is on the clean prompt, and read a metric m:

    score[i] = m(f_corrupt with a_i <- a_i(clean))          for every place i of `over`      (mode "denoise")

Reference: Vig et al. (2020), "Causal mediation analysis for interpreting neural NLP", arXiv:2004.12265; Meng et al.
(2022), "Locating and editing factual associations in GPT", arXiv:2202.05262; best practice: Zhang and Nanda (2023),
arXiv:2309.16042.
Differs from the papers: nothing; every cell is exact, in one compiled program.
Cost: for a cell of layer l, layers l to L - 1, of the last of them keys and values and what the metric reads; the
unembedding only at the position and tokens that the metric reads. In long sweeps of positions of a causal model only
the positions from the cell's on, but for the width of a bucket. Of a subject (`mechjax.interop`) or any other function
nothing is known of what stands before a layer: every cell is a run of all of it. Memory: `chunk_size` cells at a time,
by default as many as fit in 256 MB of activations.
Exact: always.    Misleads when: patched activations lie off the distribution (arXiv:2309.16042), backups compensate
(Hydra effect, arXiv:2307.15771), or the metric saturates.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Array, Int

from mechjax.base.meshes import on_any_mesh
from mechjax.metrics.of_output import Reads
from mechjax.models.decoder import Decoder
from mechjax.models.room import backs_off
from mechjax.patching.planned import planned
from mechjax.patching.scores import PatchScores
from mechjax.patching.sweep import Sweep
from mechjax.patching.together import all_scores
from mechjax.patching.units import begun_in, swept_in


@on_any_mesh
@backs_off
def activation_patch(
    model: Decoder | Callable[..., Any],
    clean: Any,
    corrupt: Any,
    metric: Reads,
    *,
    site: str,
    over: Sequence[str] = ("layer", "pos"),
    positions: Mapping[str, Int[Array, " batch"]] | None = None,
    mode: Literal["denoise", "noise"] = "denoise",
    chunk_size: int | None = None,
    folder: str | Path | None = None,
) -> PatchScores:
    """Patch every place of a site, one at a time, and read the metric.

    Args:
        model: The decoder, a subject, or any function with sites (`jax.vmap(subject)`, where it is of one example).
        clean: What shows the behaviour: of a decoder `Prompts` or ids (batch, pos). Of others whatever they take: an
            array, a tuple of arguments or a dictionary of named ones, examples first. Of `Prompts`, and of an argument
            `attention_mask`, the metric learns which tokens are real.
        corrupt: What does not, with the same tokens at the same places.
        metric: A metric of `mechjax.metrics`: one number per example. Where not a decoder runs, it reads the output, or
            what the output calls `logits`; (batch, class) has one position. A function of the output does as well.
        site: The site to patch, such as "resid_pre", "z" or "mlp_post".
        over: The axes to sweep: "layer" and any of the site's axes ("pos", "head", "d_mlp", ...). Axes left out are
            patched whole; without "layer", all layers at once. A subject's sites get names of axes by its `sites=`.
        positions: Named positions, one per example, to sweep in place of every column ("pos" must be in `over`).
        mode: "denoise" puts clean activations into the corrupt run, "noise" corrupt ones into the clean run.
        chunk_size: Cells that run at once; None plans it from their memory, or takes that of the folder.
        folder: Where to keep what is done, so that the same call goes on after a crash, and several processes that
            make it share the work: a folder or URL (`gs://bucket/prefix`; see `mechjax.workers`). Chunks then run one
            by one, each a file; None runs all in one program.

    Returns:
        The scores, `[*over]`, with the metric of both runs.

    Raises:
        SiteError: a site or axis that this model does not have.
        PairingError: clean and corrupt that do not line up.
        ShapeError: answers for another number of examples.
        ArgumentError: an unknown mode, a chunk size below 1, a metric that gives anything but one number per example,
            a run whose activations are not finite, or a folder of another sweep: what differs is named.
        CheckpointError: a file in the folder that is not whole, or was changed.
        SweepError: chunks that failed three times; the others are done.
        WriteError: a folder that cannot be written, or has no room; what is done stays.
    """
    store, begun = (None, None) if folder is None else begun_in(folder)
    plan = planned(
        model,
        clean,
        corrupt,
        metric,
        site=site,
        over=over,
        positions=positions,
        mode=mode,
        chunk_size=begun if chunk_size is None else chunk_size,
    )
    if store is not None:
        return swept_in(store, plan)
    sweep = plan.sweep
    scores, *runs = all_scores(sweep) if isinstance(sweep, Sweep) else sweep.all_scores()
    sweep.check(*runs, scores)
    return plan.scores(scores, *runs)
