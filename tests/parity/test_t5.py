"""T5, T5 v1.1, mT5, UMT5 and T5's encoder against transformers: logits, every site, masks, edits, gradients."""

import json
import re
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import ArgumentError, CheckpointError, UnsupportedModelError
from mechjax.cli import main
from mechjax.models import T5, parameters
from mechjax.models.families import EVERY
from mechjax.models.families.modules import own_name
from mechjax.models.structures import build
from mechjax.models.t5_attention import biases
from mechjax.studies.check import check
from mechjax.studies.hf_sites import hf_sites
from tests.parity.cases import assert_spelled, in_mechjax, module_values, quick, redraw, torch, transformers
from tests.parity.rounding import assert_rounds_alike
from tests.tolerances import TOL

N_BATCH, N_POS, N_SECOND = 2, 14, 12  # longer than distances have biases of their own
N_LAYERS, N_DECODER = 2, 3
_SMALL = {
    "vocab_size": 31, "d_model": 24, "d_kv": 10, "d_ff": 20, "num_layers": N_LAYERS, "num_decoder_layers": N_DECODER,
    "num_heads": 3, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10,
}  # fmt: skip
_LATER = _SMALL | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES = {
    "t5": ("T5ForConditionalGeneration", _SMALL, False),
    "t5_v1_1": ("T5ForConditionalGeneration", _LATER, True),
    "t5_tied_not_scaled": ("T5ForConditionalGeneration", _LATER | {"feed_forward_proj": "gated-silu"}, False),
    "t5_encoder": ("T5EncoderModel", _SMALL | {"layer_norm_epsilon": 1e-2}, False),
    "mt5": ("MT5ForConditionalGeneration", _LATER, True),
    "umt5": ("UMT5ForConditionalGeneration", _LATER, True),
}
"""Name -> (class of transformers, what its config is given, whether an unembedding of its own is stored)."""
QUICK = ("t5_v1_1", "t5_encoder")
every_case = pytest.mark.parametrize("name", quick(QUICK, CASES))


@cache
def pair(name):
    """(in transformers, in mechjax, the texts)."""
    kind, given, untied = CASES[name]
    config = getattr(transformers, re.split("For|Encoder", kind)[0] + "Config")
    hf = getattr(transformers, kind)(config(**given, attn_implementation="eager")).eval()
    if untied:  # as checkpoints have it, which transformers 5 otherwise ties
        hf.lm_head.weight = torch.nn.Parameter(torch.zeros(31, 24))
    rng = np.random.default_rng(list(name.encode()))
    redraw(hf, rng)
    texts = [rng.integers(0, 31, (N_BATCH, n)) for n in (N_POS, N_SECOND)]
    return hf, in_mechjax(hf), texts[: 1 if kind == "T5EncoderModel" else 2]


def inputs_of(texts, mask=None, second_mask=None):
    """What transformers calls them, all tokens real by default."""
    named = dict(zip(("input_ids", "decoder_input_ids"), texts, strict=False))
    named["attention_mask"] = np.ones(texts[0].shape) if mask is None else mask
    if len(texts) == 2:
        named["decoder_attention_mask"] = np.ones(texts[1].shape) if second_mask is None else second_mask
    return {key: torch.from_numpy(np.asarray(value, np.int64)) for key, value in named.items()}


def theirs(hf, texts, *masks):
    with torch.no_grad():
        output = hf(**inputs_of(texts, *masks))
    return (
        getattr(output, "logits", output.last_hidden_state if "logits" not in output else None)
        .float()
        .numpy()
    )


@cache
def everything(name):
    """Output and all sites, of one program."""
    _, model, texts = pair(name)
    return mj.capture(model, list(mj.list_sites(model, *texts)))(*texts)


def assert_close(ours, right):
    """Equal, relative to the largest number."""
    unit = np.abs(right).max()
    assert_allclose(np.asarray(ours, np.float32) / unit, right / unit, **TOL["float32", "parity"])


