from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import ArgumentError, JitError, ShapeError, SiteError, TokenError
from mechjax.models import Cache, Config, assemble, init, parameters
from tests.tolerances import TOL


@pytest.fixture(scope="module")
def rich_model():
    """A decoder with what the tiny one lacks: rotation, windows, grouped keys, a gate, soft-caps."""
    config = Config(
        d_vocab=50, n_ctx=24, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, norm="rms", positions="rotary",
        mlp="gated", activation="silu", tied=False, unembed_bias=True, windows=(2, None, 4), attn_softcap=3.0,
        final_softcap=2.0,
    )  # fmt: skip
    model = init(config, key=jax.random.key(2))
    return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(3), leaf.shape), model)


@pytest.fixture(params=["tiny", "rich"])
def model(request, tiny_model, rich_model):
    return tiny_model if request.param == "tiny" else rich_model


def test_call__lists_arrays_prompts_and_extra_batch_axes__agree(tiny_model, tiny_tokens):
    logits = tiny_model(tiny_tokens)
    assert logits.shape == (4, 6, 50)
    assert_allclose(tiny_model(np.asarray(tiny_tokens).tolist()), logits, **TOL["any", "exact"])
    prompts = mj.Prompts(tiny_tokens, jnp.ones((4, 6), bool))
    assert_allclose(tiny_model(prompts), logits, **TOL["float32", "layout"])
    stacked = tiny_model(tiny_tokens.reshape(2, 2, 6))
    assert_allclose(stacked.reshape(4, 6, 50), logits, **TOL["float32", "layout"])
    assert_allclose(jax.vmap(tiny_model)(tiny_tokens), logits, **TOL["float32", "layout"])


def test_batch__of_none__gives_empty_logits_and_sites(model):
    none = jnp.zeros((0, 6), int)
    logits, acts = mj.capture(model, ["pattern", "resid_post"])(none, mask=none == 0)
    assert logits.shape == (0, 6, 50)
    assert acts["pattern"].shape == (3, 0, 4, 6, 6)


@pytest.mark.parametrize(
    "real", [slice(3, None), slice(None, -3), [1, 2, 5, 7]], ids=["left", "right", "scattered"]
)
def test_padding__anywhere__changes_no_real_position(model, tiny_tokens, real):
    mask = jnp.zeros(9, bool).at[np.arange(9)[real]].set(True)
    n_real = int(mask.sum())
    short = tiny_tokens[:, :n_real]
    padded = jnp.full((4, 9), 7).at[:, mask].set(short)
    expected = model(short)
    for filler in (padded, jnp.where(mask, padded, 31)):
        logits = model(filler, mask=jnp.broadcast_to(mask, (4, 9)))
        assert jnp.isfinite(logits).all()
        assert_allclose(logits[:, mask], expected, **TOL["float32", "layout"])
    if not mask[0]:  # with padding at the right, causality alone would do
        assert jnp.abs(model(padded)[:, mask] - expected).max() > 1e-3


def test_positions__given__replace_the_count(model, tiny_tokens):
    counted = jnp.broadcast_to(jnp.arange(6), (4, 6))
    assert_allclose(model(tiny_tokens, positions=counted), model(tiny_tokens), **TOL["float32", "layout"])
    shifted = model(tiny_tokens, positions=2 * counted)
    assert jnp.abs(shifted - model(tiny_tokens)).max() > 1e-4
    if model.config.positions == "learned":
        outside = model(tiny_tokens, positions=counted + 20)
        assert jnp.isnan(outside[:, 4:]).all()


