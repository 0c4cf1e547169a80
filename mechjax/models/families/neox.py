"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745) and Pythia (Biderman et al. 2023, arXiv:2304.01373).

LayerNorm, rotary positions on part of each head, attention and MLP in parallel with a norm each (or serial), biases.
Queries, keys and values are fused head by head.
"""

from typing import Any

from mechjax.models.config import Config
from mechjax.models.families.family import Family, HfConfig, activation
from mechjax.models.families.rotary import rope_to_hf, rotary_dim, rotation
from mechjax.models.families.rule import Rule
from mechjax.models.rope import Rope

_BLOCK = "gpt_neox.layers.{}."


def _rotation(hf: HfConfig) -> tuple[Rope, float]:
    return rotation(hf, theta_key="rotary_emb_base", part_key="rotary_pct", part_default=0.25)


def _to_hf(config: Config) -> dict[str, Any]:
    rope = rope_to_hf(config.rope)
    base = rope.pop("rope_theta")
    return rope | {
        "vocab_size": config.d_vocab, "max_position_embeddings": config.n_ctx, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads, "intermediate_size": config.d_mlp,
        "hidden_act": config.activation, "layer_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied,
        "use_parallel_residual": config.residual == "parallel", "attention_bias": config.qkv_bias,
        "rotary_emb_base": base, "rotary_pct": config.rotary_dim / config.d_head,
    }  # fmt: skip


NEOX = Family(
    name="neox",
    architectures=("GPTNeoXForCausalLM",),
    model_type="gpt_neox",
    config={
        "d_vocab": "vocab_size",
        "n_ctx": "max_position_embeddings",
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_mlp": "intermediate_size",
        "activation": activation("hidden_act"),
        "norm_eps": "layer_norm_eps",
        "residual": lambda hf: "parallel" if hf["use_parallel_residual"] else "serial",
        "rope": lambda hf: _rotation(hf)[0],
        "rotary_dim": lambda hf: rotary_dim(hf, _rotation(hf)[1]),
        "qkv_bias": "attention_bias",
        "out_bias": "attention_bias",
        "tied": "tie_word_embeddings",
    },
    choices={"norm": "layer", "positions": "rotary", "mlp": "plain", "mlp_bias": True},
    weights=(
        Rule("gpt_neox.embed_in.weight", ("W_E",), "v m"),
        Rule(_BLOCK + "input_layernorm.weight", ("blocks.ln1.w",), "m"),
        Rule(_BLOCK + "input_layernorm.bias", ("blocks.ln1.b",), "m"),
        Rule(
            _BLOCK + "attention.query_key_value.weight",
            ("blocks.attn.W_Q", "blocks.attn.W_K", "blocks.attn.W_V"),
            "(h part d) m -> part m h d",
        ),
        Rule(
            _BLOCK + "attention.query_key_value.bias",
            ("blocks.attn.b_Q", "blocks.attn.b_K", "blocks.attn.b_V"),
            "(h part d) -> part h d",
        ),
        Rule(_BLOCK + "attention.dense.weight", ("blocks.attn.W_O",), "m (h d) -> h d m"),
        Rule(_BLOCK + "attention.dense.bias", ("blocks.attn.b_O",), "m"),
        Rule(_BLOCK + "post_attention_layernorm.weight", ("blocks.ln2.w",), "m"),
        Rule(_BLOCK + "post_attention_layernorm.bias", ("blocks.ln2.b",), "m"),
        Rule(_BLOCK + "mlp.dense_h_to_4h.weight", ("blocks.mlp.W_in",), "f m -> m f"),
        Rule(_BLOCK + "mlp.dense_h_to_4h.bias", ("blocks.mlp.b_in",), "f"),
        Rule(_BLOCK + "mlp.dense_4h_to_h.weight", ("blocks.mlp.W_out",), "m f -> f m"),
        Rule(_BLOCK + "mlp.dense_4h_to_h.bias", ("blocks.mlp.b_out",), "m"),
        Rule("gpt_neox.final_layer_norm.weight", ("ln_final.w",), "m"),
        Rule("gpt_neox.final_layer_norm.bias", ("ln_final.b",), "m"),
        Rule("embed_out.weight", ("W_U",), "v m -> m v"),
    ),
    prefix="gpt_neox.",
    modules={
        _BLOCK + "attention": (None, "attn_out"), _BLOCK + "mlp": (None, "mlp_out"), "embed_out": (None, "logits"),
        "lm_head": (None, "logits"),  # what transformers 5 calls it
    },
    to_hf=_to_hf,
    defaults={
        "vocab_size": 50432, "max_position_embeddings": 2048, "hidden_size": 6144, "num_hidden_layers": 44,
        "num_attention_heads": 64, "intermediate_size": 24576, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        "use_parallel_residual": True, "attention_bias": True, "tie_word_embeddings": False,
        "rotary_emb_base": 10000.0, "rotary_pct": None, "rope_parameters": None, "rope_scaling": None,
        "rope_theta": None, "partial_rotary_factor": None,
    },
    ignored=frozenset({"attention_dropout", "hidden_dropout", "classifier_dropout"}),
    ignored_weights=(r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
)  # fmt: skip
