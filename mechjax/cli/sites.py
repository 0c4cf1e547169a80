"""`mechjax sites MODEL`: every activation that has a name, its axes and its shape."""

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from mechjax.base.catalogue import SITES
from mechjax.models.load import load_config
from mechjax.models.structures import build
from mechjax.transform import list_sites


def sites(model: tyro.conf.Positional[str]) -> None:
    """List the sites of a model: what `capture` reads and edits change.

    Args:
        model: A shipped model, a folder in Hugging Face layout, or a name on the Hub.
    """
    config = load_config(model)
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in config.shapes.items()}
    shapes = jax.eval_shape(lambda params: build(config, params), params)  # sites need no numbers
    given = config.inputs(1, 8)
    found = list_sites(lambda model, inputs: model(inputs), shapes, given)
    console, wide = Console(), max(map(len, found))
    one = (
        f"one image of {' x '.join(map(str, given.shape[1:]))}"
        if config.reads_pixels
        else "one prompt of 8 tokens"
    )
    console.print(Text.assemble((model, "bold"), f", {one}, {config.n_layers} layers\n"))
    for name, info in found.items():
        entry = SITES[name]
        sizes = zip(info.local[info.n_batch :], info.axes, strict=True)
        where = " in every layer" if info.stacked else ""
        console.print(
            Text.assemble(
                (f"{name:<{wide}}  ", "bold"),
                " × ".join("1" if axis == "one" else f"{size} {axis}" for size, axis in sizes),
                where,
            )
        )
        said = f"{entry.meaning} Formed on request." if entry.costly else entry.meaning
        paths = "".join(f"\n{path}" for path in info.also)
        console.print(Padding(Text(said + paths, style="dim"), (0, 0, 0, wide + 2)))
