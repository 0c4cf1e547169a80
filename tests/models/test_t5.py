"""T5 by itself: its config, its refusals, its two halves, edits, transforms, and what it takes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import ArgumentError, JitError, ShapeError, SiteError, TokenError
from mechjax.dictlearn import activations
from mechjax.models import T5, T5Config
from mechjax.models.structures import build
from tests.tolerances import TOL

SMALL = {"d_vocab": 11, "d_model": 8, "n_layers": 2, "n_decoder_layers": 3, "n_heads": 2, "d_mlp": 6}
TOKENS = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
SECOND = np.array([[0, 3, 1, 2], [0, 5, 5, 7]])


def drawn(config):
    keys = jax.random.split(jax.random.key(0), len(config.shapes))
    draw = lambda shape, key: 0.5 * jax.random.normal(key, shape)
    return build(config, {p: draw(s, k) for (p, s), k in zip(config.shapes.items(), keys, strict=True)})


@pytest.fixture(scope="module")
def model():
    return drawn(T5Config(**SMALL))


@pytest.fixture(scope="module")
def logits(model):
    return np.asarray(model(TOKENS, SECOND))


def test_call__of_either_text_changed__changes_what_can_see_it(model, logits):
    later, other = SECOND.copy(), TOKENS.copy()
    later[:, 2], other[:, -1] = 9, 0
    moved = np.abs(model(TOKENS, later) - logits).max((0, 2))
    assert (moved[:2] == 0).all() and (moved[2:] > 1e-4).all()
    assert (np.abs(model(other, SECOND) - logits).max(-1) > 1e-4).all()


def test_halves__encode_and_decode__give_what_a_call_gives(model, logits):
    mask = jnp.asarray(np.arange(7) < 5)[None].repeat(2, 0)
    padded = np.concatenate((TOKENS, np.full((2, 2), 99)), 1)
    encoded = model.encode(padded, mask=mask)
    assert encoded.shape == (2, 7, 8)
    assert_allclose(model.decode(encoded, SECOND, mask=mask), logits, **TOL["float32", "layout"])
    assert np.abs(model.decode(encoded, SECOND) - logits).max() > 1e-4  # padding is seen without the mask
    assert_allclose(model(TOKENS[0], SECOND[0]), logits[0], **TOL["float32", "layout"])
    assert_allclose(model.encoder_alone()(TOKENS), encoded[:, :5], **TOL["float32", "layout"])


def test_intervene__under_vmap__equals_one_by_one(model, logits):
    def with_factor(factor):
        edits = [mj.scale("encoder.z", factor, layer=1, head=0), mj.scale("cross_pattern", factor, layer=2)]
        return mj.intervene(model, edits)(TOKENS, SECOND)

    every = jax.vmap(with_factor)(jnp.array([1.0, 0.0]))
    assert_allclose(every[0], logits, **TOL["float32", "law"])
    assert_allclose(every[1], with_factor(0.0), **TOL["float32", "law"])
    assert np.abs(every[1] - logits).max() > 1e-3


def test_jit__of_ids_that_are_no_tokens__gives_nan_in_that_example_alone(model, logits):
    wrong = TOKENS.copy()
    wrong[1, 2] = 11
    found = eqx.filter_jit(lambda model, *texts: model(*texts))(
        model, jnp.asarray(wrong), jnp.asarray(SECOND)
    )
    assert_allclose(found[0], logits[0], **TOL["float32", "law"])
    assert np.isnan(found[1]).all()


def test_program__of_more_layers__is_no_longer():
    def size(n):
        config = T5Config(**SMALL | {"n_layers": n, "n_decoder_layers": n})
        shapes = jax.eval_shape(lambda: drawn(config))
        return str(jax.make_jaxpr(lambda model, *texts: model(*texts))(shapes, TOKENS, SECOND)).count("\n")

    assert size(2) == size(7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(TOKENS), ArgumentError, "reads two texts, and `decoder_tokens` is missing"),
        (lambda m: m(TOKENS, SECOND[:1]), ShapeError, r"tokens have shape \(1, 4\), and .* batch axes \(2,\)"),
        (lambda m: m(TOKENS, [[11], [0]]), TokenError, "Token id 11 is out of range"),
        (lambda m: m([[12], [0]], SECOND), TokenError, "Token id 12 is out of range"),
        (lambda m: m(TOKENS, SECOND, mask=jnp.ones((2, 4), bool)), ShapeError, "`mask` has shape"),
        (lambda m: m.encoder_alone()(TOKENS, SECOND), ArgumentError, "is an encoder alone .* leave them out"),
        (lambda m: m.encoder_alone().decode(jnp.ones((2, 5, 8)), SECOND), ArgumentError, "is an encoder alone"),
        (lambda m: m.decode(jnp.ones((2, 5, 8)), SECOND, mask=jnp.ones((2, 4), bool)), ShapeError, "`mask` has shape"),
        (lambda m: m.shift_right(np.ones((2, 3))), TokenError, "`labels` must be integer ids"),
        (hash, JitError, "A model cannot be hashed"),
    ],
)  # fmt: skip
def test_call__of_what_cannot_be__is_refused(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "`n_layers` = 0 must be a whole number"),
        ({"n_decoder_layers": -1}, "`n_decoder_layers` = -1 must be a whole number"),
        ({"n_heads": 3}, "`d_model` = 8 is no multiple of `n_heads` = 3"),
        ({"n_buckets": 7}, "`n_buckets` = 7 must be even and at least 4"),
        ({"max_distance": 16}, "`max_distance` = 16 must be more than 16"),
        ({"n_decoder_layers": 0, "max_distance": 8}, "`max_distance` = 8 must be more than 8"),
        ({"max_distance": 2**30}, "`max_distance` = 1073741824 must be a whole number from 1 to"),
        ({"norm": "layer"}, "`norm` = 'layer' is not one of 'rms'"),
        ({"norm_eps": 0.0}, "`norm_eps` = 0.0 must be a positive"),
        ({"norm_offset": 1.0}, "`norm_offset` = 1.0: T5 has only 0.0"),
        ({"activation": "mish"}, "`activation` = 'mish' is not one of"),
        ({"tied": 1}, "`tied` = 1 must be True or False"),
        ({"n_decoder_layers": 0, "tied": False}, "`tied` = False is an unembedding"),
        ({"start_token": 11}, "`start_token` = 11 is no token: the model has 11"),
        ({"d_vocab": 2**30, "d_model": 2**20}, "parameters is refused"),
    ],
)
def test_config__of_what_cannot_be__is_refused(changes, message):
    with pytest.raises(ArgumentError, match=message):
        T5Config(**SMALL | changes)


def test_shift_right__of_labels__begins_with_the_start_token():
    shapes = jax.eval_shape(lambda: drawn(T5Config(**SMALL, start_token=4)))
    np.testing.assert_array_equal(
        shapes.shift_right(np.array([[3, 5, -100], [1, 2, 3]])), [[4, 3, 5], [4, 1, 2]]
    )
    np.testing.assert_array_equal(shapes.shift_right(np.array([3, -100, 5])), [4, 3, 4])


def test_activations__of_an_encoder_decoder__are_the_encoders(model):
    options = {"layer": 1, "batch": 5, "buffer": 10, "key": jax.random.key(0)}
    rows = np.concatenate(list(activations(model, [TOKENS], "encoder.resid_post", **options)))
    right = mj.capture(model.encoder_alone(), ["encoder.resid_post"])(TOKENS)[1]["encoder.resid_post"][
        1
    ].reshape(10, 8)
    order = lambda x: np.asarray(x)[np.argsort(np.asarray(x)[:, 0])]
    assert_allclose(order(rows), order(right), **TOL["float32", "layout"])
    with pytest.raises(SiteError, match="no site `resid_post`"):
        activations(model, [TOKENS], "resid_post", **options)


def test_plan__of_a_config__counts_its_parameters_and_both_stacks_sites():
    config = T5Config(**SMALL)
    found = mj.plan(config, (2, 6), capture=["cross_pattern"])
    assert found.n_params == config.n_params
    assert {"encoder.resid_post", "resid_cross"} <= {site.name for site in found.sites}
    assert found.captured[0].shape == (3, 2, 2, 6, 6)
    dry = mj.dry_run(mj.run, drawn(config), TOKENS, SECOND)
    assert dry.n_params == config.n_params and isinstance(drawn(config), T5)
