"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, serial residual, plain MLP, biases, tied embeddings.

Its matrices are stored (in, out), as `Conv1D`; queries, keys and values are fused.
"""

from typing import Any

from mechjax.models.config import Config
from mechjax.models.families.family import Family, activation
from mechjax.models.families.rule import Rule

_BLOCK = "transformer.h.{}."


def _to_hf(config: Config) -> dict[str, Any]:
    return {
        "vocab_size": config.d_vocab, "n_positions": config.n_ctx, "n_embd": config.d_model, "n_layer": config.n_layers,
        "n_head": config.n_heads, "n_inner": config.d_mlp, "activation_function": config.activation,
        "layer_norm_epsilon": config.norm_eps, "tie_word_embeddings": config.tied,
        "scale_attn_weights": config.attn_scale != 1.0,
    }  # fmt: skip


GPT2 = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    model_type="gpt2",
    config={
        "d_vocab": "vocab_size",
        "n_ctx": "n_positions",
        "d_model": "n_embd",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "d_mlp": "n_inner",
        "activation": activation("activation_function"),
        "norm_eps": "layer_norm_epsilon",
        "tied": "tie_word_embeddings",
        "attn_scale": lambda hf: None if hf["scale_attn_weights"] else 1.0,
    },
    choices={"norm": "layer", "positions": "learned", "residual": "serial", "mlp": "plain"},
    weights=(
        Rule("transformer.wte.weight", ("W_E",), "v m"),
        Rule("transformer.wpe.weight", ("W_pos",), "r m"),
        Rule(_BLOCK + "ln_1.weight", ("blocks.ln1.w",), "m"),
        Rule(_BLOCK + "ln_1.bias", ("blocks.ln1.b",), "m"),
        Rule(
            _BLOCK + "attn.c_attn.weight",
            ("blocks.attn.W_Q", "blocks.attn.W_K", "blocks.attn.W_V"),
            "m (part h d) -> part m h d",
        ),
        Rule(
            _BLOCK + "attn.c_attn.bias",
            ("blocks.attn.b_Q", "blocks.attn.b_K", "blocks.attn.b_V"),
            "(part h d) -> part h d",
        ),
        Rule(_BLOCK + "attn.c_proj.weight", ("blocks.attn.W_O",), "(h d) m -> h d m"),
        Rule(_BLOCK + "attn.c_proj.bias", ("blocks.attn.b_O",), "m"),
        Rule(_BLOCK + "ln_2.weight", ("blocks.ln2.w",), "m"),
        Rule(_BLOCK + "ln_2.bias", ("blocks.ln2.b",), "m"),
        Rule(_BLOCK + "mlp.c_fc.weight", ("blocks.mlp.W_in",), "m f"),
        Rule(_BLOCK + "mlp.c_fc.bias", ("blocks.mlp.b_in",), "f"),
        Rule(_BLOCK + "mlp.c_proj.weight", ("blocks.mlp.W_out",), "f m"),
        Rule(_BLOCK + "mlp.c_proj.bias", ("blocks.mlp.b_out",), "m"),
        Rule("transformer.ln_f.weight", ("ln_final.w",), "m"),
        Rule("transformer.ln_f.bias", ("ln_final.b",), "m"),
        Rule("lm_head.weight", ("W_U",), "v m -> m v"),
    ),
    prefix="transformer.",
    modules={_BLOCK + "attn": (None, "attn_out"), _BLOCK + "mlp": (None, "mlp_out"), "lm_head": (None, "logits")},
    to_hf=_to_hf,
    defaults={
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "scale_attn_weights": True,
    },
    required={
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    ignored=frozenset({
        "n_ctx", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_type", "summary_use_proj",
        "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    }),
    ignored_weights=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)  # fmt: skip
