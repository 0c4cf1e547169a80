"""Vision transformers: ViT, DeiT, CLIP's image side and DINOv2 (papers in `models/vit`).

Tensors are named as checkpoints have them; transformers 5 calls some of the modules otherwise (`moved`). Whether a
ViTModel has its pooler is told by its weights alone (`_settled`).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.families.family import Family, HfConfig, activation
from mechjax.models.families.rule import Rule
from mechjax.models.vit_config import ViTConfig


def _affine(name: str, path: str, weight: str, bias: str, *, letter: str = "") -> tuple[Rule, Rule]:
    """The weight and bias of a projection; `letter` ends their names."""
    ending = f"_{letter}" if letter else ""
    return (
        Rule(name + ".weight", (f"{path}W{ending}",), weight),
        Rule(name + ".bias", (f"{path}b{ending}",), bias),
    )


def _norm(name: str, path: str) -> tuple[Rule, Rule]:
    return Rule(name + ".weight", (path + ".w",), "m"), Rule(name + ".bias", (path + ".b",), "m")


def _attention(name: str, parts: tuple[str, str, str], out: str) -> tuple[Rule, ...]:
    """Queries, keys and values of every layer, the modules of which end in `parts`, and the output."""
    inward = [
        _affine(f"{name}.{part}", "blocks.attn.", "(h d) m -> m h d", "(h d) -> h d", letter=letter)
        for part, letter in zip(parts, "QKV", strict=True)
    ]
    outward = _affine(out, "blocks.attn.", "m (h d) -> h d m", "m", letter="O")
    return tuple(rule for pair in (*inward, outward) for rule in pair)


def _mlp(first: str, second: str) -> tuple[Rule, ...]:
    return (
        *_affine(first, "blocks.mlp.", "f m -> m f", "f", letter="in"),
        *_affine(second, "blocks.mlp.", "m f -> f m", "m", letter="out"),
    )


def _plain(config: ViTConfig) -> bool:
    return config.mlp == "plain"


def _stem(base: str) -> tuple[Rule, ...]:
    """What ViT, DeiT and DINOv2 share: patches, tokens and positions, attention, the last norm."""
    attention = base + "encoder.layer.{}.attention."
    return (
        Rule(base + "embeddings.cls_token", ("class_token",), "1 1 m -> m"),
        Rule(base + "embeddings.distillation_token", ("distillation_token",), "1 1 m -> m"),
        Rule(base + "embeddings.position_embeddings", ("W_pos",), "1 r m -> r m"),
        *_affine(base + "embeddings.patch_embeddings.projection", "", "m c y x -> c y x m", "m", letter="patch"),
        *_attention(attention + "attention", ("query", "key", "value"), attention + "output.dense"),
        *_norm(base + "layernorm", "ln_final"),
    )  # fmt: skip


def _vit(base: str) -> tuple[Rule, ...]:
    """The tensors of ViT and DeiT."""
    block = base + "encoder.layer.{}."
    return (
        *_stem(base),
        *_norm(block + "layernorm_before", "blocks.ln1"), *_norm(block + "layernorm_after", "blocks.ln2"),
        *_mlp(block + "intermediate.dense", block + "output.dense"),
        *_affine(base + "pooler.dense", "", "o m -> m o", "m", letter="pool"),
    )  # fmt: skip


def _size(key: str) -> Callable[[HfConfig], tuple[Any, ...]]:
    """Reads a height and width: one number for both, or two."""

    def read(hf: HfConfig) -> tuple[Any, ...]:
        value = hf[key]
        return tuple(value) if isinstance(value, list) else (value, value)

    return read


def _classes(hf: HfConfig) -> tuple[str, ...]:
    """Names of the classes; transformers has two where neither names nor their number are given."""
    labels = hf.given.get("id2label")
    if not labels:
        number = hf.given.get("num_labels", 2)
        if not isinstance(number, int) or not 1 <= number < 2**24:
            raise UnsupportedModelError(
                f"The config has `num_labels` = {number!r}; a classifier has at least 1."
            )
        return tuple(f"LABEL_{i}" for i in range(number))
    by_id = {int(i): str(name) for i, name in labels.items()}
    if sorted(by_id) != list(range(len(by_id))):
        raise UnsupportedModelError(
            f"The config has `id2label` for {sorted(by_id)[:5]} and so on; classes must be numbered from 0 to "
            f"{len(by_id) - 1}."
        )
    return tuple(by_id[i] for i in range(len(by_id)))


def _pooled(hf: HfConfig) -> str:
    """The pooler, whose width and nonlinearity are ours."""
    width, act = hf["pooler_output_size"], hf["pooler_act"]
    if width not in (None, hf["hidden_size"]) or act != "tanh":
        raise UnsupportedModelError(
            f"The config has `pooler_output_size` = {width!r} and `pooler_act` = {act!r}; implemented are only "
            f"{hf['hidden_size']!r} (`hidden_size`) and 'tanh'."
        )
    return "tanh"


def _sized(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _to_hf(config: ViTConfig) -> dict[str, Any]:
    named = {str(i): name for i, name in enumerate(config.classes)}
    return {
        "hidden_size": config.d_model, "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_mlp, "hidden_act": config.activation, "layer_norm_eps": config.norm_eps,
        "image_size": _sized(config.image_size), "patch_size": _sized(config.patch_size),
        "num_channels": config.n_channels, "qkv_bias": config.qkv_bias,
    } | ({"id2label": named, "label2id": {name: int(i) for i, name in named.items()}} if named else {})  # fmt: skip


def _clip_to_hf(config: ViTConfig) -> dict[str, Any]:
    hf = _to_hf(config)
    del hf["qkv_bias"]
    return hf | ({} if config.d_proj is None else {"projection_dim": config.d_proj})


def _d_mlp(hf: HfConfig) -> int:
    """DINOv2's neurons: a multiple of the width; two thirds of that in eights where the MLP is gated."""
    ratio = hf["mlp_ratio"]
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio < 2**16:
        raise UnsupportedModelError(f"The config has `mlp_ratio` = {ratio!r}; it must be a positive number.")
    width = int(hf.count("hidden_size", 2**31 - 1) * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if hf["use_swiglu_ffn"] else width


def _dinov2_to_hf(config: ViTConfig) -> dict[str, Any]:
    hf, gated = _to_hf(config), config.mlp == "gated"
    neurons = hf.pop("intermediate_size") * (3 / 2 if gated else 1)
    # Neither of DINOv2's weights says the ratio; rounding to eights moved it by less than a half.
    return hf | {
        "mlp_ratio": max(1, round(neurons / config.d_model)), "use_swiglu_ffn": gated, "use_mask_token": False,
    }  # fmt: skip


def _modules(
    base: str, block: str, attention: str, head: str | None
) -> dict[str, tuple[str | None, str | None]]:
    """Modules without parameters of their own, and those whose parameters are not read by position."""
    found: dict[str, tuple[str | None, str | None]] = {
        f"{block}.{attention}": (None, "attn_out"), f"{block}.mlp": (None, "mlp_out"),
        f"{block}.mlp.activation_fn": ("mlp_pre", "mlp_post"),
        base + "embeddings.patch_embeddings": (None, "patch_embed"),
    }  # fmt: skip
    return found if head is None else found | {head: (None, "class_logits")}


_CONFIG: Mapping[str, Any] = {
    "image_size": _size("image_size"),
    "patch_size": _size("patch_size"),
    "n_channels": "num_channels",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_mlp": "intermediate_size",
    "activation": activation("hidden_act"),
    "norm_eps": "layer_norm_eps",
    "qkv_bias": "qkv_bias",
}
_DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "num_channels": 3,
    "qkv_bias": True, "pooler_output_size": None, "pooler_act": "tanh",
}  # fmt: skip
_IGNORED = frozenset({
    "attention_probs_dropout_prob", "hidden_dropout_prob", "encoder_stride", "pooler_output_size", "pooler_act",
})  # fmt: skip
_HEAD = _affine("classifier", "", "k m -> m k", "k", letter="class")


