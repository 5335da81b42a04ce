"""A text is cut into parts."""

from __future__ import annotations

import pytest

from data_prep.tokenizer import parts as parts_module
from data_prep.tokenizer.contract import Tokenizer
from data_prep.tokenizer.sentencepiece import SentencePiece


def test_a_text_without_a_place_to_cut_is_cut_and_comes_back(
    trained: Tokenizer, llama: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SentencePiece, "least_part", 50)
    monkeypatch.setattr(parts_module, "_LONGEST_PART", 100)
    for cut in (trained, llama):
        parts = list(cut.encode_parts(["value" * 25, "value" * 25]))
        assert [len(part) for part, _ in parts] == [100, 100, 50]
        spelled = [cut.decode_bytes(ids, inside=n > 0) for n, (_, ids) in enumerate(parts)]
        assert b"".join(spelled) == b"value" * 50
