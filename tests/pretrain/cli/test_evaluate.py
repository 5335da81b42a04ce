"""What an evaluation or a generation cannot be asked, all of it at once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def refused(ended: subprocess.CompletedProcess[str], *options: str) -> str:
    """The message of a command that was refused for these options, one mistake each."""
    assert (ended.returncode, ended.stdout) == (2, "")
    lines = ended.stderr.splitlines()[1:]
    assert [line.removeprefix("  - ").split(":")[0] for line in lines] == list(options)
    return ended.stderr


def test_of_passkeys(pretrain: Run) -> None:
    words = ["--lengths", "0,1mm,512,512", "--depths", "0.5,1.5,deep", "--samples", "0"]
    said = refused(
        pretrain("eval", "passkey", "run", *words, "--seed", "-1"),
        *["--lengths"] * 3, "--samples", "--seed", *["--depths"] * 2,
    )  # fmt: skip
    assert "--lengths: expected tokens as 4096, 32k or 1m, found '1mm'" in said
    assert "--lengths: 512 is given twice" in said
    assert "--depths: expected at least 0 and at most 1, found 1.5" in said


def test_of_needles(pretrain: Run) -> None:
    words = ["--filler", "none", "--tasks", "riddle,qa1,qa1,passkey", "--lengths", "0"]
    said = refused(
        pretrain("eval", "needles", "run", *words),
        "--filler", "--lengths", *["--tasks"] * 3,
    )  # fmt: skip
    assert "--tasks: expected one of single, multikey, " in said
    assert "found 'passkey'" in said  # it has a command of its own
    assert "--tasks: qa1 is given twice" in said
    assert (
        "--filler: none: there is no such directory; expected the directory of a data set" in said
    )


def test_of_associative_recall(pretrain: Run) -> None:
    words = ["--pairs", "4,513,4", "--distances", "0,-1", "--answers", "0", "--seed", "-1"]
    said = refused(
        pretrain("eval", "mqar", "run", *words),
        "--pairs", "--pairs", "--distances", "--answers", "--seed",
    )  # fmt: skip
    assert "--pairs: expected at least 1 and at most 512, found 513" in said


@pytest.mark.parametrize(
    "words",
    ["passkey {}", "mqar {}", "needles {} --filler {}", "summaries {} c.yaml",
     "perplexity {} --data {}", "harness {} --tasks-directory ."],
)  # fmt: skip
def test_a_path_is_refused_for_what_it_is(words: str, pretrain: Run, data: dict[str, Path]) -> None:
    given = words.format("nowhere", data["train"]).split()
    said = refused(pretrain("eval", *given), "path")
    assert "path: nowhere: there is no such directory; expected a run directory, or a " in said
    given = words.format(data["train"], "run").split()
    said = refused(
        pretrain("eval", *given), "path", *(w for w in given if w in ("--filler", "--data"))
    )
    assert f"path: {data['train']}: is a data set; expected a run directory, or a check" in said
    assert ("run: is the directory of a training run; expected" in said) == ("run" in given)


def test_of_summaries(pretrain: Run, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "no answer"}\n')
    words = ["--shares", "0,0.5,0.5,1.5", "--max-tokens", "0", "--temperature=-1", "--top-p", "0"]
    said = refused(
        pretrain("eval", "summaries", "run", "pairs.jsonl", *words, "--documents", "0",
                 "--name", "first/half"),
        "--name", "--documents", *["--shares"] * 3, "--max-tokens", "--temperature", "--top-p",
        "--question", "pairs.jsonl",
    )  # fmt: skip
    assert "--name: first/half contains /, and is to be part of a file's name; leave it out" in said
    assert "--shares: expected more than 0 and at most 1, found 1.5" in said
    assert "--question: not given, and not known from run" in said


def test_of_perplexity_and_the_harness(pretrain: Run) -> None:
    words = ["--documents", "0", "--batch", "0", "--window-segments", "0", "--weights", "mean"]
    said = refused(
        pretrain("eval", "perplexity", "run", *words),
        "--data", "--weights", "--documents", "--batch", "--window-segments",
    )  # fmt: skip
    assert "--weights: expected one of last, ema, found 'mean'" in said
    words = ["--shots", "-1", "--limit", "0", "--tasks", "a", "b", "a"]
    said = refused(
        pretrain("eval", "harness", "run", *words),
        "--tasks-directory", "--tasks", "--shots", "--limit",
    )  # fmt: skip
    assert "--tasks: a is given twice" in said


def test_of_generation(pretrain: Run) -> None:
    words = ["--prompt", "a", "--prompt-file", "b", "--max-tokens", "0", "--top-p", "1.1"]
    refused(
        pretrain("generate", "run", *words, "--temperature", "nan"),
        "--prompt, --prompt-file", "--max-tokens", "--temperature", "--top-p",
    )  # fmt: skip


@pytest.mark.parametrize(
    "words", [("generate", "run"), ("eval", "summaries", "run", "pairs.jsonl", "--question", "?")]
)
def test_what_only_draws_is_refused_where_the_likeliest_token_is_taken(
    pretrain: Run, tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    drawn = ["--top-p", "0.5", "--seed", "7"]
    said = refused(pretrain(*words, *drawn, "--temperature", "0"), "--top-p", "--seed")
    assert "--seed: has no effect with --temperature 0, which takes the likeliest token" in said
    for one in (drawn, ["--temperature", "0"]):
        assert "has no effect" not in pretrain(*words, *one).stderr
