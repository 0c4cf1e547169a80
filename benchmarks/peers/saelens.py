"""SAELens: its trainer's step, for each kind of dictionary that the cases have."""

import importlib.metadata
from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.dictionary_data import STEPS, TOKENS, batches, start
from benchmarks.peers.torch_device import choose
from benchmarks.worker import Job

KINDS = {
    "top_k": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batch_top_k": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "jump_relu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
}


def load(settings: dict[str, Any]) -> tuple[dict[str, Job], dict[str, str]]:
    device = choose(settings)
    torch.set_grad_enabled(True)

    def train(kind: str, d_model: int, n_features: int, active: int, threshold: float, bandwidth: float):
        cls, config = KINDS[kind]
        own = {"k": active} if "top_k" in kind else {
            "jumprelu_init_threshold": threshold, "jumprelu_bandwidth": bandwidth, "l0_coefficient": 1.0
        }  # fmt: skip
        sae = cls(
            config(
                d_in=d_model,
                d_sae=n_features,
                device=str(device),
                apply_b_dec_to_input=kind != "jump_relu",
                **own,
            )
        )
        rows = torch.from_numpy(start(d_model, n_features)).to(device)
        with torch.no_grad():
            sae.W_dec.copy_(rows)
            sae.W_enc.copy_(rows.T)
        stream = [torch.from_numpy(x).to(device) for x in batches(d_model, n_features, active)]
        trainer = SAETrainer(
            cfg=SAETrainerConfig(
                total_training_samples=TOKENS * 10_000, train_batch_size_samples=TOKENS, lr=3e-4, lr_end=3e-4,
                device=str(device),
            ),
            sae=sae, data_provider=iter(stream),
        )  # fmt: skip
        with torch.no_grad():
            made = sae.decode(sae.encode(stream[0])).cpu().numpy()

        def work() -> None:
            for x in stream[:STEPS]:
                trainer.step(x)
                trainer.n_training_steps += 1

        return work, lambda _: {"made": made}

    versions = {name: importlib.metadata.version(name) for name in ("torch", "sae-lens")}
    return {"train": train}, versions
