"""Write what the EAP-IG repository scores on one tiny model, with its weights, and circuits that it wrote and read.

    python tests/oracles/make_eap_ig.py        # with the authors' package `eap` importable

Run with the repository hannamw/EAP-IG at commit 795f560 (its package `eap` is on no registry), transformer-lens 3.9.0,
transformers 5.23.0 and torch 2.13.0 on a CPU. `eap_ig.npz`, beside this script, holds the Hugging Face weights
(`weight/...`), the config and the versions (JSON), the tokens, and the repository's scores: of edges (`edge/...`, in
the order of the names `edges`) and of nodes (`node/...`, in that of `nodes`). All in float64, of float32 weights.

`mib_serial.json` and `mib_parallel.json` are circuits that the repository wrote. `mib_ours.json` is one that
`mj.graph.to_mib` wrote, as `tests/graph/test_mib.py` checks; `read/...` in the npz is what the repository read in it.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from eap import attribute, attribute_node, evaluate, utils
from eap.graph import Graph
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

HERE = Path(__file__).parent
BATCH, POS, VOCAB, STEPS = 4, 6, 23, 5
SIZES = {"n_positions": 8, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 48}


class CpuTorch:
    """`torch`, whose zeros are made on the CPU: the repository asks for "cuda", whatever the model's device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **kwargs | {"device": "cpu"})


def patch() -> None:
    """The two things that are replaced: the device of zeros, and the tokeniser, as tokens are given."""

    def tokens_given(model: Any, ids: torch.Tensor, max_length: int | None = None) -> tuple[Any, ...]:
        return ids, torch.ones_like(ids), torch.full((len(ids),), ids.shape[1]), ids.shape[1]

    for module in (attribute, attribute_node, evaluate, utils):
        module.torch, module.tokenize_plus = CpuTorch(), tokens_given


def redraw(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Every parameter anew: ones and zeros of an initialisation hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            shape = tuple(parameter.shape)
            std = 0.4 if len(shape) == 1 else 1.5 * shape[0] ** -0.5
            parameter.copy_(torch.from_numpy(rng.normal(0.3 if len(shape) == 1 else 0.0, std, shape)))


def hooked(source: transformers.GPT2LMHeadModel) -> HookedTransformer:
    """The checkpoint in TransformerLens, as the repository wants it: heads' results, and inputs apart."""
    sizes = source.config
    config = HookedTransformerConfig(
        n_layers=sizes.n_layer, d_model=sizes.n_embd, n_ctx=sizes.n_positions, n_heads=sizes.n_head,
        d_head=sizes.n_embd // sizes.n_head, d_mlp=sizes.n_inner, d_vocab=VOCAB, act_fn="gelu_new",
        eps=sizes.layer_norm_epsilon, normalization_type="LN", device="cpu", dtype=torch.float64,
    )  # fmt: skip
    for name in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        setattr(config, name, True)
    model = HookedTransformer(config)
    with torch.no_grad():
        model.load_state_dict(convert_gpt2_weights(source.double(), config), strict=False)
    return model


def scores(model: HookedTransformer, tokens: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every score of edges and nodes."""
    ids = {name: torch.from_numpy(rows) for name, rows in tokens.items()}
    means = [(ids["reference"],)]

    def batch(*rows: int) -> tuple[Any, ...]:
        chosen = {name: x[list(rows)] for name, x in ids.items()}
        return chosen["clean"], chosen["corrupt"], chosen

    whole = [batch(*range(BATCH))]

    def metric(
        logits: torch.Tensor, clean: Any, lengths: Any, label: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        rows = torch.arange(len(logits))
        return (logits[rows, -1, label["right"]] - logits[rows, -1, label["wrong"]]).mean()

    def edges(method: str, intervention: str = "patching", batches: Any = whole) -> np.ndarray:
        graph = Graph.from_model(model)
        graph.scores = graph.scores.double()
        attribute.attribute(model, graph, batches, metric, method, intervention, ig_steps=STEPS,
                            intervention_dataloader=means, quiet=True)  # fmt: skip
        return np.array([float(edge.score) for edge in graph.edges.values()])

    def nodes(method: str) -> np.ndarray:
        graph = Graph.from_model(model, node_scores=True)
        graph.nodes_scores = graph.nodes_scores.double()
        attribute_node.attribute_node(model, graph, whole, metric, method, ig_steps=STEPS, quiet=True)
        return graph.nodes_scores.numpy()

    return {
        "edge/eap": edges("EAP"),
        "edge/eap_ig_inputs": edges("EAP-IG-inputs"),
        "edge/eap_ig_activations": edges("EAP-IG-activations"),
        "edge/clean_corrupted": edges("clean-corrupted"),
        "edge/exact": edges("exact"),
        "edge/eap_zero": edges("EAP", "zero"),
        "edge/eap_mean": edges("EAP", "mean"),
        "edge/eap_mean_positional": edges("EAP", "mean-positional"),
        "edge/eap_two": edges("EAP", batches=[batch(0, 1)]),
        "edge/eap_two_twice": edges("EAP", batches=[batch(0, 1, 0, 1)]),
        "edge/exact_two": edges("exact", batches=[batch(0, 1)]),
        "edge/exact_two_twice": edges("exact", batches=[batch(0, 1, 0, 1)]),
        "edge/eap_in_parts": edges("EAP", batches=[batch(0, 1, 2), batch(3)]),
        "node/eap": nodes("EAP"),
        "node/eap_ig_inputs": nodes("EAP-IG-inputs"),
    }


def circuits() -> dict[str, np.ndarray]:
    """Circuits written by the repository, and what it reads in ours."""
    for name, parallel in (("serial", False), ("parallel", True)):
        graph = Graph.from_model({"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": parallel, "d_model": 8})
        drawn = np.random.default_rng(1).normal(size=graph.scores.shape)
        graph.scores[:] = torch.from_numpy(drawn) * graph.real_edge_mask
        graph.apply_topn(20, absolute=True, prune=True)
        graph.to_json(str(HERE / f"mib_{name}.json"))
    read = Graph.from_json(str(HERE / "mib_ours.json"))
    return {
        "read/edges": np.array(list(read.edges)),
        "read/scores": np.array([float(edge.score) for edge in read.edges.values()], np.float32),
        "read/in_graph": np.array([bool(edge.in_graph) for edge in read.edges.values()]),
        "read/nodes": np.array([name for name, node in read.nodes.items() if node.in_graph]),
    }


def main() -> None:
    """Write the fixtures."""
    patch()
    rng = np.random.default_rng(0)
    source = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
    )
    redraw(source, rng)
    with torch.no_grad():
        source.transformer.ln_f.weight *= 20  # and with it every score
    weights = {name: value.numpy().copy() for name, value in source.state_dict().items()}
    del weights["lm_head.weight"]  # tied
    tokens = {side: rng.integers(0, VOCAB, (BATCH, POS)) for side in ("clean", "corrupt", "reference")}
    tokens |= {side: rng.integers(low, low + 10, BATCH) for side, low in (("right", 0), ("wrong", 10))}
    model = hooked(source.eval())
    found, graph = scores(model, tokens), Graph.from_model(model)
    packages = ("eap", "transformer-lens", "transformers", "torch", "numpy")
    np.savez_compressed(
        HERE / "eap_ig.npz", **found, **tokens, **circuits(),
        edges=np.array(list(graph.edges)), nodes=np.array([n for n in graph.nodes if n != "logits"]),
        config=np.array(source.config.to_json_string(use_diff=False)),
        versions=np.array(json.dumps({name: version(name) for name in packages})),
        **{f"weight/{name}": value for name, value in weights.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
