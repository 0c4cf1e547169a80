"""Attribution patching and integrated gradients, in double precision: against exact patches, differences and sums.

One config for all, whose norms are straight (`norm_eps`), so that models differ in numbers only and share programs.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.attribution.sides import per_place
from mechjax.base.errors import ArgumentError, PairingError, ShapeError, SiteError
from mechjax.metrics import Metric
from mechjax.models.experts import Experts
from tests.tolerances import TOL

POST = {"norms": "both", "out_bias": False, "norm": "rms", "residual_scale": 0.5}
HEADS = ("layer", "pos", "head")
STEPS = 60


@pytest.fixture(scope="module", autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def straight(small, draw):
    return draw(small(activation="relu", norm_eps=1e18), np.float64)


@pytest.fixture(scope="module")
def model(straight):
    norms = lambda m: (m.blocks.ln1.w, m.blocks.ln2.w, m.ln_final.w)
    return eqx.tree_at(norms, straight, [w * 2e8 for w in norms(straight)])


@pytest.fixture(scope="module")
def found(model, pair, metric):
    return mj.attribution.attribution_patch(model, *pair, metric, site="z", over=HEADS)


@pytest.fixture(scope="module")
def exact(model, pair, metric):
    return mj.patching.activation_patch(model, *pair, metric, site="z", over=HEADS, mode="noise")


@pytest.mark.parametrize(
    ("site", "over"),
    [
        ("z", HEADS),
        pytest.param("z", ("head",), marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("embed", ("pos",)), ("resid_mid", ("pos", "layer")), ("mlp_post", ("layer", "d_mlp")),
                ("v", ("layer", "kv_head")), ("v", ("pos",)), ("ln_final.normalized", ("pos",)),
            ]
        ),
    ],
)  # fmt: skip
def test_gradients_of_activations__of_an_affine_model__are_exact(straight, affine, pair, metric, site, over):
    model, how = affine(straight), {"site": site, "over": over}
    exact = mj.patching.activation_patch(model, *pair, metric, mode="noise", **how)
    records = [mj.attribution.attribution_patch(model, *pair, metric, **how)]
    if "layer" in over:  # else all places move together, and later ones hide what earlier ones do
        records.append(mj.attribution.integrated_gradients(model, *pair, metric, steps=STEPS, **how))
    for found in records:
        assert found.scores.dtype == np.float64
        np.testing.assert_allclose(found.scores, found.truth(exact), rtol=1e-8, atol=1e-8)
    assert np.abs(records[0].scores).max() > 0.01


def differences(model, ids, metric, site, taken, axis):
    """What a small step along `taken` takes from the metric, at one place."""

    @jax.jit
    def moved(by, layer, pos, i):
        edit = mj.add(site, -by * taken, per_layer=True, **{"layer": layer, "pos": pos, axis: i})
        return metric(mj.intervene(model, [edit])(ids))

    step = 1e-5
    for place in [(0, 0, 1), (1, 3, 0), (0, 4, 1), (1, 4, 1)]:
        low, high = (moved(jnp.float64(by), *place) for by in (-step, step))
        yield place, (low - high) / (2 * step)


@pytest.mark.parametrize(
    ("changes", "site"),
    [
        (POST, "k"),
        pytest.param({"positions": "rotary", "residual": "parallel_shared"}, "k", marks=pytest.mark.slow),
        pytest.param({"mlp": "gated"}, "mlp_post", marks=pytest.mark.slow),
    ],
    ids=["shared keys, norms after", "one norm, rotary", "gated"],
)
@pytest.mark.slow
def test_attribution_patch__is_the_slope_of_a_small_step_to_the_ablated_activation(
    small, draw, pair, metric, changes, site
):
    model = draw(small(**changes), np.float64)
    axis = mj.list_sites(model, pair[0])[site].axes[1]
    found = mj.attribution.attribution_patch(model, *pair, metric, site=site, over=("layer", "pos", axis))
    intact, ablated = (mj.capture(model, site)(ids)[1][site] for ids in pair)
    for place, slope in differences(model, pair[0], metric, site, intact - ablated, axis):
        np.testing.assert_allclose(found.per_example[place], slope, rtol=1e-6, atol=1e-8)
    assert np.abs(found.scores).max() > 0.01


@pytest.mark.parametrize("ablation", ["zero", "mean", pytest.param("mean_per_pos", marks=pytest.mark.slow)])
def test_attribution_patch__other_ablations__are_steps_to_what_stands_in(model, pair, metric, ablation):
    prompts = jax.random.randint(jax.random.key(7), (4, 5), 0, 20, np.int32)
    mask = np.arange(5) < np.array([5, 5, 4, 2])[:, None]
    given = mj.Prompts(prompts, jnp.asarray(mask))
    found = mj.attribution.attribution_patch(
        model, pair[0], None, metric, site="z", over=HEADS, ablation=ablation,
        reference=None if ablation == "zero" else given, reduce="mean_of_abs",
    )  # fmt: skip
    z = np.asarray(mj.capture(model, "z")(given)[1]["z"])
    out = {
        "zero": np.zeros(1),
        "mean": z[:, mask].mean(1)[:, None, None],
        "mean_per_pos": np.stack([z[:, mask[:, i], i].mean(1) for i in range(5)], 1)[:, None],
    }[ablation]
    taken = mj.capture(model, "z")(pair[0])[1]["z"] - out
    for place, slope in differences(model, pair[0], metric, "z", taken, "head"):
        np.testing.assert_allclose(found.per_example[place], slope, rtol=1e-5, atol=1e-6)  # means are float32
    np.testing.assert_allclose(found.scores, np.abs(found.per_example).mean(-1), **TOL["float64", "gradient"])


def test_integrated_gradients__of_each_layer__sum_to_what_ablating_it_does(model, pair, metric, found):
    exact = mj.patching.activation_patch(model, *pair, metric, site="z", over=("layer",), mode="noise")
    gaps = exact.clean.mean() - exact.scores
    on_the_way = mj.attribution.integrated_gradients(model, *pair, metric, site="z", over=HEADS, steps=STEPS)
    errors = [np.abs(np.asarray(x.scores).sum((1, 2)) - gaps).max() for x in (on_the_way, found)]
    assert errors[0] < 0.01 * np.abs(gaps).max()
    assert errors[0] < errors[1] / 5
    assert on_the_way.method == "integrated_gradients(steps=60, quadrature='midpoint')"


def test_attribution_patch__compared_with_exact__agrees_but_is_not_exact(found, exact):
    agreement = found.compare(exact, 5)
    assert 0.3 < float(agreement.pearson) < 0.999
    np.testing.assert_allclose(found.truth(exact), exact.clean.mean() - exact.scores, **TOL["float32", "law"])
    assert float(found.compare(found).pearson) == pytest.approx(1)


def test_attribution_patch__sizes_before_and_after_the_mean__are_those_of_each_example(
    model, pair, metric, found
):
    for reduce, size in {
        "abs_of_mean": np.abs(found.scores),
        "mean_of_abs": np.abs(found.per_example).mean(-1),
    }.items():
        other = mj.attribution.attribution_patch(model, *pair, metric, site="z", over=HEADS, reduce=reduce)
        np.testing.assert_allclose(other.scores, size, **TOL["float32", "law"])


def test_per_place__named_positions__are_those_columns(model, pair):
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4, 4))
    named = np.array([[0, 1, 2], [4, 4, 3]], np.int32)
    found = per_place(
        jnp.asarray(x), mj.list_sites(model, pair[0])["z"], ("head", "pos", "layer"), jnp.asarray(named)
    )
    expected = x.sum(-1)[:, np.arange(3), named].transpose(3, 1, 0, 2)
    np.testing.assert_allclose(found, expected, **TOL["float64", "gradient"])


def test_gradients_of_activations__clean_equals_corrupt__are_zero(model, pair, metric):
    how = {"site": "z", "over": HEADS}
    assert not np.any(mj.attribution.attribution_patch(model, pair[0], pair[0], metric, **how).scores)
    on_the_way = mj.attribution.integrated_gradients(model, pair[0], pair[0], metric, steps=STEPS, **how)
    assert not np.any(on_the_way.scores)


def test_site_scores__are_saved_and_print(found, tmp_path):
    back = mj.restore(mj.save(found, tmp_path / "scores"))
    np.testing.assert_array_equal(back.scores, found.scores)
    assert "method       'attribution_patch'" in str(back)


class Total(Metric):
    """One number for the whole batch."""

    def of(self, logits):
        return logits.sum()


def test_attribution_patch__bad_input__is_explained(model, pair, metric, as_a_user):
    def refused(error, message, *, clean=pair[0], corrupt=pair[1], metric=metric, **more):
        with pytest.raises(error, match=message):
            mj.attribution.attribution_patch(model, clean, corrupt, metric, **{"site": "z"} | more)

    refused(PairingError, "pair 0 has 5 clean and 4 corrupt tokens", corrupt=pair[1][:, :4])
    masks = [jnp.arange(5) < 4, jnp.arange(5) > 0]
    padded = [mj.Prompts(jnp.asarray(i), jnp.tile(m, (3, 1))) for i, m in zip(pair, masks, strict=True)]
    refused(PairingError, "padded at different places", clean=padded[0], corrupt=padded[1])
    refused(ArgumentError, r"Total gives shape \(\) for a batch of 3", metric=Total(jnp.int32(-1)))
    refused(ArgumentError, "ablation='mean' needs `reference=`", ablation="mean")
    refused(ArgumentError, "give `corrupt`", corrupt=None)
    refused(SiteError, "cannot sweep `query`: site `z` has layer, pos, head, d_head", over=("query",))
    refused(SiteError, "names one layer; patching sweeps layers: say site='z' and read row 1", site="z1")
    refused(SiteError, "no site `zz` here", site="zz")
    refused(ArgumentError, "has no 'pos'", over=("layer",), positions={"end": jnp.array([1, 1, 1])})
    refused(ShapeError, r"position `end` has shape \(2,\)", positions={"end": jnp.array([1, 1])})
    refused(ShapeError, "the reference prompts have 3 tokens and the pairs 5.*ablation='mean'",
            ablation="mean_per_pos", reference=pair[0][:, :3])  # fmt: skip
    broken = eqx.tree_at(lambda m: m.blocks.attn.W_V, model, model.blocks.attn.W_V.at[1].set(jnp.inf))
    with pytest.raises(ArgumentError, match="`z` of layer 1 is not finite in this run"):
        mj.attribution.attribution_patch(broken, *pair, metric, site="z", over=HEADS)
    at = jnp.array([9, 1, 1])
    refused(ArgumentError, "scores at `z` are not finite, though what nodes write is", positions={"end": at})


def test_compare__of_what_does_not_fit__is_refused(metric, found, exact):
    denoised = dataclasses.replace(exact, mode="denoise")
    zero = dataclasses.replace(found, ablation="zero")
    elsewhere = eqx.tree_at(lambda r: r.clean, exact, exact.clean + 1)
    for other, message in [
        (denoised, "has mode='denoise'"),
        (zero, "have ablation='resample' and those to compare with have ablation='zero'"),
        (elsewhere, "compare what was made of the same prompts"),
        (metric, "cannot compare with a LogitDiff, which has no `per_example`"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            found.compare(other)


@pytest.mark.slow
def test_attribution_patch__of_integers__is_refused(draw, small, pair, metric):
    with jax.enable_x64(False):
        experts = draw(small(mlp="gated", experts=Experts(n_experts=4, top_k=2, d_expert=6)))
        with pytest.raises(SiteError, match="`expert_indices` holds int32, which has no gradient"):
            mj.attribution.attribution_patch(experts, *pair, metric, site="expert_indices")
