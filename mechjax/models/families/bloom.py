"""BLOOM (BigScience 2022, arXiv:2211.05100) and Falcon (Almazrouei et al. 2023, arXiv:2311.16867).

LayerNorm, plain MLP, queries, keys and values fused group by group. BLOOM: ALiBi, a norm on embeddings, serial
residual. Falcon: 7B with one key head; 40B and 180B with several, and a norm each for attention and MLP, in parallel;
the smallest with ALiBi and serial residual.
"""

from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.config import Config
from mechjax.models.families.family import Family, HfConfig, activation
from mechjax.models.families.rotary import ROTARY_DEFAULTS, rope_to_hf, whole_rotation
from mechjax.models.families.rule import Rule

_BLOCK = "transformer.h.{}."
_QKV = ("blocks.attn.W_Q", "blocks.attn.W_K", "blocks.attn.W_V")
_QKV_BIASES = ("blocks.attn.b_Q", "blocks.attn.b_K", "blocks.attn.b_V")


def _norm(theirs: str, ours: str, **when: Any) -> tuple[Rule, Rule]:
    return Rule(f"{theirs}.weight", (f"{ours}.w",), "m", **when), Rule(
        f"{theirs}.bias", (f"{ours}.b",), "m", **when
    )


def _one_norm_each(config: Config) -> bool:
    return config.residual == "parallel"


def _otherwise(config: Config) -> bool:
    return config.residual != "parallel"


_WEIGHTS = (
    Rule("transformer.word_embeddings.weight", ("W_E",), "v m"),
    *_norm("transformer.word_embeddings_layernorm", "ln_embed"),
    *_norm(_BLOCK + "input_layernorm", "blocks.ln1", when=_otherwise),
    *_norm(_BLOCK + "ln_attn", "blocks.ln1", when=_one_norm_each),
    Rule(_BLOCK + "self_attention.query_key_value.weight", _QKV, "(n g+1+1 d) m -> m (n g+1+1) d"),
    Rule(_BLOCK + "self_attention.query_key_value.bias", _QKV_BIASES, "(n g+1+1 d) -> (n g+1+1) d"),
    Rule(_BLOCK + "self_attention.dense.weight", ("blocks.attn.W_O",), "m (h d) -> h d m"),
    Rule(_BLOCK + "self_attention.dense.bias", ("blocks.attn.b_O",), "m"),
    *_norm(_BLOCK + "post_attention_layernorm", "blocks.ln2", when=_otherwise),
    *_norm(_BLOCK + "ln_mlp", "blocks.ln2", when=_one_norm_each),
    Rule(_BLOCK + "mlp.dense_h_to_4h.weight", ("blocks.mlp.W_in",), "f m -> m f"),
    Rule(_BLOCK + "mlp.dense_h_to_4h.bias", ("blocks.mlp.b_in",), "f"),
    Rule(_BLOCK + "mlp.dense_4h_to_h.weight", ("blocks.mlp.W_out",), "m f -> f m"),
    Rule(_BLOCK + "mlp.dense_4h_to_h.bias", ("blocks.mlp.b_out",), "m"),
    *_norm("transformer.ln_f", "ln_final"),
    Rule("lm_head.weight", ("W_U",), "v m -> m v"),
)


def _width(hf: HfConfig) -> Any:
    return hf["hidden_size"] if hf["n_embed"] is None else hf["n_embed"]


