"""T5, T5 v1.1, Flan-T5, mT5 and UMT5: encoder-decoders, and T5's encoder alone.

T5: Raffel et al. 2019, arXiv:1910.10683; mT5: Xue et al. 2020, arXiv:2010.11934; UMT5: Chung et al. 2023,
arXiv:2304.09151.

RMSNorm before each part, no biases, learned biases of distances; T5 ties the unembedding and scales what it reads, the
later ones do neither. What config.json says of tying is not what transformers does: it ties what is not stored
(`settled`).
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.families.family import Family, HfConfig
from mechjax.models.families.rule import Rule
from mechjax.models.t5_config import T5Config

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "silu": "silu", "swish": "silu", "relu": "relu"}
_GATED = "gated-"


def _stack(name: str, *, cross: bool, per_layer: bool = False) -> tuple[Rule, ...]:
    """The tensors of an encoder or a decoder."""
    block, ours = name + ".block.{}.layer.", f"{name}.blocks."
    last = 2 if cross else 1

    def attention(path: str, to: str) -> tuple[Rule, ...]:
        heads = ((part, f"{ours}{to}.W_{part.upper()}") for part in "qkv")
        return (
            *(Rule(f"{block}{path}.{part}.weight", (own,), "(h d) m -> m h d") for part, own in heads),
            Rule(f"{block}{path}.o.weight", (f"{ours}{to}.W_O",), "m (h d) -> h d m"),
        )

    def norm(path: str, to: str) -> Rule:
        return Rule(path + ".weight", (to + ".w",), "m")

    mlp = f"{block}{last}.DenseReluDense."
    bias = ".layer.0.SelfAttention.relative_attention_bias.weight"
    between = (norm(f"{block}1.layer_norm", ours + "ln_cross"), *attention("1.EncDecAttention", "cross"))
    return (
        Rule(f"{name}.block.{'{}' if per_layer else '0'}{bias}", (f"{name}.W_rel",), "b h"),
        norm(f"{block}0.layer_norm", ours + "ln1"), *attention("0.SelfAttention", "attn"),
        *(between if cross else ()),
        norm(f"{block}{last}.layer_norm", ours + "ln2"),
        Rule(mlp + "wi.weight", (ours + "mlp.W_in",), "f m -> m f", when=lambda config: config.mlp == "plain"),
        Rule(mlp + "wi_0.weight", (ours + "mlp.W_gate",), "f m -> m f"),
        Rule(mlp + "wi_1.weight", (ours + "mlp.W_in",), "f m -> m f", when=lambda config: config.mlp == "gated"),
        Rule(mlp + "wo.weight", (ours + "mlp.W_out",), "m f -> f m"),
        norm(f"{name}.final_layer_norm", f"{name}.ln_final"),
    )  # fmt: skip


def _weights(*, per_layer: bool = False) -> tuple[Rule, ...]:
    return (
        Rule("shared.weight", ("W_E",), "v m"),
        *_stack("encoder", cross=False, per_layer=per_layer),
        *_stack("decoder", cross=True, per_layer=per_layer),
        Rule("lm_head.weight", ("W_U",), "v m -> m v"),
    )


def _activation(hf: HfConfig) -> str:
    """Of `feed_forward_proj`, such as "relu" or "gated-gelu", which means GELU's tanh form."""
    given = hf["feed_forward_proj"]
    if given == "gated-gelu":
        return "gelu_new"
    name = given.removeprefix(_GATED) if isinstance(given, str) else given
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"The config has `feed_forward_proj` = {given!r}; implemented are {', '.join(map(repr, _ACTIVATIONS))}, "
            f"with or without '{_GATED}' before them."
        )
    return _ACTIVATIONS[name]


def _mlp(hf: HfConfig) -> str:
    return "gated" if str(hf["feed_forward_proj"]).startswith(_GATED) else "plain"


def _decoder_layers(hf: HfConfig) -> int:
    return hf["num_layers"] if hf["num_decoder_layers"] is None else hf.count("num_decoder_layers")


def _start(hf: HfConfig) -> Any:
    """The decoder begins with its start token; older configs name the padding id alone."""
    keys = ("decoder_start_token_id", "pad_token_id")
    return next((hf[key] for key in keys if hf[key] is not None), 0)


def _scaled(hf: HfConfig) -> Any:
    """Older configs say it by tying."""
    said = hf["scale_decoder_outputs"]
    return hf["tie_word_embeddings"] is not False if said is None else said


def _settled(config: T5Config, tensors: Collection[str]) -> T5Config:
    """Tied where no unembedding is stored; untied where one is, whatever a rewritten config says.

    transformers 5 writes `tie_word_embeddings` = true of every model, and ties where nothing else is stored.
    """
    stored = "lm_head.weight" in tensors
    return replace(config, tied=not stored or (config.tied and config.scaled))


def _to_hf(config: Any) -> dict[str, Any]:
    gated, activation = getattr(config, "mlp", "plain") == "gated", getattr(config, "activation", "relu")
    if gated:  # "gated-gelu" means the tanh form, and the exact one has no name
        activation = _GATED + ("gelu" if activation == "gelu_new" else activation)
    return {
        "vocab_size": config.d_vocab, "d_model": config.d_model, "d_kv": config.d_head, "d_ff": config.d_mlp,
        "num_layers": config.n_layers, "num_decoder_layers": config.n_decoder_layers, "num_heads": config.n_heads,
        "relative_attention_num_buckets": config.n_buckets, "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps, "feed_forward_proj": activation, "is_encoder_decoder": True,
        "tie_word_embeddings": config.tied, "scale_decoder_outputs": config.scaled,
        "decoder_start_token_id": config.start_token,
    }  # fmt: skip


