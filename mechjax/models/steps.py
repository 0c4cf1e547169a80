"""Edits of a run that goes step by step: which act on the prompts, which at which generated token.

One axis of positions runs through a generation: the slots of the prompts as they were given, then one for each
generated token but the last, which is chosen and never run. Negative positions count from the prompts' end, so an edit
that was made for a call of the model on the prompts does the same thing here.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mechjax.base.errors import ArgumentError, ShapeError, SiteError
from mechjax.base.whole import whole
from mechjax.transform.changes import RAW
from mechjax.transform.edits import Edit
from mechjax.transform.select import aligned, as_index, is_concrete
from mechjax.transform.table import SiteInfo

PLACES = ("pos", "query")
"""Axes along which a site has a row for each token that runs."""
_CROSSED = ("cross_attn_scores", "cross_pattern")


class AtSteps(eqx.Module):
    """Edits that act at some generated tokens only; made by `at_steps`."""

    edits: tuple[Edit, ...]
    steps: Int[Array, "..."]


class Timed(eqx.Module):
    """An edit taken apart.

    Attributes:
        prompt: The edit of the prompts; None where it acts on none of their slots.
        step: The edit of one generated token; None where it acts on none.
        gate: At which generated tokens. Shape (step, *batch, 1); None for all.
        axis: The site's axis that the gate selects along (static).
        there: Whether every place that the edit names is there.
        at_prompt: Whether it names a slot of the prompts.
    """

    prompt: Edit | None
    step: Edit | None
    gate: Bool[Array, "step *batch 1"] | None
    axis: str = eqx.field(static=True)
    there: Bool[Array, ""]
    at_prompt: Bool[Array, ""]


def at_steps(edits: Edit | Sequence[Edit], steps: int | Sequence[int] | Int[Array, "..."]) -> AtSteps:
    """Edits that act while chosen generated tokens run, and nowhere else: for `generate(..., edits=[...])`.

    Args:
        edits: An edit or several, without `pos=`.
        steps: Which generated tokens, counted from 0: one, a list, a range, or an integer array. While token t runs,
            token t + 1 is chosen, so the first that such an edit can change is token 1; the prompts' last position
            chooses token 0.

    Raises:
        ArgumentError: An edit that says `pos=` too.
    """
    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    for edit in edits:
        for axis in PLACES:
            if axis in edit.index:
                raise ArgumentError(
                    f"at_steps: {edit.describe()} already says where with `{axis}=`, and `steps` says it again. Leave "
                    "one of them out."
                )
    index = as_index(list(steps) if isinstance(steps, range) else steps, "at_steps, steps")
    if index.dtype == jnp.bool_ or index.ndim > 1:
        raise ShapeError(
            f"at_steps: `steps` must be one integer or a list of them, got {index.dtype} of shape {index.shape}."
        )
    return AtSteps(edits, jnp.atleast_1d(index))


def flat(edits: Edit | AtSteps | Sequence[Edit | AtSteps]) -> list[tuple[Edit, Array | None]]:
    """Every edit in order, with its steps or None.

    Raises:
        ArgumentError: Something that is no edit.
    """
    pairs: list[tuple[Edit, Array | None]] = []
    for each in [edits] if isinstance(edits, (Edit, AtSteps)) else edits:
        if isinstance(each, AtSteps):
            pairs += [(edit, each.steps) for edit in each.edits]
        elif isinstance(each, Edit):
            pairs.append((each, None))
        else:
            raise ArgumentError(
                f"generate takes edits such as mechjax.zero('z', layer=0), or at_steps(...) of them; got "
                f"{type(each).__name__}."
            )
    return pairs


def place_of(info: SiteInfo) -> str:
    """The axis of a site along which tokens stand.

    Raises:
        SiteError: It has none.
    """
    for axis in PLACES:
        if axis in info.axes:
            return axis
    raise SiteError(
        f"site `{info.name}` has the axes {info.axes}, none of which is `pos` or `query`, so it has no part of a "
        "generated token. Edit or capture it in a call of the model."
    )


def taken_apart(edit: Edit, steps: Array | None, prompt: SiteInfo, step: SiteInfo, n_steps: int) -> Timed:
    """How an edit acts on the prompts, and on the generated tokens that run.

    Args:
        edit: The edit.
        steps: The generated tokens of `at_steps`; None where the edit itself says where.
        prompt: Its site when the prompts run.
        step: Its site when one generated token runs.
        n_steps: How many generated tokens run.

    Raises:
        SiteError: A position or step that is not there.
        ShapeError: A value with a row for each slot of the prompts, for generated tokens.
    """
    axis, always = place_of(prompt), jnp.bool_(True)
    n_prompt = prompt.size(axis)
    n_slots = n_prompt + n_steps
    slots = jnp.arange(n_slots)
    edit = _from_the_end(edit, n_prompt)
    if steps is not None:
        _check(f"at_steps: {edit.describe()}, step", steps, n_steps, n_steps)
        there = jnp.all((steps >= 0) & (steps < n_steps))
        gate = _among(steps, slots[:n_steps])
        return Timed(None, _of_a_token(edit, step, axis), gate, axis, there, ~always)
    index, spread = edit.index.get(axis), _spread(edit, prompt, axis)
    if index is None and not spread:
        return Timed(edit, _of_a_token(edit, prompt, None), None, axis, always, always)
    if index is None or index.dtype == jnp.bool_:  # a mask of the prompts' slots, or a value for each of them
        return Timed(edit, None, None, axis, always, always)
    _check(f"{edit.describe()}, {axis}", index, n_slots, n_steps)
    index = jnp.atleast_1d(index)
    inside = bool(jnp.all(index < n_prompt)) if is_concrete(index) else spread
    if spread and not inside:
        raise ShapeError(
            f"{edit.describe()}: its value has a row for each of the prompts' {n_prompt} slots, and says nothing of "
            f"generated tokens. Give `{axis}=` within the prompts, or a value without that axis."
        )
    there = jnp.all((index >= 0) & (index < (n_prompt if inside else n_slots)))
    mask = jnp.moveaxis(_among(index, slots[:n_prompt])[..., 0], 0, -1)
    on_prompt = eqx.tree_at(lambda e: e.index, edit, edit.index | {axis: mask})
    if inside:
        return Timed(on_prompt, None, None, axis, there, always)
    gate = _among(index, slots[n_prompt:])
    return Timed(on_prompt, _of_a_token(edit, prompt, None), gate, axis, there, mask.any())


def of_prompts_alone(edit: Edit, steps: Array | None, info: SiteInfo) -> Timed:
    """How an edit acts of a site that generated tokens have no part of.

    Raises:
        SiteError: It names generated tokens.
    """
    if steps is not None:
        raise SiteError(
            f"at_steps: {edit.describe()}: `{info.name}` is computed once, before any token is generated. Edit it "
            "without at_steps, or a site of the decoder."
        )
    always = jnp.bool_(True)
    return Timed(edit, None, None, place_of(info), always, always)


def within_prompts(edit: Edit, info: SiteInfo) -> Edit:
    """The edit with positions of generated tokens moved into the prompts: everything else can be checked of it."""
    last = {axis: info.size(axis) - 1 for axis in PLACES if axis in info.axes}
    index = {
        axis: jnp.minimum(i, last[axis]) if axis in last and i.dtype != jnp.bool_ else i
        for axis, i in edit.index.items()
    }
    return eqx.tree_at(lambda e: e.index, edit, index)


def _of_a_token(edit: Edit, info: SiteInfo, added: str | None) -> Edit:
    """The edit without its place, its values with all axes, so that one token can mean nothing else by them."""
    indexed = (*edit.index, added) if added else tuple(edit.index)

    def whole(value: Any) -> Any:
        one = value[0] if edit.per_layer else value
        shape = aligned(one, info, indexed, edit.describe())
        return value.reshape((len(value), *shape) if edit.per_layer else shape)

    values = edit.value if edit.kind in RAW else tuple(map(whole, edit.value))
    index = {axis: i for axis, i in edit.index.items() if axis not in PLACES}
    return eqx.tree_at(lambda e: (e.value, e.index), edit, (values, index))


def _spread(edit: Edit, info: SiteInfo, axis: str) -> bool:
    """Whether a value of the edit has a row for each slot of the prompts."""
    if edit.kind in RAW:
        return False
    ones = [value[0] if edit.per_layer else value for value in edit.value]
    shapes = [aligned(one, info, tuple(edit.index), edit.describe()) for one in ones]
    return any(shape[info.n_batch + info.axes.index(axis)] > 1 for shape in shapes)


def _from_the_end(edit: Edit, n_prompt: int) -> Edit:
    """The edit with negative positions resolved; keys of cross-attention are another text's, which does not grow."""
    grow = PLACES if edit.site in _CROSSED else (*PLACES, "key")
    index = {
        axis: jnp.where(i < 0, i + n_prompt, i) if axis in grow and i.dtype != jnp.bool_ else i
        for axis, i in edit.index.items()
    }
    return eqx.tree_at(lambda e: e.index, edit, index)


def _among(index: Int[Array, "*batch k"], slots: Int[Array, " slot"]) -> Bool[Array, "slot *batch 1"]:
    """Whether each slot is among the indices."""
    return jnp.moveaxis((index[..., None, :] == slots[:, None]).any(-1), -1, 0)[..., None]


def _check(what: str, index: Array, size: int, n_steps: int) -> None:
    if not is_concrete(index):
        return
    numbers = whole(index)
    wrong = numbers[(numbers < 0) | (numbers >= size)]
    if wrong.size:
        raise SiteError(
            f"{what} {wrong.ravel()[0]} is out of range: 0 to {size - 1} are there, of which the last {n_steps} are "
            "the generated tokens that run (all but the last one, which is chosen and never run). Generate more "
            "tokens, or name one of these."
        )
