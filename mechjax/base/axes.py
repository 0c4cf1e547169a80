"""The names of axes: one vocabulary for annotations, sites, records and labels.

`label(("layer", "head", "pos"), (2, 3, 7))` is `"L2.H3 @ 7"`: the way results name a place in a model.
"""

from collections.abc import Mapping, Sequence

AXES: Mapping[str, str] = {
    "batch": "prompts",
    "pos": "positions in a prompt, one per token",
    "role": "positions by what stands there, such as the subject's second mention",
    "layer": "layers, counted from the input",
    "head": "attention heads (query heads, where they share keys and values)",
    "kv_head": "key and value heads",
    "query": "positions that attend",
    "key": "positions that are attended to",
    "d_model": "the residual stream",
    "d_head": "inside one head",
    "d_mlp": "neurons of an MLP",
    "d_vocab": "tokens of the vocabulary",
    "patch": "patches of an image, row by row from the top left",
    "d_class": "classes of images",
    "d_proj": "the space that images and texts share",
    "feature": "features of a dictionary",
    "expert": "experts of a mixture",
    "edge": "edges of a computational graph",
    "node": "nodes of a computational graph",
    "sender": "what writes along a path",
    "receiver": "what reads at its end",
    "effect": "total, direct and indirect effects",
    "source": "positions whose tokens a head copies from",
    "transcoder": "transcoders, by the layer that they stand in for",
    "dictionary": "dictionaries that were trained side by side",
    "known": "features of a world that are known",
    "path": "paths through latents",
    "step": "steps of a run, or of a path",
    "one": "a single number, kept as an axis",
}
"""Axis name -> what it counts."""

# How an index along an axis is written; what is not listed is written out as `axis=index`.
_PREFIX = {"layer": "L", "head": "H", "kv_head": "KV", "d_mlp": "N", "feature": "F", "expert": "E"}


def label(axes: Sequence[str], index: Sequence[int], names: Mapping[str, Sequence[str]] | None = None) -> str:
    """A readable name of one cell, such as `L2.H3 @ S2`.

    Args:
        axes: Axis names.
        index: One index per axis.
        names: For some axes, the name of each index (`{"pos": ("IO", "S1", "S2", "END")}`).
    """
    names = names or {}
    parts: list[str] = []
    place = ""
    for axis, i in zip(axes, index, strict=True):
        name = names[axis][i] if axis in names else None
        if axis in ("pos", "role"):
            place = f"@ {name or i}"
        elif axis == "receiver":
            place = f"-> {name or i}"
        elif name is not None:
            parts.append(name)
        elif axis in _PREFIX:
            parts.append(f"{_PREFIX[axis]}{i}")
        elif axis != "one":
            parts.append(f"{axis}={i}")
    return " ".join(part for part in (".".join(parts), place) if part) or "all"


def names_from_annotation(
    dims: str, n_dims: int, splice: Mapping[str, Sequence[str]]
) -> tuple[str, ...] | None:
    """Axis names of a field from its jaxtyping annotation, or None where the annotation does not tell.

    Args:
        dims: The annotation's axes, such as `"*over batch"`.
        n_dims: How many dimensions the value has.
        splice: What stands for a starred name, such as `{"over": ("layer", "pos")}`. A starred name that is not
            listed takes whatever dimensions are left.
    """
    words = dims.split()
    if "..." in words:
        return None
    starred = [w for w in words if w.startswith("*")]
    left = n_dims - (len(words) - len(starred)) - sum(len(splice.get(w[1:], ())) for w in starred)
    axes: list[str] = []
    for word in words:
        if not word.startswith("*"):
            axes.append(word)
        elif word[1:] in splice:
            axes.extend(splice[word[1:]])
        else:
            axes.extend([word[1:]] * left)
            left = 0
    return tuple(axes) if len(axes) == n_dims else None