def _without(*keys: str) -> Any:
    """A Hugging Face config of ours, without these keys."""
    return lambda config: {key: value for key, value in _to_hf(config).items() if key not in keys}


_CONFIG: Mapping[str, Any] = {
    "d_vocab": "vocab_size",
    "d_model": "d_model",
    "d_head": "d_kv",
    "d_mlp": "d_ff",
    "n_layers": "num_layers",
    "n_decoder_layers": _decoder_layers,
    "n_heads": "num_heads",
    "n_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "norm_eps": "layer_norm_epsilon",
    "mlp": _mlp,
    "activation": _activation,
    "tied": lambda hf: hf["tie_word_embeddings"] is not False,
    "scaled": _scaled,
    "start_token": _start,
}
_DEFAULTS = {
    "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_decoder_layers": None,
    "num_heads": 8, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6, "feed_forward_proj": "relu", "tie_word_embeddings": None,
    "scale_decoder_outputs": None, "decoder_start_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_LATER = _DEFAULTS | {
    "vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}  # fmt: skip
_IGNORED = frozenset({
    "dropout_rate", "classifier_dropout", "initializer_factor", "n_positions", "is_gated_act", "dense_act_fn",
})  # fmt: skip
_CROSS_READS = {
    "decoder.blocks.ln_cross.w": ("cross_attn_in", ("ln_cross.normalized",)),
    "decoder.blocks.cross.W_Q": (None, ("cross_q",)),
    "decoder.blocks.cross.W_K": (None, ("cross_k",)),
    "decoder.blocks.cross.W_V": (None, ("cross_v",)),
    "decoder.blocks.cross.W_O": ("cross_z", ("cross_attn_out",)),
}
_READS = {
    "W_E": (None, ())
} | _CROSS_READS  # each stack embeds by a module of its own, which shares the weight
_ENCODER_MODULES = {
    "encoder.embed_tokens": (None, "encoder.embed"),
    "encoder.block.{}": ("encoder.resid_pre", "encoder.resid_post"),
    "encoder.block.{}.layer.0": (None, "encoder.resid_mid"),
}
_DECODER_MODULES = {
    "decoder.embed_tokens": (None, "embed"),
    "decoder.block.{}": ("resid_pre", "resid_post"),
    "decoder.block.{}.layer.0": (None, "resid_mid"),
    "decoder.block.{}.layer.1": (None, "resid_cross"),
    "lm_head": (None, "logits"),
}
_COPIES = r"(encoder|decoder)\.embed_tokens\.weight"

T5 = Family(
    name="t5",
    architectures=("T5ForConditionalGeneration", "T5WithLMHeadModel"),
    model_type="t5",
    config=_CONFIG,
    choices={},
    weights=_weights(),
    prefix="",
    modules=_ENCODER_MODULES | _DECODER_MODULES,
    to_hf=_to_hf,
    defaults=_DEFAULTS,
    required={"is_decoder": (False,), "is_encoder_decoder": (True,)},
    ignored=_IGNORED,
    # Cross-attention had biases of distances once, which were never used.
    ignored_weights=(_COPIES, r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),
    kind=T5Config,
    older={"shared.weight": "encoder.embed_tokens.weight"},
    reads=_READS,
    patterns={
        "encoder_attentions": "encoder.pattern", "decoder_attentions": "pattern", "cross_attentions": "cross_pattern",
    },
    settled=_settled,
)  # fmt: skip
T5_ENCODER = replace(
    T5,
    name="t5_encoder",
    architectures=("T5EncoderModel",),
    config={k: v for k, v in _CONFIG.items() if k not in ("n_decoder_layers", "tied", "scaled", "start_token")},
    choices={"n_decoder_layers": 0},
    weights=tuple(rule for rule in T5.weights if not rule.name.startswith(("decoder.", "lm_head."))),
    modules=_ENCODER_MODULES,
    to_hf=lambda config: _without(
        "num_decoder_layers", "tie_word_embeddings", "scale_decoder_outputs", "decoder_start_token_id"
    )(config) | {"is_encoder_decoder": False},
    required={"is_decoder": (False,)},
    ignored=_IGNORED | {"num_decoder_layers", "tie_word_embeddings", "scale_decoder_outputs"},
    # Its checkpoints may be whole ones, whose decoder it does not use.
    ignored_weights=(_COPIES, r"decoder\..*", r"lm_head\.weight"),
    patterns={"attentions": "encoder.pattern"},
    settled=None,
)  # fmt: skip
MT5 = replace(
    T5,
    name="mt5",
    architectures=("MT5ForConditionalGeneration",),
    model_type="mt5",
    config={k: v for k, v in _CONFIG.items() if k != "scaled"},
    choices={"scaled": False},
    defaults=_LATER,
    to_hf=_without("scale_decoder_outputs"),
)
UMT5 = replace(
    T5,
    name="umt5",
    architectures=("UMT5ForConditionalGeneration",),
    model_type="umt5",
    choices={"bias_per_layer": True},
    weights=_weights(per_layer=True),
    defaults=_LATER,
)

ENCODER_DECODERS: tuple[Family, ...] = (T5, T5_ENCODER, MT5, UMT5)
"""Every family of encoder-decoders."""