def test_attention__softcap_window_and_mask__are_what_scores_say(rich_model, tiny_tokens):
    config = rich_model.config
    _, acts = mj.capture(rich_model, ["rot_q", "rot_k", "attn_scores", "pattern"])(tiny_tokens)
    keys = jnp.repeat(acts["rot_k"], 2, axis=-2)  # each key head serves two query heads
    raw = jnp.einsum("lbqhd,lbkhd->lbhqk", acts["rot_q"], keys) * config.attn_scale
    capped = config.attn_softcap * jnp.tanh(raw / config.attn_softcap)
    back = jnp.arange(6)[:, None] - jnp.arange(6)
    for layer, window in enumerate(config.windows):
        visible = (back >= 0) & (back < (window or 6))
        scores = acts["attn_scores"][layer]
        tolerance = TOL["float32", "layout"]
        assert_allclose(jnp.where(visible, scores - capped[layer], 0), jnp.zeros_like(scores), **tolerance)
        assert (jnp.where(visible, -jnp.inf, scores) <= jnp.finfo(jnp.float32).min).all()
        np.testing.assert_array_equal(acts["pattern"][layer] > 0, jnp.broadcast_to(visible, scores.shape))


def test_resume__with_windows_and_rotation__equals_the_whole_run(rich_model, tiny_tokens):
    logits, acts = mj.capture(rich_model, "resid_pre")(tiny_tokens)
    for layer in range(3):
        resumed = mj.resume(rich_model, layer)(acts["resid_pre"][layer])
        assert_allclose(resumed, logits, **TOL["float32", "layout"])


def test_rotary_pairs__are_halves_with_dimensions_interleaved(rich_model, tiny_tokens):
    order = jnp.array([0, 2, 1, 3])  # halves (i, i + 2) stand at pairs (2i, 2i + 1)
    queries_and_keys = lambda model: (model.blocks.attn.W_Q, model.blocks.attn.W_K,
                                      model.blocks.attn.b_Q, model.blocks.attn.b_K)  # fmt: skip
    paired = eqx.tree_at(
        queries_and_keys, rich_model, tuple(w[..., order] for w in queries_and_keys(rich_model))
    )
    config = replace(rich_model.config, rotary_layout="pairs")
    paired = assemble(config, parameters(paired))
    assert_allclose(paired(tiny_tokens), rich_model(tiny_tokens), **TOL["float32", "layout"])


def test_attention_only__blocks__write_nothing_but_attention(tiny_tokens):
    config = Config(d_vocab=50, n_ctx=24, d_model=16, n_layers=2, n_heads=2, mlp="none")
    model = init(config, key=jax.random.key(0))
    assert model.blocks.mlp is None
    assert model.blocks.ln2 is None
    _, acts = mj.capture(model, ["resid_pre", "attn_out", "resid_post", "ln_final.normalized"])(tiny_tokens)
    assert_allclose(acts["resid_post"], acts["resid_pre"] + acts["attn_out"], **TOL["float32", "layout"])
    for site in ("mlp_out", "mlp_in", "ln2.scale", "resid_mid"):
        with pytest.raises(SiteError, match=f"no site `{site}`: models with MLPs"):
            mj.capture(model, site)(tiny_tokens)


def test_tokens__out_of_range__are_refused_or_give_nan(tiny_model):
    for wrong in (50, -1):
        with pytest.raises(
            TokenError, match=f"Token id {wrong} is out of range: the model has 50 tokens, 0 to 49"
        ):
            tiny_model([[1, wrong]])
        logits = eqx.filter_jit(lambda model, tokens: model(tokens))(tiny_model, jnp.array([[1, wrong]]))
        assert jnp.isnan(logits[0, 1]).all()
        mask = jnp.array([[True, False]])
        assert jnp.isfinite(tiny_model([[1, wrong]], mask=mask)).all()  # as padding, any id will do


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (
            [[1, 2], [3]],
            ShapeError,
            r"Token lists of different lengths make no array. Pad them and pass `mask=`",
        ),
        ([[0.5]], TokenError, r"Token ids must be integers, got float64. Text goes through the tokenizer"),
        (["a cat"], TokenError, r"Token ids must be integers"),
        (np.array(3), ShapeError, r"need a shape \(\*batch, pos\) with at least one position, got \(\)"),
        ([[]], ShapeError, r"with at least one position, got \(1, 0\)"),
        ([list(range(25))], ShapeError, r"25 tokens, but the model has 24 learned positions"),
    ],
)
def test_tokens__of_wrong_kind_or_shape__are_refused(tiny_model, tokens, error, message):
    with pytest.raises(error, match=message):
        tiny_model(tokens)