@every_case
def test_logits__every_family__equal_transformers(name):
    hf, model, texts = pair(name)
    assert isinstance(model, T5)
    right = theirs(hf, texts)
    assert 0.05 < np.abs(right).max() < 100
    assert_close(model(*texts), right)
    assert_close(everything(name)[0], right)  # forming every site changes nothing
    assert (model.config.tied, model.config.scaled) == (
        not CASES[name][2],
        name in ("t5", "t5_encoder"),
    )


@every_case
def test_sites__every_module_of_transformers__equal_its_hooks(name):
    hf, model, texts = pair(name)
    acts = everything(name)[1]
    second = {} if len(texts) == 1 else {"decoder_input_ids": texts[1]}
    found = hf_sites(hf, model.config, texts[0], **second)
    for (site, layer), value in found.items():
        assert_close(acts[site] if layer is None else acts[site][layer], value)
    block = {
        "embed", "resid_pre", "attn_in", "ln1.normalized", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid",
        "mlp_in", "ln2.normalized", "mlp_pre", "mlp_post", "mlp_out", "resid_post", "ln_final.normalized",
    }  # fmt: skip
    block |= {"mlp_pre_linear"} if model.config.mlp == "gated" else set()
    crossed = {"attn_in", "q", "k", "v", "pattern", "z", "attn_out"}
    exposed = {f"encoder.{site}" for site in block}
    if second:
        exposed |= (
            block | {f"cross_{site}" for site in crossed} | {"ln_cross.normalized", "resid_cross", "logits"}
        )
    assert {site for site, _ in found} == exposed
    assert {layer for site, layer in found if site == "encoder.z"} == set(range(N_LAYERS))
    assert {layer for site, layer in found if site == "cross_z"} == set(range(N_DECODER if second else 0))
    seen = module_values(hf, texts[0], **second)
    gated = model.config.mlp == "gated"
    assert len(assert_spelled(model, acts, seen)) == 17 + gated + (26 + gated if second else 0)


@every_case
def test_sites__not_exposed_by_transformers__follow_from_those_that_are(name):
    hf, model, texts = pair(name)
    acts = everything(name)[1]
    stacks = {"encoder": "encoder."} | ({"decoder": ""} if len(texts) == 2 else {})
    for stack, prefix in stacks.items():
        own = getattr(model, stack).blocks
        assert_close(jax.nn.softmax(acts[f"{prefix}attn_scores"], -1), np.asarray(acts[f"{prefix}pattern"]))
        assert_close(acts[f"{prefix}result"].sum(-2), np.asarray(acts[f"{prefix}attn_out"]))
        for letter in "qkv":
            read = acts[f"{prefix}attn_in"][..., None, :]
            assert_close(
                acts[f"{prefix}{letter}_input"], np.broadcast_to(read, acts[f"{prefix}{letter}_input"].shape)
            )
        raw = np.einsum("lbqhd,lbkhd->lbhqk", acts[f"{prefix}q"], acts[f"{prefix}k"])
        gained = raw + np.asarray(acts[f"{prefix}pos_bias"])
        real = np.asarray(acts[f"{prefix}pattern"]) > 0  # the others are masked
        assert_close(np.where(real, acts[f"{prefix}attn_scores"], 0), np.where(real, gained, 0))
        assert own.ln1.w.shape[0] == {"encoder": N_LAYERS, "decoder": N_DECODER}[stack]
        for layer in range(own.ln1.w.shape[0]):
            where = layer if model.config.bias_per_layer else 0
            attention = getattr(hf, stack).block[where].layer[0].SelfAttention
            n = texts[0 if prefix else 1].shape[1]
            bias = attention.compute_bias(n, n).detach().numpy()
            right = np.broadcast_to(bias, acts[f"{prefix}pos_bias"][layer].shape)
            assert_close(acts[f"{prefix}pos_bias"][layer], right)
    norms = [
        (f"{prefix}ln{i}", f"{prefix}{read}_in")
        for prefix in stacks.values()
        for i, read in ((1, "attn"), (2, "mlp"))
    ]
    if len(texts) == 2:
        assert_close(jax.nn.softmax(acts["cross_attn_scores"], -1), np.asarray(acts["cross_pattern"]))
        assert_close(acts["cross_result"].sum(-2), np.asarray(acts["cross_attn_out"]))
        norms.append(("ln_cross", "cross_attn_in"))
    for norm, read in norms:
        squares = np.square(acts[read]).mean(-1, keepdims=True)
        assert_close(acts[f"{norm}.scale"], np.sqrt(squares + model.config.norm_eps))


