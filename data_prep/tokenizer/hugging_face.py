"""Hugging Face's tokenizer.json, as Llama 3's or Qwen's, or one converted from SentencePiece."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data_prep.tokenizer import tokenizer_json
from data_prep.tokenizer.contract import Tokenizer, TokenizerError
from data_prep.tokenizer.spelling import SPACE, is_utf8

# Workers are forked, one per core: the library's threads would slow or hang them.
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class HuggingFace(Tokenizer):
    """A tokenizer.json; `tokenizer_json` says where its special ids come from."""

    # The library takes 100 bytes of memory for each character.
    least_part = 1 << 14

    def __init__(self, path: Path, data: bytes, eos_token: str = "") -> None:
        self.path = path
        self._read(data)
        try:
            if changed := tokenizer_json.with_control_tokens(path, self._plain):
                self._read(self._written(changed))
            self._pieces = tokenizer_json.pieces(self._plain, self._model)
            spelled = tokenizer_json.of_texts(self._plain)
            self.special_tokens = tokenizer_json.special_tokens(path, self._plain, self._model)
        except ValueError as error:
            raise TokenizerError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
        self._encoder = self._loaded(json.dumps(spelled).encode()) if spelled else self._model
        if eos_token:
            self.special_tokens["eos_token"] = self._chosen(eos_token)
        self.vocab_size = len(self._pieces)
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._special_id("pad_token")
        self.unk_id = tokenizer_json.unknown(self._plain, self._model)

    def _read(self, data: bytes) -> None:
        self._model = self._loaded(data)
        self._data, self._plain = data, json.loads(data)

    def _loaded(self, data: bytes) -> tokenizers.Tokenizer:
        try:
            # The library raises no narrower exception.
            model = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:
            raise TokenizerError(
                f"{self.path}: is not a tokenizer.json that can be read ({error})"
            ) from None
        model.no_padding()
        model.no_truncation()
        model.encode_special_tokens = True
        return model

    def name(self, id: int) -> str:
        return self._model.id_to_token(id) or ""

    @property
    def pieces(self) -> list[bytes]:
        return self._pieces

    def _encode_part(self, part: str, inside: bool) -> np.ndarray:
        if inside and self.strips_first_space:
            return self._encode_behind(part)
        is_kept = self._keeps_first_space and part.startswith(" ")
        return self._encode(" " + part if is_kept else part)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def byte_tokens(self) -> np.ndarray:
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = [self._model.token_to_id(name) for name in names]
        if all(id is not None and self.pieces[id] == bytes([byte]) for byte, id in enumerate(ids)):
            return np.array(ids, dtype=np.int32)
        parts = [id for id, piece in enumerate(self.pieces) if not is_utf8(piece)]
        return np.array(parts, dtype=np.int32)

    @cached_property
    def strips_first_space(self) -> bool:
        for id, piece in enumerate(self.pieces):
            # A space that is written otherwise, as by its own byte token, is not one that was
            # prefixed: not all decoders drop it.
            if piece.startswith(b" ") and self.name(id).startswith(SPACE):
                alone: str = self._model.decode([id], skip_special_tokens=False)
                return alone.encode() != piece
        return False

    @cached_property
    def standalone(self) -> bytes:
        """The file, with the special tokens in it that files beside it named."""
        return self._written(
            tokenizer_json.standalone(self._plain, self.special_tokens, self._model)
        )

    @cached_property
    def as_laid(self) -> bytes:
        """As `standalone`, where BOS is what the file's post-processor puts before texts, whatever
        else is named so; a copy that `standalone` wrote says itself what is laid."""
        if tokenizer_json.of_copy(self._plain) is not None:
            return self.standalone
        before, _ = tokenizer_json.laid(self._model)
        found = {**self.special_tokens, "bos_token": before[0] if len(before) == 1 else None}
        return self._written(tokenizer_json.standalone(self._plain, found, self._model))

    @cached_property
    def laying(self) -> bytes:
        """The file, for other programs: they lay BOS before texts, if it has one, and no EOS."""
        return self._written(tokenizer_json.laying(self._plain, self.special_tokens, self._model))

    def _written(self, plain: dict[str, Any] | None) -> bytes:
        """The changed file; None: as it is. What was written into a copy can be taken out again,
        so that its lines are kept as they are."""
        if plain is None:
            return self._data
        copy = tokenizer_json.of_copy(self._plain) is not None
        indent = None if copy and not self._data.startswith(b"{\n") else 2
        return json.dumps(plain, ensure_ascii=False, indent=indent).encode()

    @cached_property
    def _keeps_first_space(self) -> bool:
        # Where the library prefixes a space only to a text that has none: SentencePiece, from which
        # such a model is converted, prefixes one to every text, which keeps the text's own space.
        return self.strips_first_space and np.array_equal(self._encode("a"), self._encode(" a"))

    @cached_property
    def _cut(self) -> re.Pattern[str] | None:
        return tokenizer_json.cut(self._plain)

    def _chosen(self, token: str) -> str:
        """The token, if it is a special one of the file. Raises TokenizerError."""
        names = {one.content for one in self._added if one.special}
        if token not in names:
            there = ", ".join(one.content for one in self._added if one.special) or "none"
            raise TokenizerError(
                f"tokenizer.eos_token: {self.path} has no special token {token!r}; it has {there}"
            )
        return token

    @property
    def _added(self) -> list[tokenizers.AddedToken]:
        return list(self._model.get_added_tokens_decoder().values())

    def _special_id(self, role: str) -> int | None:
        token = self.special_tokens[role]
        return None if token is None else self._model.token_to_id(token)

    def _encode(self, text: str) -> np.ndarray:
        # The only call that computes no offsets; it takes half the time.
        (encoded,) = self._encoder.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoded.ids, dtype=np.int32)
