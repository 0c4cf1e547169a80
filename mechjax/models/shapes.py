"""Paths and shapes of a decoder's parameters, which follow from its config."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechjax.models.config import Config


def norm_places(config: "Config") -> dict[str, bool]:
    """Path of every norm that a decoder has ("blocks.ln1"), and whether it has a bias."""
    mlp, bias = config.mlp != "none", config.norm_bias
    before, after = config.norms in ("pre", "both"), config.norms in ("post", "both")
    has = {
        "ln_embed": config.embed_norm,
        "blocks.ln1": before, "blocks.attn.q_norm": config.qk_norm != "none",
        "blocks.attn.k_norm": config.qk_norm != "none", "blocks.ln1_post": after,
        "blocks.ln2": before and mlp and config.residual != "parallel_shared", "blocks.ln2_post": after and mlp,
        "ln_final": config.norms != "none",
    }  # fmt: skip
    return {
        path: config.qk_norm_bias if path.startswith("blocks.attn.") else bias for path in has if has[path]
    }


def layers_of(path: str, config: "Config") -> tuple[int, ...]:
    """The layers that a parameter of the blocks stacks."""
    if path.startswith("blocks.mlp."):
        return config.mlp_layers
    return config.expert_layers if path.startswith("blocks.moe.") else tuple(range(config.n_layers))


def shapes_of(config: "Config") -> dict[str, tuple[int, ...]]:
    """Path and shape of every parameter, in forward order."""
    m, h, n = config.d_model, config.n_heads, config.n_kv_heads
    d, f, v = config.d_head, config.d_mlp, config.d_vocab
    mlp = bool(config.mlp_layers)
    gated = mlp and config.mlp == "gated"
    has = {
        "W_pos": config.positions == "learned",
        "b_Q": config.qkv_bias, "b_K": config.qkv_bias, "b_V": config.qkv_bias, "b_O": config.out_bias,
        "W_in": mlp, "W_gate": gated, "W_out": mlp, "b_in": mlp and config.mlp_bias,
        "b_gate": gated and config.mlp_bias, "b_out": mlp and config.mlp_bias,
        "sinks": config.attn_sinks, "W_U": not config.tied, "b_U": config.unembed_bias,
    }  # fmt: skip
    norms = norm_places(config)

    def norm(path: str, *shape: int) -> dict[str, tuple[int, ...]]:
        if path not in norms:
            return {}
        parts = {f"{path}.w": config.norm_weight, f"{path}.b": norms[path]}
        return {part: shape for part, there in parts.items() if there}

    def some(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {prefix + name: shape for name, shape in shapes.items() if has.get(name, True)}

    of_heads = (lambda heads: (d,)) if config.qk_norm == "shared" else (lambda heads: (heads, d))
    attention = {
        "W_Q": (m, h, d), "W_K": (m, n, d), "W_V": (m, n, d), "W_O": (h, d, m),
        "b_Q": (h, d), "b_K": (n, d), "b_V": (n, d), "b_O": (m,), "sinks": (h,),
    }  # fmt: skip
    if config.latent is not None:
        attention = config.latent.shapes(m, h, biased=config.qkv_bias)
    moe = {} if config.experts is None else config.experts.shapes(m)
    block = (
        norm("blocks.ln1", m)
        | some("blocks.attn.", attention)
        | norm("blocks.attn.q_norm", *of_heads(h)) | norm("blocks.attn.k_norm", *of_heads(n))
        | norm("blocks.ln1_post", m) | norm("blocks.ln2", m)
        | some("blocks.mlp.", {
            "W_in": (m, f), "W_gate": (m, f), "W_out": (f, m), "b_in": (f,), "b_gate": (f,), "b_out": (m,),
        })
        | {f"blocks.moe.{name}": shape for name, shape in moe.items()}
        | norm("blocks.ln2_post", m)
    )  # fmt: skip
    return (
        some("", {"W_E": (v, m), "W_pos": (config.n_ctx + config.position_offset, m)})
        | norm("ln_embed", m)
        | {path: (len(layers_of(path, config)), *shape) for path, shape in block.items()}
        | norm("ln_final", m)
        | some("", {"W_U": (m, v), "b_U": (v,)})
    )
