"""Tokenizers with files beside them, against transformers' own of the same directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import TokenizerError
from pretrain.convert import their_tokenizer
from pretrain.convert.their_tokenizer import Theirs
from tests.data_prep.tokenizer.conftest import byte_level
from tests.data_prep.tokenizer.texts import SPECIAL, TEXT, nasty_texts

BOS, EOS, _ = SPECIAL
CHAT = ("<|im_start|>", "<|im_end|>")
MARKED = "<|im_start|>user\nself.method<|im_end|> <note>x<note>\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer.json as Llama 3's, which lays BOS, and one as GPT-2's, which does not."""
    directory = tmp_path_factory.mktemp("saved")
    return {
        "llama3": byte_level(directory / "llama3.json"),
        "gpt2": byte_level(directory / "gpt2.json", None),
    }


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model as Llama 2's; nothing is beside it."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("llama2")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_prefix=str(directory / "tokenizer"),
        model_type="bpe", vocab_size=400, byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return directory / "tokenizer.model"


def beside(directory: Path, file: Path, **files: Any) -> Path:
    """A copy of the tokenizer `file` in the directory, with JSON files beside it."""
    directory.mkdir(exist_ok=True)
    path = directory / f"tokenizer{file.suffix}"
    shutil.copyfile(file, path)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, plain in files.items():
        (directory / f"{name}.json").write_text(json.dumps(plain))
    return path


def decoder(first: int, *tokens: str, special: bool = True) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        str(id): {"content": token, **flags, "special": special}
        for id, token in enumerate(tokens, first)
    }


def fast(**more: Any) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", **more}


def transformers_own(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


LAYOUTS: dict[str, dict[str, Any]] = {
    "added_tokens_decoder": {
        "tokenizer_config": fast(added_tokens_decoder={
            **decoder(404, *CHAT), **decoder(406, "<note>", special=False)}),
    },
    "added_tokens_decoder, which goes before the rest": {
        "tokenizer_config": fast(added_tokens_decoder={
            **decoder(404, *CHAT), **decoder(406, "<note>", special=False)}),
        "added_tokens": {"<other>": 404},
        "special_tokens_map": {"additional_special_tokens": ["<another>"]},
    },
    "added_tokens.json": {
        "tokenizer_config": fast(eos_token="<|im_end|>",
                                 additional_special_tokens=["<|im_start|>"]),
        "added_tokens": {"<note>": 406, "<|im_end|>": 405, "<|im_start|>": 404},
    },
}  # fmt: skip


@pytest.mark.parametrize("files", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
def test_added_tokens_have_the_ids_that_transformers_give_them(
    tmp_path: Path, saved: dict[str, Path], kind: str, files: dict[str, Any]
) -> None:
    path = beside(tmp_path, saved[kind], **files)
    theirs = their_tokenizer.of_file(path)
    peer, (name, data) = transformers_own(tmp_path), theirs.file
    assert len(peer) == theirs.tokenizer.vocab_size == 407
    assert [theirs.tokenizer.name(id) for id in (404, 405, 406)] == [*CHAT, "<note>"]
    copy = tokenizers.Tokenizer.from_str(data.decode())
    copy.no_padding()
    copy.no_truncation()
    for text in [MARKED, *nasty_texts(60, *CHAT, "<note>", EOS, "<tool>")]:
        assert copy.encode(text).ids == peer(text).input_ids
        if not any(token in text for token in (*CHAT, *SPECIAL)):
            found = theirs.tokenizer.encode(text).tolist()
            assert found == peer(text, add_special_tokens=False).input_ids
    assert "added to tokenizer.json: <|im_start|>, <|im_end|>, <note>" in theirs.notes[0]
    # The copy needs no file beside it.
    (tmp_path / "alone").mkdir()
    tokenizer.write(tmp_path / "alone", name, data)
    alone = tokenizer.load(tmp_path / "alone" / name)
    assert (alone.vocab_size, alone.bos_id, alone.eos_id) == (
        407, theirs.tokenizer.bos_id, theirs.tokenizer.eos_id
    )  # fmt: skip
    assert alone.eos_id == (405 if "eos_token" in files["tokenizer_config"] else 401)


def test_files_that_add_nothing_leave_the_copy_as_data_sets_have_it(
    tmp_path: Path, saved: dict[str, Path]
) -> None:
    files = {"tokenizer_config": fast(added_tokens_decoder=decoder(400, *SPECIAL))}
    path = beside(tmp_path, saved["llama3"], **files)
    theirs = their_tokenizer.of_file(path)
    assert theirs.file == tokenizer.standalone(path) and theirs.notes == []


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"added_tokens": {"<a>": 404, "<b>": 406}}, "<b> (id 406)"),
        ({"added_tokens": {"<tool>": 402}}, "<tool> (id 402)"),
        ({"tokenizer_config": {"added_tokens_decoder": decoder(9, "<a>")}}, "<a> (id 9)"),
        ({"tokenizer_config": {"extra_special_tokens": ["<a>", EOS]}}, "<a>"),
        ({"special_tokens_map": {"additional_special_tokens": [{"content": "<a>"}]}}, "<a>"),
    ],
)
def test_a_token_that_would_have_another_id_is_refused_by_name(
    tmp_path: Path, saved: dict[str, Path], files: dict[str, Any], named: str
) -> None:
    path = beside(tmp_path, saved["llama3"], **files)
    with pytest.raises(TokenizerError) as caught:
        their_tokenizer.of_file(path)
    assert str(caught.value) == (
        f"{path}: lacks {named}, which files beside it name; save them into one file with "
        f"transformers, AutoTokenizer.from_pretrained({str(tmp_path)!r}).save_pretrained(NEW), and "
        "give it: --tokenizer NEW/tokenizer.json"
    )


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": []},
        {"added_tokens": [3]},
        {"tokenizer_config": {"added_tokens_decoder": {"4": "<a>"}}},
        {"tokenizer_config": {"added_tokens_decoder": {"four": {"content": "<a>"}}}},
        {"tokenizer_config": {"added_tokens_decoder": [{"content": "<a>"}]}},
    ],
)
def test_files_that_are_no_companions_are_one_mistake(
    tmp_path: Path, saved: dict[str, Path], files: dict[str, Any]
) -> None:
    with pytest.raises(TokenizerError, match=r"is not a JSON object|cannot be read; expected what"):
        their_tokenizer.of_file(beside(tmp_path, saved["llama3"], **files))


