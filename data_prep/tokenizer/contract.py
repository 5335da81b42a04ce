"""The interface of all tokenizers: decoding the tokens of a text restores it exactly."""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep.dataset.settings import MistakeError
from data_prep.tokenizer.parts import cut, part_end
from data_prep.tokenizer.spelling import Spelling

FILES = ("tokenizer.model", "tokenizer.json")
"""Names of the SentencePiece model or tokenizer.json in a data set or a run."""


# Characters of which each is a token, or a few, of its own before any but some texts.
_SIGNS = ("\n", "\t", ".", "x")

NFC_REMEDY = "cleaning.nfc: true"
"""What keeps texts that a tokenizer would only give back with composed characters."""


def difference(text: str, restored: str) -> str:
    """Where a text is not what was restored of it, and what that is there; they are not equal."""
    pairs = enumerate(zip(text, restored, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(text), len(restored)))
    return f"{text[at : at + 8]!r} becomes {restored[at : at + 8]!r}"


class TokenizerError(MistakeError):
    """A tokenizer that cannot be read, or cannot be trained as requested."""


class Tokenizer(ABC):
    """A tokenizer, whatever the kind of its file. Safe to share between threads.

    Special ids are the file's own; None where it has none. Neither `encode` nor the shards hold
    them: a reader arranges a document as [bos] + tokens + [eos].
    """

    path: Path
    vocab_size: int
    """The highest id plus 1; added tokens and unused ids are counted."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    least_part: int
    """Characters of a part of a text, at least: parts are encoded one by one."""

    @abstractmethod
    def name(self, id: int) -> str:
        """How the file writes the token, e.g. `</s>`."""

    @property
    @abstractmethod
    def pieces(self) -> list[bytes]:
        """The bytes of text that each id means inside a text; none for special ids."""

    @property
    @abstractmethod
    def byte_tokens(self) -> np.ndarray:
        """Ids, int32, of tokens that spell bytes where a character has no piece.

        The byte-fallback pieces, [256] in order of the byte or [0] without; of a byte-level BPE,
        which has a piece for each byte, the pieces that are not whole characters in UTF-8.
        """

    @property
    @abstractmethod
    def strips_first_space(self) -> bool:
        """Whether decoding drops the space before the first token: encoding prefixes one."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text whose tokens `ids` are; special ids are left out, broken UTF-8 is U+FFFD."""

    @property
    @abstractmethod
    def _cut(self) -> re.Pattern[str] | None:
        """The places of a text that no token crosses; None: none is known."""

    @abstractmethod
    def _encode_part(self, part: str, inside: bool) -> np.ndarray:
        """Tokens of one part, int32; `inside`: another part precedes it."""

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """Tokens of a text, int32, as the library encodes it."""

    def _encode_behind(self, part: str) -> np.ndarray:
        """Tokens of a part that other text precedes, where `strips_first_space`.

        The space that is prefixed comes before a sign, and is dropped with it; the sign is another
        one where a token would cross from it to the part.
        """
        for sign in _SIGNS:
            ids, before = self._encode(sign + part), self._of_signs[sign]
            if np.array_equal(ids[: len(before)], before):
                break
        return ids[len(before) :]

    @cached_property
    def _of_signs(self) -> dict[str, np.ndarray]:
        return {sign: self._encode(sign) for sign in _SIGNS}

    def encode(self, text: str) -> np.ndarray:
        """Tokens of the text alone: int32 [tokens]. `text` must not hold lone surrogates.

        What reads like a special token is text.
        """
        return np.concatenate(
            [np.empty(0, np.int32), *(ids for _, ids in self.encode_parts([text]))]
        )

    def encode_parts(
        self, texts: Iterable[str], inside: bool = False
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(part, its tokens) of the text that `texts` form when joined, in bounded memory.

        However the text is divided, the tokens joined are those of `encode`. `inside`: other text
        precedes it, and these tokens are to follow that text's.
        """
        least = self.least_part
        # A short text never needs `_cut`, which may have to inspect all pieces.
        for part in cut(texts, least, lambda held, at: part_end(held, at, self._cut, least)):
            yield part, self._encode_part(part, inside)
            inside = True

    def decode_bytes(self, ids: Sequence[int] | np.ndarray, inside: bool = False) -> bytes:
        """UTF-8 bytes of the tokens, also where they begin or end inside a character.

        `inside`: other tokens precede them, so that their first space belongs to the text.
        """
        return self._spelling(ids, self.strips_first_space and not inside)

    def changed(self, text: str) -> str:
        """How tokens change the text, as `difference` says it; empty: they give it back."""
        restored = self.decode_bytes(self.encode(text)).decode(errors="replace")
        return "" if restored == text else difference(text, restored)

    @cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self.pieces)


class StreamDecoder:
    """Decodes tokens one by one: text is returned as soon as it is whole UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = tokenizer.pieces
        self._first = tokenizer.strips_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that token `id` completes; empty inside a character."""
        piece = self._pieces[id]
        if self._first and piece:
            self._first = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """U+FFFD where the stream ended inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)
