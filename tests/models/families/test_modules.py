"""Paths of modules as names of sites; what each holds is compared with transformers in `tests/parity`."""

from dataclasses import replace

import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, SiteError
from mechjax.models.families import config_from_hf
from mechjax.models.families.modules import own_name, spellings

SIZES = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9,
    "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip
BLOCK = "model.layers.{}."


def config_of(architecture, **more):
    return config_from_hf({"architectures": [architecture]} | SIZES | more)[0]


@pytest.mark.parametrize(
    ("architecture", "module", "site"),
    [
        ("LlamaForCausalLM", "self_attn.output", "attn_out"),
        ("LlamaForCausalLM", "post_attention_layernorm.output", "ln2.normalized"),
        ("Gemma2ForCausalLM", "self_attn.output", None),
        ("Gemma2ForCausalLM", "post_attention_layernorm.output", "ln1_post.normalized"),
        ("Olmo2ForCausalLM", "mlp.output", None),
        ("Olmo2ForCausalLM", "mlp.down_proj.input", "mlp_post"),
        ("GraniteForCausalLM", "self_attn.o_proj.output", None),
        ("CohereForCausalLM", "input_layernorm.input", None),  # what attention and MLP read together
        ("CohereForCausalLM", "input_layernorm.output", "ln1.normalized"),
    ],
)
def test_own_name__of_one_path_in_several_families__is_what_the_module_holds(architecture, module, site):
    more = {"residual_multiplier": 0.5} if architecture.startswith("Granite") else {}
    config = config_of(architecture, **more)
    assert own_name(BLOCK + module, config) == (site or BLOCK + module)


def test_spellings__without_a_family__are_none_and_of_an_unknown_one_are_refused(tiny_model, tiny_tokens):
    assert spellings(tiny_model.config) == {}
    with pytest.raises(
        SiteError, match=r"no site is named `model.layers.\{\}.mlp.output`.*were loaded from a checkpoint"
    ):
        mj.capture(tiny_model, "model.layers.0.mlp.output")(tiny_tokens)
    with pytest.raises(
        ArgumentError, match=r"`source` = 'gtp2' is no family; known are gpt2, .*Did you mean `gpt2`"
    ):
        spellings(replace(tiny_model.config, source="gtp2"))
