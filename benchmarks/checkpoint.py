"""A random GPT-2 checkpoint of seed 0 in Hugging Face layout, written without torch: every side reads the same bytes.

Every parameter is drawn, norm scales and biases too: a library that dropped one would not give equal numbers.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SHAPES = {
    "gpt2-small": dict(n_embd=768, n_layer=12, n_head=12, n_positions=1024, vocab_size=50257),
    "tiny": dict(n_embd=128, n_layer=3, n_head=2, n_positions=256, vocab_size=1000),
}


def write(folder: Path, shape: str) -> Path:
    """Write the checkpoint of that shape to `folder` and return the folder."""
    sizes = SHAPES[shape]
    rng = np.random.default_rng(0)
    d = sizes["n_embd"]

    def draw(*dims: int, mean: float = 0.0, std: float = 0.02) -> np.ndarray:
        return (mean + std * rng.standard_normal(dims, dtype=np.float32)).astype(np.float32)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}.weight": draw(d, mean=1.0, std=0.1), f"{name}.bias": draw(d, std=0.1)}

    def linear(name: str, n_in: int, n_out: int) -> dict[str, np.ndarray]:
        return {f"{name}.weight": draw(n_in, n_out), f"{name}.bias": draw(n_out)}

    tensors = {"transformer.wte.weight": draw(sizes["vocab_size"], d)}
    tensors["transformer.wpe.weight"] = draw(sizes["n_positions"], d)
    for layer in range(sizes["n_layer"]):
        block = f"transformer.h.{layer}"
        tensors |= norm(f"{block}.ln_1") | norm(f"{block}.ln_2")
        tensors |= linear(f"{block}.attn.c_attn", d, 3 * d) | linear(f"{block}.attn.c_proj", d, d)
        tensors |= linear(f"{block}.mlp.c_fc", d, 4 * d) | linear(f"{block}.mlp.c_proj", 4 * d, d)
    tensors |= norm("transformer.ln_f")

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = dict(
        **sizes,
        architectures=["GPT2LMHeadModel"],
        model_type="gpt2",
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        bos_token_id=sizes["vocab_size"] - 1,
        eos_token_id=sizes["vocab_size"] - 1,
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder
