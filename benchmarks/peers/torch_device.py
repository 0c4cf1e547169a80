"""Torch as every torch peer uses it: the same threads, no gradients, and a clock that waits for the device."""

from collections.abc import Callable
from typing import Any

import torch


def choose(settings: dict[str, Any]) -> torch.device:
    """The device asked for, with threads set and gradients off."""
    if settings["device"] == "gpu" and not torch.cuda.is_available():
        raise RuntimeError(
            f"--device gpu, but torch {torch.__version__} of this environment sees no CUDA device"
        )
    torch.set_num_threads(settings["threads"])
    torch.set_grad_enabled(False)
    return torch.device("cuda" if settings["device"] == "gpu" else "cpu")


def finished(work: Callable[[], Any]) -> Callable[[], Any]:
    """`work`, returning once the device has done it."""

    def run() -> Any:
        result = work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result

    return run


def last_difference(logits: torch.Tensor) -> torch.Tensor:
    """The metric of every sweep: logit 5 minus logit 7 at the last position, mean over the batch."""
    return (logits[:, -1, 5] - logits[:, -1, 7]).mean()
