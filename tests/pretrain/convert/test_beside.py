"""Files beside a model's weights, on import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.dataset.settings import SettingsError
from pretrain.checkpoint.runs import files_beside
from pretrain.convert import beside, llama

NAMED = [{"name": "default", "template": "one"}, {"name": "tools", "template": "two"}]


def write(directory: Path, **files: Any) -> Path:
    directory.mkdir(exist_ok=True)
    for name, plain in files.items():
        (directory / f"{name}.json").write_text(json.dumps(plain))
    return directory


def test_templates_and_ends_of_a_text_are_kept(tmp_path: Path, save_model: Any) -> None:
    save_model(tmp_path / "hub")
    generation = {"eos_token_id": [2, 7], "top_p": 0.9, "transformers_version": "5.24.0"}
    write(tmp_path / "hub", tokenizer_config={"chat_template": NAMED}, generation_config=generation)
    llama.run(tmp_path / "hub", tmp_path / "out", ["segment=64"], None)
    kept = files_beside(tmp_path / "out")
    assert kept.keys() == {
        "chat_template.jinja", "additional_chat_templates/tools.jinja", "generation_config.json"
    }  # fmt: skip
    assert kept["chat_template.jinja"] == b"one"
    assert kept["additional_chat_templates/tools.jinja"] == b"two"
    assert json.loads(kept["generation_config.json"]) == {"eos_token_id": [2, 7], "top_p": 0.9}


def test_a_template_in_a_file_goes_before_that_of_the_tokenizers_configuration(
    tmp_path: Path,
) -> None:
    write(tmp_path, tokenizer_config={"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("new")
    assert beside.of_directory(tmp_path, {}) == {"chat_template.jinja": b"new"}


def test_without_a_generation_config_the_ends_are_those_of_the_configuration(
    tmp_path: Path,
) -> None:
    found = beside.of_directory(tmp_path, {"eos_token_id": [3, 4], "pad_token_id": None})
    assert json.loads(found["generation_config.json"]) == {"eos_token_id": [3, 4]}
    assert beside.of_directory(tmp_path, {}) == {}


@pytest.mark.parametrize(
    ("kept", "own", "ends"),
    [
        ({}, 2, 2),
        ({}, None, None),
        ({"eos_token_id": 2}, 2, 2),
        ({"eos_token_id": 5}, 2, [5, 2]),
        ({"eos_token_id": [5, 2]}, 2, [5, 2]),
        ({"eos_token_id": [5, 6]}, None, [5, 6]),
        # As an import of an earlier version kept it, which left the token out.
        ({"eos_token_id": 7}, 2, 2),
        ({"eos_token_id": [5, 9]}, None, 5),
    ],
)
def test_an_export_ends_a_text_where_its_origin_did_and_at_its_own_eos(
    tmp_path: Path, kept: dict[str, Any], own: int | None, ends: Any
) -> None:
    write(tmp_path, generation_config=kept)
    special = {"bos_token_id": 1, "eos_token_id": own, "pad_token_id": None}
    assert beside.generation(tmp_path, special, 7) == {**special, "eos_token_id": ends}


def test_an_export_names_no_id_that_is_no_token(tmp_path: Path) -> None:
    unknown = {
        "bos_token_id": 7, "pad_token_id": -1, "decoder_start_token_id": 8,
        "forced_eos_token_id": 7, "begin_suppress_tokens": [9],
    }  # fmt: skip
    known = {"forced_bos_token_id": 6, "top_p": 0.9, "max_length": 400}
    mixed = {
        "suppress_tokens": [8, 5], "bad_words_ids": [[1, 7], [3, 4]],
        "sequence_bias": [[[7], -1.0], [[2, 6], -10.0]],
    }  # fmt: skip
    write(tmp_path, generation_config=unknown | known | mixed)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert beside.generation(tmp_path, special, 7) == {
        **special, **known, "suppress_tokens": [5], "bad_words_ids": [[3, 4]],
        "sequence_bias": [[[2, 6], -10.0]],
    }  # fmt: skip


@pytest.mark.parametrize("given", ["2", [2, "7"], {"id": 2}])
def test_an_end_of_texts_that_is_no_id_is_refused(
    tmp_path: Path, save_model: Any, given: Any
) -> None:
    save_model(tmp_path / "hub")
    write(tmp_path / "hub", generation_config={"eos_token_id": given})
    with pytest.raises(SettingsError) as caught:
        llama.run(tmp_path / "hub", tmp_path / "out", ["segment=64"], None)
    (problem,) = caught.value.problems
    assert problem == f"eos_token_id: expected an id, or a list of ids, found {given!r}"


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(SettingsError) as caught:
        beside.of_directory(tmp_path, {})
    assert caught.value.problems[0].startswith("chat_template.jinja: cannot be read ('utf-8' codec")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"adapter_config": {}}, "adapter_config.json: transformers add an adapter to the weights"),
        ({"tokenizer_config": {"chat_template": [3]}}, "tokenizer_config.json: chat_template: exp"),
        ({"tokenizer_config": {"chat_template": [{"name": "../x", "template": "t"}]}}, "expected"),
        ({"generation_config": []}, "generation_config.json: expected a JSON object"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(tmp_path: Path, files: Any, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        beside.of_directory(write(tmp_path, **files), {})
    assert said in caught.value.problems[0]
