"""Record what SAEBench measures of a small dictionary on drawn activations.

    python tests/oracles/make_sae_bench.py                   # where sae-bench is installed
    python tests/oracles/make_sae_bench.py split removal     # these alone anew

Written by sae-bench 0.6.0 on scikit-learn 1.9.1, sae-lens 6.54.12 and torch 2.13; `versions` in the file says so. Its own
functions are called on arrays drawn here, so no model is run: activations of texts are (row, pos, d_model), 0 where a
text has ended, which is how SAEBench knows. What is recorded:

- sparse probing of two classes of one size: nothing is drawn, and accuracies are those of scikit-learn's probes.
- targeted probe perturbation of two classes, where nothing is drawn either; and of four, where each accuracy and effect
  draws rows of the rest: their means over many draws, with the error of these means.
- spurious correlation removal.
- absorption of each row, with main latents and probes given; and main latents of classes, from the F1 of their probes.
  The probe that orders latents is trained until it is at its optimum: SAEBench's own rate and epochs, which decay
  within 50, leave weights far below it.
"""

import os
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

os.environ["JAXTYPING_DISABLE"] = "1"  # SAEBench's annotations refuse its own calls

import numpy as np
import pandas as pd
import torch
from sae_bench.evals.absorption import k_sparse_probing as splits
from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
from sae_bench.evals.scr_and_tpp import main as tpp
from sae_bench.evals.sparse_probing import probe_training
from sklearn import metrics

OUT = Path(__file__).parent / "sae_bench.npz"
D, F, POS = 12, 30, 3
TRAIN, TEST = 48, 32  # rows of each class
N = [1, 2, 5, 10]
DRAWS = 400


class Sae:
    """A ReLU dictionary with rows of length 1, as SAEBench calls it."""

    def __init__(self, rng: np.random.Generator) -> None:
        rows = rng.normal(size=(F, D))
        self.W_dec = _tensor(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        self.W_enc = (self.W_dec + 0.1 * _tensor(rng.normal(size=(F, D)))).T.contiguous()
        self.b_enc = _tensor(rng.normal(-0.6, 0.2, F))
        self.b_dec = _tensor(rng.normal(0, 0.2, D))
        self.device, self.dtype, self.cfg = "cpu", torch.float32, SimpleNamespace(d_sae=F)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f @ self.W_dec + self.b_dec


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x, np.float32))


def _texts(rng: np.random.Generator, means: np.ndarray) -> torch.Tensor:
    """Texts of 1 to `POS` tokens about given means (row, D)."""
    x = means[:, None] + rng.normal(size=(len(means), POS, D))
    lengths = rng.integers(1, POS + 1, len(means))
    return _tensor(np.where(np.arange(POS)[:, None] < lengths[:, None, None], x, 0))


def _meaned(x: torch.Tensor) -> torch.Tensor:
    real = (x.sum(-1) != 0).float()
    return x.sum(1) / real.sum(1, keepdim=True)


def _probe(weight: np.ndarray, bias: float) -> probe_training.Probe:
    probe = probe_training.Probe(D, torch.float32)
    with torch.no_grad():
        probe.net.weight.copy_(_tensor(weight)[None])
        probe.net.bias.fill_(float(bias))
    return probe


def _classes(rng: np.random.Generator, centres: np.ndarray) -> tuple[dict, dict, dict]:
    """Texts of each class, to train and to test with, and a probe of each."""
    parts = [
        {str(i): _texts(rng, np.repeat(c[None], n, 0)) for i, c in enumerate(centres)} for n in (TRAIN, TEST)
    ]
    middle = centres.mean(0)
    weights = centres - middle + 0.1 * rng.normal(size=centres.shape)
    probes = {str(i): _probe(w, -w @ (middle + 0.5 * (centres[i] - middle))) for i, w in enumerate(weights)}
    return *parts, probes


def _perturbation(sae: Sae, train: dict, test: dict, probes: dict) -> tuple[np.ndarray, ...]:
    names = list(train)
    effects = tpp.get_all_node_effects_for_one_sae(sae, probes, names, False, train, 16)
    clean = tpp.get_probe_test_accuracy(probes, names, {k: _meaned(v) for k, v in test.items()}, 64, False)
    after = tpp.perform_feature_ablations(probes, sae, 16, test, effects, N, names, 64, False)
    overall, _ = tpp.create_tpp_plotting_dict(after, clean)
    return (
        np.stack([effects[c].numpy() for c in names]),
        np.array([clean[c] for c in names]),
        np.array([[[after[i][n][j] for j in names] for i in names] for n in N]),
        np.array([overall[f"tpp_threshold_{n}_total_metric"] for n in N]),
    )


