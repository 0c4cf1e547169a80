"""The tour: which heads of a small trained transformer find out who receives the gift, and how we know.

The model `tasks-4l` reads "When Mary and John went to the store, John gave a ring to" and answers "Mary" (indirect
object identification; Wang et al. 2022, arXiv:2211.00593). The corrupt prompt has "Mary gave a ring to", whose answer
is "John". Three experiments, each on `n` held-out prompts:

1. Put one piece of the clean run's residual stream into the corrupt run: where is the answer?  (`activation_patch`)
2. Put one head's output in: which heads carry it, and where do they write?
3. Take the three leading heads away: is the answer gone, and is it for three random heads? Each then says what it says
   on average over all prompts and positions (mean ablation).
"""

import time
import webbrowser
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.base.progress import bar
from mechjax.base.prompts import Prompts
from mechjax.hub import Tokenizer
from mechjax.metrics import Metric, logit_diff
from mechjax.models.decoder import Decoder
from mechjax.models.load import load
from mechjax.patching import PatchScores, activation_patch
from mechjax.studies.tour_page import Story, Tour
from mechjax.tasks import Pairs, ioi
from mechjax.transform import capture, intervene, mean_ablate, means
from mechjax.viz import check_writable

MODEL = "tasks-4l"
LEADING = 3
"""How many heads the tour names and takes away."""
TRIPLES = 20
"""How many random triples of other heads are taken away for comparison."""
ROLES = ("IO", "S1", "S2", "END")
"""The named positions of the task."""

Stage = Callable[[str], AbstractContextManager[None]]


def tour(path: str | Path | None = None, *, n: int = 64, seed: int = 0, open_browser: bool = False) -> Tour:
    """Run the tour on `tasks-4l`, the model that ships with mechjax.

    Args:
        path: Where to write the page, one HTML file; None writes none.
        n: How many held-out prompts.
        seed: Which prompts, and which random heads.
        open_browser: Whether to show the page in a browser; needs `path`.

    Returns:
        The record, which shows itself as the page in a notebook.

    Raises:
        ArgumentError: Fewer than two prompts, or a browser without a page.
        WriteError: The page cannot be written.
    """
    if n < 2:
        raise ArgumentError(f"n={n} prompts asked for: a mean over prompts needs two or more. Pass n >= 2.")
    if open_browser and path is None:
        raise ArgumentError(
            "open_browser=True needs a page to show: pass a path such as 'mechjax-tour.html'."
        )
    if path is not None:
        check_writable(path)  # found out before the work, not after it
    model, tokenizer = load(MODEL)
    tokenizer = cast(Tokenizer, tokenizer)
    pairs = ioi(tokenizer, n, seed=seed)
    found = explore(model, tokenizer, pairs, name=MODEL, seed=seed)
    if path is not None:
        written = found.page.write(
            path, name=MODEL, model=model, tokenizer=tokenizer, prompts=pairs, n=n, seed=seed
        )
        if open_browser:
            webbrowser.open(written.as_uri())
    return found


def explore(model: Decoder, tokenizer: Tokenizer, pairs: Pairs, *, name: str, seed: int = 0) -> Tour:
    """The tour's three experiments, on any decoder.

    Args:
        model: The decoder; it needs twice as many heads as the tour takes away.
        tokenizer: Its tokenizer, in which a name is one token.
        pairs: Indirect object prompts, such as `mechjax.tasks.ioi` gives.
        name: The model's name.
        seed: Which random heads are taken away for comparison.

    Raises:
        ArgumentError: Pairs of another task, or too few heads to compare three with three others.
    """
    c = model.config
    if tuple(pairs.positions) != ROLES:
        raise ArgumentError(
            f"the pairs name the positions {', '.join(pairs.positions)}; the tour is about indirect objects and reads "
            f"{', '.join(ROLES)}. Make them with mechjax.tasks.ioi(tokenizer, n)."
        )
    if c.n_layers * c.n_heads < 2 * LEADING:
        raise ArgumentError(
            f"the model has {c.n_layers * c.n_heads} heads; comparing {LEADING} heads with {LEADING} others needs "
            f"{2 * LEADING} or more."
        )
    metric = logit_diff(pairs.correct, pairs.wrong)
    at = jnp.stack([pairs.positions[role] for role in ROLES])  # (role, batch)
    rng = np.random.default_rng(seed)
    seconds: list[tuple[str, float]] = []
    with _stages(5, seconds) as stage:
        with stage("Patching the residual stream"):
            stream = _patched(model, pairs, metric, "resid_pre", ("layer", "pos"))
        with stage("Patching heads"):
            heads = _patched(model, pairs, metric, "z", ("layer", "head")).recovered
        with stage("Patching heads, position by position"):
            places = _patched(model, pairs, metric, "z", ("layer", "head", "pos"), pairs.positions).recovered
        leading = _largest(heads, LEADING)
        with stage("Reading attention"):
            logits, acts = capture(model, ["pattern"])(pairs.clean)
            patterns = jnp.stack([acts["pattern"][layer, :, head] for layer, head in leading])
            story = _story(tokenizer, pairs, stream, logits, patterns, at)
        with stage("Taking heads away"):
            triples = jnp.asarray([leading, *_random_triples(c.n_layers, c.n_heads, leading, rng)])
            left = _without(model, pairs.clean, metric, means(model, pairs.clean, ["z"])["z"], triples)
    example = jnp.arange(at.shape[1])
    at_roles = jnp.take_along_axis(stream.per_example, at[None], axis=1).mean(-1)
    corrupt, gap = stream.corrupt.mean(), stream.clean.mean() - stream.corrupt.mean()
    return Tour(
        heads=heads,
        residual=(at_roles - corrupt) / gap,
        places=places,
        looks=patterns[:, example, at[:, None], at[None]].mean(-1),
        intact=stream.clean.mean(),
        ablated=left[0],
        random=left[1:],
        story=story,
        leading=leading,
        roles=ROLES,
        model=name,
        n=len(pairs.clean_text),
        seed=seed,
        seconds=tuple(seconds),
    )


