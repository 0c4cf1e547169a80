"""nnsight: one trace per edit, the loop that its tutorials write."""

import importlib.metadata
import itertools
from typing import Any

import numpy as np
import torch
from nnsight import NNsight
from transformers import GPT2LMHeadModel

from benchmarks.peers.torch_device import choose, finished, last_difference
from benchmarks.worker import Job, steering


def load(settings: dict[str, Any]) -> tuple[dict[str, Job], dict[str, str]]:
    device = choose(settings)
    hf = GPT2LMHeadModel.from_pretrained(settings["checkpoint"]).eval().to(device)
    model = NNsight(hf)
    n_layers, n_heads = model.config.n_layer, model.config.n_head
    d_head = model.config.n_embd // n_heads

    def record(ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        resid, z = [], []
        with model.trace(ids, use_cache=False):
            for layer in range(n_layers):
                resid.append(model.transformer.h[layer].input.save())
                z.append(model.transformer.h[layer].attn.c_proj.input.save())
        return resid, z

    def patch_resid_pre(ids: torch.Tensor, layer: int, pos: int, value: torch.Tensor) -> torch.Tensor:
        with model.trace(ids, use_cache=False):
            model.transformer.h[layer].input[:, pos] = value[:, pos]
            score = last_difference(model.output.logits).save()
        return score

    def patch_z(ids: torch.Tensor, layer: int, head: int, value: torch.Tensor) -> torch.Tensor:
        its = slice(head * d_head, (head + 1) * d_head)
        with model.trace(ids, use_cache=False):
            model.transformer.h[layer].attn.c_proj.input[..., its] = value[..., its]
            score = last_difference(model.output.logits).save()
        return score

    def sweep(clean: np.ndarray, corrupt: np.ndarray, site: str):
        ids = torch.from_numpy(corrupt).to(device)
        resid, z = record(torch.from_numpy(clean).to(device))
        patch, values, width = {
            "resid_pre": (patch_resid_pre, resid, ids.shape[1]),
            "z": (patch_z, z, n_heads),
        }[site]

        def work() -> list[torch.Tensor]:
            places = itertools.product(range(n_layers), range(width))
            return [patch(ids, layer, column, values[layer]) for layer, column in places]

        return finished(work), lambda scores: {
            "scores": torch.stack(scores).reshape(n_layers, width).cpu().numpy()
        }

    def generate(tokens: np.ndarray, n_tokens: int, edited: bool):
        del edited
        ids = torch.from_numpy(tokens).to(device)
        vector = torch.from_numpy(steering(model.config.n_embd)).to(device)
        how = {"max_new_tokens": n_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

        def work() -> torch.Tensor:
            with model.trace(ids, fn=hf.generate, attention_mask=torch.ones_like(ids), **how) as tracer:
                for _ in tracer.iter[:n_tokens]:
                    block = model.transformer.h[n_layers // 2]
                    block.input = block.input + vector
                out = tracer.result.save()
            return out[:, ids.shape[1] :]

        return finished(work), lambda out: {"tokens": out.cpu().numpy()}

    versions = {"torch": torch.__version__, "nnsight": importlib.metadata.version("nnsight")}
    return {"sweep": sweep, "bridged_sweep": mlp_sweep(model, device), "generate": generate}, versions


def mlp_sweep(model: Any, device: torch.device) -> Job:
    """Every MLP's output of the clean run put into the corrupt run, logits at the last position only."""
    n_layers, last = model.config.n_layer, {"use_cache": False, "logits_to_keep": 1}

    def patch(ids: torch.Tensor, layer: int, pos: int, value: torch.Tensor) -> torch.Tensor:
        with model.trace(ids, **last):
            model.transformer.h[layer].mlp.output[:, pos] = value[:, pos]
            score = last_difference(model.output.logits).save()
        return score

    def bridged_sweep(clean: np.ndarray, corrupt: np.ndarray, n_prompts: int):
        before, ids = (torch.from_numpy(x[:n_prompts]).to(device) for x in (clean, corrupt))

        def work() -> list[torch.Tensor]:
            values = []
            with model.trace(before, **last):
                for layer in range(n_layers):
                    values.append(model.transformer.h[layer].mlp.output.save())  # noqa: PERF401 (nnsight's form)
            places = itertools.product(range(n_layers), range(ids.shape[1]))
            return [patch(ids, layer, pos, values[layer]) for layer, pos in places]

        return finished(work), lambda scores: {
            "scores": torch.stack(scores).reshape(n_layers, ids.shape[1]).cpu().numpy()
        }

    return bridged_sweep
