"""Patching against a plain loop over `intervene` on the whole model: every site, axis, direction and padding."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.catalogue import SITES
from mechjax.base.errors import ArgumentError, PairingError, ShapeError, SiteError
from mechjax.metrics import Metric
from mechjax.transform.log import compile_log
from tests.tolerances import TOL

SWEEP = TOL["float32", "sweep"]
CELLS = 5  # cells of each sweep that the loop repeats


@pytest.fixture(scope="module")
def model(tiny_model):
    return jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, tiny_model)  # so that patches have effects


@pytest.fixture(scope="module")
def pair():
    clean, corrupt = jax.random.randint(jax.random.key(3), (2, 3, 6), 0, 50)
    return clean, corrupt


@pytest.fixture(scope="module")
def metric():
    return mj.metrics.logit_diff(np.array([1, 2, 3]), np.array([4, 5, 4]))


@pytest.fixture(scope="module")
def donors(model, pair):
    names = list(mj.list_sites(model, pair[0]))
    return [mj.capture(model, names)(side)[1] for side in pair]


FEW = ("embed", "resid_pre", "k", "pattern", "result", "mlp_post", "ln_final.normalized", "logits")
"""Sites of every kind; the other ones follow the same path and are marked slow."""


MISSING = (
    "ln_embed", "token_type_embed", "q_latent", "kv_latent", "q_norm", "k_norm", "rot_", "ln1_post", "router", "expert",
    "shared", "mlp_pre_linear", "ln2_post", "pooled", "nsp",
)  # fmt: skip
"""How the names of sites begin that the model does not have."""


def _cases():
    """Every site that the model has, with all its axes."""
    for name, entry in SITES.items():
        if not name.startswith(MISSING):
            over = (("layer",) if entry.layered else ()) + entry.axes
            yield pytest.param(name, over, id=name, marks=() if name in FEW else pytest.mark.slow)


def by_loop(model, base, donor, metric, site, over, shape, mask=None):
    stacked = donor.layers[site] is not None
    rng = np.random.default_rng(0)
    cells = [tuple(rng.integers(n) for n in shape) for _ in range(CELLS)]
    for cell in cells:
        edit = mj.replace(
            site, donor[site], per_layer=stacked, **dict(zip(over, map(int, cell), strict=True))
        )
        yield cell, metric(mj.intervene(model, [edit])(base, mask=mask), mask)


@pytest.mark.parametrize(("site", "over"), list(_cases()))
def test_activation_patch__every_site_and_axis__equals_a_loop(model, pair, metric, donors, site, over):
    result = mj.patching.activation_patch(model, *pair, metric, site=site, over=over)
    assert result.per_example.shape == (*result.scores.shape, 3)
    for cell, expected in by_loop(model, pair[1], donors[0], metric, site, over, result.scores.shape):
        np.testing.assert_allclose(result.per_example[cell], expected, **SWEEP)
    np.testing.assert_allclose(result.scores, result.per_example.mean(-1), **SWEEP)
    np.testing.assert_allclose(result.clean, metric(model(pair[0])), **SWEEP)
    np.testing.assert_allclose(result.corrupt, metric(model(pair[1])), **SWEEP)


@pytest.mark.parametrize(
    ("site", "over"),
    [
        ("z", ("head", "pos")),
        ("z", ("pos", "layer", "head")),
        ("mlp_out", ("pos",)),
        ("mlp_post", ("layer", "d_mlp")),
    ],
)
def test_activation_patch__other_orders_and_all_layers__equal_a_loop(model, pair, metric, donors, site, over):
    result = mj.patching.activation_patch(
        model, *pair, metric, site=site, over=over, mode="noise", chunk_size=5
    )
    for cell, expected in by_loop(model, pair[0], donors[1], metric, site, over, result.scores.shape):
        np.testing.assert_allclose(result.per_example[cell], expected, **SWEEP)


@pytest.mark.parametrize("name", ["prob", "nll", "rank", "kl"])
def test_activation_patch__other_metrics__equal_a_loop(model, pair, donors, name):
    reference = model(pair[0])[:, -1]
    metric = mj.metrics.kl(reference) if name == "kl" else getattr(mj.metrics, name)(np.array([1, 2, 3]))
    result = mj.patching.activation_patch(model, *pair, metric, site="resid_pre")
    for cell, expected in by_loop(model, pair[1], donors[0], metric, "resid_pre", ("layer", "pos"), (3, 6)):
        np.testing.assert_allclose(result.per_example[cell], expected, **SWEEP)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.slow
def test_activation_patch__ragged_prompts__equal_a_loop_with_the_mask(model, metric, side):
    lengths = np.array([6, 4, 5])
    ranks = np.arange(6)
    mask = (ranks < lengths[:, None]) if side == "right" else (ranks >= 6 - lengths[:, None])
    clean, corrupt = np.asarray(jax.random.randint(jax.random.key(4), (2, 3, 6), 0, 50))
    prompts = [mj.Prompts(jnp.asarray(ids), jnp.asarray(mask)) for ids in (clean, corrupt)]
    result = mj.patching.activation_patch(model, *prompts, metric, site="resid_pre", chunk_size=4)
    donor = mj.capture(model, "resid_pre")(prompts[0])[1]
    for cell, expected in by_loop(
        model, corrupt, donor, metric, "resid_pre", ("layer", "pos"), (3, 6), jnp.asarray(mask)
    ):
        np.testing.assert_allclose(result.per_example[cell], expected, **SWEEP)
    # each prompt alone, unpadded, gives its own scores
    for i, n in enumerate(lengths):
        real = slice(0, n) if side == "right" else slice(6 - n, 6)
        alone = mj.patching.activation_patch(
            model, clean[i : i + 1, real], corrupt[i : i + 1, real],
            mj.metrics.logit_diff(int(metric.correct[i]), int(metric.wrong[i])), site="resid_pre",
        )  # fmt: skip
        np.testing.assert_allclose(
            result.per_example[:, real, i], alone.per_example[..., 0], rtol=1e-4, atol=1e-4
        )


def test_activation_patch__named_positions__are_those_columns(model, pair, metric):
    named = {"first": jnp.array([0, 1, 2]), "end": jnp.array([5, 5, 5])}
    result = mj.patching.activation_patch(model, *pair, metric, site="resid_pre", positions=named)
    whole = mj.patching.activation_patch(model, *pair, metric, site="resid_pre")
    assert result.scores.shape == (3, 2)
    rows = np.arange(3)
    for j, at in enumerate(named.values()):
        np.testing.assert_allclose(result.per_example[:, j], whole.per_example[:, at, rows], **SWEEP)
    assert "first" in str(result.top(6)) and "end" in str(result.top(6))


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_top__in_either_mode__names_the_place_that_moves_the_metric_furthest(model, pair, metric, mode):
    result = mj.patching.activation_patch(model, *pair, metric, site="resid_pre", mode=mode)
    base, other = (result.corrupt, result.clean) if mode == "denoise" else (result.clean, result.corrupt)
    moved = (np.asarray(result.scores) - float(base.mean())) / float(other.mean() - base.mean())
    layer, pos = np.unravel_index(np.abs(moved).argmax(), moved.shape)
    (place, effect), *_ = result.top(1)
    assert place == f"L{layer} @ {pos}"
    np.testing.assert_allclose(effect, moved[layer, pos], rtol=1e-4)


def test_activation_patch__clean_equals_corrupt__changes_nothing_and_recovered_says_so(model, pair, metric):
    result = mj.patching.activation_patch(model, pair[0], pair[0], metric, site="z", over=("layer", "head"))
    np.testing.assert_allclose(result.scores, np.full((3, 4), result.clean.mean()), **SWEEP)
    with pytest.warns(UserWarning, match="`recovered` is undefined"):
        assert np.isnan(result.recovered).all()


def test_activation_patch__whole_first_layer__recovers_all(model, pair, metric):
    result = mj.patching.activation_patch(model, *pair, metric, site="resid_pre", over=("layer",))
    np.testing.assert_allclose(result.recovered, np.ones(3), rtol=1e-4, atol=1e-4)


def test_activation_patch__new_prompts_and_answers__no_new_program(model, pair):
    compile_log(clear=True)
    for i in range(3):
        metric = mj.metrics.logit_diff(np.array([i, 2, 3]), 4)
        mode = "noise" if i == 2 else "denoise"
        mj.patching.activation_patch(model, pair[0] + i - i, pair[1], metric, site="attn_out", mode=mode)
    assert len(compile_log()) == 2, compile_log()  # the capture of both sides and the sweep, once


class Total(Metric):
    """One number for the whole batch."""

    def of(self, logits):
        return logits.sum()


@pytest.mark.usefixtures("as_a_user")
def test_activation_patch__what_gives_no_numbers__teaches(model, pair, metric):
    with pytest.raises(ArgumentError, match=r"Total gives shape \(\) for a batch of 3: a metric gives one"):
        mj.patching.activation_patch(model, *pair, Total(jnp.int32(-1)), site="attn_out")
    for weights, message in {
        (lambda m: m.blocks.attn.W_V): "`z` of layer 1 is not finite in this run",
        (lambda m: m.blocks.mlp.W_out): "`mlp_out` of layer 1 is not finite in this run",
    }.items():
        broken = eqx.tree_at(weights, model, weights(model).at[1].set(jnp.inf))
        with pytest.raises(ArgumentError, match=message):
            mj.patching.activation_patch(broken, *pair, metric, site="attn_out")
    for at in (7, -7):
        there = {"first": jnp.array([0, 1, 2]), "there": jnp.array([1, 2, at])}
        with pytest.raises(ArgumentError, match=r"NaN, though what nodes write is finite.* a named position"):
            mj.patching.activation_patch(model, *pair, metric, site="resid_pre", positions=there)


@pytest.mark.usefixtures("as_a_user")
def test_activation_patch__bad_arguments__teach(model, pair, metric):
    patch = mj.patching.activation_patch
    with pytest.raises(
        SiteError, match=r"cannot sweep `heads`: site `z` has layer, pos, head, d_head\. Did you mean `head`"
    ):
        patch(model, *pair, metric, site="z", over=("layer", "heads"))
    with pytest.raises(SiteError, match="rot_q"):
        patch(model, *pair, metric, site="rot_q")
    with pytest.raises(SiteError, match="names one layer; patching sweeps layers"):
        patch(model, *pair, metric, site="blocks.1.attn.hook_z")
    with pytest.raises(ArgumentError, match="mode='both': expected 'denoise'"):
        patch(model, *pair, metric, site="z", mode="both")
    with pytest.raises(ArgumentError, match="chunk_size=0"):
        patch(model, *pair, metric, site="z", chunk_size=0)
    with pytest.raises(ArgumentError, match="name each axis to sweep once"):
        patch(model, *pair, metric, site="z", over=("layer", "layer"))
    with pytest.raises(ArgumentError, match="has no 'pos'"):
        patch(model, *pair, metric, site="z", over=("layer",), positions={"a": jnp.zeros(3, int)})
    with pytest.raises(ShapeError, match=r"position `a` has shape \(2,\)"):
        patch(model, *pair, metric, site="z", positions={"a": jnp.zeros(2, int)})
    with pytest.raises(ShapeError, match="`correct` has shape"):
        patch(model, *pair, mj.metrics.logit_diff([1, 2], 3), site="z")
    with pytest.raises(ArgumentError, match="reads token 50; the model has 50 tokens"):
        patch(model, *pair, mj.metrics.logit_diff(50, 3), site="z")


def test_pairing__different_token_counts__are_shown_aligned(model, pair, metric):
    with pytest.raises(
        PairingError, match=r"(?s)pair 0 has 6 clean and 5 corrupt tokens.*clean:   .*corrupt: .* \| -"
    ):
        mj.patching.activation_patch(model, pair[0], pair[1][:, :5], metric, site="z")
    with pytest.raises(PairingError, match="clean has 3 prompts and corrupt has 2"):
        mj.patching.activation_patch(model, pair[0], pair[1][:2], metric, site="z")
    left = mj.Prompts(pair[0], jnp.arange(6) >= jnp.array([[1], [0], [0]]))
    right = mj.Prompts(pair[1], jnp.arange(6) < jnp.array([[5], [6], [6]]))
    with pytest.raises(PairingError, match="padded at different places"):
        mj.patching.activation_patch(model, left, right, metric, site="z")
