"""Sweeps that leave out positions before an edit, against whole runs."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.models import Config, init
from mechjax.models.experts import Experts
from mechjax.models.latent import Latent
from mechjax.patching import sweep
from tests.tolerances import TOL

SWEEP = TOL["float32", "sweep"]
TINY = {"d_vocab": 50, "n_ctx": 24, "d_model": 16, "n_layers": 3, "n_heads": 4, "d_mlp": 32}
KINDS = {
    "windows": {"positions": "rotary", "windows": (3, None, 4), "n_kv_heads": 2, "qk_norm": "shared"},
    "latent": {
        "positions": "rotary", "d_head": 6, "rotary_dim": 2,
        "latent": Latent(q_rank=None, kv_rank=5, d_nope=4, d_rope=2, d_value=3),
    },
    "mixed": {"mlp": "gated", "experts": Experts(n_experts=4, top_k=2, d_expert=8, layers=(1,))},
    "alibi": {"positions": "alibi", "residual": "parallel"},
}  # fmt: skip
MASK = jnp.array([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1], [1] * 6 + [0, 0], [1] * 8], bool)


@pytest.fixture(autouse=True)
def _buckets(monkeypatch):
    """As if every sweep were long."""
    monkeypatch.setattr(sweep, "_WORTH", {})
    monkeypatch.setattr(sweep, "_WORTH_ELSEWHERE", 1.0)


@pytest.fixture(scope="module")
def pair():
    ids = jax.random.randint(jax.random.key(1), (2, 4, 8), 0, 50)
    return [mj.Prompts(side, MASK) for side in ids]


@pytest.fixture(scope="module")
def metric():
    return mj.metrics.logit_diff(
        np.array([1, 2, 3, 4]), np.array([4, 5, 4, 6]), pos=np.array([-1, -1, -1, 2])
    )


def _model(kind):
    model = init(Config(**TINY, **KINDS[kind]), key=jax.random.key(0))
    return jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, model)


@pytest.fixture(scope="module")
def windows():
    return _model("windows")


def check(model, pair, metric, result, cells, **edit):
    """Cells, against an intervention on the whole model."""
    site = result.site
    acts = mj.capture(model, site)(pair[0])[1]
    for cell in cells:
        where = dict(zip(result.over, cell, strict=True)) | edit
        patched = mj.intervene(model, [mj.replace(site, acts[site], per_layer=True, **where)])
        np.testing.assert_allclose(result.per_example[cell], metric(patched(pair[1]), MASK), **SWEEP)


@pytest.mark.parametrize(
    "kind", ["windows", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "windows")]
)
def test_sweep__in_buckets_of_positions__equals_whole_runs(pair, metric, kind):
    model = _model(kind)
    result = mj.patching.activation_patch(model, *pair, metric, site="resid_pre")
    check(model, pair, metric, result, [(0, 0), (0, 7), (1, 3), (1, 4), (2, 2), (2, 5), (2, 7)])
    assert np.ptp(np.asarray(result.per_example[:, 4:, 0])) > 1e-2
    unmoved = np.broadcast_to(result.corrupt[3], (3, 5))  # example 3 reads position 2
    np.testing.assert_allclose(result.per_example[:, 3:, 3], unmoved, **SWEEP)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("site", "over"),
    [("z", ("pos", "layer", "head")), ("mlp_post", ("pos",)), ("rot_k", ("layer", "pos", "kv_head"))],
)
def test_sweep__other_axes_in_buckets__equals_whole_runs(windows, pair, metric, site, over):
    result = mj.patching.activation_patch(windows, *pair, metric, site=site, over=over, chunk_size=3)
    cells = np.stack([np.random.default_rng(0).integers(n, size=5) for n in result.scores.shape], -1)
    check(windows, pair, metric, result, [tuple(map(int, cell)) for cell in cells])


@pytest.mark.slow
def test_sweep__named_positions__start_at_the_earliest(windows, pair, metric):
    named = {"early": jnp.array([5, 2, 3, 7]), "late": jnp.array([-1, 7, 4, 6])}
    result = mj.patching.activation_patch(windows, *pair, metric, site="resid_pre", positions=named)
    for j, at in enumerate(named.values()):
        check(windows, pair, metric, result, [(1, j), (2, j)], pos=mj.per_example(at))


def test_starts__where_positions_cannot_be_left_out__are_none(monkeypatch, windows):
    ask = lambda config=windows.config, site="resid_pre", over=("layer", "pos"), n=8: sweep.starts_of(
        config, site, over, (n,), (4, n), None
    )
    assert ask() == (0,) * 4 + (4,) * 4
    named = {
        "early": jnp.array([5, 2, 3, 7]),
        "late": jnp.array([-1, 7, 4, 6]),
    }  # the earliest example decides
    assert sweep.starts_of(windows.config, "resid_pre", ("layer", "pos"), (2,), (4, 8), named) == (0, 4)
    assert ask(n=16) == tuple(np.repeat([0, 4, 8, 12], 4))
    assert ask(site="embed", over=("pos",)) == ask(over=("layer",)) == ask(n=7) == ()
    assert ask(config=Config(**TINY, causal=False)) == ()
    monkeypatch.setattr(sweep, "_WORTH_ELSEWHERE", 1e12)
    assert ask() == ()  # too short to pay for a second program


def test_sweep__its_program__branches_at_layers_and_forms_the_logits_that_are_read(monkeypatch, pair, metric):
    """A select in place of the branch would run every layer, and a vocabulary that is formed is most of a small model."""
    monkeypatch.setattr(sweep, "_WORTH_ELSEWHERE", 1e12)  # one bucket
    model = init(Config(**TINY | {"d_vocab": 53}), key=jax.random.key(0))
    run = lambda model, metric: mj.patching.activation_patch(model, *pair, metric, site="resid_pre").scores
    arrays, static = eqx.partition((model, metric), eqx.is_array)
    text = str(jax.make_jaxpr(lambda arrays: run(*eqx.combine(arrays, static)))(arrays))
    assert "while[" in text  # as many layers of earlier cells as there are, not all of them masked
    shapes = set(re.findall(r"f32\[([\d,]*53[\d,]*)\]", text))
    assert shapes <= {"53,16", "16,53"}, shapes  # the embedding itself
    whole = str(jax.make_jaxpr(lambda arrays: eqx.combine(arrays, static)[0](pair[0]))(arrays))
    assert re.search(r"f32\[4,8,53\]", whole)
