"""Models as Hugging Face folders: the same bits back, equal logits in transformers, whole or not at all."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from mechjax.base import atomic
from mechjax.base.errors import UnsupportedModelError, WriteError
from mechjax.hub import Tokenizer
from mechjax.models.config import Config
from mechjax.models.export import export
from mechjax.models.load import load
from mechjax.models.params import assemble, parameters
from tests.models.tiny_checkpoints import FAMILIES, tiny
from tests.tolerances import TOL

TOKENS = np.random.default_rng(0).integers(0, 20, (2, 7))


@pytest.fixture(scope="module")
def model():
    """A random model of GPT-2's choices."""
    config = Config(d_vocab=20, n_ctx=8, d_model=8, n_layers=2, n_heads=2, d_mlp=12)
    rng = np.random.default_rng(0)
    return assemble(
        config,
        {path: jnp.asarray(rng.standard_normal(shape, np.float32)) for path, shape in config.shapes.items()},
    )


@pytest.fixture(scope="module")
def tokenizer():
    named = ["When", "Mary", "and", "John", "went", "to", "the", "store"]
    words = ["<pad>", "<bos>", "<unk>", *named, *(f"w{i}" for i in range(9))]  # as many as the model has
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    special = {"bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return Tokenizer(backend, special=special, chat_template="{{ bos_token }}{{ messages[0].content }}")


def assert_same_bits(one, other) -> None:
    assert one.config == other.config
    one, other = parameters(one), parameters(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(np.asarray(leaf).view(np.uint8), np.asarray(other[path]).view(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_export__model_of_transformers__comes_back_bit_for_bit(tmp_path, family, dtype):
    tiny(family).save_pretrained(tmp_path / "theirs")
    loaded, _ = load(tmp_path / "theirs", dtype=dtype)
    assert_same_bits(load(export(loaded, tmp_path / "ours", family=family))[0], loaded)


def test_export__weights__may_be_read_by_whoever_may_read_the_config(tmp_path, model):
    folder = export(model, tmp_path / "m", family="gpt2")
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


@pytest.mark.parametrize("family", FAMILIES)
def test_export__opened_by_transformers__has_the_same_tensors_and_logits(tmp_path, family):
    import torch
    from transformers import AutoModelForCausalLM

    tiny(family).save_pretrained(tmp_path / "theirs")
    export(load(tmp_path / "theirs")[0], tmp_path / "ours", family=family)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(opened) is type(tiny(family))
    ours, theirs = opened.state_dict(), tiny(family).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with torch.no_grad():
        tokens = torch.tensor(TOKENS)
        np.testing.assert_allclose(
            opened(tokens).logits, tiny(family)(tokens).logits, **TOL["float32", "parity"]
        )


def test_export__own_model__opens_in_transformers_with_equal_logits(tmp_path, model, tokenizer):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    export(model, tmp_path / "m", family="gpt2", tokenizer=tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(model(TOKENS), expected, **TOL["float32", "parity"])
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "When Mary went to the store"
    np.testing.assert_array_equal(tokenizer(text).tokens, words(text)["input_ids"])
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, None)


def test_export__tokenizer__comes_back(tmp_path, model, tokenizer):
    _, back = load(export(model, tmp_path / "m", family="gpt2", tokenizer=tokenizer))
    assert (back.special, back.chat_template) == (tokenizer.special, tokenizer.chat_template)
    np.testing.assert_array_equal(back("Mary and John").tokens, tokenizer("Mary and John").tokens)


def test_export__unknown_family__suggests(tmp_path, model):
    with pytest.raises(
        UnsupportedModelError, match=r"no family `gtp2`; there are gpt2, .*Did you mean `gpt2`"
    ):
        export(model, tmp_path / "m", family="gtp2")


def test_export__family_that_cannot_express_the_model__names_the_fields(tmp_path, model):
    with pytest.raises(UnsupportedModelError, match=r"cannot express .*`norm` = 'layer'"):
        export(model, tmp_path / "m", family="llama")
    assert not list(tmp_path.iterdir())


def test_export__folder_with_files__is_kept_unless_overwritten(tmp_path, model):
    folder = tmp_path / "m"
    folder.mkdir()
    export(model, folder, family="gpt2")  # empty is fine
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(
        WriteError, match=r"exists and is not empty. Choose another folder, or pass overwrite=True"
    ):
        export(model, folder, family="gpt2")
    export(model, folder, family="gpt2", overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "mechjax.json",
        "model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_export__place_that_cannot_be_written__says_so(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"Cannot write .*Choose a .*writ"):
        export(model, tmp_path / "file" / "m", family="gpt2")


@pytest.mark.parametrize("step", ["write", "rename", "exchange"])
def test_export__fails_halfway__leaves_what_was_there_and_nothing_else(tmp_path, model, monkeypatch, step):
    folder = export(model, tmp_path / "m", family="gpt2")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace, renames = os.replace, []

    def write_fails(*_, **__):
        raise OSError("disk full")

    def second_rename_fails(source, target):
        renames.append(target)
        if len(renames) == 3:  # the first is of `mechjax.json`
            raise OSError("disk full")
        replace(source, target)

    def exchange_fails(*_):
        raise OSError("disk full")

    if step == "write":
        monkeypatch.setattr(safetensors.numpy, "save_file", write_fails)
    elif step == "exchange":
        monkeypatch.setattr(atomic, "_exchange", exchange_fails)
    else:  # where names cannot be exchanged
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
        monkeypatch.setattr(os, "replace", second_rename_fails)
    with pytest.raises(WriteError, match="disk full"):
        export(model, folder, family="gpt2", overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_export__config__names_the_dtype_and_no_foreign_token(tmp_path, model):
    written = json.loads((export(model, tmp_path / "m", family="gpt2") / "config.json").read_text())
    assert written["dtype"] == "float32"
    assert written["eos_token_id"] is None
