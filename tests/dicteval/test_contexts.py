"""Contexts of latents: against a plain search over all tokens, on texts padded anywhere, with ties."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.dicteval.contexts import contexts
from mechjax.dicteval.decoder_lens import decoder_lens
from mechjax.dicteval.neighbours import neighbours
from mechjax.dictionaries import Crosscoder, Normalized, ReLU, TopK
from tests.tolerances import TOL

D, F, LAYER = 16, 12, 1
N, SAMPLED, BINS, BEFORE, AFTER = 7, 4, 6, 3, 2
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def dictionary(tiny_model, texts):
    """Latents that are active at a third of tokens; the last one never is."""
    fresh = ReLU.init(d_model=D, n_features=F, key=KEY)
    z = [fresh.preactivations(x) for x in stream(tiny_model, texts)]
    bias = -jnp.quantile(jnp.concatenate(z).reshape(-1, F), 2 / 3, axis=0)
    return eqx.tree_at(lambda d: d.b_enc, fresh, bias.at[-1].set(-1e3))


def stream(model, texts):
    """What the dictionary reads of each batch."""
    get = mj.capture(model, ["resid_post"], layers=LAYER)
    return [get(p.tokens, mask=p.mask)[1]["resid_post"][0] for p in texts]


@pytest.fixture(scope="module")
def texts():
    """Three batches, padded at the right, at the left and in the middle; the last repeats the first, so all is tied."""
    ids = jax.random.randint(jax.random.key(2), (2, 4, 9), 0, 50)
    right = jnp.arange(9) < jnp.array([9, 4, 1, 7])[:, None]
    left = jnp.arange(9) >= jnp.array([0, 5, 8, 2])[:, None]
    middle = left.at[0, 3:6].set(False)
    return [mj.Prompts(ids[0], right), mj.Prompts(ids[1], middle), mj.Prompts(ids[0], right)]


@pytest.fixture(scope="module")
def activations(tiny_model, dictionary, texts):
    """Every latent at every token."""
    return np.concatenate([np.asarray(dictionary.encode(x)) for x in stream(tiny_model, texts)])


@pytest.fixture(scope="module")
def found(tiny_model, dictionary, texts):
    return contexts(
        tiny_model, texts, dictionary, layer=LAYER, n=N, sampled=SAMPLED, bins=BINS, before=BEFORE, after=AFTER,
        promoted=5,
    )  # fmt: skip


def searched(f, texts, skip_first=False):
    """All tokens that count, in order: of which text, where, and the latent's activation there."""
    mask = np.concatenate([p.mask for p in texts])
    places = []
    for text, row in enumerate(mask):
        real = list(np.flatnonzero(row))[1 if skip_first else 0 :]
        places += [(text, pos, real) for pos in real]
    return places, np.array([f[text, pos] for text, pos, _ in places])


def context(place, f, texts):
    """The tokens around one, and the latent at each, by hand."""
    ids = np.concatenate([p.tokens for p in texts])
    text, pos, real = place
    at = real.index(pos)
    around = [real[i] if 0 <= i < len(real) else None for i in range(at - BEFORE, at + AFTER + 1)]
    return [-1 if p is None else ids[text, p] for p in around], [
        0.0 if p is None else f[text, p] for p in around
    ]


def check(examples, latent, chosen, f, texts, places):
    """One latent's examples are the chosen tokens."""
    expected = [places[i] if i is not None else None for i in chosen]
    got = list(zip(*(np.asarray(x)[latent].tolist() for x in (examples.text, examples.pos)), strict=True))
    assert got == [(-1, -1) if p is None else (p[0], p[1]) for p in expected]
    for j, place in enumerate(expected):
        ids, values = ([-1] * 6, [0.0] * 6) if place is None else context(place, f, texts)
        assert np.asarray(examples.tokens)[latent, j].tolist() == ids
        np.testing.assert_allclose(examples.activations[latent, j], values, **TOL["float32", "layout"])
        np.testing.assert_allclose(examples.activation[latent, j], values[BEFORE], **TOL["float32", "layout"])


def strongest(values):
    """Places of the largest, the earlier first where equal, and None where there are fewer."""
    order = [int(i) for i in np.argsort(-values, kind="stable")[:N] if values[i] > 0]
    return order + [None] * (N - len(order))


