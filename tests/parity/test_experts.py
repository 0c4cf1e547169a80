"""Families with experts against transformers: logits, residual streams, router scores, padding, round trips."""

from copy import deepcopy
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax import decompose
from mechjax.base.errors import UnsupportedModelError
from mechjax.models.families import config_from_hf, config_to_hf
from mechjax.models.families.modules import spellings
from mechjax.studies.hf_sites import hf_sites
from tests.parity.cases import D_VOCAB, assert_spelled, in_mechjax, module_values, quick, redraw
from tests.tolerances import TOL

torch = pytest.importorskip("torch", reason="parity needs PyTorch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

TOKENS = np.random.default_rng(0).integers(0, D_VOCAB, (2, 7))
SHAPES = {
    "vocab_size": D_VOCAB, "hidden_size": 24, "intermediate_size": 10, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "num_experts_per_tok": 2,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32.0,
    "beta_slow": 1.0,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
    "moe_intermediate_size": 8, "intermediate_size": 20,
}  # fmt: skip
CASES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 3}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 5, "moe_intermediate_size": 8, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "olmoe": ("Olmoe", {"num_experts": 5, "norm_topk_prob": True}),
    "gpt_oss": (
        "GptOss", {"num_local_experts": 4, "head_dim": 6, "sliding_window": 3, "rope_parameters": YARN | {"truncate": False}},
    ),
    "deepseek_v2": ("DeepseekV2", LATENT | {
        "q_lora_rank": None, "n_routed_experts": 6, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7,
    }),
    "deepseek_v3": ("DeepseekV3", LATENT | {
        "q_lora_rank": 7, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    }),
}  # fmt: skip
every_case = pytest.mark.parametrize("name", quick({"mixtral", "gpt_oss"}, CASES))


@cache
def pair(name):
    """The transformers model with every parameter and buffer of its routers redrawn, and ours."""
    kind, given = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**SHAPES | given)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    hf = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    rng = np.random.default_rng(list(name.encode()))
    redraw(hf, rng)
    with torch.no_grad():
        for path, buffer in hf.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.copy_(torch.from_numpy(rng.normal(0, 0.4, tuple(buffer.shape))))
    return hf, in_mechjax(hf)


BFLOAT16 = ("mixtral", "deepseek_v3")


@pytest.mark.parametrize("name", quick({"mixtral"}, BFLOAT16))
def test_bfloat16__logits__equal_transformers(name):
    hf, model = pair(name)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    out = theirs(deepcopy(hf).to(torch.bfloat16)).logits.float().numpy()
    logits = half(TOKENS)
    assert logits.dtype == jnp.bfloat16
    unit = np.abs(out).max()
    assert_allclose(np.asarray(logits, np.float32) / unit, out / unit, **TOL["bfloat16", "parity"])


def theirs(hf, **inputs):
    with torch.no_grad():
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return hf(torch.from_numpy(TOKENS), use_cache=False, output_hidden_states=True, **given)


def assert_close(ours, theirs):
    unit = np.abs(theirs).max()
    assert_allclose(np.asarray(ours) / unit, theirs / unit, **TOL["float32", "parity"])


@every_case
def test_sites__every_module_of_transformers__equal_its_hooks(name):
    hf, model = pair(name)
    found = hf_sites(hf, model.config, TOKENS)
    assert {"resid_pre", "q", "z", "pattern", "attn_out", "mlp_out", "resid_post"} <= {
        site for site, _ in found
    }
    _, acts = mj.capture(model, sorted({site for site, _ in found}))(TOKENS)
    assert_spelled(
        model, mj.capture(model, sorted(spellings(model.config)))(TOKENS)[1], module_values(hf, TOKENS)
    )
    for (site, layer), value in found.items():
        ours = acts[site] if layer is None else acts[site][acts.layers[site].index(layer)]
        assert_close(ours.reshape(value.shape), value)


@every_case
def test_experts__logits_residuals_and_routers__equal_transformers(name):
    hf, model = pair(name)
    seen = {}
    for path, module in hf.named_modules():
        if path.endswith(("mlp.gate", "mlp.router")):
            layer = int(path.split(".")[2])
            module.register_forward_hook(lambda m, i, o, layer=layer: seen.update({layer: o[0].numpy()}))
    out = theirs(hf)
    assert_close(model(TOKENS), out.logits.numpy())
    logits, acts = mj.capture(model, ["resid_pre", "attn_out", "mlp_out", "resid_post", "router_scores"])(
        TOKENS
    )
    assert_close(logits, out.logits.numpy())
    for layer, hidden in enumerate(out.hidden_states[:-1]):
        assert_close(acts["resid_pre"][layer], hidden.numpy())
    assert acts.layers["router_scores"] == tuple(seen) == model.config.expert_layers
    for row, scores in enumerate(seen.values()):
        assert_close(acts["router_scores"][row].reshape(scores.shape), scores)
    assert_close(acts["resid_pre"] + acts["attn_out"] + acts["mlp_out"], np.asarray(acts["resid_post"]))


@every_case
def test_experts__padding__equals_transformers_at_real_positions(name):
    hf, model = pair(name)
    mask = np.arange(7) >= np.array([[0], [3]])
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    out = theirs(hf, attention_mask=mask.astype(np.int64), position_ids=positions).logits.numpy()
    assert_close(model(TOKENS, mask=jnp.asarray(mask))[mask], out[mask])


@every_case
def test_experts__exported__load_with_the_same_bits(name, tmp_path):
    _, model = pair(name)
    _, family = config_to_hf(model.config)
    assert family.name == name
    mj.export(model, tmp_path / "out", family=name)
    again = mj.load(tmp_path / "out")[0]
    assert again.config == model.config
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))


@every_case
def test_experts__streams_taken_apart__sum_to_what_was_recorded(name):
    _, model = pair(name)
    _, acts = mj.capture(model, decompose.sites(model))(TOKENS)
    for parts in (
        decompose.decompose_resid(model, acts),
        decompose.full_decomposition(model, acts),
        decompose.full_decomposition(model, acts, neurons=False),
        decompose.logit_attribution(model, acts, 3, 5, of="everything"),
    ):
        assert float(parts.error) < TOL["float32", "decomposition"]["rtol"]


def test_gpt_oss__quantised_checkpoint__is_refused_by_name():
    hf = {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}
    with pytest.raises(
        UnsupportedModelError, match="keys that are unknown for gpt_oss: `quantization_config`"
    ):
        config_from_hf(hf)


def test_olmoe__clipped_queries__are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"`clip_qkv` = 8\.0, which is not implemented for olmoe"):
        config_from_hf(
            pair("olmoe")[0].config.to_dict() | {"architectures": ["OlmoeForCausalLM"], "clip_qkv": 8.0}
        )