@contextmanager
def _stages(total: int, seconds: list[tuple[str, float]]) -> Generator[Stage, None, None]:
    """A progress bar whose stages are timed."""
    with bar("", total) as progress:

        @contextmanager
        def stage(name: str) -> Generator[None, None, None]:
            start = time.perf_counter()
            progress.begin(name)
            yield
            progress.advance()
            seconds.append((name, round(time.perf_counter() - start, 2)))

        yield stage


def _patched(
    model: Decoder,
    pairs: Pairs,
    metric: Metric,
    site: str,
    over: tuple[str, ...],
    positions: dict[str, Array] | None = None,
) -> PatchScores:
    scores = activation_patch(
        model, pairs.clean, pairs.corrupt, metric, site=site, over=over, positions=positions
    )
    return jax.block_until_ready(scores)


def _largest(scores: Float[Array, "layer head"], n: int) -> tuple[tuple[int, int], ...]:
    order = np.argsort(-np.asarray(scores), axis=None, kind="stable")[:n]
    return tuple(
        (int(layer), int(head)) for layer, head in (np.unravel_index(i, scores.shape) for i in order)
    )


def _story(
    tokenizer: Tokenizer,
    pairs: Pairs,
    stream: PatchScores,
    logits: Float[Array, "batch pos d_vocab"],
    patterns: Float[Array, "leader batch query key"],
    at: Int[Array, "role batch"],
) -> Story:
    """The shortest prompt that the model answers right."""
    lengths = np.asarray(pairs.clean.lengths)
    which = int(np.lexsort((lengths, ~np.asarray(stream.clean > 0)))[0])
    real = np.flatnonzero(np.asarray(pairs.clean.mask[which]))
    clean, corrupt = stream.clean[which], stream.corrupt[which]
    chances = jax.nn.softmax(logits[which, real[-1]])
    guesses = [(tokenizer.decode([int(i)]), float(chances[i])) for i in np.argsort(-np.asarray(chances))[:3]]
    sides = [Prompts(side.tokens[which], side.mask[which]) for side in (pairs.clean, pairs.corrupt)]
    return Story(
        residual=((stream.per_example[..., which] - corrupt) / (clean - corrupt))[:, real],
        patterns=patterns[:, which][:, real][:, :, real],
        tokens=tuple(tokenizer.str_tokens(sides[0])),
        corrupt_tokens=tuple(tokenizer.str_tokens(sides[1])),
        at=tuple(int(np.searchsorted(real, i)) for i in np.asarray(at[:, which])),
        answer=tokenizer.decode([int(pairs.correct[which])]),
        wrong=tokenizer.decode([int(pairs.wrong[which])]),
        guesses=tuple(guesses),
    )


def _random_triples(
    n_layers: int, n_heads: int, leading: tuple[tuple[int, int], ...], rng: np.random.Generator
) -> list[list[tuple[int, int]]]:
    others = [
        (layer, head) for layer in range(n_layers) for head in range(n_heads) if (layer, head) not in leading
    ]
    return [[others[i] for i in rng.choice(len(others), LEADING, replace=False)] for _ in range(TRIPLES)]


@eqx.filter_jit
def _without(
    model: Decoder,
    clean: Prompts,
    metric: Metric,
    mean: Float[Array, "layer head d_head"],
    triples: Int[Array, "triple three two"],
) -> Float[Array, " triple"]:
    """The metric, mean over prompts, with each triple of heads mean-ablated."""

    def one(triple: Int[Array, "three two"]) -> Float[Array, ""]:
        edits = [mean_ablate("z", mean, per_layer=True, layer=head[0], head=head[1]) for head in triple]
        return metric(intervene(model, edits)(clean), clean.mask).mean()

    return jax.lax.map(one, triples)