@every_case
def test_residual_stream__every_layer__is_the_sum_of_what_is_written(name):
    acts = everything(name)[1]
    for prefix in ("encoder.", "")[: len(pair(name)[2])]:
        written = (
            acts[f"{prefix}attn_out"] + acts[f"{prefix}mlp_out"] + (0 if prefix else acts["cross_attn_out"])
        )
        stream = acts[f"{prefix}embed"] + jnp.cumsum(written, 0)
        assert_close(stream, np.asarray(acts[f"{prefix}resid_post"]))


MASKS = {
    "left": (np.arange(N_POS) >= np.array([[0], [3]]), None),
    "right": (np.arange(N_POS) < np.array([[N_POS], [4]]), None),
    "decoder's": (None, np.arange(N_SECOND) >= np.array([[0], [3]])),
    "both": (np.arange(N_POS) < np.array([[N_POS], [4]]), np.arange(N_SECOND) < np.array([[3], [N_SECOND]])),
}


@pytest.mark.parametrize("name", quick({"t5"}, ["t5", "umt5", "t5_encoder"]))
def test_padding__of_either_text__equals_transformers_at_real_positions(name):
    hf, model, texts = pair(name)
    for mask, second in MASKS.values():
        if len(texts) == 1 and second is not None:
            continue
        given = [
            np.ones(text.shape, bool) if x is None else x
            for text, x in zip(texts, (mask, second), strict=False)
        ]
        masks = dict(zip(("mask", "decoder_mask"), map(jnp.asarray, given), strict=False))
        ours, real = np.asarray(model(*texts, **masks)), given[-1]
        assert_close(ours[real], theirs(hf, texts, mask, second)[real])


@pytest.mark.parametrize("name", quick({"t5_v1_1"}, ["t5", "t5_v1_1", "umt5"]))
def test_bfloat16__rounds_as_transformers_does(name):
    hf, model, texts = pair(name)
    logits = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)(*texts)
    assert logits.dtype == jnp.bfloat16
    assert_rounds_alike(logits, theirs(deepcopy(hf).to(torch.bfloat16), texts), theirs(hf, texts))


def scaled(factor, index, _module, _inputs, output):
    changed = (output[0] if isinstance(output, tuple) else output).clone()
    changed[index] *= factor
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def test_edits__of_either_stack_and_between_them__equal_hooks_that_edit():
    hf, model, texts = pair("t5_v1_1")
    edits = {  # ours, its module, what to multiply there
        "encoder": (mj.scale("encoder.resid_post", 0.3, layer=0, pos=[2, 5]), "encoder.block.0", np.s_[:, [2, 5]]),
        "keys": (mj.scale("cross_k", -1.0, layer=1, kv_head=2), "decoder.block.1.layer.1.EncDecAttention.k", np.s_[..., 20:]),
        "cross": (mj.scale("resid_cross", 0.5, layer=2, pos=4), "decoder.block.2.layer.1", np.s_[:, 4]),
        "path": (
            mj.scale("decoder.block[0].layer[2].DenseReluDense.wi_1.output", 2.0, d_mlp=3),
            "decoder.block.0.layer.2.DenseReluDense.wi_1", np.s_[..., 3],
        ),
    }  # fmt: skip
    plain = theirs(hf, texts)
    modules = dict(hf.named_modules())
    factors = {"encoder": 0.3, "keys": -1.0, "cross": 0.5, "path": 2.0}
    handles = []
    for name, (_, path, index) in edits.items():
        handles.append(modules[path].register_forward_hook(partial(scaled, factors[name], index)))
        right = theirs(hf, texts)
        handles.pop().remove()
        assert np.abs(right - plain).max() > 1e-3
    for name, (_, path, index) in edits.items():
        handles.append(modules[path].register_forward_hook(partial(scaled, factors[name], index)))
    right = theirs(hf, texts)
    for handle in handles:
        handle.remove()
    assert_close(mj.intervene(model, [edit for edit, *_ in edits.values()])(*texts), right)


