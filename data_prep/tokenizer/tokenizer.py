"""Tokenizers without loss: the text of every document comes back from its tokens exactly.

SentencePiece models and Hugging Face's tokenizer.json are read, told apart by what the file holds.

SentencePiece writes a space as U+2581, so a literal U+2581 in a text would come back as a space.
A model with byte fallback spells it as its three UTF-8 bytes instead, which decode to themselves.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from data_prep.dataset import durable
from data_prep.tokenizer import tokenizer_json

# Workers are forked, one a core: threads of the library's own would slow or hang them.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

FILES = ("tokenizer.model", "tokenizer.json")
"""What a data set and a run call their SentencePiece model, or their tokenizer.json."""

_SPACE = "\u2581"
# SentencePiece silently skips training sentences that are longer than its limit or hold its own
# sign for the unknown, so none of ours is or does.
_SENTENCE_BYTES = 4096
_RESERVED = "\u2585"
# Texts are encoded in parts, each cut where no token can reach across: SentencePiece takes 60 bytes
# of memory for each of the text, tokenizers 100. A part has at least so many characters.
_PART = 1 << 17
_JSON_PART = 1 << 14
# Where a text has no such place, it is cut anyhow: that costs a token or two, and no text.
_LONGEST_PART = 1 << 20
_ANYHOW = re.compile(r"(?<=\S)(?= \S)")
# SentencePiece's own chunks inside of a part: exact, and less memory and time.
_CHUNK = 1024
# Places between two characters, and a piece's bytes that hold both.
_PLACES = (
    (r"(?<=\n)(?=[^\n])", re.compile(rb"\n[^\n]")),
    (rf"(?<=[^ {_SPACE}])(?= )", re.compile(rb"[^ ] ")),
)
# Tokens that are turned into bytes at a time: what this needs stays in the cache.
_SPELLED = 1 << 15


class TokenizerError(ValueError):
    """A tokenizer that cannot be read, or cannot be trained as asked."""


class Tokenizer(Protocol):
    """What `load` gives, whatever the kind of file. Safe to share between threads.

    Special ids are the file's own; None where it has none. Neither `encode` nor the shards hold
    them: a reader lays a document as [bos] + tokens + [eos].
    """

    path: Path
    vocab_size: int
    """The highest id and 1, with added tokens and ids that stand for nothing."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None

    @property
    def pieces(self) -> list[bytes]:
        """The bytes of text that each id stands for inside of a text; none for special ids."""

    @property
    def byte_tokens(self) -> np.ndarray:
        """Ids, int32, of tokens that spell bytes where a character has no piece of its own.

        The byte-fallback pieces, [256] in order of the byte or [0] without; of a byte-level BPE,
        which has a piece for each byte, the pieces that are not whole characters in UTF-8.
        """

    @property
    def strips_first_space(self) -> bool:
        """Whether decoding drops the space before the first token: encoding prefixes one."""

    def encode(self, text: str) -> np.ndarray:
        """Tokens of the text alone: int32 [tokens]. `text` must not hold lone surrogates.

        What reads like a special token is text.
        """

    def encode_parts(
        self, texts: Iterable[str], inside: bool = False
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(part, its tokens) of the text that `texts` are, laid end to end, in bounded memory.

        How the text comes does not matter; the tokens joined are those of `encode`. `inside`:
        other text stands before it, whose tokens these are to follow.
        """

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text whose tokens `ids` are; special ids are left out, broken UTF-8 is U+FFFD."""

    def decode_bytes(self, ids: Sequence[int] | np.ndarray, inside: bool = False) -> bytes:
        """UTF-8 bytes of the tokens, also where they begin or end inside of a character.

        `inside`: tokens stand before them, so that their first space is the text's.
        """


def load(path: Path) -> Tokenizer:
    """The tokenizer in a file of either kind. Raises TokenizerError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: the tokenizer cannot be read ({error.strerror})") from None
    return HuggingFace(path, data) if data.startswith(b"{") else SentencePiece(path, data)


def find(directory: Path) -> Path:
    """The tokenizer's file in a data set's or a run's directory. Raises TokenizerError."""
    there = [directory / name for name in FILES if (directory / name).is_file()]
    if len(there) != 1:
        raise TokenizerError(
            f"{directory}: holds {'both' if there else 'none'} of {' and '.join(FILES)}, expected "
            "exactly one: leave there, or put back, the one that was made with it"
        )
    return there[0]


def standalone(path: Path) -> tuple[str, bytes]:
    """Name and bytes of a copy of the tokenizer that needs no file beside it.

    Copies of copies are equal. Raises TokenizerError.
    """
    model = load(path)
    if isinstance(model, HuggingFace):
        return FILES[1], model.standalone
    return FILES[0], path.read_bytes()


def write(directory: Path, name: str, data: bytes) -> None:
    """Put a tokenizer into a directory, durably and in place of any other."""
    clear(directory)
    durable.write_bytes(directory / name, data)


def clear(directory: Path) -> None:
    """Remove a tokenizer of either kind, which a run that was killed may have left."""
    for name in FILES:
        (directory / name).unlink(missing_ok=True)


class SentencePiece:
    """A SentencePiece model, as Llama 2's, Mistral's or Gemma's; see Tokenizer."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        try:
            if not data:
                raise RuntimeError("empty file")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise TokenizerError(
                f"{path}: is not a SentencePiece model, nor a tokenizer.json (tiktoken's are "
                "another format)"
            ) from None
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id = _known(self._model.bos_id())
        self.eos_id = _known(self._model.eos_id())
        self.pad_id = _known(self._model.pad_id())
        self.unk_id = _known(self._model.unk_id())

    def encode(self, text: str) -> np.ndarray:
        """Tokens of the text alone: int32 [tokens]. `text` must not hold lone surrogates."""
        return _joined(self.encode_parts([text]))

    def encode_parts(
        self, texts: Iterable[str], inside: bool = False
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(part, its tokens) of the text that `texts` are, laid end to end."""
        for part in _parts(texts, lambda: self._cut, _PART):
            yield part, self._encode_part(part, inside)
            inside = True

    def _encode_part(self, part: str, inside: bool) -> np.ndarray:
        if inside and self.strips_first_space:
            # The space that the model prefixes goes to the line end, and goes away with it.
            return self._encode("\n" + part)[len(self._line_end) :]
        spelled = self._spelled_space
        if spelled is None or _SPACE not in part:
            return self._encode(part)
        found: list[np.ndarray] = []
        for index, text in enumerate(part.split(_SPACE)):
            found += [spelled, self._encode(text)] if index else [self._encode(text)]
        return np.concatenate(found)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text whose tokens `ids` are; special ids are left out, broken UTF-8 is U+FFFD."""
        plain = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        text: str = self._model.decode(plain)
        return text

    def decode_bytes(self, ids: Sequence[int] | np.ndarray, inside: bool = False) -> bytes:
        """UTF-8 bytes of the tokens, also where they begin or end inside of a character."""
        return self._spelling(ids, self.strips_first_space and not inside)

    @cached_property
    def byte_tokens(self) -> np.ndarray:
        """Ids of the byte-fallback pieces, in order of the byte: int32 [256], or [0] without."""
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        whole = all(self._model.is_byte(id) for id in ids)
        return np.array(ids if whole else [], dtype=np.int32)

    @cached_property
    def strips_first_space(self) -> bool:
        """Whether decoding drops the space before the first token: the model prefixes one."""
        # Without the table of all pieces: who only encodes need not wait for it.
        for id in range(self.vocab_size):
            piece: str = self._model.id_to_piece(id)
            special = self._model.is_control(id) or self._model.is_unknown(id)
            if piece.startswith(_SPACE) and not special:
                return self.decode([id]) != piece.replace(_SPACE, " ")
        return False

    @cached_property
    def _spelling(self) -> _Spelling:
        return _Spelling(self.pieces)

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of text that each id stands for."""
        found = []
        for id in range(self.vocab_size):
            piece: str = self._model.id_to_piece(id)
            if piece.startswith("<0x") and self._model.is_byte(id):
                found.append(bytes([int(piece[3:5], 16)]))
            elif self._model.is_control(id):
                found.append(b"")
            elif id == self.unk_id:
                found.append(self._model.decode([id]).encode())
            else:
                found.append(piece.replace(_SPACE, " ").encode())
        return found

    @cached_property
    def _spelled_space(self) -> np.ndarray | None:
        # With a dummy prefix every part would begin with a space of its own.
        if not len(self.byte_tokens) or self.strips_first_space:
            return None
        return self.byte_tokens[list(_SPACE.encode())]

    @cached_property
    def _line_end(self) -> np.ndarray:
        return self._encode("\n")

    @cached_property
    def _cut(self) -> re.Pattern[str] | None:
        """Where no piece reaches across, of the places after line ends and before spaces."""
        places = [
            place
            for place, crossing in _PLACES
            if not any(crossing.search(piece) for piece in self.pieces)
        ]
        return re.compile("|".join(places)) if places else None

    def _encode(self, text: str) -> np.ndarray:
        encoded: np.ndarray = self._model.ParallelEncode(
            text, chunk_len=_CHUNK, num_threads=1, return_type="numpy"
        )
        return encoded


class HuggingFace:
    """A tokenizer.json, as Llama 3's or Qwen's, or one converted from SentencePiece.

    See Tokenizer, and `tokenizer_json` for where its special ids are from.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        try:
            # The library raises no narrower exception.
            self._model = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:
            raise TokenizerError(
                f"{path}: is not a tokenizer.json that can be read ({error})"
            ) from None
        self._data, self._plain = data, json.loads(data)
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True
        try:
            self.pieces = tokenizer_json.pieces(self._plain, self._model)
            self.special_tokens = tokenizer_json.special_tokens(path, self._plain, self._model)
        except ValueError as error:
            raise TokenizerError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
        self.vocab_size = len(self.pieces)
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._special_id("pad_token")
        self.unk_id = tokenizer_json.unknown(self._plain, self._model)

    def encode(self, text: str) -> np.ndarray:
        """Tokens of the text alone: int32 [tokens]. `text` must not hold lone surrogates."""
        return _joined(self.encode_parts([text]))

    def encode_parts(
        self, texts: Iterable[str], inside: bool = False
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(part, its tokens) of the text that `texts` are, laid end to end."""
        for part in _parts(texts, lambda: self._cut, _JSON_PART):
            yield part, self._encode_part(part, inside)
            inside = True

    def _encode_part(self, part: str, inside: bool) -> np.ndarray:
        if self._keeps_first_space:
            return self._encode(" " + part if part.startswith(" ") and not inside else part)
        # Encoding puts back the space that it prefixes.
        return self._encode(part[1:] if inside and self.strips_first_space else part)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text whose tokens `ids` are; special ids are left out, broken UTF-8 is U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray, inside: bool = False) -> bytes:
        """UTF-8 bytes of the tokens, also where they begin or end inside of a character."""
        return self._spelling(ids, self.strips_first_space and not inside)

    @cached_property
    def byte_tokens(self) -> np.ndarray:
        """Ids of byte-fallback pieces, or of a byte-level BPE's parts of characters: int32."""
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = [self._model.token_to_id(name) for name in names]
        if all(id is not None and self.pieces[id] == bytes([byte]) for byte, id in enumerate(ids)):
            return np.array(ids, dtype=np.int32)
        parts = [id for id, piece in enumerate(self.pieces) if not _is_utf8(piece)]
        return np.array(parts, dtype=np.int32)

    @cached_property
    def strips_first_space(self) -> bool:
        """Whether decoding drops the space before the first token: encoding prefixes one."""
        for id, piece in enumerate(self.pieces):
            if piece.startswith(b" ") and _is_utf8(piece):
                alone: str = self._model.decode([id], skip_special_tokens=False)
                return alone.encode() != piece
        return False

    @cached_property
    def _spelling(self) -> _Spelling:
        return _Spelling(self.pieces)

    @cached_property
    def standalone(self) -> bytes:
        """The file, with the special tokens in it that files beside it named."""
        stated = tokenizer_json.stating(self._plain, self.special_tokens, self._model)
        if stated is None:
            return self._data
        return json.dumps(stated, ensure_ascii=False, indent=2).encode()

    @cached_property
    def _keeps_first_space(self) -> bool:
        # Where the library prefixes a space only to a text that has none, SentencePiece, from which
        # such a model is converted, prefixes one to every text, and so gives the text back.
        return self.strips_first_space and np.array_equal(self._encode("a"), self._encode(" a"))

    @cached_property
    def _cut(self) -> re.Pattern[str] | None:
        return tokenizer_json.cut(self._plain)

    def _special_id(self, role: str) -> int | None:
        token = self.special_tokens[role]
        return None if token is None else self._model.token_to_id(token)

    def _encode(self, text: str) -> np.ndarray:
        # The only way that keeps no offsets, and takes half of the time.
        (encoded,) = self._model.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoded.ids, dtype=np.int32)


