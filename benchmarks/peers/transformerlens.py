"""TransformerLens: TransformerBridge in compatibility mode without processing, and its own patching functions."""

import importlib.metadata
import warnings
from typing import Any

import numpy as np
import torch
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.peers.torch_device import choose, finished, last_difference
from benchmarks.worker import Job

NAMES = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "ln1.scale": "blocks.{}.ln1.hook_scale",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "pattern": "blocks.{}.attn.hook_pattern",
    "z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "mlp_pre": "blocks.{}.mlp.hook_pre",
    "mlp_post": "blocks.{}.mlp.hook_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
}
SWEEPS = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "z": patching.get_act_patch_attn_head_out_all_pos,
}


def load(settings: dict[str, Any]) -> tuple[dict[str, Job], dict[str, str]]:
    device = choose(settings)
    warnings.filterwarnings("ignore")
    model = TransformerBridge.boot_transformers(settings["checkpoint"], device=str(device))
    model.enable_compatibility_mode(no_processing=True)

    def capture(tokens: np.ndarray, compared: list[str]):
        ids = torch.from_numpy(tokens).to(device)

        def collect(result: Any) -> dict[str, np.ndarray]:
            logits, cache = result
            layers = range(model.cfg.n_layers)
            stacked = {site: torch.stack([cache[NAMES[site].format(i)] for i in layers]) for site in compared}
            return {"logits": logits.cpu().numpy()} | {site: x.cpu().numpy() for site, x in stacked.items()}

        return finished(lambda: model.run_with_cache(ids)), collect

    def sweep(clean: np.ndarray, corrupt: np.ndarray, site: str):
        ids = torch.from_numpy(corrupt).to(device)
        _, cache = model.run_with_cache(torch.from_numpy(clean).to(device))
        work = finished(lambda: SWEEPS[site](model, ids, cache, last_difference))
        return work, lambda scores: {"scores": scores.cpu().numpy()}

    versions = {
        "torch": torch.__version__,
        "transformer-lens": importlib.metadata.version("transformer-lens"),
    }
    return {"capture": capture, "sweep": sweep}, versions
