"""What a head moves to a latent, part by part, against runs in which that head alone answers to a removal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.attribution import feature_attribution, head_attribution
from mechjax.attribution.latent_parts import PARTS
from mechjax.base.errors import ArgumentError, ShapeError, UnsupportedModelError
from tests.attribution.transcoded import KINDS, LLAMA, MLA, F, Held, bare, case
from tests.compilations import nothing_compiles
from tests.tolerances import TOL

LAYER, FEATURE, HEAD = 2, 4, (1, 2)
SWEEP, DOUBLE = TOL["float32", "sweep"], TOL["float64", "gradient"]
NAMES = [pytest.param(n, marks=() if n == "gpt2" else pytest.mark.slow) for n in KINDS if "latent" not in n]


@pytest.fixture(scope="module", autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", params=NAMES)
def given(request, small):
    """(case, its run, what the head moves)."""
    made = case(request.param, small)
    found = head_attribution(
        made.model, made.transcoders, made.prompts, layer=LAYER, feature=FEATURE, head=HEAD
    )
    return made, Held.of(made), found


def test_parts__of_each_source__sum_to_what_the_head_adds_from_it(given):
    made, _, found = given
    tight = DOUBLE if found.total.dtype == np.float64 else SWEEP
    whole = feature_attribution(made.model, made.transcoders, made.prompts, layer=LAYER, feature=FEATURE)
    np.testing.assert_allclose(found.total, whole.heads[:, *HEAD], **tight)
    np.testing.assert_allclose(found.sum, found.total, **tight)
    assert found.sum.shape == (3, 6) and np.abs(found.total).max() > 0.01
    product = found.activations * found.connections * np.asarray(found.gain)[..., None, None]
    np.testing.assert_allclose(found.latents, product, **SWEEP)


def test_parts__each__are_what_the_head_no_longer_moves_without_it(given):
    made, held, found = given
    tight = DOUBLE if found.total.dtype == np.float64 else SWEEP
    source = 3
    here = (np.arange(6) == source)[:, None]

    def lost(site, layer, vectors):
        changed = held.without(site, layer, jnp.where(here, vectors, 0))
        return held.loss_through(HEAD, LAYER, FEATURE, made.last, **changed)

    f, tcs, d = made.encode(held.read), made.transcoders, made.transcoders.stack
    for row, layer in enumerate(tcs.layers):
        if layer >= HEAD[0]:
            assert not found.latents[:, :, row].any() and not found.skips[:, :, row].any()
            continue
        for i in range(F):
            write = f[layer][..., i : i + 1] * made.decoder(layer, layer)[i]
            np.testing.assert_allclose(
                found.latents[:, source, row, i], lost("mlp_out", layer, write), **tight
            )
        error = held.acts["mlp_out"][layer] - made.made(held.read)[layer]
        np.testing.assert_allclose(found.errors[:, source, layer], lost("mlp_out", layer, error), **tight)
        bias = np.broadcast_to(d.b_dec[row], error.shape)
        np.testing.assert_allclose(
            found.decoder_biases[:, source, layer], lost("mlp_out", layer, bias), **tight
        )
    for name in ("embed", "pos_embed"):
        if name in held.acts:
            expected = lost(name, None, held.acts[name])
            np.testing.assert_allclose(getattr(found, name)[:, source], expected, **tight)
    write = held.head_write(0, 1, 2)
    np.testing.assert_allclose(found.heads[:, source, 0, 1, 2], lost("attn_out", 0, write), **tight)
    assert not found.heads[:, :, 1:].any()
    assert np.abs(found.latents[:, source]).max() > 1e-3 and np.abs(found.heads[:, source]).max() > 1e-3


@pytest.fixture(scope="module")
def plain(small):
    return case("gpt2", small)


def test_sources_heads_and_latents__others__compile_nothing(plain, caplog):
    ask = lambda feature, head, sources: head_attribution(
        plain.model, plain.transcoders, plain.prompts, layer=2, feature=feature, head=head, sources=sources
    )
    some = ask(4, HEAD, [1, 3])
    with nothing_compiles(caplog):
        others, first = ask(3, (2, 1), [1, 3]), ask(4, HEAD, [0, 5])
    whole = head_attribution(plain.model, plain.transcoders, plain.prompts, layer=2, feature=4, head=HEAD)
    for name in PARTS:
        x = np.asarray(getattr(whole, name))
        np.testing.assert_allclose(getattr(some, name), x[:, [1, 3]], **DOUBLE)
        np.testing.assert_allclose(getattr(first, name), x[:, [0, 5]], **DOUBLE)
    assert others.latents[:, :, 1].any()  # a head of layer 2 moves latents of layer 1 too
    labels = {name for name, _ in whole.top(10**4)}
    assert {"example 0: t0[1] @ 5 -> L1.H2 -> t2[4] @ 5", "example 2: t0[1] @ 0 -> L1.H2 -> t2[4] @ 3",
            "example 0: L0.H3 @ 1 -> L1.H2 @ 4 -> t2[4] @ 5"} <= labels  # fmt: skip


def test_head_attribution__bad_input__is_explained(plain, small, as_a_user):
    ask = lambda head, model=plain.model, layer=2, **more: head_attribution(
        model, plain.transcoders, plain.prompts, layer=layer, feature=4, head=head, **more
    )
    with pytest.raises(
        ArgumentError, match=r"head=3: a head is named by its layer and its number, such as \(3, 1\)"
    ):
        ask(3)
    with pytest.raises(ArgumentError, match=r"head=\(1, 4\): head 4 is not there; there are 4, 0 to 3"):
        ask((1, 4))
    with pytest.raises(ArgumentError, match=r"head=\(2, 0\) writes after what latents of layer 1 read"):
        ask((2, 0), layer=1)
    with pytest.raises(ArgumentError, match="sources= names columns that are not there: prompts have 6"):
        ask(HEAD, sources=[6])
    with pytest.raises(ShapeError, match=r"sources= has shape \(\)"):
        ask(HEAD, sources=3)
    latent = bare(
        small, **LLAMA | {"latent": MLA, "n_kv_heads": 4, "d_head": 5, "rotary_dim": 2, "n_layers": 3}
    )
    with pytest.raises(UnsupportedModelError, match="latent attention, whose values come through a norm"):
        ask(HEAD, model=latent)
    with pytest.raises(UnsupportedModelError, match=r"values that are clipped at 2\.0, which are not linear"):
        ask(HEAD, model=bare(small, qkv_clip=2.0, n_layers=3))
