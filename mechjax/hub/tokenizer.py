"""Text to tokens and back, as the checkpoint's own tokenizer.json does it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Int

from mechjax.base.errors import CheckpointError, TokenError, did_you_mean
from mechjax.base.prompts import Prompts
from mechjax.hub.chat import render_chat
from mechjax.hub.folder import inside
from mechjax.hub.json_files import read_object

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A tokenizer that returns `Prompts`, so that no mask is forgotten.

    The beginning-of-sequence token stands where the checkpoint's own post-processor puts it; `bos=` overrides.

    Attributes:
        backend: The `tokenizers.Tokenizer` that does the work.
        special: The named special tokens (`bos_token`, `eos_token`, `pad_token`, `unk_token`) that there are.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ):
        """Wrap `backend`; what it would truncate or pad by itself is switched off."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special = dict(special or {})
        self.chat_template = chat_template
        self._unk = _unknown_id(backend)

    @classmethod
    def from_folder(cls, folder: Path | str) -> "Tokenizer | None":
        """The tokenizer of a checkpoint folder, or None where it has no tokenizer.json.

        Raises:
            CheckpointError: A tokenizer file that is broken, or a link that leaves the folder.
        """
        folder = Path(folder)
        if not (folder / TOKENIZER).is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(inside(folder, TOKENIZER)))
        except CheckpointError:
            raise
        except Exception as error:  # the Rust library raises bare Exception
            raise CheckpointError(
                f"`{folder / TOKENIZER}` is no valid tokenizer: {error}. Download it again."
            ) from None
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", TOKENIZER_CONFIG):  # the latter wins, as in transformers
            if (folder / name).is_file():
                config |= read_object(inside(folder, name))
        special = {name: _content(config[name]) for name in _SPECIAL if config.get(name)}
        template = folder / "chat_template.jinja"
        if template.is_file():
            return cls(
                backend, special=special, chat_template=inside(folder, template.name).read_text("utf-8")
            )
        return cls(backend, special=special, chat_template=_default_template(config.get("chat_template")))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides which tokens a text has."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, or None where the checkpoint names none."""
        return self.special_id("bos_token")

    def special_id(self, *names: str) -> int | None:
        """Id of the first of the named special tokens (such as `"eos_token"`) that there is, or None."""
        found = (self.backend.token_to_id(self.special[name]) for name in names if name in self.special)
        return next((token for token in found if token is not None), None)

    def __call__(self, text: str | Sequence[str], *, bos: bool | None = None, side: str = "right") -> Prompts:
        """Tokenize one text (axes `pos`) or several (axes `batch pos`, padded, the padding masked).

        Args:
            text: A text, or a list of texts.
            bos: None as the checkpoint does it; True with exactly one BOS in front; False without.
            side: Where padding stands, "right" or "left".

        Raises:
            TokenError: A word outside the vocabulary, or `bos=True` where there is no BOS token.
        """
        if side not in ("right", "left"):
            raise TokenError(f"Padding stands on the `right` or the `left`, not on {side!r}.")
        if isinstance(text, str):
            ids = self._encode(text, bos)
            return Prompts(jnp.asarray(ids, jnp.int32), jnp.ones(len(ids), bool))
        rows = [self._encode(one, bos, which) for which, one in enumerate(text)]
        longest = max(map(len, rows), default=0)
        tokens = np.full((len(rows), longest), self.special_id("pad_token", "eos_token") or 0, np.int32)
        mask = np.zeros((len(rows), longest), bool)
        for row, ids in enumerate(rows):
            place = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
            tokens[row, place], mask[row, place] = ids, True
        return Prompts(jnp.asarray(tokens), jnp.asarray(mask))

    def decode(
        self, ids: Prompts | Int[Array, "*batch pos"] | Int[np.ndarray, "*batch pos"] | Sequence[Any]
    ) -> Any:
        """The text of one row of ids, or a list of texts for several; the padding of `Prompts` is left out."""
        rows = _rows(ids)
        if isinstance(rows, np.ndarray):
            return self.backend.decode(self._checked(rows), skip_special_tokens=False)
        return [self.decode(row) for row in rows]

    def str_tokens(
        self,
        text: str | Sequence[Any] | Prompts | Int[Array, "*batch pos"] | Int[np.ndarray, "*batch pos"],
        *,
        bos: bool | None = None,
    ) -> list[Any]:
        """The pieces of a text (or of ids), one string per token with its leading space; a list for each of several."""
        if isinstance(text, str):
            return [self._piece(token) for token in self._encode(text, bos)]
        if isinstance(text, Sequence) and all(isinstance(one, str) for one in text):
            return [self.str_tokens(one, bos=bos) for one in text]
        rows = _rows(text)
        if isinstance(rows, np.ndarray):
            return [self._piece(token) for token in self._checked(rows)]
        return [self.str_tokens(row) for row in rows]

    def token(self, text: str) -> int:
        """The id of a text that is exactly one token, such as `" Mary"`.

        Raises:
            TokenError: It is several tokens (or none); the message shows the pieces.
        """
        ids = self._encode(text, bos=False, plain=True)
        if len(ids) == 1:
            return ids[0]
        pieces = " ".join(f"`{self._piece(token)}`" for token in ids) or "nothing"
        other = text[1:] if text.startswith(" ") else f" {text}"
        single = len(self._encode(other, bos=False, plain=True)) == 1
        space = "without its leading space" if text.startswith(" ") else "with a leading space"
        hint = f"`{other}`, {space}, is one token." if single else "Choose a word that is one token."
        raise TokenError(f"`{text}` is {len(ids)} tokens, not one: {pieces}. {hint}")

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> Prompts:
        """The tokens of a conversation, laid out by the folder's chat template (axes `pos`).

        Args:
            messages: `{"role": "user", "content": "..."}` and so on, in order.
            add_generation_prompt: Whether the tokens end where the assistant's answer begins.

        Raises:
            TokenError: The folder has no template, or the template refuses the messages.
            MissingExtraError: Jinja is not installed.
        """
        if self.chat_template is None:
            raise TokenError(
                "This checkpoint has no chat template: it is no chat model. Call `tokenizer(text)`."
            )
        text = render_chat(
            self.chat_template, messages, add_generation_prompt=add_generation_prompt, special=self.special
        )
        ids = self._encode(text, bos=None, plain=True)  # the template writes BOS itself
        return Prompts(jnp.asarray(ids, jnp.int32), jnp.ones(len(ids), bool))

    def settings(self) -> dict[str, Any]:
        """What tokenizer_config.json says of this tokenizer, for transformers."""
        template = {"chat_template": self.chat_template} if self.chat_template else {}
        return {"tokenizer_class": "PreTrainedTokenizerFast", **self.special, **template}

    def __repr__(self) -> str:
        named = ", ".join(f"{name}={token!r}" for name, token in self.special.items())
        return f"Tokenizer({self.vocab_size:,} tokens{', ' + named if named else ''})"

    def _encode(
        self, text: str, bos: bool | None, which: int | None = None, *, plain: bool = False
    ) -> list[int]:
        """Ids of one text. `plain` leaves out what the post-processor adds; `which` is the text's place in a list."""
        try:
            encoding = self.backend.encode(text, add_special_tokens=not plain)
        except (TypeError, UnicodeEncodeError):
            raise TokenError(f"{text!r:.80} is no valid Unicode text, so it has no tokens.") from None
        # The Rust library's own class: a word outside a vocabulary that has no token for such words.
        except Exception as error:
            raise TokenError(self._unknown(text, self._missing_word(text), which, str(error))) from None
        for token, span in zip(encoding.ids, encoding.offsets, strict=True):
            if token == self._unk != self.backend.token_to_id(text[slice(*span)].strip()):
                raise TokenError(self._unknown(text, span, which))
        ids = list(encoding.ids)
        if plain or bos is None:
            return ids
        if self.bos_id is None:
            if bos:
                raise TokenError("bos=True, but this checkpoint names no BOS token. Leave `bos` out.")
            return ids
        added = bool(ids) and ids[0] == self.bos_id and encoding.special_tokens_mask[0] == 1
        return [self.bos_id, *ids] if bos and not added else ids[1:] if added and not bos else ids

    def _missing_word(self, text: str) -> tuple[int, int]:
        """Where the first word that the vocabulary lacks stands in `text`."""
        splitter = self.backend.pre_tokenizer
        words = splitter.pre_tokenize_str(text) if splitter else [(text, (0, len(text)))]
        return next((span for word, span in words if self.backend.token_to_id(word) is None), (0, len(text)))

    def _unknown(self, text: str, span: tuple[int, int], which: int | None, cause: str = "") -> str:
        """What to say of the word at `span`, which the vocabulary lacks."""
        word = text[slice(*span)].strip()
        place = (
            f"word {len(text[: span[0]].split()) + 1} of {'the text' if which is None else f'text {which}'}"
        )
        words = {piece.lstrip("Ġ▁") for piece in self.backend.get_vocab()}
        return (
            f"`{word}` ({place}, characters {span[0]} to {span[1]}) is outside the vocabulary of {self.vocab_size:,} "
            f"tokens.{did_you_mean(word, words)} Use words of the vocabulary: `tokenizer.backend.get_vocab()`."
            + (f" ({cause})" if cause and word == text else "")
        )

    def _piece(self, token: int) -> str:
        """The text of one token; SentencePiece's decoders drop the leading space that its `▁` stands for."""
        text = self.backend.decode([token], skip_special_tokens=False)
        spaced = (self.backend.id_to_token(token) or "").startswith("▁")
        return f" {text}" if spaced and not text.startswith(" ") else text

    def _checked(self, ids: Int[np.ndarray, " pos"]) -> list[int]:
        """The ids as Python ints, all of them in the vocabulary."""
        row = [int(token) for token in ids]
        known = ((0 <= token < 1 << 31) and self.backend.id_to_token(token) is not None for token in row)
        bad = next((token for token, ok in zip(row, known, strict=True) if not ok), None)
        if bad is not None:
            raise TokenError(
                f"Token id {bad} is not in the vocabulary, whose ids are 0 to {self.vocab_size - 1}."
            )
        return row