_PROJECTIONS = {
    "attention.query": "q_proj", "attention.key": "k_proj", "attention.value": "v_proj", "output.dense": "o_proj",
}  # fmt: skip


def _settled(config: ViTConfig, tensors: Collection[str]) -> ViTConfig:
    """Without pooler where none is stored."""
    stored = any(name.endswith("pooler.dense.weight") for name in tensors)
    return config if stored else replace(config, pooler="none")


def _moved(base: str, block: str) -> dict[str, str]:
    """Paths of modules as checkpoints spell them, and as transformers does from 5 on."""
    old = base + "encoder.layer.{}"
    return {
        **{f"{old}.attention.{theirs}": f"{block}.attention.{new}" for theirs, new in _PROJECTIONS.items()},
        f"{old}.intermediate.dense": f"{block}.mlp.fc1", f"{old}.output.dense": f"{block}.mlp.fc2",
        **{f"{old}.{norm}": f"{block}.{norm}" for norm in ("layernorm_before", "layernorm_after")}, old: block,
    }  # fmt: skip


VIT = Family(
    name="vit",
    architectures=("ViTForImageClassification",),
    model_type="vit",
    config=_CONFIG | {"classes": _classes},
    choices={"head": "class"},
    weights=(*_vit("vit."), *_HEAD),
    prefix="vit.",
    to_hf=_to_hf,
    defaults=_DEFAULTS,
    ignored=_IGNORED,
    # Checkpoints of the pretrained model have a pooler, which the classifier does not use.
    ignored_weights=(r"vit\.pooler\.dense\.(weight|bias)",),
    kind=ViTConfig,
    modules=_modules("vit.", "vit.layers.{}", "attention", "classifier"),
    moved=_moved("vit.", "vit.layers.{}"),
)
VIT_BARE = replace(
    VIT,
    name="vit_bare",
    architectures=("ViTModel",),
    config=_CONFIG | {"pooler": _pooled},
    choices={},
    weights=_vit("vit."),
    # Its checkpoints may be whole ones, whose heads it does not use.
    ignored_weights=(r"classifier\.(weight|bias)",),
    modules=_modules("vit.", "vit.layers.{}", "attention", None) | {"vit.pooler": (None, "pooled")},
    settled=_settled,
)
DEIT = replace(
    VIT,
    name="deit",
    architectures=("DeiTForImageClassification",),
    model_type="deit",
    choices={"head": "class", "distilled": True},
    weights=(*_vit("deit."), *_HEAD),
    prefix="deit.",
    ignored_weights=(r"deit\.pooler\.dense\.(weight|bias)",),
    modules=_modules("deit.", "deit.layers.{}", "attention", "classifier"),
    moved=_moved("deit.", "deit.layers.{}"),
)
DEIT_DISTILLED = replace(
    DEIT,
    name="deit_distilled",
    architectures=("DeiTForImageClassificationWithTeacher",),
    choices={"head": "class_distillation", "distilled": True},
    weights=(
        *_vit("deit."),
        *_affine("cls_classifier", "", "k m -> m k", "k", letter="class"),
        *_affine("distillation_classifier", "", "k m -> m k", "k", letter="distillation"),
    ),
    modules=_modules("deit.", "deit.layers.{}", "attention", None)
    | {
        "cls_classifier": (None, "class_token_logits"),
        "distillation_classifier": (None, "distillation_logits"),
    },
)
DEIT_BARE = replace(
    DEIT,
    name="deit_bare",
    architectures=("DeiTModel",),
    config=_CONFIG | {"pooler": _pooled},
    choices={"distilled": True},
    weights=_vit("deit."),
    ignored_weights=(r"(cls_|distillation_)?classifier\.(weight|bias)",),
    modules=_modules("deit.", "deit.layers.{}", "attention", None) | {"deit.pooler": (None, "pooled")},
    settled=_settled,
)

