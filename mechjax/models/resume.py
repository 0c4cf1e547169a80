"""Run a decoder from any residual at any layer, so that a sweep recomputes only what its edit can change.

Scans the layer counter alone and indexes the stacked weights inside the taken branch: weights scanned beside a `cond`
are copied even where they are skipped. Under `vmap` over layers the branch becomes a select and every layer runs: map
over layers with `lax.map` and over everything else with `vmap`. Reverse mode through a resumed run costs about 2.3
times the residual memory of a plain one: gradients use the whole model.

In a causal model what changes at a position changes nothing before it. With the keys and values of the unchanged run,
only the positions from a static `start` on run again. Exact, but for the order of sums.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError, SiteError
from mechjax.base.meshes import on_any_mesh
from mechjax.models.cache import Cache, Keys, Prefix
from mechjax.models.decoder import Decoder
from mechjax.models.marks import unmarked
from mechjax.models.positions import Sequence, arrange
from mechjax.models.segments import kinds_of


class Resumed(eqx.Module):
    """A decoder that starts at `layer`, whose sites are the model's from there on.

    Attributes:
        model: The decoder.
        layer: The first layer that runs.
        cache: Keys and values of the whole unchanged run; None where every position runs.
        start: The first position that runs (static).
    """

    model: Decoder
    layer: Int[Array, ""]
    cache: Cache | None = None
    start: int = eqx.field(static=True, default=0)

    @on_any_mesh
    def __call__(
        self,
        resid: Float[Array, "*batch pos d_model"],
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
    ) -> Float[Array, "*batch pos d_vocab"]:
        """Logits, given the residual stream that enters `layer` (its `resid_pre`), from position `start` on.

        Raises:
            ShapeError: A stream that does not go with the cache.
            ArgumentError: A mask or positions beside a cache, which has them.
        """
        return _unembedded(self, resid, mask, positions)

    def blocks(
        self,
        resid: Float[Array, "*batch pos d_model"],
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
    ) -> Float[Array, "*batch pos d_model"]:
        """The final residual stream, not unembedded: `model.unembed` it where the logits are read."""
        return _blocks(self, resid, mask, positions)

    def final(
        self,
        resid: Float[Array, "*batch pos d_model"],
        at: Int[Array, "*batch"],
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
    ) -> Float[Array, "*batch 1 d_model"]:
        """`blocks` at one position per example, counted from `start`; past the end reads NaN.

        The last layer forms keys and values everywhere, and all else only there. So it has sites only where it is the
        layer resumed at, which then runs whole.
        """
        return _final(self, resid, at, mask, positions)


def resume(
    model: Decoder, layer: Int[Array, ""] | int, *, cache: Cache | None = None, start: int = 0
) -> Resumed:
    """The rest of `model` from `layer` on and, in a causal model, from a position on.

    Args:
        model: The decoder.
        layer: First layer that runs, from 0 to n_layers (which only unembeds); may be traced.
        cache: What `model(tokens, cache=Cache.empty(...))` gave back of the unchanged run, with its mask.
        start: First position that runs. What stands before it is read from the cache.

    Returns:
        A callable from the residual stream entering `layer`, from position `start` on, to logits;
        `resume(model, 0)(model.embed(tokens))` is `model(tokens)`. Its sites count positions as the model's do: those
        before `start` read NaN, and an edit of any of them is a miss, which makes what comes out NaN.

    Raises:
        SiteError: A layer that the model does not have, where it can be seen, or a position that the cache has not.
        ArgumentError: A start without a cache, or a model whose earlier tokens see later ones.
    """
    if not isinstance(model, Decoder):
        raise ArgumentError(
            f"resume takes a decoder, got {type(model).__name__}. An edit runs the whole model: "
            '`mj.intervene(model, mj.replace("resid_pre", value, layer=3))`.'
        )
    n_layers = model.config.n_layers
    if isinstance(layer, int) and not 0 <= layer <= n_layers:
        raise SiteError(
            f"Cannot resume at layer {layer}: the model has {n_layers}, so 0 to {n_layers} are possible."
        )
    if cache is None and start:
        raise ArgumentError(
            f"Cannot resume at position {start} without keys and values of the positions before it: pass "
            "`cache=`, which `model(tokens, cache=Cache.empty(...))` gives back."
        )
    if cache is not None and not model.config.causal:
        raise ArgumentError(
            "Cannot resume at a position: in this model (`causal` = False) tokens see those after them, so an edit "
            "changes the positions before it too. Resume at a layer alone."
        )
    if cache is not None and not 0 <= start < cache.n_slots:
        raise SiteError(
            f"Cannot resume at position {start}: the cache has {cache.n_slots}, so 0 to {cache.n_slots - 1} are "
            "possible."
        )
    return Resumed(model, jnp.asarray(layer, jnp.int32), cache, start)


class _Given(Keys):
    """Keys and values of every token in one layer; those that are missing are taken from what it is extended by."""

    before: Prefix | None = None
    k: Float[Array, "*batch key kv_head d_head"] | None = None
    v: Float[Array, "*batch key kv_head d_value"] | None = None

    def extend(self, layer: Any, k: Array, v: Array) -> tuple[Array, Array, "_Given"]:
        """Those given, or those before and `k` and `v`, which are then given."""
        if self.k is not None and self.v is not None:
            return self.k, self.v, self
        if self.before is not None:
            k, v, _ = self.before.extend(layer, k, v)
        return k, v, _Given(self.before, k, v)


@eqx.filter_jit
def _blocks(resumed: Resumed, resid: Array, mask: Array | None, positions: Array | None) -> Array:
    before, sequence = arranged(resumed, resid, mask, positions)
    return _layers(resumed, resid, before, sequence, lambda layer: layer >= resumed.layer)


@eqx.filter_jit
def _final(resumed: Resumed, resid: Array, at: Array, mask: Array | None, positions: Array | None) -> Array:
    first, last = resumed.layer, resumed.model.config.n_layers - 1
    before, sequence = arranged(resumed, resid, mask, positions)
    resid = _layers(resumed, resid, before, sequence, lambda i: (i >= first) & ((i < last) | (first == last)))
    there = lambda resid: read_at(resid, at)
    return lax.cond(first < last, lambda x: last_at(resumed.model, x, at, before, sequence), there, resid)


def last_at(
    model: Decoder,
    resid: Float[Array, "*batch pos d_model"],
    at: Int[Array, "*batch"],
    before: Prefix | None,
    sequence: Sequence,
) -> Float[Array, "*batch 1 d_model"]:
    """The last layer of a stream that enters it, at one position per example; keys and values it forms everywhere."""
    config, last = model.config, model.config.n_layers - 1
    block, here = model.of_kind(last, kinds_of(config)[last])
    # What the first call makes beside keys and values is not used, so the compiler leaves it out.
    _, keys = block(resid, sequence, here, last, config, _Given(before), unmarked)
    there = sequence.only(at.clip(max=resid.shape[-2] - 1), config)
    return block(read_at(resid, at), there, here, last, config, keys, unmarked)[0]


def read_at(
    resid: Float[Array, "*batch pos d_model"], at: Int[Array, "*batch"]
) -> Float[Array, "*batch 1 d_model"]:
    """A stream at one position per example; past the end it reads NaN."""
    return jnp.take_along_axis(resid, at[..., None, None], -2, mode="fill", fill_value=jnp.nan)


def _layers(resumed: Resumed, resid: Array, before: Prefix | None, sequence: Sequence, runs: Any) -> Array:
    """The stream after those layers that run."""
    model = resumed.model

    def step(resid: Array, layer: Array) -> tuple[Array, None]:
        run = lambda x: model.block(x, layer, sequence, cache=before)
        return lax.cond(runs(layer), run, lambda x: x, resid), None

    return lax.scan(step, resid, jnp.arange(model.config.n_layers, dtype=resumed.layer.dtype))[0]


def arranged(
    resumed: Resumed, resid: Array, mask: Array | None, positions: Array | None
) -> tuple[Prefix | None, Sequence]:
    """Keys and values of what is not run again, and where the tokens stand."""
    model, n_pos = resumed.model, resid.shape[-2]
    if (before := _before(resumed, resid, mask, positions)) is None:
        return None, model.arrange(n_pos, mask=mask, positions=positions)
    return before, arrange(model.config, n_pos, None, None, before)


def _before(resumed: Resumed, resid: Array, mask: Array | None, positions: Array | None) -> Prefix | None:
    """Keys and values of the positions that do not run."""
    cache = resumed.cache
    if cache is None:
        return None
    if mask is not None or positions is not None:
        raise ArgumentError(
            "A cache knows the mask and the positions of its run: leave `mask=` and `positions=` out."
        )
    n_pos, batch = resumed.start + resid.shape[-2], cache.real.shape[:-1]
    if resid.shape[:-2] != batch or n_pos > cache.n_slots:
        raise ShapeError(
            f"A stream of shape {resid.shape} from position {resumed.start} on, with a cache of {cache.n_slots} "
            f"positions and batch axes {batch}: give `resid_pre` of the same run, its positions from "
            f"{resumed.start} to {cache.n_slots}."
        )
    return cache.before(resumed.start, n_pos)


@eqx.filter_jit
def _unembedded(resumed: Resumed, resid: Array, mask: Array | None, positions: Array | None) -> Array:
    return resumed.model.unembed(_blocks(resumed, resid, mask, positions), resumed.start)