@pytest.mark.slow
def test_gradients__at_sites_and_of_every_parameter__equal_autograd():
    hf, model, texts = pair("t5")
    hf = deepcopy(hf)
    places = {
        "encoder.resid_post": "encoder.block.{}", "cross_v": "decoder.block.{}.layer.1.EncDecAttention.v",
        "z": "decoder.block.{}.layer.0.SelfAttention.o", "cross_attn_out": "decoder.block.{}.layer.1.EncDecAttention.o",
    }  # fmt: skip
    assert own_name("encoder.block.{}.output", model.config) == "encoder.resid_post"
    modules, kept = dict(hf.named_modules()), {}

    def keep(key, _module, inputs, output):
        value = inputs[0] if key[0] == "z" else output[0] if isinstance(output, tuple) else output
        value.retain_grad()
        kept[key] = value

    for site, path in places.items():
        for layer in range(N_LAYERS if site.startswith("encoder.") else N_DECODER):
            modules[path.format(layer)].register_forward_hook(partial(keep, (site, layer)))
    hf(**inputs_of(texts)).logits[:, -1, 3].sum().backward()
    metric = lambda logits: logits[:, -1, 3].sum()
    _, grads = mj.value_and_grad_at(model, metric, list(places))(*texts)
    for (site, layer), value in kept.items():
        ours = np.asarray(grads[site][layer])
        right = value.grad.numpy().reshape(ours.shape)
        assert np.abs(right).max() > 1e-5
        assert_close(ours, right)
    ours = parameters(eqx.filter_grad(lambda model: metric(model(*texts)))(model))
    family = next(family for family in EVERY if family.name == "t5")
    named, seen = dict(hf.named_parameters()), set()
    for rule in family.rules_for(model.config):
        for name, place in rule.places(model.config):
            for path, right in rule.split(named[name].grad.numpy(), model.config).items():
                assert_close(ours[path][place], right)
                seen.add(path)
    assert seen == ours.keys()


def test_buckets__of_every_distance__are_transformers():
    from transformers.models.t5.modeling_t5 import T5Attention

    far = np.arange(300, dtype=np.int32)
    for n_buckets, furthest in ((6, 100), (8, 20), (32, 128), (32, 100), (64, 256)):
        config = replace(pair("t5")[1].config, n_buckets=n_buckets, max_distance=furthest, n_heads=1)
        table = jnp.arange(float(n_buckets))[:, None]  # each bucket's bias is its number
        for both_ways in (True, False):
            ours = biases(table, jnp.asarray(far), jnp.asarray(far), config, both_ways=both_ways)[0]
            apart = torch.from_numpy(far)[None] - torch.from_numpy(far)[:, None]
            right = T5Attention._relative_position_bucket(apart, both_ways, n_buckets, furthest)
            np.testing.assert_array_equal(ours, right.numpy())


CONTROLS = {
    "scaled": ("t5", {"scaled": False}),
    "not scaled": ("t5_v1_1", {"scaled": True}),
    "untied": ("t5_v1_1", {"tied": True}),
    "norm_eps": ("t5_encoder", {"norm_eps": 1e-6}),
    "activation": ("t5_v1_1", {"activation": "gelu"}),
    "max_distance": ("t5", {"max_distance": 20}),
}


