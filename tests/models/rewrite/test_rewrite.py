"""Every rewrite on every family: the same logits or a refusal, and twice equals once."""

from dataclasses import dataclass, fields, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import UnsupportedModelError
from mechjax.models import Config, Decoder, assemble, parameters
from mechjax.models.rewrite import (
    center_unembed,
    center_writing,
    fold_norm,
    fold_value_bias,
    premises,
    refactor_qk_ov,
    ungroup_kv,
)
from tests.models.rewrite.subjects import (
    CONFIGS,
    NAMES,
    TOKENS,
    assert_close,
    drawn,
    spelled_out,
    subject,
)
from tests.tolerances import TOL


def sunk_or_clipped(config: Config) -> list[str]:
    return ["`attn_sinks`"] if config.attn_sinks else ["`qkv_clip`"] * (config.qkv_clip is not None)


REFUSED = {
    fold_norm: lambda config: (
        [f"`{choice}`" for choice in ("experts", "latent") if getattr(config, choice)][:1] * config.norm_bias
    ),
    center_writing: lambda config: (
        [f"`norm` = '{config.norm}'"] if config.norm == "rms"
        else [f"`norms` = '{config.norms}'"] if config.norms != "pre"
        else ["`embed_norm` = True"] if config.embed_norm else []
    ),
    center_unembed: lambda config: ["`final_softcap`"] if config.final_softcap else [],
    fold_value_bias: lambda config: sunk_or_clipped(config) if config.qkv_bias else [],
    refactor_qk_ov: lambda config: (
        ["`positions` = 'rotary'"] * any(config.ropes) + ["`qk_norm`"] * (config.qk_norm != "none")
        + ["`qkv_clip`"] * (config.qkv_clip is not None) + ["`latent`"] * (config.latent is not None)
        or ["`attn_sinks`"] * (config.attn_sinks and config.qkv_bias)
        or [f"`n_kv_heads` = {config.n_kv_heads} for `n_heads` = {config.n_heads}"]
        * (config.n_kv_heads != config.n_heads)
    ),
    ungroup_kv: lambda config: (),
}  # fmt: skip
"""Rewrite -> what it names in refusing a model of that config; nothing where it applies."""
EXACT = {fold_norm, fold_value_bias, refactor_qk_ov, ungroup_kv}
"""Those that change no bit a second time; the others round."""

every_rewrite = pytest.mark.parametrize("rewrite", REFUSED, ids=lambda rewrite: rewrite.__name__)


def refused(rewrite, config):
    """What the message must name, or nothing."""
    return REFUSED[rewrite](config)


@cache
def reference(name):
    return np.asarray(spelled_out(subject(name))(TOKENS))


def log_probs(logits):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))


