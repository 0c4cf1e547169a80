"""`mechjax tour`: which heads of a small trained transformer carry out a task, as a page."""

from pathlib import Path

import jax.numpy as jnp
from rich.console import Console
from rich.text import Text

from mechjax.studies.tour import tour as run_tour
from mechjax.studies.tour_page import Tour
from mechjax.viz import heat_table


def tour(page: Path = Path("mechjax-tour.html"), n: int = 64, seed: int = 0, open: bool = False) -> None:
    """Find the heads of the shipped model that do indirect object identification, and write a page about it.

    Args:
        page: Where to write the page, one HTML file.
        n: How many held-out sentences.
        seed: Which sentences, and which random heads for comparison.
        open: Show the page in a browser.
    """
    console = Console()
    console.print(
        "Looking for the heads that know who receives. The first run compiles; it takes a minute or two.",
        style="dim",
    )
    found = run_tour(page, n=n, seed=seed, open_browser=open)
    _tell(console, found)
    console.print(
        Text.assemble("\nThe page: ", (str(page.expanduser().absolute()), "bold underline")), soft_wrap=True
    )


def _tell(console: Console, found: Tour) -> None:
    story = found.story
    sentence = " ".join(token.strip() for token in story.tokens)
    console.print(Text.assemble("\n", (sentence, "italic"), " → ", (story.answer.strip(), "bold"), "\n"))
    layers, heads = (
        [f"{axis} {i}" for i in range(size)] for axis, size in zip("LH", found.heads.shape, strict=True)
    )
    console.print(f"How much of the answer each head brings back (mean of {found.n} sentences)", style="bold")
    console.print(heat_table(found.heads, layers, heads, limit=1.0))
    console.print()
    for name, (layer, head) in zip(found.names, found.leading, strict=True):
        console.print(
            Text.assemble((name, "bold"), f" brings back {float(found.heads[layer, head]):.0%} by itself")
        )
    console.print(
        f"\nThe right name leads by {float(found.intact):.2f} logits. Without these three heads: "
        f"{float(found.ablated):.2f} (−{found.drop:.0%}). Without three random others: "
        f"{float(jnp.median(found.random)):.2f} (median of {found.random.size})."
    )
    took = ", ".join(f"{name.lower()} {seconds:.1f} s" for name, seconds in found.seconds)
    console.print(f"\n{took}", style="dim")
