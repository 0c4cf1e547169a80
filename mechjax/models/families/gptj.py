"""GPT-Neo (Black et al. 2021) and GPT-J (Wang and Komatsuzaki 2021).

GPT-Neo: as GPT-2, with windows on every other layer and scores that are not scaled. GPT-J: attention and MLP in
parallel through one norm, rotary positions in pairs on part of each head, no biases in attention, one on the logits.
"""

from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.config import Config
from mechjax.models.families.family import Family, HfConfig, activation
from mechjax.models.families.gpt2 import GPT2
from mechjax.models.families.rule import Rule

_BLOCK = "transformer.h.{}."
_MODULES = {
    _BLOCK + "attn": (None, "attn_out"),
    _BLOCK + "mlp": (None, "mlp_out"),
    "lm_head": (None, "logits"),
}


def _attention(prefix: str) -> tuple[Rule, ...]:
    return (
        Rule(prefix + "q_proj.weight", ("blocks.attn.W_Q",), "(h d) m -> m h d"),
        Rule(prefix + "k_proj.weight", ("blocks.attn.W_K",), "(n d) m -> m n d"),
        Rule(prefix + "v_proj.weight", ("blocks.attn.W_V",), "(n d) m -> m n d"),
        Rule(prefix + "out_proj.weight", ("blocks.attn.W_O",), "m (h d) -> h d m"),
        Rule(prefix + "out_proj.bias", ("blocks.attn.b_O",), "m"),
    )


def _mlp(first: str, last: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{_BLOCK}mlp.{first}.weight", ("blocks.mlp.W_in",), "f m -> m f"),
        Rule(f"{_BLOCK}mlp.{first}.bias", ("blocks.mlp.b_in",), "f"),
        Rule(f"{_BLOCK}mlp.{last}.weight", ("blocks.mlp.W_out",), "m f -> f m"),
        Rule(f"{_BLOCK}mlp.{last}.bias", ("blocks.mlp.b_out",), "m"),
    )


_REST = tuple(rule for rule in GPT2.weights if ".attn." not in rule.name and ".mlp." not in rule.name)


def _windows(hf: HfConfig) -> tuple[Any, ...] | None:
    kinds, types = hf["attention_layers"], hf["attention_types"]
    if kinds is None:
        kinds = [kind for kinds, times in types for _ in range(times) for kind in kinds]
    if len(kinds) != hf.count("num_layers") or not set(kinds) <= {"global", "local"}:
        raise UnsupportedModelError(
            f"The config has `attention_types` = {types!r} and `attention_layers` = {hf['attention_layers']!r}; they "
            f"must spell out 'global' or 'local' for each of the {hf['num_layers']} layers."
        )
    return (
        tuple(hf["window_size"] if kind == "local" else None for kind in kinds) if "local" in kinds else None
    )


def _neo_to_hf(config: Config) -> dict[str, Any]:
    sizes = config.windows or (None,) * config.n_layers
    window = next((size for size in sizes if size is not None), 256)
    return {
        "vocab_size": config.d_vocab, "max_position_embeddings": config.n_ctx, "hidden_size": config.d_model,
        "num_layers": config.n_layers, "num_heads": config.n_heads, "intermediate_size": config.d_mlp,
        "activation_function": config.activation, "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied, "window_size": window,
        "attention_types": [[["global" if size is None else "local" for size in sizes], 1]],
    }  # fmt: skip


NEO = Family(
    name="neo",
    architectures=("GPTNeoForCausalLM",),
    model_type="gpt_neo",
    config={
        "d_vocab": "vocab_size",
        "n_ctx": "max_position_embeddings",
        "d_model": "hidden_size",
        "n_layers": "num_layers",
        "n_heads": "num_heads",
        "d_mlp": "intermediate_size",
        "activation": activation("activation_function"),
        "norm_eps": "layer_norm_epsilon",
        "tied": "tie_word_embeddings",
        "windows": _windows,
    },
    choices={"norm": "layer", "positions": "learned", "mlp": "plain", "qkv_bias": False, "attn_scale": 1.0},
    weights=(*_REST, *_attention(_BLOCK + "attn.attention."), *_mlp("c_fc", "c_proj")),
    prefix="transformer.",
    modules=_MODULES,
    to_hf=_neo_to_hf,
    defaults={
        "vocab_size": 50257, "max_position_embeddings": 2048, "hidden_size": 2048, "num_layers": 24, "num_heads": 16,
        "intermediate_size": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True, "window_size": 256, "attention_types": [[["global", "local"], 12]],
        "attention_layers": None,
    },
    ignored=GPT2.ignored
    | {"resid_dropout", "embed_dropout", "attention_dropout", "classifier_dropout"},
    ignored_weights=(r"transformer\.h\.\d+\.attn\.attention\.(masked_)?bias",),
)  # fmt: skip


def _gptj_to_hf(config: Config) -> dict[str, Any]:
    return {
        "vocab_size": config.d_vocab, "n_positions": config.n_ctx, "n_embd": config.d_model, "n_layer": config.n_layers,
        "n_head": config.n_heads, "n_inner": config.d_mlp, "activation_function": config.activation,
        "layer_norm_epsilon": config.norm_eps, "rotary_dim": config.rotary_dim, "tie_word_embeddings": config.tied,
    }  # fmt: skip


GPTJ = Family(
    name="gptj",
    architectures=("GPTJForCausalLM",),
    model_type="gptj",
    config={
        "d_vocab": "vocab_size",
        "n_ctx": "n_positions",
        "d_model": "n_embd",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "d_mlp": "n_inner",
        "activation": activation("activation_function"),
        "norm_eps": "layer_norm_epsilon",
        "rotary_dim": "rotary_dim",
        "tied": "tie_word_embeddings",
    },
    choices={
        "norm": "layer", "positions": "rotary", "rotary_layout": "pairs", "residual": "parallel_shared", "mlp": "plain",
        "qkv_bias": False, "out_bias": False, "unembed_bias": True,
    },
    weights=(
        *(rule for rule in _REST if "wpe" not in rule.name and "ln_2" not in rule.name),
        *_attention(_BLOCK + "attn."),
        *_mlp("fc_in", "fc_out"),
        Rule("lm_head.bias", ("b_U",), "v"),
    ),
    prefix="transformer.",
    modules=_MODULES,
    to_hf=_gptj_to_hf,
    defaults={
        "vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
        "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
    },
    required={"rotary": (True,), "scale_attn_weights": (True,)},
    ignored=GPT2.ignored,
    ignored_weights=GPT2.ignored_weights,
)  # fmt: skip