def assert_same(one: Decoder, other: Decoder, **tolerance: float) -> None:
    assert one.config == other.config
    one, other = parameters(one), parameters(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert_allclose(leaf, other[path], err_msg=path, **tolerance)


@every_rewrite
@pytest.mark.parametrize("name", NAMES)
def test_rewrite__every_family__keeps_what_it_says_or_refuses(name, rewrite):
    model = subject(name)
    if named := refused(rewrite, model.config):
        asked = (
            "fold_value_bias" if "`attn_sinks`" in named else rewrite.__name__
        )  # the step that cannot be taken
        with pytest.raises(UnsupportedModelError, match=rf"`{asked}` cannot be applied .*: .*\. \w") as error:
            rewrite(model)
        assert all(choice in str(error.value) for choice in named)
        return
    once = rewrite(model)
    shapes = {path: shape for path, shape in once.config.shapes.items() if 0 not in shape}
    assert {path: leaf.shape for path, leaf in parameters(once).items()} == shapes
    assert_same(rewrite(once), once, **TOL[("any", "exact") if rewrite in EXACT else ("float32", "law")])
    logits = spelled_out(once)(TOKENS)
    if rewrite is center_unembed:
        assert_close(log_probs(logits), log_probs(reference(name)))
        unit = np.abs(logits).max()
        assert_allclose(logits.mean(-1) / unit, np.zeros(TOKENS.shape), **TOL["float32", "parity"])
    else:
        assert_close(logits, reference(name))


CONTROLS = [
    (center_writing, "rms_biased", {"norm": "layer"}),
    (center_unembed, "gated", {"final_softcap": None}),
    (fold_value_bias, "bare_norms", {"qkv_clip": None}),
    (fold_value_bias, "some_experts", {"attn_sinks": False}),
    (refactor_qk_ov, "bare_norms", {"qkv_clip": None, "positions": "none"}),
    (refactor_qk_ov, "both_norms", {"qk_norm": "none"}),
    (refactor_qk_ov, "pythia", {"positions": "none"}),
]


@pytest.mark.parametrize(("rewrite", "name", "without"), CONTROLS)
def test_control__choice_that_is_refused__would_change_the_logits(rewrite, name, without):
    if name not in CONFIGS:
        pytest.importorskip("transformers", reason="its checkpoints; no wheel of torch for this Python")
    model = subject(name)
    bare = replace(model.config, **without)
    rewritten = rewrite(assemble(bare, {path: parameters(model)[path] for path in bare.shapes}))
    choices = {choice: getattr(model.config, choice) for choice in without}
    rewritten = assemble(replace(rewritten.config, **choices), parameters(model) | parameters(rewritten))
    change = log_probs(spelled_out(rewritten)(TOKENS)) - log_probs(reference(name))
    assert np.abs(change).max() > 1e-3


@pytest.mark.parametrize("name", ["layer_norm", "grouped_biased", "attention_only"])
def test_rewrites__all_in_turn__keep_log_probabilities(name):
    model, original = subject(name), subject(name)(TOKENS)
    assert_close(spelled_out(model)(TOKENS), np.asarray(original))
    for rewrite in (fold_norm, center_writing, center_unembed, ungroup_kv, refactor_qk_ov, fold_value_bias):
        model = rewrite(model)
    assert not np.allclose(model.blocks.attn.W_Q[0, :, 0], subject(name).blocks.attn.W_Q[0, :, 0], atol=1e-2)
    assert_close(log_probs(model(TOKENS)), log_probs(original))


@every_rewrite
def test_rewrite__bfloat16__keeps_the_dtype_and_twice_equals_once(rewrite):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), subject("layer_norm"))
    once = rewrite(narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves(once)} == {jnp.dtype("bfloat16")}
    twice, once = parameters(rewrite(once)), parameters(once)
    tolerance = TOL[("any", "exact") if rewrite in EXACT else ("bfloat16", "parity")]
    for path, leaf in once.items():
        assert_allclose(twice[path].astype(jnp.float32), leaf.astype(jnp.float32), err_msg=path, **tolerance)
    wide = parameters(rewrite(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)))
    if rewrite is not refactor_qk_ov:  # whose directions may flip
        for path, leaf in once.items():
            assert_allclose(leaf.astype(jnp.float32), wide[path], err_msg=path, **TOL["bfloat16", "parity"])


@every_rewrite
def test_rewrite__compiled__is_the_same(rewrite):
    import equinox as eqx

    model = subject("layer_norm")
    compiled, plain = eqx.filter_jit(rewrite)(model), rewrite(model)
    tolerance = TOL["float32", "spectrum" if rewrite is refactor_qk_ov else "law"]
    assert_same(compiled, plain, **tolerance)


@dataclass(frozen=True, kw_only=True)
class Newer(Config):
    """A config with a choice that rewrites have not heard of."""

    moon: str = "new"


@every_rewrite
def test_rewrite__choice_that_it_does_not_know__is_refused_by_name(rewrite):
    config = CONFIGS["layer_norm"]
    choices = {field.name: getattr(config, field.name) for field in fields(config)}
    params = parameters(subject("layer_norm"))
    rewrite(assemble(Newer(**choices), params))  # the default is what all earlier models have
    with pytest.raises(
        UnsupportedModelError, match=rf"`{rewrite.__name__}` .* has `moon` = 'full': it was not written"
    ):
        rewrite(assemble(Newer(**choices, moon="full"), params))


@every_rewrite
def test_rewrite__parameter_that_it_does_not_know__is_refused_by_name(rewrite, monkeypatch):
    monkeypatch.setattr(premises, "_PARAMETERS", premises._PARAMETERS - {"W_pos"})
    with pytest.raises(UnsupportedModelError, match="has the parameter `W_pos`: it was not written"):
        rewrite(subject("layer_norm"))


@pytest.mark.parametrize("name", ["layer_norm", "both_norms", "post_norms", "shared_norm"])
def test_fold_norm__norms_that_are_read__do_nothing_afterwards(name):
    model, folded = subject(name), fold_norm(subject(name))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12)), jnp.float32)
    bare = x - x.mean(-1, keepdims=True) if model.config.norm == "layer" else x
    bare = bare / jnp.sqrt(jnp.square(bare).mean(-1, keepdims=True) + model.config.norm_eps)
    first = jax.tree.map(lambda leaf: leaf[0], folded.blocks)
    for norm in (first.ln1, first.ln2, folded.ln_final):
        if norm is not None:
            assert_allclose(norm(x, folded.config), bare, **TOL["float32", "law"])
    for kept in ("ln1_post", "ln2_post"):
        if getattr(model.blocks, kept) is not None:
            assert_array_equal(getattr(folded.blocks, kept).w, getattr(model.blocks, kept).w)


