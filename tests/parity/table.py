"""Write the README's table of families from measured parity: `python -m tests.parity.table`.

For each family, over its cases (tiny checkpoints of transformers with every parameter redrawn): the largest difference
of the logits and of the sites that modules of transformers expose, relative to the largest number there.
"""

import re
from pathlib import Path

import numpy as np

import mechjax as mj
from mechjax.models.families import FAMILIES, config_from_hf
from tests.parity.cases import CASES, Pair, hf_sites, pair

README = Path(__file__).parents[2] / "README.md"
BETWEEN = re.compile(
    r"(<!-- families: python -m tests.parity.table -->\n).*?(<!-- end of families -->)", re.DOTALL
)


def measured(case: Pair) -> dict[str, float]:
    """Site -> largest relative difference, over its layers."""
    theirs = hf_sites(case)
    _, acts = mj.capture(case.model, sorted({site for site, _ in theirs}))(case.tokens)
    found: dict[str, float] = {}
    for (site, layer), value in theirs.items():
        ours = np.asarray(acts[site] if layer is None else acts[site][(acts.layers[site] or ()).index(layer)])
        apart = np.abs(ours.reshape(value.shape) - value).max() / np.abs(value).max()
        found[site] = max(found.get(site, 0.0), float(apart))
    return found


def table() -> str:
    """The table, a row per family."""
    rows = [
        "| family | architectures | logits | sites compared | worst of them |",
        "| --- | --- | --- | --- | --- |",
    ]
    by_family: dict[str, dict[str, float]] = {}
    for name in CASES:
        case = pair(name)
        _, family = config_from_hf(case.hf.config.to_dict())
        seen = by_family.setdefault(family.name, {})
        for site, apart in measured(case).items():
            seen[site] = max(seen.get(site, 0.0), apart)
    for family in FAMILIES:
        seen = dict(by_family[family.name])
        logits = seen.pop("logits")
        names = ", ".join(f"`{name}`" for name in family.architectures)
        rows.append(f"| {family.name} | {names} | {logits:.0e} | {len(seen)} | {max(seen.values()):.0e} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    text = README.read_text()
    README.write_text(BETWEEN.sub(lambda found: found[1] + table() + found[2], text))
