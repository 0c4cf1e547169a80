"""ViT, DeiT, CLIP's image side and DINOv2 against transformers: heads, every site, gradients, edits, other sizes."""

import re
from dataclasses import replace
from functools import cache

import equinox as eqx
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import CheckpointError, UnsupportedModelError
from mechjax.cli import main
from mechjax.models import ViT, parameters
from mechjax.models.families import config_from_hf
from mechjax.models.load import load_config
from mechjax.models.structures import build
from mechjax.studies.check import check
from mechjax.studies.hf_sites import hf_sites
from tests.parity.cases import assert_spelled, in_mechjax, module_values, quick, redraw, torch, transformers
from tests.tolerances import TOL

N_LAYERS = 2
_SMALL = {
    "hidden_size": 24, "num_hidden_layers": N_LAYERS, "num_attention_heads": 3, "intermediate_size": 20,
    "image_size": 12, "patch_size": 4, "num_channels": 2,
}  # fmt: skip
_DINO = {key: value for key, value in _SMALL.items() if key != "intermediate_size"} | {
    "image_size": [12, 9],
    "patch_size": [4, 3],
}
_LABELS = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
CASES = {
    "vit": ("ViTForImageClassification", _SMALL | _LABELS | {"image_size": [12, 8], "patch_size": [4, 2]}),
    "vit_bare": ("ViTModel", _SMALL | {"qkv_bias": False, "hidden_act": "relu", "layer_norm_eps": 1e-2}),
    "vit_no_pooler": ("ViTModel", _SMALL),
    "deit": ("DeiTForImageClassification", _SMALL | {"hidden_act": "gelu_new"}),
    "deit_distilled": ("DeiTForImageClassificationWithTeacher", _SMALL | _LABELS),
    "deit_bare": ("DeiTModel", _SMALL),
    "clip": ("CLIPVisionModel", _SMALL | {"hidden_act": "gelu"}),
    # The last two rows and columns of pixels fill no patch.
    "clip_projection": ("CLIPVisionModelWithProjection", _SMALL | {"projection_dim": 7, "image_size": 14}),
    "dinov2": ("Dinov2ForImageClassification", _DINO | _LABELS),
    "dinov2_gated": ("Dinov2Model", _DINO | {"use_swiglu_ffn": True, "mlp_ratio": 2}),
}
QUICK = ("vit", "clip_projection", "dinov2_gated")
every_case = pytest.mark.parametrize("name", quick(QUICK, tuple(CASES)))
OUTPUTS = {
    "logits": "logits",
    "last_hidden_state": "last",
    "pooler_output": "pooled",
    "image_embeds": "image_embed",
}
_OLD = ("attention.attention.", "attention.output.", "vit.encoder.", "deit.encoder.")
"""What transformers called modules before version 5."""


@cache
def pair(name):
    """(in transformers, in mechjax, pixels)."""
    kind, given = CASES[name]
    config = getattr(transformers, re.sub(r"(Model|For).*", "Config", kind))
    more = {"add_pooling_layer": False} if name == "vit_no_pooler" else {}
    hf = getattr(transformers, kind)(config(**given, attn_implementation="eager"), **more).eval()
    rng = np.random.default_rng(list(name.encode()))
    redraw(hf, rng)
    model = in_mechjax(hf)
    return hf, model, rng.standard_normal(model.config.inputs(2, 0)[0].shape).astype(np.float32)


@cache
def captured(name):
    _, model, pixels = pair(name)
    return mj.capture(model, list(mj.list_sites(model, pixels)))(pixels)


def theirs(name, pixels=None, **more):
    hf, _, own = pair(name)
    with torch.no_grad():
        output = hf(torch.from_numpy(own if pixels is None else pixels), **more)
    return {key: value.numpy() for key, value in output.items() if isinstance(value, torch.Tensor)}


def assert_close(ours, right, kind="parity"):
    """Equal, relative to the largest number."""
    unit = np.abs(right).max()
    assert_allclose(np.asarray(ours) / unit, right / unit, **TOL["float32", kind])


