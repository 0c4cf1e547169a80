"""`mechjax patch MODEL`: put activations of one prompt into another, and see which bring the answer back."""

from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.text import Text

from mechjax.base.errors import ArgumentError, PairingError
from mechjax.base.progress import bar
from mechjax.hub import Tokenizer
from mechjax.metrics import logit_diff
from mechjax.models.encoder import Encoder
from mechjax.models.load import load
from mechjax.models.mamba import Mamba
from mechjax.patching import activation_patch
from mechjax.tasks.answer import answer_token
from mechjax.tasks.pairing import aligned
from mechjax.viz import check_writable, scores_page, scores_text


def patch(
    model: tyro.conf.Positional[str],
    *,
    clean: str,
    corrupt: str,
    answer: str,
    wrong: str,
    site: str = "resid_pre",
    over: tuple[str, ...] = ("layer", "pos"),
    mode: Literal["denoise", "noise"] = "denoise",
    top: int = 10,
    page: Path | None = None,
    folder: Path | None = None,
) -> None:
    """Patch every place of a site, one at a time, and show how much of the answer each brings back.

    Args:
        model: A shipped model, a folder in Hugging Face layout, or a name on the Hub.
        clean: A prompt that the model continues with the answer.
        corrupt: The same prompt, token by token, but for what makes the model answer otherwise.
        answer: The next word of the clean prompt, one token. A space is put in front where the prompt ends without.
        wrong: The next word of the corrupt prompt, one token.
        site: What to patch; `mechjax sites MODEL` lists what there is.
        over: The axes to sweep, such as `layer head` with `--site z`.
        mode: denoise puts clean activations into the corrupt run, noise the reverse.
        top: How many leading places to name.
        page: Where to write a page about it, one HTML file.
        folder: Where to keep what is done: the same command goes on after it was stopped.
    """
    if page is not None:
        check_writable(page)
    decoder, tokenizer = load(model)
    if isinstance(decoder, Mamba):
        raise ArgumentError(
            f"`{model}` is a state space model, and `mechjax patch` sweeps decoders. In Python `mj.intervene(model, "
            "mj.replace(site, value))` puts any site of it, its states too, from one run into another."
        )
    if isinstance(decoder, Encoder):
        raise ArgumentError(
            f"`{model}` is an encoder: it predicts masked tokens from both sides and has no next word to bring back. "
            "Give `mechjax patch` a decoder; in Python `mj.intervene(model, mj.replace(site, value))` edits both."
        )
    if tokenizer is None:
        raise ArgumentError(
            f"`{model}` has no tokenizer.json, so it cannot read text. Add one to its folder."
        )
    pieces = _pieces(tokenizer, clean, corrupt)
    ids = [answer_token(tokenizer, clean, word) for word in (answer, wrong)]
    sides, metric = (tokenizer([clean]), tokenizer([corrupt])), logit_diff(*ids)
    # With a folder the sweep shows its own bar, unit by unit.
    with nullcontext() if folder else bar(f"Patching {site}", 1):
        scores = activation_patch(decoder, *sides, metric, site=site, over=over, mode=mode, folder=folder)
    console, names = Console(), {"pos": pieces}
    before, after = float(scores.clean.mean()), float(scores.corrupt.mean())
    ahead = f"`{tokenizer.decode(ids[:1])}` over `{tokenizer.decode(ids[1:])}`"
    console.print(
        Text(f"{ahead}, in logits: {before:.2f} in the clean run, {after:.2f} in the corrupt run.\n")
    )
    console.print(scores_text(scores, names=names, top=top))
    if page is not None:
        written = scores_page(scores, title=f"{model}: {site} by {' and '.join(over)}", names=names).write(
            page, model=decoder, tokenizer=tokenizer, clean=sides[0], corrupt=sides[1], metric=metric, site=site,
            over=over, mode=mode,
        )  # fmt: skip
        console.print(Text.assemble("\nThe page: ", (str(written), "bold underline")), soft_wrap=True)


def _pieces(tokenizer: Tokenizer, clean: str, corrupt: str) -> list[str]:
    """The clean prompt piece by piece; where the corrupt one differs, both.

    Raises:
        PairingError: They have different token counts.
    """
    left, right = tokenizer.str_tokens(clean), tokenizer.str_tokens(corrupt)
    if len(left) != len(right):
        raise PairingError(
            f"clean has {len(left)} tokens and corrupt has {len(right)}, so their positions do not correspond:\n"
            f"{aligned(left, right)}\nChange words for others of as many tokens."
        )
    return [a.strip() if a == b else f"{a.strip()}/{b.strip()}" for a, b in zip(left, right, strict=True)]
