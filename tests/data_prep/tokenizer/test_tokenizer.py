"""A tokenizer of either kind is found and loaded, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.tokenizer import contract, tokenizer
from data_prep.tokenizer.contract import Tokenizer, TokenizerError
from data_prep.tokenizer.hugging_face import HuggingFace
from data_prep.tokenizer.sentencepiece import SentencePiece


def test_what_is_not_a_model_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    whole = trained.path.read_bytes()
    for name, data in (("text", b"hello"), ("empty", b""), ("cut", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TokenizerError, match=f"{name}: is not a SentencePiece model"):
            tokenizer.load(tmp_path / name)
    with pytest.raises(TokenizerError, match="cannot be read"):
        tokenizer.load(tmp_path / "absent")
    (tmp_path / "lfs").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:5e\n")
    with pytest.raises(
        TokenizerError, match=r"lfs: is a Git LFS pointer; fetch the file .*lfs pull"
    ):
        tokenizer.load(tmp_path / "lfs")


def test_a_directory_has_one_tokenizer(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"holds none of tokenizer\.model and tokenizer\.json"):
        tokenizer.find(tmp_path)
    for name in contract.FILES:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(TokenizerError, match="holds both"):
        tokenizer.find(tmp_path)


def test_the_content_says_which_kind_it_is(
    trained: Tokenizer, files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "named.json").write_bytes(trained.path.read_bytes())
    (tmp_path / "named.model").write_bytes(files["llama2"].read_bytes())
    assert isinstance(tokenizer.load(tmp_path / "named.json"), SentencePiece)
    assert isinstance(tokenizer.load(tmp_path / "named.model"), HuggingFace)
    assert tokenizer.standalone(tmp_path / "named.json")[0] == "tokenizer.model"
