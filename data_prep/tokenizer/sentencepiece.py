"""SentencePiece models.

SentencePiece writes a space as U+2581, so a literal U+2581 in a text would be decoded as a space.
A model with byte fallback spells it as its three UTF-8 bytes instead, which decode to themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import sentencepiece

from data_prep.tokenizer.contract import Tokenizer, TokenizerError
from data_prep.tokenizer.spelling import SPACE

# A long text is encoded in SentencePiece's own chunks: exact, and less memory and time. A short one
# is not: each such call starts a thread and waits for it, which takes 30 times as long as to encode
# a sentence (sentencepiece 0.2.3).
_CHUNK = 1024
_CHUNKED_FROM = 1 << 14  # characters, from which chunks take less time
# Places between two characters, and a piece's bytes that hold both.
_PLACES = (
    (r"(?<=\n)(?=[^\n])", re.compile(rb"\n[^\n]")),
    (rf"(?<=[^ {SPACE}])(?= )", re.compile(rb"[^ ] ")),
)


class SentencePiece(Tokenizer):
    """A SentencePiece model, as Llama 2's, Mistral's or Gemma's."""

    # SentencePiece takes 60 bytes of memory for each character.
    least_part = 1 << 17

    def __init__(self, path: Path, data: bytes, eos_token: str = "") -> None:
        self.path = path
        try:
            if not data:
                raise RuntimeError("empty file")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise TokenizerError(
                f"{path}: is not a SentencePiece model or a tokenizer.json (tiktoken's format is "
                "not read)"
            ) from None
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id = _known(self._model.bos_id())
        self.eos_id = _known(self._model.eos_id())
        self.pad_id = _known(self._model.pad_id())
        self.unk_id = _known(self._model.unk_id())
        own = "" if self.eos_id is None else self.name(self.eos_id)
        if eos_token not in ("", own):
            raise TokenizerError(
                f"tokenizer.eos_token: {path} is a SentencePiece model, whose end of text is "
                f"{own or 'not set'} and cannot be chosen; leave it out"
            )

    def name(self, id: int) -> str:
        return str(self._model.id_to_piece(id))

    def _encode_part(self, part: str, inside: bool) -> np.ndarray:
        if inside and self.strips_first_space:
            return self._encode_behind(part)
        spelled = self._spelled_space
        if spelled is None or SPACE not in part:
            return self._encode(part)
        found: list[np.ndarray] = []
        for index, text in enumerate(part.split(SPACE)):
            found += [spelled, self._encode(text)] if index else [self._encode(text)]
        return np.concatenate(found)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        plain = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        text: str = self._model.decode(plain)
        return text

    @cached_property
    def byte_tokens(self) -> np.ndarray:
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        whole = all(self._model.is_byte(id) for id in ids)
        return np.array(ids if whole else [], dtype=np.int32)

    @cached_property
    def strips_first_space(self) -> bool:
        # Not from `pieces`: encoding alone need not wait for the table of all pieces.
        for id in range(self.vocab_size):
            piece: str = self._model.id_to_piece(id)
            special = self._model.is_control(id) or self._model.is_unknown(id)
            if piece.startswith(SPACE) and not special:
                return self.decode([id]) != piece.replace(SPACE, " ")
        return False

    @cached_property
    def pieces(self) -> list[bytes]:
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
                found.append(piece.replace(SPACE, " ").encode())
        return found

    @cached_property
    def _spelled_space(self) -> np.ndarray | None:
        # With a dummy prefix every part would begin with a space of its own.
        if not len(self.byte_tokens) or self.strips_first_space:
            return None
        return self.byte_tokens[list(SPACE.encode())]

    @cached_property
    def _cut(self) -> re.Pattern[str] | None:
        # After line ends and before spaces, where no piece crosses the place.
        places = [
            place
            for place, crossing in _PLACES
            if not any(crossing.search(piece) for piece in self.pieces)
        ]
        return re.compile("|".join(places)) if places else None

    def _encode(self, text: str) -> np.ndarray:
        encode = self._model.Encode
        if len(text) >= _CHUNKED_FROM:
            encode = partial(self._model.ParallelEncode, chunk_len=_CHUNK, num_threads=1)
        encoded: np.ndarray = encode(text, return_type="numpy")
        return encoded


def _known(id: int) -> int | None:
    return id if id >= 0 else None
