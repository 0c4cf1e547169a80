"""BERT and RoBERTa against transformers: both heads, pooled output, every site, padding; every parameter redrawn."""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import UnsupportedModelError
from mechjax.cli import main
from mechjax.models import Encoder, parameters
from mechjax.models.structures import build
from mechjax.studies.check import check
from mechjax.studies.hf_sites import hf_sites
from tests.parity.cases import assert_spelled, in_mechjax, module_values, redraw, torch, transformers
from tests.tolerances import TOL

N_BATCH, N_POS, N_LAYERS = 2, 7, 2
_SMALL = {
    "vocab_size": 31, "hidden_size": 24, "num_hidden_layers": N_LAYERS, "num_attention_heads": 3,
    "intermediate_size": 20, "max_position_embeddings": 19, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CASES = {
    "mlm": ("BertForMaskedLM", _SMALL),
    "mlm_untied": ("BertForMaskedLM", _SMALL | {"tie_word_embeddings": False, "hidden_act": "relu"}),
    "pretraining": ("BertForPreTraining", _SMALL | {"layer_norm_eps": 1e-2, "type_vocab_size": 3}),
    "bare": ("BertModel", _SMALL | {"hidden_act": "gelu_new"}),
    "roberta": (
        "RobertaForMaskedLM",
        _SMALL | {"pad_token_id": 1, "type_vocab_size": 1, "hidden_act": "silu"},
    ),
    "roberta_pad_0": ("RobertaForMaskedLM", _SMALL | {"pad_token_id": 0, "tie_word_embeddings": False}),
}
every_case = pytest.mark.parametrize("name", CASES)


@cache
def pair(name):
    """(in transformers, in mechjax, what both are called with)."""
    kind, given = CASES[name]
    config = transformers.RobertaConfig if kind.startswith("Roberta") else transformers.BertConfig
    hf = getattr(transformers, kind)(config(**given, attn_implementation="eager")).eval()
    rng = np.random.default_rng(list(name.encode()))
    redraw(hf, rng)
    tokens = rng.integers(2, 31, (N_BATCH, N_POS))  # no padding ids, which RoBERTa would skip as positions
    types = rng.integers(0, given.get("type_vocab_size", 2), (N_BATCH, N_POS))
    return hf, in_mechjax(hf), tokens, types


def theirs(name, **more):
    hf, _, tokens, types = pair(name)
    given = {"token_type_ids": types} | more
    with torch.no_grad():
        output = hf(torch.from_numpy(tokens), **{k: torch.from_numpy(v) for k, v in given.items()})
    return {key: value.numpy() for key, value in output.items() if isinstance(value, torch.Tensor)}


def assert_close(ours, right):
    """Equal, relative to the largest number."""
    unit = np.abs(right).max()
    assert_allclose(np.asarray(ours) / unit, right / unit, **TOL["float32", "parity"])


def outputs(encoded):
    """Ours by their names."""
    named = {
        "logits": encoded.logits, "prediction_logits": encoded.logits, "seq_relationship_logits": encoded.nsp_logits,
        "pooler_output": encoded.pooled, "last_hidden_state": encoded.resid,
    }  # fmt: skip
    return {name: value for name, value in named.items() if value is not None}


@every_case
def test_outputs__every_head__equal_transformers(name):
    _, model, tokens, types = pair(name)
    assert isinstance(model, Encoder)
    right = theirs(name)
    ours = outputs(model.encode(tokens, token_types=types))
    expected = {
        "pretraining": {"prediction_logits", "seq_relationship_logits"},
        "bare": {"last_hidden_state", "pooler_output"},
    }
    assert right.keys() == expected.get(name, {"logits"})
    for key, value in right.items():
        assert np.abs(value).max() > 0.1
        assert_close(ours[key], value)
    first = (
        "last_hidden_state" if name == "bare" else "prediction_logits" if name == "pretraining" else "logits"
    )
    assert_close(model(tokens, token_types=types), right[first])


@every_case
def test_sites__every_module_of_transformers__equal_its_hooks(name):
    hf, model, tokens, types = pair(name)
    _, acts = mj.capture(lambda m, t: m(t, token_types=types), list(mj.list_sites(model, tokens)))(
        model, tokens
    )
    found = hf_sites(hf, model.config, tokens, token_type_ids=types)
    for (site, layer), value in found.items():
        assert_close(acts[site] if layer is None else acts[site][layer], value)
    exposed = {
        "embed", "pos_embed", "token_type_embed", "ln_embed.normalized", "resid_pre", "attn_in", "q", "k", "v",
        "pattern", "z", "attn_out", "ln1.normalized", "mlp_in", "mlp_pre", "mlp_post", "mlp_out", "ln2.normalized",
        "resid_post",
    }  # fmt: skip
    exposed |= {"resid_mid"} | (set() if name == "bare" else {"ln_final.normalized", "logits"})
    exposed |= {"pretraining": {"pooled", "nsp_logits"}, "bare": {"pooled"}}.get(name, set())
    seen = module_values(hf, tokens, token_type_ids=types)
    assert_spelled(
        model, acts, {f"bert.{path}": value for path, value in seen.items()} if name == "bare" else seen
    )
    assert {site for site, _ in found} == exposed
    assert {layer for _, layer in found} == {None, *range(N_LAYERS)}
    assert_close(acts["resid_mid"], np.asarray(acts["ln1.normalized"]))
    written = acts["result"].sum(-2) + model.blocks.attn.b_O[:, None, None]
    assert_close(written, np.asarray(acts["attn_out"]))


@pytest.mark.parametrize("name", ["pretraining", "bare", "roberta"])
def test_padding__left_and_right__equals_transformers_at_real_positions(name):
    _, model, tokens, types = pair(name)
    masks = (np.arange(N_POS) >= np.array([[0], [3]]), np.arange(N_POS) < np.array([[N_POS], [4]]))
    for mask in masks:
        positions = np.maximum(mask.cumsum(-1) - 1, 0)
        right = theirs(
            name,
            attention_mask=mask.astype(np.int64),
            position_ids=positions + model.config.position_offset,
        )
        encoded = model.encode(tokens, mask=jnp.asarray(mask), token_types=types)
        first = (
            "logits"
            if name == "roberta"
            else "prediction_logits"
            if name == "pretraining"
            else "last_hidden_state"
        )
        assert_close(outputs(encoded)[first][mask], right[first][mask])
    if (
        name == "pretraining"
    ):  # transformers pools the first place, where padding may stand; ours the first token
        _, mask = masks
        assert_close(encoded.nsp_logits, right["seq_relationship_logits"])
        shift = model.encode(
            np.roll(tokens, 3, -1), mask=jnp.asarray(np.roll(mask, 3, -1)), token_types=np.roll(types, 3, -1)
        )
        assert_close(shift.nsp_logits[1], right["seq_relationship_logits"][1])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mlm", {"norm_eps": 0.1}),
        ("mlm", {"activation": "relu"}),
        ("mlm", {"attn_scale": 1.0}),
        ("mlm_untied", {"head_activation": "gelu"}),
        ("roberta", {"position_offset": 1, "n_ctx": 18}),
    ],
)
def test_control__a_choice_changed__changes_the_logits(name, changes):
    _, model, tokens, types = pair(name)
    leaves = jax.tree_util.tree_flatten_with_path(model)[0]
    params = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    changed = build(replace(model.config, **changes), params)
    assert np.abs(changed(tokens, token_types=types) - theirs(name)["logits"]).max() > 1e-3


