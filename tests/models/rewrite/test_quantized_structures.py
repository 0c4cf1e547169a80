"""Few bits in every structure: what is rounded, what is kept, and that sites, caches, files and meshes know no difference."""

import dataclasses
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import ArgumentError, UnsupportedModelError
from mechjax.models.quantized import Quantized, nbytes
from mechjax.models.rounding import MATRICES
from mechjax.models.structures import Model, build
from tests.models.rewrite.subjects import assert_close
from tests.models.test_rounding import by_hand
from tests.parallel import placements
from tests.parallel.rows import MAMBAS, SUBJECTS, found, other
from tests.tolerances import TOL

CONFIGS = SUBJECTS | MAMBAS
KEPT = {"moe.W_router", "moe.W_shared_gate", "mixer.W_dt"}
"""Matrices of blocks that stay in full."""
ATTENTION = {f"attn.W_{name}" for name in "QKVO"}
PLAIN = {"mlp.W_in", "mlp.W_out"}
MIXER = {f"mixer.W_{name}" for name in ("gate", "x", "B", "C", "O")}
ROUNDED = {
    "encoder": {f"blocks.{name}" for name in ATTENTION | PLAIN},
    "encoder-decoder": {f"{side}.blocks.{name}" for side in ("encoder", "decoder") for name in ATTENTION | PLAIN}
    | {f"decoder.blocks.cross.W_{name}" for name in "QKVO"},
    "vision transformer": {f"blocks.{name}" for name in ATTENTION | PLAIN},
    "a Mamba": {f"blocks.{name}" for name in MIXER | {"mixer.W_dt_in"}},
    "a Mamba-2": {f"blocks.{name}" for name in MIXER},
}  # fmt: skip
ROWS = [
    *(f"capture of {name}" for name in ("encoder-decoder", "vision transformer", "a Mamba", "a Mamba-2")),
    "generate with an encoder-decoder",
]
FAST = {"encoder-decoder", "a Mamba-2"}
each_structure = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ROUNDED]
)


def held(model):
    """A model in 4 bits."""
    return mj.models.quantize(model, 4, group=2)


def plain(model):
    """The same function in ordinary arrays."""
    return mj.models.dequantize(held(model))


def drawn(name):
    return other(CONFIGS[name], placements.alone(None))


def of_models(case, change):
    """The case, of which every model is changed and then put where it puts things."""
    put = case.put
    return case._replace(
        put=lambda value, axes=None: put(change(value) if isinstance(value, Model) else value, axes)
    )


