"""Train `induction-2l`, the attention-only transformer of two layers that ships with mechjax, and write its card.

    python -m mechjax.studies.zoo_induction --out FOLDER [--seed 0] [--others FOLDER ...]

It learns random words that repeat themselves, for which it forms previous-token heads in its first layer and induction
heads in its second (Elhage et al. 2021; Olsson et al. 2022, arXiv:2209.11895). Every number on the card is measured by
this script; `--others` names folders of runs with other seeds, whose spread the card then states.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console

from mechjax.base.atomic import replace_file
from mechjax.base.records import Record
from mechjax.fit import fit, muon
from mechjax.heads import copying, detect_heads, in_context_learning, repeated_tokens
from mechjax.models import Config, Decoder, init
from mechjax.models.export import export
from mechjax.models.rope import Rope
from mechjax.tasks.vocabulary import SPECIAL, build_tokenizer

LENGTH = 64  # tokens in a row
BATCH = 24
SHORTEST, LONGEST = 4, 24  # words that repeat
ONCE = 0.1  # weight of words that are no repetition
PEAK, WARM_UP, DECAY = 5e-3, 100, 0.1
REQUIRED = {"previous_token": 0.8, "induction": 0.8}  # of the best head of each kind
EARLY, LATE = 5, 45  # positions of the in-context learning score
FIRST_WORD = len(SPECIAL)


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        out: Folder to write; it is replaced.
        seed: Start and data.
        steps: Steps of the optimiser.
        others: Folders of runs with other seeds, for the spread on the card.
    """

    out: Path
    seed: int = 0
    steps: int = 1200
    others: tuple[Path, ...] = ()


class Rows(Record):
    """A batch.

    Attributes:
        tokens: Rows of random words. Shape (batch, pos).
        repeated: Whether each token belongs to a repetition; after a gap, from its second word on. Shape (batch, pos).
    """

    tokens: Int[Array | np.ndarray, "*batch pos"]
    repeated: Bool[Array | np.ndarray, "*batch pos"]


def configured(d_vocab: int) -> Config:
    """Two layers of four heads, without MLPs; rotary positions, all of whose wavelengths fit the row."""
    return Config(
        d_vocab=d_vocab, n_ctx=LENGTH, d_model=96, n_layers=2, n_heads=4, d_head=24, mlp="none", tied=False,
        positions="rotary", rope=Rope(base=100.0), attn_scale=1.0,
    )  # fmt: skip


