"""BERT (Devlin et al. 2018, arXiv:1810.04805) and RoBERTa (Liu et al. 2019, arXiv:1907.11692): encoders.

LayerNorm on the stream itself, learned positions (RoBERTa's begin two rows in, after the padding id's), token types,
plain MLP, biases, tied embeddings. Which heads there are is what the architecture says.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.config import Config
from mechjax.models.encoder_config import EncoderConfig
from mechjax.models.families.family import Family, HfConfig, activation
from mechjax.models.families.rule import Rule


def _stem(base: str) -> tuple[Rule, ...]:
    """The tensors that BERT and RoBERTa share, under `base`."""
    block = base + "encoder.layer.{}."
    attention = block + "attention."

    def norm(name: str, path: str) -> tuple[Rule, ...]:
        return Rule(name + ".weight", (path + ".w",), "m"), Rule(name + ".bias", (path + ".b",), "m")

    def project(part: str, letter: str) -> tuple[Rule, ...]:
        return (
            Rule(f"{attention}self.{part}.weight", (f"blocks.attn.W_{letter}",), "(h d) m -> m h d"),
            Rule(f"{attention}self.{part}.bias", (f"blocks.attn.b_{letter}",), "(h d) -> h d"),
        )

    return (
        Rule(base + "embeddings.word_embeddings.weight", ("W_E",), "v m"),
        Rule(base + "embeddings.position_embeddings.weight", ("W_pos",), "r m"),
        Rule(base + "embeddings.token_type_embeddings.weight", ("W_type",), "t m"),
        *norm(base + "embeddings.LayerNorm", "ln_embed"),
        *project("query", "Q"), *project("key", "K"), *project("value", "V"),
        Rule(attention + "output.dense.weight", ("blocks.attn.W_O",), "m (h d) -> h d m"),
        Rule(attention + "output.dense.bias", ("blocks.attn.b_O",), "m"),
        *norm(attention + "output.LayerNorm", "blocks.ln1"),
        Rule(block + "intermediate.dense.weight", ("blocks.mlp.W_in",), "f m -> m f"),
        Rule(block + "intermediate.dense.bias", ("blocks.mlp.b_in",), "f"),
        Rule(block + "output.dense.weight", ("blocks.mlp.W_out",), "m f -> f m"),
        Rule(block + "output.dense.bias", ("blocks.mlp.b_out",), "m"),
        *norm(block + "output.LayerNorm", "blocks.ln2"),
        Rule(base + "pooler.dense.weight", ("W_pool",), "o m -> m o"),
        Rule(base + "pooler.dense.bias", ("b_pool",), "m"),
    )  # fmt: skip


def _mlm(head: str, dense: str, norm: str) -> tuple[Rule, ...]:
    """The head that predicts masked tokens; untied, it has a bias of its own."""
    return (
        Rule(f"{head}{dense}.weight", ("W_head",), "o m -> m o"),
        Rule(f"{head}{dense}.bias", ("b_head",), "m"),
        Rule(f"{head}{norm}.weight", ("ln_final.w",), "m"),
        Rule(f"{head}{norm}.bias", ("ln_final.b",), "m"),
        Rule(f"{head}decoder.weight", ("W_U",), "v m -> m v"),
        Rule(f"{head}bias", ("b_U",), "v", when=lambda config: config.tied),
        Rule(f"{head}decoder.bias", ("b_U",), "v", when=lambda config: not config.tied),
    )


_NSP = (
    Rule("cls.seq_relationship.weight", ("W_nsp",), "c m -> m c"),
    Rule("cls.seq_relationship.bias", ("b_nsp",), "c"),
)


def _absolute(hf: HfConfig) -> str:
    if (kind := hf["position_embedding_type"]) != "absolute":
        raise UnsupportedModelError(
            f"The config has `position_embedding_type` = {kind!r}; implemented is only 'absolute'."
        )
    return "learned"


def _to_hf(config: Config) -> dict[str, Any]:
    return {
        "vocab_size": config.d_vocab, "max_position_embeddings": config.n_ctx + config.position_offset,
        "hidden_size": config.d_model, "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_mlp, "hidden_act": config.activation, "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied, "type_vocab_size": getattr(config, "n_types", 1),
    }  # fmt: skip


def _roberta_to_hf(config: Config) -> dict[str, Any]:
    return _to_hf(config) | {"pad_token_id": config.position_offset - 1}


def _offset(hf: HfConfig) -> int:
    """Positions count from the row after the padding id's."""
    pad = hf["pad_token_id"]
    if not isinstance(pad, int) or isinstance(pad, bool) or not 0 <= pad < 2**31 - 1:
        raise UnsupportedModelError(
            f"The config has `pad_token_id` = {pad!r}; RoBERTa counts positions from it, so it must be a whole number."
        )
    return pad + 1