def test_fold_norm__bias_of_a_norm__gives_its_readers_biases():
    folded = fold_norm(subject("only_norms_biased"))
    config = folded.config
    assert (config.qkv_bias, config.mlp_bias, config.unembed_bias, config.out_bias) == (
        True,
        True,
        True,
        False,
    )
    assert_array_equal(folded.blocks.mlp.b_out, np.zeros_like(folded.blocks.mlp.b_out))


def test_untied__embedding__stays_as_it_was():
    for rewrite in (fold_norm, center_unembed):
        once = rewrite(subject("layer_norm"))
        assert not once.config.tied
        assert_array_equal(once.W_E, subject("layer_norm").W_E)
    assert_array_equal(center_writing(subject("layer_norm")).W_U, subject("layer_norm").W_E.T)


def sites(model, *names):
    return mj.capture(model, list(names))(TOKENS)[1]


def test_center_writing__residual_stream__loses_its_mean_only():
    before = sites(subject("layer_norm"), "resid_post", "mlp_pre")
    after = sites(center_writing(subject("layer_norm")), "resid_post", "mlp_pre")
    mean = before["resid_post"].mean(-1, keepdims=True)
    assert np.abs(mean).max() > 0.1
    assert_close(after["resid_post"], np.asarray(before["resid_post"] - mean), "layout")
    assert_close(after["mlp_pre"], np.asarray(before["mlp_pre"]), "layout")


def test_fold_value_bias__what_heads_write__is_what_they_moved():
    model = subject("grouped_biased")
    before, after = (sites(m, "result", "attn_out", "pattern") for m in (model, fold_value_bias(model)))
    assert_close(after["attn_out"], np.asarray(before["attn_out"]), "layout")
    value = jnp.repeat(model.blocks.attn.b_V, 2, axis=1)
    constant = jnp.einsum("lhd,lhdm->lhm", value, model.blocks.attn.W_O)[:, None, None]
    assert_close(after["result"] + constant, np.asarray(before["result"]), "layout")


def test_ungroup_kv__keys_and_values__are_repeated_for_each_query_head():
    model = subject("grouped_biased")
    before, after = (sites(m, "k", "v", "pattern") for m in (model, ungroup_kv(model)))
    for name in ("k", "v"):
        assert after[name].shape[-2] == 4
        assert_close(after[name], np.repeat(before[name], 2, axis=-2), "layout")
    assert_close(after["pattern"], np.asarray(before["pattern"]), "layout")


@pytest.mark.parametrize("name", ["layer_norm", "wide_heads"])
def test_refactor__dimensions_of_heads__are_singular_directions(name):
    model = refactor_qk_ov(subject(name))
    W_V, W_O = np.asarray(model.blocks.attn.W_V), np.asarray(model.blocks.attn.W_O)
    for layer, head in np.ndindex(2, 4):
        V, O = W_V[layer, :, head], W_O[layer, head]
        S = np.linalg.svd(V.astype(np.float64) @ O, compute_uv=False)[: V.shape[1]]
        S = np.pad(S, (0, V.shape[1] - len(S)))
        assert_close(V.T @ V, np.diag(S**2))
        assert_close(O @ O.T, np.diag((S > 1e-6).astype(float)))


def test_refactor__directions_of_equal_size__stay_where_they_are():
    model = drawn(replace(CONFIGS["layer_norm"], d_model=8, d_head=4, qkv_bias=False))
    eye = jnp.broadcast_to(jnp.eye(8)[:, None, :4], model.blocks.attn.W_Q.shape)
    same = {f"blocks.attn.W_{letter}": eye for letter in "QKV"} | {
        "blocks.attn.W_O": eye.transpose(0, 2, 3, 1)
    }
    model = assemble(model.config, parameters(model) | same)
    assert_same(refactor_qk_ov(model), model, **TOL["any", "exact"])


def test_fold_norm__norms_of_latents__do_nothing_afterwards():
    folded = fold_norm(subject("latent"))
    for scale in (folded.blocks.attn.w_q, folded.blocks.attn.w_kv, folded.blocks.ln1.w):
        assert_array_equal(scale, jnp.ones_like(scale))


def test_center_writing__experts__write_without_mean():
    centred = center_writing(subject("layer_experts"))
    wrote = sites(centred, "expert_out", "shared_out", "resid_post")
    unit = np.abs(wrote["expert_out"]).max()
    for name in wrote:
        assert_allclose(wrote[name].mean(-1) / unit, 0 * wrote[name][..., 0], **TOL["float32", "law"])