def _stacked(parts: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([x.numpy() for x in parts.values()])


def probing(out: dict) -> None:
    rng = np.random.default_rng(1)
    sae = Sae(rng)
    train, test, probes = _classes(rng, 0.5 * rng.normal(size=(2, D)))
    latents = [
        {
            k: (sae.encode(v) * (v.sum(-1) != 0)[..., None]).sum(1) / (v.sum(-1) != 0).sum(1)[:, None]
            for k, v in part.items()
        }
        for part in (train, test)
    ]
    for name, (fitted, held_out) in {
        "f": latents,
        "x": [{k: _meaned(v) for k, v in p.items()} for p in (train, test)],
    }.items():
        accuracies = [
            probe_training.train_probe_on_activations(fitted, held_out, select_top_k=k)[1]["1"]
            for k in (1, 2, 5)
        ]
        out[f"two_accuracy_{name}"] = np.array(accuracies)
    effects, clean, after, score = _perturbation(sae, train, test, probes)
    out |= {"two_effects": effects, "two_clean": clean, "two_after": after, "two_score": score}
    _keep(out, "two", sae, train, test, probes)


def _keep(out: dict, name: str, sae: Sae, train: dict, test: dict, probes: dict) -> None:
    out |= {f"{name}_{a}": getattr(sae, a).numpy() for a in ("W_enc", "b_enc", "W_dec", "b_dec")}
    out |= {f"{name}_train": _stacked(train), f"{name}_test": _stacked(test)}
    out[f"{name}_weight"] = np.concatenate([p.net.weight.detach().numpy() for p in probes.values()])
    out[f"{name}_bias"] = np.concatenate([p.net.bias.detach().numpy() for p in probes.values()])


def perturbation(out: dict) -> None:
    rng = np.random.default_rng(2)
    sae = Sae(rng)
    train, test, probes = _classes(rng, rng.normal(size=(4, D)))
    torch.manual_seed(0)
    drawn = [_perturbation(sae, train, test, probes) for _ in range(DRAWS)]
    for name, values in zip(("effects", "clean", "after", "score"), zip(*drawn, strict=True), strict=True):
        each = np.stack(values)
        out[f"four_{name}"] = each.mean(0)
        out[f"four_{name}_error"] = each.std(0, ddof=1) / np.sqrt(DRAWS)
    _keep(out, "four", sae, train, test, probes)


def removal(out: dict) -> None:
    """Rows of a kind are those of both attributes; SAEBench's names stand for them."""
    rng = np.random.default_rng(3)
    sae = Sae(rng)
    first, second = 1.2 * rng.normal(size=(2, D)) / np.sqrt(D), 2.0 * rng.normal(size=(2, D))[0] / np.sqrt(D)
    first = first[0]
    kinds = np.array([(a, b) for a in (0, 1) for b in (0, 1)])
    parts = []
    for n in (TRAIN, TEST):
        centres = (2 * kinds - 1) @ np.stack([first, second])
        parts.append({i: _texts(rng, np.repeat(c[None], n, 0)) for i, c in enumerate(centres)})
    names = ("professor / nurse", "male / female", "male_professor / female_nurse")
    weights = [first + 0.1 * rng.normal(size=D), second + 0.1 * rng.normal(size=D), first + 0.7 * second]
    probes = {name: _probe(w, 0.1) for name, w in zip(names, weights, strict=True)}

    def arranged(kind: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        both = lambda *i: torch.cat([kind[j] for j in i])
        return {
            "male / female": both(1, 3), "female_data_only": both(0, 2),
            "professor / nurse": both(2, 3), "nurse_data_only": both(0, 1),
            "male_professor / female_nurse": both(3), "female_nurse_data_only": both(0),
        }  # fmt: skip

    train, test = (arranged(part) for part in parts)
    chosen = ["male / female", "professor / nurse", "male_professor / female_nurse"]
    clean = tpp.get_probe_test_accuracy(probes, chosen, {k: _meaned(v) for k, v in test.items()}, 64, True)
    effects = tpp.get_all_node_effects_for_one_sae(sae, probes, chosen, True, train, 16)
    after = tpp.perform_feature_ablations(probes, sae, 16, test, effects, N, chosen, 64, True)
    scores = tpp.get_scr_plotting_dict(after, clean)
    out["scr_effects"] = np.stack([effects[c].numpy() for c in ("male / female", "professor / nurse")])
    out["scr_by_direction"] = np.array([[scores[f"scr_dir{d}_threshold_{n}"] for n in N] for d in (1, 2)])
    out["scr_score"] = np.array([scores[f"scr_metric_threshold_{n}"] for n in N])
    _keep(out, "scr", sae, *parts, probes)


class Words(FeatureAbsorptionCalculator):
    """Absorption of rows: a word is the number of its row."""

    def _build_prompts(self, words: list[str]) -> list[SimpleNamespace]:
        return [SimpleNamespace(base=word, word=word) for word in words]


def absorbed(out: dict) -> None:
    rng = np.random.default_rng(4)
    sae = Sae(rng)
    x = _tensor(rng.normal(size=(300, D)) + 0.5)
    model = SimpleNamespace(
        to_tokens=lambda text: [[0]],
        run_with_cache=lambda texts, names_filter: (
            None,
            {names_filter[0]: x[[int(t) for t in texts]][:, None]},
        ),
    )
    calculator = Words(model, icl_word_list=["a"], word_token_pos=0, topk_feats=3)
    directions = sae.W_dec[:3] + 0.15 * _tensor(rng.normal(size=(3, D)))
    main = [[0, 7], [11], [2, 1, 9]]  # those of the second never stand for its probe
    fractions, full, top = [], [], []
    for direction, ids in zip(directions, main, strict=True):
        found = calculator.calculate_absorption(
            sae, [str(i) for i in range(len(x))], direction, ids, 0, False
        )
        fractions.append([r.absorption_fraction for r in found.word_results])
        full.append([r.is_full_absorption for r in found.word_results])
        top.append([r.top_projection_feature_scores[0].feature_id for r in found.word_results])
    out |= {"abs_x": x.numpy(), "abs_weight": directions.numpy(), "abs_fraction": np.array(fractions)}
    out |= {"abs_full": np.array(full), "abs_top": np.array(top)}
    out["abs_main"] = np.array([np.isin(np.arange(F), ids) for ids in main])
    out |= {f"abs_{a}": getattr(sae, a).numpy() for a in ("W_enc", "b_enc", "W_dec", "b_dec")}


def split(out: dict) -> None:
    """Main latents by the F1 of probes of the first k."""
    rng = np.random.default_rng(5)
    sae, most = Sae(rng), 6
    centres = 1.0 * rng.normal(size=(4, 2, D))  # two kinds of each class, so that some need two latents
    draw = lambda n: _tensor(
        np.concatenate([np.concatenate([c + 0.6 * rng.normal(size=(n, D)) for c in two]) for two in centres])
    )
    train, test = draw(TRAIN), draw(TEST)
    labels, of_test = (np.repeat(np.arange(4), 2 * n) for n in (TRAIN, TEST))
    torch.manual_seed(0)
    splits.train_sparse_multi_probe = partial(splits.train_sparse_multi_probe, lr=0.1, end_lr=1e-5)
    given = [("", int(i)) for i in labels]
    probes = splits.train_k_sparse_probes(
        sae, given, train, list(range(1, most + 1)), batch_size=4096, num_epochs=1500, precalc_sae_acts=True
    )
    table = []
    f = sae.encode(test)
    for place, letter in enumerate(splits.LETTERS):
        row = {"letter": letter}
        for k in range(1, most + 1):
            probe = probes[k][place % 4]
            row[f"f1_sparse_sae_{k}"] = metrics.f1_score(of_test == place % 4, (probe(f) > 0).numpy())
            row[f"sparse_sae_k_{k}_feats"] = probe.feature_ids.numpy()
        table.append(row)
    table = pd.DataFrame(table)
    splits.add_feature_splits_to_metrics_df(table, most)
    first = table.iloc[:4]
    out["split_n"] = first["num_split_features"].to_numpy() + 1
    out["split_latents"] = np.stack(first[f"sparse_sae_k_{most}_feats"].to_list())
    out["split_f1"] = first[[f"f1_sparse_sae_{k}" for k in range(1, most + 1)]].to_numpy()
    out |= {"split_train": train.numpy(), "split_test": test.numpy()}
    out |= {f"split_{a}": getattr(sae, a).numpy() for a in ("W_enc", "b_enc", "W_dec", "b_dec")}


if __name__ == "__main__":
    every = {of.__name__: of for of in (probing, perturbation, removal, absorbed, split)}
    found: dict[str, np.ndarray] = dict(np.load(OUT)) if sys.argv[1:] else {"N": np.array(N)}
    for name in sys.argv[1:] or every:
        every[name](found)
    packages = ("sae-bench", "scikit-learn", "sae-lens", "torch", "numpy")
    found["versions"] = np.array([f"{name} {version(name)}" for name in packages])
    np.savez_compressed(
        OUT, **{k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in found.items()}
    )
