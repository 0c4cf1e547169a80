"""Tokenizers: prompts with masks, BOS as the checkpoint does it, words that are not there, chat."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mechjax.base.errors import CheckpointError, MissingExtraError, TokenError
from mechjax.base.prompts import Prompts
from mechjax.hub import Tokenizer

WORDS = ["When", "Mary", "and", "John", "went", "to", "the", "store", ",", "gave", "a", "drink"]


def words(unk: str | None = "<unk>") -> tokenizers.Tokenizer:
    """A word-level tokenizer that writes <bos> in front, as that of the shipped models."""
    vocab = {word: place for place, word in enumerate(["<pad>", "<bos>", "<unk>", *WORDS])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=unk))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    backend.add_special_tokens(["<pad>", "<bos>"])
    return backend


def bytes_level() -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" Mary Mary", " Mary"] * 9, trainer)
    return backend


def pieces() -> tokenizers.Tokenizer:
    """A SentencePiece-like tokenizer with `▁` for spaces, as Llama's."""
    vocab = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("▁Mary", -1.0),
        ("▁", -2.0),
        ("John", -2.0),
        ("▁John", -1.0),
        ("n", -4.0),
    ]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


@pytest.fixture(scope="module")
def word_level():
    return Tokenizer(words(), special={"bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<unk>"})


@pytest.fixture(scope="module")
def byte_level():
    return Tokenizer(bytes_level(), special={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})


def test_call__one_text__has_no_batch_axis(word_level):
    prompts = word_level("When Mary went")
    np.testing.assert_array_equal(prompts.tokens, [1, 3, 4, 7])
    assert prompts.tokens.dtype == jnp.int32
    assert prompts.mask.all()


@pytest.mark.parametrize(("side", "row"), [("right", [1, 4, 0, 0]), ("left", [0, 0, 1, 4])])
def test_call__several_texts__are_padded_and_masked(word_level, side, row):
    prompts = word_level(["When Mary went", "Mary"], side=side)
    np.testing.assert_array_equal(prompts.tokens, [[1, 3, 4, 7], row])
    np.testing.assert_array_equal(prompts.mask[1], np.asarray(row) != 0)
    np.testing.assert_array_equal(prompts.lengths, [4, 2])


def test_call__no_texts__is_an_empty_batch(word_level):
    assert word_level([]).tokens.shape == (0, 0)


def test_call__unknown_side__is_refused(word_level):
    with pytest.raises(TokenError, match="Padding stands on the `right` or the `left`, not on 'up'"):
        word_level(["a"], side="up")


@pytest.mark.parametrize(("bos", "ids"), [(None, [1, 4]), (True, [1, 4]), (False, [4])])
def test_bos__checkpoint_that_writes_it__is_obeyed_or_overridden(word_level, bos, ids):
    np.testing.assert_array_equal(word_level("Mary", bos=bos).tokens, ids)


@pytest.mark.parametrize(("bos", "first"), [(None, False), (True, True), (False, False)])
def test_bos__checkpoint_that_does_not_write_it__is_obeyed_or_overridden(byte_level, bos, first):
    tokens = byte_level(" Mary", bos=bos).tokens
    assert (tokens[0] == byte_level.bos_id) == first
    assert len(tokens) == 1 + first


def test_bos__written_in_the_text__is_text(byte_level):
    np.testing.assert_array_equal(
        byte_level("<|endoftext|> Mary", bos=False).tokens, byte_level(" Mary", bos=True).tokens
    )


def test_bos__none_named__is_refused():
    with pytest.raises(TokenError, match="this checkpoint names no BOS token"):
        Tokenizer(bytes_level())("Mary", bos=True)


def test_truncation_and_padding__of_the_file__are_switched_off():
    backend = words()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    assert Tokenizer(backend)("When Mary went to the store").tokens.shape == (7,)