def nearest(values):
    """Of each part of the range, from the highest down, the place nearest its middle."""
    out = []
    for part in reversed(range(SAMPLED)):
        low, high = (np.float64(values.max()) * x / SAMPLED for x in (part, part + 1))
        inside = [i for i, v in enumerate(values) if v > 0 and low < v <= high]
        out.append(min(inside, key=lambda i: (abs(values[i] - (low + high) / 2), i)) if inside else None)
    return out


def test_contexts__of_every_latent__are_those_of_a_plain_search(found, activations, texts):
    for latent in range(F):
        f = activations[..., latent]
        places, values = searched(f, texts)
        check(found.strongest, latent, strongest(values), f, texts, places)
        check(found.sample, latent, nearest(values), f, texts, places)
        active = values[values > 0]
        np.testing.assert_allclose(found.density[latent], len(active) / len(values), **TOL["float32", "law"])
        np.testing.assert_allclose(found.largest[latent], values.max(), **TOL["float32", "layout"])
        np.testing.assert_allclose(
            found.mean[latent], active.mean() if len(active) else 0, **TOL["float32", "layout"]
        )
        expected = np.histogram(active, BINS, (0, max(values.max(), 1e-9)))[0]
        assert np.asarray(found.histogram)[latent].tolist() == expected.tolist()
    assert int(found.tokens) == sum(int(p.mask.sum()) for p in texts)
    assert 0.05 < float(found.density[:-1].mean()) < 0.6 and float(found.density[-1]) == 0


def test_contexts__where_texts_repeat__take_the_earlier_one(found):
    text = np.asarray(found.strongest.text)
    tied = [row for row in text if {0, 1, 2, 3} & set(row) and {8, 9, 10, 11} & set(row)]
    assert tied, "there are ties"
    for row, values in zip(text, np.asarray(found.strongest.activation), strict=True):
        for a, b, x, y in zip(row, row[1:], values, values[1:], strict=False):
            assert x != y or a < b or b == -1


def test_contexts__with_first_tokens_left_out__hold_none_of_them(tiny_model, dictionary, texts, activations):
    few = contexts(
        tiny_model, texts, dictionary, layer=LAYER, latents=[4, 0], n=N, sampled=SAMPLED, bins=BINS, before=BEFORE,
        after=AFTER, skip_first=True,
    )  # fmt: skip
    assert few.latents.tolist() == [4, 0] and few.axis_labels()["feature"] == ("4", "0")
    assert few.n_features == F and few.near.nearest.shape == (2, 6)
    for row, latent in enumerate((4, 0)):
        f = activations[..., latent]
        places, values = searched(f, texts, skip_first=True)
        check(few.strongest, row, strongest(values), f, texts, places)
        check(few.sample, row, nearest(values), f, texts, places)
    assert int(few.tokens) == sum(int(p.mask.sum()) - len(p.tokens) for p in texts)


def test_contexts__of_padded_texts__hold_no_padding(found, texts):
    """The control: what stands at padding would be among the strongest."""
    ids, mask = (np.concatenate([getattr(p, name) for p in texts]) for name in ("tokens", "mask"))
    for examples in (found.strongest, found.sample):
        text, pos = (np.asarray(x).ravel() for x in (examples.text, examples.pos))
        there = text >= 0
        assert mask[text[there], pos[there]].all()
        own = np.asarray(examples.tokens)[..., BEFORE].ravel()
        assert (own[there] == ids[text[there], pos[there]]).all() and (own[~there] == -1).all()


def test_contexts__more_than_a_batch_has__are_filled_up_from_others(tiny_model, dictionary):
    one = [jax.random.randint(jax.random.key(i), (1, 3), 0, 50) for i in range(3)]
    found = contexts(tiny_model, one, dictionary, layer=LAYER, latents=[2], n=12, before=0, after=0)
    there = np.asarray(found.strongest.text)[0] >= 0
    assert there.sum() == round(float(found.density[0]) * 9) and not there[9:].any()
    assert found.strongest.tokens.shape == (1, 12, 1)


def test_contexts__saved_and_restored__are_the_same(found, tmp_path):
    mj.save(found, tmp_path / "contexts")
    assert eqx.tree_equal(mj.restore(tmp_path / "contexts"), found)


