"""Train the dictionaries that ship with mechjax, on the residual stream of `tasks-4l`, and write their cards.

    python -m mechjax.studies.zoo_dictionaries --out FOLDER [--layers 1 2] [--seed 0] [--steps 3000]

Each is a BatchTopK dictionary, written as SAELens writes such (JumpReLU with one threshold), in float16. Every number
on a card is measured by this script with the files as they were written: what is reconstructed, what the model keeps
through it, and for each task the latent that does most for it, chosen on training prompts and tested on held-out ones
against latents of like density.
"""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int
from rich.console import Console

from mechjax.base.atomic import replace_file
from mechjax.base.prompts import Prompts
from mechjax.dicteval.loss_recovered import loss_recovered
from mechjax.dicteval.reconstruction import Reconstruction, reconstruction
from mechjax.dictionaries import BatchTopK, Dictionary, load, splice, write_saelens
from mechjax.dictlearn import activations
from mechjax.dictlearn import train as fitted
from mechjax.metrics import logit_diff
from mechjax.models import Decoder
from mechjax.models.load import load as load_model
from mechjax.studies.zoo_tasks import TASKS
from mechjax.tasks.pairs import Pairs
from mechjax.tasks.training import rows
from mechjax.transform import capture, intervene, value_and_grad_at, zero