def row(rng: np.random.Generator, d_vocab: int, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """Words that repeat until the row is full, after other words in more than half of the rows; and which are repeated.

    In half of the rows other words stand between the repetitions too, so that distance tells nothing.
    """
    room, period = LENGTH - 1, int(rng.integers(SHORTEST, LONGEST + 1))
    start = int(rng.integers(0, room - 2 * period + 1)) if rng.random() < 0.6 else 0
    apart, words = rng.random() < 0.5, rng.choice(np.arange(FIRST_WORD, d_vocab), period, replace=False)
    other = lambda n: rng.integers(FIRST_WORD, d_vocab, n)
    tokens, repeated = [*other(start), *words], [False] * (start + period)
    while len(tokens) < room:
        gap = int(rng.integers(1, 8)) if apart else 0
        tokens += [*other(gap), *words]
        repeated += [False] * gap + [not apart] + [True] * (period - 1)
    return np.array([bos, *tokens[:room]], np.int32), np.array([False, *repeated[:room]])


def rows(d_vocab: int, bos: int, seed: int) -> Iterator[Rows]:
    """Endless batches."""
    rng = np.random.default_rng(seed)
    while True:
        drawn = [row(rng, d_vocab, bos) for _ in range(BATCH)]
        yield Rows(*(np.stack(part) for part in zip(*drawn, strict=True)))


def start_from(key: Array, config: Config) -> Decoder:
    """Embedding and unembedding of unit length, so that words are told apart from the first step on."""
    model = init(config, key=key)
    larger = lambda i: config.d_model**-0.5 * jax.random.normal(jax.random.fold_in(key, i), model.W_E.shape)
    return eqx.tree_at(lambda m: (m.W_E, m.W_U), model, (larger(1), larger(2).T))


def optimizer(steps: int) -> optax.GradientTransformation:
    """Muon for the blocks' matrices, Adam for the rest."""
    return muon(PEAK, steps=steps, warm_up=min(WARM_UP, steps // 10), weight_decay=DECAY)


def loss(model: Decoder, batch: Rows, key: Array) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted mean cross-entropy of the next word, in nats; beside it that of the repeated words."""
    del key
    logits = model(batch.tokens)[:, :-1]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    repeated = jnp.asarray(batch.repeated[:, 1:])
    weight = jnp.where(repeated, 1.0, ONCE)
    of_repeated = jnp.where(repeated, nll, 0.0).sum() / repeated.sum()
    return (nll * weight).sum() / weight.sum(), {"repeated": of_repeated}


def scores(model: Decoder, bos: int, seed: int = 1000) -> dict[str, Any]:
    """What each head scores on repeated random words, and the in-context learning score."""
    words = range(FIRST_WORD, model.config.d_vocab)
    prompts = repeated_tokens(model, key=jax.random.key(seed), n=64, period=25, bos=bos, ids=words)
    found = detect_heads(model, prompts)
    per_head = {
        kind: np.asarray(found.scores[i], np.float64).round(3).tolist() for i, kind in enumerate(found.kinds)
    }
    learned = in_context_learning(model, prompts, early=EARLY, late=LATE)
    copied = np.asarray(copying(model).scores, np.float64).round(3).tolist()
    return {**per_head, "copying": copied, "in_context_learning": round(float(learned.score), 3)}


def train(options: Options) -> dict[str, Any]:
    """Train, export and measure; returns what the card states.

    Raises:
        WriteError: The folder cannot be written.
    """
    tokenizer = build_tokenizer()
    config, bos, key = (
        configured(tokenizer.vocab_size),
        tokenizer.special_id("bos_token") or 0,
        jax.random.key(options.seed),
    )
    start = time.perf_counter()
    model, history = fit(
        start_from(key, config), loss, rows(config.d_vocab, bos, options.seed), optimizer(options.steps),
        steps=options.steps, key=key,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    export(model, options.out, family="mechjax", tokenizer=tokenizer, overwrite=True)
    last = {name: float(values[-50:].mean()) for name, values in history.metrics.items()}
    return {
        "seed": options.seed, "steps": options.steps, "seconds": round(seconds), "cores": _cores(),
        "parameters": config.n_params, "vocabulary": config.d_vocab, "loss": last, "scores": scores(model, bos),
    }  # fmt: skip


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best(measured: dict[str, Any], kind: str) -> tuple[str, float]:
    """The head that scores highest, and its score."""
    table = np.asarray(measured["scores"][kind])
    layer, head = np.unravel_index(table.argmax(), table.shape)
    return f"L{layer}.H{head}", float(table[layer, head])


def card(measured: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """The model's card, in Markdown."""
    runs, config = [measured, *others], configured(measured["vocabulary"])
    lines = []
    for kind in ("previous_token", "duplicate_token", "induction", "copying"):
        (name, score), spread = best(measured, kind), [best(run, kind)[1] for run in runs]
        lines.append(f"| {kind} | {name} {score:.2f} | {min(spread):.2f} to {max(spread):.2f} |")
    learned = [run["scores"]["in_context_learning"] for run in runs]
    lines.append(
        f"| in_context_learning | {learned[0]:.2f} nats | {min(learned):.2f} to {max(learned):.2f} |"
    )
    seeds, loss = ", ".join(str(run["seed"]) for run in runs), measured["loss"]
    took = f"{measured['seconds']} s on {measured['cores']} CPU core{'s' * (measured['cores'] > 1)}"
    return f"""# induction-2l

An attention-only transformer of 2 layers and 4 heads (d_model {config.d_model}, d_head {config.d_head}, LayerNorm,
rotary positions of base 100, untied; {measured["parameters"]:,} parameters, {measured["vocabulary"]:,} words) in
mechjax's own layout, trained by `python -m mechjax.studies.zoo_induction --seed {measured["seed"]}`. It is a specimen
to take apart: it knows that words repeat, and nothing else.

**Data.** {measured["steps"]} batches of {BATCH} rows of {LENGTH} tokens: {SHORTEST} to {LONGEST} random words that
repeat until the row is full; other random words stand before them in 60 % of the rows, and between the repetitions in
half. Repeated words weigh {1 / ONCE:.0f} times as much as others.

**Training.** Muon (heads) and Adam, peak rate {PEAK}, {WARM_UP} steps of warm-up and a cosine, weight decay {DECAY}.
{took}. Loss at the end {loss["loss"]:.3f} nats, of repeated words {loss["repeated"]:.3f}
(in rows without gaps, nothing foretells the first of them).

**Heads**, on 64 prompts of 25 random words said twice: the best head of the shipped seed with its score, and the
least and greatest score of the best head over {len(runs)} seed{"s" * (len(runs) > 1)} ({seeds}). The in-context
learning score is the loss at position {LATE} less that at {EARLY}.

| score | seed {measured["seed"]} | least to greatest |
| --- | --- | --- |
{chr(10).join(lines)}
"""


def main() -> None:
    """Train from the command line; exits 1 where no head scores what is required."""
    options = tyro.cli(Options, description=__doc__)
    measured = train(options)
    others = [json.loads((folder / "card.json").read_text()) for folder in options.others]
    replace_file(options.out / "card.json", (json.dumps(measured, indent=1) + "\n").encode())
    replace_file(options.out / "README.md", card(measured, others).encode())
    Console().print(measured)
    short = {
        kind: best(measured, kind) for kind, least in REQUIRED.items() if best(measured, kind)[1] < least
    }
    if short:
        raise SystemExit(f"below what is required: {short}")


if __name__ == "__main__":
    main()
