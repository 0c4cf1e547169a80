"""Parts of a latent against runs from which each is removed, all else held, and against their sum."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.attribution import feature_attribution
from mechjax.attribution.latent_parts import PARTS
from mechjax.base.errors import ArgumentError, NeedsDecoderError, ShapeError, UnsupportedModelError
from mechjax.dictionaries import MatchingPursuit, Normalized, Switch, TopK
from tests.attribution.transcoded import KINDS, F, Held, bare, case, cross_layer, per_layer
from tests.compilations import nothing_compiles
from tests.tolerances import TOL

LAYER, FEATURE = 2, 4
QUICK = ("gpt2", "llama")
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in KINDS]
SWEEP = TOL["float32", "sweep"]


@pytest.fixture(scope="module", autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def close(dtype):
    return TOL["float64", "gradient"] if dtype == np.float64 else SWEEP


@pytest.fixture(scope="module", params=NAMES)
def given(request, small):
    """(case, its run, its parts)."""
    made = case(request.param, small)
    found = feature_attribution(made.model, made.transcoders, made.prompts, layer=LAYER, feature=FEATURE)
    return made, Held.of(made), found


def test_parts__of_a_latent__sum_to_what_its_encoder_gives(given):
    made, held, found = given
    W, b = made.encoder(LAYER, FEATURE)
    rows = np.arange(3)
    expected = np.asarray(held.read[LAYER])[rows, made.last] @ W + b
    tight = close(found.total.dtype)
    np.testing.assert_allclose(found.total, expected, **tight)
    np.testing.assert_allclose(found.sum, expected, **tight)
    f = made.encode(held.read)[LAYER][rows, made.last, FEATURE]
    np.testing.assert_allclose(found.activation, f, **tight)
    assert np.abs(found.gap).max() < 1e-5
    assert np.abs(expected).min() > 1e-3


def test_latents_errors_skips_and_biases__each__are_what_is_lost_without_it(given):
    made, held, found = given
    tight = close(found.total.dtype)
    lost = lambda to, x: held.loss(LAYER, FEATURE, made.last, **held.without("mlp_out", to, x))
    f, tcs, d = made.encode(held.read), made.transcoders, made.transcoders.stack
    for to in range(3):
        before, row = to < LAYER, tcs.layers.index(to) if to in tcs.layers else None
        error = held.acts["mlp_out"][to] - (made.made(held.read)[to] if row is not None else 0)
        np.testing.assert_allclose(found.errors[:, to], before * lost(to, error), **tight)
        if row is None:
            assert not found.decoder_biases[:, to].any()
            continue
        np.testing.assert_allclose(found.decoder_biases[:, to], before * lost(to, d.b_dec[row]), **tight)
        if d.W_skip is not None:
            skip = held.read[to] @ d.W_skip[row]
            np.testing.assert_allclose(found.skips[:, row], before * lost(to, skip), **tight)
    for row, layer in enumerate(tcs.layers):
        for i in range(F):
            expected = np.zeros(3)
            for to in range(layer, LAYER):
                if (W_dec := made.decoder(layer, to)) is not None:
                    expected = expected + lost(to, f[layer][..., i : i + 1] * W_dec[i])
            np.testing.assert_allclose(found.latents[:, row, i], expected, **tight)
    assert np.abs(found.latents).max() > 0.01 and np.abs(found.errors).max() > 0.01
    assert np.abs(found.decoder_biases).max() > 1e-3  # so that a sum without them would be off


def test_heads_and_embeddings__each__are_what_is_lost_without_it(given):
    made, held, found = given
    tight, config = close(found.total.dtype), made.model.config
    n_attn = LAYER + (config.residual == "serial")
    for layer, head, source in ((0, 1, 2), (1, 2, 3), (1, 0, 0), (2, 3, 2), (0, 3, 5)):
        write = held.head_write(layer, head, source)
        expected = held.loss(LAYER, FEATURE, made.last, **held.without("attn_out", layer, write))
        np.testing.assert_allclose(found.heads[:, layer, head, source], expected * (layer < n_attn), **tight)
    assert np.abs(found.heads).max() > 0.01
    for name in ("embed", "pos_embed"):
        if name not in held.acts:
            assert not getattr(found, name).any()
            continue
        expected = held.loss(LAYER, FEATURE, made.last, **held.without(name, None, held.acts[name]))
        np.testing.assert_allclose(getattr(found, name), expected, **tight)
    for layer in range(n_attn):  # what heads do not move is bias
        own = found.heads[:, layer].sum((1, 2)) + found.head_biases[:, layer]
        whole = held.without("attn_out", layer, held.acts["attn_out"][layer])
        np.testing.assert_allclose(own, held.loss(LAYER, FEATURE, made.last, **whole), **tight)


def test_activations_connections_and_gain__multiplied__are_the_latents(given):
    made, held, found = given
    product = found.activations * found.connections * found.gain[:, None, None]
    np.testing.assert_allclose(found.latents, product, **SWEEP)
    whole = mj.attribution.transcoder_connections(made.model, made.transcoders, layer=LAYER, feature=FEATURE)
    before = ~np.isnan(whole.connections)
    np.testing.assert_allclose(
        np.asarray(found.connections)[before], np.asarray(whole.connections)[before], **SWEEP
    )
    scale = 1 if held.scale is None else held.acts[held.scale][LAYER, np.arange(3), made.last, 0]
    np.testing.assert_allclose(found.gain, 1 / scale, **SWEEP)


@pytest.fixture(scope="module")
def plain(small):
    return case("gpt2", small)


def test_embedding__of_a_naive_norm__is_another(plain):
    # The authors' code divides (v . norm(x)) by (v . x); without its centring a part holds the stream's mean.
    found = feature_attribution(plain.model, plain.given, plain.prompts, layer=LAYER, feature=FEATURE)
    acts = mj.capture(plain.model, ["embed", "resid_mid", "ln2.normalized", "ln2.scale"])(plain.prompts)[1]
    place = (np.arange(3), plain.last)
    W, _ = plain.encoder(LAYER, FEATURE)
    embed, stream = np.asarray(acts["embed"])[place], np.asarray(acts["resid_mid"][LAYER])[place]
    ratio = np.asarray(acts["ln2.normalized"][LAYER])[place] @ W / (stream @ W)
    uncentred = (
        embed @ (W * np.asarray(plain.model.blocks.ln2.w[LAYER])) / acts["ln2.scale"][LAYER][place][:, 0]
    )
    for naive in (embed @ W * ratio, uncentred):
        assert np.abs(naive / found.embed - 1).max() > 0.05


@pytest.mark.slow
def test_parts__of_a_model_in_bfloat16__sum_to_its_precision(plain):
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, (plain.model, plain.given)
    )
    found = feature_attribution(*half, plain.prompts, layer=LAYER, feature=FEATURE)
    assert found.latents.dtype == np.float32
    np.testing.assert_allclose(found.sum, found.total, **TOL["bfloat16", "parity"])


def test_prompts__padded_or_in_another_order__change_no_part(plain):
    ask = lambda prompts, **more: feature_attribution(
        plain.model, plain.transcoders, prompts, layer=LAYER, feature=FEATURE, **more
    )
    whole, order = ask(plain.prompts), np.array([2, 0, 1])
    turned = ask(mj.Prompts(plain.prompts.tokens[order], plain.prompts.mask[order]))
    columns = ask(plain.prompts, pos=plain.last)
    alone = ask(plain.ids[1, 2:])
    for name in PARTS:
        x = np.asarray(getattr(whole, name))
        np.testing.assert_allclose(getattr(turned, name), x[order], **TOL["float64", "gradient"])
        np.testing.assert_array_equal(getattr(columns, name), x)
        own = x[1][..., 2:] if name == "heads" else x[1]
        np.testing.assert_allclose(getattr(alone, name)[0], own, **TOL["float64", "gradient"])
    assert not whole.heads[1, ..., :2].any() and whole.at[1] == 5
    assert "t0[1] @ 3 -> t2[4] @ 3" in [name for name, _ in alone.top(400)]


def test_other_latents_and_positions__compile_nothing_and_map(plain, caplog):
    ask = lambda layer, feature, pos=-1: feature_attribution(
        plain.model, plain.transcoders, plain.prompts, layer=layer, feature=feature, pos=pos
    )
    first = ask(2, 4)
    with nothing_compiles(caplog):
        earlier, other, before = ask(1, 4), ask(2, 3), ask(2, 4, -2)
    assert not earlier.latents[:, 1:].any() and earlier.latents[:, 0].any()
    assert not ask(0, 1).latents.any() and ask(0, 1).heads[:, 0].any()
    for changed in (earlier, other, before):
        assert np.abs(changed.total - first.total).max() > 1e-3
    many = jax.vmap(lambda feature: ask(2, feature).embed)(jnp.arange(3, 5))
    np.testing.assert_allclose(many, [other.embed, first.embed], **TOL["float64", "gradient"])
    lost = jax.jit(lambda layer, pos: ask(layer, 4, pos).sum)
    assert (
        np.isnan(lost(jnp.int32(3), jnp.int32(1))).all() and np.isnan(lost(jnp.int32(2), jnp.int32(6))).all()
    )


def test_feature_attribution__shown__names_its_parts(given, tmp_path):
    made, _, found = given
    if made.model.config.residual != "serial":
        return
    labels = {name for name, _ in found.top(10**4)}
    expected = {
        "t0[1] @ 5 -> t2[4] @ 5",
        "L1.H2 @ 3 -> t2[4] @ 5",
        "b_O 2 @ 5 -> t2[4] @ 5",
        "embed @ 5 -> t2[4] @ 5",
    }
    expected |= {"error 1 @ 5 -> t2[4] @ 5"} if 1 in found.layers else {"mlp 1 @ 5 -> t2[4] @ 5"}
    assert {f"example 0: {name}" for name in expected} <= labels
    assert "example 2: t0[1] @ 3 -> t2[4] @ 3" in labels
    values = [abs(value) for _, value in found.top(5)]
    assert values == sorted(values, reverse=True) and values[0] > 0
    np.testing.assert_allclose(sum(row["value"] for row in found.rows()), found.total.sum(), **SWEEP)
    assert found.top(1)[0][0].replace(">", "&gt;") in found._repr_html_()
    assert mj.restore(mj.save(found, tmp_path / "record")).top(3) == found.top(3)


def test_feature_attribution__bad_input__is_explained(plain, small, as_a_user):
    ask = lambda model=plain.model, tcs=plain.transcoders, prompts=plain.prompts, layer=2, feature=4, **more: (
        feature_attribution(model, tcs, prompts, layer=layer, feature=feature, **more)
    )
    with pytest.raises(ArgumentError, match=r"layer=1: there is no transcoder of that layer; .* layers 0, 2"):
        ask(tcs={0: plain.given[0], 2: plain.given[2]}, layer=1)
    with pytest.raises(ArgumentError, match="feature=6: these transcoders have 6 latents, 0 to 5"):
        ask(feature=6)
    with pytest.raises(ShapeError, match="one latent is asked for, by two integers"):
        ask(feature=jnp.arange(2))
    with pytest.raises(ArgumentError, match=r"position 0 of example 1, but column 0 is padding"):
        ask(pos=0)
    with pytest.raises(ArgumentError, match=r"position 9 of example 0, but there are 6 columns"):
        ask(pos=9)
    with pytest.raises(ShapeError, match=r"pos= has shape \(2,\)"):
        ask(pos=np.array([1, 2]))
    with pytest.raises(ArgumentError, match="give at least one, at layers 0 to 2"):
        ask(tcs={})
    with pytest.raises(ArgumentError, match=r"transcoders of layers \[5\]"):
        ask(tcs={5: plain.given[0]})
    with pytest.raises(ArgumentError, match="differ in kind or size"):
        ask(tcs={0: plain.given[0], 1: per_layer(TopK, (1,), np.float64, k=2)[1]})
    key, shapes = jax.random.key(0), eqx.filter_eval_shape
    refused = (
        Normalized(plain.given[0], "layer_norm"),
        shapes(lambda: Switch.init(d_model=8, n_features=8, n_experts=2, k=2, key=key, d_out=8)),
        shapes(lambda: MatchingPursuit.init(d_model=8, n_features=8, k=2, key=key)),
    )
    for other in refused:
        with pytest.raises(ArgumentError, match=f"{type(other).__name__} is none of the transcoders"):
            ask(tcs={2: other})
    clt = cross_layer(np.float64)
    with pytest.raises(ArgumentError, match="of all layers at once: give it as it is"):
        ask(tcs={0: clt})
    with pytest.raises(
        ShapeError, match="in a model of 3 layers; this model's stream has 8, and it has 2 layers"
    ):
        ask(model=bare(small), tcs=clt)
    wide = per_layer(TopK, (2,), np.float64, k=2, d_out=10)
    with pytest.raises(ShapeError, match="read 8 numbers and write 10"):
        ask(tcs=wide)
    with pytest.raises(UnsupportedModelError, match="this model is attention only"):
        ask(model=bare(small, mlp="none"))
    with pytest.raises(NeedsDecoderError, match=r"needs mechjax's own decoder .* and got a Identity"):
        ask(model=eqx.nn.Identity())
    with pytest.raises(ArgumentError, match="reads='mlp_out': transcoders read"):
        mj.attribution.stack_transcoders(plain.model, plain.given, reads="mlp_out")
