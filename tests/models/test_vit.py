"""A vision transformer by itself: its config, its refusals, edits, batches, dtypes, rows of activations."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import ArgumentError, JitError, ShapeError
from mechjax.models import ViTConfig
from mechjax.models.decoder import as_tokens
from mechjax.models.patches import interpolated
from mechjax.models.structures import build
from mechjax.store.source import batches_from, start_of
from tests.compilations import nothing_compiles
from tests.parity.cases import torch
from tests.tolerances import TOL

SMALL = {
    "image_size": (6, 4), "patch_size": (3, 2), "n_channels": 2, "d_model": 8, "n_layers": 2, "n_heads": 2, "d_mlp": 6,
}  # fmt: skip
CLASSES = {"head": "class", "classes": ("cat", "dog", "owl")}
PIXELS = np.random.default_rng(0).standard_normal((3, 2, 6, 4)).astype(np.float32)


def drawn(config, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(config.shapes))
    draw = lambda shape, key: (0.5 * jax.random.normal(key, shape)).astype(dtype)
    return build(config, {p: draw(s, k) for (p, s), k in zip(config.shapes.items(), keys, strict=True)})


@pytest.fixture(scope="module")
def model():
    return drawn(ViTConfig(**SMALL, **CLASSES))


@pytest.fixture(scope="module")
def logits(model):
    return model(PIXELS)


def test_patches__projected__are_those_of_a_strided_convolution(model):
    _, acts = mj.capture(model, ["patch_embed", "pattern"])(PIXELS)
    kernel = torch.from_numpy(np.array(model.W_patch.transpose(3, 0, 1, 2)))
    right = torch.nn.functional.conv2d(
        torch.from_numpy(PIXELS), kernel, torch.from_numpy(np.array(model.b_patch)), (3, 2)
    )
    assert_allclose(acts["patch_embed"], right.flatten(2).transpose(1, 2).numpy(), **TOL["float32", "parity"])
    assert (acts["pattern"] > 0).all()  # all see all
    assert_allclose(acts["pattern"].sum(-1), 1.0, **TOL["float32", "law"])


@pytest.mark.parametrize(("grid", "wanted"), [((3, 3), (5, 4)), ((4, 6), (2, 3)), ((1, 5), (3, 5))])
def test_interpolated__of_any_grid__is_torchs_bicubic(grid, wanted):
    table = np.random.default_rng(1).standard_normal((2 + grid[0] * grid[1], 3)).astype(np.float32)
    ours = interpolated(jnp.asarray(table), 2, grid, wanted)
    square = torch.from_numpy(table[2:].reshape(1, *grid, 3)).permute(0, 3, 1, 2)
    right = torch.nn.functional.interpolate(square, size=wanted, mode="bicubic", align_corners=False)
    assert_allclose(ours[:2], table[:2], **TOL["any", "exact"])
    assert_allclose(ours[2:], right.permute(0, 2, 3, 1).reshape(-1, 3).numpy(), **TOL["float32", "parity"])
    if grid[0] == 1:  # of one row, all are that one
        return
    nearest = torch.nn.functional.interpolate(square, size=wanted).permute(0, 2, 3, 1).reshape(-1, 3)
    assert np.abs(ours[2:] - nearest.numpy()).max() > 1e-2


def test_call__of_one_image_or_any_leading_axes__gives_the_same_rows(model, logits):
    assert logits.shape == (3, 3)
    assert_allclose(model(PIXELS[1]), logits[1], **TOL["float32", "layout"])
    assert_allclose(model(PIXELS[:1]), logits[:1], **TOL["float32", "layout"])
    assert_allclose(model(PIXELS[None])[0], logits, **TOL["float32", "layout"])
    assert_allclose(eqx.filter_jit(model)(PIXELS), logits, **TOL["float32", "layout"])
    assert_allclose(jax.vmap(model)(jnp.asarray(PIXELS)), logits, **TOL["float32", "layout"])
    assert model(PIXELS[:0]).shape == (0, 3)
    assert_allclose(model(PIXELS.tolist()), logits, **TOL["float32", "layout"])


def test_call__of_an_image_with_nan__is_nan_in_that_image_alone(model, logits):
    broken = PIXELS.copy()
    broken[1, 0, 0, 0] = np.nan
    out = model(broken)
    assert np.isnan(out[1]).all()
    assert_allclose(out[::2], logits[::2], **TOL["float32", "layout"])


def test_vmap__over_edits__is_a_sweep_over_positions(model, logits, caplog):
    effect = lambda pos: mj.intervene(model, mj.zero("resid_mid", layer=0, pos=pos))(PIXELS)
    swept = jax.vmap(effect)(jnp.arange(model.config.n_ctx))
    assert swept.shape == (5, 3, 3)
    assert_allclose(swept[3], effect(3), **TOL["float32", "sweep"])
    assert np.abs(swept - logits).max(-1).min() > 1e-4
    with nothing_compiles(caplog):
        effect(4)


def test_bfloat16__stays_close_to_float32(model, logits):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    out = half(PIXELS)
    assert out.dtype == jnp.bfloat16
    whole = jax.tree.map(lambda x: x.astype(jnp.float32), half)(
        PIXELS.astype(jnp.bfloat16).astype(np.float32)
    )
    unit = np.abs(whole).max()
    assert_allclose(out.astype(np.float32) / unit, whole / unit, **TOL["bfloat16", "parity"])


def test_program__of_more_layers__is_no_longer():
    lines = [
        len(
            str(
                jax.make_jaxpr(lambda m, x: m(x))(drawn(ViTConfig(**SMALL | {"n_layers": n})), PIXELS)
            ).splitlines()
        )
        for n in (2, 6)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (np.zeros((1, 2, 6, 4), np.uint8), ArgumentError, r"got uint8\. Of raw pixels give \(pixels / 255 - image_mean\)"),
        (PIXELS[:, :, :, :3], ShapeError, r"Images are 6 x 3 pixels .*those of 6 x 4: resize them, or pass interpolate_"),
        (np.zeros((6, 4), np.float32), ShapeError, r"Pixels need a shape \(\*batch, 2, 6, 4\).*got \(6, 4\)"),
        (np.zeros((1, 6, 4, 2), np.float32), ShapeError, r"2 channels, before rows .*stand last: np.moveaxis"),
        (np.zeros((1, 3, 6, 4), np.float32), ShapeError, r"shape \(1, 3, 6, 4\), but the model has 2 channels"),
        ([PIXELS[0].tolist(), PIXELS[1][:, :5].tolist()], ShapeError, r"Images of different sizes make no array"),
    ],
)  # fmt: skip
def test_call__of_what_is_no_image_of_the_models__is_refused(model, pixels, error, message):
    with pytest.raises(error, match=message):
        model(pixels)


def test_call__of_an_image_smaller_than_a_patch__is_refused(model):
    with pytest.raises(ShapeError, match=r"Images are 2 x 4 pixels .*smaller than a patch of 3 x 2"):
        model(PIXELS[:, :, :2], interpolate_pos_encoding=True)
    with pytest.raises(JitError, match=r"A model cannot be hashed"):
        hash(model)


CLIP = {"last_norm": "class", "pooler": "class"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 6}, r"`image_size` = 6 must be two whole numbers: height and width"),
        ({"image_size": (6, 0)}, r"`image_size` = 0 must be a whole number from 1"),
        ({"patch_size": (7, 2)}, r"`patch_size` = \(7, 2\) is larger than `image_size` = \(6, 4\)"),
        ({"n_channels": 2**40}, r"`n_channels` = 1099511627776 must be a whole number from 1 to 65,536"),
        ({"classes": ("cat",)}, r"`head` = 'none' with 1 `classes`"),
        ({"classes": (1, 2)}, r"`classes` = \(1, 2\) must be the names"),
        ({"head": "class"}, r"`head` = 'class' with 0 `classes`"),
        ({"head": "mean"}, r"`head` = 'mean' is not one of"),
        (CLASSES | {"head": "class_distillation"}, r"needs `distilled` = True"),
        (CLASSES | CLIP, r"`last_norm` = 'class' gives the pooled output itself.*got 'class' and 'class'"),
        ({"d_proj": 3}, r"`d_proj` = 3 projects the pooled output, so it needs a `pooler`"),
        ({"d_proj": 0, "pooler": "class"}, r"`d_proj` = 0 must be a whole number"),
        ({"norms": "post"}, r"`norms` = 'post': a vision transformer has only 'pre'"),
        ({"causal": True}, r"`causal` = True: a vision transformer has only False"),
        ({"mlp": "none"}, r"`mlp` = 'none': a vision transformer has only 'plain' or 'gated'"),
        ({"layer_scale": 1}, r"`layer_scale` = 1 must be True or False"),
        ({"d_model": 2**24, "n_heads": 1, "n_layers": 2**12}, r"A config of .* parameters is refused"),
    ],
)
def test_vit_config__of_what_vision_transformers_do_not_have__is_refused(changes, message):
    with pytest.raises(ArgumentError, match=message):
        ViTConfig(**SMALL | changes)


def test_vit_config__counts_its_positions_and_parameters():
    config = ViTConfig(**SMALL | {"image_size": [7, 5], "distilled": True})
    assert (config.grid, config.n_special, config.n_ctx, config.image_size) == ((2, 2), 2, 6, (7, 5))
    assert replace(config, image_size=(9, 4)).n_ctx == 8
    assert hash(config) == hash(replace(config))
    whole = drawn(config)
    assert config.n_params == sum(x.size for x in jax.tree.leaves(whole))
    assert whole(np.zeros((2, 7, 5), np.float32)).shape == (6, 8)  # no head: the last stream


def test_methods_that_need_tokens__of_a_model_of_images__refuse(model):
    with pytest.raises(
        ArgumentError, match=r"This model reads images, and this needs a model of tokens.*jax.vmap"
    ):
        as_tokens(PIXELS, None, model.config)


def test_plan__of_a_model_of_images__counts_its_arrays(model):
    for found in (mj.plan(model.config, (3, 2, 6, 4)), mj.plan(model, jnp.asarray(PIXELS), capture=["z"])):
        assert found.n_params == model.config.n_params
        assert {site.name for site in found.sites} == set(mj.list_sites(model, PIXELS))
    assert found.captured_bytes == mj.capture(model, ["z"])(PIXELS)[1]["z"].nbytes
    assert "per example" in repr(found) and "3 × 2 × 6 × 4" in repr(found)
    assert mj.plan(model).tokens == (1, 2, 6, 4)
    dry = mj.dry_run(mj.run, model, PIXELS, capture=["pattern"])
    assert dry.n_params == model.config.n_params
    assert "per device" in repr(mj.plan(model.config, (4, 2, 6, 4), devices="v5e-4", mesh=(2, 2)))


def test_activations__of_images__are_rows_of_every_position(model, tmp_path):
    batches = [PIXELS, PIXELS[::-1].copy()]
    stream = mj.dictlearn.activations(
        model, batches, "resid_post", layer=1, batch=5, key=jax.random.key(0), buffer=10
    )
    rows = np.concatenate(list(stream))
    right = np.concatenate(
        [mj.capture(model, ["resid_post"])(x)[1]["resid_post"][1].reshape(-1, 8) for x in batches]
    )
    order = lambda x: x[np.lexsort(np.round(x, 4).T)]
    assert_allclose(order(rows), order(right), **TOL["float32", "layout"])
    store = mj.store.write(tmp_path / "s", model, batches, ["resid_post"], layers=[1], skip_first=True)
    assert len(store) == 2 * 3 * 4  # without class tokens
    kept = store.rows(slice(None), "resid_post", layer=1)
    assert_allclose(kept, right.reshape(6, 5, 8)[:, 1:].reshape(-1, 8), **TOL["float32", "layout"])
    digests = {
        next(batches_from(model, [x], start_of([x]), skip_first=False))[2].digest
        for x in (PIXELS, PIXELS + np.float32(1e-3), PIXELS[::-1].copy(), PIXELS.copy())
    }
    assert len(digests) == 3  # other images are noticed when a store is gone on with
