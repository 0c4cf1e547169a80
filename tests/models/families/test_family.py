import re

import pytest

from mechjax.base.errors import ArgumentError, UnsupportedModelError
from mechjax.models import Config
from mechjax.models.families import FAMILIES, config_from_hf, config_to_hf
from mechjax.models.rope import Rope

GPT2 = {"model_type": "gpt2", "vocab_size": 11, "n_positions": 8, "n_embd": 12, "n_layer": 2, "n_head": 3}
ROTARY = {
    "vocab_size": 11, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20,
    "max_position_embeddings": 16,
}  # fmt: skip
LLAMA = ROTARY | {"architectures": ["LlamaForCausalLM"]}
MISTRAL = ROTARY | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
NEOX = ROTARY | {"architectures": ["GPTNeoXForCausalLM"]}

OPT = {
    "architectures": ["OPTForCausalLM"], "vocab_size": 11, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "ffn_dim": 20, "max_position_embeddings": 16, "word_embed_proj_dim": 24,
}  # fmt: skip


def read(hf):
    return config_from_hf(hf)[0]


def test_config_from_hf__left_out_keys__are_transformers_defaults():
    assert read({"model_type": "gpt2"}).n_params == 124439808
    llama = read({"architectures": ["LlamaForCausalLM"]})
    assert (llama.d_model, llama.n_kv_heads, llama.norm_eps, llama.tied) == (4096, 32, 1e-6, False)
    mistral = read({"architectures": ["MistralForCausalLM"]})
    assert (mistral.n_kv_heads, mistral.windows) == (8, (4096,) * 32)
    neox = read({"architectures": ["GPTNeoXForCausalLM"]})
    assert (neox.rotary_dim, neox.residual, neox.activation) == (24, "parallel", "gelu")


