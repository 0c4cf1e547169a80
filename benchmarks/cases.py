"""The cases: what each side runs, how often, what must be equal, and what is asked of the ratio.

A sweep of a peer takes about a minute, so it runs once or twice: its runs are spread among ours. The peers' clean
cache is made before their clock starts; our sweeps include both unpatched runs.
"""

from dataclasses import dataclass, field
from typing import Any

# Compared between ours and TransformerLens, every layer of each.
SITES = (
    "resid_pre", "ln1.scale", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_pre", "mlp_post", "mlp_out",
    "resid_post",
)  # fmt: skip
LARGE = ("forward", "capture", "sweep")


@dataclass(frozen=True)
class Side:
    """One side of a case: who runs which job with which parameters, how many times (the first is the cold one)."""

    worker: str
    job: str
    params: dict[str, Any] = field(default_factory=dict)
    runs: int = 6
    label: str = ""

    @property
    def name(self) -> str:
        """How the table calls this side."""
        return f"{self.worker}, {self.label}" if self.label else self.worker


@dataclass(frozen=True)
class Case:
    """Sides that do the same work. The first side is ours; ratios are others / ours.

    Attributes:
        name: Its name on the command line and in the results.
        what: One line for the table.
        sides: Who takes part.
        arrays: The token arrays, drawn anew for each repeat, that every side gets.
        tolerance: Largest difference allowed, absolute below 1 and relative to the largest value above; None where
            nothing is compared.
        at_least: What others / ours should reach, by worker or label.
        at_most: What others / ours must stay under.
        facts: Largest allowed value of what the first side counts.
    """

    name: str
    what: str
    sides: tuple[Side, ...]
    arrays: tuple[str, ...] = ("tokens",)
    tolerance: float | None = None
    at_least: dict[str, float] = field(default_factory=dict)
    at_most: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)


def sweep(name: str, site: str, what: str, at_least: float) -> Case:
    """A sweep of one site by every toolkit, and beside the floor of its arithmetic at the rate of this very run."""
    return Case(
        name,
        what,
        (
            Side("mechjax", "sweep", {"site": site}, runs=4),
            Side("transformerlens", "sweep", {"site": site}, runs=2),
            Side("nnsight", "sweep", {"site": site}, runs=1),
        ),
        arrays=("clean", "corrupt"),
        tolerance=2e-5,
        at_least=dict.fromkeys(("transformerlens", "nnsight"), at_least),
        facts={"times_floor": 1 / 0.75},
    )


def generation(name: str, what: str, peer: str, least: float, runs: int, *, edited: bool) -> Case:
    """128 tokens for each prompt, greedily, with a cache; edited: by one edit of the prompts and of every step."""
    params = {"n_tokens": 128, "edited": edited}
    return Case(
        name,
        what,
        (Side("mechjax", "generate", params, runs=4), Side(peer, "generate", params, runs=runs)),
        tolerance=1e-6,
        at_least={peer: least},
    )


def edges(name: str, what: str, method: str, least: float, runs: int, **params: Any) -> Case:
    """Scores of all edges, from gradients."""
    params |= {"method": method}
    return Case(
        name,
        what,
        (Side("mechjax", "edges", params, runs=5), Side("eapig", "edges", params, runs=runs)),
        arrays=("clean", "corrupt"),
        tolerance=1e-4,
        at_least={"eapig": least},
    )


def training(kind: str, size: str, active: int = 32, **least: float) -> Case:
    """Steps of training a dictionary with Adam, on the same batches from the same weights."""
    runs = 6 if size == "m" else 18  # short ones vary by a third
    d_model, n_features = {"s": (256, 4096), "m": (768, 12288)}[size]
    params = {"kind": kind, "d_model": d_model, "n_features": n_features, "active": active}
    params |= {"threshold": 2.8, "bandwidth": 0.1}  # of JumpReLU: some 30 latents are above it at the start
    return Case(
        f"train-{kind.replace('_', '-')}-{size}",
        f"train a {kind} dictionary, {d_model} x {n_features}, 4 steps of 1,024 tokens",
        (
            Side("mechjax", "train", params, runs=runs),
            *(Side(worker, "train", params, runs=runs - 2) for worker in least),
        ),
        arrays=(),
        tolerance=1e-4,
        at_least=least,
    )


def many_dictionaries(n: int) -> Case:
    """Dictionaries of a model's activations, from one forward of it for all of them and from one for each."""
    params = {"n": n, "layer": 5, "n_features": 3072, "active": 32}
    shared, apart = (
        Side(
            "mechjax",
            "train_many",
            params | {"apart": apart},
            3,
            "one forward each" if apart else "one forward",
        )
        for apart in (False, True)
    )
    return Case(
        "train-many",
        f"train {n} top_k dictionaries on resid_post of layer 5, 768 x 3,072, 4 steps of 1,024 tokens",
        (shared, apart),
        arrays=(),
        tolerance=1e-4,
        at_least={apart.name: 1.5},
    )


