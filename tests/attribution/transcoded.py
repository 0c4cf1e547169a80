"""Small decoders with transcoders of every kind, and what is removed from a run in which all else is held."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import mechjax as mj
from mechjax.dictionaries import CrossLayerTranscoder, Gated, JumpReLU, ReLU, TopK
from mechjax.models import init
from mechjax.models.experts import Experts
from mechjax.models.latent import Latent

F = 6
LLAMA = {
    "norm": "rms", "positions": "rotary", "rotary_dim": 4, "mlp": "gated", "tied": False, "activation": "silu",
    "qkv_bias": False, "out_bias": False, "mlp_bias": False, "norm_bias": False,
}  # fmt: skip
MLA = Latent(q_rank=6, kv_rank=5, d_nope=3, d_rope=2, d_value=4)


HELD = {"threshold": 0.1, "bandwidth": 0.5, "coefficient": 1.0, "aux": 0.0, "multi": 0.0}


def drawn(make, seed, dtype, scale=0.5):
    """What `make` would make, with every array drawn, so that nothing is 0 by chance of its start."""
    rng = np.random.default_rng(seed)
    fresh = eqx.filter_eval_shape(make)

    def draw(path, leaf):
        name = getattr(path[-1], "name", "")
        if name in HELD:
            return jnp.full(leaf.shape, HELD[name], leaf.dtype)
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), dtype)

    return jax.tree_util.tree_map_with_path(draw, fresh)


def per_layer(kind, layers, dtype, d_out=8, **options):
    """A transcoder for each of some layers."""
    make = lambda: kind.init(
        d_model=8, n_features=F, d_out=d_out, key=jax.random.key(0), dtype=dtype, **options
    )
    return {i: drawn(make, 20 + i, dtype) for i in layers}


def jump_relu(dtype):
    return per_layer(JumpReLU, range(3), dtype, skip=True)


def top_k(dtype):
    return per_layer(TopK, (0, 2), dtype, k=3)


def relu(dtype):
    return per_layer(ReLU, range(3), dtype)


def gated(dtype):
    """Centred: what they write is taken from what they read."""
    made = per_layer(Gated, range(3), dtype)
    fields = lambda d: {f.name: getattr(d, f.name) for f in dataclasses.fields(d)}
    return {i: Gated(**fields(d) | {"centred": True}) for i, d in made.items()}


def cross_layer(dtype):
    options = {"n_layers": 3, "d_model": 8, "n_features": F, "skip": True, "dtype": dtype}
    return drawn(lambda: CrossLayerTranscoder.init(key=jax.random.key(0), **options), 3, dtype)


KINDS: dict[str, tuple[dict[str, Any], Any, str, Any]] = {
    "gpt2": ({}, jump_relu, "ln2.normalized", np.float64),
    "llama": (LLAMA, top_k, "ln2.normalized", np.float32),
    "parallel, cross-layer": (
        {"residual": "parallel_shared", "positions": "rotary"}, cross_layer, "ln2.normalized", np.float32,
    ),
    "norms after, gated": (
        {"norms": "both", "residual_scale": 0.7, "embed_norm": True}, gated, "ln2.normalized", np.float64,
    ),
    "stream": ({"residual": "parallel", "attn_sinks": True}, relu, "mlp_in", np.float32),
    "no norms": ({"norms": "none", "positions": "alibi"}, relu, "ln2.normalized", np.float32),
    "norms after alone": ({"norms": "post"} | LLAMA, top_k, "ln2.normalized", np.float32),
    "experts, latent attention": (
        LLAMA | {"experts": Experts(n_experts=4, top_k=2, d_expert=6, layers=(1, 2)), "latent": MLA,
                 "n_kv_heads": 4, "d_head": 5, "rotary_dim": 2}, top_k, "ln2.normalized", np.float32,
    ),
}  # fmt: skip


class Case(eqx.Module):
    """A model, its transcoders as users give them, and prompts padded at either side."""

    model: Any
    given: Any
    transcoders: Any
    ids: Any
    mask: Any

    @property
    def prompts(self):
        return mj.Prompts(jnp.asarray(self.ids), jnp.asarray(self.mask))

    @property
    def last(self):
        """The column of each prompt's last real token."""
        return np.array([np.flatnonzero(row)[-1] for row in self.mask])

    def dictionary(self, layer):
        """The transcoder of a layer; a cross-layer one as it is."""
        return self.given if isinstance(self.given, CrossLayerTranscoder) else self.given.get(layer)

    def encode(self, read):
        """Latents of all layers that have any, from what is read: {layer: (*batch, pos, feature)}."""
        if isinstance(self.given, CrossLayerTranscoder):
            f = self.given.encode(jnp.moveaxis(read, 0, -2))
            return {i: f[..., i, :] for i in range(3)}
        return {i: d.encode(read[i]) for i, d in self.given.items()}

    def encoder(self, layer, feature):
        """What a latent reads, and its bias, from its definition."""
        d = self.dictionary(layer)
        at = (layer,) if isinstance(d, CrossLayerTranscoder) else ()
        W, b = np.asarray(d.W_enc[(*at, slice(None), feature)]), np.asarray(d.b_enc[(*at, feature)])
        if isinstance(d, Gated):
            W, b = W * np.exp(np.asarray(d.r)[feature]), np.asarray(d.b_size)[feature]
        return W, b - (np.asarray(d.b_dec) @ W if d.centred else 0)

    def decoder(self, layer, to):
        """What latents of a layer write to another, or None."""
        if isinstance(self.given, CrossLayerTranscoder):
            return self.given.decoder(layer, to) if layer <= to else None
        return self.given[layer].W_dec if layer == to and layer in self.given else None

    def made(self, read):
        """What transcoders make of `mlp_out`, at the layers that have any."""
        if isinstance(self.given, CrossLayerTranscoder):
            out = self.given(jnp.moveaxis(read, 0, -2))
            return {i: out[..., i, :] for i in range(3)}
        return {i: d(read[i]) for i, d in self.given.items()}


