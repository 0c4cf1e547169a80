"""The world of SynthSAEBench: its samples against closed forms, and against moments of SAELens' own model."""

import itertools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from mechjax.base import records
from mechjax.base.errors import ArgumentError
from mechjax.tasks.directions import pushed_apart
from mechjax.tasks.hierarchy import Forest, grown
from mechjax.tasks.synthetic_world import World, synth_sae_bench, zipf
from tests.tolerances import TOL

ORACLE = Path(__file__).parents[1] / "oracles" / "synthetic_world.npz"
N, ROUNDS = 8192, 16
FAR = 4.5  # standard deviations: with some thousand comparisons, chance reaches 4


@pytest.fixture(scope="module")
def oracle():
    return np.load(ORACLE)


@pytest.fixture(scope="module")
def theirs(oracle):
    """A world of the numbers that SAELens' model was made of."""
    of = lambda name: jnp.asarray(oracle[name], jnp.float32)
    return World(
        jnp.eye(256), jnp.zeros(256), of("drawn"), of("mean"), of("spread"), of("factor"), Forest(2, 4, 3)
    )


def drawn(world, seed=5):
    """Activations of many samples, in float64."""
    return np.concatenate(
        [np.asarray(world.sample(key, N)[1]) for key in jax.random.split(jax.random.key(seed), ROUNDS)]
    ).astype(np.float64)


@pytest.fixture(scope="module")
def activations(theirs):
    return drawn(theirs)


@pytest.fixture(scope="module")
def apart(theirs):
    """Of the same world with draws each by itself."""
    return drawn(eqx.tree_at(lambda w: w.factor, theirs, jnp.zeros((256, 25))))


def alike(ours, theirs, variance, n_theirs=np.inf):
    """Standard deviations between two means, the largest; `variance` of one sample."""
    away = np.abs(ours - theirs) / np.sqrt(variance * (1 / (N * ROUNDS) + 1 / n_theirs) + 1e-12)
    return float(np.max(away))


def there_at_all(world):
    """The chance that each feature is drawn with a size above 0."""
    mean, spread = (np.asarray(z, np.float64) for z in (world.mean, world.spread))
    return np.asarray(world.chance, np.float64) * norm.cdf(mean / spread)


def rates(world):
    """How often each feature is there where all are drawn by themselves: every subset of siblings, counted."""
    p, forest = there_at_all(world), world.forest
    parents, found = forest.parents(len(p)), p.copy()
    for child in np.flatnonzero(parents >= 0):
        others = [i for i in np.flatnonzero(parents == parents[child]) if i != child]
        stays = 0.0
        for there in itertools.product((0, 1), repeat=len(others)):
            stays += np.prod([p[i] if t else 1 - p[i] for i, t in zip(others, there, strict=True)]) / (
                1 + sum(there)
            )
        found[child] = found[parents[child]] * p[child] * stays
    return found


def sizes(world):
    """Mean size of each feature where it is there, draws being each by itself; of parents, the square's too."""
    mean, spread = (np.asarray(z, np.float64) for z in (world.mean, world.spread))
    low = -mean / spread
    hazard = norm.pdf(low) / norm.sf(low)
    first = mean + spread * hazard
    second = mean**2 + spread**2 + mean * spread * hazard
    parents = world.forest.parents(len(mean))
    for child in np.flatnonzero(parents >= 0):  # parents come first
        up = parents[child]
        first[child] *= first[up] / mean[up]
        second[child] *= second[up] / mean[up] ** 2
    return first, second


# ---- what it is made of ----------------------------------------------------------------------------------------------


def test_zipf__of_the_benchmarks_numbers__is_saelens_own(oracle):
    np.testing.assert_allclose(zipf(256), oracle["wanted"], **TOL["float32", "parity"])
    assert zipf(256)[0] == 0.4 and zipf(256)[-1] == 5e-4


def test_compensated__chances__are_saelens_own(oracle):
    small = Forest(2, 4, 3).compensated(zipf(256))
    np.testing.assert_allclose(small, oracle["drawn"], **TOL["float32", "parity"])
    assert (small <= 1).all() and (small == 1).sum() == 7  # the most that there can be; SAELens says as many
    whole = Forest(128, 4, 3).compensated(zipf(16_384))
    np.testing.assert_allclose(whole[:11_000:7], oracle["drawn_whole"], **TOL["float32", "parity"])


def test_forest__of_the_benchmark__has_levels_in_a_row():
    forest = Forest(128, 4, 3)
    assert forest.levels == ((0, 128), (128, 640), (640, 2688), (2688, 10_880))
    assert (forest.n_parents, forest.n_features) == (2688, 10_880)
    parents = forest.parents(16_384)
    assert (parents[:128] == -1).all() and (parents[10_880:] == -1).all()
    assert (np.bincount(parents[128:10_880]) == 4).all()
    np.testing.assert_array_equal(parents[[128, 131, 132, 640, 644, 10_879]], [0, 0, 1, 128, 129, 2687])


