"""Tiny Hugging Face models with every parameter redrawn, the same models in mechjax, and what both compute."""

from dataclasses import dataclass
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from mechjax.models import Decoder
from mechjax.models.load import load
from mechjax.studies.hf_sites import Sites
from mechjax.studies.hf_sites import hf_sites as read_sites

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
}
"""Name -> (prefix of the transformers classes, what their config is given)."""


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


@cache
def pair(name: str) -> Pair:
    kind, given = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**given)
    config._attn_implementation = "eager"
    hf = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()
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
