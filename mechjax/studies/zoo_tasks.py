"""Train `tasks-4l`, the small transformer that ships with mechjax, and write its card.

    python -m mechjax.studies.zoo_tasks --out FOLDER [--seed 0] [--checkpoints 30] [--others FOLDER ...]

A decoder in the manner of GPT-2 learns the five tasks of `mechjax.tasks` from templated English. Every number on the
card is measured by this script; `--others` names folders of runs with other seeds, whose spread the card then states.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float
from rich.console import Console

from mechjax.base.atomic import replace_file
from mechjax.fit import fit, log_spaced, muon, save_checkpoint
from mechjax.models import Config, Decoder, init
from mechjax.models.export import export
from mechjax.tasks import agreement, greater_than, induction, ioi, pronouns
from mechjax.tasks.training import MIX, Rows, rows
from mechjax.tasks.vocabulary import build_tokenizer

TASKS = {
    "ioi": ioi,
    "greater_than": greater_than,
    "pronouns": pronouns,
    "agreement": agreement,
    "induction": induction,
}
REQUIRED = {"ioi": 0.99, "greater_than": 0.95, "pronouns": 0.95, "agreement": 0.95, "induction": 0.95}
LENGTH = 40  # tokens in a row, and the longest prompt
BATCH = 64
TESTED = 1000  # held-out prompts per task
PEAK, WARM_UP, DECAY = 3e-3, 60, 0.1


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        out: Folder to write; it is replaced.
        seed: Start and data.
        steps: Steps of the optimiser.
        checkpoints: How many log-spaced checkpoints to save in `out/checkpoints`; 0 for none.
        others: Folders of runs with other seeds, for the spread on the card.
    """

    out: Path
    seed: int = 0
    steps: int = 1500
    checkpoints: int = 0
    others: tuple[Path, ...] = ()


def configured(d_vocab: int) -> Config:
    """Four layers of four heads, with MLPs, LayerNorm and learned positions."""
    return Config(
        d_vocab=d_vocab, n_ctx=LENGTH, d_model=128, n_layers=4, n_heads=4, d_head=32, d_mlp=256, tied=True,
        activation="gelu_new", positions="learned", norm="layer", qkv_bias=True, out_bias=True, mlp_bias=True,
    )  # fmt: skip


def mimetic(model: Decoder, key: Array) -> Decoder:
    """A start from which matching and copying heads form early (Trockman and Kolter 2023, arXiv:2305.09828).

    Keys start near queries, so that heads attend to what resembles the query; output matrices start as half the
    transpose of value matrices, so that they copy, or, for half of the heads, suppress (our addition: telling the two
    names of a prompt apart needs both). Positions start as sines whose wavelengths fit the row.
    """
    keys = jax.random.split(key, 7)
    c, attn = model.config, model.blocks.attn
    scale = c.d_model**-0.5
    q, k, v = (scale * jax.random.normal(keys[i], attn.W_Q.shape) for i in range(3))
    sign = jax.random.rademacher(keys[3], (c.n_layers, c.n_heads, 1, 1), jnp.float32)
    n = c.d_model // 4
    angle = np.arange(c.n_ctx)[:, None] / LENGTH ** (np.arange(n) / n)
    waves = np.zeros((c.n_ctx, c.d_model), np.float32)
    waves[:, : 2 * n] = np.concatenate([np.sin(angle), np.cos(angle)], 1) * n**-0.5
    w_in, w_out = (c.shapes[f"blocks.mlp.{name}"] for name in ("W_in", "W_out"))
    return eqx.tree_at(
        lambda m: (
            m.W_E, m.W_pos, m.blocks.attn.W_Q, m.blocks.attn.W_K, m.blocks.attn.W_V, m.blocks.attn.W_O,
            m.blocks.mlp.W_in, m.blocks.mlp.W_out,
        ),
        model,
        (
            scale * jax.random.normal(keys[4], model.W_E.shape), jnp.asarray(waves), q, 0.8 * q + 0.6 * k, v,
            0.5 * sign * jnp.moveaxis(v, 1, 3), scale * jax.random.normal(keys[5], w_in),
            0.3 * c.d_mlp**-0.5 * jax.random.normal(keys[6], w_out),
        ),
    )  # fmt: skip