def test_pushed_apart__random_rows__end_where_saelens_ends(oracle):
    rng = np.random.default_rng(11)
    rows, along = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((256, 96), 96))
    found = np.asarray(pushed_apart(rows, 3e-4 * 8**0.5, steps=100), np.float64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.ones(256), **TOL["float32", "law"])
    np.testing.assert_allclose(found @ np.asarray(along), oracle["pushed"], rtol=1e-3, atol=1e-4)
    cosines = lambda W: (np.square(W @ W.T).sum() - 256) / (256 * 255)
    before = np.asarray(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose([cosines(before), cosines(found)], oracle["cosines"], rtol=1e-4)
    assert cosines(found) < 0.9 * cosines(before)


def test_world__of_a_scale__has_its_sizes_and_survives_saving(tmp_path):
    world = synth_sae_bench(jax.random.key(0), scale=1 / 64)
    assert world.features.shape == (256, 96) and world.factor.shape == (256, 25)
    np.testing.assert_allclose(
        jnp.linalg.norm(world.features, axis=1), np.ones(256), **TOL["float32", "parity"]
    )
    np.testing.assert_allclose(jnp.linalg.norm(world.bias), 0.5, **TOL["float32", "parity"])
    np.testing.assert_allclose(world.mean, np.linspace(5, 4, 256), **TOL["float32", "parity"])
    assert (
        float(world.spread.min()) >= 0 and abs(float(world.spread.mean()) - 0.583) < 0.1
    )  # |N(.5, .5)| has .583
    assert float(jnp.square(world.factor).sum(-1).max()) <= 0.99 + 1e-6
    again = records.restore(records.save(world, tmp_path / "world"))
    np.testing.assert_array_equal(
        again.sample(jax.random.key(1), 8)[0], world.sample(jax.random.key(1), 8)[0]
    )


def test_world__other_choices__change_what_they_say():
    plain = synth_sae_bench(jax.random.key(0), scale=1 / 64, d_model=24, correlation=0.0, hierarchy=False)
    assert (
        plain.features.shape == (256, 24) and plain.forest is None and float(jnp.abs(plain.factor).max()) == 0
    )
    np.testing.assert_allclose(plain.chance, zipf(256), **TOL["float32", "parity"])
    strong = synth_sae_bench(jax.random.key(0), scale=1 / 64, correlation=5.0)
    np.testing.assert_allclose(
        jnp.square(strong.factor).sum(-1), np.full(256, 0.99), **TOL["float32", "parity"]
    )


def test_world__numbers_that_cannot_be__say_what_can():
    with pytest.raises(ArgumentError, match=r"scale=0\.5: give 1, 1/4, 1/16 or 1/64"):
        synth_sae_bench(jax.random.key(0), scale=0.5)
    with pytest.raises(ArgumentError, match=r"d_model=0, correlation=0\.1"):
        synth_sae_bench(jax.random.key(0), scale=1 / 64, d_model=0)
    with pytest.raises(ArgumentError, match=r"correlation=-1\.0"):
        synth_sae_bench(jax.random.key(0), scale=1 / 64, correlation=-1.0)


# ---- samples against closed forms ------------------------------------------------------------------------------------


def test_sample__is_the_sum_of_its_features_and_the_bias():
    world = synth_sae_bench(jax.random.key(0), scale=1 / 64)
    x, a = world.sample(jax.random.key(1), 64)
    expected = np.asarray(a, np.float64) @ np.asarray(world.features, np.float64) + np.asarray(world.bias)
    np.testing.assert_allclose(x, expected, **TOL["float32", "parity"])
    inside = jax.jit(lambda world, key: world.sample(key, 64))(world, jax.random.key(1))
    np.testing.assert_array_equal(inside[1], a)


def test_rates__of_draws_by_themselves__equal_the_sum_over_subsets_of_siblings(apart, theirs):
    p = rates(theirs)
    assert alike((apart > 0).mean(0), p, p * (1 - p)) < FAR
    naive = there_at_all(theirs)  # as if no sibling ever stood in the way
    parents = theirs.forest.parents(256)
    for child in np.flatnonzero(parents >= 0):
        naive[child] *= naive[parents[child]]
    assert alike((apart > 0).mean(0), naive, naive * (1 - naive)) > 10 * FAR


def test_sizes__of_children__are_those_of_their_parents_times_their_own(apart, theirs):
    first, second = sizes(theirs)
    count = (apart > 0).sum(0)
    often = count > 500
    away = np.abs(apart.sum(0) / np.maximum(count, 1) - first) / np.sqrt(
        (second - first**2) / np.maximum(count, 1)
    )
    assert away[often].max() < FAR and often.sum() > 100
    deep = np.zeros(256, bool)
    deep[42:170] = True  # the last level: a size that hung on nobody's would spread far less
    own = np.asarray(theirs.spread, np.float64) ** 2
    assert ((second - first**2)[deep] > 1.5 * own[deep]).mean() > 0.7


def test_hierarchy__of_every_sample__has_no_child_without_parent_and_no_two_siblings(activations, theirs):
    there = activations > 0
    parents = theirs.forest.parents(256)
    children = np.flatnonzero(parents >= 0)
    assert not (there[:, children] & ~there[:, parents[children]]).any()
    siblings = there[:, 2:170].reshape(len(there), 42, 4).sum(-1)
    assert siblings.max() == 1
    assert (siblings.mean(0) > 0).all()


def test_pairs__of_correlated_draws__are_there_together_as_two_normals_are(activations, theirs):
    free = [0, 1, *range(170, 190)]  # roots and features outside of trees: what was drawn is what is there
    p = np.asarray(theirs.chance, np.float64)
    factor = np.asarray(theirs.factor, np.float64)
    above = norm.cdf(np.asarray(theirs.mean / theirs.spread, np.float64))
    there = activations > 0
    chance_alone, strong = [], []
    for i, j in itertools.combinations(free, 2):
        r = factor[i] @ factor[j]
        both = (
            multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf([norm.ppf(p[i]), norm.ppf(p[j])])
            * above[i]
            * above[j]
        )
        found = (there[:, i] & there[:, j]).mean()
        assert alike(found, both, both * (1 - both)) < FAR, (i, j)
        alone = p[i] * p[j] * above[i] * above[j]
        chance_alone.append(alike(found, alone, alone * (1 - alone)))
        strong.append(abs(r))
    assert max(chance_alone) > FAR and max(strong) > 0.1  # draws each by themselves would not do


def test_grown__by_hand__keeps_one_sibling_and_scales_it():
    sizes = jnp.array(
        [[2.0, 0, 3, 0, 5, 7, 1, 1, 9], [0.0, 4, 3, 3, 6, 0, 0, 0, 9]]
    )  # two roots with two children
    mean = jnp.array([4.0, 2, 1, 1, 1, 1, 1, 1, 1])
    forest = Forest(2, 2, 1)
    for choice, child in ((0.0, 5), (0.49, 5), (0.5, 5), (0.99, 5)):  # of root 0 one child was drawn
        left = grown(sizes, jnp.full((2, 2), choice), mean, forest)
        np.testing.assert_allclose(left[0], [2, 0, 1.5, 0, 0, 0, 1, 1, 9], err_msg=str(child))
    low = grown(sizes.at[0, 3].set(8.0), jnp.array([[0.49, 0], [0, 0]]), mean, forest)
    high = grown(sizes.at[0, 3].set(8.0), jnp.array([[0.5, 0], [0, 0]]), mean, forest)
    np.testing.assert_allclose(low[0, 2:4], [1.5, 0])
    np.testing.assert_allclose(high[0, 2:4], [0, 4])
    np.testing.assert_allclose(low[1], [0, 4, 0, 0, 12, 0, 0, 0, 9])


# ---- samples against SAELens' ----------------------------------------------------------------------------------------


def test_samples__of_saelens_numbers__have_saelens_rates_pairs_and_l0(activations, oracle):
    n = float(oracle["samples"])
    there = activations > 0
    p = oracle["rate"]
    assert alike(there.mean(0), p, p * (1 - p), n) < FAR
    both, first = oracle["both"].astype(np.float64), there[:, : len(oracle["both"])].astype(np.float32)
    often = both * len(first) > 25  # counts that are nearly normal
    pairs = np.triu(often, 1)
    away = np.abs((first.T @ first) / len(first) - both)[pairs]
    away /= np.sqrt((both * (1 - both))[pairs] * (1 / len(first) + 1 / n))
    assert away.max() < FAR and 0.9 < np.sqrt(np.square(away).mean()) < 1.1 and pairs.sum() > 500
    l0 = there.sum(-1)
    assert alike(l0.mean(), p.sum(), l0.var(), n) < FAR
    squared = np.square(l0.astype(np.float64))
    assert alike(squared.mean(), float(oracle["l0_squared"]), squared.var(), n) < FAR


def test_samples__of_saelens_numbers__have_saelens_sizes(activations, oracle):
    count, theirs = (activations > 0).sum(0), oracle["rate"] * float(oracle["samples"])
    often = (count > 300) & (theirs > 300)
    variance = oracle["size_squared"] - oracle["size"] ** 2
    for power, name in ((1, "size"), (2, "size_squared")):
        mean = (activations**power).sum(0) / np.maximum(count, 1)
        spread = variance if power == 1 else (activations**4).sum(0) / np.maximum(count, 1) - mean**2
        away = np.abs(mean - oracle[name]) / np.sqrt(spread * (1 / np.maximum(count, 1) + 1 / theirs) + 1e-12)
        assert away[often].max() < FAR and often.sum() > 150, name


@pytest.mark.slow
def test_samples__of_the_whole_world__have_34_active_features():
    world = synth_sae_bench(jax.random.key(0))
    there = np.asarray(world.sample(jax.random.key(1), 2048)[1] > 0)
    assert world.features.shape == (16_384, 768)
    assert (
        abs(there.sum(-1).mean() - 34) < 1
    )  # "about 34", and about 25 of the first 4,096: the benchmark's page
    assert abs(there[:, :4096].sum(-1).mean() - 25) < 1
