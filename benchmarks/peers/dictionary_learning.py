"""dictionary_learning: its trainers' update, for each kind of dictionary that the cases have."""

import importlib.metadata
from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer

from benchmarks.dictionary_data import batches, start
from benchmarks.peers.torch_device import choose
from benchmarks.worker import Job

KINDS = {"top_k": TopKTrainer, "batch_top_k": BatchTopKTrainer}


def load(settings: dict[str, Any]) -> tuple[dict[str, Job], dict[str, str]]:
    device = choose(settings)
    torch.set_grad_enabled(True)

    def train(kind: str, d_model: int, n_features: int, active: int, threshold: float, bandwidth: float):
        trainer = KINDS[kind](
            steps=10_000, activation_dim=d_model, dict_size=n_features, k=active, layer=0, lm_name="none",
            device=str(device), warmup_steps=10,
        )  # fmt: skip
        rows = torch.from_numpy(start(d_model, n_features)).to(device)
        with torch.no_grad():
            trainer.ae.decoder.weight.copy_(rows.T)
            trainer.ae.encoder.weight.copy_(rows)
        stream = [torch.from_numpy(x).to(device) for x in batches(d_model, n_features, active)]
        with torch.no_grad():
            made = trainer.ae.decode(trainer.ae.encode(stream[0], use_threshold=False)).cpu().numpy()

        def work() -> None:
            for step, x in enumerate(stream, 1):  # its step 0 also finds where biases begin
                trainer.update(step, x)

        return work, lambda _: {"made": made}

    versions = {name: importlib.metadata.version(name) for name in ("torch", "dictionary-learning")}
    return {"train": train}, versions
