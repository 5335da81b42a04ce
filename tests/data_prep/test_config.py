"""The configuration of a data set, and the files shipped with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import config
from data_prep.config import Config
from data_prep.dataset.settings import SettingsError

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))
SOURCE = "sources=[{name: s, paths: ['*.txt']}]"


def test_there_are_shipped_configurations() -> None:
    assert {path.stem for path in CONFIGS} >= {"stdlib", "novels_train", "novels_val"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_sound(path: Path) -> None:
    config.load(path)


def test_missing_settings_are_reported_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        config.load(None, ["sources=[{}, {name: a, paths: [x]}, {name: a, paths: [y]}]"])
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "sources[0].name: not set",
        "sources[0].paths: not set",
        "output: not set",
        "sources: the name 'a' is given twice",
    ]


def test_a_home_directory_that_is_not_there_is_named_wherever_it_is_asked_for() -> None:
    source = "{name: s, paths: ['~nobody-here/*.txt'], exclude: [x, '~nobody-here/y'], "
    source += "cleaning: {decontaminate: ['~nobody-here/z']}}"
    with pytest.raises(SettingsError) as caught:
        config.load(None, [f"sources=[{source}]", "output=~nobody-here/out"])
    assert [problem.partition(": there is no home directory ~nobody-here;")[0]
            for problem in caught.value.problems] == [
        "output", "sources[0].paths[0]", "sources[0].exclude[1]",
        "sources[0].cleaning.decontaminate[0]",
    ]  # fmt: skip


def test_place_and_speed_are_no_part_of_the_identity() -> None:
    one = config.load(None, [SOURCE, "output=a"])
    other = config.load(None, [SOURCE, "output=b", "workers=7", "root=/elsewhere"])
    assert one.identity() == other.identity()
    assert config.load(None, [SOURCE, "output=a", "seed=2"]).identity() != one.identity()


def test_differences_are_named_with_both_values() -> None:
    one = config.load(None, [SOURCE, "output=a"])
    other = config.load(None, [SOURCE.replace("txt", "md"), "output=a", "seed=2", "shards.count=3"])
    assert config.differences(other.identity(), one.identity()) == [
        "seed: 1 there, 2 now",
        "shards.count: 0 there, 3 now",
        "sources[0].paths[0]: '*.txt' there, '*.md' now",
    ]
    assert config.differences(one.identity(), one.identity()) == []


def test_every_key_is_described() -> None:
    names = [line.split(" ")[0] for line in config.describe()]
    assert {"output", "workers", "tokenizer.vocab_size", "sources[].paths"} <= set(names)
    assert set(Config.__dataclass_fields__) <= {name.split(".")[0] for name in names}


def test_grouping_that_does_nothing_is_refused() -> None:
    source = config.SourceConfig(name="s", paths=["*"], format="jsonl", group_by="top")
    assert source.problems() == ["group_by: joins text files, but format is jsonl; leave it out"]
    source = config.SourceConfig(name="s", paths=["*"], group_separator="\n")
    assert source.problems() == [
        "group_separator: has no effect while group_by is file; leave it out"
    ]


def test_slurm_settings_decide_no_byte_and_are_checked() -> None:
    source = "sources=[{name: s, paths: ['*']}]"
    plain = config.load(None, ["output=o", source])
    other = config.load(None, ["output=o", source, "slurm.tasks=3", "slurm.time=0-12:00"])
    assert plain.identity() == other.identity()
    with pytest.raises(SettingsError) as caught:
        config.load(
            None, ["output=o", source, "slurm.time=soon", "slurm.sbatch=[qos=a, --array=1-4]"]
        )
    assert caught.value.problems == [
        "slurm.time: 'soon' is not DAYS-HOURS:MINUTES, e.g. 0-12:00",
        "slurm.sbatch[0]: 'qos=a' is not of the form --name=value or --name",
        "slurm.sbatch[1]: --array is set by data-prep; leave it out",
    ]


def test_settings_of_steps_that_are_not_asked_for_are_refused() -> None:
    with pytest.raises(SettingsError) as raised:
        config.load(
            None,
            [
                *(
                    "output=o",
                    "duplicates.exact=true",
                    "duplicates.buckets=14",
                    "duplicates.rows=8",
                ),
                "sources=[{name: s, paths: [a], format: text, text_field: body, id_field: key, "
                "cleaning: {ngram: 8, language_score: 0.3}}]",
            ],
        )
    assert [problem.split(";")[0] for problem in raised.value.problems] == [
        "sources[0].cleaning.ngram: has no effect without decontaminate",
        "sources[0].cleaning.language_score: has no effect without languages",
        *(
            f"sources[0].{name}: has no effect on text, where no keys or columns are read"
            for name in ("text_field", "id_field")
        ),
        *(f"duplicates.{name}: has no effect without near" for name in ("buckets", "rows")),
    ]
    asked = "cleaning: {ngram: 8, decontaminate: [x], language_score: 0.3, languages: [en]}"
    source = f"sources=[{{name: s, paths: [a], text_field: body, {asked}}}]"
    near = ["duplicates.near=true", "duplicates.buckets=14", "duplicates.rows=8"]
    assert config.load(None, ["output=o", source, *near]).duplicates.rows == 8


PAIRS = {"prompt_field": "question", "answer_field": "answer", "format": "jsonl"}


def test_half_a_pair_and_what_is_not_made_for_pairs_is_refused() -> None:
    assert config.SourceConfig(name="s", paths=["*"], **PAIRS).problems() == []
    wrong = config.SourceConfig(
        name="s",
        paths=["*"],
        text_field="body",
        answer_field="answer",
        cleaning=config.CleaningConfig(nfc=True),
    )
    assert [problem.split(";")[0] for problem in wrong.problems()] == [
        "prompt_field: not set, but answer_field is",
        "text_field: cannot be set with prompt_field and answer_field",
        "prompt_field: is read from jsonl, but format is auto",
        "cleaning: works on running text, not on a prompt and its answer",
    ]
    asked = config.SourceConfig(name="s", paths=["*"], question="Who?")
    assert asked.problems() == ["question: needs prompt_field and answer_field; set them too"]
    same = config.SourceConfig(name="s", paths=["*"], **{**PAIRS, "answer_field": "question"})
    assert same.problems() == ["answer_field: equals prompt_field, 'question'; name another key"]


def test_pairs_are_part_of_the_identity_and_plain_sources_as_they_were() -> None:
    plain = config.load(None, ["output=o", "sources=[{name: s, paths: [a], format: jsonl}]"])
    assert "prompt_field" not in plain.identity()["sources"][0]
    pairs = "sources=[{name: s, paths: [a], format: jsonl, prompt_field: q, answer_field: a}]"
    source = config.load(None, ["output=o", pairs]).identity()["sources"][0]
    assert (source["prompt_field"], source["answer_field"]) == ("q", "a")
    assert "question" not in source
    asked = pairs.replace("answer_field: a", "answer_field: a, question: 'Who?'")
    (source,) = config.load(None, ["output=o", asked]).identity()["sources"]
    assert source["question"] == "Who?"


def test_settings_that_another_one_makes_idle_are_told() -> None:
    words = ["output=o", "sources=[{name: s, paths: [a]}]", "tokenizer.vocab_size=300"]
    words += ["tokenizer.character_coverage=0.99", "shards.tokens=5"]
    assert config.load(None, words).without_effect() == []
    told = config.load(None, [*words, "tokenizer.path=x", "shards.count=2"]).without_effect()
    assert [one.split(",")[0] for one in told] == [
        "tokenizer.vocab_size: has no effect beside tokenizer.path",
        "tokenizer.character_coverage: has no effect beside tokenizer.path",
        "shards.tokens: has no effect beside shards.count",
    ]
    assert config.load(None, [*words[:2], "tokenizer.path=x"]).without_effect() == []
