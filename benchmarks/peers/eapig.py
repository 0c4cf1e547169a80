"""The EAP-IG repository, on TransformerLens' HookedTransformer: its scores of all edges.

Its functions put scores on "cuda" whatever the model's device, and tokenise texts themselves; both are replaced here by
what they would be for this model's device and these tokens. Nothing else is changed.
"""

import importlib.metadata
from typing import Any

try:
    from eap import attribute
    from eap.graph import Graph
except ModuleNotFoundError as error:
    if error.name != "eap":
        raise
    raise SystemExit(
        "the `eapig` side needs the authors' package `eap` (hannamw/EAP-IG at commit 795f560), which is on no "
        "registry, installed in its environment. Without it: --without eapig"
    ) from None

import numpy as np
import torch
import transformers
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

from benchmarks.peers.torch_device import choose, finished
from benchmarks.worker import Job

SCALE = 1e6  # scores of a random model are small: what is compared is in millionths


class _Torch:
    """`torch`, whose zeros are made on the model's device."""

    def __init__(self, device: torch.device):
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **kwargs | {"device": self.device})


def load(settings: dict[str, Any]) -> tuple[dict[str, Job], dict[str, str]]:
    device = choose(settings)
    torch.set_grad_enabled(True)
    source = transformers.GPT2LMHeadModel.from_pretrained(settings["checkpoint"])
    sizes = source.config
    config = HookedTransformerConfig(
        n_layers=sizes.n_layer,
        d_model=sizes.n_embd,
        n_ctx=sizes.n_positions,
        n_heads=sizes.n_head,
        d_head=sizes.n_embd // sizes.n_head,
        d_mlp=4 * sizes.n_embd,
        d_vocab=sizes.vocab_size,
        act_fn="gelu_new",
        eps=sizes.layer_norm_epsilon,
        normalization_type="LN",
        device=str(device),
    )
    for name in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        setattr(config, name, True)
    model = HookedTransformer(config)
    with torch.no_grad():
        model.load_state_dict(convert_gpt2_weights(source, config), strict=False)
    attribute.torch = _Torch(device)
    attribute.tokenize_plus = lambda model, ids: (
        ids,
        torch.ones_like(ids),
        torch.full((len(ids),), ids.shape[1]),
        ids.shape[1],
    )

    def metric(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        return (logits[:, -1, 5] - logits[:, -1, 7]).mean()

    def scores(clean: np.ndarray, corrupt: np.ndarray, method: str, steps: int | None = None):
        graph = Graph.from_model(model)
        sides = [torch.from_numpy(ids).to(device) for ids in (clean, corrupt)]
        batches = [(*sides, None)]

        def work() -> torch.Tensor:
            model.zero_grad()
            attribute.attribute(model, graph, batches, metric, method, ig_steps=steps, quiet=True)
            return graph.scores

        # theirs are of corrupt - clean, and the mean over the batch is divided by the batch once more
        return finished(work), lambda found: {"scores": -SCALE * len(clean) * _real(graph, found)}

    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformer-lens", "eap")}
    return {"edges": scores}, versions


def _real(graph: Graph, found: torch.Tensor) -> np.ndarray:
    return (found * graph.real_edge_mask).detach().cpu().numpy()
