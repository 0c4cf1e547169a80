"""Evaluation: each measure against its definition in float64, and against naive versions that are wrong."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.dicteval import loss_recovered, reconstruction, recovery
from mechjax.dictionaries import ReLU, TopK
from tests.dictionaries.kinds import D, F, drawn, tokens
from tests.tolerances import TOL

CLOSE = TOL["float32", "gradient"]


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_reconstruction__equals_its_definitions_in_float64(offset):
    dictionary = drawn("top_k")
    dictionary = eqx.tree_at(lambda d: d.b_dec, dictionary, dictionary.b_dec + offset)
    batches = [tokens(i, n) + offset for i, n in enumerate((24, 24, 10))]
    found = reconstruction(dictionary, batches)
    y = np.concatenate(batches).astype(np.float64)
    f = np.concatenate([dictionary.encode(x) for x in batches])
    made = np.concatenate([dictionary(x) for x in batches]).astype(np.float64)
    e, spread = y - made, np.square(y - y.mean(0)).sum()
    np.testing.assert_allclose(found.fvu, np.square(e).sum() / spread, **CLOSE)
    np.testing.assert_allclose(found.fvu_about_mean, np.square(e - e.mean(0)).sum() / spread, **CLOSE)
    np.testing.assert_allclose(found.nmse, (np.square(e).sum(-1) / np.square(y).sum(-1)).mean(), **CLOSE)
    np.testing.assert_allclose(found.gamma, np.square(made).sum() / (made * y).sum(), **CLOSE)
    cosines = (made * y).sum(-1) / np.linalg.norm(made, axis=-1) / np.linalg.norm(y, axis=-1)
    np.testing.assert_allclose(found.cosine, cosines.mean(), **CLOSE)
    np.testing.assert_allclose(found.density, (f != 0).mean(0), **CLOSE)
    np.testing.assert_allclose(found.l0, (f != 0).sum(-1).mean(), **CLOSE)
    np.testing.assert_allclose(found.dead, ((f != 0).sum(0) == 0).mean(), **CLOSE)
    assert int(found.tokens) == 58
    naive = 1 - np.square(e).sum(-1).mean() / (
        np.square(y).sum(-1).mean() - np.square(np.square(y).mean(0)).sum()
    )
    if offset:  # a peer's score subtracts the square of the mean square
        assert abs((1 - naive) - float(found.fvu)) > 0.1


def test_reconstruction__of_an_error_that_is_everywhere_the_same__is_told_apart():
    dictionary = drawn("relu")
    x = tokens(n=300)
    off = eqx.tree_at(lambda d: d.b_dec, dictionary, dictionary.b_dec + 2.0)
    plain, moved = reconstruction(dictionary, [x]), reconstruction(off, [x])
    np.testing.assert_allclose(moved.fvu_about_mean, plain.fvu_about_mean, **CLOSE)
    assert float(moved.fvu) > float(plain.fvu) + 0.5


def test_reconstruction__of_shrunk_latents__says_so():
    x = jax.random.normal(jax.random.key(0), (400, D))
    rows = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (D, D)))[0]
    both = jnp.concatenate([rows, -rows])
    whole = ReLU(both.T, jnp.zeros(2 * D), both, jnp.zeros(D), coefficient=jnp.zeros(()))
    np.testing.assert_allclose(reconstruction(whole, [x]).gamma, 1.0, **CLOSE)
    shrunk = eqx.tree_at(lambda d: d.W_dec, whole, 0.5 * both)
    np.testing.assert_allclose(reconstruction(shrunk, [x]).gamma, 0.5, **CLOSE)
    np.testing.assert_allclose(reconstruction(shrunk, [x]).fvu, 0.25, atol=2e-3)


def test_reconstruction__of_a_transcoder__compares_with_its_target():
    dictionary = drawn("top_k", d_out=7)
    x, y = tokens(), tokens(1, d=7)
    e = np.asarray(y - dictionary(x), np.float64)
    expected = np.square(e).sum() / np.square(np.asarray(y) - np.asarray(y).mean(0)).sum()
    np.testing.assert_allclose(reconstruction(dictionary, [(x, y)]).fvu, expected, **CLOSE)


def test_reconstruction__of_nothing__says_what_it_needs():
    with pytest.raises(ArgumentError, match="fewer than two tokens"):
        reconstruction(drawn("relu"), [])
    with pytest.raises(ShapeError, match="reads vectors of length 12"):
        reconstruction(drawn("relu"), [tokens(d=5)])


def with_rows(rows):
    rows = jnp.asarray(rows, jnp.float32)
    return ReLU(rows.T, jnp.zeros(len(rows)), rows, jnp.zeros(rows.shape[1]), coefficient=jnp.zeros(()))


def test_recovery__of_features_by_hand__matches_one_to_one():
    features = jnp.eye(4)
    rows = np.eye(4)[[0, 0, 1, 3]] * np.array(
        [[2.0], [1.0], [0.5], [-3.0]]
    )  # two for the first, one upside down
    found = recovery(with_rows(rows), features)
    np.testing.assert_allclose(found.found, [1, 1, 0, 0])
    np.testing.assert_allclose(found.mmcs, 0.5)
    np.testing.assert_allclose(found.mcc, 0.75)  # a latent for 0, 1 and 3 (whatever its sign), none for 2
    np.testing.assert_allclose(found.above, 0.5)
    np.testing.assert_allclose(found.unique, 0.5)
    whole = recovery(with_rows(5 * features[::-1]), features)
    np.testing.assert_allclose(
        [whole.mcc, whole.mmcs, whole.above, whole.unique], np.ones(4), **TOL["float32", "law"]
    )


def test_recovery__of_features_of_another_width__says_which():
    with pytest.raises(ShapeError, match=r"features have shape \(3, 5\).*vectors of length 12"):
        recovery(drawn("relu"), jnp.zeros((3, 5)))


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_loss_recovered__equals_runs_by_hand(tiny_model, tiny_tokens, ablation):
    dictionaries = {1: TopK.init(d_model=16, n_features=F, k=4, key=jax.random.key(0))}
    mask = jnp.ones(tiny_tokens.shape, bool).at[0, 4:].set(False).at[2, :2].set(False)
    prompts = [mj.Prompts(tiny_tokens[:2], mask[:2]), mj.Prompts(tiny_tokens[2:], mask[2:])]
    found = loss_recovered(tiny_model, prompts, dictionaries, ablation=ablation)

    def logs(edits):
        return np.asarray(
            jax.nn.log_softmax(mj.intervene(tiny_model, edits)(tiny_tokens, mask=mask), -1), np.float64
        )

    x = mj.capture(tiny_model, ["resid_post"])(tiny_tokens, mask=mask)[1]["resid_post"][1]
    real = np.asarray(mask)
    mean = np.asarray(x)[real].mean(0)
    own = logs([])
    spliced = logs([mj.replace("resid_post", dictionaries[1](x), layer=1)])
    out = jnp.zeros_like(x) if ablation == "zero" else jnp.broadcast_to(jnp.asarray(mean), x.shape)
    ablated = logs([mj.replace("resid_post", out, layer=1)])
    counted = real[:, :-1] & real[:, 1:]
    rows, places = np.nonzero(counted)
    ce = [
        -of[rows, places, np.asarray(tiny_tokens)[rows, places + 1]].mean() for of in (own, spliced, ablated)
    ]
    kl = [(np.exp(own) * (own - of)).sum(-1)[rows, places].mean() for of in (spliced, ablated)]
    np.testing.assert_allclose([found.ce, found.ce_spliced, found.ce_ablated], ce, **CLOSE)
    np.testing.assert_allclose([found.kl_spliced, found.kl_ablated], kl, **CLOSE)
    np.testing.assert_allclose(found.kl_recovered, 1 - kl[0] / kl[1], rtol=1e-3)
    assert int(found.tokens) == counted.sum()


def test_loss_recovered__of_what_makes_all_of_the_site__is_one(tiny_model, tiny_tokens):
    eye = jnp.eye(16)
    both = jnp.concatenate([eye, -eye])
    whole = ReLU(both.T, jnp.zeros(32), both, jnp.zeros(16), coefficient=jnp.zeros(()))
    found = loss_recovered(tiny_model, [tiny_tokens], {0: whole, 2: whole})
    np.testing.assert_allclose([found.ce_recovered, found.kl_recovered], [1, 1], atol=1e-4)


def test_loss_recovered__of_nothing__says_what_it_needs(tiny_model, as_a_user):
    with pytest.raises(ArgumentError, match="0 batches of prompts and ablation='zero'"):
        loss_recovered(tiny_model, [], {0: drawn("relu")})
    with pytest.raises(ArgumentError, match="ablation='noise'"):
        loss_recovered(tiny_model, [jnp.zeros((1, 2), int)], {0: drawn("relu")}, ablation="noise")