def optimizer(steps: int) -> optax.GradientTransformation:
    """Muon for the blocks' matrices, Adam for the rest."""
    return muon(PEAK, steps=steps, warm_up=min(WARM_UP, steps // 10), weight_decay=DECAY)


def loss(model: Decoder, batch: Rows, key: Array) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted mean cross-entropy of the next word, in nats; beside it that of the words that can be known."""
    del key
    logits = model(batch.tokens, mask=jnp.asarray(batch.mask))[:, :-1]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    weight = batch.weight[:, 1:]
    known = weight > 1
    return (nll * weight).sum() / weight.sum(), {"known": jnp.where(known, nll, 0.0).sum() / known.sum()}


def accuracies(model: Decoder, tokenizer: Any, n: int = TESTED) -> dict[str, float]:
    """Share of held-out prompts answered right, by each task's own rule."""
    pairs = {name: task(tokenizer, n) for name, task in TASKS.items()}
    return {name: float(p.right(model(p.clean)).mean()) for name, p in pairs.items()}


def train(options: Options) -> dict[str, Any]:
    """Train, export and measure; returns what the card states.

    Raises:
        WriteError: The folder cannot be written.
    """
    tokenizer = build_tokenizer()
    key = jax.random.key(options.seed)
    model = mimetic(init(configured(tokenizer.vocab_size), key=key), jax.random.fold_in(key, 1))
    start = time.perf_counter()
    at = log_spaced(options.steps, options.checkpoints) if options.checkpoints else ()
    saved: list[tuple[int, Decoder]] = []
    model, history = fit(
        model, loss, rows(tokenizer, BATCH, length=LENGTH, seed=options.seed), optimizer(options.steps),
        steps=options.steps, key=key, checkpoints=at,
        save=lambda step, m: saved.append((step, m)),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    export(model, options.out, family="gpt2", tokenizer=tokenizer, overwrite=True)
    for step, checkpoint in saved:
        save_checkpoint(options.out / "checkpoints", step, checkpoint, made_from={"seed": options.seed})
    last = {name: float(values[-50:].mean()) for name, values in history.metrics.items()}
    return {
        "seed": options.seed, "steps": options.steps, "seconds": round(seconds), "cores": _cores(),
        "parameters": model.config.n_params, "vocabulary": tokenizer.vocab_size, "loss": last,
        "accuracy": accuracies(model, tokenizer),
    }  # fmt: skip


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def card(measured: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """The model's card, in Markdown."""
    runs = [measured, *others]
    lines = [f"| {name} | {measured['accuracy'][name]:.1%} | {_spread(runs, name)} |" for name in TASKS]
    mix = ", ".join(f"{task.__module__.rpartition('.')[2]} {share:.0%}" for task, share in MIX.items())
    seed, loss, c = measured["seed"], measured["loss"], configured(measured["vocabulary"])
    took = f"{measured['seconds']} s on {measured['cores']} CPU core{'s' * (measured['cores'] > 1)}"
    return f"""# tasks-4l

A transformer of 4 layers and 4 heads (d_model {c.d_model}, d_mlp {c.d_mlp}, LayerNorm, learned positions, tied
embeddings; {measured["parameters"]:,} parameters, {measured["vocabulary"]:,} words) in the layout of GPT-2, trained by
`python -m mechjax.studies.zoo_tasks --seed {seed}` on templated English. It is a specimen to take apart, not a language
model: it knows the sentences of `mechjax.tasks` and nothing else.

**Data.** {measured["steps"]} batches of {BATCH} rows of {LENGTH} words, made by `mechjax.tasks.training.rows`: one task
a row ({mix}) between free sentences. Words that follow from what stands before weigh 30 times as much as others. A hash
keeps combinations (for IOI, a template with a pair of names) out of training; they are what is tested.

**Training.** Muon (matrices) and Adam, peak rate {PEAK}, {WARM_UP} steps of warm-up and a cosine, weight decay {DECAY},
from a mimetic start (Trockman and Kolter 2023, arXiv:2305.09828). {took}. Loss at the end {loss["loss"]:.3f} nats, of
the words that can be known {loss["known"]:.4f}.

**Accuracy** on {TESTED} held-out prompts per task, for the shipped seed, and over {len(runs)}
seed{"s" * (len(runs) > 1)} ({", ".join(str(r["seed"]) for r in runs)}):

| task | seed {seed} | least to greatest |
| --- | --- | --- |
{chr(10).join(lines)}

Right means: for IOI, pronouns and agreement the right word beats the wrong one; for greater-than the years above have
more probability than all else; for induction the repeated word has more than all else.
"""


def _spread(runs: list[dict[str, Any]], task: str) -> str:
    values = [run["accuracy"][task] for run in runs]
    return f"{min(values):.1%} to {max(values):.1%}"


def main() -> None:
    """Train from the command line; exits 1 where a task falls short of what is required."""
    options = tyro.cli(Options, description=__doc__)
    measured = train(options)
    others = [json.loads((folder / "card.json").read_text()) for folder in options.others]
    replace_file(options.out / "card.json", (json.dumps(measured, indent=1) + "\n").encode())
    replace_file(options.out / "README.md", card(measured, others).encode())
    Console().print(measured)
    short = {t: a for t, a in measured["accuracy"].items() if a < REQUIRED[t]}
    if short:
        raise SystemExit(f"below what is required: {short}")


if __name__ == "__main__":
    main()
