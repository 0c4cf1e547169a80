"""Models in few bits: every family and every method against the same model with ordinary arrays; what is refused."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import mechjax as mj
from mechjax.base.errors import ArgumentError, NeedsDecoderError, UnsupportedModelError
from mechjax.models.config import Config
from mechjax.models.encoder_config import EncoderConfig
from mechjax.models.first_layers import first_layers
from mechjax.models.load import build
from mechjax.models.quantized import holds_quantized, nbytes
from mechjax.models.rounding import is_matrix
from tests.models.rewrite.subjects import NAMES, TOKENS, assert_close, drawn, subject
from tests.parallel import placements
from tests.parallel.rows import PROMPTS, ROWS, found

SCHEMES = {8: None, 4: 2}
KL = {
    ("tasks-4l", "int8"): 1e-3,
    ("tasks-4l", "int4"): 0.2,
    ("induction-2l", "int8"): 1e-3,
    ("induction-2l", "int4"): 0.2,
}
"""Mean over tokens drawn at random; measured: 0.0003, 0.11, 0.0005, 0.10."""
FAST = {"experts", "latent"}
REWRITES = {"fold_norm", "center_unembed", "center_writing", "fold_value_bias", "refactor_qk_ov"}
REFUSED = REWRITES | {"quantize", "quantize in 4 bits", "dequantize"}
"""Rows that a quantised model refuses."""
DEFAULT = {"ov", "neuron_results"}


def marked(names, fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def sums_over_odd(config):
    """Whether a matrix sums over an odd number, which 4 bits refuse."""
    axis = lambda path: -3 if path.rpartition(".")[2] in ("W_Q", "W_K", "W_V", "W_UK", "W_UV") else -2
    return any(shape[axis(path)] % 2 for path, shape in config.shapes.items() if is_matrix(path))


def names():
    """Of every family and choice, those that run by default."""
    plain = [name if isinstance(name, str) else name.values[0] for name in NAMES]
    return marked(plain, FAST)


@pytest.mark.parametrize("name", names())
def test_quantize__every_family__equals_the_model_with_arrays(name):
    model = subject(name)
    for bits, group in SCHEMES.items():
        if bits == 4 and sums_over_odd(model.config):
            with pytest.raises(ArgumentError, match="which is odd: two of 4 bits share a byte"):
                mj.models.quantize(model, bits, group=group)
            continue
        held = mj.models.quantize(model, bits, group=group)
        plain = mj.models.dequantize(held)
        assert holds_quantized(held) and not holds_quantized(plain)
        assert jax.tree.structure(plain) == jax.tree.structure(model)
        assert_close(held(TOKENS), plain(TOKENS))
        assert np.abs(held(TOKENS) - model(TOKENS)).max() > 1e-4  # the control: something was rounded


@cache
def case(of):
    """The case of `rows`, of a quantised model or of its arrays."""
    made = placements.alone(None)
    held = mj.models.quantize(made.model, 4, group=4)
    return made._replace(model=held if of == "held" else mj.models.dequantize(held))


@pytest.mark.parametrize("name", marked([name for name in ROWS if name not in REFUSED], DEFAULT))
def test_method__of_a_quantised_model__gives_what_it_gives_of_arrays(name, tmp_path):
    sides = []
    for of in ("held", "plain"):
        (folder := tmp_path / of).mkdir()
        sides.append(found(name, case(of)._replace(folder=folder)))
    assert len(sides[0]) == len(sides[1])
    for ours, theirs in zip(*sides, strict=True):
        finite = np.isfinite(theirs)
        assert_array_equal(np.isfinite(ours), finite)
        if finite.any() and np.abs(theirs[finite]).max() > 0:
            assert_close(ours[finite], theirs[finite], "sweep")


@pytest.mark.parametrize("name", sorted(REWRITES))
def test_rewrite__of_a_quantised_model__says_what_to_do_first(name):
    with pytest.raises(UnsupportedModelError, match="Rewrite first and quantise then"):
        getattr(mj.models, name)(case("held").model)


@pytest.mark.slow
def test_encoder__in_few_bits__equals_the_model_with_arrays():
    config = EncoderConfig(
        d_vocab=23, n_ctx=8, d_model=8, n_layers=2, n_heads=2, d_mlp=6, pooler=True, nsp=True
    )
    keys = jax.random.split(jax.random.key(0), len(config.shapes))
    draw = lambda shape, key: 0.5 * jax.random.normal(key, shape)
    model = build(config, {p: draw(s, k) for (p, s), k in zip(config.shapes.items(), keys, strict=True)})
    held = mj.models.quantize(model, 4, group=2)
    ours, theirs = (m.encode(TOKENS) for m in (held, mj.models.dequantize(held)))
    jax.tree.map(assert_close, ours, theirs)
    assert np.abs(ours.logits - model.encode(TOKENS).logits).max() > 1e-3


@pytest.mark.slow
def test_gradients__of_a_quantised_model__reach_activations_and_what_is_kept():
    held, plain = case("held").model, case("plain").model
    total = lambda logits: jnp.tanh(logits).sum()
    _, ours = mj.value_and_grad_at(held, total, ["resid_pre", "z"])(PROMPTS[0])
    _, theirs = mj.value_and_grad_at(plain, total, ["resid_pre", "z"])(PROMPTS[0])
    for site in ("resid_pre", "z"):
        assert_close(ours[site], theirs[site], "gradient")
    of_weights = eqx.filter_grad(lambda model: total(model(PROMPTS[0])))(held)
    assert of_weights.blocks.attn.W_Q.q is None
    assert np.abs(of_weights.blocks.attn.W_Q.scale).max() > 0 and np.abs(of_weights.W_E).max() > 0


@pytest.mark.slow
def test_vmap__over_quantised_models__runs_each():
    model = case("plain").model
    both = [mj.models.quantize(jax.tree.map(lambda x, k=k: x * k, model)) for k in (1.0, 0.9)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *both)
    ours = eqx.filter_vmap(lambda model: model(jnp.asarray(PROMPTS[0])))(stacked)
    for row, one in zip(ours, both, strict=True):
        assert_close(row, one(PROMPTS[0]))


def test_first_layers__of_a_quantised_model__stay_in_few_bits():
    held = case("held").model
    cut = first_layers(held, 1)
    assert isinstance(cut.blocks.attn.W_Q, mj.models.Quantized) and len(cut.blocks.attn.W_Q) == 1
    assert_close(cut(PROMPTS[0]), first_layers(case("plain").model, 1)(PROMPTS[0]))


def test_parameters__of_a_quantised_model__come_back_by_assemble():
    held = case("held").model
    params = mj.models.parameters(held)
    assert params["blocks.attn.W_O"].bits == 4
    assert eqx.tree_equal(mj.models.assemble(held.config, params), held)


@pytest.mark.parametrize(
    ("name", "weights"),
    [pytest.param(*key, marks=() if key[0] == "tasks-4l" else pytest.mark.slow) for key in KL],
)
def test_quantize__models_that_ship__lose_little_and_load_as_rounded(name, weights):
    model, held = mj.load(name)[0], mj.load(name, weights=weights)[0]
    assert eqx.tree_equal(held, mj.models.quantize(model, int(weights[3:])))
    tokens = np.random.default_rng(0).integers(3, 1000, (8, 32))
    own, off = (jax.nn.log_softmax(m(tokens)) for m in (model, held))
    kl = float((jnp.exp(own) * (own - off)).sum(-1).mean())
    assert KL[name, weights] / 10 < kl < KL[name, weights]
    ratio = nbytes(held.blocks) / nbytes(model.blocks)
    assert ratio < {"int8": 0.28, "int4": 0.2}[weights]


@pytest.mark.slow
def test_load__onto_a_mesh__splits_numbers_and_scales_as_shard_does():
    mesh = mj.make_mesh(data=2, model=4)
    there = mj.load("tasks-4l", mesh=mesh, weights="int4")[0]
    here = mj.load("tasks-4l", weights="int4")[0]
    put = mj.shard(here, mesh)
    assert jax.tree.map(lambda x: x.sharding, there) == jax.tree.map(lambda x: x.sharding, put)
    assert there.blocks.mlp.W_in.q.sharding.spec[2] == "model" == there.blocks.mlp.W_in.scale.sharding.spec[2]
    assert there.blocks.attn.W_O.scale.sharding.spec[1] == "model"
    tokens = np.arange(24).reshape(4, 6) + 3
    assert_close(there(tokens), here(tokens))


@pytest.mark.slow
def test_shard__where_a_part_does_not_divide__keeps_it_whole():
    config = Config(d_vocab=16, n_ctx=8, d_model=16, n_layers=1, n_heads=4, d_head=4, d_mlp=16)
    held = mj.models.quantize(drawn(config), 8)
    put = mj.shard(held, mj.make_mesh(fsdp=8))
    assert put.blocks.mlp.W_in.q.sharding.spec[1] == "fsdp"
    assert tuple(put.blocks.mlp.W_in.scale.sharding.spec)[1:2] in ((), (None,))
    assert_close(put(PROMPTS[0] % 16), held(PROMPTS[0] % 16))


def test_plan__of_weights_in_few_bits__counts_what_is_held():
    for weights in ("int8", "int4"):
        held = mj.load("tasks-4l", weights=weights)[0]
        planned = mj.plan("tasks-4l", (2, 8), weights=weights)
        assert planned.n_params == mj.plan("tasks-4l", (2, 8)).n_params == mj.plan(held, (2, 8)).n_params
        assert planned.param_bytes == nbytes(held) == mj.plan(held, (2, 8)).param_bytes
        assert planned.dtype == f"float32, {weights}"
        dry = mj.dry_run(
            lambda model, ids: model(ids), held, jax.ShapeDtypeStruct((2, 8), jnp.int32), devices="v5e-4"
        )
        assert (dry.n_params, dry.param_bytes) == (planned.n_params, planned.param_bytes)
        assert dry.share.params < dry.param_bytes


@pytest.mark.slow
def test_provenance__of_results__tells_quantised_models_apart(tmp_path):
    metric, (clean, corrupt) = case("held").metric, PROMPTS
    digests = []
    for of in ("held", "plain"):
        result = mj.patching.activation_patch(case(of).model, clean, corrupt, metric, site="resid_pre")
        mj.save(result, tmp_path / of, model=case(of).model)
        assert_array_equal(mj.restore(tmp_path / of).scores, result.scores)
        (source,) = (one for one in mj.provenance(tmp_path / of).made_from if one.name == "model")
        digests.append(source.digest)
    assert None not in digests and digests[0] != digests[1]
    mj.save(case("held").model, tmp_path / "model")
    assert eqx.tree_equal(mj.restore(tmp_path / "model"), case("held").model)


@pytest.mark.parametrize("bits", marked(SCHEMES, {4}))
def test_forward__of_many_layers__makes_one_matrix_in_full_at_a_time(bits):
    config = Config(d_vocab=8, n_ctx=8, d_model=64, n_layers=16, n_heads=4, d_head=16, d_mlp=256)
    held = mj.models.quantize(drawn(config), bits)
    layer = 4 * 64 * 256  # bytes of the widest matrix of a layer
    temporary = lambda fn: eqx.filter_jit(fn).lower(held, jnp.zeros((1, 4), jnp.int32)).compile().compiled
    run = lambda model, ids: model(ids)
    ours = temporary(run).memory_analysis().temp_size_in_bytes
    control = (
        temporary(lambda model, ids: mj.models.dequantize(model)(ids)).memory_analysis().temp_size_in_bytes
    )
    assert ours < 4 * layer  # in float32; all layers' would be 16 times as much
    assert control > 16 * layer


def test_quantize__what_it_does_not_take__is_refused(tmp_path):
    held = case("held").model
    with pytest.raises(ArgumentError, match="in few bits already"):
        mj.models.quantize(held)
    with pytest.raises(ArgumentError, match="bits=2: weights are held in 8 bits or 4"):
        mj.models.quantize(case("plain").model, 2)
    with pytest.raises(ArgumentError, match="group=3 does not divide the 8 numbers"):
        mj.models.quantize(case("plain").model, 8, group=3)
    edited = mj.intervene(case("plain").model, [mj.zero("z")])
    for other, said in (
        (jnp.tanh, "needs mechjax's own decoder"),
        (edited, "takes a model itself, and got one inside"),
    ):
        with pytest.raises(NeedsDecoderError, match=f"`quantize` {said}"):
            mj.models.quantize(other)
        with pytest.raises(NeedsDecoderError, match=f"`dequantize` {said}"):
            mj.models.dequantize(other)
    with pytest.raises(UnsupportedModelError, match=r"mj.models.dequantize\(model\)"):
        mj.export(held, tmp_path / "m", family="mechjax")


def test_dequantize__of_ordinary_arrays__gives_them_back():
    model = case("plain").model
    assert eqx.tree_equal(mj.models.dequantize(model), model)
    again = mj.models.dequantize(mj.models.quantize(model, 4, group=4))
    assert_close(
        again.blocks.attn.W_Q, model.blocks.attn.W_Q
    )  # what is rounded already is not rounded further