@pytest.mark.parametrize("choice", quick({"not scaled"}, CONTROLS))
def test_control__a_choice_changed__changes_the_logits(choice):
    name, change = CONTROLS[choice]
    hf, model, texts = pair(name)
    config = replace(model.config, **change)
    kept = {path: array for path, array in parameters(model).items() if path in config.shapes}
    assert (
        np.abs(build(config, kept)(*texts) - theirs(hf, texts)).max() > 20 * TOL["float32", "parity"]["atol"]
    )


@every_case
def test_export__every_case__comes_back_bit_for_bit_and_opens_in_transformers(name, tmp_path):
    hf, model, texts = pair(name)
    folder = mj.export(model, tmp_path / "m", family=model.config.source)
    back, _ = mj.load(folder)
    assert back.config == model.config
    for path, leaf in parameters(model).items():
        np.testing.assert_array_equal(parameters(back)[path], leaf)
    opened = type(hf).from_pretrained(folder, attn_implementation="eager").eval()
    np.testing.assert_array_equal(theirs(opened, texts), theirs(hf, texts))


def rewritten(folder, tensors=lambda tensors: tensors, **config):
    """The folder with other tensors or keys."""
    held = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(tensors(held), folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in said.items() if value is not ...})
    )
    return folder


def test_load__of_folders_as_they_were_published__gives_the_same(tmp_path):
    hf, model, texts = pair("t5_v1_1")
    hf.save_pretrained(tmp_path / "new")
    published = {
        "tie_word_embeddings": False,
        "scale_decoder_outputs": ...,
        "dense_act_fn": ...,
        "is_gated_act": ...,
    }
    hf.save_pretrained(tmp_path / "old")
    copies = lambda t: (
        t | {f"{side}.embed_tokens.weight": t["shared.weight"].copy() for side in ("encoder", "decoder")}
    )
    old = rewritten(tmp_path / "old", copies, **published)
    for folder in (tmp_path / "new", old):
        assert mj.load(folder)[0].config == model.config
        np.testing.assert_array_equal(mj.load(folder)[0](*texts), model(*texts))
    opened = type(hf).from_pretrained(old, attn_implementation="eager").eval()
    np.testing.assert_array_equal(theirs(opened, texts), theirs(hf, texts))
    rewritten(old, lambda t: {name: x for name, x in t.items() if name != "shared.weight"})
    np.testing.assert_array_equal(mj.load(old)[0](*texts), model(*texts))
    rewritten(old, lambda t: {name: x for name, x in t.items() if name != "lm_head.weight"})
    assert mj.load(old)[0].config.tied and mj.models.load.load_config(old).tied  # as transformers ties it
    (old / "model.safetensors").unlink()
    assert not mj.models.load.load_config(old).tied  # as config.json says


def test_load__of_a_whole_checkpoint_as_an_encoder__leaves_the_decoder(tmp_path):
    hf, model, texts = pair("t5")
    hf.save_pretrained(tmp_path)
    alone, _ = mj.load(rewritten(tmp_path, architectures=["T5EncoderModel"]))
    assert alone.decoder is None
    np.testing.assert_array_equal(alone(texts[0]), model.encode(texts[0]))
    np.testing.assert_array_equal(model.encoder_alone()(texts[0]), model.encode(texts[0]))


