"""Small decoders of every shape that a stream can be taken apart in, with every parameter redrawn."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import mechjax as mj
from mechjax.decompose import sites
from mechjax.models import Config, assemble
from mechjax.models.experts import Experts
from mechjax.models.latent import Latent

_SMALL = {"d_vocab": 23, "n_ctx": 8, "d_model": 12, "n_layers": 2, "n_heads": 4, "d_head": 5, "d_mlp": 7}
_RMS = {"norm": "rms", "positions": "rotary", "rotary_dim": 4, "mlp": "gated", "tied": False}
CONFIGS = {
    "serial": _SMALL | {"unembed_bias": True},
    "parallel": _SMALL | {"residual": "parallel", "n_kv_heads": 2, "final_softcap": 3.0},
    "parallel_shared": _SMALL | {"residual": "parallel_shared", "positions": "alibi"},
    "attention_only": _SMALL | {"mlp": "none", "positions": "none"},
    "rms": _SMALL | _RMS | {"n_kv_heads": 1, "norm_offset": 1.0, "embed_scale": 2.5},
    "both_norms": _SMALL | _RMS | {"norms": "both"},
    "post_norms": _SMALL | {"norms": "post", "residual_scale": 0.7, "logit_scale": 0.6, "embed_norm": True},
    "no_norms": _SMALL | {"norms": "none", "causal": False},
    "no_norm_weights": _SMALL | {"norm_weight": False, "norms": "both", "residual_scale": 1.3},
}
_EXPERTS = Experts(n_experts=4, top_k=2, d_expert=3)
_LATENT = Latent(q_rank=6, kv_rank=5, d_nope=3, d_rope=2, d_value=4)
ROUTED = {
    "experts_biased": _SMALL | _RMS | {"experts": replace(_EXPERTS, biases=True, router_bias=True), "residual_scale": 0.7},
    "experts_latent": _SMALL | _RMS
    | {
        "experts": replace(_EXPERTS, d_shared=6, layers=(1,)), "latent": _LATENT, "d_head": 5, "rotary_dim": 2,
        "norm_eps": 1e-6,
    },
    "experts_norms": _SMALL | _RMS | {"experts": replace(_EXPERTS, biases=True), "norms": "both", "norm_bias": True},
    "experts_gated": _SMALL | _RMS | {"experts": replace(_EXPERTS, d_shared=6, shared_gate=True)},
}  # fmt: skip
CONFIGS |= ROUTED


def _quick(names):
    return [
        pytest.param(
            n, marks=pytest.mark.slow if n in ("experts_norms", "experts_gated", "experts_latent") else ()
        )
        for n in names
    ]


def decoder(name: str, dtype=jnp.float32):
    """A decoder whose biases and norms are not those of an initialisation."""
    config = Config(**CONFIGS[name])
    keys = jax.random.split(jax.random.key(len(name)), len(config.shapes))
    params = {
        path: (0.3 + 0.4 * jax.random.normal(key, shape)).astype(dtype)
        for (path, shape), key in zip(config.shapes.items(), keys, strict=True)
    }
    return assemble(config, params)


@pytest.fixture(scope="session")
def prompts():
    """Two by two prompts of five tokens, the second ones padded at the left."""
    tokens = jax.random.randint(jax.random.key(1), (2, 2, 5), 0, 23)
    mask = jnp.array([[True] * 5, [False] * 2 + [True] * 3])
    return mj.Prompts(tokens, jnp.broadcast_to(mask, tokens.shape))


@pytest.fixture(scope="session", params=_quick(CONFIGS))
def run(request, prompts):
    """(model, logits, capture) of every shape."""
    model = decoder(request.param)
    return model, *mj.capture(model, sites(model))(prompts)


@pytest.fixture(scope="session", params=_quick(ROUTED))
def routed(request, prompts):
    """(model, logits, capture) of those with experts."""
    model = decoder(request.param)
    return model, *mj.capture(model, sites(model))(prompts)


@pytest.fixture(scope="session")
def serial(prompts):
    """(model, logits, capture) of the plainest."""
    model = decoder("serial")
    return model, *mj.capture(model, sites(model))(prompts)
