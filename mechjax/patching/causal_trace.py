"""Causal tracing. Where does a model hold what it recalls about a subject?

The subject's embeddings are drowned in noise, and one state at a time is given back as it was:

    total effect     TE    = m(f) - m(f*)                f*: noise nu * sigma on `subject`, mean over `n_samples` draws
    indirect effect  IE[i] = m(f* with h_i <- h_i of the clean run) - m(f*)       h_i: `site` at a layer and position

`scores` is the average indirect effect over the prompts. Noise is drawn once: every state is restored in the same runs.

Reference: Meng et al. (2022), "Locating and editing factual associations in GPT", arXiv:2202.05262, section 2.1 and
appendix B. `sigma` is, as there, the standard deviation of the numbers of the subjects' token embeddings.
Differs from the paper: any metric; sites of attention and MLPs restore, as there, `window` layers around a layer (from
`layer - window // 2`, cut off at the ends), and their later effects stay live ("severed" runs are edits of their own).
Cost: for each state the layers from the first restored one on, for each draw. Memory: `chunk_size` states at a time.
Exact: of the draws.    Misleads when: noise takes the model off what it was trained on, where other prompts would not
(Zhang and Nanda 2023, arXiv:2309.16042); wide windows restore more than their layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mechjax.base.errors import ArgumentError, SiteError, did_you_mean
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.metrics.measured import FromLayer, FromStart, measured
from mechjax.metrics.metric import Metric
from mechjax.models.decoder import Decoder, as_tokens
from mechjax.models.needs import needs_decoder
from mechjax.models.room import backs_off, runs_that_fit
from mechjax.patching.chosen import chosen
from mechjax.patching.finite import check_numbers
from mechjax.patching.windows import windows
from mechjax.tasks.pairing import batched
from mechjax.transform.edits import replace
from mechjax.transform.swept import named_positions
from mechjax.transform.transforms import capture, intervene

WINDOWS = {"resid_pre": 1, "resid_mid": 1, "resid_post": 1, "attn_out": 10, "mlp_out": 10}
"""Sites that can be restored, and how many layers of them by default, as in the paper."""
CHUNK_BYTES = 256e6


class TraceScores(Record):
    """What restoring a state gives back of a metric that noise on the subject took away.

    Attributes:
        scores: Average indirect effect: mean of `per_example`.
        per_example: Indirect effects, mean over the draws of noise.
        clean: Metric of the clean run, per example.
        corrupt: Metric of the runs with noise, mean over draws, per example.
        sigma: Standard deviation of the subjects' embeddings.
        site: What is restored (static).
        window: How many layers of it (static).
        labels: Axis -> the name of each index, where it has names (static).
    """

    scores: Float[Array, "layer pos"]
    per_example: Float[Array, "layer pos batch"]
    clean: Float[Array, " batch"]
    corrupt: Float[Array, " batch"]
    sigma: Float[Array, ""]
    site: str = eqx.field(static=True)
    window: int = eqx.field(static=True)
    labels: tuple[tuple[str, tuple[str, ...]], ...] = eqx.field(static=True, default=())

    def axis_labels(self) -> Mapping[str, Sequence[str]]:
        """The names of the indices of some axes."""
        return dict(self.labels)

    @property
    def total(self) -> Float[Array, " batch"]:
        """Total effects: what the noise took."""
        return self.clean - self.corrupt


@needs_decoder("stream")
@on_any_mesh
@backs_off
def causal_trace(
    model: Decoder,
    prompts: Any,
    metric: Metric,
    *,
    subject: Any,
    site: str = "resid_post",
    window: int | None = None,
    positions: Mapping[str, Int[Array, " batch"]] | None = None,
    noise: float = 3.0,
    n_samples: int = 10,
    chunk_size: int | None = None,
    key: PRNGKeyArray,
) -> TraceScores:
    """Restore every state, one at a time, in runs whose subject is noise.

    Args:
        model: The decoder.
        prompts: Prompts whose answers the model knows, `Prompts` or ids (batch, pos).
        metric: A metric of `mechjax.metrics`; the paper's is `prob(answer)`.
        subject: The subject's tokens: a mask (batch, pos), or positions (batch,) or (batch, k).
        site: What is restored: "resid_post" (the paper's hidden state), another stream, "attn_out" or "mlp_out".
        window: How many layers around each; by default 1 of a stream and 10 of the others (or all, where fewer).
        positions: Named positions, one per example, to restore in place of every column.
        noise: The standard deviation of the noise, in those of the subjects' embeddings (the paper's nu / sigma).
        n_samples: Draws of noise.
        chunk_size: Positions that run at once; None plans it from their memory.
        key: Of the noise.

    Returns:
        The effects `[layer, pos]`.

    Raises:
        SiteError: A site that cannot be restored.
        ArgumentError: A subject without tokens, a window outside the model, a number outside its range, or a run whose
            activations are not finite.
        ShapeError: A mask or positions for other prompts.
    """
    if site not in WINDOWS:
        raise SiteError(f"cannot restore `{site}`: one of {', '.join(WINDOWS)}.{did_you_mean(site, WINDOWS)}")
    for what, value, least in (("n_samples", n_samples, 1), ("chunk_size", chunk_size, 1)):
        if value is not None and value < least:
            raise ArgumentError(f"{what}={value}: at least {least}.")
    if noise <= 0:
        raise ArgumentError(
            f"noise={noise}: a positive number of standard deviations; without noise nothing is lost."
        )
    ids, mask = as_tokens(batched(prompts), None, model.config)
    window = min(WINDOWS[site], model.config.n_layers) if window is None else window
    held = windows(window, model.config.n_layers)
    if positions is not None and not positions:
        raise ArgumentError("positions= is empty: name at least one position.")
    with jax.ensure_compile_time_eval():  # which tokens are meant is known, inside jit too
        for name, at in (positions or {}).items():
            chosen(f"positions[{name!r}]", at, ids, None)
        drowned = chosen("subject", subject, ids, mask)
    named = named_positions(positions, len(ids))
    if named is None:
        named = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[:, None], ids.shape[::-1])
    run = FromStart(model, measured(metric, ids, mask, model.config.d_vocab))
    clean, sigma, acts, start = _clean_run(run, ids, mask, drowned, site)
    draws = jax.random.normal(key, (n_samples, *start.shape), start.dtype)
    starts = start + jnp.where(drowned[..., None], noise * sigma * draws, 0)
    chunk = min(chunk_size or runs_that_fit(CHUNK_BYTES, model, starts.shape[:-1]), len(named))
    corrupt, found = _restored(run, starts, mask, acts, held, named, site=site, chunk=chunk)
    check_numbers(model, (ids,), mask, clean, found)
    effect = found - corrupt
    labels = () if positions is None else (("pos", tuple(positions)),)
    return TraceScores(effect.mean(-1), effect, clean, corrupt, sigma, site, window, labels)


class _FromTokens(eqx.Module):
    """The metric of the run, and what enters the first block."""

    run: FromStart

    def __call__(self, ids: Array, mask: Array | None) -> tuple[Array, Array]:
        start = self.run.model.embed(ids, mask=mask)
        return self.run(start, mask), start


@eqx.filter_jit
def _clean_run(
    run: FromStart, ids: Array, mask: Array | None, subject: Bool[Array, "batch pos"], site: str
) -> tuple[Array, Array, Array, Array]:
    """The metric, the deviation of the subjects' embeddings, what is restored, and what enters the first block."""
    (value, start), acts = capture(_FromTokens(run), ["embed", site])(ids, mask)
    embed, held = acts["embed"], subject[..., None]
    sigma = embed.std(where=jnp.broadcast_to(held, embed.shape))
    return value, sigma, acts[site], start


@eqx.filter_jit
def _restored(
    run: FromStart,
    starts: Float[Array, "sample batch pos d_model"],
    mask: Array | None,
    clean: Float[Array, "layer batch pos d_model"],
    held: Bool[Array, "center layer"],
    named: Int[Array, "place batch"],
    *,
    site: str,
    chunk: int,
) -> tuple[Float[Array, " batch"], Float[Array, "center place batch"]]:
    """The metric with noise, and with each state restored, means over draws."""
    corrupt, acts = jax.vmap(lambda start: capture(run, "resid_pre")(start, mask))(starts)
    resid = acts["resid_pre"]  # (sample, layer, ...): the record's own axes stand behind the mapped one
    rest = FromLayer(run.model, run.measured)

    def centre(held: Array) -> Array:
        first = jnp.argmax(held).astype(jnp.int32)

        def state(at: Array) -> Array:
            edit = replace(site, clean, per_layer=True, layer=held, pos=at[:, None])
            return jax.vmap(lambda start: intervene(rest, [edit])(start, first, mask))(resid[:, first]).mean(
                0
            )

        return jax.lax.map(state, named, batch_size=chunk)

    return corrupt.mean(0), jax.lax.map(centre, held)
