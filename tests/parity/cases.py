"""Tiny Hugging Face models with every parameter redrawn, the same models in mechjax, and what both compute."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from mechjax.models import Decoder
from mechjax.models.families.modules import spellings
from mechjax.models.load import load
from mechjax.studies.hf_sites import Sites
from mechjax.studies.hf_sites import hf_sites as read_sites
from mechjax.transform.captured import Activations
from tests.tolerances import TOL

_WHY = "parity needs PyTorch and transformers, which the extra `test` installs on Python 3.11 only"
torch = pytest.importorskip("torch", reason=_WHY)
transformers = pytest.importorskip("transformers", reason=_WHY)

N_BATCH, N_POS, N_LAYERS, D_VOCAB = 2, 7, 2, 31

_SMALL = {"vocab_size": D_VOCAB, "bos_token_id": 0, "eos_token_id": 0}
_ROTARY = _SMALL | {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
_GPT2 = _SMALL | {"n_positions": 16, "n_embd": 24, "n_layer": N_LAYERS, "n_head": 3}

_THETA = {"rope_theta": 50.0}
_FALCON = _SMALL | {
    "hidden_size": 24, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "ffn_hidden_size": 40,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "gpt2_untied_gelu": (
        "GPT2",
        _GPT2
        | {
            "activation_function": "gelu",
            "n_inner": 20,
            "tie_word_embeddings": False,
            "scale_attn_weights": False,
        },
    ),
    "pythia": ("GPTNeoX", _ROTARY | {"rotary_pct": 0.34, "hidden_act": "gelu"}),
    "neox_serial": (
        "GPTNeoX",
        _ROTARY
        | {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0, "hidden_act": "relu"},
    ),
    "llama_mha": ("Llama", _ROTARY | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama_gqa": ("Llama", _ROTARY | {"num_key_value_heads": 2, "head_dim": 10, "rope_theta": 500.0}),
    "llama_mqa": ("Llama", _ROTARY | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("Mistral", _ROTARY | {"num_key_value_heads": 2, "sliding_window": 3}),
    "llama_linear": ("Llama", _ROTARY | {"rope_parameters": {"rope_type": "linear", "factor": 3.0} | _THETA}),
    "llama_3": (
        "Llama",
        _ROTARY
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
            | _THETA,
            "head_dim": 16,
        },
    ),
    "llama_yarn": (
        "Llama",
        _ROTARY
        | {
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
            | _THETA,
            "head_dim": 16,
        },
    ),
    "granite": (
        "Granite",
        _ROTARY
        | {
            "num_key_value_heads": 2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.3,
            "logits_scaling": 3.0,
        },
    ),
    "qwen2": (
        "Qwen2",
        _ROTARY
        | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", _ROTARY | {"num_key_value_heads": 2, "head_dim": 10, "attention_bias": True}),
    "gemma": ("Gemma", _ROTARY | {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma_2": (
        "Gemma2",
        _ROTARY
        | {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 5,
            "sliding_window": 3,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma_3": (
        "Gemma3Text",
        _ROTARY
        | {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 5,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
            },
        },
    ),
    "gpt_neo": (
        "GPTNeo",
        _SMALL
        | {
            "max_position_embeddings": 16,
            "hidden_size": 24,
            "num_layers": N_LAYERS,
            "num_heads": 3,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 3,
        },
    ),
    "gpt_j": ("GPTJ", _GPT2 | {"n_head": 3, "rotary_dim": 4}),
    "phi": ("Phi", _ROTARY | {"num_key_value_heads": 2, "partial_rotary_factor": 0.34, "qk_layernorm": True}),
    "phi_2": ("Phi", _ROTARY | {"partial_rotary_factor": 0.7}),
    "phi_3": ("Phi3", _ROTARY | {"num_key_value_heads": 2, "sliding_window": 3, "pad_token_id": 0}),
    "phi_3_long": (
        "Phi3",
        _ROTARY
        | {
            "pad_token_id": 0,
            "original_max_position_embeddings": 4,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.2],
                "long_factor": [1.5, 2.0, 2.5],
            }
            | _THETA,
        },
    ),
    "olmo": ("Olmo", _ROTARY | {"num_key_value_heads": 2, "clip_qkv": 0.7, "pad_token_id": 0}),
    "olmo_2": ("Olmo2", _ROTARY | {"num_key_value_heads": 2, "pad_token_id": 0}),
    "olmo_3": (
        "Olmo3",
        _ROTARY
        | {
            "num_key_value_heads": 2,
            "sliding_window": 3,
            "pad_token_id": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 20.0,
                    "original_max_position_embeddings": 8,
                },
            },
        },
    ),
    "stablelm": (
        "StableLm",
        _ROTARY | {"num_key_value_heads": 2, "use_qkv_bias": True, "partial_rotary_factor": 0.7},
    ),
    "stablelm_parallel": (
        "StableLm",
        _ROTARY
        | {
            "num_key_value_heads": 2,
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "partial_rotary_factor": 0.34,
        },
    ),
    "cohere": ("Cohere", _ROTARY | {"num_key_value_heads": 2, "use_qk_norm": True, "logit_scale": 0.3}),
    "cohere_2": (
        "Cohere2",
        _ROTARY
        | {
            "num_key_value_heads": 2,
            "sliding_window": 3,
            "logit_scale": 0.3,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "falcon_7b": ("Falcon", _FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon_40b": ("Falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_rw": (
        "Falcon",
        _FALCON | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
    ),
    "falcon_rw_twelve_heads": (  # four of whose slopes are no powers of two, which bfloat16 rounds
        "Falcon",
        _FALCON
        | {
            "num_attention_heads": 12,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "alibi": True,
        },
    ),
    "bloom": ("Bloom", _SMALL | {"hidden_size": 24, "n_layer": N_LAYERS, "n_head": 3}),
    "opt": (
        "OPT",
        _SMALL
        | {
            "hidden_size": 24,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 3,
            "ffn_dim": 40,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
            "word_embed_proj_dim": 24,
        },
    ),
}
"""Name -> (prefix of the transformers classes, what their config is given)."""


QUICK = frozenset({
    "gpt2", "pythia", "llama_mha", "llama_gqa", "llama_mqa", "mistral", "llama_3", "qwen3", "gemma_2", "gpt_j", "olmo_2",
    "falcon_7b", "bloom", "granite",
})  # fmt: skip
"""Cases that together make every kind of choice; the others vary them, and are tested among the slow tests."""


def quick(names: Collection[str], among: Collection[str] = tuple(CASES)) -> list[Any]:
    """Parameters of a test: all of `among`, but those beside `names` only where slow tests run."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in among]


