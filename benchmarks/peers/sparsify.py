"""sparsify: its sparse coder under Adam, with the projections that its trainer makes."""

import importlib.metadata
import os
from typing import Any

import torch

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels need a GPU; without them it says so at every import
from sparsify import SparseCoder, SparseCoderConfig

from benchmarks.dictionary_data import STEPS, batches, start
from benchmarks.peers.torch_device import choose
from benchmarks.worker import Job


def load(settings: dict[str, Any]) -> tuple[dict[str, Job], dict[str, str]]:
    device = choose(settings)
    torch.set_grad_enabled(True)

    def train(kind: str, d_model: int, n_features: int, active: int, threshold: float, bandwidth: float):
        coder = SparseCoder(d_model, SparseCoderConfig(num_latents=n_features, k=active), device=device)
        rows = torch.from_numpy(start(d_model, n_features)).to(device)
        with torch.no_grad():
            coder.W_dec.copy_(rows)
            coder.encoder.weight.copy_(rows)
        optimizer = torch.optim.Adam(coder.parameters(), lr=3e-4)
        stream = [torch.from_numpy(x).to(device) for x in batches(d_model, n_features, active)]
        with torch.no_grad():
            made = coder(stream[0]).sae_out.cpu().numpy()

        def work() -> None:
            for x in stream[:STEPS]:
                coder(x).fvu.backward()
                coder.remove_gradient_parallel_to_decoder_directions()
                optimizer.step()
                optimizer.zero_grad()
                coder.set_decoder_norm_to_unit_norm()

        return work, lambda _: {"made": made}

    versions = {name: importlib.metadata.version(name) for name in ("torch", "eai-sparsify")}
    return {"train": train}, versions
