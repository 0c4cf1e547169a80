"""Chunks that are planned from memory keep to it, by what the compiler reserves beside arguments and results."""

import importlib

import jax
import jax.numpy as jnp
import pytest

import mechjax as mj
from mechjax.models import Config

BUDGET = 6e6
CONFIG = Config(d_vocab=50, n_ctx=32, d_model=64, n_layers=2, n_heads=4, d_head=16, d_mlp=256)
METRIC = mj.metrics.logit_diff(1, 2)


@pytest.fixture(scope="module")
def setting():
    model = mj.init(CONFIG, key=jax.random.key(0))
    return model, jax.random.randint(jax.random.key(1), (2, 4, 32), 0, 50), mj.graph.build(model)


def sweep(setting, chunk):
    model, tokens, _ = setting
    over = ("layer", "head", "pos")
    mj.patching.activation_patch(model, tokens[0], tokens[1], METRIC, site="z", over=over, chunk_size=chunk)


def edges(setting, chunk):
    model, tokens, graph = setting
    mj.attribution.exact(model, tokens[0], tokens[1], METRIC, graph=graph, chunk_size=chunk)


def trace(setting, chunk):
    model, tokens, _ = setting
    mj.patching.causal_trace(
        model,
        tokens[0],
        METRIC,
        subject=jnp.ones(4, jnp.int32),
        n_samples=2,
        key=jax.random.key(0),
        chunk_size=chunk,
    )


@pytest.mark.parametrize(
    ("run", "module", "program", "planner"),
    [
        (sweep, "mechjax.patching.activation_patch", "all_scores", "mechjax.patching.planned"),
        pytest.param(
            edges,
            "mechjax.attribution.exact",
            "_of_edges",
            "mechjax.attribution.exact",
            marks=pytest.mark.slow,
        ),
        (trace, "mechjax.patching.causal_trace", "_restored", "mechjax.patching.causal_trace"),
    ],
)
def test_chunks__planned_from_memory__reserve_no_more(run, module, program, planner, setting, monkeypatch):
    there, seen = importlib.import_module(module), []
    whole = getattr(there, program)

    def spied(*given, **how):
        seen.append(whole.lower(*given, **how).compile().compiled.memory_analysis().temp_size_in_bytes)
        return whole(*given, **how)

    monkeypatch.setattr(there, program, spied)
    monkeypatch.setattr(importlib.import_module(planner), "CHUNK_BYTES", BUDGET)
    run(setting, None)
    planned, seen[:] = max(seen), []
    run(setting, 4096)  # all at once
    assert planned <= BUDGET < max(seen)
