"""Every public function that takes a model, a dictionary or their activations, by name: what it gives of one case.

A row is called twice, with everything on one device and with everything split over a mesh, and must give the same.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import mechjax as mj
from mechjax.base.errors import WriteError
from mechjax.base.whole import whole
from mechjax.models.experts import Experts
from mechjax.models.structures import build
from tests.attribution.conftest import SMALL, redrawn
from tests.attribution.test_every_method import EVERY
from tests.attribution.transcoded import LLAMA, MLA

KEY = jax.random.key(5)
CONFIG = dataclasses.replace(SMALL, n_kv_heads=4)
PROMPTS = np.random.default_rng(2).integers(0, 20, (2, 4, 5)).astype(np.int32)
PROMPTS[:, :, 0] = np.arange(8).reshape(2, 4)  # no two activations are alike, so that none are tied
LABELS = np.arange(16) % 2 == 0
QUICK = ("forward", "capture", "edit", "activation_patch", "eap", "generate", "train")
"""Rows that run by default."""


class Case(NamedTuple):
    """What rows are given.

    Attributes:
        put: Where things go: `put(value)` of a module, `put(array, axes)`.
        mesh: What they are split over; None on one device.
        folder: Where files go, of all processes.
        model: A decoder with random parameters.
        pair: Clean and corrupt prompts.
        metric: Reads an answer of each.
    """

    put: Callable[..., Any]
    mesh: Any
    folder: Path
    model: Any
    pair: tuple[Any, Any]
    metric: Any

    @property
    def acts(self):
        """All that components wrote."""
        return mj.capture(self.model, mj.decompose.sites(self.model, neurons=True))(self.pair[0])[1]

    def drawn(self, seed, *shape, axes):
        """Normal numbers, split by the names of their axes."""
        return self.put(jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32), axes)

    def dictionary(self, kind=mj.dictionaries.TopK, **options):
        """Eight latents of the stream."""
        options = {"k": 3} if kind is mj.dictionaries.TopK else options
        return self.put(kind.init(d_model=8, n_features=8, key=KEY, **options))

    @property
    def rows(self):
        """Activations that labels can be read from."""
        drawn = np.random.default_rng(6).standard_normal((16, 8)).astype(np.float32)
        return self.put(drawn + 2 * LABELS[:, None] * np.eye(8, dtype=np.float32)[0], "batch d_model")


def case(put, mesh, folder):
    """The case with everything in its place."""
    metric = mj.metrics.logit_diff(np.array([1, 2, 3, 6], np.int32), np.array([4, 5, 4, 1], np.int32))
    return Case(
        put, mesh, folder, put(redrawn(CONFIG)), tuple(put(ids, "batch pos") for ids in PROMPTS), metric
    )


def of_method(name, c):
    return EVERY[name](c.model, c.pair, c.metric, mj.graph.build(c.model))


def of_any_function(method, c):
    """The model as a function of which nothing is known."""
    return method(eqx.Partial(c.model), *c.pair, c.metric, site="mlp_out", over=("layer", "pos"))


def other(config, c):
    """Another model."""
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(0.5 * rng.standard_normal(n), jnp.float32) for k, n in config.shapes.items()}
    return c.put(build(config, params))


def subject(config, c):
    """Logits and activations of another model."""
    given = c.pair[: len(config.inputs(1, 1))]
    if config.reads_pixels:
        pixels = np.random.default_rng(1).standard_normal(config.inputs(4, 0)[0].shape)
        given = (c.put(jnp.asarray(pixels, jnp.float32), "batch channel height width"),)
    out, acts = mj.capture(other(config, c), ["resid_post", "z"])(*given)
    return eqx.filter(out, eqx.is_array), acts["resid_post"], acts["z"]


def answered(c):
    """What an encoder-decoder generates."""
    edits = [mj.scale("encoder.z", 0.5, layer=1, head=2)]
    model = other(SUBJECTS["encoder-decoder"], c)
    found = mj.generate(model, c.pair[0], 3, edits=edits, capture=["cross_pattern"])
    return found.tokens, found.log_probs, found.acts["cross_pattern"]


def mamba(config, c):
    """Logits, states and an edit of one, of a state space model, which also goes on from a cache."""
    model, ids = other(config, c), c.pair[0]
    edit = mj.add("state", 1.0, layer=0, pos=1)
    out, acts = mj.capture(mj.intervene(model, edit), ["state", "mixer_out"])(ids)
    first, cache = model(ids[:, :4], cache=mj.models.StateCache.empty(config, 4))
    return out, acts["state"], acts["mixer_out"], first, model(ids[:, 4:], cache=cache)[0]


def continued(config, c):
    """What a state space model generates, with an edit of a state."""
    edits = [mj.add("state", 1.0, layer=0, pos=5)]
    found = mj.generate(other(config, c), c.pair[0], 3, edits=edits, capture=["state"])
    return found.tokens, found.log_probs, found.acts["state"]


def edited(c):
    """Every kind of edit, of them some with places and data."""
    means = mj.means(c.model, c.pair[1], ["mlp_post"], per="all")
    vector = np.linspace(-1, 1, 8).astype(np.float32)
    _, other = mj.capture(c.model, ["z"])(c.pair[1])
    edits = [
        mj.replace("z", other["z"][1], layer=1, head=3, pos=-1),
        mj.add("resid_post", vector, layer=0, pos=mj.per_example(np.array([1, 2, 1, 0]))),
        mj.scale("mlp_post", 0.5, layer=1),
        mj.zero("pattern", layer=0, head=2),
        mj.clamp("mlp_out", low=-1.0, high=1.0, layer=0),
        mj.project_out("resid_mid", vector, layer=1),
        mj.mean_ablate("mlp_post", means["mlp_post"][0], layer=0, d_mlp=[1, 5]),
        mj.resample("attn_out", other_of(c, "attn_out"), key=KEY, layer=0),
        mj.apply("resid_pre", halved, layer=1),
    ]
    return mj.intervene(c.model, edits)(c.pair[0])


def halved(x, info):
    return x / 2


def other_of(c, site):
    return mj.capture(c.model, [site])(c.pair[1])[1][site][0]


def padded(c):
    """A run of prompts of several lengths."""
    mask = np.arange(5) >= np.array([0, 1, 0, 2])[:, None]
    return c.model(c.put(mj.Prompts(jnp.asarray(PROMPTS[0]), jnp.asarray(mask))))


def cached(c):
    """Four tokens, then the last."""
    cache = mj.models.Cache.empty(c.model.config, 4, 5)
    first, cache = c.model(c.pair[0][:, :4], cache=cache)
    return first, c.model(c.pair[0][:, 4:], cache=cache)[0]


def gradients(c):
    metric = lambda logits: c.metric(logits).sum()
    return mj.value_and_grad_at(c.model, metric, ["resid_pre", "z"])(c.pair[0])


def generated(c, **how):
    found = mj.generate(
        c.model, c.pair[0], 3, edits=[mj.scale("z", 0.5, layer=1, head=2)], capture=["resid_post"], **how
    )
    return found.tokens, found.log_probs, found.acts["resid_post"]


def resumed(c):
    _, acts = mj.capture(c.model, ["resid_post"])(c.pair[0])
    return mj.models.resume(c.model, 1)(acts["resid_post"][0])


def decomposed(name, c, **how):
    return getattr(mj.decompose, name)(c.model, c.acts, **how)


def normed(c):
    acts = c.acts
    return mj.decompose.apply_norm(c.model, acts, mj.decompose.decompose_resid(c.model, acts))


def with_experts(name, c):
    model = c.put(redrawn(EXPERTS))
    acts = mj.capture(model, mj.decompose.sites(model))(c.pair[0])[1]
    return getattr(mj.decompose, name)(model, acts)


def repeated(name, c):
    """Prompts that say everything twice."""
    ids = np.random.default_rng(3).integers(0, 20, (4, 4)).astype(np.int32)
    return getattr(mj.heads, name)(c.model, c.put(np.concatenate((ids, ids), 1), "batch pos"))


def trained(c, **how):
    batches = [c.drawn(i, 16, 8, axes="batch d_model") for i in range(6)]
    return mj.dictlearn.train(
        c.dictionary(), batches, steps=6, learning_rate=1e-3, key=KEY, steps_per_call=3, mesh=c.mesh, **how
    ).dictionary


def trained_together(c):
    batches = [c.drawn(i, 16, 8, axes="batch d_model") for i in range(2)]
    several = [mj.dictionaries.TopK.init(d_model=8, n_features=8, k=k, key=KEY) for k in (2, 2)]
    found = mj.dictlearn.train_many(several, batches, steps=2, learning_rate=1e-3, mesh=c.mesh)
    return [one.dictionary for one in found]


def collected(c):
    """All rows, shuffled."""
    stream = mj.dictlearn.activations(
        c.model, list(c.pair), "resid_post", layer=0, batch=8, key=KEY, buffer=16
    )
    return list(stream)


def collected_of_any_function(c):
    """The same of a function of which nothing is known, and where latents of its rows are active."""
    model, texts = eqx.Partial(c.model), list(c.pair)
    stream = mj.dictlearn.activations(model, texts, "mlp_out", layer=1, batch=8, key=KEY, buffer=16)
    seen = mj.dicteval.contexts(model, texts, c.dictionary(), layer=1, site="mlp_out", n=3, sampled=2)
    return list(stream), seen


def stored(c):
    """Rows on disk, read again."""
    folder = c.folder / "store"
    store = mj.store.write(folder, c.model, list(c.pair), ["resid_post", "z"], shard_rows=16)
    return [mj.store.read(folder).rows(slice(None), site, layer=1) for site in ("resid_post", "z")], len(
        store
    )


def kept(c):
    """A record on disk, read again."""
    acts = mj.capture(c.model, ["z"])(c.pair[0])[1]
    return mj.restore(mj.save(acts, c.folder / "record"))


def refused(c):
    """A record that no folder can be made for, since a file stands there: all processes hear of it."""
    (c.folder / "file").write_bytes(b"")
    try:
        mj.save(mj.capture(c.model, ["z"])(c.pair[0])[1], c.folder / "file")
    except WriteError:
        return 1
    return 0


def loaded(c):
    """A model that ships, straight into the mesh."""
    return mj.models.parameters(mj.load("induction-2l", mesh=c.mesh)[0])


def printed(c):
    """What is shown of a record: numbers that read the same."""
    found = mj.patching.activation_patch(c.model, *c.pair, c.metric, site="resid_pre")
    if not repr(found) or not found._repr_html_():
        raise AssertionError("nothing is shown")
    return [value for _, value in found.top(3)]


def transcoded(name, c, **how):
    made = mj.dictionaries.JumpReLU.init(d_model=8, n_features=8, key=KEY)
    given = mj.attribution.stack_transcoders(
        c.model, {i: c.put(jax.tree.map(lambda x: x + 0.1, made)) for i in range(2)}
    )
    prompts = () if name in ("de_embedding", "transcoder_connections") else (c.pair[0],)
    found = getattr(mj.attribution, name)(c.model, given, *prompts, layer=1, feature=2, **how)
    return eqx.filter(found, eqx.is_inexact_array)


def measured(name, c):
    """Of a dictionary and labelled rows."""
    how = {"k": 2, "absorbers": 2} if name == "absorption" else {}
    return getattr(mj.dicteval, name)(c.dictionary(mj.dictionaries.ReLU), c.rows, LABELS, test=0.5, **how)


def detected(c):
    x = c.drawn(7, 16, 8, axes="batch d_model")
    return mj.dicteval.detection(c.dictionary(), [(x, x[:, :4] > 0)], jnp.eye(4, 8))


def told(metric, c):
    return metric(c.model(c.pair[0]))


def masked(c):
    graph = mj.graph.build(c.model)
    kept = jnp.linspace(0, 1, len(graph.edges))
    ablated = mj.graph.writes(c.model, c.pair[1])
    return mj.graph.masked_forward(c.model, c.pair[0], kept, ablated, graph=graph)


def masked_stream(c):
    graph = mj.graph.build(c.model)
    kept = jnp.linspace(0, 1, len(graph.edges))
    ablated = mj.graph.writes(c.model, c.pair[1])
    start = mj.capture(c.model, ["resid_pre"])(c.pair[0])[1]["resid_pre"][0]
    return mj.graph.masked_stream(c.model, start, kept, ablated, graph=graph)


EXPERTS = dataclasses.replace(CONFIG, **LLAMA, experts=Experts(n_experts=4, top_k=2, d_expert=8, layers=(1,)))
SUBJECTS = {
    "grouped keys": SMALL,
    "experts": EXPERTS,
    "encoder": mj.models.EncoderConfig(d_vocab=20, n_ctx=8, d_model=8, n_layers=2, n_heads=4, d_mlp=16),
    "encoder-decoder": mj.models.T5Config(d_vocab=20, d_model=8, n_layers=2, n_heads=4, d_mlp=16, tied=False),
    "vision transformer": mj.models.ViTConfig(
        image_size=(8, 6),
        patch_size=(2, 3),
        d_model=8,
        n_layers=2,
        n_heads=4,
        d_mlp=16,
        head="class",
        classes=("cat", "dog"),
    ),
    "latent attention": dataclasses.replace(CONFIG, **LLAMA | {"latent": MLA, "d_head": 5, "rotary_dim": 2}),
}

_MAMBA = {"d_vocab": 20, "d_model": 8, "n_layers": 2, "d_inner": 16, "d_state": 4}
MAMBAS = {
    "a Mamba": mj.models.MambaConfig(**_MAMBA, dt_rank=2),
    "a Mamba-2": mj.models.MambaConfig(**_MAMBA, mixer="mamba2", d_head=2, n_groups=2),
}

ROWS = {
    "forward": lambda c: c.model(c.pair[0]),
    "forward of padded prompts": padded,
    "forward with a cache": cached,
    "capture": lambda c: mj.capture(c.model, ["z", "pattern", "result", "mlp_post", "resid_post"])(c.pair[0]),
    "edit": edited,
    "run": lambda c: mj.run(c.model, c.pair[0], edits=[mj.zero("z", layer=1, head=2)], capture=["mlp_out"]),
    "list_sites": lambda c: sum(np.prod(s.shape) for s in mj.list_sites(c.model, c.pair[0]).values()),
    "value_and_grad_at": gradients,
    "means": lambda c: mj.means(c.model, list(c.pair), ["z", "mlp_post"]),
    "means of each position": lambda c: mj.means(c.model, c.pair[0], ["pattern", "resid_mid"], per="pos"),
    "generate": generated,
    "generate by drawing": partial(generated, temperature=0.7, key=KEY, top_k=5),
    "generate with an encoder-decoder": answered,
    **{f"generate with {name}": partial(continued, config) for name, config in MAMBAS.items()},
    "resume": resumed,
    "accumulated_resid": partial(decomposed, "accumulated_resid"),
    "apply_norm": normed,
    "decompose_resid": partial(decomposed, "decompose_resid"),
    "expert_results": partial(with_experts, "expert_results"),
    "full_decomposition": partial(decomposed, "full_decomposition"),
    "head_results": partial(decomposed, "head_results"),
    "logit_attribution": partial(decomposed, "logit_attribution", tokens=np.array([1, 2, 3, 6]), of="heads"),
    "neuron_results": partial(decomposed, "neuron_results"),
    "project": partial(decomposed, "project", onto=jnp.linspace(-1, 1, 8), of="everything"),
    "sites": lambda c: len(mj.decompose.sites(c.model, neurons=True)),
    "copying": lambda c: mj.heads.copying(c.model),
    **{n: partial(repeated, n) for n in ("detect_heads", "duplicate_token", "induction", "previous_token")},
    "in_context_learning": lambda c: mj.heads.in_context_learning(c.model, c.pair[0], early=1, late=3),
    **{n: partial(measured, n) for n in ("absorption", "sparse_probing", "targeted_probe_perturbation")},
    "spurious_correlation_removal": lambda c: mj.dicteval.spurious_correlation_removal(
        c.dictionary(mj.dictionaries.ReLU), c.rows, LABELS, np.arange(16) % 4 < 2, test=0.5
    ),
    "decoder_lens": lambda c: mj.dicteval.decoder_lens(c.model, c.dictionary(), n=3),
    "neighbours": lambda c: mj.dicteval.neighbours(c.dictionary(), n=3),
    "contexts": lambda c: mj.dicteval.contexts(c.model, list(c.pair), c.dictionary(), layer=1, n=3, sampled=2),
    "detection": detected,
    "loss_recovered": lambda c: mj.dicteval.loss_recovered(c.model, list(c.pair), {1: c.dictionary()}),
    "reconstruction": lambda c: mj.dicteval.reconstruction(
        c.dictionary(), [c.drawn(i, 16, 8, axes="batch d_model") for i in range(2)]
    ),
    "recovery": lambda c: mj.dicteval.recovery(c.dictionary(), c.drawn(1, 4, 8, axes="known d_model")),
    "activations": collected,
    "activations of any function": collected_of_any_function,
    "train": trained,
    "train_many": trained_together,
    "encode": lambda c: c.dictionary().encode(c.drawn(3, 16, 8, axes="batch d_model")),
    "decode": lambda c: c.dictionary()(c.drawn(3, 16, 8, axes="batch d_model")),
    "splice": lambda c: mj.dictionaries.splice(c.model, {1: c.dictionary()}, error=False)(c.pair[0]),
    "write": stored,
    "save": kept,
    "save to where nothing can be written": refused,
    "show": printed,
    "load": loaded,
    "fold_norm": lambda c: mj.models.fold_norm(c.model)(c.pair[0]),
    "center_unembed": lambda c: mj.models.center_unembed(c.model)(c.pair[0]),
    "center_writing": lambda c: mj.models.center_writing(c.model)(c.pair[0]),
    "fold_value_bias": lambda c: mj.models.fold_value_bias(c.model)(c.pair[0]),
    "refactor_qk_ov": lambda c: mj.models.refactor_qk_ov(c.model)(c.pair[0]),
    "ungroup_kv": lambda c: mj.models.ungroup_kv(c.put(redrawn(SMALL)))(c.pair[0]),
    "quantize": lambda c: mj.models.quantize(c.model)(c.pair[0]),
    "quantize in 4 bits": lambda c: mj.models.quantize(c.model, 4, group=4)(c.pair[0]),
    "dequantize": lambda c: mj.models.dequantize(mj.models.quantize(c.model, 4, group=4))(c.pair[0]),
    "ov": lambda c: mj.models.ov(c.model).norm,
    "qk": lambda c: mj.models.qk(c.model).norm,
    "composition": lambda c: mj.models.composition(c.model, "k"),
    "copying_score": lambda c: mj.models.copying_score(c.model),
    **{name: partial(told, metric) for name, metric in {
        "logit_diff": mj.metrics.logit_diff(1, 2), "nll": mj.metrics.nll(3), "prob": mj.metrics.prob(3),
        "rank": mj.metrics.rank(3), "kl": mj.metrics.kl(np.linspace(-1, 1, 80, dtype=np.float32).reshape(4, 20)),
    }.items()},
    "writes": lambda c: mj.graph.writes(c.model, c.pair[0]),
    "masked_forward": masked,
    "masked_stream": masked_stream,
    **{name: partial(of_method, name) for name in EVERY},
    "activation_patch of any function": partial(of_any_function, mj.patching.activation_patch),
    "attribution_patch of any function": partial(of_any_function, mj.attribution.attribution_patch),
    "integrated_gradients of any function": partial(of_any_function, mj.attribution.integrated_gradients),
    **{n: partial(transcoded, n) for n in (
        "circuit_paths", "de_embedding", "feature_attribution", "transcoder_connections"
    )},
    "head_attribution": partial(transcoded, "head_attribution", head=(1, 2)),
    **{f"capture of {name}": partial(subject, config) for name, config in SUBJECTS.items()},
    **{f"capture of {name}": partial(mamba, config) for name, config in MAMBAS.items()},
}  # fmt: skip
"""What is called: by the name of a public function, and perhaps how it is called."""


def found(name, c):
    """What a row gives, as arrays of numbers on the host, of all processes."""
    leaves = jax.tree.leaves(ROWS[name](c))
    return [whole(x) for x in leaves if eqx.is_array_like(x) and not is_key(x)]


def is_key(x):
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
