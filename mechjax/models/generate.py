"""Generation: the model goes on with prompts, with edits and captures, in one compiled program.

The prompts run once and fill a cache, of keys and values or of states; then a scan runs one token at a time. What comes
out is what running the whole text again for every token would give, edits and captures included.

    token[0] = choose(logits at each prompt's last real token),  token[t + 1] = choose(logits where token[t] stands)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.prompts import Prompts
from mechjax.models.decoder import Decoder, Tokens
from mechjax.models.decoder_runs import decoder_runs
from mechjax.models.families.modules import own_name
from mechjax.models.generated import Generated
from mechjax.models.mamba import Mamba
from mechjax.models.mamba_runs import mamba_runs
from mechjax.models.needs import needs_decoder
from mechjax.models.runs import Runs
from mechjax.models.sampling import choose, log_probability
from mechjax.models.steps import (
    PLACES,
    AtSteps,
    Timed,
    flat,
    of_prompts_alone,
    place_of,
    taken_apart,
    within_prompts,
)
from mechjax.models.t5 import T5
from mechjax.models.t5_runs import t5_runs
from mechjax.transform.captured import Activations
from mechjax.transform.edits import Edit
from mechjax.transform.request import Read
from mechjax.transform.select import as_array, is_concrete
from mechjax.transform.static import hold, with_static
from mechjax.transform.transforms import Transformed, reads_of, settle


class _Sampling(eqx.Module):
    """How tokens are chosen: numbers, all of them data."""

    key: PRNGKeyArray | None
    temperature: Float[Array, ""]
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None

    def __call__(self, logits: Array, step: Array | int) -> Array:
        key = None if self.key is None else jax.random.fold_in(self.key, step)
        return choose(logits, key, self.temperature, self.top_k, self.top_p)


RUNS: Mapping[type, Callable[..., tuple[Runs, Array, Array]]] = {
    Decoder: decoder_runs,
    T5: t5_runs,
    Mamba: mamba_runs,
}
"""What is run of each class of model, and the tokens and mask that it goes on with: `(model, prompts, mask,
decoder_prompts) -> (runs, tokens, mask)`."""


@needs_decoder("cache", also=tuple(RUNS))
@on_any_mesh
def generate(
    model: Decoder | T5 | Mamba,
    prompts: Tokens,
    n_tokens: int,
    *,
    mask: Bool[Array, "*batch pos"] | None = None,
    decoder_prompts: Tokens | None = None,
    key: PRNGKeyArray | None = None,
    temperature: float | Float[Array, ""] = 0.0,
    top_k: int | Int[Array, ""] | None = None,
    top_p: float | Float[Array, ""] | None = None,
    stop: int | Sequence[int] | Int[Array, " stop"] | None = None,
    edits: Edit | AtSteps | Sequence[Edit | AtSteps] = (),
    capture: str | Sequence[str] = (),
    layers: int | Sequence[int] | None = None,
) -> Generated:
    """Go on with prompts, `n_tokens` tokens each, in one compiled program.

    New numbers (tokens, edits, keys, temperatures, stops) never compile again; another shape of the prompts or another
    `n_tokens` does. Padding of the prompts may stand anywhere.

    Of an encoder-decoder the encoder reads `prompts`, once, and the decoder goes on with `decoder_prompts`: these are
    what is said below of prompts. Sites of the encoder, and keys and values of cross-attention, have no part of a
    generated token: their positions are those of the encoder's text.

    Args:
        model: The decoder, an encoder-decoder, or a Mamba.
        prompts: Prompts, integer ids of shape (*batch, pos), or nested lists of them.
        n_tokens: How many tokens are generated for each prompt; a row that stops is filled up.
        mask: True for real tokens, where `prompts` does not say it itself.
        decoder_prompts: What the decoder of an encoder-decoder begins with; by default its start token.
        key: Random key for drawing tokens; none is needed at temperature 0.
        temperature: What logits are divided by before a token is drawn; 0 takes the most likely token.
        top_k: Draw from the `top_k` most likely tokens only.
        top_p: Draw from the fewest tokens that together have this probability (of what `top_k` leaves).
        stop: Token ids after which a row ends. The first of them fills the row up.
        edits: What to change. `pos=` addresses the prompts' slots as they are given, then the generated tokens: slot
            `n_prompt + t` is token t; negative ones count from the prompts' end. Without `pos=` an edit acts
            everywhere; with a value for each slot of the prompts, on these; `at_steps(edit, steps)` acts at generated
            tokens alone.
        capture: Sites to return, of the prompts and of the generated tokens that run (all but the last).
        layers: The layers to keep of what is captured.

    Returns:
        The tokens, their log-probabilities and the captured activations.

    Raises:
        ArgumentError: Arguments outside their range, or a temperature without a key.
        SiteError: A site, layer, position or step that is not there.
        ShapeError: A value that does not fit, or more tokens than the model has learned positions.
    """
    if isinstance(n_tokens, bool) or not isinstance(n_tokens, int) or n_tokens < 1:
        raise ArgumentError(f"`n_tokens` = {n_tokens!r} must be a whole number from 1.")
    of_model = next(of for kind, of in RUNS.items() if isinstance(model, kind))
    runs, tokens, mask = of_model(model, prompts, mask, decoder_prompts)
    _check_room(runs, mask, n_tokens)
    sampling = _sampling(key, temperature, top_k, top_p)
    ids = None if stop is None else _stops(stop, model.config.d_vocab)
    reads = reads_of(capture, layers) if capture else ()
    reads = tuple(with_static(read, site=own_name(read.site, model.config)) for read in reads)
    placed = [(with_static(e, site=own_name(e.site, model.config)), steps) for e, steps in flat(edits)]
    timed = _timed(runs, tokens, placed, reads, n_tokens)
    return _generated(runs, tokens, mask, n_tokens, sampling, ids, timed, reads)


def _sampling(key: Any, temperature: Any, top_k: Any, top_p: Any) -> _Sampling:
    """The numbers of sampling, checked where they can be seen."""
    heat = as_array(temperature, "generate, temperature").astype(jnp.float32)
    if is_concrete(heat):
        if heat.ndim or not 0 <= float(heat) < float("inf"):
            raise ArgumentError(f"`temperature` = {temperature!r} must be one finite number from 0.")
        if float(heat) == 0 and not (top_k is None and top_p is None):
            raise ArgumentError(
                "`top_k` and `top_p` choose which tokens may be drawn, but `temperature` = 0 draws none: it takes the "
                "most likely token. Give a temperature, such as 1.0, and a key."
            )
    if key is None and not (is_concrete(heat) and float(heat) == 0):
        raise ArgumentError(
            f"`temperature` = {temperature!r} draws tokens at random, and there is no `key`. Give one, "
            "`key=jax.random.key(0)`: the same key draws the same tokens. Temperature 0 needs none."
        )
    for name, value, most in (("top_k", top_k, float("inf")), ("top_p", top_p, 1)):
        if value is not None and is_concrete(value) and not 0 < float(value) <= most:
            right = "a number above 0, at most 1" if name == "top_p" else "a whole number from 1"
            raise ArgumentError(f"`{name}` = {value!r} must be {right}.")
    few = None if top_k is None else as_array(top_k, "generate, top_k").astype(jnp.int32)
    mass = None if top_p is None else as_array(top_p, "generate, top_p").astype(jnp.float32)
    return _Sampling(key, heat, few, mass)


def _stops(stop: Any, d_vocab: int) -> Array:
    ids = jnp.atleast_1d(as_array(stop, "generate, stop"))
    if ids.ndim > 1 or ids.size == 0 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ArgumentError(f"`stop` = {stop!r} must be one token id or a list of them.")
    if is_concrete(ids) and bool(jnp.any((ids < 0) | (ids >= d_vocab))):
        raise ArgumentError(
            f"`stop` = {ids.tolist()} has an id that is no token: the model has {d_vocab}, 0 to {d_vocab - 1}."
        )
    return ids.astype(jnp.int32)


def _check_room(runs: Runs, mask: Array, n_tokens: int) -> None:
    """Refuse prompts without tokens, and more of them than the model has room for, where that can be seen."""
    if not is_concrete(mask) or not mask.size:
        return
    counts = mask.sum(-1)
    if int(counts.min()) == 0:
        row = int(counts.reshape(-1).argmin())
        raise ShapeError(f"Prompt {row} has no token to go on from: give each at least one.")
    runs.check_room(counts, n_tokens)


def _timed(
    runs: Runs,
    tokens: Array,
    edits: list[tuple[Edit, Any]],
    reads: tuple[Read, ...],
    n_tokens: int,
) -> tuple[Timed, ...]:
    """The edits of the prompts and of the steps, checked before anything is compiled."""
    if not edits and not reads:
        return ()
    lead, shape = tokens.shape[:-1], jax.ShapeDtypeStruct
    cache = jax.eval_shape(lambda: runs.empty(lead, tokens.shape[-1] + n_tokens - 1))
    prompt_args = (shape(tokens.shape, jnp.int32), shape(tokens.shape, bool), cache, *runs.beside)
    step_args = (shape(lead, jnp.int32), cache)
    # Sites are found by reading whole what is edited, which asks nothing of the edits' places and values yet.
    whole = tuple(Read(name) for name in dict.fromkeys([e.site for e, _ in edits] + [r.site for r in reads]))
    later = tuple(read for read in whole if not runs.once(read.site))
    of_prompt = Transformed(hold(runs.prefill), (), whole).sites(*prompt_args)
    of_step = Transformed(hold(runs.step), (), later).sites(*step_args)
    for read in reads:
        place_of(of_prompt[read.site])
    placed = tuple(
        edit if runs.once(edit.site) else within_prompts(edit, of_prompt[edit.site])
        for edit, steps in edits
        if steps is None
    )
    Transformed(hold(runs.prefill), placed, reads).sites(*prompt_args)
    parts = tuple(
        of_prompts_alone(edit, steps, of_prompt[edit.site])
        if runs.once(edit.site)
        else taken_apart(edit, steps, of_prompt[edit.site], of_step[edit.site], n_tokens - 1)
        for edit, steps in edits
    )
    on_step = tuple(part.step for part in parts if part.step is not None)
    Transformed(hold(runs.step), on_step, _later(reads, runs)).sites(*step_args)
    return parts


def _later(reads: tuple[Read, ...], runs: Runs) -> tuple[Read, ...]:
    """What is read of generated tokens."""
    return tuple(read for read in reads if not runs.once(read.site))


@eqx.filter_jit
def _generated(
    runs: Runs,
    tokens: Array,
    mask: Array,
    n_tokens: int,
    sampling: _Sampling,
    stop: Array | None,
    timed: tuple[Timed, ...],
    reads: tuple[Read, ...],
) -> Generated:
    n_prompt, n_steps = tokens.shape[-1], n_tokens - 1
    cache = runs.empty(tokens.shape[:-1], n_prompt + n_steps)
    on_prompt = tuple(part.prompt for part in timed if part.prompt is not None)
    (logits, *kept), before, prompt_hits = Transformed(hold(runs.prefill), on_prompt, reads).observe(
        tokens, mask, cache, *runs.beside
    )
    cache = runs.filled(cache, n_prompt, mask, kept)
    first = sampling(logits, 0)
    done = jnp.zeros(first.shape, bool) if stop is None else _is_among(first, stop)

    def run(cache: Any, token: Array, gates: Any) -> tuple[Any, ...]:
        edits = tuple(
            _gated(part.step, part.axis, gate)
            for part, gate in zip(timed, gates, strict=True)
            if part.step is not None
        )
        out, acts, hits = Transformed(hold(runs.step), edits, _later(reads, runs)).observe(token, cache)
        return out, acts.arrays, acts.ran, [hit.all() for hit in hits]

    def step(carry: Any, xs: Any) -> Any:
        (cache, token, done), (t, gates) = carry, xs
        if stop is None:
            (logits, *kept), arrays, ran, hits = run(cache, token, gates)
        else:  # once every row is done, nothing runs
            shapes = jax.eval_shape(run, cache, token, gates)
            (logits, *kept), arrays, ran, hits = lax.cond(
                done.all(), lambda cache, *_: _blank(shapes, runs.unfilled(cache)), run, cache, token, gates
            )
        cache = runs.filled(cache, 1, None, kept)
        chosen = sampling(logits, t + 1)
        log_prob = jnp.where(done, 0.0, log_probability(logits, chosen))
        if stop is not None:
            chosen = jnp.where(done, stop[0], chosen)
        after = done if stop is None else done | _is_among(chosen, stop)
        return (cache, chosen, after), (chosen, log_prob, ~done, arrays, ran, hits)

    gates = [part.gate for part in timed]
    _, (later, later_log_probs, alive, arrays, ran, hits) = lax.scan(
        step, (cache, first, done), (jnp.arange(n_steps), gates)
    )
    every = jnp.moveaxis(jnp.concatenate([first[None], later]), 0, -1)
    log_probs = jnp.concatenate([log_probability(logits, first)[None], later_log_probs])
    lengths = 1 + alive.sum(0, dtype=jnp.int32)
    sites = tuple(site for site in before.sites if site.name in arrays)
    arrays = {site.name: _along_positions(arrays[site.name], site.axes) for site in sites}
    outs = (every, jnp.moveaxis(log_probs, 0, -1), lengths, before.arrays, arrays)
    tokens_made, log_probs, lengths, of_prompts, of_steps = settle(
        *_judged(timed, prompt_hits, hits, alive), outs
    )
    prompt_acts = acts = None
    if reads:
        prompt_acts = Activations(of_prompts, before.ran, before.sites)
        acts = Activations(of_steps, {name: each.any(0) for name, each in ran.items()}, sites)
    return Generated(tokens_made, log_probs, lengths, Prompts(tokens, mask), stop, prompt_acts, acts)


def _gated(step: Edit, axis: str, gate: Array | None) -> Edit:
    """The edit of one step."""
    return step if gate is None else eqx.tree_at(lambda e: e.index, step, step.index | {axis: gate})


def _blank(shapes: Any, kept: tuple[Any, ...]) -> Any:
    """What a step that does not run gives: nothing but the cache as it was."""
    blank = jax.tree.map(
        lambda x: jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0, x.dtype), shapes
    )
    return (blank[0][0], *kept), *blank[1:]


def _is_among(tokens: Array, stop: Array) -> Array:
    return (tokens[..., None] == stop).any(-1)


def _along_positions(steps: Array, axes: tuple[str, ...]) -> Array:
    """Captured rows of the steps, stacked along the axis where each step has one."""
    place = next(axis for axis in PLACES if axis in axes)
    dim = steps.ndim - len(axes) + axes.index(place)
    return jnp.moveaxis(steps.squeeze(dim), 0, dim - 1)


def _judged(
    timed: tuple[Timed, ...], prompt_hits: tuple[Array, ...], step_hits: list[Array], alive: Array
) -> tuple[list[Edit], list[Array]]:
    """The edits, and whether each took hold: somewhere, while a row that had not stopped ran."""
    of_prompt, of_step = iter(prompt_hits), iter(step_hits)
    edits, took = [], []
    for part in timed:
        held = jnp.bool_(False)
        if part.prompt is not None:
            held = held | (next(of_prompt).all() & part.at_prompt)
        if part.step is not None:
            gate = jnp.bool_(True) if part.gate is None else part.gate[..., 0]
            gate = gate.reshape(*gate.shape, *(1,) * (alive.ndim - gate.ndim)) if gate.ndim == 1 else gate
            reached = (alive & gate).any(tuple(range(1, alive.ndim)))
            held = held | (next(of_step) & reached).any()
        edits.append(part.step if part.prompt is None else part.prompt)
        took.append(held & part.there)
    return edits, took
