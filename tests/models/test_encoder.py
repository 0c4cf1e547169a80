"""An encoder by itself: its config, its refusals, edits, and that it is seen by the transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import ArgumentError, JitError, ShapeError, TokenError, UnsupportedModelError
from mechjax.models import EncoderConfig
from mechjax.models.families import config_from_hf
from mechjax.models.families.bert import ENCODERS
from mechjax.models.families.family import read_config, write_config
from mechjax.models.structures import build
from tests.tolerances import TOL

SMALL = {"d_vocab": 11, "n_ctx": 8, "d_model": 8, "n_layers": 2, "n_heads": 2, "d_mlp": 6}
TOKENS = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def model():
    config = EncoderConfig(**SMALL, pooler=True, nsp=True)
    keys = jax.random.split(jax.random.key(0), len(config.shapes))
    draw = lambda shape, key: 0.5 * jax.random.normal(key, shape)
    return build(config, {p: draw(s, k) for (p, s), k in zip(config.shapes.items(), keys, strict=True)})


def test_attention__of_an_encoder__sees_what_comes_after(model):
    changed = TOKENS.copy()
    changed[:, -1] = 0
    assert np.abs(model(changed)[:, 0] - model(TOKENS)[:, 0]).max() > 1e-4
    pattern = mj.capture(model, ["pattern"])(TOKENS)[1]["pattern"]
    assert (pattern > 0).all()
    assert_allclose(pattern.sum(-1), 1.0, **TOL["float32", "law"])


def test_intervene__on_a_normed_stream__replaces_what_follows(model):
    _, acts = mj.capture(model, ["resid_mid", "pooled"])(TOKENS)
    same = mj.intervene(model, [mj.replace("resid_mid", acts["resid_mid"][1], layer=1)])
    assert_allclose(same(TOKENS), model(TOKENS), **TOL["float32", "law"])
    other = mj.intervene(model, [mj.replace("resid_mid", acts["resid_mid"][0], layer=1)])
    assert np.abs(other(TOKENS) - model(TOKENS)).max() > 1e-3
    assert acts["pooled"].shape == (2, 8)


def test_encode__every_head__has_its_shape_and_padding_changes_no_real_position(model):
    encoded = model.encode(TOKENS)
    assert encoded.resid.shape == (2, 5, 8) and encoded.logits.shape == (2, 5, 11)
    assert encoded.pooled.shape == (2, 8) and encoded.nsp_logits.shape == (2, 2)
    padded = np.concatenate((np.full((2, 2), 99), TOKENS), 1)
    mask = jnp.asarray(np.arange(7) >= 2)[None].repeat(2, 0)
    left = model.encode(padded, mask=mask)
    assert_allclose(left.logits[:, 2:], encoded.logits, **TOL["float32", "layout"])
    assert_allclose(left.nsp_logits, encoded.nsp_logits, **TOL["float32", "layout"])
    assert "pooled" in repr(encoded)


def test_encode__one_text_or_any_leading_axes__gives_the_same_rows(model):
    rows = model.encode(TOKENS)
    assert_allclose(model.encode(TOKENS[0]).nsp_logits, rows.nsp_logits[0], **TOL["float32", "layout"])
    assert_allclose(model(TOKENS[None])[0], rows.logits, **TOL["float32", "layout"])
    assert model(TOKENS[:0]).shape == (0, 5, 11)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"token_types": np.zeros((2, 4), int)},
            ShapeError,
            r"`token_types` has shape \(2, 4\), tokens have \(2, 5\)",
        ),
        (
            {"token_types": np.full((2, 5), 2)},
            TokenError,
            r"Token type 2 is out of range: the model has 2 types",
        ),
    ],
)
def test_encoder__of_types_that_cannot_be__is_refused(model, given, error, message):
    with pytest.raises(error, match=message):
        model(TOKENS, **given)


def test_encoder__of_tokens_that_cannot_be__is_refused(model):
    with pytest.raises(TokenError, match=r"Token id 11 is out of range"):
        model([[11]])
    with pytest.raises(ShapeError, match=r"9 tokens, but the model has 8 learned positions"):
        model(np.ones((1, 9), int))
    with pytest.raises(JitError, match=r"A model cannot be hashed"):
        hash(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_types": 0}, r"`n_types` = 0 must be a whole number"),
        ({"nsp": True}, r"`nsp` = True reads the pooled output, so it needs `pooler` = True"),
        ({"norm": "rms"}, r"`norm` = 'rms': an encoder has only 'layer'"),
        ({"n_kv_heads": 1}, r"`n_kv_heads` = 1: an encoder has only 2"),
        ({"tied": 1}, r"`tied` = 1 must be True or False"),
        ({"mlm": "yes"}, r"`mlm` = 'yes' must be True or False"),
        ({"head_activation": "mish"}, r"`head_activation` = 'mish' is not one of"),
    ],
)
def test_encoder_config__of_what_encoders_do_not_have__is_refused(changes, message):
    with pytest.raises(ArgumentError, match=message):
        EncoderConfig(**SMALL, **changes)


BERT = {
    "architectures": ["BertForMaskedLM"], "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 6, "max_position_embeddings": 10,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"position_embedding_type": "relative_key"},
            r"`position_embedding_type` = 'relative_key'; implemented is only",
        ),
        ({"is_decoder": True}, r"`is_decoder` = True, which is not implemented for bert_mlm"),
        (
            {"architectures": ["RobertaForMaskedLM"], "pad_token_id": None},
            r"`pad_token_id` = None; RoBERTa counts",
        ),
        ({"embedding_size": 4}, r"unknown for bert_mlm: `embedding_size` = 4"),
    ],
)
def test_config__of_what_is_not_implemented__is_refused_by_name(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        config_from_hf(BERT | changes)


@pytest.mark.parametrize("family", ENCODERS, ids=lambda family: family.name)
def test_config__of_every_encoder__reads_back_from_what_it_writes(family):
    config = read_config(BERT | {"architectures": list(family.architectures), "type_vocab_size": 3}, family)
    assert isinstance(config, EncoderConfig)
    assert (config.n_types, config.nsp) == (3, family.name == "bert_pretraining")
    assert read_config(write_config(config, family), family) == config
