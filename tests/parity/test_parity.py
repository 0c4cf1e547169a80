"""Every family against transformers: logits, every site that its modules expose, padding, batches, bfloat16."""

from copy import deepcopy
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.models import assemble, parameters
from mechjax.models.export import export
from mechjax.models.families import config_from_hf
from mechjax.models.families.modules import spellings
from mechjax.models.load import load
from mechjax.models.rope import Rope
from tests.parity.cases import (
    D_VOCAB,
    N_BATCH,
    N_LAYERS,
    N_POS,
    QUICK,
    assert_spelled,
    attention_of,
    hf_sites,
    in_mechjax,
    module_values,
    pair,
    quick,
)
from tests.tolerances import TOL

torch = pytest.importorskip("torch", reason="parity needs PyTorch")

every_case = pytest.mark.parametrize("name", quick(QUICK))


def assert_close(ours, theirs, dtype="float32"):
    """Equal, relative to the largest number."""
    unit = np.abs(theirs).max()
    assert_allclose(np.asarray(ours, np.float32) / unit, theirs / unit, **TOL[dtype, "parity"])


@pytest.fixture(scope="module")
def everything():
    """Case -> logits and all its sites, one compiled program each."""
    kept = {}

    def captured(name):
        if name not in kept:
            case = pair(name)
            sites = list(mj.list_sites(case.model, case.tokens))
            kept[name] = mj.capture(case.model, sites)(case.tokens)
        return kept[name]

    return captured


@every_case
def test_logits__every_family__equal_transformers(name):
    case = pair(name)
    theirs = case.hf_logits()
    assert 0.4 < np.abs(theirs).max() < 100
    assert_close(case.model(case.tokens), theirs)


@every_case
def test_sites__every_module_of_transformers__equal_its_hooks(name, everything):
    _, acts = everything(name)
    theirs = hf_sites(pair(name))
    for (site, layer), value in theirs.items():
        ours = acts[site] if layer is None else acts[site][layer]
        shape = (N_BATCH, *value.shape[1:])  # transformers embeds positions once for all examples
        assert_close(ours.reshape(shape), np.broadcast_to(value, shape))
    config = pair(name).model.config
    exposed = {
        "resid_pre", "q", "k", "v", "z", "mlp_pre", "mlp_post", "resid_post", "ln_final.normalized", "logits",
    }  # fmt: skip
    exposed |= {"embed"} if config.embed_scale == 1.0 else set()
    exposed |= {"ln_embed.normalized"} if config.embed_norm else set()
    exposed |= {"ln1_post.normalized", "ln2_post.normalized"} if config.norms != "pre" else set()
    exposed |= {"attn_in", "ln1.normalized"} if config.norms != "post" else set()
    exposed |= {"mlp_in", "ln2.normalized"} if "ln2.scale" in set(acts) else set()
    exposed |= {"attn_out", "mlp_out"} if config.residual_scale == 1.0 else set()
    exposed |= {"pattern"} if attention_of(name) == "eager" else set()
    exposed |= {"pos_embed"} if config.positions == "learned" else set()
    exposed |= {"mlp_pre_linear"} if config.mlp == "gated" else set()
    if config.qk_norm != "none" and name != "stablelm_parallel":  # its modules hold one head each
        exposed |= {"q_norm.normalized", "k_norm.normalized"}
    assert {site for site, _ in theirs} == exposed
    assert {layer for _, layer in theirs} == {None, *range(N_LAYERS)}


@every_case
def test_spellings__paths_of_modules__mean_what_they_hold(name, everything):
    case = pair(name)
    paths = assert_spelled(case.model, everything(name)[1], module_values(case.hf, case.tokens))
    assert len(paths) > 10
    config, said = case.model.config, spellings(case.model.config)
    plain = config.residual_scale == 1.0 and config.norms == "pre"
    assert ("attn_out" in said, "mlp_out" in said) == (plain, plain)


