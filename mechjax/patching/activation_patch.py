"""Activation patching (also causal tracing, interchange intervention). Which activations carry a behaviour?

Run the model on a corrupt prompt, but with one activation as it is on the clean prompt, and read a metric m:

    score[i] = m(f_corrupt with a_i <- a_i(clean))          for every place i of `over`      (mode "denoise")

Reference: Vig et al. (2020), "Causal mediation analysis for interpreting neural NLP", arXiv:2004.12265; Meng et al.
(2022), "Locating and editing factual associations in GPT", arXiv:2202.05262; best practice: Zhang and Nanda (2023),
arXiv:2309.16042.
Differs from the papers: nothing; every cell is exact, in one compiled program.
Cost: for a site of layer l, layers l to L once per cell, the unembedding only at the position and tokens that the
metric reads. Memory: `chunk_size` cells at a time, by default as many as fit in 256 MB of activations.
Exact: always.    Misleads when: patched activations lie off the distribution (arXiv:2309.16042), backups compensate
(Hydra effect, arXiv:2307.15771), or the metric saturates.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mechjax.base.catalogue import SITES
from mechjax.base.errors import ArgumentError
from mechjax.base.prompts import Prompts
from mechjax.metrics.metric import Metric
from mechjax.models.decoder import Decoder
from mechjax.models.readout import readout
from mechjax.models.resume import resume
from mechjax.patching.scores import PatchScores
from mechjax.tasks.pairing import paired
from mechjax.transform.edits import replace
from mechjax.transform.select import is_concrete
from mechjax.transform.swept import named_positions, swept_axes, swept_site
from mechjax.transform.transforms import capture, intervene

CHUNK_BYTES = (
    256e6  # activations of the cells that run at once; larger chunks are no faster on CPU (measured)
)
EMBEDS = frozenset({"embed", "pos_embed"})
TAIL = frozenset({"ln_final.scale", "ln_final.normalized", "logits"})


class _Rest(eqx.Module):
    """The model from a residual stream (or from its tokens) to the logits that a metric reads."""

    model: Decoder
    at: Int[Array, "*batch"]
    tokens: Int[Array, "*batch k"] | None
    embeds: bool = eqx.field(static=True)
    unembeds: bool = eqx.field(static=True)

    def __call__(self, start: Array, layer: Any, mask: Any) -> Float[Array, "*batch token"]:
        resid = self.model.embed(start, mask=mask) if self.embeds else start
        resid = resume(self.model, layer).blocks(resid, mask=mask)
        if not self.unembeds:
            return readout(self.model, resid, self.at, self.tokens)
        logits = self.model.unembed(resid)
        read = jnp.take_along_axis(logits, self.at[..., None, None], -2)[..., 0, :]
        return read if self.tokens is None else jnp.take_along_axis(read, self.tokens, -1)


def activation_patch(
    model: Decoder,
    clean: Prompts | Any,
    corrupt: Prompts | Any,
    metric: Metric,
    *,
    site: str,
    over: Sequence[str] = ("layer", "pos"),
    positions: Mapping[str, Int[Array, " batch"]] | None = None,
    mode: Literal["denoise", "noise"] = "denoise",
    chunk_size: int | None = None,
) -> PatchScores:
    """Patch every place of a site, one at a time, and read the metric.

    Args:
        model: The decoder.
        clean: Prompts that show the behaviour, `Prompts` or ids (batch, pos).
        corrupt: Prompts that do not, with the same tokens at the same places.
        metric: A metric of `mechjax.metrics`: one number per example.
        site: The site to patch, such as "resid_pre", "z" or "mlp_post".
        over: The axes to sweep: "layer" and any of the site's axes ("pos", "head", "d_mlp", ...). Axes left out are
            patched whole; without "layer", all layers at once.
        positions: Named positions, one per example, to sweep in place of every column ("pos" must be in `over`).
        mode: "denoise" puts clean activations into the corrupt run, "noise" corrupt ones into the clean run.
        chunk_size: Cells that run at once; None plans it from their memory.

    Returns:
        The scores, `[*over]`, with the metric of both runs.

    Raises:
        SiteError: a site or axis that this model does not have.
        PairingError: clean and corrupt that do not line up.
        ShapeError: answers for another number of examples.
        ArgumentError: an unknown mode, or a chunk size below 1.
    """
    if mode not in ("denoise", "noise"):
        raise ArgumentError(
            f"mode={mode!r}: expected 'denoise' (clean into corrupt) or 'noise' (corrupt into clean)."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"chunk_size={chunk_size}: at least one cell must run at once.")
    (ids, mask), (other, _) = paired(clean, corrupt, model.config)
    info = swept_site(model, site, ids)
    name, axes = info.name, swept_axes(info, over, positions)
    at = metric.where((ids.shape[0],), ids.shape[1], mask)
    columns = metric.tokens()
    columns = None if columns is None else jnp.broadcast_to(columns, (ids.shape[0], columns.shape[-1]))
    rest = _Rest(model, at, columns, name in EMBEDS, name in TAIL)
    _check_tokens(metric, columns, model)
    sizes = tuple(len(positions) if a == "pos" and positions else info.size(a) for a in axes)
    named = named_positions(positions, ids)
    chunk = min(chunk_size or _plan(model, ids.shape), max(1, math.prod(sizes)))
    donor, base = (ids, other) if mode == "denoise" else (other, ids)
    scores, *runs = _sweep(
        rest, metric, donor, base, mask, named, site=name, over=tuple(over), sizes=sizes, chunk=chunk
    )
    of_clean, of_corrupt = runs if mode == "denoise" else runs[::-1]
    labels = (("pos", tuple(positions)),) if positions else ()
    return PatchScores(scores.mean(-1), scores, of_clean, of_corrupt, name, tuple(over), mode, labels)


def _check_tokens(metric: Metric, columns: Array | None, model: Decoder) -> None:
    if columns is None or not is_concrete(columns):
        return
    if int(columns.max(initial=0)) >= model.config.d_vocab:
        raise ArgumentError(
            f"the metric reads token {int(columns.max())}; the model has {model.config.d_vocab} tokens. Were the "
            "answers encoded with another tokenizer?"
        )


def _plan(model: Decoder, shape: tuple[int, ...]) -> int:
    """Cells whose activations fit in CHUNK_BYTES: the widest arrays of a block, twice (in and out)."""
    c, (batch, n_pos) = model.config, shape
    per_token = 2 * (c.d_mlp + 3 * c.d_model + c.n_heads * (c.d_head + 2 * n_pos))
    return max(1, int(CHUNK_BYTES / (per_token * batch * n_pos * model.W_E.dtype.itemsize)))


@eqx.filter_jit
def _sweep(rest: _Rest, metric: Metric, donor_ids: Array, base_ids: Array, mask: Any, named: Any, *, site: str,
           over: tuple[str, ...], sizes: tuple[int, ...], chunk: int) -> tuple[Array, Array, Array]:  # fmt: skip
    """Scores of every cell, per example, and the metric of the donor run and of the base run."""
    model, layers = rest.model, rest.model.config.n_layers
    stacked = SITES[site].layered
    # Both runs are one program with an axis in front, which compiles in half the time of two.
    both = jnp.stack([donor_ids, base_ids])
    at, columns, masks = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (2, *x.shape)), (rest.at, rest.tokens, mask)
    )
    whole = _Rest(model, at, columns, True, site in TAIL)
    wanted = [site, *{"resid_pre"} - {site}] + [f"blocks.{layers - 1}.hook_resid_post"] * (site in TAIL)
    logits, acts = capture(whole, wanted)(both, jnp.int32(0), masks)
    of_donor, of_base = metric.of(logits)
    donor, base = (
        {name: x[:, i] if acts.layers[name] else x[i] for name, x in acts.items()} for i in range(2)
    )
    swept = tuple(a for a in over if a != "layer")

    def cell(layer: Any, index: Array) -> Array:
        where: dict[str, Any] = dict(zip(swept, index, strict=True))
        if named is not None:
            where["pos"] = named[where["pos"]][:, None]  # one position per example
        edit = replace(site, donor[site], per_layer=stacked, layer=layer, **where)
        first = jnp.int32(0) if layer is None else layer
        if site in TAIL:
            return metric.of(intervene(rest, [edit])(base["resid_post"][-1], jnp.int32(layers), mask))
        start = base_ids if rest.embeds else base["resid_pre"][first]
        return metric.of(intervene(rest, [edit])(start, first, mask))

    cells = (
        jnp.indices(sizes).reshape(len(sizes), math.prod(sizes)).T
    )  # one cell of no indices where nothing is swept

    def group(layer: Any) -> Array:
        return _chunked(lambda index: cell(layer, index), cells, chunk)

    if "layer" not in over:
        scores = group(None).reshape(*sizes, -1)
    else:  # lax.map keeps a real branch per layer: layers before the start are skipped, in one program
        scores = jax.lax.map(group, jnp.arange(layers, dtype=jnp.int32)).reshape(layers, *sizes, -1)
        scores = jnp.moveaxis(scores, 0, over.index("layer"))
    return scores, of_donor, of_base


def _chunked(fn: Callable[[Array], Array], cells: Array, chunk: int) -> Array:
    """`vmap(fn)` over cells, `chunk` at a time; the last chunk is filled up with repeats."""
    n = cells.shape[0]
    n_chunks = -(-n // chunk)
    if n_chunks == 1:
        return jax.vmap(fn)(cells)
    even = -(-n // n_chunks)
    filled = jnp.take(cells, jnp.arange(n_chunks * even), axis=0, mode="clip").reshape(n_chunks, even, -1)
    out = jax.lax.map(jax.vmap(fn), filled)
    return out.reshape(n_chunks * even, *out.shape[2:])[:n]