def _bloom_to_hf(config: Config) -> dict[str, Any]:
    return {
        "vocab_size": config.d_vocab, "seq_length": config.n_ctx, "hidden_size": config.d_model,
        "n_layer": config.n_layers, "n_head": config.n_heads, "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }  # fmt: skip


BLOOM = Family(
    name="bloom",
    architectures=("BloomForCausalLM",),
    model_type="bloom",
    config={
        "d_vocab": "vocab_size",
        "n_ctx": "seq_length",
        "d_model": _width,
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "norm_eps": "layer_norm_epsilon",
        "tied": "tie_word_embeddings",
    },
    choices={"norm": "layer", "positions": "alibi", "embed_norm": True, "mlp": "plain", "activation": "gelu_new"},
    weights=_WEIGHTS,
    prefix="transformer.",
    modules={"lm_head": (None, "logits")},  # those of attention and MLP give the residual stream, added to
    to_hf=_bloom_to_hf,
    defaults={
        "vocab_size": 250880, "hidden_size": 64, "n_embed": None, "n_layer": 2, "n_head": 8, "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True, "seq_length": 2048,
    },
    required={
        "apply_residual_connection_post_layernorm": (False,), "slow_but_exact": (False,), "n_inner": (None,),
        "offset_alibi": (100,),
    },
    ignored=frozenset({
        "hidden_dropout", "attention_dropout", "attention_softmax_in_fp32", "bias_dropout_fusion",
        "masked_softmax_fusion", "skip_bias_add", "skip_bias_add_qkv",
    }),
)  # fmt: skip


def _falcon_residual(hf: HfConfig) -> str:
    norms, new, parallel = (
        hf[k] for k in ("num_ln_in_parallel_attn", "new_decoder_architecture", "parallel_attn")
    )
    if new and parallel and norms in (None, 1, 2):
        return "parallel_shared" if norms == 1 else "parallel"
    if not new and norms in (None, 1):
        return "parallel_shared" if parallel else "serial"
    raise UnsupportedModelError(
        f"The config has `new_decoder_architecture` = {new!r} with `parallel_attn` = {parallel!r} and "
        f"`num_ln_in_parallel_attn` = {norms!r}, which transformers cannot run either."
    )


def _key_heads(hf: HfConfig) -> Any:
    if not hf["new_decoder_architecture"]:
        return 1 if hf["multi_query"] else None
    return hf["num_kv_heads"]


def _falcon_to_hf(config: Config) -> dict[str, Any]:
    new = config.residual == "parallel" or config.n_kv_heads not in (1, config.n_heads)
    rope = rope_to_hf(config.rope) if config.positions == "rotary" else {}
    return rope | {
        "vocab_size": config.d_vocab, "max_position_embeddings": config.n_ctx, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads, "num_kv_heads": config.n_kv_heads,
        "ffn_hidden_size": config.d_mlp, "activation": config.activation, "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied, "alibi": config.positions == "alibi", "bias": config.qkv_bias,
        "new_decoder_architecture": new, "multi_query": config.n_kv_heads == 1,
        "parallel_attn": config.residual != "serial",
        "num_ln_in_parallel_attn": None if not new else 2 if config.residual == "parallel" else 1,
    }  # fmt: skip


def _alibi_scale(hf: HfConfig) -> float:
    d_head = hf.count("hidden_size", 2**31 - 1) // hf.count("num_attention_heads", 2**31 - 1)
    return d_head**-0.5 if hf["alibi"] else 1.0


FALCON = Family(
    name="falcon",
    architectures=("FalconForCausalLM",),
    model_type="falcon",
    config={
        "d_vocab": "vocab_size",
        "n_ctx": "max_position_embeddings",
        "d_model": _width,
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": _key_heads,
        "d_mlp": "ffn_hidden_size",
        "activation": activation("activation"),
        "norm_eps": "layer_norm_epsilon",
        "positions": lambda hf: "alibi" if hf["alibi"] else "rotary",
        "rope": whole_rotation,
        "alibi_scale": _alibi_scale,
        "alibi_dtype": lambda hf: "bfloat16" if hf["alibi"] else "float32",
        "residual": _falcon_residual,
        "qkv_bias": "bias",
        "out_bias": "bias",
        "mlp_bias": "bias",
        "tied": "tie_word_embeddings",
    },
    choices={"norm": "layer", "mlp": "plain"},
    weights=_WEIGHTS,
    prefix="transformer.",
    modules={
        _BLOCK + "self_attention": (None, "attn_out"), _BLOCK + "mlp": (None, "mlp_out"), "lm_head": (None, "logits"),
    },
    to_hf=_falcon_to_hf,
    defaults=ROTARY_DEFAULTS
    | {
        "vocab_size": 65024, "hidden_size": 4544, "n_embed": None, "num_hidden_layers": 32, "num_attention_heads": 71,
        "num_ln_in_parallel_attn": None, "layer_norm_epsilon": 1e-5, "num_kv_heads": None, "alibi": False,
        "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False,
        "max_position_embeddings": 2048, "ffn_hidden_size": None, "activation": "gelu", "tie_word_embeddings": True,
    },
    required={"apply_residual_connection_post_layernorm": (False,)},
    ignored=frozenset({"hidden_dropout", "attention_dropout", "num_kv_heads", "multi_query"}),
    ignored_weights=(r"transformer\.h\.\d+\.self_attention\.rotary_emb\.inv_freq",),
)  # fmt: skip
