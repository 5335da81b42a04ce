"""The tokenizer gives every text back, and tells what it cannot do."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.tokenizer import StreamDecoder, Tokenizer, TokenizerError

TEXT = "".join(
    f"def method_{n}(self, value={n}):\n    return value * {n}  # the {n}th of them\n\n"
    for n in range(300)
)
SIZE = 340
# What normalisers, SentencePiece's own signs and careless readers change.
NASTY = [
    *("a", "b ", " ", "  ", "\n", "\r\n", "\t", "\0", "\x85", "\u2028", "\u200b", "\ufeff"),
    *("\u2581", "\u2585", "\u2047", "\ufffd", "\uffff", "\u00e9", "e\u0301", "\u65e5\u672c"),
    *("\U0001f600", "<s>", "</s>", "<unk>", "<0x0A>", "self.", "12", "\u00bd", "\ufb01"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer.train([TEXT], path, SIZE)
    return tokenizer.load(path)


def llama_like(directory: Path) -> Tokenizer:
    """A model as Llama 2's: identity, byte fallback, and a space put before every text."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_prefix=str(directory / "llama"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    return tokenizer.load(directory / "llama.model")


def gemma_like(directory: Path) -> Tokenizer:
    """A model as Gemma's: no space put before, runs of white space and marks as own pieces."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_prefix=str(directory / "gemma"),
        model_type="bpe",
        vocab_size=350,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n", "\n\n", "\n\n\n", "\t", "  ", "    ", "<start_of_turn>"],
        control_symbols=["<mask>"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return tokenizer.load(directory / "gemma.model")


def nasty_texts(count: int) -> list[str]:
    random_source = random.Random(3)
    lengths = [random_source.randrange(40) for _ in range(count)] + [5000]
    return ["".join(random_source.choices(NASTY, k=length)) for length in lengths]


def test_every_text_comes_back_exactly(model: Tokenizer) -> None:
    for text in nasty_texts(1000):
        ids = model.encode(text)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert model.decode(ids) == text
        assert model.decode(ids.tolist()) == text
        assert model.decode_bytes(ids) == text.encode()


def test_chunked_encoding_is_sentencepieces_own(model: Tokenizer) -> None:
    peer = sentencepiece.SentencePieceProcessor(model_file=str(model.path))
    for text in [TEXT * 3, "x" * 20_000, *nasty_texts(300)]:
        if "\u2581" not in text:
            assert model.encode(text).tolist() == peer.encode(text)


def in_passages(text: str, source: random.Random) -> list[str]:
    """The text cut anywhere."""
    ends = sorted(source.randrange(len(text) + 1) for _ in range(5))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@pytest.mark.parametrize("kind", ["trained", "llama", "gemma"])
def test_parts_of_a_text_have_its_tokens_however_it_comes(
    kind: str, model: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind != "trained":
        model = llama_like(tmp_path) if kind == "llama" else gemma_like(tmp_path)
    peer = sentencepiece.SentencePieceProcessor(model_file=str(model.path))
    monkeypatch.setattr(tokenizer, "_PART", 7)
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


def test_a_text_without_a_place_to_cut_is_cut_and_comes_back(
    model: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "_PART", 50)
    monkeypatch.setattr(tokenizer, "_LONGEST_PART", 100)
    for cut in (model, llama_like(tmp_path)):
        parts = list(cut.encode_parts(["value" * 25, "value" * 25]))
        assert [len(part) for part, _ in parts] == [100, 100, 50]
        spelled = [cut.decode_bytes(ids, inside=n > 0) for n, (_, ids) in enumerate(parts)]
        assert b"".join(spelled) == b"value" * 50


def test_a_text_is_not_cut_where_a_piece_reaches_across(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "_PART", 7)
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


def test_a_literal_u2581_is_three_byte_pieces(model: Tokenizer) -> None:
    ids = model.encode("a\u2581b").tolist()
    assert ids[-4:-1] == [model.byte_tokens[byte] for byte in b"\xe2\x96\x81"]


def test_streamed_tokens_give_the_same_text(model: Tokenizer) -> None:
    for text in nasty_texts(300):
        decoder = StreamDecoder(model)
        streamed = "".join(decoder.push(int(id)) for id in model.encode(text))
        assert streamed + decoder.finish() == text


def test_a_stream_holds_back_half_a_character(model: Tokenizer) -> None:
    decoder = StreamDecoder(model)
    first, *middle, last = model.encode("\U0001f600").tolist()
    assert [decoder.push(id) for id in (first, *middle)] == ["", "", ""]
    assert decoder.push(last) == "\U0001f600"
    decoder.push(first)
    assert decoder.finish() == "\ufffd"


def test_special_ids_are_the_models_and_decode_to_nothing(model: Tokenizer) -> None:
    assert (model.unk_id, model.bos_id, model.eos_id, model.pad_id) == (0, 1, 2, None)
    assert model.vocab_size == SIZE
    assert model.decode([1, *model.encode("a b").tolist(), 2]) == "a b"
    assert model.decode_bytes([1, *model.encode("a b").tolist(), 2]) == b"a b"


def test_byte_tokens_are_in_the_order_of_bytes(model: Tokenizer) -> None:
    assert model.byte_tokens.shape == (256,)
    assert model.decode_bytes(model.byte_tokens) == bytes(range(256))


def test_a_model_that_prefixes_a_space_is_read_as_it_is(tmp_path: Path) -> None:
    model = llama_like(tmp_path)
    peer = sentencepiece.SentencePieceProcessor(model_file=str(model.path))
    assert model.strips_first_space
    for text in nasty_texts(200):
        ids = model.encode(text)
        assert ids.tolist() == peer.encode(text)
        if "\u2581" not in text:
            decoder = StreamDecoder(model)
            streamed = "".join(decoder.push(int(id)) for id in ids) + decoder.finish()
            assert model.decode(ids) == text == streamed
            assert model.decode_bytes(ids).decode() == text


def test_a_model_with_pieces_of_its_makers_is_read_as_it_is(tmp_path: Path) -> None:
    model = gemma_like(tmp_path)
    peer = sentencepiece.SentencePieceProcessor(model_file=str(model.path))
    assert (model.pad_id, model.eos_id, model.bos_id, model.unk_id) == (0, 1, 2, 3)
    assert model.vocab_size == 350 and not model.strips_first_space
    random_source = random.Random(7)
    marks = ["<start_of_turn>", "<mask>", "\n" * 5, "    " * 3, "\t", "self."]
    longer = ["".join(random_source.choices(NASTY + marks, k=2000)) for _ in range(5)]
    for text in [*nasty_texts(200), *longer, "<mask>", "<start_of_turn>" * 500]:
        ids = model.encode(text)
        if "\u2581" not in text:
            assert ids.tolist() == peer.encode(text)
        decoder = StreamDecoder(model)
        assert "".join(decoder.push(int(id)) for id in ids) + decoder.finish() == text
        assert model.decode(ids) == text
        assert model.decode_bytes(ids).decode() == text
    # A control piece is never made of text.
    assert peer.piece_to_id("<mask>") not in model.encode("<mask>")


def test_training_is_reproducible(model: Tokenizer, tmp_path: Path) -> None:
    tokenizer.train([TEXT], tmp_path / "again.model", SIZE)
    assert (tmp_path / "again.model").read_bytes() == model.path.read_bytes()


def test_long_lines_are_trained_on(tmp_path: Path) -> None:
    # SentencePiece skips sentences over its limit: a corpus of one line would teach nothing.
    tokenizer.train([TEXT.replace("\n", " ")], tmp_path / "m.model", SIZE)
    model = tokenizer.load(tmp_path / "m.model")
    assert len(model.encode(TEXT)) < len(TEXT) / 2


def test_lines_with_the_sign_for_the_unknown_are_trained_on(tmp_path: Path) -> None:
    tokenizer.train([TEXT.replace("\n", "\u2585\n")], tmp_path / "m.model", SIZE)
    assert len(tokenizer.load(tmp_path / "m.model").encode(TEXT)) < len(TEXT) / 2


@pytest.mark.parametrize(
    ("texts", "size", "words"),
    [
        (["a b c"], 2000, "2000 does not fit the training text; the text carries at most 26"),
        ([TEXT], 260, "bytes and characters alone need more than"),
        ([], SIZE, "no text to train on"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_told(
    texts: list[str], size: int, words: str, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError, match=words):
        tokenizer.train(texts, tmp_path / "m.model", size)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_model_is_refused(model: Tokenizer, tmp_path: Path) -> None:
    whole = model.path.read_bytes()
    for name, data in (("text", b"hello"), ("empty", b""), ("cut", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TokenizerError, match=f"{name}: is not a SentencePiece model"):
            tokenizer.load(tmp_path / name)
    with pytest.raises(TokenizerError, match="cannot be read"):
        tokenizer.load(tmp_path / "absent")