def test_decoder_lens__adds_what_the_unembedding_reads(tiny_model, dictionary, found):
    """A small step along the row, with the norm's scale as it was, moves the logits by what is said."""
    x = np.asarray(
        mj.capture(tiny_model, ["resid_post"])(jnp.arange(5)[None])[1]["resid_post"][-1, 0, 2], np.float64
    )
    w, b = (np.asarray(v, np.float64) for v in (tiny_model.ln_final.w, tiny_model.ln_final.b))
    W_U = np.asarray(tiny_model.W_E.T if tiny_model.W_U is None else tiny_model.W_U, np.float64)
    scale = np.sqrt(np.square(x - x.mean()).mean() + tiny_model.config.norm_eps)
    logits = lambda y: ((y - y.mean()) / scale * w + b) @ W_U
    lens = found.lens
    for latent in (0, 7):
        row = np.asarray(dictionary.W_dec[latent], np.float64)
        moved = (logits(x + row) - logits(x)) * scale
        np.testing.assert_allclose(
            lens.promoted[latent], np.sort(moved)[::-1][:5], **TOL["float32", "attribution"]
        )
        np.testing.assert_allclose(
            lens.suppressed[latent], np.sort(moved)[:5], **TOL["float32", "attribution"]
        )
        assert lens.promoted_tokens[latent].tolist() == np.argsort(-moved)[:5].tolist()
        assert lens.suppressed_tokens[latent].tolist() == np.argsort(moved)[:5].tolist()


def test_neighbours__of_rows__are_the_nearest_by_cosine(dictionary):
    found = neighbours(dictionary, latents=[3, 11], n=20)
    rows = np.asarray(dictionary.W_dec, np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for row, latent in enumerate((3, 11)):
        cosines = unit @ unit[latent]
        order = [i for i in np.argsort(-cosines) if i != latent]
        assert found.nearest[row].tolist() == order
        np.testing.assert_allclose(found.cosine[row], cosines[order], **TOL["float32", "law"])


def test_contexts__of_other_sites__have_no_lens_unless_they_write_to_the_stream(tiny_model):
    ids = [jnp.arange(6)[None]]
    made = ReLU.init(d_model=D, n_features=F, key=KEY)  # 4 heads of 4
    get = lambda **o: contexts(tiny_model, ids, made, layer=LAYER, latents=[0], n=1, before=1, after=1, **o)
    assert get(site="z").lens is None
    assert get(site="ln2.normalized").lens is None
    assert get(site="ln2.normalized", written="mlp_out").lens.promoted.shape == (1, 10)


def test_contexts__of_normalised_tokens__are_those_of_the_dictionary_within(tiny_model):
    inner = TopK.init(d_model=D, n_features=F, k=2, key=KEY)
    ids = [jnp.arange(6)[None]]
    found = contexts(tiny_model, ids, Normalized(inner, "layer_norm"), layer=LAYER, n=6, before=1, after=1)
    assert round(float(found.density.sum()) * 6) <= 12
    np.testing.assert_array_equal(found.lens.promoted, decoder_lens(tiny_model, inner).promoted)


def test_contexts__of_what_cannot_be__say_what_can(tiny_model, dictionary, texts, as_a_user):
    get = lambda d=dictionary, p=texts, **o: contexts(tiny_model, p, d, layer=LAYER, **o)
    with pytest.raises(ArgumentError, match="`prompts` holds no batch"):
        get(p=[])
    with pytest.raises(ArgumentError, match="n=0: it must be 1 or more"):
        get(n=0)
    with pytest.raises(ArgumentError, match="latents has 12; this dictionary has 12 latents, 0 to 11"):
        get(latents=[3, 12])
    with pytest.raises(ArgumentError, match=r"latents=\[\]: a list of one or more"):
        get(latents=[])
    with pytest.raises(ShapeError, match="reads vectors of length 5"):
        get(ReLU.init(d_model=5, n_features=F, key=KEY))
    with pytest.raises(ArgumentError, match="this Crosscoder has no one row of the decoder"):
        get(Crosscoder.init(d_model=D, n_sites=2, n_features=F, key=KEY))
    with pytest.raises(ArgumentError, match=r"stacked\. Take one"):
        get(jax.tree.map(lambda x: x[None], dictionary))
    broken = eqx.tree_at(lambda d: d.b_enc, dictionary, dictionary.b_enc.at[0].set(jnp.inf))
    with pytest.raises(ArgumentError, match="21 activations of latents are not finite, in texts 0 to 3"):
        get(broken)
    with pytest.raises(ShapeError, match="writes vectors of length 5, and the model's stream has 16"):
        decoder_lens(tiny_model, ReLU.init(d_model=5, n_features=F, key=KEY))
