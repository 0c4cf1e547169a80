"""Random tiny models of transformers, every parameter redrawn: norms' ones and zeros would hide mistakes."""

from functools import cache

import pytest

FAMILIES = ("gpt2", "neox", "llama")


@cache
def tiny(family: str):
    """A transformers model in evaluation mode."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    decoder = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **ids}
    decoder |= {"intermediate_size": 24, "max_position_embeddings": 32}
    config, kind = {
        "gpt2": lambda: (
            transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=3, n_head=4, **ids),
            transformers.GPT2LMHeadModel,
        ),
        "neox": lambda: (transformers.GPTNeoXConfig(**decoder), transformers.GPTNeoXForCausalLM),
        "llama": lambda: (
            transformers.LlamaConfig(**decoder, num_key_value_heads=2),
            transformers.LlamaForCausalLM,
        ),
    }[family]()
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model
