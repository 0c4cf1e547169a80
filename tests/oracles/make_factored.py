"""Write what TransformerLens makes of two tiny models' circuits, and of their weights when it processes them.

    python tests/oracles/make_factored.py        # in an environment with transformer-lens 4.3 and transformers

One `factored_<family>.npz` each, beside this script: the Hugging Face weights (`weight/...`), the config and the
versions (JSON), norms, singular values and eigenvalues of QK and OV, all composition scores, and every weight after
each step of processing (`<step>/...`).
"""

import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformer_lens import FactoredMatrix
from transformer_lens.model_bridge import TransformerBridge

HERE = Path(__file__).parent
VOCAB, LAYERS = 19, 3
SMALL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SMALL, n_positions=8, n_embd=12, n_layer=LAYERS, n_head=3, n_inner=10)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SMALL, hidden_size=12, intermediate_size=10, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, head_dim=6, max_position_embeddings=8, tie_word_embeddings=False,
        )
    ),
}  # fmt: skip
STEPS = {
    "fold_norm": "fold_ln", "center_writing": "center_writing_weights", "center_unembed": "center_unembed",
    "fold_value_bias": "fold_value_biases", "refactor_qk_ov": "refactor_factored_attn_matrices",
}  # fmt: skip
"""Our name of a step -> theirs, those that apply to Llama too first and third."""
WEIGHTS = (
    "W_E", "W_pos", "W_U", "b_U", "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in",
    "W_gate", "W_out", "b_in", "b_out",
)  # fmt: skip


def redraw(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Every parameter anew: ones and zeros of an initialisation hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            shape = tuple(parameter.shape)
            std = 0.4 if len(shape) == 1 else shape[-1] ** -0.5
            parameter.copy_(torch.from_numpy(rng.normal(0.3 if len(shape) == 1 else 0.0, std, shape)))


def save_tokenizer(folder: str) -> None:
    """Any tokenizer of that many tokens: TransformerLens loads none without one."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0")
    )
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "0")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def bridge(folder: str, **processing: bool) -> TransformerBridge:
    """The checkpoint in TransformerLens, processed as said and in no other way."""
    model = TransformerBridge.boot_transformers(
        folder, hf_model=transformers.AutoModelForCausalLM.from_pretrained(folder), device="cpu"
    )
    steps = dict.fromkeys(STEPS.values(), False) | processing
    model.enable_compatibility_mode(
        disable_warnings=True, no_processing=not processing, **(steps if processing else {})
    )
    return model


def circuits(model: TransformerBridge) -> dict[str, torch.Tensor]:
    """Algebra of every head's circuits, with shared keys and values repeated."""
    W_Q, W_K, W_V, W_O = (getattr(model, f"W_{letter}") for letter in "QKVO")
    W_K, W_V = (W.repeat_interleave(W_Q.shape[1] // W.shape[1], 1) for W in (W_K, W_V))
    found = {}
    for name, matrix in (
        ("qk", FactoredMatrix(W_Q, W_K.transpose(-1, -2))),
        ("ov", FactoredMatrix(W_V, W_O)),
    ):
        found |= {
            f"{name}/norm": matrix.norm(),
            f"{name}/S": matrix.S,
            f"{name}/eigenvalues": matrix.eigenvalues,
        }
    full = model.W_E @ FactoredMatrix(W_V, W_O) @ model.W_U
    values = full.eigenvalues
    found["copying"] = values.real.sum(-1) / values.abs().sum(-1)
    return found | {
        f"composition/{mode.lower()}": model.all_composition_scores(mode).scores for mode in "QKV"
    }


def weights(model: TransformerBridge) -> dict[str, torch.Tensor]:
    """Every weight that the model has, by its name."""
    found = {}
    for name in WEIGHTS:
        try:
            found[name] = getattr(model, name)
        except (AttributeError, TypeError):
            continue  # a bias or positions that this family lacks
    return {name: value for name, value in found.items() if value is not None}


def main() -> None:
    """Write both files."""
    for family, build in MODELS.items():
        model = build().eval()
        redraw(model, np.random.default_rng(0))
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            save_tokenizer(folder)
            config = json.loads((Path(folder) / "config.json").read_text())
            arrays = circuits(bridge(folder))
            for step, theirs in STEPS.items():
                if family == "gpt2" or step in ("fold_norm", "center_unembed"):
                    processed = weights(bridge(folder, **{theirs: True}))
                    arrays |= {f"{step}/{name}": value for name, value in processed.items()}
        state = {f"weight/{name}": value for name, value in model.state_dict().items()}
        versions = {name: version(name) for name in ("transformer-lens", "transformers", "torch")}
        np.savez_compressed(
            HERE / f"factored_{family}.npz",
            config=json.dumps(config), versions=json.dumps(versions),
            **{name: value.detach().numpy() for name, value in (arrays | state).items()},
        )  # fmt: skip


if __name__ == "__main__":
    main()
