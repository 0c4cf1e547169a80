"""Rows of any function: those of torch's hooks, without padding, of either text, of images; and whose a store is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, NeedsDecoderError, SiteError
from mechjax.dictionaries import ReLU, TopK
from mechjax.interop import from_torch
from mechjax.models import T5Config
from mechjax.models.structures import build
from mechjax.transform.digest import program_digest
from tests.interop.pytorch import architectures, hooks, networks, parity
from tests.tolerances import TOL

KEY = jax.random.key(0)
IDS = jnp.array([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
MASK = jnp.array([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
TABLE = jax.random.normal(KEY, (11, 3))


@pytest.fixture(scope="module")
def module():
    return networks.net()


@pytest.fixture(scope="module")
def bridged(module):
    return from_torch(module, networks.tokens(), dynamic=False)


@pytest.fixture(scope="module")
def encoder_decoder():
    config = T5Config(d_vocab=20, d_model=8, n_layers=2, n_heads=4, d_mlp=16, tied=False)
    drawn = lambda i, shape: 0.5 * jax.random.normal(jax.random.fold_in(KEY, i), shape)
    return build(config, {path: drawn(i, shape) for i, (path, shape) in enumerate(config.shapes.items())})


def hooked(module, batches, path):
    """What a submodule gives of each token, by forward hooks."""
    found = [hooks.seen(module, {"tokens": ids})[1][path, 0, "output", ""] for ids in batches]
    return np.concatenate([x.numpy().reshape(-1, x.shape[-1]) for x in found])


def texts(n):
    """Batches of tokens, for torch and for us."""
    made = [(networks.tokens() + i) % networks.VOCAB for i in range(n)]
    return made, [x.numpy().astype(np.int32) for x in made]


def two_texts(input_ids, decoder_input_ids, attention_mask=None, decoder_attention_mask=None):
    """An encoder and a decoder that look each token up."""
    mj.site(TABLE[input_ids], "encoder")
    mj.site(TABLE[input_ids].mean(1), "pooled")
    return mj.site(TABLE[decoder_input_ids], "decoder")


def given(fn, batch, site, **how):
    """The rows of one batch, in a known order."""
    stream = mj.dictlearn.activations(fn, [batch], site, layer=None, batch=1, buffer=64, key=KEY, **how)
    found = np.concatenate(list(stream))
    return found[np.lexsort(found.T)]


def same_rows(found, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected[np.lexsort(expected.T)], **TOL["float32", "law"])


def test_store__of_a_bridged_module__holds_what_hooks_see(module, bridged, tmp_path):
    ours = texts(3)[1]
    store = mj.store.write(tmp_path, bridged, ours, "blocks.mlp.output", layers=[0, 2], shard_rows=10)
    for layer in (0, 2):
        found = store.rows(slice(None), "blocks.mlp.output", layer=layer)
        np.testing.assert_allclose(
            found, hooked(module, texts(3)[0], f"blocks.{layer}.mlp"), **TOL["float32", "parity"]
        )
    for shard in list(tmp_path.rglob("c/1/0")):
        shard.unlink()
    again = from_torch(module, networks.tokens(), dynamic=False)  # exported anew, as another process would
    repaired = mj.store.repair(tmp_path, again, iter(ours))
    assert not mj.store.verify(tmp_path).damaged and repaired.digest == store.digest
    doubled = from_torch(module, networks.tokens(), dynamic=False, double=True)
    with pytest.raises(ArgumentError, match="is another store: `config` is that of checksum"):
        mj.store.repair(tmp_path, doubled, ours)


def test_dictionary__trained_on_a_bridged_modules_rows__explains_more_of_them(bridged):
    stream = mj.dictlearn.activations(
        bridged, texts(30)[1], "blocks.output", layer=1, batch=8, buffer=32, key=KEY
    )
    made = TopK.init(d_model=networks.D, n_features=24, k=3, key=KEY)
    out = mj.dictlearn.train(made, stream, steps=25, learning_rate=2e-2, key=KEY)
    assert out.history["fvu"][-1] < 0.6 * out.history["fvu"][0]


@pytest.mark.parametrize(("site", "length"), [("encoder", 6), ("decoder", 5), ("pooled", 5)])
def test_rows__of_padded_texts__are_of_real_tokens_of_the_text_that_a_site_reads(site, length):
    second = IDS[:, :length]
    batch = {"input_ids": IDS, "decoder_input_ids": second, "attention_mask": MASK}
    ids = {"encoder": IDS[MASK == 1], "decoder": second.reshape(-1)}
    expected = TABLE[IDS].mean(1) if site == "pooled" else TABLE[ids[site]]
    if length == 6:
        with pytest.raises(
            SiteError, match=r"both texts are \(batch, pos\) = \(2, 6\) and are padded at diff"
        ):
            given(two_texts, batch, site)
        batch |= {"decoder_attention_mask": MASK}
    same_rows(given(two_texts, batch, site), expected)


def test_rows__without_first_tokens__leave_each_texts_first_real_one_out():
    batch = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3], "attention_mask": MASK}
    expected = TABLE[jnp.concatenate([IDS[0, 1:4], IDS[1, 2:]])]
    same_rows(given(two_texts, batch, "encoder", skip_first=True), expected)
    with pytest.raises(ArgumentError, match=r"this site has rows \(2,\), not \(batch, pos\)"):
        given(two_texts, batch, "pooled", skip_first=True)


def test_rows__of_padded_texts_whose_places_are_other_ones__are_refused():
    cut = lambda input_ids, attention_mask: mj.site(TABLE[input_ids][:, 1:], "cut")
    with pytest.raises(
        SiteError, match=r"the site has rows \(2, 5\), and padded texts are \(2, 6\), .* one length"
    ):
        given(cut, {"input_ids": IDS, "attention_mask": MASK}, "cut")
    same_rows(given(cut, {"input_ids": IDS, "attention_mask": MASK**0}, "cut"), TABLE[IDS[:, 1:].reshape(-1)])


@pytest.mark.parametrize("channels_last", [False, True])
def test_rows__of_images__are_vectors_at_each_pixel(channels_last):
    images = jax.random.normal(KEY, (2, 3, 4, 5))  # channels first
    axes = ("height", "width", "d_model") if channels_last else ("d_model", "height", "width")
    place = (lambda x: jnp.moveaxis(x, 1, -1)) if channels_last else lambda x: x
    seen = lambda x: mj.site(jnp.sin(place(x)), "seen", axes=axes)
    expected = jnp.moveaxis(jnp.sin(images), 1, -1).reshape(-1, 3)
    same_rows(given(seen, images, "seen"), expected)
    under_vmap = jax.vmap(lambda x: mj.site(jnp.sin(x), "seen", axes=("d_model", "height", "width")))
    same_rows(given(under_vmap, images, "seen"), expected)


def test_contexts__of_images__have_positions_for_tokens():
    images = jax.random.normal(KEY, (2, 3, 4, 5))
    seen = lambda x: mj.site(x, "seen", axes=("d_model", "height", "width"))
    made = ReLU.init(d_model=3, n_features=4, key=KEY)
    found = mj.dicteval.contexts(seen, [images], made, layer=None, site="seen", n=1, before=1, after=0)
    latents = made.encode(jnp.moveaxis(images, 1, -1).reshape(-1, 3))
    best = latents.argmax(0)
    np.testing.assert_allclose(found.strongest.activation[:, 0], latents.max(0), **TOL["float32", "law"])
    np.testing.assert_array_equal(found.strongest.text[:, 0], best // 20)
    np.testing.assert_array_equal(found.strongest.tokens[:, 0, -1], best % 20)
    assert found.lens is None and found.where == "seen"


def test_contexts__of_two_texts_of_one_shape__are_refused():
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    made = ReLU.init(d_model=3, n_features=4, key=KEY)
    with pytest.raises(ArgumentError, match=r"the call has 2 texts of shape \(2, 6\)"):
        mj.dicteval.contexts(two_texts, [batch], made, layer=None, site="encoder")


def test_rows__of_an_edited_decoder__are_those_of_a_capture_of_it(tiny_model):
    edited = mj.intervene(tiny_model, mj.scale("mlp_out", 3.0, layer=0))
    stream = mj.dictlearn.activations(edited, [IDS], "resid_post", layer=0, batch=12, buffer=24, key=KEY)
    expected = mj.capture(edited, "resid_post")(IDS)[1]["resid_post"][0].reshape(12, -1)
    found = np.asarray(next(stream))
    same_rows(found[np.lexsort(found.T)], expected)


def test_store__of_functions__tells_by_what_they_compute_and_close_over(tmp_path):
    def closing(over):
        return lambda x: mj.site(x * over, "h")

    x = jnp.ones((3, 2))
    store = mj.store.write(tmp_path, closing(jnp.arange(2.0)), [x], "h")
    assert mj.store.write(tmp_path, closing(jnp.arange(2.0)), [x], "h").digest == store.digest
    with pytest.raises(ArgumentError, match="is another store: `config`"):
        mj.store.write(tmp_path, closing(jnp.arange(2.0) + 1), [x], "h")
    with pytest.raises(ArgumentError, match="is another store: `config`"):
        mj.store.write(tmp_path, lambda x: mj.site(x + jnp.arange(2.0), "h"), [x], "h")
    with pytest.raises(ArgumentError, match="there is no batch of prompts, and what a function's sites are"):
        mj.store.write(tmp_path, closing(1.0), [], "h")


def test_store__of_a_function_that_calls_back__is_refused(tmp_path):
    def calling(x):
        return mj.site(jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x), "h")

    assert program_digest(calling, jnp.ones((3, 2))) is None
    with pytest.raises(ArgumentError, match="this function calls back into Python"):
        mj.store.write(tmp_path, calling, [jnp.ones((3, 2))], "h")


def test_store__of_sites_with_unlike_rows__is_refused(tmp_path):
    batch = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    with pytest.raises(SiteError, match=r"`encoder` has rows \(2, 6\) and `pooled` has \(2,\)"):
        mj.store.write(tmp_path, two_texts, [batch], ["encoder", "pooled"])


def test_rows__of_what_has_none__say_what_has(tiny_model, as_a_user):
    with pytest.raises(NeedsDecoderError, match=r"this is a str, 'gpt2', .* = mj.load\('gpt2'\)"):
        given("gpt2", IDS, "h")
    with pytest.raises(SiteError, match=r"`h` has the shape \(2,\): a row is what a site has of one example"):
        given(lambda x: mj.site(x.mean(1) * 1.0, "h"), IDS, "h")
    with pytest.raises(SiteError, match=r"`h` has the shape \(2, 6\) and the axes \(d_model, feature\)"):
        given(lambda x: mj.site(TABLE[x][..., 0], "h", axes=("d_model", "feature")), IDS, "h")
    with pytest.raises(SiteError, match="`resid_post` has layers 0, 1, 2: rows are of one of them"):
        given(tiny_model, IDS, "resid_post")


@pytest.mark.parametrize("site", ["encoder.resid_post", "resid_post"])
def test_rows__of_an_encoder_decoder_given_both_texts__are_of_either(encoder_decoder, site):
    first, second = mj.Prompts(IDS, MASK == 1), mj.Prompts(IDS[:, :5], MASK[:, 1:] == 1)
    stream = mj.dictlearn.activations(
        encoder_decoder, [(first, second)], site, layer=1, batch=1, buffer=32, key=KEY
    )
    found = np.concatenate(list(stream))
    acts = mj.capture(encoder_decoder, site)(first, second)[1][site][1]
    real = (first if site.startswith("encoder") else second).mask
    same_rows(found[np.lexsort(found.T)], acts[real])


def classes(images):
    """Logits of classes from what a layer outside any loop gives of each pixel."""
    seen = mj.site(jnp.moveaxis(images, 1, -1), "seen", axes=("height", "width", "d_model"))
    return jnp.tanh(seen).mean((1, 2)) @ TABLE[:3]


def test_loss_recovered__by_a_loss_of_ones_own__equals_runs_by_hand(as_a_user):
    images, labels = jax.random.normal(KEY, (2, 3, 4, 5)), jnp.array([0, 2])
    made = ReLU.init(d_model=3, n_features=4, key=KEY)
    wrong = lambda out, given: -jax.nn.log_softmax(out)[jnp.arange(len(out)), labels]
    get = lambda fn, **how: mj.dicteval.loss_recovered(fn, [images], {None: made}, site="seen", **how)
    found = get(classes, loss=wrong)
    made_of = jnp.moveaxis(made(jnp.moveaxis(images, 1, -1)), -1, 1)
    losses = [wrong(classes(x), None).mean() for x in (images, made_of, jnp.zeros_like(images))]
    np.testing.assert_allclose(
        [found.ce, found.ce_spliced, found.ce_ablated], losses, **TOL["float32", "law"]
    )
    np.testing.assert_allclose(
        found.ce_recovered, (losses[2] - losses[1]) / (losses[2] - losses[0]), rtol=1e-4
    )
    assert np.isnan(found.kl_spliced) and np.isnan(found.kl_recovered) and int(found.tokens) == 2
    with pytest.raises(ArgumentError, match=r"the call has no text, .* could be predicted: give `loss`"):
        get(classes)
    with pytest.raises(ArgumentError, match=r"the loss gives float32\[2, 3\]: a function of the output"):
        get(classes, loss=lambda out, given: out)


def test_loss_recovered__of_what_predicts_no_next_tokens__asks_for_a_loss(as_a_user):
    labelled = lambda ids: mj.site(TABLE[ids], "h").mean(1)
    made = {None: ReLU.init(d_model=3, n_features=4, key=KEY)}
    with pytest.raises(
        ArgumentError, match=r"logits of shape \(2, 3\) and the text is \(2, 6\), so they predict"
    ):
        mj.dicteval.loss_recovered(labelled, [IDS], made, site="h")
    encoder = build(
        config := mj.models.EncoderConfig(d_vocab=20, n_ctx=8, d_model=8, n_layers=2, n_heads=4, d_mlp=16),
        {path: jnp.zeros(shape) for path, shape in config.shapes.items()},
    )
    with pytest.raises(
        ArgumentError, match="an encoder sees the next token, so predicting it measures nothing"
    ):
        mj.dicteval.loss_recovered(encoder, [IDS], {0: ReLU.init(d_model=8, n_features=4, key=KEY)})


def test_splice__of_a_subject__has_latents_as_sites_of_its_layers(bridged):
    made = {i: ReLU.init(d_model=networks.D, n_features=4, key=jax.random.key(i)) for i in (0, 2)}
    spliced = mj.dictionaries.splice(bridged, made, site="blocks.mlp.output")
    ids = texts(1)[1][0]
    out, acts = mj.capture(spliced, "blocks.mlp.output.latents")(ids)
    own, plain = mj.capture(bridged, "blocks.mlp.output")(ids)
    np.testing.assert_array_equal(out["logits"], own["logits"])
    found = plain["blocks.mlp.output"]
    np.testing.assert_allclose(
        acts["blocks.mlp.output.latents"],
        jnp.stack([made[i].encode(found[i]) for i in (0, 2)]),
        **TOL["float32", "law"],
    )
    with pytest.raises(SiteError, match="layer 3"):
        mj.dictionaries.splice(bridged, {3: made[0]}, site="blocks.mlp.output")(ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("bart", "model.encoder.layers.1.fc2"),
        ("bart", "model.decoder.layers.1.fc2"),
        ("electra", "electra.encoder.layer.1.output.dense"),
        ("vit", "vit.layers.1.mlp"),
    ],
)
def test_rows__of_architectures_of_transformers__are_what_hooks_see_of_real_tokens(name, path):
    module, kwargs = architectures.built(name)
    subject, arrays = parity.bridged(name)
    _, values = hooks.seen(module, kwargs)
    site, layer = parity.matched(mj.list_sites(subject, **arrays), values)[path, 0, "output", ""]
    seen = values[path, 0, "output", ""].numpy()
    padded = "attention_mask" in arrays and seen.shape[:2] == arrays["attention_mask"].shape
    real = arrays["attention_mask"] == 1 if padded else np.ones(seen.shape[:2], bool)
    assert real.all() == (name == "vit" or "decoder" in path)
    stream = mj.dictlearn.activations(subject, [arrays], site, layer=layer, batch=1, buffer=64, key=KEY)
    found = np.concatenate(list(stream))
    ordered = lambda rows: rows[np.lexsort(np.round(rows, 3).T)]
    np.testing.assert_allclose(ordered(found), ordered(seen[real]), **TOL["float32", "parity"])