_CONFIG: Mapping[str, Any] = {
    "d_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_mlp": "intermediate_size",
    "activation": activation("hidden_act"),
    "head_activation": activation("hidden_act"),
    "norm_eps": "layer_norm_eps",
    "positions": _absolute,
    "tied": "tie_word_embeddings",
    "n_types": "type_vocab_size",
}
_DEFAULTS = {
    "vocab_size": 30522, "max_position_embeddings": 512, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True, "type_vocab_size": 2, "position_embedding_type": "absolute",
}  # fmt: skip
_IGNORED = frozenset({
    "attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout", "gradient_checkpointing",
    "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
    "directionality",
})  # fmt: skip
_READS = {  # norms stand on the stream itself, after the sums
    "ln_embed.w": (None, ("ln_embed.normalized",)),
    "blocks.attn.W_Q": ("attn_in", ("q",)),
    "blocks.ln1.w": (None, ("ln1.normalized", "resid_mid")),
    "blocks.mlp.W_in": ("mlp_in", ("mlp_pre",)),
    "blocks.ln2.w": (None, ("ln2.normalized", "resid_post")),
}
_OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
_HEAD = _mlm("cls.predictions.", "transform.dense", "transform.LayerNorm")
_TABLE = (r"(bert\.|roberta\.)?embeddings\.position_ids",)
_BIASES = (r"cls\.predictions\.(decoder\.)?bias", r"lm_head\.(decoder\.)?bias")

BERT_MLM = Family(
    name="bert_mlm",
    architectures=("BertForMaskedLM",),
    model_type="bert",
    config=_CONFIG,
    choices={"mlm": True},
    weights=(*_stem("bert."), *_HEAD),
    prefix="bert.",
    modules={"cls.predictions": (None, "logits")},
    to_hf=_to_hf,
    defaults=_DEFAULTS,
    required={"is_decoder": (False,), "add_cross_attention": (False,)},
    ignored=_IGNORED,
    # Checkpoints of the pretrained model say this architecture, which does not use its other head.
    ignored_weights=(
        *_TABLE,
        *_BIASES,
        r"bert\.pooler\.dense\.(weight|bias)",
        r"cls\.seq_relationship\.(weight|bias)",
    ),
    kind=EncoderConfig,
    older=_OLD,
    reads=_READS,
)
BERT_PRETRAINING = replace(
    BERT_MLM,
    name="bert_pretraining",
    architectures=("BertForPreTraining",),
    choices={"mlm": True, "pooler": True, "nsp": True},
    modules={"cls.predictions": (None, "logits"), "bert.pooler": (None, "pooled")},
    weights=(*_stem("bert."), *_HEAD, *_NSP),
    ignored_weights=(*_TABLE, *_BIASES),
)
BERT = replace(
    BERT_MLM,
    name="bert",
    architectures=("BertModel",),
    choices={"mlm": False, "pooler": True},
    modules={"bert.pooler": (None, "pooled")},
    weights=_stem("bert."),
    # Its checkpoints may be whole ones, whose heads it does not use.
    ignored_weights=(*_TABLE, r"cls\..*"),
)
ROBERTA_MLM = replace(
    BERT_MLM,
    name="roberta_mlm",
    architectures=("RobertaForMaskedLM",),
    model_type="roberta",
    config={
        **_CONFIG,
        "head_activation": lambda _: "gelu",  # whatever the blocks have
        "position_offset": _offset,
        "n_ctx": lambda hf: hf.count("max_position_embeddings", 2**31 - 1) - _offset(hf),
    },
    weights=(*_stem("roberta."), *_mlm("lm_head.", "dense", "layer_norm")),
    prefix="roberta.",
    modules={"lm_head": (None, "logits")},
    to_hf=_roberta_to_hf,
    defaults=_DEFAULTS | {"vocab_size": 50265, "pad_token_id": 1},
    ignored_weights=(*_TABLE, *_BIASES, r"roberta\.pooler\.dense\.(weight|bias)"),
)

ENCODERS: tuple[Family, ...] = (BERT_MLM, BERT_PRETRAINING, BERT, ROBERTA_MLM)
"""Every family of encoders."""