def bare(small, **changes):
    """A model of shapes alone, for what is refused before anything runs."""
    return eqx.filter_eval_shape(init, small(**changes), key=jax.random.key(0))


def case(name, small):
    """A case by its name."""
    changes, make, reads, dtype = KINDS[name]
    config = small(n_layers=3, **changes)
    scale = 0.3 if config.norms == "none" else 0.8  # without norms a stream grows with its weights
    model = drawn(lambda: init(config, key=jax.random.key(0), dtype=dtype), 1, dtype, scale=scale)
    given = make(dtype)
    ids = np.random.default_rng(2).integers(0, 20, (3, 6)).astype(np.int32)
    mask = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
    stack = mj.attribution.stack_transcoders(model, given, reads=reads)
    return Case(model, given, stack, ids, mask)


class Held(eqx.Module):
    """A recorded run, and the same run with what was written, and the norms' scales, put in."""

    case: Case
    acts: Any
    site: str = eqx.field(static=True)
    scale: str | None = eqx.field(static=True)

    @staticmethod
    def of(case):
        """The run of a case's prompts."""
        config, have = case.model.config, mj.list_sites(case.model, case.ids)
        name = "ln1" if config.residual == "parallel_shared" else "ln2"
        normed = case.transcoders.reads == "ln2.normalized" and f"{name}.normalized" in have
        stream = "resid_mid" if config.residual == "serial" else "resid_pre"
        names = [
            "embed",
            "pos_embed",
            "attn_out",
            "mlp_out",
            "pattern",
            "v",
            "z",
            "ln1.scale",
            "ln1_post.scale",
        ]
        site, scale = (f"{name}.normalized", f"{name}.scale") if normed else (stream, None)
        names = [n for n in dict.fromkeys([*names, site, scale]) if n and n in have]
        return Held(case, mj.capture(case.model, names)(case.prompts)[1], site, scale)

    @property
    def read(self):
        """What transcoders read."""
        return self.acts[self.site]

    def again(self, *, head=None, **changed):
        """What transcoders read where some of what was written is something else.

        All that reads it is held, but for one head, if there is one: it looks where it did and moves what it now finds.
        """
        written = [n for n in ("embed", "pos_embed", "attn_out", "mlp_out") if n in self.acts]
        values = {n: changed.get(n, self.acts[n]) for n in written}
        values |= {self.scale: self.acts[self.scale]} if self.scale else {}
        where = {}
        if head is not None:
            frozen = [n for n in ("pattern", "ln1.scale", "ln1_post.scale") if n in self.acts]
            values |= {n: self.acts[n] for n in frozen}
            where["attn_out"] = {"layer": [i for i in range(3) if i != head[0]]}
        edits = [
            mj.replace(n, x, per_layer=self.acts.layers[n] is not None, **where.get(n, {}))
            for n, x in values.items()
        ]
        if head is not None:
            others = np.arange(4) != head[1]
            edits.append(mj.replace("z", self.acts["z"][head[0]], layer=head[0], head=others))
        return mj.capture(mj.intervene(self.case.model, edits), [self.site])(self.case.prompts)[1][self.site]

    def loss(self, layer, feature, at, **changed):
        """What a latent's pre-activation at `at` loses by a change, in each example."""
        W, _ = self.case.encoder(layer, feature)
        rows = np.arange(len(at))
        lost = np.asarray(self.read[layer]) - np.asarray(self.again(**changed)[layer])
        return lost[rows, at] @ W

    def loss_through(self, head, layer, feature, at, **changed):
        """What it loses by what a head moves alone."""
        directly = self.loss(layer, feature, at, **changed)
        return self.loss(layer, feature, at, head=head, **changed) - directly

    def without(self, site, layer, vectors):
        """A written site less vectors at one layer (or, without layers, less them)."""
        if self.acts.layers[site] is None:
            return {site: self.acts[site] - vectors}
        return {site: self.acts[site].at[layer].add(-vectors)}

    def head_write(self, layer, head, source):
        """What a head adds to the stream from one source: what is lost where it does not look there."""
        edits = [mj.zero("pattern", layer=layer, head=head, key=source)]
        if "ln1_post.scale" in self.acts:
            edits.append(mj.replace("ln1_post.scale", self.acts["ln1_post.scale"], per_layer=True))
        blind = mj.capture(mj.intervene(self.case.model, edits), ["attn_out"])(self.case.prompts)[1]
        return self.acts["attn_out"][layer] - blind["attn_out"][layer]


METHODS = {
    "circuit_paths", "de_embedding", "feature_attribution", "head_attribution", "stack_transcoders",
    "transcoder_connections",
}  # fmt: skip
"""Of latents of transcoders, in one run: no clean and corrupt side, and no metric."""
