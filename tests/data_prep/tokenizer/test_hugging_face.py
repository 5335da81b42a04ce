"""A tokenizer.json is read as its own library reads it, and gives texts back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data_prep.tokenizer import tokenizer, tokenizer_json
from data_prep.tokenizer.contract import StreamDecoder
from data_prep.tokenizer.hugging_face import HuggingFace
from tests.data_prep.tokenizer.texts import SPECIAL, TEXT, nasty_texts

# What byte-level BPE and added tokens treat in their own way.
SIGNS = ["<|eot_id|>", "<|begin_of_text|>", "it's", "\nx", ".\n/", "\x1c\n", "<tool>", "\n\n\n"]


KINDS = ("llama3", "qwen", "gpt2", "llama2", "metaspace", "gemma")


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
    for text in nasty_texts(400, *SIGNS):
        ids = model.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert model.decode(ids) == text == model.decode(ids.tolist())
        assert model.decode_bytes(ids) == text.encode()
        decoder = StreamDecoder(model)
        assert "".join(decoder.push(int(id)) for id in ids) + decoder.finish() == text
        if not (kind == "metaspace" and text.startswith(" ")):
            assert ids.tolist() == peer.encode(text, add_special_tokens=False).ids
            assert peer.decode(ids.tolist()) == text


def test_the_space_that_metaspace_prefixes_is_told_from_other_pieces_of_a_space(
    files: dict[str, Path], tmp_path: Path
) -> None:
    plain = json.loads(files["metaspace"].read_bytes())
    assert plain["pre_tokenizer"]["type"] == "Metaspace" and "<0x20>" in plain["model"]["vocab"]
    spaces = {key: plain["pre_tokenizer"][key] for key in ("replacement", "prepend_scheme")}
    decoder = {"type": "Metaspace", **spaces, "split": False}
    plain["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, decoder]}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(plain))
    model, peer = tokenizer.load(path), peer_of(path)
    # A trainer whose alphabet has a plain space makes a piece of it, which no text holds.
    vocabulary = plain["model"]["vocab"]
    vocabulary[" "] = vocabulary.pop("<0x01>")
    path.write_text(json.dumps(plain))
    other = tokenizer.load(path)
    for text in nasty_texts(60):
        assert model.decode(model.encode(text)) == text
        assert other.encode(text).tolist() == model.encode(text).tolist() or "\1" in text
        assert other.decode(other.encode(text)) == text or "\1" in text
        if not text.startswith(" "):
            assert model.encode(text).tolist() == peer.encode(text, add_special_tokens=False).ids


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
    monkeypatch.setattr(HuggingFace, "least_part", 3)
    model, peer = tokenizer.load(files[kind]), peer_of(files[kind])
    cut = tokenizer_json.cut(json.loads(files[kind].read_bytes()))
    lines = TEXT.replace("\n\n", "\n")
    assert cut is not None and len(cut.findall(lines)) > 100
    for text in [TEXT, lines, TEXT.replace("\n", " "), *nasty_texts(400, *SIGNS)]:
        if not (kind == "metaspace" and text.startswith(" ")):
            assert model.encode(text).tolist() == peer.encode(text, add_special_tokens=False).ids


def test_what_reads_like_a_special_token_is_text(files: dict[str, Path]) -> None:
    for kind in KINDS:
        model = tokenizer.load(files[kind])
        for name in (*SPECIAL, "<s>", "</s>"):
            ids = model.encode(f"a{name} {name}")
            assert not {model.bos_id, model.eos_id, model.pad_id} & set(ids.tolist())
            assert model.decode(ids) == f"a{name} {name}"


def test_a_special_token_that_is_a_piece_of_a_unigram_model_is_text_in_a_text(
    files: dict[str, Path],
) -> None:
    path = files["unigram"]
    model, library = tokenizer.load(path), peer_of(path)
    assert (model.bos_id, model.eos_id, model.unk_id) == (1, 2, 0)
    assert 1 in library.encode("a <s> b").ids
    # The same model, in which these pieces are signs that no text has.
    plain = json.loads(path.read_bytes())
    for place in range(4):
        plain["model"]["vocab"][place][0] = chr(0xE000 + place)
    plain["added_tokens"] = plain["added_tokens"][4:]
    peer = tokenizers.Tokenizer.from_str(json.dumps(plain))
    for text in ("the <s>old</s> <pad>", "<unk>", "</s></s> <tool>", TEXT):
        ids = model.encode(text)
        assert model.decode(ids) == text
        assert ids.tolist() == peer.encode(text).ids
    assert model.decode([300]) == "<tool>" == model.name(300)
    assert 300 in model.encode("</s> <tool>")


def test_the_unknown_piece_of_a_unigram_model_is_not_found_in_a_text(
    files: dict[str, Path], tmp_path: Path
) -> None:
    plain = json.loads(files["unigram"].read_bytes())
    plain["added_tokens"] = []
    (tmp_path / "t.json").write_text(json.dumps(plain), encoding="utf-8")
    model = tokenizer.load(tmp_path / "t.json")
    assert model.unk_id == 0 and 0 not in model.encode("an <unk>")
    assert 0 in model.encode("\u0416") and model.decode(model.encode("an <unk>")) == "an <unk>"


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


def test_an_added_token_means_its_own_characters(files: dict[str, Path], tmp_path: Path) -> None:
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


def test_byte_tokens_are_fallback_pieces_or_parts_of_characters(files: dict[str, Path]) -> None:
    model = tokenizer.load(files["llama2"])
    assert model.decode_bytes(model.byte_tokens) == b"".join(bytes([n]) for n in range(256))
    model = tokenizer.load(files["llama3"])
    # Of single bytes all but ASCII; the training text taught no other part of a character.
    assert sorted(model.pieces[id] for id in model.byte_tokens) == [
        bytes([byte]) for byte in range(128, 256)
    ]


def test_control_tokens_that_the_file_does_not_call_special_are_text_in_a_text(
    files: dict[str, Path], tmp_path: Path
) -> None:
    raw = tokenizers.Tokenizer.from_file(str(files["llama3"]))
    names = ("<|user|>", "<\uff5cUser\uff5c>", "<think>", "<|fim|>", "<end>", "[CALL]", "[MORE]")
    raw.add_tokens([tokenizers.AddedToken(name, special=False) for name in names])
    raw.save(str(tmp_path / "tokenizer.json"))
    text = "".join(f" {name} a" for name in names)

    def held() -> list[str]:
        model = tokenizer.load(tmp_path / "tokenizer.json")
        ids = model.encode(text).tolist()
        assert model.decode(ids) == text
        return [name for name in map(model.name, ids) if name in names]

    assert held() == list(names)
    config = {
        "chat_template": "<|user|>{{ content }}<\uff5cUser\uff5c><think>",
        "eos_token": "<end>",
        "added_tokens_decoder": {"409": {"content": "[CALL]", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    more = {"additional_special_tokens": None, "extra_special_tokens": {"more": "[MORE]"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(more))
    # Tokens of texts: what the template holds is no control token, or it does not hold it.
    assert held() == ["<think>", "<|fim|>"]
    model = tokenizer.load(tmp_path / "tokenizer.json")
    assert model.pieces[model.vocab_size - len(names)] == b"", "<|user|>"
    # The copy in a data set has no companions.
    name, data = tokenizer.standalone(tmp_path / "tokenizer.json")
    copy = tokenizer.of_bytes(tmp_path / "copy" / name, data)
    assert copy.encode(text).tolist() == model.encode(text).tolist()
    assert (
        tokenizer.of_bytes(tmp_path / name, data).encode(text).tolist()
        == copy.encode(text).tolist()
    )
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text(config["chat_template"])
    assert held() == ["<think>", "<|fim|>", "<end>", "[CALL]"]