class StreamDecoder:
    """Decodes tokens one by one: text comes out as soon as it is whole UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = tokenizer.pieces
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


class _Spelling:
    """Turns many ids into bytes at once: a gather over all pieces laid end to end."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._length = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._first = np.cumsum(self._length) - self._length
        self._flat = np.frombuffer(b"".join(pieces), dtype=np.uint8)

    def __call__(self, ids: Sequence[int] | np.ndarray, strip: bool) -> bytes:
        """The bytes of `ids`; `strip`: without the space that encoding prefixed."""
        plain = np.asarray(ids, dtype=np.int64)
        parts = (
            self._spell(plain[start : start + _SPELLED]) for start in range(0, len(plain), _SPELLED)
        )
        joined = b"".join(parts)
        return joined[1:] if strip and joined[:1] == b" " else joined

    def _spell(self, ids: np.ndarray) -> bytes:
        lengths = self._length[ids]
        # Where each token's bytes begin in `flat`, less where they go, then counted on from there.
        shift = self._first[ids] - (np.cumsum(lengths) - lengths)
        places = np.repeat(shift, lengths) + np.arange(lengths.sum())
        spelled: bytes = self._flat[places].tobytes()
        return spelled


def _parts(
    texts: Iterable[str], cut: Callable[[], re.Pattern[str] | None], least: int
) -> Iterator[str]:
    """Parts of the joined texts of `least` characters or a little more, cut where `cut` matches.

    A short text asks for no pattern, which takes a look at all pieces.
    """
    held = ""
    for text in texts:
        held += text
        start = 0
        while len(held) - start > least:
            stop = _stop(held, start, cut(), least)
            if stop is None:
                break
            yield held[start:stop]
            start = stop
        held = held[start:]
    if held:
        yield held


def _stop(held: str, start: int, cut: re.Pattern[str] | None, least: int) -> int | None:
    """Where the part that begins at `start` ends; None: more of the text must be seen."""
    end = start + _LONGEST_PART
    found = cut.search(held, start + least, end) if cut else None
    if found is None and len(held) > end:
        found = _ANYHOW.search(held, start + least, end)
        return found.start() if found else end
    return found.start() if found else None


def _joined(parts: Iterable[tuple[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int32), *(ids for _, ids in parts)])


def _is_utf8(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _known(id: int) -> int | None:
    return id if id >= 0 else None
