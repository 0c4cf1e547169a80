"""A Mamba by itself: its config, padding anywhere, pieces through a cache, its refusals, edits of its sites."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import (
    ArgumentError,
    CheckpointError,
    JitError,
    ShapeError,
    SiteError,
    TokenError,
    UnsupportedModelError,
)
from mechjax.models import MambaConfig, StateCache, parameters
from mechjax.models.families import config_from_hf
from mechjax.models.families.family import read_config, write_config
from mechjax.models.families.mamba import MAMBAS
from mechjax.models.recurrence import by_products, in_chunks, one_by_one
from mechjax.models.structures import build
from mechjax.store.calls import batch_of
from tests.tolerances import TOL

SMALL = {"d_vocab": 11, "d_model": 8, "n_layers": 2, "d_state": 3}
CONFIGS = {
    "mamba": MambaConfig(**SMALL, d_inner=12, dt_rank=2),
    "mamba2": MambaConfig(**SMALL, mixer="mamba2", d_inner=12, d_head=3, n_groups=2, dt_limit=(0.1, 5.0)),
}
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 9))
both = pytest.mark.parametrize("name", CONFIGS)


def drawn(config):
    rng = np.random.default_rng(1)
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape) / max(1, shape[-2:][0]) ** 0.5, jnp.float32)
    return build(config, {path: draw(shape) for path, shape in config.shapes.items()})


@pytest.fixture(scope="module")
def models():
    return {name: drawn(config) for name, config in CONFIGS.items()}


@both
def test_padding__anywhere_and_of_any_id__changes_no_real_position(models, name):
    model = models[name]
    mask = np.array([[0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0], [1] * 5 + [0] * 7 + [1] * 4], bool)
    padded = np.full(mask.shape, 99)
    padded[mask] = TOKENS.ravel()
    right = model(TOKENS)
    assert_allclose(
        model(padded, mask=jnp.asarray(mask))[mask], right.reshape(-1, 11), **TOL["float32", "layout"]
    )
    ignored = mj.add("delta", 1.0, pos=mj.per_example(np.array([4, 7])))  # at padding, where nothing moves
    out, acts = mj.capture(mj.intervene(model, [ignored]), ["state"])(padded, mask=jnp.asarray(mask))
    assert_allclose(out[mask], right.reshape(-1, 11), **TOL["float32", "layout"])
    states = np.asarray(acts["state"])
    assert_array_equal(states[:, 0, 5], states[:, 0, 8])
    assert_array_equal(states[:, 0, :2], 0)


@both
def test_cache__of_pieces_with_padding__gives_what_comes_at_once(models, name):
    model = models[name]
    cache, parts = StateCache.empty(CONFIGS[name], 2), []
    masks = [[1, 1, 0, 1], [1, 0, 1, 1]], [[0, 1, 1, 1], [1, 1, 1, 0]], [[1, 0, 1, 1], [1, 1, 0, 1]]
    for mask, piece in zip(np.array(masks, bool), np.split(TOKENS, 3, 1), strict=True):
        padded = np.zeros((2, 4), int)
        padded[mask] = piece.ravel()
        logits, cache = model(padded, mask=jnp.asarray(mask), cache=cache)
        parts.append(logits[mask].reshape(2, 3, -1))
    assert_allclose(np.concatenate(parts, 1), model(TOKENS), **TOL["float32", "layout"])
    with pytest.raises(ShapeError, match=r"with a cache of \(2,\): the batch axes must be equal"):
        model(TOKENS[0], cache=cache)


def test_recurrences__without_their_states__give_what_they_give_one_by_one():
    rng = np.random.default_rng(2)
    drawn = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    keep = lambda h, t: h

    def assert_same(found, right):
        for ours, theirs in zip(found, right, strict=True):
            assert_allclose(ours, theirs, **TOL["float32", "layout"])

    delta, A = jax.nn.softplus(drawn(2, 150, 4)), -jnp.exp(jnp.asarray([-3.0, 0.0, 2.0, 4.0]))
    x, B, C, state = drawn(2, 150, 4, 3), drawn(2, 150, 2, 5), drawn(2, 150, 2, 5), drawn(2, 4, 3, 5)
    wide = lambda v: jnp.repeat(v, 2, -2)[..., None, :]
    right = one_by_one((delta[..., None], x, wide(B), wide(C)), A[:, None, None], state, keep)
    assert_same(by_products(delta, x, B, C, A, state, CONFIGS["mamba2"]), right)
    rates, x, (B, C) = A[:, None] * jnp.arange(1.0, 6.0), x[..., 0], (v[..., 0, :] for v in (B, C))
    right = one_by_one((delta, x, B[..., None, :], C[..., None, :]), rates, state[:, :, 0], keep)
    assert_same(in_chunks(delta, x, B, C, rates, state[:, :, 0], CONFIGS["mamba"]), right)


def test_sites__edited__reach_what_comes_after_them_alone(models):
    names, edit = ["conv_in", "state", "mixer_out"], mj.scale("gate", 0.5, layer=0, pos=3)
    before, acts = mj.capture(models["mamba2"], names)(TOKENS)
    edited, after = mj.capture(mj.intervene(models["mamba2"], [edit]), names)(TOKENS)
    for name in ("conv_in", "state"):
        assert_allclose(after[name][0], acts[name][0], **TOL["float32", "law"])
    moved = np.abs(after["mixer_out"][0] - acts["mixer_out"][0]).max((0, 2)) > 1e-4
    assert moved.tolist() == [pos == 3 for pos in range(9)]
    assert_allclose(edited[:, :3], before[:, :3], **TOL["float32", "layout"])
    assert (np.abs(edited - before)[:, 3:].max(-1) > 1e-5).all()


@pytest.mark.parametrize("name", ["mamba", pytest.param("mamba2", marks=pytest.mark.slow)])
def test_generate__with_edits_and_captures__equals_the_whole_text_again(models, name):
    model, n = models[name], TOKENS.shape[1]
    mask = np.array([[0, 1, 1, 0, 1, 1, 1, 1, 1], [1] * 7 + [0] * 2], bool)
    edits = [
        mj.scale("gate", 0.5, layer=1), mj.zero("state", layer=0, pos=n + 1),
        mj.add("ssm_in", 1.0, layer=0, pos=[2, n + 2]), mj.scale("mixer_out", 0.3, layer=1, pos=mj.per_example([4, 1])),
    ]  # fmt: skip
    sites = ["state", "resid_post"]
    timed = mj.models.at_steps(mj.add("resid_pre", 0.5, layer=1), [0, 3])
    found = mj.generate(model, TOKENS, 5, mask=jnp.asarray(mask), edits=[*edits, timed], capture=sites)
    same = [*edits, mj.add("resid_pre", 0.5, layer=1, pos=[n, n + 3])]
    text = found.whole
    logits, acts = mj.run(model, text.tokens[:, :-1], mask=text.mask[:, :-1], edits=same, capture=sites)
    last = np.array([n - 1, 6])  # each prompt's last real token
    logits = np.stack([[row[at], *row[n:]] for row, at in zip(np.asarray(logits), last, strict=True)])
    assert_array_equal(logits.argmax(-1), found.tokens)
    right = np.take_along_axis(jax.nn.log_softmax(logits, -1), np.asarray(found.tokens)[..., None], -1)
    assert_allclose(found.log_probs, right[..., 0], **TOL["float32", "layout"])
    for site in sites:
        assert_allclose(found.prompt_acts[site], acts[site][:, :, :n], **TOL["float32", "layout"])
        assert_allclose(found.acts[site], acts[site][:, :, n:], **TOL["float32", "layout"])
    unedited = mj.generate(model, TOKENS, 5, mask=jnp.asarray(mask))
    assert np.abs(unedited.log_probs - found.log_probs).max() > 1e-3


def test_generate__stopped_or_drawn__goes_on_as_one_token_at_a_time(models):
    model, key = models["mamba"], jax.random.key(0)
    free = mj.generate(model, TOKENS, 6, key=key, temperature=1.0, top_k=4)
    stop = int(free.tokens[0, 2])
    found = mj.generate(model, TOKENS, 6, key=key, temperature=1.0, top_k=4, stop=stop)
    for row in range(2):
        kept = np.asarray(free.tokens[row])
        length = next((i + 1 for i, token in enumerate(kept) if token == stop), 6)
        assert found.lengths[row] == length
        assert_array_equal(found.tokens[row], [*kept[:length], *[stop] * (6 - length)])
    logits = np.asarray(model(np.concatenate((TOKENS, free.tokens), 1)))[:, 8:-1]
    ranks = (logits > np.take_along_axis(logits, np.asarray(free.tokens)[..., None], -1)).sum(-1)
    assert ranks.max() < 4 and ranks.max() > 0
    with pytest.raises(
        ArgumentError, match="`decoder_prompts` are those of an encoder-decoder; a Mamba goes on"
    ):
        mj.generate(model, TOKENS, 2, decoder_prompts=TOKENS)
    with pytest.raises(SiteError, match=r"state.*pos 13 is out of range"):
        mj.generate(model, TOKENS, 5, edits=[mj.zero("state", pos=13)])


def test_call__any_leading_axes_jit_and_vmap__give_the_same_rows(models):
    model = models["mamba"]
    rows = model(TOKENS)
    assert_allclose(model(TOKENS[0]), rows[0], **TOL["float32", "layout"])
    assert_allclose(jax.vmap(lambda t: model(t))(jnp.asarray(TOKENS)), rows, **TOL["float32", "layout"])
    assert model(TOKENS[:0]).shape == (0, 9, 11)
    wrong = eqx.filter_jit(model)(jnp.asarray(TOKENS).at[0, 4].set(11))
    assert np.isnan(wrong[0, 4:]).all() and np.isfinite(wrong[0, :4]).all() and np.isfinite(wrong[1]).all()


def test_call__of_what_cannot_be__is_refused(models):
    model = models["mamba2"]
    with pytest.raises(TokenError, match=r"Token id 11 is out of range"):
        model([[11]])
    with pytest.raises(ShapeError, match=r"`mask` has shape \(2, 4\)"):
        model(TOKENS, mask=jnp.ones((2, 4), bool))
    with pytest.raises(JitError, match=r"A model cannot be hashed"):
        hash(model)
    with pytest.raises(SiteError, match=r"no site `delta_latent`: Mamba"):
        mj.capture(model, ["delta_latent"])(TOKENS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_conv": 0}, r"`d_conv` = 0 must be a whole number"),
        ({"n_heads": 2}, r"`n_heads` = 2: a mamba has none, leave it out"),
        ({"mixer": "mamba2", "dt_rank": 2}, r"`dt_rank` = 2: a mamba2 has none"),
        ({"mixer": "mamba2", "d_inner": 12, "d_head": 5}, r"2 heads of `d_head` = 5 are 10 channels, but `d_inner` = 12"),
        ({"mixer": "mamba2", "d_inner": 12, "d_head": 4, "n_groups": 2}, r"`n_heads` = 3 is no multiple of `n_groups`"),
        ({"dt_limit": (0.1, 1.0)}, r"`dt_limit` = \(0.1, 1.0\): a mamba has only \(0.0, inf\)"),
        ({"mixer": "mamba2", "d_head": 4, "dt_limit": (1.0, 0.5)}, r"`dt_limit` = \(1.0, 0.5\) must be two numbers"),
        ({"mixer": "mamba2", "d_head": 4, "mixer_norm_eps": 1.0}, r"`mixer_norm_eps` = 1.0: a mamba2 has only None"),
        ({"mixer_norm_eps": -1.0}, r"`mixer_norm_eps` = -1.0 must be a positive"),
        ({"norm": "layer"}, r"`norm` = 'layer': a mamba has only 'rms'"),
        ({"mixer": "s4"}, r"`mixer` = 's4' is not one of 'mamba', 'mamba2'"),
        ({"tied": 1}, r"`tied` = 1 must be True or False"),
        ({"d_model": 2**28, "n_layers": 2**16}, r"A config of .* parameters is refused"),
    ],
)  # fmt: skip
def test_config__of_what_cannot_be__is_refused(changes, message):
    with pytest.raises(ArgumentError, match=message):
        MambaConfig(**SMALL | changes)


HF = {
    "architectures": ["MambaForCausalLM"], "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 3,
}  # fmt: skip
HF2 = HF | {"architectures": ["Mamba2ForCausalLM"], "num_heads": 4, "head_dim": 4, "n_groups": 1}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (HF | {"ssm_kind": "s5"}, UnsupportedModelError, r"unknown for mamba: `ssm_kind` = 's5'"),
        (HF | {"hidden_act": "mish"}, UnsupportedModelError, r"`hidden_act` = 'mish'"),
        (HF | {"expand": -1}, UnsupportedModelError, r"`expand` = -1; it must be a positive number"),
        (
            HF | {"time_step_rank": "some"},
            UnsupportedModelError,
            r"`time_step_rank` = 'some'; it must be a whole",
        ),
        (HF2 | {"time_step_limit": [0.5]}, ArgumentError, r"`dt_limit` = \(0.5,\) must be two numbers"),
        (HF2 | {"expand": 3}, ArgumentError, r"16 channels, but `d_inner` = 24"),
        (HF | {"state_size": 2**40}, ArgumentError, r"`d_state` = 1099511627776 must be a whole number"),
    ],
)
def test_config__of_hugging_face_that_is_not_implemented__is_refused_by_name(given, error, message):
    with pytest.raises(error, match=message):
        config_from_hf(given)


@pytest.mark.parametrize("family", MAMBAS, ids=lambda family: family.name)
def test_config__of_every_family__reads_back_from_what_it_writes(family):
    given = (HF2 if family.name == "mamba2" else HF) | {"architectures": list(family.architectures)}
    if family.name == "mamba2":
        given = given | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    config = read_config(given | {"expand": 2, "chunk_size": 7, "conv_kernel": 3}, family)
    assert (config.d_inner, config.d_conv, config.source) == (16, 3, family.name)
    assert read_config(write_config(config, family), family) == config


def test_export__as_another_family__is_refused(models, tmp_path):
    with pytest.raises(
        UnsupportedModelError, match=r"gpt2 family is one of decoders; .* state space models: mamba, mamba2"
    ):
        mj.export(models["mamba"], tmp_path / "m", family="gpt2")
    with pytest.raises(UnsupportedModelError, match=r"The mamba2 family cannot express"):
        mj.export(models["mamba"], tmp_path / "m", family="mamba2")


def test_load__of_weights_that_are_missing_or_left_over__is_refused(models, tmp_path):
    folder = mj.export(models["mamba"], tmp_path / "m", family="mamba")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"use_conv_bias": true', '"use_conv_bias": false'))
    with pytest.raises(CheckpointError, match=r"holds 2 tensors that a mamba model .*conv1d.bias"):
        mj.load(folder)
    (folder / "config.json").write_text(config.replace('"use_bias": false', '"use_bias": true'))
    with pytest.raises(CheckpointError, match=r"lacks 4 tensors .*in_proj.bias"):
        mj.load(folder)


def test_plan__of_a_config_and_a_model__counts_its_parameters(models):
    planned = mj.plan(CONFIGS["mamba"], (2, 9), capture=["state"])
    assert planned.n_params == sum(x.size for x in parameters(models["mamba"]).values())
    assert planned.captured[0].shape == (2, 2, 9, 12, 3)
    assert next(site for site in planned.sites if site.name == "state").on_request
    assert mj.dry_run(lambda model, t: model(t), models["mamba2"], jnp.asarray(TOKENS)).n_params > 0


def test_depth__of_a_thousand_layers__makes_no_longer_program(models):
    size = lambda model: len(str(jax.make_jaxpr(lambda m, t: m(t))(model, TOKENS)))
    deep = dataclasses.replace(CONFIGS["mamba"], n_layers=1000)
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in deep.shapes.items()}
    shapes = jax.eval_shape(lambda params: build(deep, params), shapes)
    assert size(shapes) < 1.1 * size(models["mamba"])


def test_store__of_states_and_packed_documents__gives_rows_and_refuses(models, tmp_path):
    prompts = mj.Prompts(jnp.asarray(TOKENS), jnp.asarray(np.arange(9) >= np.array([[0], [2]])))
    store = mj.store.write(tmp_path / "s", models["mamba"], [prompts], ["state", "mixer_out"], layers=[1])
    _, acts = mj.capture(models["mamba"], ["state"], layers=[1])(prompts)
    right = np.asarray(acts["state"][0])[np.asarray(prompts.mask)].reshape(16, -1)
    assert_allclose(store.rows(slice(None), "state", layer=1), right, **TOL["float32", "law"])
    with pytest.raises(
        ArgumentError, match=r"Packed documents go by the positions of their tokens, and a Mamba has none"
    ):
        batch_of(models["mamba"], _Packed(prompts), skip_first=False)


class _Packed:
    """Prompts with positions."""

    def __init__(self, prompts):
        self.prompts, self.positions = prompts, jnp.zeros((2, 9), jnp.int32)