MODEL, SITE = "tasks-4l", "resid_post"
N_FEATURES, K = 512, 8
BATCH, BUFFER, RATE, WARM_UP = 1024, 32 * 1024, 4e-3, 50
DEAD_AFTER = 100_000  # tokens without activity after which AuxK takes a latent up
ROWS = 64
HELD_OUT = 1_000_003  # seed of rows that no training sees
CHOSEN_FROM, TESTED = 64, 128  # prompts of a task: to choose a latent from, and to test it with
CANDIDATES = 8  # of the largest estimates, how many are ablated to choose
CONTROLS = 50
LIKE = 2.0  # densities are alike within this factor
CAUSAL = 5.0  # times the median of the controls that the chosen latent must do at least


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        out: Folder in which each dictionary gets one.
        layers: Whose streams.
        seed: Start, data and controls.
        steps: Steps of the optimiser.
    """

    out: Path
    layers: tuple[int, ...] = (1, 2)
    seed: int = 0
    steps: int = 3000


def named(layer: int) -> str:
    """What the dictionary of a layer is called."""
    return f"{MODEL}-{SITE}-{layer}"


def prompts(tokenizer: Any, *, seed: int, n: int | None = None) -> Iterator[Prompts]:
    """Batches of the rows that `tasks-4l` learned from, with another seed; endless, or `n` of them."""
    stream = rows(tokenizer, ROWS, seed=seed)
    for batch in stream if n is None else itertools.islice(stream, n):
        yield Prompts(jnp.asarray(batch.tokens), jnp.asarray(batch.mask))


def train(options: Options, layer: int) -> dict[str, Any]:
    """Train, write and measure the dictionary of one layer; returns what its card states.

    Raises:
        WriteError: Its folder is there already, or cannot be written.
    """
    model, tokenizer = load_model(MODEL)
    key = jax.random.fold_in(jax.random.key(options.seed), layer)
    start = time.process_time()
    fresh = BatchTopK.init(d_model=model.config.d_model, n_features=N_FEATURES, k=K, key=key)
    stream = activations(
        model, prompts(tokenizer, seed=options.seed), SITE, layer=layer, batch=BATCH, buffer=BUFFER, key=key
    )
    trained = fitted(
        fresh, stream, steps=options.steps, learning_rate=RATE, warm_up=min(WARM_UP, options.steps // 5), key=key,
        dead_after=DEAD_AFTER, unit_gradients=False,  # as what ships was trained
    ).dictionary  # fmt: skip
    seconds = time.process_time() - start
    halved = jax.tree.map(lambda x: x.astype(jnp.float16) if eqx.is_inexact_array(x) else x, trained)
    folder = write_saelens(
        halved,
        options.out / named(layer),
        model_name=MODEL,
        hook_name=f"blocks.{layer}.hook_{SITE}",
        seed=options.seed,
        steps=options.steps,
        model=model,
    )
    written = load(folder)
    own = held_out(model, tokenizer, written, layer)
    found = {
        "model": MODEL, "site": SITE, "layer": layer, "kind": type(fresh).__name__, "features": N_FEATURES, "k": K,
        "seed": options.seed, "steps": options.steps, "tokens": options.steps * BATCH,
        "cpu_seconds": round(seconds),
        **measured(model, tokenizer, written, layer, own),
        "tasks": {
            task: causal(model, tokenizer, written, layer, task, own, seed=options.seed) for task in TASKS
        },
    }  # fmt: skip
    replace_file(folder / "card.json", (json.dumps(found, indent=1) + "\n").encode())
    replace_file(folder / "README.md", card(found).encode())
    return found


def held_out(
    model: Decoder, tokenizer: Any, dictionary: Dictionary, layer: int, n: int = 16
) -> Reconstruction:
    """How the dictionary reconstructs rows that no training saw, and how often each latent is active in them."""
    held, key = prompts(tokenizer, seed=HELD_OUT, n=n), jax.random.key(0)  # in which order changes nothing
    return reconstruction(
        dictionary, activations(model, held, SITE, layer=layer, batch=512, buffer=4096, key=key)
    )


def measured(
    model: Decoder, tokenizer: Any, dictionary: Dictionary, layer: int, own: Reconstruction, n: int = 16
) -> dict[str, Any]:
    """How it reconstructs, and what the model keeps through it, on those rows."""
    held = list(prompts(tokenizer, seed=HELD_OUT, n=n))
    kept = loss_recovered(model, held, {layer: dictionary}, site=SITE, ablation="mean")
    rounded = lambda record, *names: {name: round(float(getattr(record, name)), 4) for name in names}
    return {
        "held_out_tokens": int(own.tokens),
        **rounded(own, "fvu", "l0", "dead", "gamma"),
        **rounded(kept, "ce", "ce_spliced", "ce_ablated", "ce_recovered", "kl_recovered"),
    }


def causal(
    model: Decoder, tokenizer: Any, dictionary: Dictionary, layer: int, task: str, own: Reconstruction, *,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The latent that does most for a task, chosen on training prompts, and what it does on held-out ones.

    An effect is what the task's metric, the logit of the right answer less that of the wrong one, loses on average when
    the latent is taken out at every token, with the dictionary's error left in. Controls are drawn from live latents
    whose density is within a factor of `LIKE` of the chosen one's: any such, and those that are active in half as many
    of the very prompts as the chosen one, or more.
    """
    rng = np.random.default_rng(seed)
    spliced = splice(model, {layer: dictionary}, site=SITE)
    choosing = TASKS[task](tokenizer, CHOSEN_FROM, seed=seed, split="train")
    held = TASKS[task](tokenizer, TESTED, seed=seed, split="test")
    candidates = np.argsort(-estimated(spliced, choosing, layer), kind="stable")[:CANDIDATES]
    chosen = int(candidates[effects(spliced, choosing, layer, candidates).argmax()])
    often = np.asarray(own.density)
    like = (often > 0) & (often >= often[chosen] / LIKE) & (often <= often[chosen] * LIKE)
    like[chosen] = False
    present = active(spliced, held, layer)
    drawn = {
        "any": like,
        "present": like & (present >= present[chosen] / 2),
    }
    found: dict[str, Any] = {
        "latent": chosen, "density": round(float(often[chosen]), 4), "prompts": round(float(present[chosen]), 3),
        "metric": round(float(_metric(held)(spliced(held.clean), held.clean.mask).mean()), 3),
        "effect": round(float(effects(spliced, held, layer, [chosen])[0]), 3),
    }  # fmt: skip
    for name, fits in drawn.items():
        pool = np.flatnonzero(fits)
        others = rng.choice(pool, min(CONTROLS, len(pool)), replace=False)
        sizes = np.abs(effects(spliced, held, layer, others))
        found[name] = {
            "controls": len(others),
            "median": float(f"{np.median(sizes) if len(sizes) else np.nan:.3g}"),
            "as_large": int((sizes >= abs(found["effect"])).sum()),
        }
    return found


def effects(
    spliced: Any, pairs: Pairs, layer: int, latents: Sequence[int] | Int[np.ndarray, " latent"]
) -> Float[np.ndarray, " latent"]:
    """What the metric loses without each latent, mean over prompts: one compiled program for all of them."""
    value = lambda model: _metric(pairs)(model(pairs.clean.tokens, mask=pairs.clean.mask), pairs.clean.mask)
    out = [zero(f"{SITE}.latents", feature=int(i), layer=layer) for i in latents]
    intact = value(spliced)
    return np.array([float((intact - value(intervene(spliced, [edit]))).mean()) for edit in out])