@pytest.mark.parametrize(
    ("base", "given", "expected"),
    [
        (LLAMA, {"rope_theta": 500.0, "rope_scaling": None}, {"rope": Rope(base=500.0)}),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            {"rope": Rope(base=500.0)},
        ),
        (LLAMA, {"rope_scaling": {"type": "default"}}, {"rope": Rope()}),
        (NEOX, {"rotary_pct": 0.34, "rotary_emb_base": 300}, {"rotary_dim": 2, "rope": Rope(base=300)}),
        (NEOX, {"rope_parameters": {"rope_theta": 300.0, "partial_rotary_factor": 1.0}}, {"rotary_dim": 6}),
        (NEOX, {"use_parallel_residual": False, "rotary_pct": 1}, {"residual": "serial", "qkv_bias": True}),
        (NEOX, {"attention_bias": False, "rotary_pct": 1}, {"residual": "parallel", "qkv_bias": False}),
        (MISTRAL, {"sliding_window": None, "head_dim": 8}, {"windows": None, "d_head": 8}),
        (MISTRAL, {"sliding_window": 3}, {"windows": (3, 3), "d_head": 6, "n_kv_heads": 2}),
        (GPT2, {"scale_attn_weights": False, "n_inner": 7}, {"attn_scale": 1.0, "d_mlp": 7}),
        (GPT2, {"activation_function": "gelu_pytorch_tanh"}, {"activation": "gelu_new"}),
    ],
)
def test_config_from_hf__old_and_new_spellings__are_read(base, given, expected):
    config = read(base | given)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"architectures": ["RwkvForCausalLM"]}, r"RwkvForCausalLM is not implemented; known are GPT2LMHead"),
        ({"architectures": ["LlamaForCasualLM"]}, r"Did you mean `LlamaForCausalLM`"),
        ({"model_type": "bert"}, r"The architecture bert is not implemented"),
        ({}, r"The architecture None is not implemented"),
        ({"architectures": 7}, r"`architectures` = 7; it must be a list"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, r"`scale_attn_by_inverse_layer_idx` = True, which"),
        (GPT2 | {"reorder_and_upcast_attn": True}, r"`reorder_and_upcast_attn` = True, which is not implem"),
        (GPT2 | {"add_cross_attention": True}, r"`add_cross_attention` = True"),
        (GPT2 | {"activation_function": "mish"}, r"`activation_function` = 'mish'; implemented are 'gelu'"),
        (GPT2 | {"alibi": True, "scale": 2}, r"unknown for gpt2: `alibi` = True, `scale` = 2\. They may change"),
        (GPT2 | {"quantization_config": {"bits": 4}}, r"unknown for gpt2: `quantization_config`"),
        (LLAMA | {"sliding_window": 4}, r"unknown for llama: `sliding_window` = 4"),
        (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, r"'dynamic'\), which is not .*of a batch"),
        (LLAMA | {"rope_scaling": {"type": "ntk"}}, r"`rope_type` = 'ntk'\), which is not implemented: 'default'"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"'llama3'\) without `low_freq_factor`"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, r"unknown for that kind: `beta` = 1"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"`partial_rotary_factor` = 0.5"),
        (LLAMA | {"rope_scaling": "linear"}, r"`rope_scaling` = 'linear'; it must be an object"),
        (NEOX | {"rotary_pct": "all"}, r"rotates 'all' of each head"),
        (OPT | {"do_layer_norm_before": False}, r"`do_layer_norm_before` = False, which is not implemented for opt: only True"),
        (OPT | {"word_embed_proj_dim": 12}, r"`word_embed_proj_dim` = 12, which .* only that of `hidden_size` = 24 is"),
        (OPT | {"_remove_final_layer_norm": True}, r"`_remove_final_layer_norm` = True, which is not implemented for opt"),
        (MISTRAL | {"num_hidden_layers": 10**12}, r"`num_hidden_layers` = 1000000000000; it must be a whole number"),
        (NEOX | {"num_attention_heads": 0}, r"`num_attention_heads` = 0; it must be a whole number"),
    ],
)  # fmt: skip
def test_config_from_hf__what_is_not_implemented__is_refused_by_name(hf, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read(hf)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (GPT2 | {"n_layer": 10**9}, r"`n_layers` = 1000000000"),
        (GPT2 | {"n_embd": "12"}, r"`d_model` = '12'"),
        (GPT2 | {"n_embd": 2**28, "n_head": 2, "vocab_size": 2**30}, r"parameters is refused"),
        (LLAMA | {"num_key_value_heads": 3}, r"`n_heads` = 4 is no multiple of `n_kv_heads` = 3"),
        (MISTRAL | {"sliding_window": 0}, r"`windows` = 0"),
        (LLAMA | {"rms_norm_eps": None}, r"`norm_eps` = None"),
    ],
)
def test_config_from_hf__absurd_numbers__are_refused_before_anything_is_made(hf, message):
    with pytest.raises(ArgumentError, match=message):
        read(hf)


@pytest.mark.parametrize(
    "hf",
    [
        GPT2,
        LLAMA,
        LLAMA | {"attention_bias": True, "num_key_value_heads": 1},
        MISTRAL | {"sliding_window": 3},
        NEOX | {"rotary_pct": 1.0, "use_parallel_residual": False},
    ],
)
def test_config_to_hf__what_a_family_can_say__reads_back(hf):
    config, family = config_from_hf(hf)
    written, found = config_to_hf(config)
    assert found is family
    assert read(written) == config


def test_config_to_hf__what_no_family_can_say__is_refused_with_the_fields():
    config = Config(d_vocab=5, n_ctx=4, d_model=4, n_layers=1, n_heads=2, final_softcap=3.0, norm="rms")
    with pytest.raises(
        UnsupportedModelError, match=re.escape("The gpt2 family cannot express `norm` = 'rms'")
    ):
        config_to_hf(config)


def test_ignorable__stored_masks_and_tied_copies__are_no_parameters():
    by_name = {family.name: family for family in FAMILIES}
    gpt2 = read(GPT2)
    for name in ("transformer.h.0.attn.bias", "h.11.attn.masked_bias", "lm_head.weight"):
        assert by_name["gpt2"].match(name, gpt2) is None
        assert by_name["gpt2"].ignorable(name, gpt2)
    assert not by_name["gpt2"].ignorable("transformer.h.0.attn.scale", gpt2)
    llama = read(LLAMA)
    assert by_name["llama"].ignorable("model.layers.0.self_attn.rotary_emb.inv_freq", llama)
    assert not by_name["llama"].ignorable("lm_head.weight", llama)
    assert by_name["neox"].ignorable("gpt_neox.layers.0.attention.rotary_emb.inv_freq", llama)
