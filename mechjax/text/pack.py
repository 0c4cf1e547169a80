"""Documents packed into batches of tokens: no padding but at the very end, and a position that can be saved.

Documents are tokenized, joined in one stream, and the stream is cut into rows of `length`; a document that does not
fit goes on in the next row. They are shuffled within windows of `buffer` documents, each by its own permutation, which
follows from the seed, the epoch and the window: so a position is a few numbers, and going back to it reads one window
again.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mechjax.base.errors import ArgumentError, TokenError
from mechjax.base.prompts import Prompts
from mechjax.base.records import Record
from mechjax.hub import Tokenizer
from mechjax.text.documents import Cursor, Document, Documents, documents

_FORMAT = "mechjax packing 1"
_AT_ONCE = 256  # documents tokenized in one call


class PackedBatch(Record):
    """Rows of packed documents.

    Attributes:
        tokens: Token ids. Shape (batch, pos).
        mask: True at real tokens, False behind the end of the last document.
        document: The number of each token's document in its source, -1 at padding.
        segment: 1, 2, ... for the documents of a row in order, 0 at padding: what attention within documents needs.
        positions: Each token's position: in the row, or in its document's part of the row.
    """

    tokens: Int[Array, "batch pos"]
    mask: Bool[Array, "batch pos"]
    document: Int[Array, "batch pos"]
    segment: Int[Array, "batch pos"]
    positions: Int[Array, "batch pos"]

    @property
    def prompts(self) -> Prompts:
        """Tokens and mask, as models and methods take them."""
        return Prompts(self.tokens, self.mask)


@dataclass(frozen=True)
class _Settings:
    """What decides which token comes where."""

    length: int
    batch: int
    seed: int | None
    buffer: int
    epochs: int | None
    bos: bool | None
    eos: bool
    restart_positions: bool


@dataclass(frozen=True)
class _Position:
    """A place in the stream: a window, how many of its documents are through, how much of the next one."""

    epoch: int = 0
    window: int = 0
    cursor: Cursor | None = None  # of the window's first document
    through: int = 0
    offset: int = 0
    batches: int = 0


@dataclass
class _Window:
    """The documents in memory, in the order in which they come, and those of them that are tokenized already."""

    documents: list[Document]
    after: Cursor | None
    tokens: deque[np.ndarray] = field(default_factory=deque)
    encoded: int = 0


def pack(
    source: Documents | Iterable[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    seed: int | None = 0,
    buffer: int = 4096,
    epochs: int | None = 1,
    bos: bool | None = None,
    eos: bool = False,
    restart_positions: bool = False,
) -> "Packing":
    """Batches of packed tokens, in an order that follows from the seed alone.

    mechjax's decoders attend causally over the whole row, across documents, as GPT-2 was trained; `segment` is there
    for models and losses that do not.

    Args:
        source: `documents(...)`, or an iterable of strings.
        tokenizer: The checkpoint's tokenizer. What its vocabulary lacks becomes its unknown token, where it has one.
        length: Tokens per row.
        batch: Rows per batch.
        seed: Of the shuffle; None for the source's order.
        buffer: How many documents are shuffled together, and held in memory.
        epochs: How often to go through the documents; None without end.
        bos: At the start of each document: None as the checkpoint does, True one BOS, False none.
        eos: Whether each document ends in the EOS token (GPT-2's separator).
        restart_positions: Whether positions start at 0 with every document in a row.

    Returns:
        An iterator over `PackedBatch`. The last batch is filled up with padding; no other has any.

    Raises:
        ArgumentError: A size below 1, or a token asked for that the tokenizer does not name.
        TokenError: While iterating, for text that cannot be tokenized, or no text at all.
    """
    if seed is not None and seed < 0:
        raise ArgumentError(f"pack: seed={seed}; it must be 0 or more, or None for the source's order.")
    sizes = {"length": length, "batch": batch, "buffer": buffer, "epochs": 1 if epochs is None else epochs}
    wrong = next((name for name, size in sizes.items() if size < 1), None)
    if wrong is not None:
        raise ArgumentError(f"pack: {wrong}={sizes[wrong]}; it must be 1 or more.")
    for name, asked in (("bos", bos is True), ("eos", eos)):
        if asked and tokenizer.special_id(f"{name}_token") is None:
            raise ArgumentError(
                f"pack: {name}=True, but this checkpoint names no {name.upper()} token. Leave `{name}` out."
            )
    settings = _Settings(length, batch, seed, buffer, epochs, bos, eos, restart_positions)
    return Packing(source if isinstance(source, Documents) else documents(source), tokenizer, settings)


class Packing:
    """An iterator over `PackedBatch` whose position can be saved. Made by `pack`."""

    def __init__(self, source: Documents, tokenizer: Tokenizer, settings: _Settings) -> None:
        self._source, self._tokenizer, self._settings = source, tokenizer, settings
        self._id = hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()[:16]
        self._go_to(_Position())

    def state(self) -> dict[str, Any]:
        """The position behind the last batch given, for `json.dump`: a few numbers and the names of the files."""
        return {"format": _FORMAT, "position": asdict(self._done), **self._identity()}

    def restore(self, state: dict[str, Any]) -> "Packing":
        """Go to the position of `state`: the next batch is the one that came next there, to the bit.

        Raises:
            ArgumentError: The state is of other documents, another tokenizer or other settings.
        """
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ArgumentError("restore takes what `state()` gave; this is something else.")
        for what, mine in self._identity().items():
            theirs = state.get(what)
            if what == "settings" and isinstance(theirs, dict) and theirs != mine:
                changed = [
                    f"{k}={theirs.get(k)!r} (now {mine[k]!r})" for k in mine if theirs.get(k) != mine[k]
                ]
                raise ArgumentError(f"this state was saved with {', '.join(changed)}. Pack with the same.")
            if theirs != mine:
                raise ArgumentError(
                    f"this state was saved with another {what} ({theirs!r}, now {mine!r}), so the position means "
                    "nothing here. Pack the same documents with the same tokenizer."
                )
        self._go_to(_Position(**state["position"]))
        return self

    def __iter__(self) -> "Packing":
        return self

    def __next__(self) -> PackedBatch:
        try:
            pieces = list(self._pieces(self._settings.batch * self._settings.length))
        except BaseException:
            self._go_to(self._done)  # a batch is given whole or not at all
            raise
        if not pieces:
            raise StopIteration
        self._now = replace(self._now, batches=self._now.batches + 1)
        self._done = self._now
        return _laid_out(pieces, self._settings, self._padding())

    def _identity(self) -> dict[str, Any]:
        return {
            "settings": asdict(self._settings),
            "documents": self._source.fingerprint(),
            "tokenizer": self._id,
        }

    def _padding(self) -> int:
        return self._tokenizer.special_id("pad_token", "eos_token") or 0

    def _go_to(self, position: _Position) -> None:
        self._done = self._now = position
        self._reader: Iterator[tuple[Document, Cursor]] | None = None
        self._window: _Window | None = None
        self._empty_epoch = position.cursor is None and position.through == position.offset == 0

    def _pieces(self, wanted: int) -> Iterator[tuple[int, np.ndarray]]:
        """The next `wanted` tokens, or as many as there are, as pieces of documents with their documents' numbers."""
        while wanted and (window := self._filled()) is not None:
            now = self._now
            tokens = window.tokens[0][now.offset : now.offset + wanted]
            number = window.documents[now.through].number
            if now.offset + len(tokens) == len(window.tokens[0]):
                window.tokens.popleft()
                self._now = replace(now, through=now.through + 1, offset=0)
            else:
                self._now = replace(now, offset=now.offset + len(tokens))
            if len(tokens):
                self._empty_epoch = False
                wanted -= len(tokens)
                yield number, tokens

    def _filled(self) -> _Window | None:
        """The window, with the next document's tokens in it; None where all epochs are over."""
        while True:
            if self._window is None:
                self._window = self._read_window()
            window, now = self._window, self._now
            if now.through < len(window.documents):
                if not window.tokens:
                    start = window.encoded = max(window.encoded, now.through)
                    some = window.documents[start : start + _AT_ONCE]
                    window.tokens.extend(_encoded(self._tokenizer, some, self._settings))
                    window.encoded += len(some)
                return window
            if window.documents:
                self._now = replace(now, window=now.window + 1, cursor=window.after, through=0)
            elif self._empty_epoch:
                raise TokenError(
                    "there are no documents, or none that has a token. Look at what the source gives: "
                    "next(iter(documents(...)))."
                )
            elif now.epoch + 1 == self._settings.epochs:
                return None
            else:
                self._now = replace(now, epoch=now.epoch + 1, window=0, cursor=None)
                self._reader, self._empty_epoch = None, True
            self._window = None

    def _read_window(self) -> _Window:
        settings, now = self._settings, self._now
        if self._reader is None:
            self._reader = self._source.read(now.cursor)
        read = list(islice(self._reader, settings.buffer))
        found = [document for document, _ in read]
        if settings.seed is not None:
            # Raw bits, since numpy promises that they stay the same, which it does not of `permutation`.
            bits = np.random.PCG64(np.random.SeedSequence([settings.seed, now.epoch, now.window]))
            found = (
                [found[i] for i in np.argsort(bits.random_raw(len(found)), kind="stable")] if found else []
            )
        return _Window(found, read[-1][1] if read else now.cursor)


def _encoded(tokenizer: Tokenizer, some: list[Document], settings: _Settings) -> list[np.ndarray]:
    """Token ids of some documents, with BOS and EOS as asked."""
    try:
        encodings = tokenizer.backend.encode_batch_fast([document.text for document in some])
    except Exception:  # the Rust library raises bare Exception, and does not say where
        for document in some:
            try:
                tokenizer(document.text)
            except TokenError as error:
                raise TokenError(f"{document.place} cannot be tokenized. {error}") from None
        raise
    eos = tokenizer.special_id("eos_token") if settings.eos else None
    rows = []
    for encoding in encodings:
        ids = encoding.ids
        if settings.bos is not None and (bos := tokenizer.bos_id) is not None:
            added = bool(ids) and ids[0] == bos and encoding.special_tokens_mask[0] == 1
            ids = (
                [bos, *ids] if settings.bos and not added else ids[1:] if added and not settings.bos else ids
            )
        if eos is not None and (not ids or ids[-1] != eos):
            ids = [*ids, eos]
        rows.append(np.asarray(ids, np.int32))
    return rows


def _laid_out(pieces: list[tuple[int, np.ndarray]], settings: _Settings, padding: int) -> PackedBatch:
    shape = (settings.batch, settings.length)
    n = settings.batch * settings.length
    lengths = np.array([len(tokens) for _, tokens in pieces])
    filled = int(lengths.sum())
    tokens, document, start = (
        np.full(n, padding, np.int32),
        np.full(n, -1, np.int32),
        np.full(n, -1, np.int32),
    )
    tokens[:filled] = np.concatenate([tokens for _, tokens in pieces])
    document[:filled] = np.repeat([number for number, _ in pieces], lengths)
    start[:filled] = np.repeat(np.cumsum(lengths) - lengths, lengths)
    mask = (np.arange(n) < filled).reshape(shape)
    start = start.reshape(shape)
    begins = np.concatenate([np.ones((shape[0], 1), bool), start[:, 1:] != start[:, :-1]], 1)
    column = np.broadcast_to(np.arange(settings.length, dtype=np.int32), shape)
    since = np.maximum.accumulate(np.where(begins, column, 0), 1) if settings.restart_positions else 0
    return PackedBatch(
        jnp.asarray(tokens.reshape(shape)), jnp.asarray(mask), jnp.asarray(document.reshape(shape)),
        jnp.asarray(np.where(mask, np.cumsum(begins, 1), 0).astype(np.int32)),
        jnp.asarray((column - since).astype(np.int32)),
    )  # fmt: skip
