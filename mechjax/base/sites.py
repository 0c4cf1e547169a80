"""The table of sites: every activation that a mechjax model names, its axes and what TransformerLens calls it.

In forward order. The axes of a site are written here and nowhere else; a spelling is a pattern with `{}` for the layer.
A Mamba's sites are spelled as in MambaLens. To be read through `catalogue`.
"""

from dataclasses import dataclass

_EVERY, _MLPS = "every model", "models with MLPs (not attention-only ones)"
_POST_NORMS, _QK_NORM = "models with norms after attention and MLP", "models with norms on queries and keys"
_EMBED_NORM = "models with a norm on token embeddings"
_PRE_NORMS = "models with norms before attention and MLP"
_NORMS = "models with norms"
_SECOND_NORM = "models with MLPs that have a norm of their own before them"
_EXPERTS, _SHARED = "models with experts", "models with shared experts"
CROSS = "encoder-decoders"
_DISTILLED = "vision transformers with a head for the distillation token"
_MAMBA, _MAMBA2, _BOTH = "Mamba", "Mamba-2", "Mamba and Mamba-2"
_FALCON = "Falcon Mamba"


@dataclass(frozen=True)
class SiteEntry:
    """One site.

    Attributes:
        name: mechjax's name, TransformerLens' without `hook_`.
        axes: Names of the trailing axes; batch axes stand before them.
        meaning: What the activation is, in words.
        spellings: What TransformerLens calls it; `{}` stands for the layer.
        condition: Which models have it, in words.
        layered: Whether every layer has one.
        costly: Whether it is formed only when somebody asks for it.
        in_heads: Its axes in a Mamba-2, whose channels come in heads, where they differ.
    """

    name: str
    axes: tuple[str, ...]
    meaning: str
    spellings: tuple[str, ...] = ()
    condition: str = _EVERY
    layered: bool = True
    costly: bool = False
    in_heads: tuple[str, ...] = ()


_RESID = ("pos", "d_model")
_SCALE = ("pos", "one")
_QUERIES = ("pos", "head", "d_head")
_KEYS = ("pos", "kv_head", "d_head")
_HEADS, _KEY_HEADS = ("pos", "head", "one"), ("pos", "kv_head", "one")
_PATTERN = ("head", "query", "key")
_EXPERT_NEURONS = ("pos", "expert", "d_mlp")
_NEURONS = ("pos", "d_mlp")
_CHANNELS, _STATE = ("pos", "d_inner"), ("pos", "d_state")
_GROUP = ("pos", "group", "d_state")