def modules(tree):
    """(field or place in which it stands, module) for every module of a model."""
    own = (
        []
        if not dataclasses.is_dataclass(tree)
        else [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    )
    for name, inside in own:
        if isinstance(inside, eqx.Module):
            yield name, inside
            yield from modules(inside)


@pytest.mark.parametrize("name", CONFIGS)
def test_matrices__of_every_structure__are_the_fields_that_may_be_quantised(name):
    model = jax.eval_shape(
        lambda: build(CONFIGS[name], {p: jnp.zeros(s) for p, s in CONFIGS[name].shapes.items()})
    )
    may, all_of_them = set(), set()
    for owner, module in modules(model):
        for field in dataclasses.fields(module):
            kinds = {getattr(one, "array_type", None) for one in (field.type, *get_args(field.type))}
            may |= {f"{owner}.{field.name}"} if Quantized in kinds else set()
            if field.name.startswith("W_") and owner in ("attn", "cross", "mlp", "moe", "shared", "mixer"):
                all_of_them.add(f"{owner}.{field.name}")
    assert may == all_of_them - KEPT == {key for key in MATRICES if key in all_of_them}
    assert len(may) > 3


@each_structure
def test_quantize__every_structure__rounds_whole_sums_and_touches_nothing_else(name):
    model = drawn(name)
    few = mj.models.quantize(model)
    params, before = mj.models.parameters(few), mj.models.parameters(model)
    assert {path for path, leaf in params.items() if isinstance(leaf, Quantized)} == ROUNDED[name]
    for path, leaf in params.items():
        W = np.asarray(before[path], np.float64)
        if path not in ROUNDED[name]:
            assert_array_equal(leaf, before[path])
            continue
        own = path.rpartition(".")[2]
        summed = {"W_Q": (1,), "W_K": (1,), "W_V": (1,), "W_O": (1, 2) if W.ndim == 4 else (1,)}.get(
            own, (1,)
        )
        q, scale = by_hand(W, [1 if axis in summed else size for axis, size in enumerate(W.shape)], 127)
        assert_array_equal(leaf.numbers(jnp.int32), q)
        assert_allclose(leaf.scale, scale, **TOL["float32", "law"])


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_sites_edits_and_caches__of_a_quantised_model__are_those_of_arrays(row):
    case = placements.alone(None)
    ours, theirs, full = (
        found(row, of_models(case, change)) for change in (held, plain, lambda model: model)
    )
    for one, two in zip(ours, theirs, strict=True):
        assert_close(one, two, "sweep")
    assert any(
        one.shape != two.shape or np.abs(one - two).max() > 1e-3 for one, two in zip(ours, full, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_mesh__of_a_quantised_model__gives_what_one_device_gives(row):
    ours, theirs = (
        found(row, of_models(make(None), held)) for make in (placements.automatic, placements.alone)
    )
    placements.same(ours, theirs)


def inputs(name):
    """Tokens or pixels, drawn."""
    rng = np.random.default_rng(1)
    draw = lambda s: (
        rng.integers(0, 20, s.shape) if jnp.issubdtype(s.dtype, jnp.integer) else rng.standard_normal(s.shape)
    )
    return [jnp.asarray(draw(s), s.dtype) for s in CONFIGS[name].inputs(2, 5)]


@each_structure
@pytest.mark.slow
def test_gradients__of_a_quantised_model__reach_sites_scales_and_what_is_kept(name):
    model, given = drawn(name), inputs(name)
    total = lambda logits: jnp.tanh(logits).sum()
    sites = ["resid_pre", "resid_post"]
    (_, ours), (_, theirs) = (
        mj.value_and_grad_at(m, total, sites)(*given) for m in (held(model), plain(model))
    )
    for site in sites:
        assert np.abs(theirs[site]).max() > 1e-4
        assert_close(ours[site], theirs[site], "gradient")
    of_weights = mj.models.parameters(eqx.filter_grad(lambda m: total(m(*given)))(held(model)))
    for path in ROUNDED[name]:
        assert of_weights[path].q is None and np.abs(of_weights[path].scale).max() > 0
    first = "W_patch" if CONFIGS[name].reads_pixels else "W_E"
    assert np.abs(of_weights[first]).max() > 0


@each_structure
def test_files_and_plans__of_a_quantised_model__hold_few_bits(name, tmp_path):
    model = drawn(name)
    few = held(model)
    mj.save(few, tmp_path / "model")
    assert eqx.tree_equal(mj.restore(tmp_path / "model"), few)
    planned = mj.plan(CONFIGS[name], weights="int4", group=2)
    assert planned.param_bytes == nbytes(few) < nbytes(model) and planned.n_params == CONFIGS[name].n_params
    assert planned.dtype == "float32, int4"


@pytest.mark.slow
def test_provenance__of_results__tells_quantised_models_apart(tmp_path):
    model, (tokens,) = drawn("a Mamba-2"), inputs("a Mamba-2")
    metric, digests = mj.metrics.logit_diff(1, 2), []
    for of in (model, held(model), plain(model)):
        result = mj.patching.activation_patch(of, tokens, tokens[::-1], metric, site="resid_post")
        mj.save(result, tmp_path / str(len(digests)), model=of)
        (source,) = (
            one for one in mj.provenance(tmp_path / str(len(digests))).made_from if one.name == "model"
        )
        digests.append(source.digest)
    assert None not in digests and len(set(digests)) == 3


def test_quantize__what_structures_do_not_take__is_refused_by_name(tmp_path):
    odd = mj.models.MambaConfig(d_vocab=20, d_model=8, n_layers=1, d_inner=9, d_state=4)
    model = other(odd, placements.alone(None))
    with pytest.raises(
        ArgumentError, match=r"`blocks.mixer.W_(dt_in|B|C|O)` sums over 9 numbers, which is odd"
    ):
        mj.models.quantize(model, 4, group=2)
    with pytest.raises(
        ArgumentError, match=r"group=6 does not divide the (8|9) numbers.*`d_mlp` or `d_inner`"
    ):
        mj.models.quantize(model, 8, group=6)
    few = mj.models.quantize(model)
    with pytest.raises(ArgumentError, match="in few bits already"):
        mj.models.quantize(few)
    with pytest.raises(UnsupportedModelError, match=r"mj.models.dequantize\(model\)"):
        mj.export(few, tmp_path / "m", family="mamba")
