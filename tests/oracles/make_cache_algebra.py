"""Write what TransformerLens' ActivationCache computes on two tiny models, with their weights.

    python tests/oracles/make_cache_algebra.py        # in an environment with transformer-lens 4.3 and transformers

One `cache_algebra_<family>.npz` each, beside this script: the Hugging Face weights (`weight/...`), the config and the
versions (JSON), the tokens, and every stack with its labels. Unprocessed weights, but for `logit_attrs`, which
TransformerLens gets right only where the norms are folded into the weights.
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
from transformer_lens.model_bridge import TransformerBridge

HERE = Path(__file__).parent
BATCH, POS, VOCAB, LAYERS = 2, 5, 19, 2
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
    """The checkpoint in TransformerLens."""
    model = TransformerBridge.boot_transformers(
        folder, hf_model=transformers.AutoModelForCausalLM.from_pretrained(folder), device="cpu"
    )
    model.enable_compatibility_mode(disable_warnings=True, **processing)
    return model


def stacks(model: TransformerBridge, tokens: torch.Tensor) -> dict[str, Any]:
    """Every stack of the unprocessed model, with its labels."""
    logits, cache = model.run_with_cache(tokens)
    named = {
        "decompose_resid": cache.decompose_resid(return_labels=True),
        "decompose_resid_1": cache.decompose_resid(1, return_labels=True),
        "decompose_resid_1_mlp_input": cache.decompose_resid(1, mlp_input=True, return_labels=True),
        "decompose_resid_attn": cache.decompose_resid(mode="attn", return_labels=True),
        "decompose_resid_mlp": cache.decompose_resid(mode="mlp", return_labels=True),
        "accumulated_resid": cache.accumulated_resid(return_labels=True),
        "accumulated_resid_mid": cache.accumulated_resid(
            1, incl_mid=True, mlp_input=True, return_labels=True
        ),
        "head_results": cache.stack_head_results(return_labels=True, incl_remainder=True),
        "head_results_1": cache.stack_head_results(1, return_labels=True),
        "neuron_results": cache.stack_neuron_results(-1, return_labels=True, incl_remainder=True),
        "neuron_results_1": cache.stack_neuron_results(1, return_labels=True),
        "full_decomposition": cache.get_full_resid_decomposition(return_labels=True),
        "full_decomposition_1_mlp_input": cache.get_full_resid_decomposition(
            1, mlp_input=True, expand_neurons=False, return_labels=True
        ),
    }
    for name, (layer, mlp_input) in {"final": (-1, False), "1": (1, False), "1_mlp_input": (1, True)}.items():
        parts = cache.decompose_resid(layer, mlp_input=mlp_input)
        named[f"apply_norm_{name}"] = cache.apply_ln_to_stack(parts, layer, mlp_input=mlp_input), []
    found = {f"{name}/values": values for name, (values, _) in named.items()}
    found |= {f"{name}/labels": np.array([str(x) for x in labels]) for name, (_, labels) in named.items()}
    return found | {"logits": logits}


def attributions(
    model: TransformerBridge, tokens: torch.Tensor, right: list[int], wrong: list[int]
) -> dict[str, Any]:
    """Logit attributions, of the model with folded norms."""
    _, cache = model.run_with_cache(tokens)
    answer, other = torch.tensor(right), torch.tensor(wrong)
    parts, heads = cache.decompose_resid(), cache.stack_head_results()
    neurons = cache.stack_neuron_results(-1)
    return {
        "logit_attribution_token": cache.logit_attrs(parts, answer),
        "logit_attribution": cache.logit_attrs(parts, answer, other),
        "logit_attribution_heads": cache.logit_attrs(heads, answer, other),
        "logit_attribution_neurons": cache.logit_attrs(neurons, answer, other),
    }


def main() -> None:
    """Write both fixtures."""
    packages = ("transformer-lens", "transformers", "torch", "numpy")
    for seed, (name, make) in enumerate(MODELS.items()):
        rng = np.random.default_rng(seed)
        hf = make().eval()
        redraw(hf, rng)
        ids = rng.integers(0, VOCAB, (BATCH, POS))
        right, wrong = [3, 7], [5, 1]
        with TemporaryDirectory() as folder, torch.no_grad():
            hf.save_pretrained(folder)
            save_tokenizer(folder)
            tokens = torch.from_numpy(ids)
            found = stacks(bridge(folder, no_processing=True), tokens)
            folded = bridge(
                folder,
                fold_ln=True,
                center_writing_weights=False,
                center_unembed=False,
                fold_value_biases=False,
            )
            found |= attributions(folded, tokens, right, wrong)
            config = (Path(folder) / "config.json").read_text()
        found |= {f"weight/{key}": value for key, value in hf.state_dict().items()}
        if hf.config.tie_word_embeddings:
            del found["weight/lm_head.weight"]
        arrays = {
            key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in found.items()
        }
        np.savez_compressed(
            HERE / f"cache_algebra_{name}.npz", **arrays, tokens=ids, right=right, wrong=wrong,
            config=np.array(config), versions=np.array(json.dumps({p: version(p) for p in packages})),
        )  # fmt: skip


if __name__ == "__main__":
    main()