ADDED: dict[str, dict[str, Any]] = {
    "added_tokens.json": {"added_tokens": {"<|im_start|>": 400, "<|im_end|>": 401}},
    "added_tokens_decoder": {
        "tokenizer_config": {"added_tokens_decoder": decoder(400, *CHAT),
                             "tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    },
    "a piece with another name": {
        "tokenizer_config": {"added_tokens_decoder": decoder(398, *CHAT)}},
    "special tokens without an id": {
        "special_tokens_map": {"eos_token": "<|im_start|>",
                               "additional_special_tokens": ["<|im_end|>"]}},
}  # fmt: skip


@pytest.mark.parametrize("files", ADDED.values(), ids=ADDED)
def test_a_sentencepiece_model_with_tokens_beside_it_is_refused_by_name(
    tmp_path: Path, llama2: Path, files: dict[str, Any]
) -> None:
    with pytest.raises(
        TokenizerError, match=r"lacks <\|im_start\|>.*, <\|im_end\|>.*, which files"
    ):
        their_tokenizer.of_file(beside(tmp_path, llama2, **files))


def test_what_transformers_save_of_it_can_be_imported(tmp_path: Path, llama2: Path) -> None:
    beside(tmp_path / "hub", llama2, **ADDED["added_tokens_decoder"])
    peer = transformers_own(tmp_path / "hub")
    peer.save_pretrained(tmp_path / "new")
    own = their_tokenizer.of_file(tmp_path / "new/tokenizer.json").tokenizer
    assert (own.vocab_size, own.bos_id, own.name(400)) == (402, peer.bos_token_id, "<|im_start|>")
    for text in ("return self.value", "def x:\n    it's 12", "two  spaces", "日本 é", ""):
        assert own.encode(text).tolist() == peer(text, add_special_tokens=False).input_ids


BEGUN: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing beside it, laid": ("llama3", {}),
    "named and laid": ("llama3", fast(bos_token=BOS)),
    "another one named than is laid": ("llama3", fast(bos_token=EOS)),
    "none named, laid": ("llama3", fast(bos_token=None)),
    "named, not laid": ("gpt2", fast(bos_token=BOS, eos_token=EOS)),
    "well known, not laid": ("gpt2", {}),
    "asked for beside the file": ("gpt2", fast(bos_token=BOS, add_bos_token=True)),
    "unasked for beside the file": ("llama3", fast(bos_token=BOS, add_bos_token=False)),
    "as transformers 4 name it": ("gpt2", {"tokenizer_class": "GPT2Tokenizer", "bos_token": BOS}),
}


@pytest.mark.parametrize(("kind", "config"), BEGUN.values(), ids=BEGUN)
def test_texts_begin_with_bos_where_transformers_lay_it(
    tmp_path: Path, saved: dict[str, Path], kind: str, config: dict[str, Any]
) -> None:
    path = beside(tmp_path, saved[kind], tokenizer_config=config)
    theirs = their_tokenizer.of_file(path)
    first, text = [] if theirs.tokenizer.bos_id is None else [theirs.tokenizer.bos_id], "self.x"
    expected = transformers_own(tmp_path)(text).input_ids
    assert [*first, *theirs.tokenizer.encode(text).tolist()] == expected
    assert first == ([400] if kind == "llama3" else [])
    assert theirs.tokenizer.eos_id == 401
    said = any("not followed: add_bos_token" in note for note in theirs.notes)
    assert said is ("add_bos_token" in config)
    # Data sets go by the documented meaning: what the file or its companions name.
    assert tokenizer.load(path).bos_id == {EOS: 401, None: None}.get(
        config.get("bos_token", 0), 400
    )


def test_a_data_sets_copy_says_itself_what_begins_a_text(
    tmp_path: Path, saved: dict[str, Path]
) -> None:
    path = beside(tmp_path, saved["gpt2"], tokenizer_config=fast(bos_token=BOS))
    name, data = tokenizer.standalone(path)
    (tmp_path / "data").mkdir()
    tokenizer.write(tmp_path / "data", name, data)
    theirs = their_tokenizer.of_file(tmp_path / "data" / name)
    assert theirs.tokenizer.bos_id == 400 and theirs.file == (name, data) and theirs.notes == []


def test_add_bos_token_says_whether_texts_of_a_sentencepiece_model_begin_with_bos(
    tmp_path: Path, llama2: Path
) -> None:
    def of(**config: Any) -> Theirs:
        named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
        return their_tokenizer.of_file(beside(tmp_path, llama2, tokenizer_config=named | config))

    for config in ({}, {"add_bos_token": True}):
        theirs = of(**config)
        assert theirs.tokenizer.bos_id == 1 and theirs.file[1] == llama2.read_bytes()
        # Transformers 5 lay it only where `add_bos_token` asks for it, so there is a note.
        lays = transformers_own(tmp_path)("self.x").input_ids[0] == 1
        assert lays is bool(config)
        assert any("transformers 5 lay none" in note for note in theirs.notes) is not lays
    without = of(add_bos_token=False)
    assert transformers_own(tmp_path)("self.x").input_ids[0] != 1
    assert (without.tokenizer.bos_id, without.tokenizer.eos_id) == (None, 2)
    (tmp_path / "copy").mkdir()
    tokenizer.write(tmp_path / "copy", *without.file)
    copy = tokenizer.load(tmp_path / "copy/tokenizer.model")
    assert (copy.bos_id, copy.eos_id, copy.unk_id, copy.vocab_size) == (None, 2, 0, 400)
    for text in nasty_texts(60):
        assert copy.encode(text).tolist() == theirs.tokenizer.encode(text).tolist()
    assert copy.pieces == theirs.tokenizer.pieces
    # Transformers convert it as it was, but for BOS.
    proto = sentencepiece_model_pb2.ModelProto.FromString(without.file[1])
    assert proto.trainer_spec.bos_id == -1


def test_an_eos_that_another_file_names_is_told(tmp_path: Path, llama2: Path) -> None:
    path = beside(tmp_path, llama2, special_tokens_map={"eos_token": {"content": "<unk>"}})
    assert their_tokenizer.of_file(path).notes[1:] == [
        "eos_token: is </s> of tokenizer.model; files beside it name <unk>"
    ]
