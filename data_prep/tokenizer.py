"""SentencePiece without loss: the text of every document comes back from its tokens exactly.

SentencePiece writes a space as U+2581, so a literal U+2581 in a text would come back as a space.
A model with byte fallback spells it as its three UTF-8 bytes instead, which decode to themselves.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from data_prep import durable

_SPACE = "\u2581"
# SentencePiece silently skips training sentences that are longer than its limit or hold its own
# sign for the unknown, so none of ours is or does.
_SENTENCE_BYTES = 4096
_RESERVED = "\u2585"
# Encoding in chunks of this many characters is exact and needs a third of the time on long texts.
_CHUNK = 1024
# Tokens that are turned into bytes at a time: what this needs stays in the cache.
_SPELLED = 1 << 15


class TokenizerError(ValueError):
    """A model that cannot be read, or cannot be trained as asked."""


class Tokenizer:
    """A SentencePiece model. Safe to share between threads.

    Special ids are the model's own; None where it has none. Neither `encode` nor the shards hold
    them: a reader lays a document as [bos] + tokens + [eos].
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"{path}: the tokenizer cannot be read ({error.strerror})"
            ) from None
        try:
            if not model:
                raise RuntimeError("empty file")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise TokenizerError(
                f"{path}: is not a SentencePiece model (a .model file is expected; tokenizer.json "
                "and tiktoken files are other formats)"
            ) from None
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id = _known(self._model.bos_id())
        self.eos_id = _known(self._model.eos_id())
        self.pad_id = _known(self._model.pad_id())
        self.unk_id = _known(self._model.unk_id())

    def encode(self, text: str) -> np.ndarray:
        """Tokens of the text alone: int32 [tokens]. `text` must not hold lone surrogates."""
        if _SPACE not in text or (spelled := self._spelled_space) is None:
            return self._encode(text)
        parts: list[np.ndarray] = []
        for index, part in enumerate(text.split(_SPACE)):
            parts += [spelled, self._encode(part)] if index else [self._encode(part)]
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text whose tokens `ids` are; special ids are left out, broken UTF-8 is U+FFFD."""
        plain = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        text: str = self._model.decode(plain)
        return text

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """UTF-8 bytes of the tokens, also where they begin or end inside of a character."""
        plain = np.asarray(ids, dtype=np.int64)
        joined = b"".join(
            self._spell(plain[start : start + _SPELLED]) for start in range(0, len(plain), _SPELLED)
        )
        return joined[1:] if self.strips_first_space and joined[:1] == b" " else joined

    @cached_property
    def byte_tokens(self) -> np.ndarray:
        """Ids of the byte-fallback pieces, in order of the byte: int32 [256], or [0] without."""
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        whole = all(self._model.is_byte(id) for id in ids)
        return np.array(ids if whole else [], dtype=np.int32)

    @cached_property
    def strips_first_space(self) -> bool:
        """Whether decoding drops the space before the first token: the model prefixes one."""
        # Without the table of all bytes: who only encodes, and short texts, need not wait for it.
        for id in range(self.vocab_size):
            piece: str = self._model.id_to_piece(id)
            special = self._model.is_control(id) or self._model.is_unknown(id)
            if piece.startswith(_SPACE) and not special:
                return self.decode([id]) != piece.replace(_SPACE, " ")
        return False

    def _spell(self, ids: np.ndarray) -> bytes:
        flat, first, length = self._spelling
        lengths = length[ids]
        # Where each token's bytes begin in `flat`, less where they go, then counted on from there.
        shift = first[ids] - (np.cumsum(lengths) - lengths)
        spelled: bytes = flat[np.repeat(shift, lengths) + np.arange(lengths.sum())].tobytes()
        return spelled

    @cached_property
    def _spelling(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All pieces' bytes in one, and where each id's begin and how many they are."""
        length = np.array([len(piece) for piece in self._bytes], dtype=np.int64)
        flat = np.frombuffer(b"".join(self._bytes), dtype=np.uint8)
        return flat, np.cumsum(length) - length, length

    @cached_property
    def _bytes(self) -> list[bytes]:
        found = []
        for id in range(self.vocab_size):
            if self._model.is_byte(id):
                found.append(bytes([int(self._model.id_to_piece(id)[3:5], 16)]))
            elif self._model.is_control(id):
                found.append(b"")
            elif self._model.is_unknown(id):
                found.append(self._model.decode([id]).encode())
            else:
                found.append(self._model.id_to_piece(id).replace(_SPACE, " ").encode())
        return found

    @cached_property
    def _spelled_space(self) -> np.ndarray | None:
        # With a dummy prefix every part would begin with a space of its own.
        if not len(self.byte_tokens) or self.strips_first_space:
            return None
        return self.byte_tokens[list(_SPACE.encode())]

    def _encode(self, text: str) -> np.ndarray:
        encoded: np.ndarray = self._model.ParallelEncode(
            text, chunk_len=_CHUNK, num_threads=1, return_type="numpy"
        )
        return encoded


class StreamDecoder:
    """Decodes tokens one by one: text comes out as soon as it is whole UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = tokenizer._bytes
        self._first = tokenizer.strips_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that token `id` completes; empty inside of a character."""
        piece = self._pieces[id]
        if self._first and piece:
            self._first = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """U+FFFD where the stream ended inside of a character, else nothing."""
        return self._utf8.decode(b"", final=True)


def train(
    texts: Iterable[str], path: Path, vocab_size: int, character_coverage: float = 0.9995
) -> None:
    """Train a lossless BPE model on `texts` and write it durably; equal texts, equal bytes.

    Raises TokenizerError where the texts do not carry so large a vocabulary.
    """
    sentences = _sentences(texts)
    first = next(sentences, None)
    if first is None:
        raise TokenizerError("the tokenizer has no text to train on: every document was rejected")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chain(first, sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            # Sentences end at a newline, so it would never be learnt as a piece.
            user_defined_symbols=["\n"],
            max_sentence_length=_SENTENCE_BYTES + 1,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(_too_small(vocab_size, str(error))) from None
    durable.write_bytes(path, model.getvalue())


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.replace(_RESERVED, "\n").split("\n"):
            # At most four bytes a character.
            for start in range(0, len(line), _SENTENCE_BYTES // 4):
                yield line[start : start + _SENTENCE_BYTES // 4]


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _too_small(vocab_size: int, reason: str) -> str:
    most = re.search(r"value <= (\d+)", reason)
    least = re.search(r"required_chars\. \d+ vs (\d+)", reason)
    if most:
        way_out = f"the text carries at most {most[1]}: lower it, or give more text"
    elif least:
        way_out = f"bytes and characters alone need more than {least[1]}: raise it"
    else:
        way_out = reason
    return f"tokenizer.vocab_size: {vocab_size} does not fit the training text; {way_out}"


def _known(id: int) -> int | None:
    return id if id >= 0 else None
