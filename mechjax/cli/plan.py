"""`mechjax plan MODEL`: what a model will take, before anything is allocated."""

from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechjax.base.errors import ArgumentError
from mechjax.base.units import in_bytes
from mechjax.models.load import load_config
from mechjax.models.plan import Planned
from mechjax.models.plan import plan as make_plan
from mechjax.parallel.layout import Spec


def plan(
    model: tyro.conf.Positional[str],
    *,
    batch: int = 1,
    pos: int | None = None,
    capture: tuple[str, ...] = (),
    dtype: str | None = None,
    devices: str | None = None,
    chip: str | None = None,
    mesh: tuple[int, int] | None = None,
    weights: Literal["int8", "int4"] | None = None,
    group: int | None = None,
) -> None:
    """Say what a model takes: parameters, operations, memory, and the bytes of every site.

    Args:
        model: A shipped model, a folder in Hugging Face layout (config.json is enough), or a name on the Hub.
        batch: How many prompts, or images.
        pos: How many tokens each; 128 by default, or as many as the model has positions.
        capture: Sites to capture.
        dtype: Of the parameters, such as bfloat16; the model's own by default.
        devices: What it would run on, such as v5e-256 or 8xH200: what each would hold, whether that fits, which batch.
        chip: A TPU to compile for, such as v5e:2x4; none needs to be here, only libtpu.
        mesh: How many of them divide the batch, and how many the model; by default as many divide the model as can,
            the others the batch.
        weights: What the matrices of blocks are rounded to, as mj.load(weights=) would.
        group: How many neighbouring weights share a scale.
    """
    config = load_config(model)
    if pos is not None and config.reads_pixels:
        raise ArgumentError(
            f"`{model}` reads images, each of which is {config.n_ctx} positions: leave out --pos."
        )
    given = config.inputs(batch, min(128, getattr(config, "n_ctx", 128)) if pos is None else pos)
    found = make_plan(
        model,
        given,
        capture=capture,
        dtype=dtype,
        devices=devices,
        chip=chip,
        mesh=mesh,
        weights=weights,
        group=group,
    )
    console = Console()
    console.print(Text(found.name, style="bold"))
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for word, said in found.facts():
        facts.add_row(Text(word, style="dim"), Text(said))
    console.print(facts)
    sites = Table("\nsite", "\nshape", "\ndtype", box=None, padding=(0, 2, 0, 0), header_style="dim")
    sites.add_column("\nbytes", justify="right")
    sites.add_column("\nsplit over" if found.share else "")
    sites.add_column("")
    captured = {site.name for site in found.captured}
    for site in found.sites:
        note = "captured" if site.name in captured else "on request" if site.on_request else ""
        style = {"captured": "bold", "on request": "dim"}.get(note, "")
        split = "" if found.share is None else _split(found.share.spec(site.axes, site.shape), site)
        sites.add_row(site.name, _shape(site), site.dtype, in_bytes(site.bytes), split, note, style=style)
    console.print(sites)


def _split(spec: Spec, site: Planned) -> str:
    return ", ".join(
        f"{axis}: {over if isinstance(over, str) else ' and '.join(over)}"
        for axis, over in zip(site.axes, spec, strict=True)
        if over
    )


def _shape(site: Planned) -> str:
    sizes = zip(site.shape, site.axes, strict=True)
    return " × ".join("1" if axis == "one" else f"{size} {axis}" for size, axis in sizes)
