"""SentencePiece models of several makers give texts back, with SentencePiece's own tokens."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import StreamDecoder, Tokenizer
from data_prep.tokenizer.sentencepiece import SentencePiece
from tests.data_prep.tokenizer.texts import NASTY, SIZE, TEXT, nasty_texts


def test_every_text_comes_back_exactly(trained: Tokenizer) -> None:
    for text in nasty_texts(1000):
        ids = trained.encode(text)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert trained.decode(ids) == text
        assert trained.decode(ids.tolist()) == text
        assert trained.decode_bytes(ids) == text.encode()


def test_encoding_whole_or_in_chunks_is_sentencepieces_own(trained: Tokenizer) -> None:
    peer = sentencepiece.SentencePieceProcessor(model_file=str(trained.path))
    long = TEXT * (1 + 40_000 // len(TEXT))
    around = [long[: (1 << 14) + more] for more in (-1, 0, 1)]  # chunks begin at this length
    for text in [long, *around, "x" * 20_000, *nasty_texts(300)]:
        if "\u2581" not in text:
            assert trained.encode(text).tolist() == peer.encode(text)


def in_passages(text: str, source: random.Random) -> list[str]:
    """The text cut anywhere."""
    ends = sorted(source.randrange(len(text) + 1) for _ in range(5))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@pytest.mark.parametrize("kind", ["trained", "llama", "gemma"])
def test_parts_of_a_text_have_its_tokens_however_it_comes(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Tokenizer = request.getfixturevalue(kind)
    peer = sentencepiece.SentencePieceProcessor(model_file=str(model.path))
    monkeypatch.setattr(SentencePiece, "least_part", 7)
    source = random.Random(9)
    for text in [TEXT[:3000], *nasty_texts(400)]:
        parts = list(model.encode_parts(in_passages(text, source)))
        assert "".join(part for part, _ in parts) == text
        ids = [id for _, part in parts for id in part.tolist()]
        assert ids == model.encode(text).tolist()
        if "\u2581" not in text:
            assert ids == peer.encode(text)
            spelled = [model.decode_bytes(p, inside=n > 0) for n, (_, p) in enumerate(parts)]
            assert b"".join(spelled).decode() == text
    assert len(list(model.encode_parts([TEXT]))) > 500


def test_a_text_is_not_cut_where_a_piece_reaches_across(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SentencePiece, "least_part", 7)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_prefix=str(tmp_path / "across"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n", "\n    return", "value * "],
        minloglevel=2,
    )
    across = tokenizer.load(tmp_path / "across.model")
    assert [part for part, _ in across.encode_parts([TEXT])] == [TEXT]


def test_a_literal_u2581_is_three_byte_pieces(trained: Tokenizer) -> None:
    ids = trained.encode("a\u2581b").tolist()
    assert ids[-4:-1] == [trained.byte_tokens[byte] for byte in b"\xe2\x96\x81"]


def test_special_ids_are_the_models_and_decode_to_nothing(trained: Tokenizer) -> None:
    assert (trained.unk_id, trained.bos_id, trained.eos_id, trained.pad_id) == (0, 1, 2, None)
    assert trained.vocab_size == SIZE
    assert trained.decode([1, *trained.encode("a b").tolist(), 2]) == "a b"
    assert trained.decode_bytes([1, *trained.encode("a b").tolist(), 2]) == b"a b"


def test_byte_tokens_are_in_the_order_of_bytes(trained: Tokenizer) -> None:
    assert trained.byte_tokens.shape == (256,)
    assert trained.decode_bytes(trained.byte_tokens) == bytes(range(256))


def test_a_model_that_prefixes_a_space_is_read_as_it_is(llama: Tokenizer) -> None:
    peer = sentencepiece.SentencePieceProcessor(model_file=str(llama.path))
    assert llama.strips_first_space
    for text in nasty_texts(200):
        ids = llama.encode(text)
        assert ids.tolist() == peer.encode(text)
        if "\u2581" not in text:
            decoder = StreamDecoder(llama)
            streamed = "".join(decoder.push(int(id)) for id in ids) + decoder.finish()
            assert llama.decode(ids) == text == streamed
            assert llama.decode_bytes(ids).decode() == text


def test_a_model_with_pieces_of_its_makers_is_read_as_it_is(gemma: Tokenizer) -> None:
    peer = sentencepiece.SentencePieceProcessor(model_file=str(gemma.path))
    assert (gemma.pad_id, gemma.eos_id, gemma.bos_id, gemma.unk_id) == (0, 1, 2, 3)
    assert gemma.vocab_size == 350 and not gemma.strips_first_space
    random_source = random.Random(7)
    marks = ["<start_of_turn>", "<mask>", "\n" * 5, "    " * 3, "\t", "self."]
    longer = ["".join(random_source.choices(NASTY + marks, k=2000)) for _ in range(5)]
    for text in [*nasty_texts(200), *longer, "<mask>", "<start_of_turn>" * 500]:
        ids = gemma.encode(text)
        if "\u2581" not in text:
            assert ids.tolist() == peer.encode(text)
        decoder = StreamDecoder(gemma)
        assert "".join(decoder.push(int(id)) for id in ids) + decoder.finish() == text
        assert gemma.decode(ids) == text
        assert gemma.decode_bytes(ids).decode() == text
    # A control piece is never made of text.
    assert peer.piece_to_id("<mask>") not in gemma.encode("<mask>")