@pytest.mark.parametrize("unk", ["<unk>", None])
def test_call__word_outside_the_vocabulary__is_named_with_its_place_and_close_words(unk):
    tokenizer = Tokenizer(words(unk))
    with pytest.raises(
        TokenError, match=r"`Marry` \(word 3 of the text, characters 9 to 14\).*Did you mean `Mary`"
    ):
        tokenizer("When the Marry went")
    with pytest.raises(
        TokenError, match=r"`xyzzy` \(word 2 of text 1, characters 5 to 10\) is outside the vocabulary"
    ):
        tokenizer(["Mary", "Mary xyzzy"])


def test_call__word_outside_a_unigram_vocabulary__is_named():
    with pytest.raises(TokenError, match=r"`Zed` \(word 2 of the text"):
        Tokenizer(pieces())("Mary Zed")


def test_call__the_unknown_token_itself__is_text():
    backend = words()
    backend.add_special_tokens(["<unk>"])
    np.testing.assert_array_equal(Tokenizer(backend)("Mary <unk>").tokens, [1, 4, 2])


def test_call__lone_surrogate__is_refused(byte_level):
    with pytest.raises(TokenError, match=r"'.*d800' is no valid Unicode text"):
        byte_level("\ud800")


def test_decode__ids_prompts_and_batches__are_texts(byte_level):
    prompts = byte_level([" Mary é", " Mary"])
    assert byte_level.decode(prompts) == [" Mary é", " Mary"]
    assert byte_level.decode(prompts.tokens[1, :1]) == " Mary"
    assert byte_level.decode([int(t) for t in byte_level(" Mary").tokens]) == " Mary"
    assert byte_level.decode([[0], [0, 0]]) == ["<|endoftext|>", "<|endoftext|><|endoftext|>"]


@pytest.mark.parametrize("bad", [-1, 10_000, 2**40])
def test_decode__id_outside__is_named(byte_level, bad):
    with pytest.raises(TokenError, match=f"Token id {bad} is not in the vocabulary, whose ids are 0 to"):
        byte_level.decode(np.asarray([0, bad]))


def test_decode__floats__are_refused(byte_level):
    with pytest.raises(TokenError, match="Token ids are integers; these have the dtype float64"):
        byte_level.decode([0.5])


def test_str_tokens__text_ids_and_prompts__are_the_same_pieces(word_level, byte_level):
    assert word_level.str_tokens("When Mary") == ["<bos>", "When", "Mary"]
    assert word_level.str_tokens("When Mary", bos=False) == ["When", "Mary"]
    assert word_level.str_tokens(["Mary", "John and"]) == [["<bos>", "Mary"], ["<bos>", "John", "and"]]
    assert word_level.str_tokens(word_level(["Mary", "John and"])) == [
        ["<bos>", "Mary"],
        ["<bos>", "John", "and"],
    ]
    assert word_level.str_tokens(np.asarray([4, 5])) == ["Mary", "and"]
    assert byte_level.str_tokens(" Mary Mary") == [" Mary", " Mary"]


def test_str_tokens__sentencepiece__keep_their_leading_space():
    assert Tokenizer(pieces()).str_tokens("Mary John") == [" Mary", " John"]


def test_token__one_token__is_its_id(word_level, byte_level):
    assert word_level.token(" Mary") == word_level.token("Mary") == 4
    assert byte_level.decode([byte_level.token(" Mary")]) == " Mary"


def test_token__several__shows_the_pieces_and_the_spelling_that_is_one(word_level, byte_level):
    with pytest.raises(TokenError, match=r"`Mary` is 2 tokens, not one: `Ma` `ry`. ` Mary`, with a leading"):
        byte_level.token("Mary")
    with pytest.raises(TokenError, match=r"`Mary John` is 2 tokens, not one: `Mary` `John`. Choose a word"):
        word_level.token("Mary John")
    with pytest.raises(TokenError, match=r"`` is 0 tokens, not one: nothing"):
        word_level.token("")
    with pytest.raises(
        TokenError, match=r"` Mary` is 2 tokens, not one: ` ` ` Mary`. `Mary`, without its leading"
    ):
        Tokenizer(_no_doubling()).token(" Mary")