def test_mask__of_another_shape__is_refused(tiny_model, tiny_tokens):
    with pytest.raises(ShapeError, match=r"`mask` has shape \(4, 5\), tokens have \(4, 6\)"):
        tiny_model(tiny_tokens, mask=jnp.ones((4, 5), bool))


def test_jit_of_a_model__is_refused_with_the_right_spelling(tiny_model, tiny_tokens):
    with pytest.raises(
        JitError, match=r"Use `equinox.filter_jit\(model\)\(\.\.\.\)`, or pass the model as an argument"
    ):
        jax.jit(tiny_model)(tiny_tokens)
    spelled_right = eqx.filter_jit(tiny_model)(tiny_tokens)
    assert_allclose(spelled_right, tiny_model(tiny_tokens), **TOL["float32", "law"])


def test_eager_calls__of_one_shape__compile_once(tiny_model, tiny_tokens, caplog):
    tiny_model(tiny_tokens)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        tiny_model(jnp.flip(tiny_tokens, 0))
        tiny_model(np.asarray(tiny_tokens)[::-1].tolist())
    assert not [line for line in caplog.messages if "_forward" in line]


@pytest.fixture(scope="module")
def seeing_all():
    """Not causal, without norms and positions: nothing tells an order of tokens from another."""
    config = Config(
        d_vocab=50, n_ctx=700, d_model=8, n_layers=2, n_heads=2, d_mlp=4, norms="none", positions="none", causal=False
    )  # fmt: skip
    model = init(config, key=jax.random.key(4))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(5), leaf.shape), model)


@pytest.mark.parametrize("length", [7, 700])
def test_not_causal__reordered_tokens__give_reordered_logits(seeing_all, length):
    tokens = jax.random.randint(jax.random.key(6), (2, length), 0, 50)
    logits = seeing_all(tokens)
    assert_allclose(seeing_all(tokens[:, ::-1])[:, ::-1], logits, **TOL["float32", "layout"])
    other = seeing_all(tokens.at[:, -1].set((tokens[:, -1] + 1) % 50))
    assert np.abs(other[:, 0] - logits[:, 0]).max() > 1e-4, "the first token sees the last"


def test_not_causal__padding_and_resume__change_no_real_position(seeing_all, tiny_tokens):
    real = jnp.array([True, False, True, True, False, True])
    mask = jnp.broadcast_to(real, tiny_tokens.shape)
    short = seeing_all(tiny_tokens[:, real])
    padded = seeing_all(tiny_tokens, mask=mask)[:, real]
    assert_allclose(padded, short, **TOL["float32", "layout"])
    acts = mj.capture(seeing_all, ["resid_pre", "pattern"])(tiny_tokens)[1]
    resumed = mj.resume(seeing_all, 1)(acts["resid_pre"][1])
    assert_allclose(resumed, seeing_all(tiny_tokens), **TOL["float32", "layout"])
    assert float(acts["pattern"].min()) > 0


def test_not_causal__cache_or_generation__is_refused(seeing_all, tiny_tokens):
    cache = Cache.empty(seeing_all.config, 4, 8)
    with pytest.raises(ArgumentError, match=r"not causal .* without a cache"):
        seeing_all(tiny_tokens, cache=cache)
    with pytest.raises(ArgumentError, match=r"not causal .* without a cache"):
        mj.generate(seeing_all, tiny_tokens, 2)


def test_no_norms__model__adds_up_to_its_logits(seeing_all, tiny_tokens):
    logits, acts = mj.capture(seeing_all, ["embed", "attn_out", "mlp_out"])(tiny_tokens)
    final = acts["embed"] + acts["attn_out"].sum(0) + acts["mlp_out"].sum(0)
    with jax.default_matmul_precision("highest"):
        assert_allclose(final @ seeing_all.W_E.T, logits, **TOL["float32", "layout"])
    with pytest.raises(SiteError, match=r"no site `ln_final.scale`: models with norms"):
        mj.capture(seeing_all, "ln_final.scale")(tiny_tokens)