def assert_equal(seen, right):
    """Every output that transformers has is ours."""
    for key, value in right.items():
        if key in OUTPUTS:
            assert np.abs(value).max() > 0.05
            assert_close(getattr(seen, OUTPUTS[key]), value)


@every_case
def test_outputs__every_head__equal_transformers(name):
    _, model, pixels = pair(name)
    right = theirs(name)
    assert isinstance(model, ViT)
    assert_equal(model.encode(pixels), right)
    first = next(right[key] for key in ("logits", "image_embeds", "last_hidden_state") if key in right)
    assert_close(captured(name)[0], first)
    assert (model.encode(pixels).pooled is None) == (
        name in ("vit", "vit_no_pooler", "deit", "deit_distilled", "dinov2")
    )
    if "cls_logits" in right:
        assert_close(captured(name)[1]["class_token_logits"], right["cls_logits"])
        assert_close(captured(name)[1]["distillation_logits"], right["distillation_logits"])


@every_case
def test_sites__every_module_of_transformers__equal_its_hooks(name):
    hf, model, pixels = pair(name)
    config, acts = model.config, captured(name)[1]
    found = hf_sites(hf, config, pixels)
    for (site, layer), value in found.items():
        assert_close(acts[site] if layer is None else acts[site][layer], value)
    exposed = {
        "patch_embed", "resid_pre", "attn_in", "ln1.normalized", "q", "k", "v", "pattern", "z", "attn_out", "mlp_in",
        "ln2.normalized", "mlp_post", "mlp_out", "resid_post",
    }  # fmt: skip
    exposed |= {
        "clip_projection": {"pos_embed", "ln_embed.normalized", "ln_pool.normalized", "pooled", "image_embed", "mlp_pre"},
        "clip": {"pos_embed", "ln_embed.normalized", "ln_pool.normalized", "pooled", "mlp_pre"},
        "deit_distilled": {"ln_final.normalized", "class_token_logits", "distillation_logits", "class_logits", "mlp_pre"},
        "dinov2_gated": {"ln_final.normalized"},
        "vit_no_pooler": {"ln_final.normalized", "mlp_pre"},
    }.get(name, {"ln_final.normalized", "mlp_pre", "pooled" if config.pooler == "tanh" else "class_logits"})  # fmt: skip
    assert {site for site, _ in found} == exposed
    assert {layer for _, layer in found} == {None, *range(N_LAYERS)}
    seen = module_values(hf, pixels)
    for path in [
        path for path in seen if path.endswith("patch_embedding.output")
    ]:  # a convolution's: width first
        seen[path] = seen[path].reshape(*seen[path].shape[:2], -1).swapaxes(1, 2)
    bare = (
        f"{hf.base_model_prefix}."
        if f"{hf.base_model_prefix}.embeddings" not in dict(hf.named_modules())
        else ""
    )
    bare = "vision_model." if name == "clip" else bare
    before = (*_OLD, "weights_") if name.startswith("dinov2") else (*_OLD, "intermediate.", "output.dense")
    assert_spelled(model, acts, seen | {bare + path: value for path, value in seen.items()}, before)
    if name == "dinov2_gated":
        for layer in range(N_LAYERS):
            of = lambda part, layer=layer: seen[f"encoder.layer.{layer}.mlp.{part}.output"]
            assert_close(acts["mlp_pre"][layer], of("gate_proj"))
            assert_close(acts["mlp_pre_linear"][layer], of("up_proj"))
            assert_close(acts["pooled"], theirs(name)["pooler_output"])