TABLE = (
    SiteEntry(
        "patch_embed", ("patch", "d_model"), "What each patch of an image is projected to, without class tokens.",
        condition="vision transformers", layered=False,
    ),
    SiteEntry(
        "ln_embed.scale", _SCALE, "What the norm on token embeddings divides by.",
        ("embed.ln.hook_scale",), condition=_EMBED_NORM, layered=False,
    ),
    SiteEntry(
        "ln_embed.normalized", _RESID, "Output of the norm on token embeddings, its scale and bias applied.",
        ("embed.ln.hook_normalized",),
        condition=_EMBED_NORM, layered=False,
    ),
    SiteEntry(
        "embed", _RESID, "Token embedding, as added to the residual stream (of images: class tokens and patches).",
        ("hook_embed", "embed.hook_out"),
        layered=False,
    ),
    SiteEntry(
        "pos_embed", _RESID, "Learned position embedding, as added to the residual stream.",
        ("hook_pos_embed", "pos_embed.hook_out"),
        condition="models with learned positions", layered=False,
    ),
    SiteEntry(
        "token_type_embed", _RESID, "Embedding of which text a token belongs to.",
        condition="encoders", layered=False,
    ),
    SiteEntry(
        "resid_pre", _RESID, "Residual stream entering the block.",
        ("blocks.{}.hook_resid_pre", "blocks.{}.hook_in"),
    ),
    SiteEntry(
        "attn_in", _RESID, "What attention reads, before its norm; editing it leaves the residual stream alone.",
        ("blocks.{}.hook_attn_in",),
    ),
    SiteEntry(
        "mixer_in", _RESID, "What the mixer reads, before its norm; editing it leaves the residual stream alone.",
        ("blocks.{}.hook_layer_input",), condition=_BOTH,
    ),
    SiteEntry(
        "ln1.scale", _SCALE, "What the first norm divides by: root of the mean square plus epsilon.",
        ("blocks.{}.ln1.hook_scale",), condition=_PRE_NORMS,
    ),
    SiteEntry(
        "ln1.normalized", _RESID, "Output of the first norm, its scale and bias applied.",
        ("blocks.{}.ln1.hook_normalized", "blocks.{}.hook_normalized_input"),
        condition=_PRE_NORMS,
    ),
    SiteEntry(
        "q_input", ("pos", "head", "d_model"), "What each head's query reads, before the norm.",
        ("blocks.{}.hook_q_input",), costly=True,
    ),
    SiteEntry(
        "k_input", ("pos", "kv_head", "d_model"), "What each head's key reads, before the norm.",
        ("blocks.{}.hook_k_input",), costly=True,
    ),
    SiteEntry(
        "v_input", ("pos", "kv_head", "d_model"), "What each head's value reads, before the norm.",
        ("blocks.{}.hook_v_input",), costly=True,
    ),
    SiteEntry(
        "q_latent", ("pos", "q_rank"), "The latent that queries are made of, after its norm.",
        condition="models with latent attention and a rank for queries",
    ),
    SiteEntry(
        "kv_latent", ("pos", "kv_rank"), "The latent that keys and values are made of, after its norm.",
        condition="models with latent attention",
    ),
    SiteEntry(
        "q", _QUERIES, "Queries, as projected (and clipped): before norm and rotation.",
        ("blocks.{}.attn.hook_q", "blocks.{}.attn.q.hook_out"),
    ),
    SiteEntry(
        "k", _KEYS, "Keys, as projected (and clipped): before norm and rotation.",
        ("blocks.{}.attn.hook_k", "blocks.{}.attn.k.hook_out"),
    ),
    SiteEntry(
        "v", _KEYS, "Values.",
        ("blocks.{}.attn.hook_v", "blocks.{}.attn.v.hook_out"),
    ),
    SiteEntry(
        "q_norm.scale", _HEADS, "What the norm on queries divides by (one number where it spans all heads).",
        ("blocks.{}.attn.q_norm.hook_scale",), condition=_QK_NORM,
    ),
    SiteEntry(
        "q_norm.normalized", _QUERIES, "Queries, normalised, before rotation.",
        ("blocks.{}.attn.q_norm.hook_normalized",), condition=_QK_NORM,
    ),
    SiteEntry(
        "k_norm.scale", _KEY_HEADS, "What the norm on keys divides by (one number where it spans all heads).",
        ("blocks.{}.attn.k_norm.hook_scale",), condition=_QK_NORM,
    ),
    SiteEntry(
        "k_norm.normalized", _KEYS, "Keys, normalised, before rotation.",
        ("blocks.{}.attn.k_norm.hook_normalized",), condition=_QK_NORM,
    ),
    SiteEntry(
        "rot_q", _QUERIES, "Queries, rotated by their positions.",
        ("blocks.{}.attn.hook_rot_q",), condition="models with rotary positions",
    ),
    SiteEntry(
        "rot_k", _KEYS, "Keys, rotated by their positions.",
        ("blocks.{}.attn.hook_rot_k",), condition="models with rotary positions",
    ),
    SiteEntry(
        "pos_bias", _PATTERN, "What scores gain by the distance of query and key.",
        condition="models with relative position biases", costly=True,
    ),
    SiteEntry(
        "attn_scores", _PATTERN, "Scores entering the softmax, soft-capped and masked (masked: the least float32).",
        ("blocks.{}.attn.hook_attn_scores",), costly=True,
    ),
    SiteEntry(
        "pattern", _PATTERN, "Attention pattern: softmax of the scores over keys.",
        ("blocks.{}.attn.hook_pattern",), costly=True,
    ),
    SiteEntry(
        "z", _QUERIES, "Each head's mixture of values, before the output weights.",
        ("blocks.{}.attn.hook_z", "blocks.{}.attn.o.hook_in"),
    ),
    SiteEntry(
        "result", ("pos", "head", "d_model"),
        "What each head writes to the residual stream, without the bias; before post-norm and scaling, if any.",
        ("blocks.{}.attn.hook_result",), costly=True,
    ),
    SiteEntry(
        "ln1_post.scale", _SCALE, "What the norm after attention divides by.",
        ("blocks.{}.ln1_post.hook_scale",), condition=_POST_NORMS,
    ),
    SiteEntry(
        "ln1_post.normalized", _RESID, "Output of the norm after attention, its scale and bias applied.",
        ("blocks.{}.ln1_post.hook_normalized",), condition=_POST_NORMS,
    ),
    SiteEntry(
        "attn_out", _RESID, "What attention writes to the residual stream, post-norm and scaling included.",
        ("blocks.{}.hook_attn_out", "blocks.{}.attn.hook_out"),
    ),
    SiteEntry(
        "resid_mid", _RESID, "Residual stream between attention and MLP.",
        ("blocks.{}.hook_resid_mid",),
        condition="models with MLPs and serial residuals (in parallel ones nothing stands between)",
    ),
    SiteEntry(
        "cross_attn_in", _RESID, "What queries of cross-attention read, before its norm.",
        ("decoder.{}.hook_cross_attn_in",), condition=CROSS,
    ),
    SiteEntry(
        "ln_cross.scale", _SCALE, "What the norm before cross-attention divides by.",
        ("decoder.{}.ln2.hook_scale",), condition=CROSS,
    ),
    SiteEntry(
        "ln_cross.normalized", _RESID, "Output of the norm before cross-attention, its scale applied.",
        ("decoder.{}.ln2.hook_normalized",), condition=CROSS,
    ),
    SiteEntry(
        "cross_q", _QUERIES, "Queries of cross-attention, of the decoder's tokens.",
        ("decoder.{}.cross_attn.hook_q",), condition=CROSS,
    ),
    SiteEntry(
        "cross_k", _KEYS, "Keys of cross-attention, of the encoder's tokens.",
        ("decoder.{}.cross_attn.hook_k",), condition=CROSS,
    ),
    SiteEntry(
        "cross_v", _KEYS, "Values of cross-attention, of the encoder's tokens.",
        ("decoder.{}.cross_attn.hook_v",), condition=CROSS,
    ),
    SiteEntry(
        "cross_attn_scores", _PATTERN, "Scores of cross-attention entering the softmax, masked.",
        ("decoder.{}.cross_attn.hook_attn_scores",), condition=CROSS, costly=True,
    ),
    SiteEntry(
        "cross_pattern", _PATTERN, "Which of the encoder's tokens each of the decoder's attends to.",
        ("decoder.{}.cross_attn.hook_pattern",), condition=CROSS, costly=True,
    ),
    SiteEntry(
        "cross_z", _QUERIES, "Each head's mixture of cross-attention's values, before the output weights.",
        ("decoder.{}.cross_attn.hook_z",), condition=CROSS,
    ),
    SiteEntry(
        "cross_result", ("pos", "head", "d_model"), "What each head of cross-attention writes to the residual stream.",
        ("decoder.{}.cross_attn.hook_result",), condition=CROSS, costly=True,
    ),
    SiteEntry(
        "cross_attn_out", _RESID, "What cross-attention writes to the residual stream.",
        ("decoder.{}.hook_cross_attn_out",), condition=CROSS,
    ),
    SiteEntry(
        "resid_cross", _RESID, "Residual stream between cross-attention and MLP.",
        ("decoder.{}.hook_resid_mid_cross",), condition=CROSS,
    ),
    SiteEntry(
        "mlp_in", _RESID, "What the MLP reads, before its norm; editing it leaves the residual stream alone.",
        ("blocks.{}.hook_mlp_in",),
        condition=_MLPS,
    ),
    SiteEntry(
        "ln2.scale", _SCALE, "What the second norm divides by: root of the mean square plus epsilon.",
        ("blocks.{}.ln2.hook_scale",), condition=_SECOND_NORM,
    ),
    SiteEntry(
        "ln2.normalized", _RESID, "Output of the second norm, its scale and bias applied.",
        ("blocks.{}.ln2.hook_normalized",),
        condition=_SECOND_NORM,
    ),
    SiteEntry(
        "router_scores", ("pos", "expert"), "What the router gives each expert, before softmax or sigmoid.",
        condition=_EXPERTS,
    ),
    SiteEntry(
        "expert_indices", ("pos", "choice"), "The experts that each token goes to, the best first.",
        ("blocks.{}.mlp.hook_expert_indices",), condition=_EXPERTS,
    ),
    SiteEntry(
        "expert_weights", ("pos", "choice"), "What the outputs of these experts are multiplied by.",
        condition=_EXPERTS,
    ),
    SiteEntry(
        "expert_pre", _EXPERT_NEURONS, "Input of each expert's gate, whether chosen or not.",
        condition=_EXPERTS, costly=True,
    ),
    SiteEntry(
        "expert_pre_linear", _EXPERT_NEURONS, "The branch of each expert that its gate multiplies.",
        condition=_EXPERTS, costly=True,
    ),
    SiteEntry(
        "expert_post", _EXPERT_NEURONS, "Neurons of each expert, whether chosen or not.",
        condition=_EXPERTS, costly=True,
    ),
    SiteEntry(
        "expert_out", ("pos", "expert", "d_model"), "What each expert writes, times its weight: zero where not chosen.",
        condition=_EXPERTS, costly=True,
    ),
    SiteEntry(
        "shared_pre", _NEURONS, "Input of the shared experts' gate.",
        condition=_SHARED,
    ),
    SiteEntry(
        "shared_pre_linear", _NEURONS, "The branch of the shared experts that their gate multiplies.",
        condition=_SHARED,
    ),
    SiteEntry(
        "shared_post", _NEURONS, "Neurons of the shared experts.",
        condition=_SHARED,
    ),
    SiteEntry(
        "shared_out", _RESID, "What the shared experts write.",
        condition=_SHARED,
    ),
    SiteEntry(
        "mlp_pre", _NEURONS, "Input of the MLP's nonlinearity (in gated MLPs, of the gate).",
        ("blocks.{}.mlp.hook_pre", "blocks.{}.mlp.gate.hook_out"),
        condition=_MLPS,
    ),
    SiteEntry(
        "mlp_pre_linear", _NEURONS, "The branch of a gated MLP that its gate multiplies.",
        ("blocks.{}.mlp.hook_pre_linear",), condition="models with gated MLPs",
    ),
    SiteEntry(
        "mlp_post", _NEURONS, "Neurons: what the MLP's output weights read.",
        ("blocks.{}.mlp.hook_post", "blocks.{}.mlp.out.hook_in"),
        condition=_MLPS,
    ),
    SiteEntry(
        "ln2_post.scale", _SCALE, "What the norm after the MLP divides by.",
        ("blocks.{}.ln2_post.hook_scale",), condition=_POST_NORMS,
    ),
    SiteEntry(
        "ln2_post.normalized", _RESID, "Output of the norm after the MLP, its scale and bias applied.",
        ("blocks.{}.ln2_post.hook_normalized",),
        condition=_POST_NORMS,
    ),
    SiteEntry(
        "mlp_out", _RESID, "What the MLP writes to the residual stream, post-norm and scaling included.",
        ("blocks.{}.hook_mlp_out", "blocks.{}.mlp.hook_out"),
        condition=_MLPS,
    ),
    SiteEntry(
        "gate", _CHANNELS, "What the mixer's output is gated by, before its nonlinearity.",
        ("blocks.{}.hook_skip",), condition=_BOTH, in_heads=_QUERIES,
    ),
    SiteEntry(
        "conv_in", _CHANNELS, "Channels, as projected, before the convolution.",
        ("blocks.{}.hook_in_proj",), condition=_BOTH, in_heads=_QUERIES,
    ),
    SiteEntry("B_in", _GROUP, "B, as projected, before its convolution.", condition=_MAMBA2),
    SiteEntry("C_in", _GROUP, "C, as projected, before its convolution.", condition=_MAMBA2),
    SiteEntry(
        "conv", _CHANNELS, "Channels after the convolution, before its nonlinearity.",
        ("blocks.{}.hook_conv",), condition=_BOTH, in_heads=_QUERIES,
    ),
    SiteEntry(
        "ssm_in", _CHANNELS, "x, what is written to the states: channels after convolution and nonlinearity.",
        ("blocks.{}.hook_ssm_input",), condition=_BOTH, in_heads=_QUERIES,
    ),
    SiteEntry("delta_norm.scale", _SCALE, "What the norm on the rates' latent divides by.", condition=_FALCON),
    SiteEntry(
        "delta_latent", ("pos", "dt_rank"), "The latent that rates are made of, after its norm, if any.",
        ("blocks.{}.hook_delta_1",), condition=_MAMBA,
    ),
    SiteEntry(
        "delta_in", _CHANNELS, "Rates before softplus, their bias added.",
        ("blocks.{}.hook_delta_2",), condition=_BOTH, in_heads=("pos", "head"),
    ),
    SiteEntry(
        "delta", _CHANNELS, "Rates: how much of the state is forgotten, and of x written. (Zero at padding, whatever.)",
        ("blocks.{}.hook_delta",), condition=_BOTH, in_heads=("pos", "head"),
    ),
    SiteEntry("B_norm.scale", _SCALE, "What the norm on B divides by.", condition=_FALCON),
    SiteEntry(
        "B", _STATE, "B: where in the state x is written.",
        ("blocks.{}.hook_B",), condition=_BOTH, in_heads=_GROUP,
    ),
    SiteEntry("C_norm.scale", _SCALE, "What the norm on C divides by.", condition=_FALCON),
    SiteEntry(
        "C", _STATE, "C: what is read of the state.",
        ("blocks.{}.hook_C",), condition=_BOTH, in_heads=_GROUP,
    ),
    # TransformerLens 4's `mixer.hook_ssm_state` holds the same, but what is put there is not in later states.
    SiteEntry(
        "state", ("pos", "d_inner", "d_state"),
        "The state after each token; what is put there is read there, and later states are made of it.",
        ("blocks.{}.hook_h",), condition=_BOTH, costly=True, in_heads=("pos", "head", "d_head", "d_state"),
    ),
    SiteEntry(
        "readout", _CHANNELS, "What C reads of the state.",
        ("blocks.{}.hook_y",), condition=_BOTH, in_heads=_QUERIES,
    ),
    SiteEntry(
        "ssm_out", _CHANNELS, "What is read of the state, with D x added; before it is gated.",
        ("blocks.{}.hook_ssm_output",), condition=_BOTH, in_heads=_QUERIES,
    ),
    SiteEntry(
        "gated", _CHANNELS, "What is gated: in Mamba what the output weights read, in Mamba-2 before their norm.",
        ("blocks.{}.hook_after_skip",), condition=_BOTH, in_heads=_QUERIES,
    ),
    SiteEntry(
        "gated_norm.scale", ("pos", "group", "one"), "What the norm on what is gated divides by.", condition=_MAMBA2
    ),
    SiteEntry("gated_norm.normalized", _QUERIES, "What the output weights read.", condition=_MAMBA2),
    SiteEntry(
        "mixer_out", _RESID, "What the mixer writes to the residual stream.",
        ("blocks.{}.hook_out_proj", "blocks.{}.mixer.hook_out"), condition=_BOTH,
    ),
    SiteEntry(
        "resid_post", _RESID, "Residual stream leaving the block.",
        ("blocks.{}.hook_resid_post", "blocks.{}.hook_out"),
    ),
    SiteEntry(
        "ln_final.scale", _SCALE, "What the last norm divides by: root of the mean square plus epsilon.",
        ("ln_final.hook_scale",), layered=False, condition=_NORMS,
    ),
    SiteEntry(
        "ln_final.normalized", _RESID, "Output of the last norm, which the unembedding reads.",
        ("ln_final.hook_normalized", "unembed.hook_in"),
        layered=False,
        condition=_NORMS,
    ),
    SiteEntry(
        "logits", ("pos", "d_vocab"), "Logits.",
        ("unembed.hook_out",), layered=False,
    ),
    SiteEntry(
        "ln_pool.scale", ("one",), "What the norm on the class token alone divides by.",
        condition="vision transformers whose last norm stands on the class token alone", layered=False,
    ),
    SiteEntry(
        "ln_pool.normalized", ("d_model",), "Output of the norm on the class token alone, its scale and bias applied.",
        condition="vision transformers whose last norm stands on the class token alone", layered=False,
    ),
    SiteEntry(
        "pooled", ("d_model",), "Summary of the first token, which the next-sentence head or the projection reads.",
        condition="encoders and vision transformers with a pooler", layered=False,
    ),
    SiteEntry(
        "image_embed", ("d_proj",), "Projection of the pooled output, which is compared with those of texts.",
        condition="vision transformers with a projection", layered=False,
    ),
    SiteEntry(
        "patch_mean", ("d_model",), "Mean of the normed stream over patches, which the head reads too.",
        condition="vision transformers whose head reads the mean of the patches", layered=False,
    ),
    SiteEntry(
        "class_token_logits", ("d_class",), "Logits of the classes, of the class token alone.",
        condition=_DISTILLED, layered=False,
    ),
    SiteEntry(
        "distillation_logits", ("d_class",), "Logits of the classes, of the distillation token alone.",
        condition=_DISTILLED, layered=False,
    ),
    SiteEntry(
        "class_logits", ("d_class",), "Logits of the classes of an image.",
        condition="vision transformers with a classifier", layered=False,
    ),
    SiteEntry(
        "nsp_logits", ("relation",), "Logits of the second text following the first, and of not.",
        condition="encoders with a next-sentence head", layered=False,
    ),
)  # fmt: skip
"""Every site but those of an encoder-decoder's encoder, in forward order."""