def _no_doubling() -> tokenizers.Tokenizer:
    backend = pieces()
    backend.pre_tokenizer = None
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    return backend


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "{% generation %} {{ message['content'] | trim }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %} gave{% endif %}"
)
CHAT = [{"role": "user", "content": "Mary "}, {"role": "assistant", "content": "John"}]


def with_template(template: str | None) -> Tokenizer:
    return Tokenizer(words(), special={"bos_token": "<bos>"}, chat_template=template)


def test_chat__template__is_rendered_with_one_bos():
    assert with_template(TEMPLATE).str_tokens(with_template(TEMPLATE).chat(CHAT)) == [
        "<bos>",
        "Mary",
        "John",
        "gave",
    ]
    short = with_template(TEMPLATE).chat(CHAT, add_generation_prompt=False)
    np.testing.assert_array_equal(short.tokens, [1, 4, 6])


def test_chat__template_refuses__says_why():
    with pytest.raises(TokenError, match="cannot render these 1 messages: no role judge"):
        with_template(TEMPLATE).chat([{"role": "judge", "content": "Mary"}])


def test_chat__none__is_refused():
    with pytest.raises(TokenError, match="has no chat template: it is no chat model"):
        with_template(None).chat(CHAT)


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{% if %}",
    "{% include 'config.json' %}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_chat__hostile_template__is_refused(template):
    with pytest.raises(TokenError, match="The chat template cannot render"):
        with_template(template).chat(CHAT)


def test_chat__without_jinja__names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mechjax\[chat\]'"):
        with_template(TEMPLATE).chat(CHAT)


def write(folder, **files) -> None:
    words().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_folder__without_tokenizer__gives_none(tmp_path):
    assert Tokenizer.from_folder(tmp_path) is None


def test_folder__special_tokens_in_both_spellings__are_read(tmp_path):
    write(
        tmp_path,
        special_tokens_map={"bos_token": "<unk>", "unk_token": "<unk>"},
        tokenizer_config={"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": None},
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special == {"bos_token": "<bos>", "unk_token": "<unk>"}
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (1, 15)
    assert repr(tokenizer) == "Tokenizer(15 tokens, bos_token='<bos>', unk_token='<unk>')"


def test_folder__chat_template__own_file_wins_over_the_config(tmp_path):
    templates = [{"name": "tools", "template": "no"}, {"name": "default", "template": " Mary"}]
    write(tmp_path, tokenizer_config={"chat_template": templates})
    assert Tokenizer.from_folder(tmp_path).chat_template == " Mary"
    (tmp_path / "chat_template.jinja").write_text(" John")
    assert Tokenizer.from_folder(tmp_path).chat_template == " John"


@pytest.mark.parametrize("content", ["{}", "{", "\0"])
def test_folder__broken_tokenizer__is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer.json` is no valid tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_folder__special_token_that_is_no_text__is_refused(tmp_path):
    write(tmp_path, tokenizer_config={"bos_token": 3})
    with pytest.raises(CheckpointError, match="spells a special token as 3; a text was expected"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("make", [words, bytes_level, pieces])
def test_tokenizer__texts_with_and_without_bos__equals_transformers(tmp_path, make):
    transformers = pytest.importorskip("transformers")
    make().save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in ("Mary", " Mary John", "Mary  John"):
        np.testing.assert_array_equal(Tokenizer(make())(text).tokens, theirs(text)["input_ids"])


def test_chat__sandbox__equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=words(), bos_token="<bos>")
    theirs.chat_template = TEMPLATE
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    np.testing.assert_array_equal(with_template(TEMPLATE).chat(CHAT).tokens, expected)


def test_prompts__made_by_hand__are_taken_as_ids(word_level):
    prompts = Prompts(jnp.asarray([[4, 0]]), jnp.asarray([[True, False]]))
    assert word_level.decode(prompts) == ["Mary"]
