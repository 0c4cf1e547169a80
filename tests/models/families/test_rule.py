import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.models import Config
from mechjax.models.families import FAMILIES, Rule, config_from_hf
from mechjax.models.families.rule import rearrange
from mechjax.models.shapes import layers_of

_ROTARY = {
    "vocab_size": 11, "max_position_embeddings": 9, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20,
}  # fmt: skip
_GPT2 = {"vocab_size": 11, "n_positions": 9, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 20}
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 4, "q_lora_rank": 5, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2,
    "v_head_dim": 3, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
CONFIGS = {
    "gpt2": _GPT2,
    "llama": _ROTARY | {"head_dim": 10, "attention_bias": True, "mlp_bias": True},
    "mistral": _ROTARY | {"sliding_window": 3},
    "neox": {key: value for key, value in _ROTARY.items() if "key_value" not in key} | {"rotary_pct": 1.0},
    "neo": {
        "vocab_size": 11, "max_position_embeddings": 9, "hidden_size": 12, "num_layers": 2, "num_heads": 3,
        "attention_types": [[["global", "local"], 1]],
    },
    "gptj": _GPT2 | {"rotary_dim": 2},
    "phi": _ROTARY | {"qk_layernorm": True, "partial_rotary_factor": 1.0},
    "stablelm": _ROTARY | {"qk_layernorm": True, "partial_rotary_factor": 1.0, "use_qkv_bias": True},
    "cohere": _ROTARY | {"use_qk_norm": True},
    "falcon": {
        "vocab_size": 11, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
        "new_decoder_architecture": True, "bias": True,
    },
    "bloom": {"vocab_size": 11, "hidden_size": 12, "n_layer": 2, "n_head": 3, "tie_word_embeddings": False},
    "deepseek_v2": _ROTARY | _LATENT,
    "deepseek_v3": _ROTARY | _LATENT,
    "opt": {
        "vocab_size": 11, "max_position_embeddings": 9, "hidden_size": 12, "num_hidden_layers": 2, "ffn_dim": 20,
        "num_attention_heads": 3,
    },
}  # fmt: skip
"""Families whose keys are not simply those of `_ROTARY`."""

_DEAR = ("deepseek_v3", "qwen3_moe", "mixtral")  # as `deepseek_v2` and `olmoe`, but slower


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.slow] * (f.name in _DEAR), id=f.name) for f in FAMILIES],
)
def test_rules__of_every_family__cover_its_parameters_and_invert(family):
    given = CONFIGS.get(family.name, _ROTARY)
    config, found = config_from_hf(given | {"model_type": family.model_type})
    assert found is family
    rng = np.random.default_rng(0)
    covered = []
    for rule in family.rules_for(config):
        tensor = rng.normal(size=rule.shape(config))
        parts = rule.split(tensor, config)
        covered += parts
        for path, part in parts.items():
            assert part.shape == config.shapes[path][len(next(rule.places(config))[1]) :]
        np.testing.assert_array_equal(rule.join(parts, config), tensor)
        np.testing.assert_array_equal(
            rule.join({path: jnp.asarray(part) for path, part in parts.items()}, config),
            tensor.astype(np.float32),
        )
        for name, place in rule.places(config):
            expected = (rule, layers_of(rule.paths[0], config)[place[0]] if rule.layered else None)
            assert family.match(name, config) == expected
            assert family.match(name.removeprefix(family.prefix), config) == expected
    assert sorted(covered) == sorted(config.shapes)


def test_rearrange__fused_heads__come_out_part_by_part():
    sizes = {"h": 2, "part": 3, "d": 2, "m": 1}
    fused = np.arange(12)[:, None]
    q, k, v = rearrange(fused, "(h part d) m", "part m h d", sizes)
    np.testing.assert_array_equal(q[0], [[0, 1], [6, 7]])
    np.testing.assert_array_equal(k[0], [[2, 3], [8, 9]])
    np.testing.assert_array_equal(v[0], [[4, 5], [10, 11]])


def test_match__other_names__is_none():
    rule = Rule("h.{}.ln_1.weight", ("blocks.ln1.w",), "m")
    for name in (
        "h.1.ln_1.weights",
        "h.x.ln_1.weight",
        "h.1.ln_2.weight",
        "hh1.ln_1.weight",
        "h.1.ln_1xweight",
    ):
        assert rule.match(name) is None
    config = Config(d_vocab=3, n_ctx=3, d_model=4, n_layers=2, n_heads=2)
    assert rule.names(config) == ("h.0.ln_1.weight", "h.1.ln_1.weight")