@every_case
def test_stream__is_the_sum_of_what_is_written(name):
    model, acts = pair(name)[1], captured(name)[1]
    config = model.config
    first = acts["embed"] + acts["pos_embed"]
    assert_close(acts["pos_embed"], np.broadcast_to(model.W_pos, first.shape))
    assert_close(acts["embed"][:, 0], np.broadcast_to(model.class_token, first[:, 0].shape))
    assert_close(acts["embed"][:, config.n_special :], np.asarray(acts["patch_embed"]))
    assert_close(
        acts["resid_pre"][0], np.asarray(acts["ln_embed.normalized"] if config.embed_norm else first)
    )
    written = acts["attn_out"] + acts["mlp_out"]
    assert_close(acts["resid_pre"] + written, np.asarray(acts["resid_post"]))
    assert_close(acts["resid_pre"] + acts["attn_out"], np.asarray(acts["resid_mid"]))
    heads = acts["result"].sum(-2) + model.blocks.attn.b_O[:, None, None]
    scale = 1 if model.blocks.scale1 is None else model.blocks.scale1[:, None, None]
    assert_close(heads * scale, np.asarray(acts["attn_out"]))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {"norm_eps": 0.1}),
        pytest.param("vit", {"activation": "quick_gelu"}, marks=pytest.mark.slow),
        pytest.param("vit", {"attn_scale": 1.0}, marks=pytest.mark.slow),
        pytest.param("deit_distilled", {"head": "class"}, marks=pytest.mark.slow),
        pytest.param("clip_projection", {"activation": "gelu"}, marks=pytest.mark.slow),
        pytest.param("clip_projection", {"embed_norm": False}, marks=pytest.mark.slow),
        pytest.param("dinov2_gated", {"layer_scale": False}, marks=pytest.mark.slow),
    ],
)
def test_control__a_choice_changed__changes_the_output(name, changes):
    _, model, pixels = pair(name)
    config = replace(model.config, **changes)
    changed = build(config, {path: parameters(model)[path] for path in config.shapes})
    assert np.abs(changed(pixels) - captured(name)[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("clip_projection", (25, 12)),
        ("dinov2_gated", (9, 30)),
        pytest.param("dinov2", (12, 12), marks=pytest.mark.slow),
        pytest.param("deit_distilled", (16, 20), marks=pytest.mark.slow),
    ],
)
def test_positions__of_images_of_other_sizes__are_interpolated_as_transformers_does(name, size):
    model = pair(name)[1]
    pixels = np.random.default_rng(3).standard_normal((2, 2, *size)).astype(np.float32)
    asked = {} if model.config.any_size else {"interpolate_pos_encoding": True}
    assert_equal(model.encode(pixels, **asked), theirs(name, pixels, **asked))


WRITTEN = {
    "vit": "vit.layers.1.attention", "clip_projection": "vision_model.encoder.layers.1.self_attn",
    "dinov2": "dinov2.encoder.layer.1.layer_scale1",
}  # fmt: skip
"""What gives `attn_out` of layer 1."""


@pytest.mark.parametrize("name", quick(("vit",), tuple(WRITTEN)))
def test_gradients__at_sites_and_of_parameters__equal_autograd(name):
    hf, model, pixels = pair(name)
    weight = np.random.default_rng(5).standard_normal(captured(name)[0].shape).astype(np.float32)
    metric = lambda out: (out * weight).sum()
    _, grads = mj.value_and_grad_at(model, metric, ["resid_mid", "attn_out"])(pixels)
    kept = []

    def keep(_module, _inputs, out):
        kept.append(out[0] if isinstance(out, tuple) else out)
        kept[0].retain_grad()

    handle = hf.get_submodule(WRITTEN[name]).register_forward_hook(keep)
    hf.zero_grad()
    output = hf(torch.from_numpy(pixels))
    right = output["logits"] if "logits" in output else output["image_embeds"]
    (right * torch.from_numpy(weight)).sum().backward()
    handle.remove()
    for site in ("attn_out", "resid_mid"):  # one is added to the other
        assert_close(grads[site][1], kept[0].grad.numpy(), "gradient")
    ours = parameters(eqx.filter_grad(lambda m: metric(m(pixels)))(model))
    by_path = torch_gradients(hf, model.config)
    assert by_path.keys() == ours.keys()
    for path, value in by_path.items():
        if path.endswith("b_K"):  # a softmax does not see what all keys share: zero, but for rounding
            assert np.abs(ours[path]).max() < 1e-5 * np.abs(ours["blocks.attn.b_Q"]).max()
        else:
            assert_close(ours[path], value, "gradient")


