"""The catalogue of sites: the names that mechjax gives activations, and how others spell them.

Validation, documentation and did-you-mean read it, and so do the models: the table itself is `sites`. Which Hugging
Face modules hold a site's numbers differs between families (`models/families/modules.py`); nnsight writes the same
paths with `h[3]` for `h.3` and `output[0]` for a tuple's first.
"""

import re
from dataclasses import replace

from mechjax.base.sites import CROSS, TABLE, SiteEntry

_ENCODER = "encoder."
"""What sites of an encoder-decoder's encoder begin with."""
_IN_ENCODERS = (
    "embed", "resid_pre", "attn_in", "ln1.scale", "ln1.normalized", "q_input", "k_input", "v_input", "q", "k", "v",
    "pos_bias", "attn_scores", "pattern", "z", "result", "attn_out", "resid_mid", "mlp_in", "ln2.scale",
    "ln2.normalized", "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out", "resid_post", "ln_final.scale",
    "ln_final.normalized",
)  # fmt: skip
_LAST_NORM = "ln_final.normalized"


def _of_encoder(entry: SiteEntry) -> SiteEntry:
    """The same site of an encoder-decoder's encoder."""
    places = {"blocks.{}.": "encoder.{}.", "ln_final.": "encoder_final_ln."}
    spellings = tuple(
        s.replace(ours, theirs)
        for s in entry.spellings
        for ours, theirs in places.items()
        if s.startswith(ours)
    )
    said = f"{entry.meaning[0].lower()}{entry.meaning[1:]}"
    said = "output of the last norm, which cross-attention reads." if entry.name == _LAST_NORM else said
    return replace(
        entry,
        name=_ENCODER + entry.name,
        meaning=f"In the encoder: {said}",
        spellings=spellings,
        condition=CROSS,
    )


SITES: dict[str, SiteEntry] = {
    entry.name: entry
    for entry in (*(_of_encoder(entry) for entry in TABLE if entry.name in _IN_ENCODERS), *TABLE)
}
"""Every site by name, in forward order."""

# TransformerLens calls blocks of an encoder-decoder `decoder.3`; they have three norms, the MLP's being the last.
_IN_DECODERS = (
    ("blocks.{}.ln2.", "decoder.{}.ln3."), ("blocks.{}.", "decoder.{}."), ("ln_final.", "decoder_final_ln."),
)  # fmt: skip


def _in_decoder(spelling: str) -> str:
    """A spelling as a decoder has it that stands beside an encoder."""
    ours, theirs = next((pair for pair in _IN_DECODERS if spelling.startswith(pair[0])), ("", ""))
    return theirs + spelling.removeprefix(ours)


_BY_SPELLING = {
    known: entry.name
    for entry in SITES.values()
    for spelling in entry.spellings
    # Without its layer: of all layers.
    for known in (spelling, spelling.removeprefix("blocks.{}."), _in_decoder(spelling))
}

# TransformerLens' `get_act_name`: a name, a layer, and for norms which norm ("z5", "pre5", "scale5ln1").
_SHORT = {name: name for name, entry in SITES.items() if entry.layered} | {
    "attn": "pattern", "attn_logits": "attn_scores", "query": "q", "key": "k", "value": "v",
    "pre": "mlp_pre", "pre_linear": "mlp_pre_linear", "post": "mlp_post",
    "scale-ln1": "ln1.scale", "scale-ln2": "ln2.scale",
    "normalized-ln1": "ln1.normalized", "normalized-ln2": "ln2.normalized",
}  # fmt: skip
_SHORT_FORM = re.compile(r"([a-z_]+?)(\d+)(?:(ln[12]))?")


def canonical(name: str) -> tuple[str, int | None]:
    """mechjax's name for a site, and the layer that the spelling names.

    Accepts TransformerLens names ("blocks.3.attn.hook_z", "attn.hook_z") and short forms ("z3", "scale3ln1"). Which
    site a Hugging Face module holds depends on the model, so of such a path ("transformer.h.3.mlp.output", or as
    nnsight writes it, "model.layers[3].output[0]") only the layer is taken out ("transformer.h.{}.mlp.output"): the
    sites that go by it say so. A suffix after `@` is kept ("z3@cotangent").

    Args:
        name: Any spelling.

    Returns:
        (name, layer), the layer None where the spelling has none. A name that the catalogue does not know comes back
        unchanged, so that functions with sites of their own are addressed by them.
    """
    base, at, suffix = name.partition("@")
    found, layer = _canonical(base)
    return found + at + suffix, layer


def spelled_out(name: str) -> tuple[str, int | None]:
    """`canonical`, but for short forms ("z3"), which a function's own site may be called."""
    return (name, None) if _SHORT_FORM.fullmatch(name.partition("@")[0]) else canonical(name)


def _canonical(name: str) -> tuple[str, int | None]:
    if name in SITES:
        return name, None
    if short := _SHORT_FORM.fullmatch(name):
        stem, layer, norm = short.groups()
        if known := _SHORT.get(f"{stem}-{norm}" if norm else stem):
            return known, int(layer)
    dotted = re.sub(r"\[(\d+)\]", r".\1", name)
    dotted = re.sub(r"\.(input|output)\.0$", r".\1", dotted)  # the first of a tuple
    layer = re.search(r"(?<=\.)\d+(?=\.)", dotted)
    pattern = f"{dotted[: layer.start()]}{{}}{dotted[layer.end() :]}" if layer else dotted
    known = _BY_SPELLING.get(pattern) or (pattern if re.search(r"\.(input|output)$", dotted) else None)
    return (name, None) if known is None else (known, int(layer.group()) if layer else None)