def estimated(spliced: Any, pairs: Pairs, layer: int) -> Float[np.ndarray, " feature"]:
    """The same to first order, for all latents at once: each times the metric's gradient there."""
    where, metric = f"{SITE}.latents", _metric(pairs)
    value = lambda logits: metric(logits, pairs.clean.mask).mean()
    _, grads = value_and_grad_at(spliced, value, [where])(pairs.clean.tokens, mask=pairs.clean.mask)
    return np.asarray((_latents(spliced, pairs, layer) * grads[where][0]).sum((0, 1)))


def active(spliced: Any, pairs: Pairs, layer: int) -> Float[np.ndarray, " feature"]:
    """In which part of the prompts each latent is active."""
    f = _latents(spliced, pairs, layer) * pairs.clean.mask[..., None]
    return np.asarray((f > 0).any(1).mean(0))


def _latents(spliced: Any, pairs: Pairs, layer: int) -> Array:
    where = f"{SITE}.latents"
    return capture(spliced, [where], layers=layer)(pairs.clean.tokens, mask=pairs.clean.mask)[1][where][0]


def _metric(pairs: Pairs) -> Any:
    return logit_diff(pairs.correct, pairs.wrong)


def card(found: dict[str, Any]) -> str:
    """The dictionary's card, in Markdown."""
    name = named(found["layer"])
    lines = "\n".join(
        f"| {task} | {of['latent']} | {of['density']:.4f} | {of['metric']:.2f} | {of['effect']:.2f} | "
        f"{of['any']['median']:.2g} ({of['any']['as_large']} of {of['any']['controls']}) | "
        f"{of['present']['median']:.2g} ({of['present']['as_large']} of {of['present']['controls']}) |"
        for task, of in found["tasks"].items()
    )
    return f"""# {name}

A sparse dictionary of `{found["site"]}` after layer {found["layer"]} of `{found["model"]}`: {found["features"]}
latents, {found["kind"]} with k={found["k"]}, written as SAELens writes such (JumpReLU with one threshold) in float16.
`mj.dictionaries.load("{name}")`; `sae_lens.SAE.load_from_disk` opens the folder too. Trained by
`python -m mechjax.studies.zoo_dictionaries --seed {found["seed"]}`.

**Training.** {found["steps"]:,} batches of {BATCH:,} tokens ({found["tokens"]:,} in all) of the rows that the model
learned from, made with another seed; Adam, peak rate {RATE}, {WARM_UP} steps of warm-up, decay over the last third.
{found["cpu_seconds"]} s of one CPU's time.

**On {found["held_out_tokens"]:,} held-out tokens**: fraction of variance unexplained {found["fvu"]:.4f}, mean number
of active latents {found["l0"]:.2f}, latents that are never active {found["dead"]:.1%}. Cross-entropy of the model
{found["ce"]:.4f} nats, through the dictionary {found["ce_spliced"]:.4f}, with the site's mean in its place
{found["ce_ablated"]:.4f}: {found["ce_recovered"]:.2%} recovered ({found["kl_recovered"]:.2%} of the divergence).

**The latent that does most for each task**, chosen on {CHOSEN_FROM} training prompts and tested on {TESTED} held-out
ones. Effect: what the logit difference of right and wrong answer loses, on average, when the latent is taken out.
Controls: up to {CONTROLS} live latents drawn from those whose density is within a factor of {LIKE:g}; in the last
column from those of them that are active in half as many of the very prompts, or more. Medians of the sizes of their
effects, and how many are as large as the chosen one's.

| task | latent | density | metric | effect | controls | controls that are there |
| --- | --- | --- | --- | --- | --- | --- |
{lines}

Seldom does one latent do a task alone: the last column says how far others of the same prompts come.
"""


def main() -> None:
    """Train from the command line; exits 1 where a latent does less than is required."""
    options = tyro.cli(Options, description=__doc__)
    for layer in options.layers:
        found = train(options, layer)
        Console().print(found)
        best = max(found["tasks"].values(), key=lambda of: of["effect"] / max(of["any"]["median"], 1e-6))
        if best["effect"] < CAUSAL * best["any"]["median"]:
            raise SystemExit(f"no latent of layer {layer} does {CAUSAL:g} times what others do")


if __name__ == "__main__":
    main()
