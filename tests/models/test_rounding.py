"""Rounding by itself: against a loop over blocks, its bound, the host against JAX, what is refused."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from mechjax.base.errors import ArgumentError
from mechjax.models.config import Config
from mechjax.models.contraction import contract
from mechjax.models.quantized import merged, nbytes
from mechjax.models.rounding import is_matrix, named_scheme, rounded, rounded_on_host, scales, scheme
from tests.tolerances import TOL

CONFIG = Config(d_vocab=3, n_ctx=4, d_model=12, n_layers=2, n_heads=3, d_head=8, d_mlp=16)
SHAPES = {
    "attn.W_Q": (2, 12, 3, 8),
    "attn.W_O": (2, 3, 8, 12),
    "mlp.W_in": (2, 12, 16),
    "mixer.W_O": (2, 24, 12),
}
SPECS = {
    "attn.W_Q": "pm,mhd->phd",
    "attn.W_O": "phd,hdm->phm",
    "mlp.W_in": "pi,io->po",
    "mixer.W_O": "pi,io->po",
}
TOTAL = {"attn.W_Q": 12, "attn.W_O": 24, "mlp.W_in": 12, "mixer.W_O": 24}
SCHEMES = [(8, None), (8, 4), (4, 6), (4, 12), (4, 24)]


rounded_by_jax = eqx.filter_jit(rounded)


def drawn(name, dtype=np.float32, size=1.0):
    return (size * np.random.default_rng(0).standard_normal(SHAPES[name])).astype(dtype)


def by_hand(W, n, limit):
    """Whole numbers and scales by a loop over blocks, in float64."""
    blocks = [size // k for size, k in zip(W.shape, n, strict=True)]
    q, scale = np.zeros(W.shape), np.zeros(n)
    for at in itertools.product(*map(range, n)):
        place = tuple(slice(i * b, (i + 1) * b) for i, b in zip(at, blocks, strict=True))
        scale[at] = np.abs(W[place]).max() / limit
        q[place] = np.round(W[place] / scale[at])
    return q, scale


def schemes_of(name):
    return [how for how in SCHEMES if how[1] is None or TOTAL[name] % how[1] == 0]


@pytest.mark.parametrize(("name", "bits", "group"), [(n, *how) for n in SHAPES for how in schemes_of(n)])
def test_rounded__every_matrix__equals_a_loop_over_blocks(name, bits, group):
    W, how = drawn(name), scheme(bits, group)
    found = rounded_by_jax(jnp.asarray(W), f"blocks.{name}", how)
    n = scales(name, W.shape, how)
    q, scale = by_hand(W.astype(np.float64), n, 127 if bits == 8 else 7)
    assert found.bits == bits and found.shape == W.shape and found.dtype == W.dtype
    assert_array_equal(found.numbers(jnp.int32), q)
    assert_allclose(found.scale, scale, **TOL["float32", "law"])
    asked = group or TOTAL[name]
    assert np.prod(W.shape) / np.prod(n) == (
        {6: 2, 12: 4}.get(asked, asked) if name == "attn.W_O" else asked
    )  # 6 of heads of 8
    assert found.nbytes == nbytes(found) == W.size * bits // 8 + 4 * scale.size


def test_scales__of_heads_that_groups_do_not_fit__are_of_the_largest_part_of_both():
    assert scales("blocks.attn.W_O", (2, 4, 24, 96), scheme(4, 32)) == (2, 4, 3, 96)
    assert scales("blocks.attn.W_O", (2, 4, 24, 96), scheme(8, 48)) == (2, 2, 1, 96)
    assert scales("blocks.attn.W_O", (4, 24, 96), scheme(8, None)) == (1, 1, 96)


@pytest.mark.parametrize("size", [1.0, 1e-6])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded__in_any_dtype__is_within_half_a_scale_and_the_same_on_the_host(dtype, size, bits):
    W, how = drawn("mlp.W_in", dtype, size), scheme(bits, 6)
    there = rounded_by_jax(jnp.asarray(W), "mlp.W_in", how)
    here = rounded_on_host(W, W.dtype, "mlp.W_in", how)
    assert isinstance(here.q, np.ndarray)
    jax.tree.map(assert_array_equal, here, there)
    wide = np.repeat(np.asarray(there.scale, np.float64), 6, axis=1)
    off = np.abs(np.asarray(there.numbers(jnp.float32), np.float64) * wide - W.astype(np.float64))
    assert (off <= wide / 2 * (1 + 1e-4)).all()  # a tie may go either way, for a product in float32
    assert off.max() > wide.max() / 4 or dtype == np.float16  # whose smallest numbers are far apart


@pytest.mark.parametrize(
    ("name", "bits", "group"),
    [("attn.W_Q", 8, None), ("mlp.W_in", 4, 6), ("attn.W_O", 8, 4), ("attn.W_O", 4, 24)],
)
def test_contract__of_rounded_weights__is_off_by_at_most_half_a_scale_for_each_input(name, bits, group):
    spec = SPECS[name]
    W, how = drawn(name)[0], scheme(bits, group)
    held = rounded_by_jax(jnp.asarray(W), name, how)
    x = (
        np.random.default_rng(1)
        .standard_normal((5, *W.shape[: 2 if name == "attn.W_O" else 1]))
        .astype(np.float32)
    )
    found, of_full = (
        contract(spec, jnp.asarray(x), held, CONFIG),
        contract(spec, jnp.asarray(x), held.full(), CONFIG),
    )
    assert_allclose(found, of_full, **TOL["float32", "layout"])
    wide = np.kron(held.scale, np.ones([a // b for a, b in zip(W.shape, held.scale.shape, strict=True)]))
    bound = np.einsum(spec, np.abs(x), wide) / 2
    off = np.abs(found - np.einsum(spec, x.astype(np.float64), W))
    assert (off <= bound * (1 + 1e-4)).all()
    assert off.max() > bound.max() / 100  # the bound is of this size


def test_contract__of_heads_as_one_axis__equals_the_sum_over_heads():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 3, 8)), jnp.float32)
    for bits, group in schemes_of("attn.W_O"):
        held = rounded_by_jax(jnp.asarray(drawn("attn.W_O")[0]), "attn.W_O", scheme(bits, group))
        together = contract("pi,im->pm", x.reshape(5, 24), merged(held), CONFIG)
        assert_allclose(together, jnp.einsum("phd,hdm->pm", x, held.full()), **TOL["float32", "layout"])


def test_contract__in_half_precision__sums_whole_numbers_without_overflow():
    W = np.full((1024, 4), 0.5, np.float16)
    held = rounded_by_jax(jnp.asarray(W), "mlp.W_in", scheme(8, None))
    found = contract("pi,io->po", jnp.ones((2, 1024), jnp.float16), held, CONFIG)
    assert found.dtype == jnp.float16
    assert_allclose(np.asarray(found, np.float32), 512.0, rtol=1e-3)
    assert 127 * 1024 > 65_504  # the control: the sum before its scale, and the largest number of float16


def test_quantized__read_as_an_array__is_what_it_stands_for():
    held = rounded_by_jax(jnp.asarray(drawn("mlp.W_in")), "mlp.W_in", scheme(4, 4))
    whole = held.full()
    for found, right in ((held[1], whole[1]), (held.transpose(2, 0, 1), whole.transpose(2, 0, 1)),
                         (jnp.abs(held), abs(whole)), (held.astype(jnp.bfloat16), whole.astype(jnp.bfloat16)),
                         (jnp.ones((3, 12)) @ held, jnp.ones((3, 12)) @ whole)):  # fmt: skip
        assert_array_equal(found, right)
    assert len(held) == 2 and held.ndim == 3 and held.size == whole.size
    with pytest.raises(AttributeError, match="no `colour`, nor have arrays"):
        _ = held.colour


def test_rounded__of_zeros_and_of_what_is_not_finite__is_zero_and_is_not_finite():
    W = drawn("mlp.W_in")
    W[0, :, 0], W[0, 3, 1], W[0, 3, 2] = 0, np.nan, np.inf
    for held in (
        rounded_by_jax(jnp.asarray(W), "mlp.W_in", scheme(8, None)),
        rounded_on_host(W, W.dtype, "mlp.W_in", scheme(8, None)),
    ):
        found = np.asarray(held.full())
        assert (found[0, :, 0] == 0).all()
        assert not np.isfinite(found[0, :, 1:3]).any() and np.isfinite(found[0, :, 3:]).all()


def test_is_matrix__of_paths__says_what_is_rounded():
    taken = (
        "blocks.attn.W_Q", "blocks.moe.W_in", "blocks.moe.shared.W_out", "blocks.attn.W_UK", "blocks.mixer.W_B",
        "blocks.mixer.W_dt_in", "encoder.blocks.attn.W_O", "decoder.blocks.cross.W_K",
    )  # fmt: skip
    assert all(map(is_matrix, taken))
    kept = (
        "W_E", "W_U", "W_pos", "W_head", "W_pool", "W_patch", "W_class", "encoder.W_rel", "blocks.attn.b_Q",
        "blocks.ln1.w", "blocks.moe.W_router", "blocks.moe.W_shared_gate", "blocks.attn.w_kv", "blocks.mixer.W_dt",
        "blocks.mixer.conv_x", "blocks.mixer.A_log", "blocks.mixer.D", "blocks.scale1",
    )  # fmt: skip
    assert not any(map(is_matrix, kept))


def test_scheme__that_cannot_be__says_what_can():
    for bits in (3, 16, True):
        with pytest.raises(ArgumentError, match="held in 8 bits or 4"):
            scheme(bits, None)
    for group in (0, 1, True):
        with pytest.raises(ArgumentError, match="how many neighbouring weights share a scale"):
            scheme(8, group)
    with pytest.raises(ArgumentError, match="weights='int3': they may be int8, int4"):
        named_scheme("int3", None)
    with pytest.raises(ArgumentError, match="group=32 is for weights in few bits"):
        named_scheme(None, 32)
    with pytest.raises(ArgumentError, match=r"group=5 does not divide the 12 numbers.*2, 3, 4, 6, 12 do"):
        scales("blocks.mlp.W_in", (2, 12, 16), scheme(8, 5))
    with pytest.raises(ArgumentError, match="sums over 7 numbers, which is odd"):
        scales("blocks.mlp.W_in", (2, 7, 16), scheme(4, 7))