_CLIP, _CLIP_BLOCK = "vision_model.", "vision_model.encoder.layers.{}."
CLIP_VISION = Family(
    name="clip_vision",
    architectures=("CLIPVisionModel",),
    model_type="clip_vision_model",
    config={ours: theirs for ours, theirs in _CONFIG.items() if ours != "qkv_bias"},
    choices={"patch_bias": False, "embed_norm": True, "last_norm": "class", "pooler": "class"},
    weights=(
        Rule(_CLIP + "embeddings.class_embedding", ("class_token",), "m"),
        Rule(_CLIP + "embeddings.position_embedding.weight", ("W_pos",), "r m"),
        Rule(_CLIP + "embeddings.patch_embedding.weight", ("W_patch",), "m c y x -> c y x m"),
        *_norm(_CLIP + "pre_layrnorm", "ln_embed"),  # transformers' spelling
        *_norm(_CLIP_BLOCK + "layer_norm1", "blocks.ln1"), *_norm(_CLIP_BLOCK + "layer_norm2", "blocks.ln2"),
        *_attention(_CLIP_BLOCK + "self_attn", ("q_proj", "k_proj", "v_proj"), _CLIP_BLOCK + "self_attn.out_proj"),
        *_mlp(_CLIP_BLOCK + "mlp.fc1", _CLIP_BLOCK + "mlp.fc2"),
        *_norm(_CLIP + "post_layernorm", "ln_pool"),
    ),
    prefix=_CLIP,
    to_hf=_clip_to_hf,
    defaults={
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 32, "num_channels": 3,
        "projection_dim": 512,
    },
    ignored=frozenset({"attention_dropout", "dropout", "initializer_factor", "projection_dim"}),
    ignored_weights=(r"vision_model\.embeddings\.position_ids", r"visual_projection\.weight"),
    kind=ViTConfig,
    modules={
        _CLIP_BLOCK + "self_attn": (None, "attn_out"), _CLIP_BLOCK + "mlp": (None, "mlp_out"),
        _CLIP_BLOCK + "mlp.activation_fn": ("mlp_pre", "mlp_post"),
    },
    reads={
        "ln_embed.w": (None, ("ln_embed.normalized",)), "W_patch": (None, ("patch_embed",)),
        "ln_pool.w": (None, ("ln_pool.normalized", "pooled")),
    },
)  # fmt: skip
CLIP_VISION_PROJECTION = replace(
    CLIP_VISION,
    name="clip_vision_projection",
    architectures=("CLIPVisionModelWithProjection",),
    config={**CLIP_VISION.config, "d_proj": "projection_dim"},
    weights=(*CLIP_VISION.weights, Rule("visual_projection.weight", ("W_proj",), "j m -> m j")),
    ignored_weights=CLIP_VISION.ignored_weights[:1],
    reads={**CLIP_VISION.reads, "W_proj": (None, ("image_embed",))},
)

