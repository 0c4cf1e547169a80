"""Dictionaries inside a model: nothing changes by itself, and latents are sites."""

import equinox as eqx
import jax
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.dictionaries import JumpReLU, TopK
from mechjax.dictionaries.splice import splice
from tests.tolerances import TOL

D, F = 16, 40


def made(seed, kind=TopK, d=D, **options):
    options = options or {"k": 4}
    fresh = kind.init(d_model=d, n_features=F, key=jax.random.key(seed), **options)
    return eqx.tree_at(lambda x: x.b_dec, fresh, 0.1 * jax.random.normal(jax.random.key(seed + 1), (d,)))


@pytest.fixture(scope="module")
def dictionaries():
    return {0: made(2), 2: made(5)}


@pytest.fixture(scope="module")
def spliced(tiny_model, dictionaries):
    return splice(tiny_model, dictionaries)


def test_splice__with_its_error__changes_not_a_bit(tiny_model, tiny_tokens, spliced):
    np.testing.assert_array_equal(spliced(tiny_tokens), tiny_model(tiny_tokens))
    steered = mj.intervene(spliced, [mj.scale("resid_post.latents", 1.0, layer=2)])
    np.testing.assert_array_equal(steered(tiny_tokens), tiny_model(tiny_tokens))


def test_splice__latents_and_errors__are_captured_where_there_are_any(
    tiny_model, tiny_tokens, spliced, dictionaries
):
    _, acts = mj.capture(spliced, ["resid_post.latents", "resid_post.error", "resid_post"])(tiny_tokens)
    _, own = mj.capture(tiny_model, ["resid_post"])(tiny_tokens)
    assert acts.layers["resid_post.latents"] == (0, 2)
    for row, layer in enumerate((0, 2)):
        x, dictionary = own["resid_post"][layer], dictionaries[layer]
        f = dictionary.encode(x)
        np.testing.assert_allclose(acts["resid_post.latents"][row], f, **TOL["float32", "layout"])
        np.testing.assert_allclose(
            acts["resid_post.error"][row], x - dictionary.decode(f), **TOL["float32", "layout"]
        )


def test_splice__an_ablated_latent__is_taken_from_the_stream(tiny_model, tiny_tokens, spliced, dictionaries):
    _, acts = mj.capture(spliced, ["resid_post.latents", "resid_post"])(tiny_tokens)
    f = acts["resid_post.latents"][0]
    latent = int(f.sum((0, 1)).argmax())
    found = mj.intervene(spliced, [mj.zero("resid_post.latents", feature=latent, layer=0)])(tiny_tokens)
    without = acts["resid_post"][0] - f[..., latent, None] * dictionaries[0].W_dec[latent]
    expected = mj.intervene(tiny_model, [mj.replace("resid_post", without, layer=0)])(tiny_tokens)
    np.testing.assert_allclose(found, expected, **TOL["float32", "layout"])
    assert np.abs(found - tiny_model(tiny_tokens)).max() > 1e-3


def test_splice__without_its_error__holds_what_is_made(tiny_model, tiny_tokens, dictionaries):
    found = splice(tiny_model, {1: dictionaries[0]}, error=False)(tiny_tokens)
    x = mj.capture(tiny_model, ["resid_post"])(tiny_tokens)[1]["resid_post"][1]
    expected = mj.intervene(tiny_model, [mj.replace("resid_post", dictionaries[0](x), layer=1)])(tiny_tokens)
    np.testing.assert_allclose(found, expected, **TOL["float32", "layout"])
    lost = mj.intervene(splice(tiny_model, {1: dictionaries[0]}), [mj.zero("resid_post.error", layer=1)])
    np.testing.assert_allclose(lost(tiny_tokens), expected, **TOL["float32", "layout"])


def test_splice__gradients_of_all_layers__come_of_one_backward(
    tiny_model, tiny_tokens, spliced, dictionaries
):
    metric = lambda logits: (logits[..., -1, 3] - logits[..., -1, 5]).sum()
    sites = ["resid_post.latents", "resid_post.error"]
    _, grads = mj.value_and_grad_at(spliced, metric, sites)(tiny_tokens)
    _, own = mj.value_and_grad_at(tiny_model, metric, ["resid_post"])(tiny_tokens)
    for row, layer in enumerate((0, 2)):
        at = own["resid_post"][layer]
        np.testing.assert_allclose(grads["resid_post.error"][row], at, **TOL["float32", "gradient"])
        expected = at @ dictionaries[layer].W_dec.T
        np.testing.assert_allclose(grads["resid_post.latents"][row], expected, **TOL["float32", "gradient"])


def test_splice__of_other_sites_and_kinds__is_the_same(tiny_model, tiny_tokens):
    jump = made(3, JumpReLU, threshold=0.3, bandwidth=0.1)
    found = splice(tiny_model, {1: jump}, site="mlp_out")
    np.testing.assert_array_equal(eqx.filter_jit(found)(tiny_tokens), eqx.filter_jit(tiny_model)(tiny_tokens))
    _, acts = mj.capture(found, ["mlp_out.latents"])(tiny_tokens)
    assert acts["mlp_out.latents"].shape == (1, *tiny_tokens.shape, F)


def test_splice__of_what_does_not_fit__says_what_does(tiny_model, dictionaries):
    with pytest.raises(
        ArgumentError, match=r"dictionaries of layers \[3\]: give at least one, at layers 0 to 2"
    ):
        splice(tiny_model, {3: dictionaries[0]})
    with pytest.raises(ArgumentError, match=r"dictionaries of layers \[\]"):
        splice(tiny_model, {})
    with pytest.raises(ArgumentError, match="differ in kind or size"):
        splice(tiny_model, {0: dictionaries[0], 1: made(1, JumpReLU, threshold=0.3)})
    with pytest.raises(ShapeError, match="read 12 numbers and write 12, and the model's stream has 16"):
        splice(tiny_model, {0: made(1, d=12)})