def test_token_types__left_out__are_the_first():
    _, model, tokens, types = pair("pretraining")
    assert_close(
        model(tokens), theirs("pretraining", token_type_ids=np.zeros_like(types))["prediction_logits"]
    )
    assert np.abs(model(tokens) - model(tokens, token_types=types)).max() > 1e-3


def test_load__of_old_spellings_and_heads_that_are_not_used__gives_the_same(tmp_path):
    hf, whole, tokens, _ = pair("pretraining")
    hf.save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in tensors.items()}  # fmt: skip
    assert old.keys() != tensors.keys()
    safetensors.numpy.save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("BertForPreTraining", "BertForMaskedLM"))
    model, _ = mj.load(tmp_path)
    assert model.W_pool is None
    np.testing.assert_array_equal(model(tokens), whole(tokens))


@pytest.mark.parametrize("name", ["pretraining", "roberta"])
@pytest.mark.slow
def test_check__of_an_encoder__supports_every_row(name, tmp_path):
    pair(name)[0].save_pretrained(tmp_path)
    found = check(tmp_path)
    assert set(found.verdicts) == {"supported"}, found
    assert {"logits", "token_type_embed", "ln2.normalized", "sum of writes"} <= set(found.checks)
    assert "cache against full forward" not in found.checks  # it has none


FAMILY = {"mlm": "bert_mlm", "mlm_untied": "bert_mlm", "pretraining": "bert_pretraining", "bare": "bert"}


@every_case
def test_export__every_encoder__comes_back_bit_for_bit_and_opens_in_transformers(name, tmp_path):
    hf, model, tokens, types = pair(name)
    folder = mj.export(model, tmp_path / "m", family=FAMILY.get(name, "roberta_mlm"))
    back, _ = mj.load(folder)
    assert back.config == model.config
    for path, leaf in parameters(back).items():
        np.testing.assert_array_equal(leaf, parameters(model)[path])
    opened = type(hf).from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        given = torch.from_numpy(tokens), torch.from_numpy(types)
        ours, right = (side(given[0], token_type_ids=given[1]) for side in (opened, hf))
    for key, value in right.items():
        np.testing.assert_array_equal(ours[key].numpy(), value.numpy())


def test_export__encoder_as_a_decoder_and_the_reverse__is_refused(tmp_path):
    encoder = pair("bare")[1]
    with pytest.raises(
        UnsupportedModelError, match=r"gpt2 family is one of decoders; .* one of encoders: bert_mlm, "
    ):
        mj.export(encoder, tmp_path / "m", family="gpt2")
    decoder = mj.load("induction-2l")[0]
    with pytest.raises(
        UnsupportedModelError, match=r"bert family is one of encoders; .* one of decoders: gpt2, "
    ):
        mj.export(decoder, tmp_path / "m", family="bert")
    with pytest.raises(UnsupportedModelError, match="The bert_mlm family cannot express `mlm` = False"):
        mj.export(encoder, tmp_path / "m", family="bert_mlm")


def test_cli_patch__of_an_encoder__is_refused(tmp_path, capsys):
    folder = mj.export(pair("mlm")[1], tmp_path / "m", family="bert_mlm")
    words = ["--clean", "a", "--corrupt", "b", "--answer", "c", "--wrong", "d"]
    assert main(["patch", str(folder), *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search("ArgumentError: `.*` is one of the encoders.*Give `mechjax patch` a decoder", said)
