"""Hugging Face transformers: the plain forward, the floor that no torch toolkit goes under."""

from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.peers.torch_device import choose, finished
from benchmarks.worker import Job


def load(settings: dict[str, Any]) -> tuple[dict[str, Job], dict[str, str]]:
    device = choose(settings)
    model = transformers.GPT2LMHeadModel.from_pretrained(settings["checkpoint"]).eval().to(device)

    def forward(tokens: np.ndarray):
        ids = torch.from_numpy(tokens).to(device)
        return finished(lambda: model(ids, use_cache=False).logits), lambda out: {"logits": out.cpu().numpy()}

    def generate(tokens: np.ndarray, n_tokens: int, edited: bool):
        del edited
        ids = torch.from_numpy(tokens).to(device)
        how = {"max_new_tokens": n_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        work = lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, ids.shape[1] :]
        return finished(work), lambda out: {"tokens": out.cpu().numpy()}

    def reload():
        def work() -> list[torch.Tensor]:
            fresh = transformers.GPT2LMHeadModel.from_pretrained(settings["checkpoint"]).eval().to(device)
            embedding, *others = (weight.sum() for weight in fresh.parameters())
            return [embedding, sum(others)]

        return finished(work), lambda sums: {"sums": torch.stack(sums).cpu().numpy()}

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"forward": forward, "generate": generate, "load": reload}, versions