@every_case
def test_sites__not_exposed_by_transformers__follow_from_those_that_are(name, everything):
    logits, acts = everything(name)
    case = pair(name)
    config = case.model.config
    assert_close(logits, case.hf_logits())  # forming the costly sites changes nothing
    assert_close(jax.nn.softmax(acts["attn_scores"], -1), np.asarray(acts["pattern"]))
    b_O = case.model.blocks.attn.b_O
    written = acts["result"].sum(-2) + (0 if b_O is None else b_O[:, None, None])
    if config.norms == "pre":
        assert_close(config.residual_scale * written, np.asarray(acts["attn_out"]))
    else:
        scale = np.sqrt((np.asarray(written) ** 2).mean(-1, keepdims=True) + config.norm_eps)
        assert_close(acts["ln1_post.scale"], scale)
    for site in ("q_input", "k_input", "v_input"):
        assert_close(acts[site], np.broadcast_to(acts["attn_in"][..., None, :], acts[site].shape))
    for norm, read in (("ln1", "attn_in"), ("ln2", "mlp_in")):
        if f"{norm}.scale" not in set(acts):
            continue
        x = np.asarray(acts[read])
        x = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
        assert_close(acts[f"{norm}.scale"], np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps))


@every_case
def test_residual_stream__every_layer__is_the_sum_of_what_is_written(name, everything):
    _, acts = everything(name)
    start = acts["embed"] + (acts["pos_embed"] if "pos_embed" in set(acts) else 0)
    assert_close(start + jnp.cumsum(acts["attn_out"] + acts["mlp_out"], 0), np.asarray(acts["resid_post"]))
    assert_close(acts["resid_pre"], np.concatenate([start[None], acts["resid_post"][:-1]]))


@every_case
def test_padding__left_and_right__equals_transformers_at_real_positions(name):
    case = pair(name)
    for mask in (np.arange(N_POS) >= np.array([[0], [3]]), np.arange(N_POS) < np.array([[N_POS], [4]])):
        positions = np.maximum(mask.cumsum(-1) - 1, 0)
        # One by one: in some families (long ropes) transformers' numbers depend on the batch's longest example.
        theirs = [
            replace(case, tokens=case.tokens[i : i + 1]).hf_logits(
                attention_mask=mask[i : i + 1].astype(np.int64), position_ids=positions[i : i + 1]
            )
            for i in range(N_BATCH)
        ]
        assert_close(case.model(case.tokens, mask=jnp.asarray(mask))[mask], np.concatenate(theirs)[mask])


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_batch__none_one_many__gives_the_same_rows(name):
    case = pair(name)
    theirs = case.hf_logits()
    assert case.model(case.tokens[:0]).shape == (0, N_POS, D_VOCAB)
    assert_close(case.model(case.tokens[:1]), theirs[:1])
    assert_close(case.model(case.tokens[0]), theirs[0])
    assert_close(case.model(np.stack([case.tokens[None]] * 3)), np.stack([theirs[None]] * 3))


@pytest.mark.parametrize(
    "name", ["gpt2", "pythia", "llama_gqa", "mistral", "gemma_3", "olmo_2", "cohere_2", "bloom"]
)
def test_bfloat16__logits__equal_transformers(name):
    case = pair(name)
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.model)
    logits = model(case.tokens)
    assert logits.dtype == jnp.bfloat16
    theirs = replace(case, hf=deepcopy(case.hf).to(torch.bfloat16)).hf_logits()
    assert_close(logits, theirs, "bfloat16")


