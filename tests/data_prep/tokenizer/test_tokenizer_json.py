"""What a tokenizer.json says of its special tokens, and of places to cut a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from data_prep.tokenizer import tokenizer, tokenizer_json
from data_prep.tokenizer.contract import TokenizerError
from data_prep.tokenizer.hugging_face import HuggingFace


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


def test_without_a_sign_there_is_no_bos_or_eos(
    gpt2_like: Callable[[Path, tuple[str, ...]], Path], tmp_path: Path
) -> None:
    for names, eos in (
        (("<x>", "<y>"), None),
        (("<|endoftext|>", "<x>"), 400),
        # Two that could be meant: neither is guessed.
        (("<|endoftext|>", "</s>"), None),
    ):
        model = tokenizer.load(gpt2_like(tmp_path / "t.json", names))
        assert (model.bos_id, model.eos_id) == (None, eos)


def test_mistakes_are_reported(files: dict[str, Path], tmp_path: Path) -> None:
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
        ("[]]", r"tokenizer_config\.json: is not a JSON object"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(TokenizerError, match=words):
            tokenizer.load(bad)


@pytest.mark.parametrize("kind", ["llama3", "gpt2", "qwen", "llama2"])
def test_a_file_that_lays_bos_for_other_programs_is_the_same_copy(
    files: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(files[kind].read_bytes())
    first = "<s>" if kind == "llama2" else "<|begin_of_text|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": first}))
    copy = tmp_path / "copy.json"
    copy.write_bytes(tokenizer.standalone(tmp_path / "tokenizer.json")[1])
    model = tokenizer.load(copy)
    assert isinstance(model, HuggingFace)
    assert (model.laying == copy.read_bytes()) is (kind in ("llama3", "qwen"))
    laying = tokenizers.Tokenizer.from_str(model.laying.decode())
    laying.no_truncation()
    laying.no_padding()
    expected = [model.bos_id, *model.encode("self.x").tolist()]
    assert laying.encode("self.x").ids == expected
    assert laying.encode("self.x", "self.x").ids == expected * 2
    (tmp_path / "laying.json").write_bytes(model.laying)
    assert tokenizer.standalone(tmp_path / "laying.json")[1] == copy.read_bytes()


def test_what_is_laid_may_be_none_of_what_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    def laid(kind: str, **named: str | None) -> tuple[int | None, int | None]:
        (tmp_path / "tokenizer.json").write_bytes(files[kind].read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
        model = tokenizer.load(tmp_path / "tokenizer.json")
        assert isinstance(model, HuggingFace)
        copy = HuggingFace(tmp_path / "elsewhere.json", model.as_laid)
        assert copy.as_laid == copy.standalone == model.as_laid
        return copy.bos_id, copy.eos_id

    assert laid("gpt2", bos_token="<|begin_of_text|>") == (None, 401)
    assert laid("llama3", bos_token="<|eot_id|>") == (400, 401)
    assert laid("llama3", bos_token=None, eos_token="<|eot_id|>") == (400, 402)
