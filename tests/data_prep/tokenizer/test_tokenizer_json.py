"""A tokenizer.json is read as its own library reads it, gives texts back, and stands alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from data_prep.tokenizer import tokenizer, tokenizer_json
from data_prep.tokenizer.tokenizer import HuggingFace, SentencePiece, StreamDecoder, TokenizerError

TEXT = "".join(
    f"def method_{n}(self, value={n}):\n    return value * {n}  # the {n}th of them, it's\n\n"
    for n in range(300)
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
NASTY = [
    *("a", "b ", " ", "  ", "\n", "\r\n", "\t", "\0", "\x85", "\u2028", "\u200b", "\ufeff"),
    *("\u2585", "\u2047", "\ufffd", "\uffff", "\u00e9", "e\u0301", "\u65e5\u672c", "\u0130"),
    *("\U0001f600", "<s>", "</s>", "<unk>", "<0x0A>", "self.", "12", "\u00bd", "\ufb01"),
    *("<|eot_id|>", "<|begin_of_text|>", "it's", "\nx", ".\n/", "\x1c\n", "<tool>", "\n\n\n"),
]


def byte_level(path: Path, split: str | None = LLAMA3, special: tuple[str, ...] = SPECIAL) -> Path:
    """A tokenizer.json as Llama 3's; without `split` as GPT-2's, with no BOS laid before texts."""
    model = tokenizers.Tokenizer(models.BPE(ignore_merges=split is not None))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:
        first = pre_tokenizers.Split(Regex(split), "isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = pre_tokenizers.Sequence([first, last])
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    # GPT-2's split ends runs of line ends one before a word: it learns pieces of two.
    model.train_from_iterator([TEXT, TEXT.replace("\n\n", "\n\n\n")], trainer)
    model.add_special_tokens([AddedToken(name, special=True) for name in special])
    model.add_tokens([AddedToken("<tool>", special=False)])
    if split:
        bos = processors.TemplateProcessing(
            single=f"{special[0]} $A",
            pair=f"{special[0]} $A {special[0]} $B",
            special_tokens=[(special[0], model.token_to_id(special[0]))],
        )
        model.post_processor = processors.Sequence([processors.ByteLevel(), bos])
    model.enable_truncation(8)
    model.enable_padding(length=16, pad_token=special[-1], pad_id=model.token_to_id(special[-1]))
    model.save(str(path))
    return path


def spaced(path: Path, prefix: str) -> Path:
    """A tokenizer.json as Llama 2's; `prefix`: by its normalizer ("Prepend"), "Metaspace", none."""
    model = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    model.train_from_iterator([TEXT], trainer)
    plain = json.loads(model.to_str())
    plain["added_tokens"] = plain["added_tokens"][:3]
    written = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    read = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    steps: list[Any] = [read, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    plain["decoder"] = {"type": "Sequence", "decoders": steps}
    if prefix == "Metaspace":
        plain["pre_tokenizer"]["split"] = False
    else:
        before = [{"type": "Prepend", "prepend": "\u2581"}] if prefix else []
        plain["normalizer"] = {"type": "Sequence", "normalizers": [*before, written]}
        plain["pre_tokenizer"] = None
    path.write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("json")
    return {
        "llama3": byte_level(directory / "llama3.json"),
        "qwen": byte_level(directory / "qwen.json", QWEN),
        "gpt2": byte_level(directory / "gpt2.json", None),
        "llama2": spaced(directory / "llama2.json", "Prepend"),
        "metaspace": spaced(directory / "metaspace.json", "Metaspace"),
        "gemma": spaced(directory / "gemma.json", ""),
    }


KINDS = ("llama3", "qwen", "gpt2", "llama2", "metaspace", "gemma")


def nasty_texts(count: int) -> list[str]:
    random_source = random.Random(5)
    lengths = [random_source.randrange(40) for _ in range(count)] + [3000]
    return ["", *("".join(random_source.choices(NASTY, k=length)) for length in lengths)]


def peer_of(path: Path) -> tokenizers.Tokenizer:
    """The library alone, with what the file says of padding and truncation left out."""
    peer = tokenizers.Tokenizer.from_file(str(path))
    peer.encode_special_tokens = True
    peer.no_padding()
    peer.no_truncation()
    return peer


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back_from_the_librarys_own_tokens(
    kind: str, files: dict[str, Path]
) -> None:
    model, peer = tokenizer.load(files[kind]), peer_of(files[kind])
    assert isinstance(model, HuggingFace)
    for text in nasty_texts(400):
        ids = model.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert model.decode(ids) == text == model.decode(ids.tolist())
        assert model.decode_bytes(ids) == text.encode()
        decoder = StreamDecoder(model)
        assert "".join(decoder.push(int(id)) for id in ids) + decoder.finish() == text
        if not (kind == "metaspace" and text.startswith(" ")):
            assert ids.tolist() == peer.encode(text, add_special_tokens=False).ids
            assert peer.decode(ids.tolist()) == text


def test_a_literal_u2581_comes_back_from_byte_level_bpe_alone(files: dict[str, Path]) -> None:
    for kind in KINDS:
        model = tokenizer.load(files[kind])
        lost = kind in ("llama2", "metaspace", "gemma")
        assert model.decode(model.encode("a\u2581b")) == ("a b" if lost else "a\u2581b")


def test_a_first_space_that_the_library_swallows_is_kept(files: dict[str, Path]) -> None:
    model, peer = tokenizer.load(files["metaspace"]), peer_of(files["metaspace"])
    assert peer.encode(" a").ids == peer.encode("a").ids
    assert model.encode(" a").tolist() == tokenizer.load(files["llama2"]).encode(" a").tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_cut_where_it_changes_no_token(
    kind: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "_JSON_PART", 3)
    model, peer = tokenizer.load(files[kind]), peer_of(files[kind])
    cut = tokenizer_json.cut(json.loads(files[kind].read_bytes()))
    lines = TEXT.replace("\n\n", "\n")
    assert cut is not None and len(cut.findall(lines)) > 100
    for text in [TEXT, lines, TEXT.replace("\n", " "), *nasty_texts(400)]:
        if not (kind == "metaspace" and text.startswith(" ")):
            assert model.encode(text).tolist() == peer.encode(text, add_special_tokens=False).ids


def test_a_text_is_cut_only_where_that_is_known_to_be_exact(files: dict[str, Path]) -> None:
    byte_level, spaced = (json.loads(files[kind].read_bytes()) for kind in ("llama3", "llama2"))
    line = {**byte_level["added_tokens"][-1], "content": "a\nb"}
    split, last = byte_level["pre_tokenizer"]["pretokenizers"]
    other = {"type": "Sequence", "pretokenizers": [{**split, "pattern": {"Regex": "a\nb"}}, last]}
    grown = {**spaced["model"], "vocab": {**spaced["model"]["vocab"], "a\u2581b": 400}}
    for plain in (
        {**byte_level, "added_tokens": [line]},
        {**byte_level, "added_tokens": [{**line, "content": "x", "lstrip": True}]},
        {**byte_level, "pre_tokenizer": other},
        {**byte_level, "normalizer": {"type": "NFKC"}},
        {**spaced, "model": grown},
        {**spaced, "pre_tokenizer": {"type": "Punctuation", "behavior": "Isolated"}},
    ):
        assert tokenizer_json.cut(plain) is None


def test_what_reads_like_a_special_token_is_text(files: dict[str, Path]) -> None:
    for kind in KINDS:
        model = tokenizer.load(files[kind])
        for name in (*SPECIAL, "<s>", "</s>"):
            ids = model.encode(f"a{name} {name}")
            assert not {model.bos_id, model.eos_id, model.pad_id} & set(ids.tolist())
            assert model.decode(ids) == f"a{name} {name}"


def test_special_ids_are_the_files_and_decode_to_nothing(files: dict[str, Path]) -> None:
    def ids(kind: str) -> tuple[int | None, ...]:
        model = tokenizer.load(files[kind])
        return model.bos_id, model.eos_id, model.pad_id, model.unk_id, model.vocab_size

    assert ids("llama3") == (400, 401, 402, None, 404)
    assert ids("llama2") == (1, 2, None, 0, 400)
    model = tokenizer.load(files["llama3"])
    assert model.decode([400, *model.encode("a b").tolist(), 401]) == "a b"
    decoder = StreamDecoder(model)
    assert [decoder.push(id) for id in (400, *model.encode("a").tolist())] == ["", "a"]


def test_an_added_token_stands_for_its_own_characters(
    files: dict[str, Path], tmp_path: Path
) -> None:
    # "\u00e9" is how byte-level BPE writes the byte 0xE9, and the library reads it so.
    raw = tokenizers.Tokenizer.from_file(str(files["llama3"]))
    raw.add_tokens(["<\u00e9>"])
    raw.save(str(tmp_path / "t.json"))
    model = tokenizer.load(tmp_path / "t.json")
    assert model.encode("<\u00e9>").tolist() == [404]
    assert model.decode([404]) == "<\u00e9>"


def test_the_vocabulary_reaches_to_the_highest_id(files: dict[str, Path], tmp_path: Path) -> None:
    plain = json.loads(files["llama2"].read_bytes())
    plain["model"]["vocab"]["far"] = 1000
    (tmp_path / "t.json").write_text(json.dumps(plain), encoding="utf-8")
    model = tokenizer.load(tmp_path / "t.json")
    assert model.vocab_size == 1001 and model.decode([999]) == ""


@pytest.mark.parametrize(
    ("companions", "ids"),
    [
        ({"tokenizer_config.json": {"eos_token": "<|eot_id|>"}}, (400, 402, 402)),
        ({"tokenizer_config.json": {"bos_token": None, "pad_token": None}}, (None, 401, None)),
        ({"tokenizer_config.json": {"bos_token": {"content": "<tool>"}}}, (403, 401, 402)),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|eot_id|>"}}}, (400, 402, 402)),
        (
            {
                "special_tokens_map.json": {"eos_token": "<|eot_id|>", "bos_token": "<|eot_id|>"},
                "tokenizer_config.json": {"eos_token": "<|end_of_text|>"},
            },
            (402, 401, 402),
        ),
    ],
)
def test_a_copy_carries_what_files_beside_the_original_say(
    companions: dict[str, Any], ids: tuple[int | None, ...], files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "from").mkdir()
    given = tmp_path / "from" / "tokenizer.json"
    given.write_bytes(files["llama3"].read_bytes())
    for name, content in companions.items():
        (tmp_path / "from" / name).write_text(json.dumps(content))
    (tmp_path / "tokenizer.model").write_bytes(b"of another kind")
    name, data = tokenizer.standalone(given)
    tokenizer.write(tmp_path, name, data)
    copy = tokenizer.find(tmp_path)
    assert copy == tmp_path / "tokenizer.json"
    for path in (given, copy):
        model = tokenizer.load(path)
        assert (model.bos_id, model.eos_id, model.pad_id) == ids
    assert tokenizer.standalone(copy) == (name, data)
    # Other programs read the copy and encode as before.
    peer, own = (tokenizers.Tokenizer.from_file(str(path)) for path in (given, copy))
    for pair in (("a b",), ("a b", "c")):
        assert peer.encode(*pair).ids == own.encode(*pair).ids
        assert peer.encode(*pair).type_ids == own.encode(*pair).type_ids


def test_without_a_sign_there_is_no_bos_or_eos(tmp_path: Path) -> None:
    for names, eos in (
        (("<x>", "<y>"), None),
        (("<|endoftext|>", "<x>"), 400),
        # Two that could be meant: neither is guessed.
        (("<|endoftext|>", "</s>"), None),
    ):
        model = tokenizer.load(byte_level(tmp_path / "t.json", None, names))
        assert (model.bos_id, model.eos_id) == (None, eos)


def test_byte_tokens_are_fallback_pieces_or_parts_of_characters(files: dict[str, Path]) -> None:
    model = tokenizer.load(files["llama2"])
    assert model.decode_bytes(model.byte_tokens) == b"".join(bytes([n]) for n in range(256))
    model = tokenizer.load(files["llama3"])
    # Of single bytes all but ASCII; the training text taught no other part of a character.
    assert sorted(model.pieces[id] for id in model.byte_tokens) == [
        bytes([byte]) for byte in range(128, 256)
    ]


def test_mistakes_are_told(files: dict[str, Path], tmp_path: Path) -> None:
    whole = json.loads(files["llama3"].read_bytes())
    bad = tmp_path / "tokenizer.json"
    for data, words in (
        (b'{"config": {"pattern": 1}}', r"tokenizer\.json: is not a tokenizer\.json"),
        (json.dumps({**whole, "decoder": None}).encode(), "has the decoder none; byte-level BPE"),
        (json.dumps({**whole, "decoder": {"type": "BPEDecoder", "suffix": "x"}}).encode(), "BPED"),
        (
            json.dumps({**whole, "model": {**whole["model"], "dropout": 0.5}}).encode(),
            "has the dropout 0.5",
        ),
    ):
        bad.write_bytes(data)
        with pytest.raises(TokenizerError, match=words):
            tokenizer.load(bad)
    bad.write_text(json.dumps(whole))
    for text, words in (
        ('{"eos_token": "<nowhere>"}', "lacks '<nowhere>', which a tokenizer_config"),
        ('{"eos_token": 3}', r"tokenizer_config\.json: eos_token: expected a token or null"),
        ("[]]", r"tokenizer_config\.json: cannot be read as a JSON object"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(TokenizerError, match=words):
            tokenizer.load(bad)


def test_a_directory_has_one_tokenizer(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"holds none of tokenizer\.model and tokenizer\.json"):
        tokenizer.find(tmp_path)
    for name in tokenizer.FILES:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(TokenizerError, match="holds both"):
        tokenizer.find(tmp_path)


def test_the_kind_is_told_by_the_content(files: dict[str, Path], tmp_path: Path) -> None:
    tokenizer.train([TEXT], tmp_path / "named.json", 340)
    (tmp_path / "named.model").write_bytes(files["llama2"].read_bytes())
    assert isinstance(tokenizer.load(tmp_path / "named.json"), SentencePiece)
    assert isinstance(tokenizer.load(tmp_path / "named.model"), HuggingFace)
    assert tokenizer.standalone(tmp_path / "named.json")[0] == "tokenizer.model"