CONTROLS = {
    "norm": ("gpt2", {"norm": "rms"}),
    "norm_bias": ("gpt2", {"norm_bias": False}),
    "norm_eps": ("pythia", {"norm_eps": 0.1}),
    "learned positions": ("gpt2", {"positions": "none"}),
    "rotary positions": ("llama_mha", {"positions": "none"}),
    "rotary_dim": ("pythia", {"rotary_dim": 4}),
    "rope": ("llama_gqa", {"rope": Rope()}),
    "rotary_layout": ("llama_gqa", {"rotary_layout": "pairs"}),
    "parallel residual": ("pythia", {"residual": "serial"}),
    "serial residual": ("neox_serial", {"residual": "parallel"}),
    "gated mlp": ("llama_gqa", {"mlp": "plain"}),
    "activation gelu_new": ("gpt2", {"activation": "relu"}),
    "activation gelu": ("gpt2_untied_gelu", {"activation": "silu"}),
    "activation relu": ("neox_serial", {"activation": "gelu"}),
    "activation silu": ("llama_gqa", {"activation": "gelu"}),
    "qkv_bias": ("pythia", {"qkv_bias": False}),
    "out_bias": ("gpt2", {"out_bias": False}),
    "mlp_bias": ("llama_mha", {"mlp_bias": False}),
    "untied": ("llama_gqa", {"tied": True}),
    "window": ("mistral", {"windows": None}),
    "window length": ("mistral", {"windows": (4, 4)}),
    "attn_scale": ("gpt2_untied_gelu", {"attn_scale": 8**-0.5}),
    "attn_softcap": ("llama_mha", {"attn_softcap": 0.5}),
    "final_softcap": ("gpt2", {"final_softcap": 5.0}),
    "attn_softcap off": ("gemma_2", {"attn_softcap": None}),
    "final_softcap off": ("gemma_2", {"final_softcap": None}),
    "norm_weight": ("llama_gqa", {"norm_weight": False}),
    "norm_offset": ("gemma", {"norm_offset": 0.0}),
    "norms both": ("gemma_2", {"norms": "pre"}),
    "norms post": ("olmo_2", {"norms": "both"}),
    "qk_norm shared": ("qwen3", {"qk_norm": "none"}),
    "qk_norm per head": ("cohere", {"qk_norm": "joint"}),
    "qk_norm joint": ("olmo_2", {"qk_norm": "per_head"}),
    "qk_norm_bias": ("phi", {"qk_norm_bias": False}),
    "embed_scale": ("gemma_3", {"embed_scale": 1.0}),
    "embed_norm": ("bloom", {"embed_norm": False}),
    "position_offset": ("opt", {"position_offset": 1}),
    "alibi": ("bloom", {"positions": "none"}),
    "alibi_scale": ("falcon_rw", {"alibi_scale": 1.0}),
    "shared norm": ("falcon_40b", {"residual": "parallel_shared"}),
    "residual_scale": ("granite", {"residual_scale": 1.0}),
    "logit_scale": ("cohere", {"logit_scale": 1.0}),
    "qkv_clip": ("olmo", {"qkv_clip": None}),
    "unembed_bias": ("gpt_j", {"unembed_bias": False}),
    "windows on some layers": ("qwen2", {"windows": None}),
    "rope linear": ("llama_linear", {"rope": Rope(base=50.0)}),
    "rope llama3": ("llama_3", {"rope": Rope(base=50.0)}),
    "rope yarn": ("llama_yarn", {"rope": Rope(base=50.0)}),
    "rope long": ("phi_3_long", {"rope": Rope(base=50.0)}),
    "rope of full layers": ("gemma_3", {"rope": Rope(base=20.0)}),
    "rope of some layers": ("cohere_2", {"rope": Rope()}),
}


@pytest.mark.parametrize("choice", CONTROLS)
def test_control__a_choice_turned_off__changes_the_logits(choice):
    name, change = CONTROLS[choice]
    case = pair(name)
    config = replace(case.model.config, **change)
    kept = {path: array for path, array in parameters(case.model).items() if path in config.shapes}
    changed = assemble(config, kept)(case.tokens)
    assert np.abs(changed - case.hf_logits()).max() > 1e-3


def test_control__slopes_that_are_not_rounded__change_the_logits():
    case = pair("falcon_rw_twelve_heads")
    exact = assemble(replace(case.model.config, alibi_dtype="float32"), parameters(case.model))
    assert_close(case.model(case.tokens), case.hf_logits())
    assert (
        np.abs(exact(case.tokens) - case.hf_logits()).max() > 1e-4
    )  # rounding is small, and more than parity allows


def test_control__key_heads_regrouped__changes_the_logits():
    case = pair("llama_gqa")
    flip = lambda blocks: (blocks.attn.W_K, blocks.attn.W_V)
    model = eqx.tree_at(
        lambda m: flip(m.blocks), case.model, tuple(w[..., ::-1, :] for w in flip(case.model.blocks))
    )
    assert np.abs(model(case.tokens) - case.hf_logits()).max() > 1e-3


@every_case
def test_export__every_case__comes_back_and_opens_in_transformers(name, tmp_path):
    case = pair(name)
    _, family = config_from_hf(case.hf.config.to_dict() | {"architectures": [type(case.hf).__name__]})
    folder = export(case.model, tmp_path / "m", family=family)
    back = load(folder)[0]
    assert back.config == case.model.config
    for path, array in parameters(case.model).items():
        np.testing.assert_array_equal(parameters(back)[path], array)
    opened = type(case.hf).from_pretrained(folder, attn_implementation=attention_of(name)).eval()
    assert_close(replace(case, hf=opened).hf_logits(), case.hf_logits())


def test_redraw__every_parameter__is_neither_one_nor_zero():
    for name in QUICK:
        for parameter in pair(name).hf.parameters():
            assert parameter.std() > 0.05
    assert in_mechjax(pair("gpt2").hf).config == pair("gpt2").model.config
