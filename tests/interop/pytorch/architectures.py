"""Hugging Face architectures without a family of their own here, tiny, with every parameter drawn anew."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tests.needs import torch_bridge

torch, transformers = torch_bridge()

# Else pytest keeps a line for every tensor that is traced.
logging.getLogger("torch.__trace").propagate = False

BATCH, POS, VOCAB = 2, 6, 31


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        model: Name of the class in transformers.
        config: What its config is made of.
        kind: encoder, encoder-decoder, decoder, state-space, experts, vision, audio or vision-language.
        structure: What is unlike in it; architectures that only rename another have the same.
        example: Which arguments it is called with.
        output: The part of the output that is compared first.
        fixed: Further keyword arguments.
    """

    model: str
    config: dict[str, Any]
    kind: str
    structure: str
    example: str = "tokens"
    output: str = "logits"
    fixed: dict[str, Any] = field(default_factory=dict)


def _tokens(**more: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    ids = torch.randint(3, VOCAB, (BATCH, POS))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask} | more


def _pixels(size: int = 16) -> Any:
    torch.manual_seed(4)
    return torch.randn(BATCH, 3, size, size)


def _decoder_ids() -> Any:
    torch.manual_seed(5)
    return torch.randint(3, VOCAB, (BATCH, 4))


def _with_image() -> Any:
    """Texts with the image's four patches after their first token."""
    ids = _tokens()["input_ids"].clamp(max=VOCAB - 2)
    ids[:, 1:5] = VOCAB - 1
    return ids


EXAMPLES: dict[str, Callable[[], dict[str, Any]]] = {
    "tokens": _tokens,
    "ids": lambda: {"input_ids": _tokens()["input_ids"]},
    "pairs": lambda: _tokens(decoder_input_ids=_decoder_ids()),
    "pixels": lambda: {"pixel_values": _pixels()},
    "pixels_32": lambda: {"pixel_values": _pixels(32)},
    "speech": lambda: {"input_features": torch.randn(BATCH, 8, 20), "decoder_input_ids": _decoder_ids()},
    "waves": lambda: {"input_values": torch.randn(BATCH, 120)},
    "image_text": lambda: _tokens(pixel_values=_pixels()),
    "image_tokens": lambda: {"input_ids": _with_image(), "attention_mask": _tokens()["attention_mask"], "pixel_values": _pixels()},
}  # fmt: skip