def torch_gradients(hf, config):
    """Our path -> the gradient of what torch has for it, laid out as ours."""
    _, family = config_from_hf({"architectures": [type(hf).__name__], **hf.config.to_dict()})
    gradients = {n: p.grad.numpy() for n, p in hf.named_parameters() if p.grad is not None}
    found = {}
    for rule in family.rules_for(config):
        for stored, place in rule.places(config):
            module, _, ending = stored.rpartition(".")
            moved = {old.format(*place): new.format(*place) for old, new in family.moved.items() if place}
            name = f"{moved.get(module, module)}.{ending}"
            value = gradients[name] if name in gradients else gradients[name.removeprefix(family.prefix)]
            for path, part in rule.split(value, config).items():
                found.setdefault(path, []).append(part)
    return {
        path: np.stack(parts) if path.startswith("blocks.") else parts[0] for path, parts in found.items()
    }


def test_edits__of_heads_patches_and_positions__equal_hooks_that_edit():
    hf, model, pixels = pair("vit")
    places = {"vit.layers.1.attention.o_proj": ("pre", (..., slice(8, 16))), "vit.layers.0.layernorm_after": ("pre", (slice(None), 3))}  # fmt: skip
    ours = (mj.zero("z", layer=1, head=1), mj.zero("mlp_in", layer=0, pos=3))
    for (path, (_, at)), edit in zip(places.items(), ours, strict=True):

        def zeroed(_module, inputs, at=at):
            x = inputs[0].clone()
            x[at] = 0
            return (x, *inputs[1:])

        handle = hf.get_submodule(path).register_forward_pre_hook(zeroed)
        right = theirs("vit")["logits"]
        handle.remove()
        assert np.abs(right - theirs("vit")["logits"]).max() > 1e-3
        assert_close(mj.run(model, pixels, edits=edit), right)
    handle = hf.get_submodule("vit.embeddings.patch_embeddings").register_forward_hook(
        lambda _m, _i, out: torch.cat((out[:, :2], 0 * out[:, 2:3], out[:, 3:]), 1)
    )
    right = theirs("vit")["logits"]
    handle.remove()
    assert_close(mj.run(model, pixels, edits=mj.zero("patch_embed", patch=2)), right)
    spelled = mj.zero("vit.embeddings.patch_embeddings.output", patch=2)
    assert_close(mj.run(model, pixels, edits=spelled), right)


FAMILY = {
    "vit_no_pooler": "vit_bare", "clip": "clip_vision", "clip_projection": "clip_vision_projection",
    "dinov2_gated": "dinov2_bare",
}  # fmt: skip


@pytest.mark.parametrize("name", quick((*QUICK, "vit_no_pooler"), tuple(CASES)))
def test_export__every_model__comes_back_bit_for_bit_and_opens_in_transformers(name, tmp_path):
    hf, model, pixels = pair(name)
    folder = mj.export(model, tmp_path / "m", family=FAMILY.get(name, name))
    back, tokenizer = mj.load(folder)
    assert back.config == model.config == load_config(folder)
    assert tokenizer is None
    for path, leaf in parameters(back).items():
        np.testing.assert_array_equal(leaf, parameters(model)[path])
    more = {"add_pooling_layer": False} if name == "vit_no_pooler" else {}
    opened = type(hf).from_pretrained(folder, attn_implementation="eager", **more).eval()
    with torch.no_grad():
        found = opened(torch.from_numpy(pixels))
    for key, value in theirs(name).items():
        np.testing.assert_array_equal(found[key].numpy(), value)
    assert model.config.classes == (
        ("cat", "dog", "owl") if "id2label" in CASES[name][1] else model.config.classes
    )


