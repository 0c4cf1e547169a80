"""Activation patching of any function with sites: against a loop of `intervene`, whatever goes in and comes out."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import ArgumentError, CheckpointError, PairingError, ShapeError, SiteError
from mechjax.interop import from_equinox, from_nnx
from mechjax.models.load import build
from mechjax.patching import activation_patch
from tests.interop.networks import TOKENS, VOCAB, equinox, nnx_net
from tests.tolerances import TOL

LAYERS, BATCH, POS, D, OUT = 3, 2, 4, 5, 7
METRIC = mj.metrics.logit_diff(jnp.array([1, 2]), jnp.array([3, 4]))
MASK = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]])
CLEAN, CORRUPT = jax.random.normal(jax.random.key(1), (2, BATCH, POS, D))


class Net(eqx.Module):
    """Layers in a scan, each of which mixes positions; gives a dictionary, as models of transformers do."""

    weights: jax.Array
    out: jax.Array

    def __call__(self, x, attention_mask=None, scale=None):
        seen = jnp.ones(x.shape[:2]) if attention_mask is None else attention_mask.astype(x.dtype)
        seen = seen * (1.0 if scale is None else scale)

        def layer(x, w):
            mixed = jnp.cumsum(x * seen[..., None], 1) / POS
            return x + mj.site(jnp.tanh(mixed @ w), "act", axes=("pos", "d")), None

        x, _ = jax.lax.scan(layer, x, self.weights)
        x = mj.site(x, "last", axes=("pos", "d"))
        return {"loss": jnp.zeros(()), "logits": x @ self.out}


NET = Net(
    jax.random.normal(jax.random.key(2), (LAYERS, D, D)), jax.random.normal(jax.random.key(3), (D, OUT))
)


def brute(fn, metric, donor, base, over, sizes, site="act"):
    """One edit at a time, each a run of all of it; `metric` is of the output."""
    _, acts = mj.capture(fn, site)(*donor[0], **donor[1])
    found = []
    for cell in itertools.product(*(range(n) for n in sizes)):
        where = dict(zip(over, map(jnp.int32, cell), strict=True))
        edit = mj.replace(site, acts, **where)
        found.append(metric(mj.intervene(fn, edit)(*base[0], **base[1])))
    return jnp.stack(found).reshape(*sizes, BATCH)


@pytest.mark.parametrize(
    ("over", "sizes", "mode", "chunk"),
    [(("layer", "pos"), (LAYERS, POS), "denoise", None), (("d", "layer"), (D, LAYERS), "noise", 4), (("pos",), (POS,), "denoise", 3)],
)  # fmt: skip
def test_activation_patch__of_a_module__equals_a_loop_of_intervene(over, sizes, mode, chunk):
    found = activation_patch(NET, CLEAN, CORRUPT, METRIC, site="act", over=over, mode=mode, chunk_size=chunk)
    donor, base = (CLEAN, CORRUPT)[:: 1 if mode == "denoise" else -1]
    metric = lambda out: METRIC(out["logits"])
    assert_allclose(
        found.per_example,
        brute(NET, metric, ((donor,), {}), ((base,), {}), over, sizes),
        **TOL["float32", "sweep"],
    )
    assert_allclose(found.clean, metric(NET(CLEAN)), **TOL["float32", "law"])
    assert_allclose(found.corrupt, metric(NET(CORRUPT)), **TOL["float32", "law"])
    backwards = brute(NET, metric, ((base,), {}), ((donor,), {}), over, sizes)
    assert np.abs(found.per_example - backwards).max() > 1e-2  # the loop can tell


def test_activation_patch__of_named_arguments__reads_the_last_real_token():
    clean, corrupt = ({"x": x, "attention_mask": MASK} for x in (CLEAN, CORRUPT))
    found = activation_patch(NET, clean, corrupt, METRIC, site="act", over=("layer",))
    metric = lambda out: METRIC(out["logits"], MASK != 0)
    assert_allclose(
        found.per_example,
        brute(NET, metric, ((), clean), ((), corrupt), ("layer",), (LAYERS,)),
        **TOL["float32", "sweep"],
    )
    assert np.abs(found.clean - METRIC(NET(**clean)["logits"]))[0] > 1e-3  # padding is no token


def test_activation_patch__of_pictures__needs_neither_tokens_nor_positions():
    kernel = jax.random.normal(jax.random.key(4), (3, 3, 2, 4))

    def classifier(pixels, strength):  # two arguments, (batch, class)
        convolved = jax.lax.conv_general_dilated(
            pixels, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        features = mj.site(jnp.tanh(convolved), "features", axes=("height", "width", "channel"))
        return jnp.concatenate([features.mean((1, 2)) * strength[:, None]] * 2, -1)

    pixels = jax.random.normal(jax.random.key(5), (2, BATCH, 3, 3, 2))
    given = [(x, jnp.array([1.0, 2.0])) for x in pixels]
    found = activation_patch(classifier, *given, METRIC, site="features", over=("channel",))
    metric = lambda out: METRIC(out[:, None])
    assert_allclose(
        found.per_example, brute(classifier, metric, (given[0], {}), (given[1], {}), ("channel",), (4,), "features"),
        **TOL["float32", "sweep"],
    )  # fmt: skip
    # The metric may be a function of the output; here the same one, written out.
    own = lambda out: out[jnp.arange(2), jnp.array([1, 2])] - out[jnp.arange(2), jnp.array([3, 4])]
    again = activation_patch(classifier, *given, own, site="features", over=("channel",))
    assert_allclose(again.per_example, found.per_example, **TOL["float32", "law"])


@pytest.mark.slow
def test_activation_patch__of_an_equinox_model_of_one_example__is_that_of_its_batch():
    sites = {"mlp_out": ("blocks.mlp.output", ("pos", "d_model"))}
    one = from_equinox(equinox("scan"), sites=sites)
    clean, corrupt = TOKENS, (TOKENS + 3) % VOCAB
    found = activation_patch(one.batched(), clean, corrupt, METRIC, site="mlp_out")
    _, acts = jax.vmap(mj.capture(one, "mlp_out"))(clean)
    values = acts.arrays["mlp_out"]  # (batch, layer, pos, d_model)

    @eqx.filter_jit
    def of(one, layer, pos):
        run = lambda x, value: mj.intervene(one, mj.replace("mlp_out", value[layer], layer=layer, pos=pos))(x)
        return METRIC(jax.vmap(run)(corrupt, values))

    expected = jnp.stack(
        [jnp.stack([of(one, jnp.int32(i), jnp.int32(p)) for p in range(4)]) for i in range(3)]
    )
    assert_allclose(found.per_example, expected, **TOL["float32", "sweep"])


@pytest.mark.slow
def test_activation_patch__of_a_user_s_vmap__is_that_of_the_batched_subject():
    one = from_equinox(equinox("loop"), sites={"mlp_out": ("blocks.mlp.output", ("pos", "d_model"))})
    clean, corrupt = TOKENS, (TOKENS + 3) % VOCAB
    mapped, whole = (
        activation_patch(fn, clean, corrupt, METRIC, site="mlp_out", over=("layer",))
        for fn in (jax.vmap(one), one.batched())
    )
    assert_allclose(mapped.per_example, whole.per_example, **TOL["float32", "law"])


def test_activation_patch__at_named_positions__is_those_columns():
    at = {"a": jnp.array([0, 1]), "b": jnp.array([3, 2])}
    found = activation_patch(NET, CLEAN, CORRUPT, METRIC, site="act", over=("pos", "layer"), positions=at)
    every = activation_patch(NET, CLEAN, CORRUPT, METRIC, site="act", over=("pos", "layer"))
    expected = [[every.per_example[p, :, i] for i, p in enumerate(at[name].tolist())] for name in at]
    assert_allclose(jnp.moveaxis(found.per_example, -1, 1), jnp.array(expected), **TOL["float32", "law"])
    assert dict(found.labels) == {"pos": ("a", "b")}


@pytest.mark.slow
def test_folder__of_a_module__holds_the_same_and_is_known_again(tmp_path):
    sweep = functools.partial(activation_patch, NET, CLEAN, CORRUPT, METRIC, site="act", chunk_size=2)
    found, without = sweep(folder=tmp_path), sweep()
    assert_allclose(found.per_example, without.per_example, **TOL["float32", "law"])
    units = {path: path.stat().st_mtime_ns for path in tmp_path.glob("unit-*")}
    assert len(units) == LAYERS * 2
    assert_array_equal(sweep(folder=tmp_path).per_example, found.per_example)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("unit-*")} == units
    with pytest.raises((ArgumentError, CheckpointError), match="corrupt"):
        activation_patch(NET, CLEAN, CLEAN, METRIC, site="act", chunk_size=2, folder=tmp_path)


@pytest.mark.slow
def test_folder__of_what_only_its_program_tells__is_known_again(tmp_path):
    """An NNX module holds functions, and a lambda is one: another process has others that do the same."""

    def swept(scale=1.0, sites=None):
        subject = from_nnx(nnx_net("loop"), sites=sites)
        metric = lambda out: scale * out.sum((1, 2))
        how = {"site": "blocks.mlp.output", "over": ("layer",), "folder": tmp_path, "chunk_size": 2}
        return activation_patch(subject, TOKENS, (TOKENS + 3) % VOCAB, metric, **how)

    found = swept()
    units = {path: path.stat().st_mtime_ns for path in tmp_path.glob("unit-*")}
    assert units
    assert_array_equal(swept().per_example, found.per_example)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("unit-*")} == units
    with pytest.raises(ArgumentError, match="`metric` is"):
        swept(scale=2.0)
    with pytest.raises(ArgumentError, match="`model` is"):
        swept(sites={"embedded": "embed.output"})


@pytest.mark.slow
def test_folder__of_what_calls_back__is_refused(tmp_path):
    def metric(out):
        shape = jax.ShapeDtypeStruct((len(out["logits"]),), jnp.float32)
        return jax.pure_callback(lambda x: x.sum((1, 2)), shape, out["logits"])

    with pytest.raises(ArgumentError, match=r"function or metric calls back into Python.*leave `folder` out"):
        activation_patch(NET, CLEAN, CORRUPT, metric, site="act", over=("pos",), folder=tmp_path)


@pytest.mark.slow
def test_activation_patch__of_an_encoder__equals_a_loop():
    config = mj.models.EncoderConfig(
        d_vocab=20, n_ctx=8, d_model=8, n_layers=2, n_heads=2, d_mlp=16, mlm=True
    )
    shapes = {
        k: jax.random.normal(jax.random.key(i), n) / 2 for i, (k, n) in enumerate(config.shapes.items())
    }
    model, metric = build(config, shapes), mj.metrics.logit_diff(1, 2, pos=1)
    clean, corrupt = jnp.array([[1, 2, 3], [4, 5, 6]]), jnp.array([[1, 7, 3], [4, 5, 9]])
    found = activation_patch(model, clean, corrupt, metric, site="mlp_out", over=("layer",))
    assert_allclose(
        found.per_example, brute(model, metric, ((clean,), {}), ((corrupt,), {}), ("layer",), (2,), "mlp_out"),
        **TOL["float32", "sweep"],
    )  # fmt: skip


def refused(error, match, fn=NET, clean=CLEAN, corrupt=CORRUPT, metric=METRIC, **how):
    with pytest.raises(error, match=match):
        activation_patch(fn, clean, corrupt, metric, **{"site": "act", "over": ("layer",), **how})


def test_activation_patch__of_what_cannot_be__says_what_would(as_a_user):
    refused(
        ArgumentError,
        r"gives a tuple, in which nothing is called `logits`.*lambda out: own_metric\(out\[0\]\)",
        lambda x: (NET(x)["logits"], 0),
    )
    refused(
        ArgumentError,
        r"gives a dict with loss, in which nothing is called `logits`",
        lambda x: {"loss": NET(x)["loss"]},
    )
    refused(ShapeError, r"logits of shape \(4, 7\).*under jax.vmap|\(7,\)", lambda x: NET(x)["logits"][0, 0])
    refused(
        ArgumentError,
        r"metric gives float32\[2, 4, 7\].*one real number per example",
        metric=lambda out: out["logits"],
    )
    refused(ArgumentError, r"the metric is a int; give one of mj.metrics", metric=3)
    refused(ArgumentError, r"reads token 9; the output has logits of 7", metric=mj.metrics.logit_diff(9, 1))
    refused(ShapeError, r"`correct` has shape \(3,\)", metric=mj.metrics.logit_diff(jnp.arange(3), 1))
    refused(ShapeError, r"the mask has shape \(2, 3\) and the logits \(2, 4, 7\)", lambda x, attention_mask: NET(x), {"x": CLEAN, "attention_mask": MASK[:, :3]}, {"x": CORRUPT, "attention_mask": MASK[:, :3]})  # fmt: skip
    refused(
        PairingError,
        r"\[0\]\[0\] is float32\[2, 4, 5\] in clean and float32\[2, 3, 5\] in corrupt",
        corrupt=CORRUPT[:, :3],
    )
    refused(PairingError, r"are different calls: .* Give both the same arguments", corrupt={"x": CORRUPT})
    refused(PairingError, r"padded at different places", clean={"x": CLEAN, "attention_mask": MASK}, corrupt={"x": CORRUPT, "attention_mask": MASK[::-1]})  # fmt: skip
    refused(SiteError, r"no site `acts` here; .*Did you mean `act`", site="acts")
    refused(SiteError, r"cannot sweep `head`: site `act` has layer, pos, d", over=("head",))
    refused(SiteError, r"positions= are one for each of 2 examples", lambda x: {"logits": mj.site(NET(x)["logits"], "y", axes=("pos",))}, site="y", over=("pos",), positions={"a": jnp.array([0, 1])})  # fmt: skip
    refused(
        ArgumentError,
        r"site `act`, layer 0 is not finite in a run without patches",
        corrupt=CORRUPT.at[0, 1].set(jnp.nan),
    )
    refused(
        ArgumentError,
        r"NaN, though every site is finite",
        metric=lambda out: jnp.log(-jnp.abs(out["logits"].sum((1, 2)))),
    )


def test_activation_patch__of_axes_without_names__says_how_to_name_them(as_a_user):
    subject = from_equinox(equinox("scan")).batched()
    with pytest.raises(
        SiteError,
        match=r"site `blocks.mlp.output` has layer.*sites=\{'mine': \('blocks.mlp.output', \('pos', 'd_model',\)\)\}",
    ):
        activation_patch(subject, TOKENS, TOKENS, METRIC, site="blocks.mlp.output")
