"""A bridged module against the module itself: everything that a hook sees, every gradient, and edits at all of it."""

import sys
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch

import mechjax as mj
from mechjax.base.errors import MechjaxError
from tests.interop.pytorch.architectures import ARCHITECTURES, built
from tests.interop.pytorch.hooks import Key, candidates, gradients, run_hooked, seen


def numbers(x: Any) -> np.ndarray:
    """A tensor as an array, half precisions as float32."""
    x = x.detach()
    return (x.float() if x.is_floating_point() else x).numpy()


@cache
def bridged(name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """The architecture as a subject of its example's sizes, and its arguments as arrays."""
    model, kwargs = built(name)
    made = ARCHITECTURES[name]
    subject = mj.interop.from_torch(model, kwargs, output=made.output, dynamic=False, **made.fixed)
    return subject, {key: x.numpy() for key, x in kwargs.items()}


def matched(sites: Any, keys: Any) -> dict[Key, tuple[str, int | None]]:
    """What each hook's value is called here. Every value has one name, and every site one value per layer."""
    calls: dict[str, set[int]] = {}
    for path, call, _, _ in keys:
        calls.setdefault(path, set()).add(call)
    found = {}
    for key in keys:
        fitting = [
            (site, layer)
            for site, layer in candidates(key, len(calls[key[0]]))
            if site in sites and (sites[site].layers is None) == (layer is None)
        ]
        assert len(fitting) == 1, f"{key} may be {fitting}"
        found[key] = fitting[0]
    assert len(set(found.values())) == len(found)
    rows = {(name, row) for name, info in sites.items() for row in (info.rows if info.layers else (None,))}
    # Exported, transformers makes masks explicit that it leaves out otherwise.
    made = {name for name in sites if sites[name].dtype == bool or name.endswith(".attention_mask")}
    rows = {(name, row) for name, row in rows if name not in made}
    assert rows <= set(found.values()), f"no hook for {rows - set(found.values())}"
    return found


def row(record: Any, at: tuple[str, int | None]) -> np.ndarray:
    """One layer's row of a captured site."""
    name, layer = at
    array = record[name]
    return np.asarray(array if layer is None else array[record.layers[name].index(layer)])


def explicit(key: Key, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What a hook saw, in the shape of its site: exported, transformers has a mask for each example."""
    return np.broadcast_to(x, shape) if key[3] == "attention_mask" else x


def summed(key: Key, grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient at a site, in the shape of what a hook saw, which all examples may share."""
    shared = tuple(i for i, (n, m) in enumerate(zip(grad.shape, shape, strict=True)) if m == 1 < n)
    return grad.sum(shared, keepdims=True) if key[3] == "attention_mask" else grad


@dataclass(frozen=True)
class Differences:
    """Worst absolute differences, over 1 + the size of what is compared."""

    logits: float
    sites: float
    gradients: float
    edits: float
    n_sites: int
    moved: float


def worst(found: Any, expected: Any) -> float:
    """The worst difference of two arrays, each over 1 + the expected size; whole numbers must be equal."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if expected.dtype.kind not in "f":
        return 0.0 if np.array_equal(found, expected) else np.inf
    if not expected.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        apart = np.where(found == expected, 0.0, np.abs(found.astype(np.float64) - expected))
        apart = np.where(np.isnan(found) & np.isnan(expected), 0.0, apart)
        scale = 1 + np.where(np.isfinite(expected), np.abs(expected), 0)
    return float(np.nan_to_num(apart / scale, nan=np.inf).max())


def compare(name: str) -> Differences:
    """All of an architecture, compared."""
    model, kwargs = built(name)
    made = ARCHITECTURES[name]
    subject, arrays = bridged(name)
    whole = kwargs | made.fixed
    sites = mj.list_sites(subject, **arrays)
    out, values = seen(model, whole)
    logits = numbers(getattr(out, made.output))
    names = matched(sites, values)

    weights = jnp.asarray(np.random.default_rng(0).normal(size=logits.shape), jnp.float32)
    plain, record = eqx.filter_jit(lambda f, x: mj.capture(f, list(sites))(**x))(subject, arrays)
    rows = {key: row(record, at) for key, at in names.items()}
    in_sites = max(worst(x, explicit(key, numbers(values[key]), x.shape)) for key, x in rows.items())

    metric = lambda y: (y * weights).sum()
    own = gradients(
        model, whole, lambda y: (getattr(y, made.output) * torch.tensor(np.asarray(weights))).sum()
    )
    floating = sorted({names[key][0] for key in own})
    _, grads = eqx.filter_jit(lambda f, x: mj.value_and_grad_at(f, metric, floating)(**x))(subject, arrays)
    in_gradients = max(
        worst(summed(key, row(grads, names[key]), tuple(g.shape)), numbers(g)) for key, g in own.items()
    )

    generator = torch.Generator().manual_seed(7)
    deltas = {
        key: 0.02 * torch.randn(x.shape, generator=generator).to(x.dtype)
        for key, x in values.items()
        if x.is_floating_point()
    }
    with torch.no_grad():
        changed = run_hooked(model, whole, lambda key, x: x + deltas[key] if key in deltas else x)
    edits = [
        mj.add(names[key][0], jnp.asarray(explicit(key, numbers(x), rows[key].shape)), layer=names[key][1])
        for key, x in deltas.items()
    ]
    edited = eqx.filter_jit(lambda f, e, x: mj.intervene(f, e)(**x))(subject, edits, arrays)
    after = numbers(getattr(changed, made.output))
    return Differences(
        logits=max(worst(plain, logits), worst(subject(**arrays), logits)),
        sites=in_sites,
        gradients=in_gradients,
        edits=worst(edited, after),
        n_sites=len(names),
        moved=float(np.abs(after - logits).max()),
    )


def main() -> None:
    """Write a table of the architectures named in the arguments, or of all."""
    for name in sys.argv[1:] or ARCHITECTURES:
        made, start = ARCHITECTURES[name], time.monotonic()
        try:
            d = compare(name)
        except (AssertionError, MechjaxError) as error:
            cells = [f"{type(error).__name__}: {str(error)[:500]}"]
        else:
            cells = [f"{x:.0e}" for x in (d.logits, d.sites, d.gradients, d.edits)] + [
                f"{d.n_sites} sites",
                f"moved {d.moved:.2f}",
            ]
        row = [name, made.model, made.kind, made.structure, *cells, f"{time.monotonic() - start:.0f} s"]
        sys.stdout.write(f"| {' | '.join(row)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    main()
