"""OPT (Zhang et al. 2022, arXiv:2205.01068): as GPT-2, with a ReLU; learned positions begin at the third row."""

from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.config import Config
from mechjax.models.families.family import Family, HfConfig, activation
from mechjax.models.families.rule import Rule

_BLOCK = "model.decoder.layers.{}."


def _width(hf: HfConfig) -> Any:
    width, of_words = hf["hidden_size"], hf["word_embed_proj_dim"]
    if of_words not in (None, width):
        raise UnsupportedModelError(
            f"The config has `word_embed_proj_dim` = {of_words!r}, which is not implemented for opt: only that of "
            f"`hidden_size` = {width!r} is."
        )
    return width


def _both(theirs: str, W: str, b: str, layout: str, bias: str) -> tuple[Rule, Rule]:
    return Rule(f"{theirs}.weight", (f"blocks.{W}",), layout), Rule(f"{theirs}.bias", (f"blocks.{b}",), bias)


def _to_hf(config: Config) -> dict[str, Any]:
    return {
        "vocab_size": config.d_vocab, "max_position_embeddings": config.n_ctx, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads, "ffn_dim": config.d_mlp,
        "activation_function": config.activation, "enable_bias": config.qkv_bias, "tie_word_embeddings": config.tied,
        "layer_norm_elementwise_affine": config.norm_weight, "word_embed_proj_dim": config.d_model,
    }  # fmt: skip


OPT = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    model_type="opt",
    config={
        "d_vocab": "vocab_size",
        "n_ctx": "max_position_embeddings",
        "d_model": _width,
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_mlp": "ffn_dim",
        "activation": activation("activation_function"),
        "norm_weight": "layer_norm_elementwise_affine",
        "qkv_bias": "enable_bias",
        "out_bias": "enable_bias",
        "mlp_bias": "enable_bias",
        "tied": "tie_word_embeddings",
    },
    choices={"norm": "layer", "norm_eps": 1e-5, "positions": "learned", "position_offset": 2, "mlp": "plain"},
    weights=(
        Rule("model.decoder.embed_tokens.weight", ("W_E",), "v m"),
        Rule("model.decoder.embed_positions.weight", ("W_pos",), "r m"),
        *_both(_BLOCK + "self_attn_layer_norm", "ln1.w", "ln1.b", "m", "m"),
        *_both(_BLOCK + "self_attn.q_proj", "attn.W_Q", "attn.b_Q", "(h d) m -> m h d", "(h d) -> h d"),
        *_both(_BLOCK + "self_attn.k_proj", "attn.W_K", "attn.b_K", "(n d) m -> m n d", "(n d) -> n d"),
        *_both(_BLOCK + "self_attn.v_proj", "attn.W_V", "attn.b_V", "(n d) m -> m n d", "(n d) -> n d"),
        *_both(_BLOCK + "self_attn.out_proj", "attn.W_O", "attn.b_O", "m (h d) -> h d m", "m"),
        *_both(_BLOCK + "final_layer_norm", "ln2.w", "ln2.b", "m", "m"),
        *_both(_BLOCK + "fc1", "mlp.W_in", "mlp.b_in", "f m -> m f", "f"),
        *_both(_BLOCK + "fc2", "mlp.W_out", "mlp.b_out", "m f -> f m", "m"),
        Rule("model.decoder.final_layer_norm.weight", ("ln_final.w",), "m"),
        Rule("model.decoder.final_layer_norm.bias", ("ln_final.b",), "m"),
        Rule("lm_head.weight", ("W_U",), "v m -> m v"),
    ),
    prefix="model.",
    modules={_BLOCK + "self_attn": (None, "attn_out"), "lm_head": (None, "logits")},
    to_hf=_to_hf,
    defaults={
        "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072,
        "max_position_embeddings": 2048, "word_embed_proj_dim": None, "num_attention_heads": 12,
        "activation_function": "relu", "enable_bias": True, "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    # Without it the residual stream itself is normalised, and is no sum of what is written.
    required={"do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,)},
    ignored=frozenset({"dropout", "attention_dropout", "activation_dropout", "layerdrop", "init_std"}),
)  # fmt: skip