@dataclass(frozen=True)
class Pair:
    """One model, twice."""

    hf: Any
    model: Decoder
    tokens: np.ndarray

    def hf_logits(self, **inputs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            inputs = {name: torch.from_numpy(value) for name, value in inputs.items()}
            return self.hf(torch.from_numpy(self.tokens), use_cache=False, **inputs).logits.float().numpy()


_CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def attention_of(name: str) -> str:
    """Which of transformers' attentions is the oracle; its eager one adds Falcon's ALiBi twice."""
    return "sdpa" if CASES[name][1].get("alibi") else "eager"


@cache
def pair(name: str) -> Pair:
    kind, given = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**given)
    config._attn_implementation = attention_of(name)
    hf = getattr(transformers, _CLASSES.get(kind, f"{kind}ForCausalLM"))(config).eval()
    redraw(hf, np.random.default_rng(list(name.encode())))
    tokens = np.random.default_rng(0).integers(0, D_VOCAB, (N_BATCH, N_POS))
    return Pair(hf, in_mechjax(hf), tokens)


def redraw(hf: Any, rng: np.random.Generator) -> None:
    """Every parameter anew: ones and zeros of an initialisation hide mistakes."""
    with torch.no_grad():
        for parameter in hf.parameters():
            shape = tuple(parameter.shape)
            values = (
                rng.normal(0, 0.4, shape) if len(shape) == 1 else rng.normal(0, 1.3 / shape[-1] ** 0.5, shape)
            )
            parameter.copy_(torch.from_numpy(values))


def in_mechjax(hf: Any) -> Decoder:
    """The model as mechjax loads it from the folder that transformers writes."""
    with TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        return load(folder)[0]


def hf_sites(pair: Pair) -> Sites:
    """(site, layer) -> what the Hugging Face model computes there."""
    return read_sites(pair.hf, pair.model.config, pair.tokens)


def module_values(hf: Any, tokens: np.ndarray, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """ "path.input" and "path.output" of every module -> what enters and leaves it, the first of a tuple."""
    seen: dict[str, np.ndarray] = {}

    def keep(path: str, _module: Any, entering: tuple[Any, ...], named: dict[str, Any], leaving: Any) -> None:
        first = entering[0] if entering else named.get("hidden_states")
        for end, value in (
            ("input", first),
            ("output", leaving[0] if isinstance(leaving, tuple) else leaving),
        ):
            if isinstance(value, torch.Tensor) and not value.is_complex():
                seen[f"{path}.{end}"] = value.detach().float().numpy().copy()

    handles = [
        module.register_forward_hook(partial(keep, path), with_kwargs=True)
        for path, module in hf.named_modules()
    ]
    with torch.no_grad():
        hf(torch.from_numpy(tokens), **{name: torch.from_numpy(value) for name, value in inputs.items()})
    for handle in handles:
        handle.remove()
    return seen


def assert_spelled(
    model: Any, acts: Activations, seen: dict[str, np.ndarray], before: Collection[str] = ()
) -> set[str]:
    """Every path of a module that names a site holds that site's numbers, heads merged; the paths, layers left out.

    Parts of paths in `before` are those of earlier versions of transformers.
    """
    paths = {path for paths in spellings(model.config).values() for path in paths}
    for pattern in paths:
        site = next(site.name for site in acts.sites if pattern in site.also)
        if any(renamed in pattern for renamed in ("embed_out", "block_sparse_moe", *before)):
            continue
        for layer in acts.layers[site] or (None,):
            path = pattern if layer is None else pattern.format(layer)
            theirs, ours = seen[path], np.asarray(acts[path])
            if theirs.ndim == 4 and theirs.shape[1:3] == ours.shape[2:0:-1]:  # heads before positions
                theirs = theirs.swapaxes(1, 2)
            if theirs.size < ours.size:  # positions are embedded once for all examples
                theirs = np.broadcast_to(theirs, (len(ours), *theirs.shape[1:]))
            theirs = theirs.reshape(ours.shape)
            unit = np.abs(theirs).max()
            assert_allclose(ours / unit, theirs / unit, **TOL["float32", "parity"], err_msg=path)
    return paths