def _unknown_id(backend: tokenizers.Tokenizer) -> int | None:
    """Id that the model gives to what its vocabulary lacks, or None where there is no such token."""
    if isinstance(backend.model, tokenizers.models.Unigram):  # which does not show it otherwise
        return json.loads(backend.to_str())["model"]["unk_id"]
    token = getattr(backend.model, "unk_token", None)
    return backend.token_to_id(token) if token else None


def _rows(ids: Any) -> Any:
    """Ids as one integer row, or a list of what the leading axis holds."""
    if isinstance(ids, Prompts):
        if ids.tokens.ndim == 1:
            return np.asarray(ids.tokens)[np.asarray(ids.mask)]
        return [Prompts(tokens, mask) for tokens, mask in zip(ids.tokens, ids.mask, strict=True)]
    if isinstance(ids, Sequence) and any(np.ndim(row) for row in ids):
        return list(ids)  # rows of different lengths
    row = np.atleast_1d(np.asarray(ids))
    if row.size and not np.issubdtype(row.dtype, np.integer):
        raise TokenError(f"Token ids are integers; these have the dtype {row.dtype}.")
    return row if row.ndim == 1 else list(row)


def _content(token: Any) -> str:
    """A special token as text: tokenizer_config.json spells it as a string or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise CheckpointError(f"{TOKENIZER_CONFIG} spells a special token as {token!r}; a text was expected.")
    return content


def _default_template(templates: Any) -> str | None:
    """The template of tokenizer_config.json: a text, or a list of named ones of which `default` counts."""
    if isinstance(templates, list):
        named = {item.get("name"): item.get("template") for item in templates if isinstance(item, dict)}
        templates = named.get("default")
    return templates if isinstance(templates, str) else None