def test_load__of_weights_that_are_not_whole_or_too_many__is_refused(tmp_path):
    import safetensors.numpy

    hf = pair("vit")[0]
    hf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    left = {name: x for name, x in tensors.items() if name != "vit.embeddings.cls_token"}
    safetensors.numpy.save_file(left, file)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor .*`vit.embeddings.cls_token`"):
        mj.load(tmp_path)
    safetensors.numpy.save_file(tensors | {"vit.embeddings.mask_token": tensors["vit.layernorm.bias"]}, file)
    with pytest.raises(CheckpointError, match=r"holds 1 tensor .*`vit.embeddings.mask_token`"):
        mj.load(tmp_path)
    pair("vit_bare")[0].save_pretrained(tmp_path / "bare")
    file = tmp_path / "bare" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({n: x for n, x in tensors.items() if n != "pooler.dense.weight"}, file)
    with pytest.raises(CheckpointError, match=r"holds 1 tensor .*`pooler.dense.bias`"):
        mj.load(tmp_path / "bare")


def test_export__to_a_family_of_another_structure__is_refused(tmp_path):
    model = pair("vit")[1]
    with pytest.raises(
        UnsupportedModelError, match=r"gpt2 family is one of decoders; .* vision transformers: vit, vit_bare"
    ):
        mj.export(model, tmp_path / "m", family="gpt2")
    with pytest.raises(UnsupportedModelError, match=r"The deit family cannot express .*`distilled` = False"):
        mj.export(model, tmp_path / "m", family="deit")


VIT = {"architectures": ["ViTForImageClassification"], **_SMALL}
DINO = {"architectures": ["Dinov2Model"], **_DINO}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (VIT | {"rope_theta": 1e4}, r"unknown for vit: `rope_theta` = 10000.0"),
        (VIT | {"hidden_act": "mish"}, r"`hidden_act` = 'mish'; implemented are"),
        (VIT | {"num_labels": 0}, r"`num_labels` = 0; a classifier has at least 1"),
        (VIT | {"id2label": {"0": "a", "2": "b"}}, r"`id2label` for \[0, 2\].*numbered from 0 to 1"),
        (
            VIT | {"architectures": ["ViTModel"], "pooler_act": "relu"},
            r"`pooler_act` = 'relu'; implemented are only 24",
        ),
        (VIT | {"architectures": ["ViTModel"], "pooler_output_size": 7}, r"`pooler_output_size` = 7"),
        (
            VIT | {"architectures": ["ViTForMaskedImageModeling"]},
            r"ViTForMaskedImageModeling is not implemented",
        ),
        (DINO | {"mlp_ratio": "4"}, r"`mlp_ratio` = '4'; it must be a positive number"),
    ],
)
def test_config__of_what_is_not_implemented__is_refused_by_name(given, message):
    with pytest.raises(UnsupportedModelError, match=message):
        config_from_hf(given)


@pytest.mark.parametrize("name", ["clip_projection", "dinov2", "deit_distilled"])
@pytest.mark.slow
def test_check__of_a_model_of_images__supports_every_row(name, tmp_path):
    pair(name)[0].save_pretrained(tmp_path)
    found = check(tmp_path)
    assert set(found.verdicts) == {"supported"}, found
    assert {"patch_embed", "pattern", "resid_post", "sum of writes", "batch of one"} <= set(found.checks)
    assert not {"cache against full forward", "padding left and right"} & set(found.checks)


def test_cli__of_a_model_of_images__says_its_sites_and_what_it_takes(tmp_path, capsys):
    folder = str(mj.export(pair("clip_projection")[1], tmp_path / "m", family="clip_vision_projection"))
    assert main(["sites", folder]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "one image of 2 x 14 x 14" in said
    assert "patch_embed 9 patch × 24 d_model" in said and "image_embed 7 d_proj" in said
    assert main(["plan", folder, "--batch", "2"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"inputs +2 × 2 × 14 × 14", said) and "per example" in said
    assert main(["plan", folder, "--pos", "3"]) == 2
    assert "each of which is 10 positions" in " ".join(capsys.readouterr().err.split())
    words = ["--clean", "a", "--corrupt", "b", "--answer", "c", "--wrong", "d"]
    assert main(["patch", folder, *words]) == 2
    assert "one of the vision transformers, and has no next word" in " ".join(capsys.readouterr().err.split())
