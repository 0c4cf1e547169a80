"""Whole models through splash, which CPUs are told to run as plain JAX, against the same models without kernels."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.models import fused
from mechjax.models.kernels import equations, lowering, parts, splash
from mechjax.models.kernels.attend import attend
from mechjax.models.positions import arrange
from mechjax.transform.cost import cost
from tests.models.kernels.by_hand import POS, REAL, SPLIT, config_of, inputs_of, weights_of
from tests.tolerances import TOL

SLOW = pytest.mark.slow
PARITY, GRADIENT = TOL["float32", "parity"], TOL["float32", "gradient"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(fused, "_BLOCK", 64)


@pytest.fixture
def splash_here(monkeypatch):
    """CPUs run splash, as plain JAX."""
    monkeypatch.setitem(lowering.MIXED, "splash", partial(splash.mixed, interpret=True))
    kinds = {equations.mix_p: parts.mix, equations.pullback_p: parts.pullback}
    for primitive, part in kinds.items():
        mlir.register_lowering(primitive, lowering.lowering(part, "splash"), platform="cpu")
    jax.clear_caches()
    yield
    for primitive, part in kinds.items():
        mlir.register_lowering(primitive, lowering.lowering(part, None), platform="cpu")
    jax.clear_caches()


def without(config, mask, window=None):
    """Attention in plain XLA, and by kernels, as functions of (q, k, v)."""
    places = arrange(config, POS, mask, None).queries
    sides = (places, places, window)
    return (
        lambda *x: fused.fused(*x, sides, None, config),
        lambda *x: attend(*x, sides, None, config, causal=True),
    )


def kernels_in(f, *args):
    """How often splash stands in a compiled program."""
    return jax.jit(f).lower(*args).as_text(debug_info=True).count("splash_mha")


@pytest.mark.usefixtures("splash_here")
@pytest.mark.parametrize(
    ("window", "real"),
    [
        pytest.param(20, SPLIT, id="window, padding in between"),
        pytest.param(None, SPLIT, id="no window, padding in between", marks=SLOW),
        pytest.param(20, REAL, id="window, in one run", marks=SLOW),
    ],
)
def test_attend__windows_of_layers_and_padding_anywhere__are_those_without_kernels(real, window):
    config = config_of(windows=(20, None))
    plain, ours = without(config, jnp.asarray(real), jnp.int32(window or 2**31 - 1))
    x = inputs_of(config)
    weights = weights_of(x[0], real)
    both = lambda f: jax.jit(jax.value_and_grad(lambda *x: (f(*x) * weights).sum(), (0, 1, 2)))(*x)
    assert kernels_in(ours, *x) and not kernels_in(plain, *x)
    for a, b in zip(jax.tree.leaves(both(ours)), jax.tree.leaves(both(plain)), strict=True):
        assert_allclose(a, b, **GRADIENT)


def first(f, x, dx):
    """Forward and reverse, and reverse with respect to the values alone."""
    loss = lambda x: jnp.sin(jax.checkpoint(f)(*x)).sum()
    return (
        jax.jvp(lambda x: f(*x), (x,), (dx,)),
        jax.grad(loss)(x),
        jax.grad(lambda v: loss((*x[:2], v)))(x[2]),
    )


def second(f, x, dx):
    """Forward over reverse and reverse over reverse, which agree: a Hessian is symmetric."""
    gradient = jax.grad(lambda x: jnp.sin(f(*x)).sum())
    along = lambda x: sum((g * d).sum() for g, d in zip(gradient(x), dx, strict=True))
    return jax.jvp(gradient, (x,), (dx,))[1], jax.grad(along)(x)


@pytest.mark.usefixtures("splash_here")
@pytest.mark.parametrize("order", [first, pytest.param(second, marks=SLOW)])
def test_attend__every_kind_of_derivative__is_that_without_kernels(order):
    config = config_of()
    plain, ours = without(config, None)
    x, dx = inputs_of(config), inputs_of(config, 1)
    found, expected = jax.jit(lambda x, dx: [order(f, x, dx) for f in (ours, plain)])(x, dx)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_allclose(a, b, **GRADIENT)
    if order is second:
        assert_allclose(found[0][0], found[1][0], **GRADIENT)


@pytest.mark.usefixtures("splash_here")
@pytest.mark.parametrize(
    "mapped",
    ["queries", pytest.param("everything", marks=SLOW), pytest.param("padding", marks=SLOW), "windows"],
)
def test_attend__under_vmap__is_that_of_each(mapped):
    config = config_of(windows=(20, None))
    q, k, v = inputs_of(config, batch=(3, 2))
    axes = {
        "queries": (0, None, None),
        "everything": (0, 0, 0),
        "padding": (None,) * 3,
        "windows": (None,) * 3,
    }[mapped]
    x = [x if a == 0 else x[0] for x, a in zip((q, k, v), axes, strict=True)]
    real = jnp.asarray([REAL, SPLIT, REAL[::-1]])
    windows = jnp.array([20, 2**31 - 1, 20], jnp.int32)
    mask, of_mask = (real, 0) if mapped == "padding" else (real[0], None)
    window, of_window = (windows, 0) if mapped == "windows" else (windows[0], None)

    def run(i, q, k, v, mask, window):
        return without(config, mask, window)[i](q, k, v)

    both = [jax.jit(jax.vmap(partial(run, i), (*axes, of_mask, of_window))) for i in range(2)]
    assert bool(kernels_in(both[1], *x, mask, window)) == (mapped != "windows")
    shown = jnp.broadcast_to(mask, (3, 2, POS))
    assert_allclose(both[1](*x, mask, window)[shown], both[0](*x, mask, window)[shown], **PARITY)


def model_of(**choices):
    config = config_of(positions="rotary", mlp="none", **choices)
    model = mj.init(config, key=jax.random.key(0))
    return jax.tree.map(lambda leaf: 3 * leaf, model)


@pytest.mark.usefixtures("splash_here")
@pytest.mark.parametrize("windows", [None, pytest.param((20, None), marks=SLOW)])
def test_decoder__logits_sites_edits_and_gradients__are_those_with_the_pattern_formed(windows):
    model = model_of(windows=windows, n_kv_heads=2)
    tokens, mask = jax.random.randint(jax.random.key(1), (2, POS), 0, 31), jnp.asarray(REAL)
    edits = [mj.scale("v", 0.5, layer=0, kv_head=1), mj.add("resid_pre", jnp.ones(32), layer=1, pos=-1)]
    edited = mj.intervene(model, edits)
    metric = lambda logits: jnp.where(mask, logits[..., 3] - logits[..., 5], 0).mean()
    sites = ["resid_pre", "z", "v"]
    ours, theirs = (
        (lambda t, m, sites=sites: mj.value_and_grad_at(edited, metric, sites)(t, mask=m))
        for sites in (sites, [*sites, "pattern"])
    )
    assert kernels_in(ours, tokens, mask) and not kernels_in(theirs, tokens, mask)
    (value, found), (expected, formed) = ours(tokens, mask), theirs(tokens, mask)
    assert_allclose(value, expected, **PARITY)
    for site in sites:
        assert_allclose(found[site], formed[site], **GRADIENT)

    logits, acts = mj.capture(model, ["z"])(tokens, mask=mask)
    replaced = mj.intervene(model, [mj.replace("z", acts["z"], per_layer=True)])(tokens, mask=mask)
    assert_allclose(replaced, logits, **TOL["float32", "law"])


SPLIT_HEADS = {"W_Q": 2, "W_K": 2, "W_V": 2, "W_O": 1}  # their axes of heads


@pytest.mark.usefixtures("splash_here")
def test_decoder__on_a_mesh__runs_a_kernel_on_every_device():
    model, mesh = model_of(), mj.make_mesh(data=2, model=4)
    tokens = jax.random.randint(jax.random.key(1), (2, POS), 0, 31)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    placed = jax.tree.map(lambda x: place(x) if eqx.is_array(x) else x, model)
    for name, axis in SPLIT_HEADS.items():
        split = place(getattr(model.blocks.attn, name), *(None,) * axis, "model")
        placed = eqx.tree_at(lambda m, name=name: getattr(m.blocks.attn, name), placed, split)
    there = place(tokens, "data")
    assert_allclose(placed(there), model(tokens), **TOL["float32", "mesh"])
    arrays, static = eqx.partition(placed, eqx.is_array)
    lowered = jax.jit(lambda a, t: eqx.combine(a, static)(t)).lower(arrays, there)
    text = lowered.as_text(debug_info=True)
    assert "splash_mha" in text and f"tensor<1x{POS}x1x8xf32>" in text  # one example and one head on each


@pytest.mark.usefixtures("splash_here")
@pytest.mark.parametrize(
    ("sizes", "names", "taken"), [((1,), ("x",), True), ((8,), ("x",), False), ((3,), ("model",), False)]
)
def test_attend__on_a_mesh_of_other_axes_or_whose_heads_do_not_divide__is_without_kernels(
    sizes, names, taken
):
    plain, ours = without(config_of(), None)
    mesh = Mesh(np.array(jax.devices()[: sizes[0]]), names)
    x = jax.device_put(inputs_of(config_of()), NamedSharding(mesh, PartitionSpec()))
    assert bool(kernels_in(ours, *x)) == taken
    assert_allclose(jax.jit(ours)(*x), jax.jit(plain)(*x), **PARITY)


def test_decoder__on_a_cpu__has_no_trace_of_kernels():
    model = model_of(windows=(20, None))
    arrays, static = eqx.partition(model, eqx.is_array)
    tokens = jnp.zeros((2, POS), jnp.int32)
    run = jax.jit(lambda a, t: eqx.combine(a, static)(t))
    assert "mechjax_mix" in str(jax.make_jaxpr(run)(arrays, tokens))
    lowered = run.lower(arrays, tokens)
    for text in (lowered.as_text(), lowered.compile().as_text()):
        assert not any(
            word in text for word in ("custom_call", "custom-call", "splash", "pallas", "shard_map")
        )


def test_cost__of_what_a_kernel_may_take__is_that_of_the_program_it_replaces():
    tokens = jax.ShapeDtypeStruct((2, POS), jnp.int32)
    models = [jax.eval_shape(partial(model_of, precision=precision)) for precision in ("default", "highest")]
    found, expected = (cost(model, tokens) for model in models)
    assert found == expected and found.unknown == ()
    programs = [str(eqx.filter_make_jaxpr(lambda m, t: m(t))(model, tokens)[0]) for model in models]
    assert ["mechjax_mix" in program for program in programs] == [True, False]

    plain, ours = without(config_of(), None)
    q = jax.ShapeDtypeStruct((2, POS, 4, 8), jnp.float32)
    gradient = lambda f: cost(jax.grad(lambda q: f(q, q, q).sum()), q)
    again = cost(lambda q: plain(q, q, q), q).contractions
    assert gradient(ours).contractions == gradient(plain).contractions + again
    assert gradient(ours).unknown == ()
