"""Where the fixtures lie that other libraries wrote, and what each is in mechjax."""

from pathlib import Path

ORACLES = Path(__file__).parents[1] / "oracles" / "dictionaries"

KINDS = {
    "saelens/standard": "ReLU",
    "saelens/topk": "TopK",
    "saelens/gated": "Gated",
    "saelens/jumprelu": "JumpReLU",
    "saelens/checkpoint_batchtopk": "BatchTopK",
    "saelens/checkpoint_matryoshka": "Matryoshka",
    "saelens/layer_norm": "Normalized",
    "saelens/skip_transcoder": "ReLU",
    "sparsify/plain": "TopK",
    "dictionary_learning/auto_encoder": "ReLU",
    "dictionary_learning/gated": "Gated",
    "dictionary_learning/top_k": "TopK",
    "dictionary_learning/batch_top_k": "BatchTopK",
    "dictionary_learning/matryoshka": "Matryoshka",
    "dictionary_learning/jump_relu": "JumpReLU",
    "openai/relu": "ReLU",
    "openai/topk": "Normalized",
    "gemma_scope/upper": "JumpReLU",
    "gemma_scope_2/resid_post/layer_1_width_16k_l0_small": "JumpReLU",
    "llama_scope/even": "JumpReLU",
    "circuit_tracer/plt_jump": "JumpReLU",
    "circuit_tracer/plt_relu": "ReLU",
    "circuit_tracer/clt_jump": "CrossLayerTranscoder",
    "gemma_scope_2/clt/width_1k_affine": "CrossLayerTranscoder",
}


def cases():
    """Every fixture of another library, by its place."""
    files = (path for path in ORACLES.rglob("*.npz") if path.name != "params.npz")
    names = (str(path.relative_to(ORACLES).with_suffix("")) for path in files)
    return sorted(name for name in names if not name.startswith("ours/"))


def place(case):
    """The folder or file of a fixture."""
    folder = ORACLES / case
    if case.startswith("gemma_scope/"):
        return folder / "layer_3" / "width_16k" / "average_l0_5"
    return folder if folder.is_dir() else folder.with_suffix(".pt")


def format_of(case):
    """The name of its format."""
    name = "saelens" if case.startswith("ours/") else case.split("/")[0]
    return f"{name}_clt" if "clt" in case else name
