"""Models to rewrite: every family of the parity cases, and choices that no case has, with every parameter redrawn."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from mechjax.models import Config, Decoder, assemble, parameters
from mechjax.models.experts import Experts
from mechjax.models.latent import Latent
from tests.tolerances import TOL

try:
    from tests.parity import test_experts
    from tests.parity.cases import CASES, pair, quick

    ROUTED = test_experts.CASES
except BaseException as absent:  # importorskip, where there are no transformers
    if type(absent).__name__ != "Skipped":
        raise
    CASES, ROUTED, pair, quick = {}, {}, None, lambda *_: []


def _tiny(**choices: Any) -> Config:
    sizes = {"d_vocab": 23, "n_ctx": 9, "d_model": 12, "n_layers": 2, "n_heads": 4, "d_head": 4, "d_mlp": 10}
    return Config(**sizes | choices)


_EXPERTS = Experts(n_experts=4, top_k=2, d_expert=6, biases=True, router_bias=True)
_RANKS = Latent(q_rank=6, kv_rank=7, d_nope=3, d_rope=2, d_value=4)
_LATENT = {"norm": "rms", "positions": "rotary", "d_head": 5, "rotary_dim": 2}
CONFIGS: dict[str, Config] = {
    "layer_norm": _tiny(),
    "no_biases": _tiny(norm_bias=False, qkv_bias=False, out_bias=False, mlp_bias=False),
    "only_norms_biased": _tiny(norm_bias=True, qkv_bias=False, out_bias=False, mlp_bias=False, tied=False),
    "grouped_biased": _tiny(n_kv_heads=2, d_head=5, out_bias=False, unembed_bias=True),
    "wide_heads": _tiny(d_head=15, positions="none", residual="parallel"),
    "attention_only": _tiny(mlp="none", attn_softcap=3.0, attn_scale=0.3, windows=(2, None)),
    "gated": _tiny(norm="rms", mlp="gated", positions="rotary", n_kv_heads=1, final_softcap=4.0),
    "rms_biased": _tiny(norm="rms", norm_bias=True, mlp="gated", activation="silu"),
    "shared_norm": _tiny(residual="parallel_shared", logit_scale=0.2, qkv_bias=False),
    "alibi": _tiny(positions="alibi", embed_norm=True, residual_scale=0.7),
    "bare_norms": _tiny(norm_weight=False, qkv_bias=True, qkv_clip=0.9, positions="rotary"),
    "no_norms": _tiny(norms="none", causal=False),
    "post_norms": _tiny(norm="rms", norms="post", qk_norm="joint", n_kv_heads=2, positions="rotary"),
    "both_norms": _tiny(norm="rms", norms="both", norm_offset=1.0, qk_norm="shared", embed_scale=3.0),
    "layer_post_norms": _tiny(norms="both", qk_norm="per_head", n_kv_heads=2),
    "experts": _tiny(norm="rms", mlp="gated", n_kv_heads=2, qkv_bias=False, experts=_EXPERTS),
    "some_experts": _tiny(
        norm="rms", mlp="gated", attn_sinks=True, experts=replace(_EXPERTS, layers=(1,), d_shared=5, shared_gate=True)
    ),
    "layer_experts": _tiny(mlp="gated", norm_bias=False, experts=replace(_EXPERTS, d_shared=5)),
    "biased_experts": _tiny(mlp="gated", experts=_EXPERTS),
    "latent": _tiny(**_LATENT, latent=_RANKS, mlp="gated", experts=replace(_EXPERTS, layers=(1,), d_shared=5)),
    "latent_without_rank": _tiny(**_LATENT, latent=replace(_RANKS, q_rank=None), qkv_bias=False),
    "latent_still": _tiny(d_head=5, rotary_dim=2, positions="none", latent=_RANKS, norm_bias=False),
}  # fmt: skip
"""Name -> choices; drawn at random."""

_VARIANTS = {
    "no_biases", "only_norms_biased", "wide_heads", "rms_biased", "layer_post_norms", "alibi", "layer_experts",
    "biased_experts", "latent_without_rank", "latent_still",
}  # fmt: skip
_EACH = [pytest.param(name, marks=pytest.mark.slow if name in _VARIANTS else ()) for name in CONFIGS]
NAMES = [*_EACH, *quick({"gpt2", "pythia", "llama_gqa", "gemma_2"}), *quick({"deepseek_v3"}, ROUTED)]
TOKENS = np.random.default_rng(0).integers(0, 23, (2, 7))


@cache
def subject(name: str) -> Decoder:
    """A model of that name."""
    if name in CONFIGS:
        return drawn(CONFIGS[name])
    assert pair is not None
    return test_experts.pair(name)[1] if name in ROUTED else pair(name).model


def drawn(config: Config) -> Decoder:
    """Every parameter at random: ones and zeros of an initialisation hide mistakes."""
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> jnp.ndarray:
        is_matrix = "W_" in path
        std = 1.3 / config.d_model**0.5 if is_matrix else 0.4
        return jnp.asarray(rng.normal(0 if is_matrix else 0.2, std, shape), jnp.float32)

    return assemble(config, {path: draw(path, shape) for path, shape in config.shapes.items()})


def spelled_out(model: Decoder) -> Decoder:
    """The same model untied and with every bias, zero where it had none: one program runs it and its rewrites."""
    biases = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "unembed_bias"), True)
    config = replace(model.config, tied=False, qk_norm_bias=model.config.qk_norm_bias, **biases)
    params = {path: jnp.zeros(shape, model.W_E.dtype) for path, shape in config.shapes.items()} | {
        "W_U": model.W_E.T
    }
    return assemble(config, params | parameters(model))


def assert_close(ours, theirs, kind: str = "parity") -> None:
    """Equal, relative to the largest number."""
    unit = np.abs(theirs).max()
    assert_allclose(np.asarray(ours) / unit, np.asarray(theirs) / unit, **TOL["float32", kind])
