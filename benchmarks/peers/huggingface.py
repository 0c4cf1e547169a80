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

    return {"forward": forward}, {"torch": torch.__version__, "transformers": transformers.__version__}
