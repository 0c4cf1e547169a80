"""Each edit against what it says, by NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from tests.tolerances import TOL

LAW = TOL["float32", "law"]
X = np.asarray(jax.random.normal(jax.random.key(0), (3, 4, 2, 5)), np.float32)  # batch pos head unit


def f(x):
    return mj.site(x, "z", axes=("pos", "head", "unit"))


def edited(*edits):
    return np.asarray(mj.intervene(f, edits)(X))


def changed(index, value):
    out = X.copy()
    out[index] = value
    return out


V = np.arange(5, dtype=np.float32)
SELECTIONS = {
    "int": (dict(pos=1), np.s_[:, 1]),
    "negative": (dict(pos=-1), np.s_[:, -1]),
    "array": (dict(pos=np.array([0, 3])), np.s_[:, [0, 3]]),
    "list": (dict(pos=[0, -1]), np.s_[:, [0, 3]]),
    "mask": (dict(pos=np.array([True, False, True, False])), np.s_[:, [0, 2]]),
    "two axes": (dict(pos=2, head=1), np.s_[:, 2, 1]),
    "list and int": (dict(pos=[0, 2], head=-1), np.s_[:, [0, 2], 1]),
    "per example": (dict(pos=mj.per_example([0, 3, -2]), head=0), np.s_[[0, 1, 2], [0, 3, 2], 0]),
    "lists per example": (
        dict(pos=[[0, 1], [1, 2], [3, 3]]),
        np.s_[[[0], [1], [2]], [[0, 1], [1, 2], [3, 3]]],
    ),
    "masks per example": (dict(pos=np.eye(3, 4, dtype=bool)), np.s_[[0, 1, 2], [0, 1, 2]]),
    "numpy scalar": (dict(pos=np.int64(1)), np.s_[:, 1]),
    "last axis": (dict(unit=3), np.s_[..., 3]),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_zero_and_add__every_selection__as_numpy_indexes(name):
    where, index = SELECTIONS[name]
    np.testing.assert_array_equal(edited(mj.zero("z", **where)), changed(index, 0))
    np.testing.assert_allclose(
        edited(mj.add("z", 2.0, strength=0.5, **where)), changed(index, X[index] + 1), **LAW
    )


def test_replace__value_forms__whole_size_one_or_absent():
    expected = changed(np.s_[:, 1, 0], V)
    for value in (
        V,
        V[None, None],
        np.broadcast_to(V, (3, 4, 2, 5)),
        np.broadcast_to(V, (3, 1, 1, 5)),
        np.broadcast_to(V, (4, 2, 5)),
    ):
        np.testing.assert_array_equal(edited(mj.replace("z", value, pos=1, head=0)), expected)
    by_example = np.arange(15, dtype=np.float32).reshape(3, 5)
    np.testing.assert_array_equal(
        edited(mj.replace("z", by_example, pos=1, head=0)), changed(np.s_[:, 1, 0], by_example)
    )
    whole = np.arange(120, dtype=np.float32).reshape(3, 4, 2, 5)
    np.testing.assert_array_equal(edited(mj.replace("z", whole, pos=1)), changed(np.s_[:, 1], whole[:, 1]))


def test_scale_clamp_and_order():
    np.testing.assert_allclose(
        edited(mj.scale("z", 3.0, head=1)), changed(np.s_[:, :, 1], X[:, :, 1] * 3), **LAW
    )
    np.testing.assert_allclose(edited(mj.clamp("z", -0.5, 0.5)), np.clip(X, -0.5, 0.5), **LAW)
    np.testing.assert_allclose(
        edited(mj.clamp("z", high=0.1, pos=0)), changed(np.s_[:, 0], np.minimum(X[:, 0], 0.1)), **LAW
    )
    np.testing.assert_allclose(edited(mj.scale("z", 2), mj.add("z", 1)), X * 2 + 1, **LAW)
    np.testing.assert_allclose(edited(mj.add("z", 1), mj.scale("z", 2)), (X + 1) * 2, **LAW)


def test_project_out__one_direction_and_a_span__nothing_is_left():
    out = edited(mj.project_out("z", 7 * V, head=0))
    np.testing.assert_allclose(out[:, :, 0] @ V, 0, atol=1e-5)
    np.testing.assert_array_equal(out[:, :, 1], X[:, :, 1])
    basis = np.stack([V, np.ones(5, np.float32), V + 1])  # the third depends on the others
    out = edited(mj.project_out("z", basis))
    np.testing.assert_allclose(out @ basis.T, 0, atol=1e-5)
    q = np.linalg.qr(basis[:2].T)[0]
    np.testing.assert_allclose(out, X - X @ q @ q.T, rtol=1e-5, atol=1e-5)


def test_resample__no_example_keeps_its_own__and_every_one_is_used():
    for seed in range(10):
        out = edited(mj.resample("z", X, key=jax.random.key(seed)))
        source = [[i for i in range(3) if (out[j] == X[i]).all()] for j in range(3)]
        assert sorted(i for s in source for i in s) == [0, 1, 2]
        assert all(s != [j] for j, s in enumerate(source))


def test_means_and_mean_ablate__ragged_prompts__padding_does_not_count():
    table = jax.random.normal(jax.random.key(1), (9, 5))

    def model(prompts):
        tokens = prompts.tokens if isinstance(prompts, mj.Prompts) else prompts
        x = mj.site(jnp.take(table, tokens, axis=0), "embed", axes=("pos", "unit"))
        for layer in range(2):
            x = mj.site(x * 2, "h", layer=layer, layers=2, axes=("pos", "unit"))
        return mj.site(x.sum(-2), "pooled", axes=("unit",))

    mask = jnp.array([[True, True, False], [True, True, True]])
    prompts = mj.Prompts(jnp.array([[1, 2, 8], [3, 4, 5]]), mask)
    whole = mj.means(model, prompts, ["embed", "h"])
    np.testing.assert_allclose(whole["embed"], table[1:6].mean(0), **LAW)
    np.testing.assert_allclose(whole["h"], table[1:6].mean(0) * jnp.array([[2.0], [4.0]]), rtol=1e-5)
    each = mj.means(model, [prompts, prompts], "embed", per="pos")
    expected = jnp.stack([(table[1] + table[3]) / 2, (table[2] + table[4]) / 2, table[5]])
    np.testing.assert_allclose(each["embed"], expected, rtol=1e-5)
    _, acts = mj.capture(mj.intervene(model, [mj.mean_ablate("h", whole, layer=1, pos=0)]), "h")(prompts)
    np.testing.assert_allclose(acts["h"][1][:, 0], np.broadcast_to(whole["h"][1], (2, 5)), rtol=1e-5)
    with pytest.raises(LookupError, match="has no `pos` axis, so its padding is not known"):
        mj.means(model, prompts, "pooled")


class Dictionary(eqx.Module):
    W: jax.Array

    def __call__(self, x, info):
        return x @ self.W


def test_apply__module_is_data__its_gradient_exists():
    module = Dictionary(jnp.eye(5) * 2)
    np.testing.assert_allclose(edited(mj.apply("z", module)), X * 2, **LAW)
    grads = eqx.filter_grad(lambda m: mj.intervene(f, [mj.apply("z", m)])(X).sum())(module)
    np.testing.assert_allclose(grads.W, X.sum((0, 1, 2))[:, None] * np.ones((1, 5)), rtol=1e-4, atol=1e-4)


def test_apply__info__says_where():
    seen = []

    def look(x, info, by):
        seen.append((info.name, info.axes))
        return x + by

    np.testing.assert_allclose(
        edited(mj.apply("z", look, 2.0, pos=1)), changed(np.s_[:, 1], X[:, 1] + 2), **LAW
    )
    assert seen[0] == ("z", ("pos", "head", "unit"))


def test_capture__parts_and_reducers():
    def kept(**index):
        return np.asarray(mj.capture(f, "z", **index)(X)[1]["z"])

    np.testing.assert_array_equal(kept(pos=-1, head=0), X[:, -1, 0])
    np.testing.assert_array_equal(kept(head=[1, 0]), X[:, :, [1, 0]])
    np.testing.assert_array_equal(kept(pos=mj.per_example([0, 3, 1])), X[[0, 1, 2], [0, 3, 1]][:, None])
    np.testing.assert_array_equal(kept(reduce=lambda x, info: x.max((1, 2, 3))), X.max((1, 2, 3)))
    assert mj.capture(f, "z", pos=-1)(X)[1].axes["z"] == ("head", "unit")


def test_values__bf16_site__keeps_its_dtype():
    out = mj.intervene(f, [mj.add("z", 1.0), mj.replace("z", V, pos=0), mj.project_out("z", V, pos=1)])(
        X.astype(jnp.bfloat16)
    )
    assert out.dtype == jnp.bfloat16


def test_transformed__saves_static_structure__vmap_over_edits_equals_a_loop():
    values = jnp.arange(10.0).reshape(2, 5)
    swept = jax.vmap(lambda v, p: mj.intervene(f, [mj.replace("z", v, pos=p)])(X))(values, jnp.array([0, 2]))
    for out, v, p in zip(swept, values, (0, 2), strict=True):
        np.testing.assert_array_equal(out, changed(np.s_[:, p], v))