@pytest.mark.parametrize(
    ("change", "config", "error", "message"),
    [
        (lambda t: t | {"lm_head.weight": t["shared.weight"] + 1}, {}, CheckpointError, "but `lm_head.weight` differs"),
        (
            lambda t: {n: x for n, x in t.items() if "block.1.layer.1.EncDecAttention.k" not in n}, {},
            CheckpointError, r"lacks 1 tensor .*`decoder.block.1.layer.1.EncDecAttention.k.weight`",
        ),
        (lambda t: t | {"decoder.what": t["shared.weight"][:1]}, {}, CheckpointError, "holds 1 tensor .*`decoder.what`"),
        (lambda t: t, {"d_ff": 21}, CheckpointError, r"has the shape \(20, 24\); its config calls for \(21, 24\)"),
        (lambda t: t, {"feed_forward_proj": "gated-mish"}, UnsupportedModelError, "`feed_forward_proj` = 'gated-mish'"),
        (lambda t: t, {"feed_forward_proj": 3}, UnsupportedModelError, "`feed_forward_proj` = 3; implemented are"),
        (lambda t: t, {"is_decoder": True}, UnsupportedModelError, "`is_decoder` = True, which is not implemented for t5"),
        (lambda t: t, {"encoder_layers": 3}, UnsupportedModelError, "unknown for t5: `encoder_layers` = 3"),
        (lambda t: t, {"num_decoder_layers": -1}, UnsupportedModelError, "`num_decoder_layers` = -1; it must be"),
        (lambda t: t, {"num_layers": 2**40}, ArgumentError, "`n_layers` = 1099511627776 must be a whole number"),
        (lambda t: t, {"vocab_size": 2**30, "d_model": 2**20}, ArgumentError, "parameters is refused"),
        (lambda t: t, {"decoder_start_token_id": 31}, ArgumentError, "`start_token` = 31 is no token"),
    ],
)  # fmt: skip
def test_load__of_what_does_not_fit__is_refused_by_name(change, config, error, message, tmp_path):
    pair("t5")[0].save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        mj.load(rewritten(tmp_path, change, **config))


def test_export__of_what_a_family_cannot_express__is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="The mt5 family cannot express `scaled` = True"):
        mj.export(pair("t5")[1], tmp_path / "m", family="mt5")
    with pytest.raises(UnsupportedModelError, match="The t5 family cannot express `bias_per_layer` = True"):
        mj.export(pair("umt5")[1], tmp_path / "m", family="t5")
    with pytest.raises(
        UnsupportedModelError, match=r"gpt2 family is one of decoders; .* one of encoder-decoders: t5, "
    ):
        mj.export(pair("t5")[1], tmp_path / "m", family="gpt2")


@pytest.mark.parametrize("name", ["t5", "umt5", "t5_encoder"])
@pytest.mark.slow
def test_check__of_an_encoder_decoder__supports_every_row(name, tmp_path):
    pair(name)[0].save_pretrained(tmp_path)
    found = check(tmp_path)
    assert set(found.verdicts) == {"supported"}, found
    assert {"encoder.pattern", "encoder.ln2.normalized", "sum of writes", "batch of one"} <= set(found.checks)
    for of_decoder in ("cross_pattern", "cache against full forward"):
        assert (of_decoder in found.checks) == (name != "t5_encoder")


@pytest.mark.slow
def test_check__of_a_wrong_cross_attention__names_its_first_site(tmp_path):
    hf = deepcopy(pair("t5")[0])
    hf.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        hf.decoder.block[1].layer[1].EncDecAttention.v.weight += 0.1
    hf.save_pretrained(tmp_path / "theirs")
    assert check(tmp_path / "ours", against=tmp_path / "theirs").first == "cross_v in layer 1"


def test_cli__sites_and_plan_of_an_encoder_decoder__say_both_stacks_and_patch_refuses(tmp_path, capsys):
    folder = mj.export(pair("t5")[1], tmp_path / "m", family="t5")
    assert main(["sites", str(folder)]) in (None, 0)
    said = capsys.readouterr().out
    assert "2 layers of the encoder, 3 of the decoder" in said
    assert "encoder.resid_post" in said and "cross_pattern" in said
    assert main(["plan", str(folder)]) in (None, 0)
    assert "parameters" in capsys.readouterr().out
    words = ["--clean", "a", "--corrupt", "b", "--answer", "c", "--wrong", "d"]
    assert main(["patch", str(folder), *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(
        "ArgumentError: `.*` is one of the encoder-decoders.*Give `mechjax patch` a decoder", said
    )