_DINO_BLOCK = "dinov2.encoder.layer.{}."
DINOV2 = Family(
    name="dinov2",
    architectures=("Dinov2ForImageClassification",),
    model_type="dinov2",
    config=_CONFIG
    | {"classes": _classes, "d_mlp": _d_mlp, "mlp": lambda hf: "gated" if hf["use_swiglu_ffn"] else "plain"}
    # The gate of DINOv2's gated MLP is SiLU, whatever `hidden_act` says.
    | {"activation": lambda hf: "silu" if hf["use_swiglu_ffn"] else activation("hidden_act")(hf)},
    choices={"head": "class_mean", "layer_scale": True, "any_size": True},
    weights=(
        *_stem("dinov2."),
        *_norm(_DINO_BLOCK + "norm1", "blocks.ln1"), *_norm(_DINO_BLOCK + "norm2", "blocks.ln2"),
        *(replace(rule, when=_plain) for rule in _mlp(_DINO_BLOCK + "mlp.fc1", _DINO_BLOCK + "mlp.fc2")),
        Rule(
            _DINO_BLOCK + "mlp.weights_in.weight", ("blocks.mlp.W_gate", "blocks.mlp.W_in"),
            "(part f) m -> part m f",
        ),
        Rule(_DINO_BLOCK + "mlp.weights_in.bias", ("blocks.mlp.b_gate", "blocks.mlp.b_in"), "(part f) -> part f"),
        *(
            replace(rule, when=lambda config: config.mlp == "gated")
            for rule in _affine(_DINO_BLOCK + "mlp.weights_out", "blocks.mlp.", "m f -> f m", "m", letter="out")
        ),
        Rule(_DINO_BLOCK + "layer_scale1.lambda1", ("blocks.scale1",), "m"),
        Rule(_DINO_BLOCK + "layer_scale2.lambda1", ("blocks.scale2",), "m"),
        Rule("classifier.weight", ("W_class", "W_mean"), "k (part m) -> part m k"),
        Rule("classifier.bias", ("b_class",), "k"),
    ),
    prefix="dinov2.",
    to_hf=_dinov2_to_hf,
    defaults={key: value for key, value in _DEFAULTS.items() if not key.startswith(("pooler", "inter"))}
    | {"layer_norm_eps": 1e-6, "patch_size": 14, "mlp_ratio": 4, "use_swiglu_ffn": False},
    # Layer scales are among the weights; the mask token is for training; the rest is of a backbone's outputs.
    ignored=frozenset({
        "attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate", "layerscale_value", "use_mask_token",
        "hidden_act", "apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names",
    }),
    ignored_weights=(r"dinov2\.embeddings\.mask_token",),
    kind=ViTConfig,
    modules={
        "dinov2.embeddings.patch_embeddings": (None, "patch_embed"), "classifier": (None, "class_logits"),
        _DINO_BLOCK + "layer_scale1": (None, "attn_out"), _DINO_BLOCK + "layer_scale2": (None, "mlp_out"),
    },
    # What attention and MLP give is scaled before it is added.
    reads={"blocks.attn.W_O": ("z", ()), "blocks.mlp.W_out": ("mlp_post", ())},
    moved={f"{_DINO_BLOCK}attention.{old}": f"{_DINO_BLOCK}attention.{new}" for old, new in _PROJECTIONS.items()}
    | {f"{_DINO_BLOCK}mlp.weights_out": f"{_DINO_BLOCK}mlp.down_proj"},
)  # fmt: skip
DINOV2_BARE = replace(
    DINOV2,
    name="dinov2_bare",
    architectures=("Dinov2Model",),
    config={ours: theirs for ours, theirs in DINOV2.config.items() if ours != "classes"},
    choices={"pooler": "class", "layer_scale": True, "any_size": True},
    weights=tuple(rule for rule in DINOV2.weights if not rule.name.startswith("classifier")),
    ignored_weights=(*DINOV2.ignored_weights, r"classifier\.(weight|bias)"),
    modules={path: sites for path, sites in DINOV2.modules.items() if path != "classifier"},
)

VISION: tuple[Family, ...] = (
    VIT, VIT_BARE, DEIT, DEIT_DISTILLED, DEIT_BARE, CLIP_VISION, CLIP_VISION_PROJECTION, DINOV2, DINOV2_BARE,
)  # fmt: skip
"""Every family of vision transformers."""