def compilation(job: str, batch: tuple[int, int], **params: Any) -> Case:
    """Seconds to trace, lower and compile a job, for 12 layers and for 48."""
    few, many = (
        Side("mechjax", "compile", {"job": job, "n_layers": n, "batch": batch, **params}, 3, f"{n} layers")
        for n in (12, 48)
    )
    name = f"compile-{job}"
    return Case(
        name, f"compile {job}, 48 layers against 12", (few, many), arrays=(), at_most={many.name: 1.3}
    )


def for_tpus(subject: str, method: str, chip: str, batch: tuple[int, int], **mesh: int) -> Case:
    """A large model, in bfloat16, compiled for chips that are not here; bytes of weights are as the layout says."""
    split = ", ".join(f"{axis}={n}" for axis, n in mesh.items())
    params = {"model": subject, "method": method, "chip": chip, "mesh": mesh, "batch": batch}
    return Case(
        f"compile-{subject.lower()}-{method}-tpu",
        f"{method} of {subject} on {chip}, {split}, {batch[0]} prompts x {batch[1]} tokens",
        (Side("mechjax", "compile_tpu", params, runs=1),),
        arrays=(),
        facts={"arguments_over_predicted": 1.15},
    )


def bridged() -> tuple[Case, Case]:
    """A module of transformers, bridged: its forward, and a sweep over its submodules' outputs."""
    return (
        Case(
            "bridged-forward",
            "logits of the module of transformers, bridged",
            (
                Side("mechjax", "bridged_forward", runs=21, label="bridged"),
                Side("mechjax", "forward", runs=21, label="own decoder"),
                Side("huggingface", "forward", runs=21),
            ),
            tolerance=1e-5,
            at_least={"mechjax, own decoder": 1 / 1.3},
        ),
        Case(
            "bridged-sweep",
            "one prompt, bridged: patch every MLP's output, layer x position",
            (
                Side("mechjax", "bridged_sweep", {"n_prompts": 1}, runs=4, label="bridged"),
                Side("nnsight", "bridged_sweep", {"n_prompts": 1}, runs=2),
            ),
            arrays=("clean", "corrupt"),
            tolerance=2e-5,
            at_least={"nnsight": 3.0},
        ),
    )


def cases(batch: tuple[int, int]) -> tuple[Case, ...]:
    """Every case, for token arrays of this shape."""
    return (
        Case(
            "forward",
            "logits",
            (Side("mechjax", "forward", runs=21), Side("huggingface", "forward", runs=21)),
            tolerance=1e-5,
            at_least={"huggingface": 1.0},
        ),
        *bridged(),
        Case(
            "capture",
            "logits and every activation",
            (
                Side("mechjax", "capture", {"compared": SITES}, runs=11),
                Side("transformerlens", "capture", {"compared": SITES}, runs=11),
            ),
            tolerance=1e-5,
        ),
        sweep(
            "sweep-resid",
            "resid_pre",
            "patch resid_pre, every layer x position",
            5,
        ),
        sweep("sweep-heads", "z", "patch z, every layer x head", 3),
        edges("eap", "score every edge by EAP", "EAP", 15, 3),
        edges("eap-ig", "score every edge by EAP-IG, 5 steps", "EAP-IG-inputs", 10, 2, steps=5),
        Case(
            "eap-memory",
            "score every edge by EAP, 64 prompts x 64 tokens",
            (Side("mechjax", "edges_at_length", {"n_prompts": 64, "n_pos": 64}, runs=2),),
            arrays=(),
            facts={"peak_gb": 3.0},
        ),
        Case(
            "exact-edges",
            "exact scores of all 32,491 edges, one prompt x 16 tokens: an estimate from some of them",
            (Side("mechjax", "exact_edges", {"n_pos": 16, "share": 1 / 32}, runs=3),),
            arrays=(),
        ),
        generation("generate", "128 tokens, greedily, with a cache", "huggingface", 1.0, 3, edited=False),
        generation("generate-edited", "128 tokens, one edit at every step", "nnsight", 3.0, 2, edited=True),
        Case(
            "load",
            "load the checkpoint, files cached, and sum all weights",
            (Side("mechjax", "load", runs=21), Side("huggingface", "load", runs=21)),
            arrays=(),
            tolerance=1e-5,
            at_least={"huggingface": 1.0},
            facts={"peak_over_weights": 1.2},
        ),
        training("top_k", "s", saelens=2.0, sparsify=1.3, dictionary_learning=2.0),
        training("top_k", "m", saelens=2.5, sparsify=1.3, dictionary_learning=2.0),
        training("batch_top_k", "m", saelens=2.5, dictionary_learning=1.0),
        training("jump_relu", "m", saelens=2.0),
        many_dictionaries(8),
        compilation("forward", batch),
        compilation("capture", batch),
        compilation("sweep", batch, site="resid_pre"),
        *(for_tpus("8B", method, "v5e:2x4", (8, 128), data=1, model=8) for method in LARGE),
        *(for_tpus("70B", method, "v5e:16x16", (64, 128), data=2, fsdp=16, model=8) for method in LARGE),
        Case(
            "recompile",
            "programs made by 100 different edits",
            (Side("mechjax", "recompile", {"n_edits": 100}, runs=1),),
            facts={"traces": 1, "later_compilations": 0},
        ),
    )
