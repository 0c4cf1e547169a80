"""Write the README's table of families from measured parity: `python -m tests.parity.table`.

For each family, over its cases (tiny checkpoints of transformers with every parameter redrawn): the largest difference
of the logits and of the sites that modules of transformers expose, relative to the largest number there.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import mechjax as mj
from mechjax.models.families import FAMILIES, OTHERS, config_from_hf
from mechjax.studies.hf_sites import hf_sites
from tests.parity import cases, test_encoders, test_experts, test_mambas, test_t5, test_vision

README = Path(__file__).parents[2] / "README.md"
BETWEEN = re.compile(
    r"(<!-- families: python -m tests.parity.table -->\n).*?(<!-- end of families -->)", re.DOTALL
)


def measured(hf: Any, model: Any, tokens: np.ndarray, second: np.ndarray | None = None) -> dict[str, float]:
    """Site -> largest relative difference, over its layers; `second` is what a decoder beside an encoder reads."""
    texts, named = ((tokens,), {}) if second is None else ((tokens, second), {"decoder_input_ids": second})
    theirs = hf_sites(hf, model.config, tokens, **named)
    _, acts = mj.capture(model, sorted({site for site, _ in theirs}))(*texts)
    found: dict[str, float] = {}
    for (site, layer), value in theirs.items():
        ours = np.asarray(acts[site] if layer is None else acts[site][(acts.layers[site] or ()).index(layer)])
        apart = np.abs(ours.reshape(value.shape) - value).max() / np.abs(value).max()
        found[site] = max(found.get(site, 0.0), float(apart))
    return found


def every_case() -> Iterator[tuple[Any, ...]]:
    """Every case of the parity tests: (in transformers, in mechjax, tokens, perhaps the decoder's)."""
    for name in cases.CASES:
        case = cases.pair(name)
        yield case.hf, case.model, case.tokens
    for name in test_experts.CASES:
        yield *test_experts.pair(name), test_experts.TOKENS
    for name in test_encoders.CASES:
        yield test_encoders.pair(name)[:3]
    for name in test_t5.CASES:
        hf, model, texts = test_t5.pair(name)
        yield hf, model, *texts
    for name in test_vision.CASES:
        yield test_vision.pair(name)
    for name in test_mambas.CASES:
        yield test_mambas.pair(name)


def table() -> str:
    """The table, a row per family."""
    rows = [
        "| family | architectures | logits | sites compared | worst of them |",
        "| --- | --- | --- | --- | --- |",
    ]
    by_family: dict[str, dict[str, float]] = {}
    for hf, model, *texts in every_case():
        _, family = config_from_hf({"architectures": [type(hf).__name__], **hf.config.to_dict()})
        seen = by_family.setdefault(family.name, {})
        for site, apart in measured(hf, model, *texts).items():
            seen[site] = max(seen.get(site, 0.0), apart)
    for family in (*FAMILIES, *OTHERS):
        seen = dict(by_family[family.name])
        found = next((name for name in ("logits", "class_logits") if name in seen), None)
        logits = "has none" if found is None else f"{seen.pop(found):.0e}"
        names = ", ".join(f"`{name}`" for name in family.architectures)
        rows.append(f"| {family.name} | {names} | {logits} | {len(seen)} | {max(seen.values()):.0e} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    text = README.read_text()
    README.write_text(BETWEEN.sub(lambda found: found[1] + table() + found[2], text))