_SMALL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LLAMA = _SMALL | {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 6,
}  # fmt: skip
_BERT = _SMALL | {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "type_vocab_size": 2, "embedding_size": 16,
}  # fmt: skip
_BART = _SMALL | {
    "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 32,
    "decoder_start_token_id": 2, "forced_eos_token_id": 1,
}  # fmt: skip
_VIT = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8, "num_channels": 3,
}  # fmt: skip
_EXPERTS = _LLAMA | {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
_CLIP_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16, "projection_dim": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
_NO_CACHE = {"use_cache": False}
_HIDDEN = "last_hidden_state"

ARCHITECTURES: dict[str, Architecture] = {
    # encoders
    "albert": Architecture("AlbertForMaskedLM", _BERT | {"inner_group_num": 1}, "encoder", "shared layers"),
    "distilbert": Architecture(
        "DistilBertForMaskedLM",
        _SMALL | {"dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32},
        "encoder", "post-norm encoder",
    ),
    "electra": Architecture("ElectraForMaskedLM", _BERT, "encoder", "factorised embeddings"),
    "deberta_v2": Architecture(
        "DebertaV2ForMaskedLM",
        _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm"},
        "encoder", "disentangled attention",
    ),
    "mpnet": Architecture("MPNetForMaskedLM", _BERT, "encoder", "relative bias encoder"),
    "modernbert": Architecture(
        "ModernBertForMaskedLM",
        _BERT | {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 1},
        "encoder", "local and global rotary encoder",
    ),
    "convbert": Architecture("ConvBertForMaskedLM", _BERT | {"head_ratio": 2, "conv_kernel_size": 3}, "encoder", "span convolution"),
    "fnet": Architecture("FNetForMaskedLM", _BERT, "encoder", "Fourier mixing", example="ids"),
    "mobilebert": Architecture(
        "MobileBertForMaskedLM",
        _BERT | {"hidden_size": 24, "embedding_size": 16, "intra_bottleneck_size": 12, "trigram_input": True, "num_feedforward_networks": 2},
        "encoder", "bottleneck encoder",
    ),
    "squeezebert": Architecture("SqueezeBertForMaskedLM", _BERT | {"embedding_size": 24}, "encoder", "grouped convolution encoder"),
    "xlnet": Architecture(
        "XLNetLMHeadModel", _SMALL | {"d_model": 24, "n_layer": 2, "n_head": 4, "d_inner": 40}, "encoder", "two-stream relative attention",
        fixed={"use_mems": False},
    ),
    # encoder-decoders
    "t5": Architecture(
        "T5ForConditionalGeneration",
        _SMALL | {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 2},
        "encoder-decoder", "relative bias encoder-decoder", example="pairs", fixed=_NO_CACHE,
    ),
    "bart": Architecture("BartForConditionalGeneration", _BART, "encoder-decoder", "post-norm encoder-decoder", example="pairs", fixed=_NO_CACHE),
    "pegasus": Architecture("PegasusForConditionalGeneration", _BART, "encoder-decoder", "pre-norm encoder-decoder", example="pairs", fixed=_NO_CACHE),
    "marian": Architecture("MarianMTModel", _BART, "encoder-decoder", "post-norm encoder-decoder", example="pairs", fixed=_NO_CACHE),
    "m2m_100": Architecture("M2M100ForConditionalGeneration", _BART, "encoder-decoder", "pre-norm encoder-decoder", example="pairs", fixed=_NO_CACHE),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        _BART | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16},
        "audio", "speech encoder-decoder", example="speech", fixed=_NO_CACHE,
    ),
    # state space
    "mamba": Architecture(
        "MambaForCausalLM", _SMALL | {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "conv_kernel": 3, "time_step_rank": 4},
        "state-space", "selective scan", fixed=_NO_CACHE,
    ),
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        _SMALL | {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "conv_kernel": 3, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4, "expand": 2},
        "state-space", "chunked state-space duality", fixed=_NO_CACHE,
    ),
    "falcon_mamba": Architecture(
        "FalconMambaForCausalLM", _SMALL | {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "conv_kernel": 3, "time_step_rank": 4},
        "state-space", "selective scan", fixed=_NO_CACHE,
    ),
    "recurrent_gemma": Architecture(
        "RecurrentGemmaForCausalLM",
        _SMALL | {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "lru_width": 24, "attention_window_size": 4, "head_dim": 6},
        "state-space", "linear recurrence and local attention", fixed=_NO_CACHE,
    ),
    "jamba": Architecture(
        "JambaForCausalLM",
        _EXPERTS | {"mamba_d_state": 4, "mamba_d_conv": 3, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
        "state-space", "scan, attention and experts", fixed=_NO_CACHE,
    ),
    "bamba": Architecture(
        "BambaForCausalLM",
        _LLAMA | {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_d_conv": 3, "mamba_chunk_size": 4},
        "state-space", "state-space duality and attention", fixed=_NO_CACHE,
    ),
    "rwkv": Architecture(
        "RwkvForCausalLM", _SMALL | {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "context_length": 16},
        "state-space", "time mixing", example="ids", fixed=_NO_CACHE,
    ),
    # mixture of experts
    "phimoe": Architecture("PhimoeForCausalLM", _EXPERTS, "experts", "sparse mixer", fixed=_NO_CACHE),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM", _EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}, "experts", "shared expert", fixed=_NO_CACHE,
    ),
    "granitemoe": Architecture("GraniteMoeForCausalLM", _EXPERTS, "experts", "parallel experts", fixed=_NO_CACHE),
    # vision
    "vit": Architecture("ViTForImageClassification", _VIT, "vision", "patch encoder", example="pixels"),
    "swin": Architecture(
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2},
        "vision", "shifted windows", example="pixels",
    ),
    "convnext": Architecture(
        "ConvNextForImageClassification", {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "patch_size": 4}, "vision", "convolutional blocks", example="pixels_32",
    ),
    "dinov2": Architecture("Dinov2ForImageClassification", _VIT, "vision", "scaled patch encoder", example="pixels"),
    "resnet": Architecture(
        "ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"}, "vision", "residual convolutions", example="pixels_32",
    ),
    "segformer": Architecture(
        "SegformerForImageClassification",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 2], "mlp_ratios": [2, 2]},
        "vision", "hierarchical attention with convolutions", example="pixels",
    ),
    # Exported, transformers adds a mask of truth values to the biases of its other attention, so that these are 1 higher.
    "beit": Architecture(
        "BeitForImageClassification",
        _VIT | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True, "layer_scale_init_value": 0.1, "attn_implementation": "eager"},
        "vision", "patch encoder with relative biases", example="pixels",
    ),
    "poolformer": Architecture(
        "PoolFormerForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [2, 1], "num_encoder_blocks": 2, "patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1], "layer_scale_init_value": 0.1},
        "vision", "pooling in place of attention", example="pixels",
    ),
    # vision and language
    "clip": Architecture(
        "CLIPModel", {"text_config": _CLIP_TEXT, "vision_config": _VIT | {"projection_dim": 16}, "projection_dim": 16}, "vision-language", "two towers",
        example="image_text", output="logits_per_image",
    ),
    "siglip": Architecture(
        "SiglipModel", {"text_config": _CLIP_TEXT | {"projection_size": 24}, "vision_config": _VIT}, "vision-language", "two towers with a pooling head",
        example="image_text", output="logits_per_image",
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        {"text_config": _LLAMA | {"model_type": "llama"}, "vision_config": _VIT | {"model_type": "clip_vision_model", "projection_dim": 16}, "image_token_id": VOCAB - 1, "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "image_seq_length": 4},
        "vision-language", "image tokens in a decoder", example="image_tokens", fixed=_NO_CACHE,
    ),
    # audio
    "wav2vec2": Architecture(
        "Wav2Vec2ForCTC",
        _SMALL | {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "conv_dim": [8, 8], "conv_kernel": [4, 3], "conv_stride": [3, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        "audio", "waves into an encoder", example="waves",
    ),
    # decoders
    "gpt_bigcode": Architecture("GPTBigCodeForCausalLM", _SMALL | {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16}, "decoder", "one key head", fixed=_NO_CACHE),
    "codegen": Architecture("CodeGenForCausalLM", _SMALL | {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16, "n_ctx": 16, "rotary_dim": 4}, "decoder", "fused rotary parallel block", fixed=_NO_CACHE),
    "mpt": Architecture("MptForCausalLM", {"vocab_size": VOCAB, "d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 16}, "decoder", "ALiBi decoder", fixed=_NO_CACHE),
    "persimmon": Architecture("PersimmonForCausalLM", _LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}, "decoder", "normed queries and squared ReLU", fixed=_NO_CACHE),
    "nemotron": Architecture("NemotronForCausalLM", _LLAMA, "decoder", "LayerNorm with 1 added, squared ReLU", fixed=_NO_CACHE),
    "glm": Architecture("GlmForCausalLM", _LLAMA, "decoder", "interleaved partial rotary", fixed=_NO_CACHE),
    "glm4": Architecture("Glm4ForCausalLM", _LLAMA, "decoder", "sandwich norms, interleaved rotary", fixed=_NO_CACHE),
    "starcoder2": Architecture("Starcoder2ForCausalLM", _LLAMA, "decoder", "biased grouped queries", fixed=_NO_CACHE),
    "smollm3": Architecture("SmolLM3ForCausalLM", _LLAMA, "decoder", "layers without positions", fixed=_NO_CACHE),
    "xglm": Architecture("XGLMForCausalLM", _SMALL | {"d_model": 24, "ffn_dim": 40, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 16}, "decoder", "sinusoidal decoder", fixed=_NO_CACHE),
    "biogpt": Architecture("BioGptForCausalLM", _LLAMA, "decoder", "learned positions by mask", fixed=_NO_CACHE),
    "ctrl": Architecture("CTRLLMHeadModel", _SMALL | {"n_embd": 24, "n_layer": 2, "n_head": 4, "dff": 40, "n_positions": 16}, "decoder", "sinusoidal decoder", fixed=_NO_CACHE),
    "openai_gpt": Architecture("OpenAIGPTLMHeadModel", _SMALL | {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16}, "decoder", "post-norm decoder"),
}  # fmt: skip

# What torch.export cannot carry, and what is said.
REFUSED: dict[str, tuple[Architecture, str]] = {
    "jetmoe": (Architecture("JetMoeForCausalLM", _EXPERTS | {"kv_channels": 6}, "experts", "experts of attention", fixed=_NO_CACHE), r"_local_scalar_dense.default in `model.layers.0.self_attention.experts.router`.*depends on the numbers"),
    "dbrx": (Architecture(
        "DbrxForCausalLM",
        {"vocab_size": VOCAB, "d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 16, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 100.0}, "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 24}},
        "experts", "clipped fused attention and experts", fixed=_NO_CACHE,
    ), r"cannot carry `transformer.blocks.0.ffn.experts` \(DbrxExperts\).*for expert_idx in expert_hit"),
}  # fmt: skip


@cache
def built(name: str) -> tuple[Any, dict[str, Any]]:
    """The model, in evaluation mode, and what it is called with."""
    made = ARCHITECTURES[name] if name in ARCHITECTURES else REFUSED[name][0]
    cls = getattr(transformers, made.model)
    config = cls.config_class(**made.config)
    torch.manual_seed(0)
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape, generator=generator))
    torch.manual_seed(2)
    return model, EXAMPLES[made.example]()
