"""`pretrain` as a whole: one message about all mistakes, code 2, and no torch before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

# The commands are given as JSON; every one must be refused.
REFUSED = """
import json, sys
from pretrain.cli.main import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as ended:
        assert ended.code == 2, words
assert not {"torch", "deepspeed", "matplotlib"} & set(sys.modules)
"""


def test_mistakes_are_reported_before_torch_is_imported(
    tmp_path: Path, data: dict[str, Path]
) -> None:
    (tmp_path / "c.yaml").write_text("launch: {device: cpu}\n")
    commands = [
        ["train", "c.yaml", "train.stpes=3"],
        ["train", "c.yaml", f"data.train={data['few']}", "run.directory=r"],
        ["plan", "c.yaml", "run.directory=r", "data.train=nowhere"],
        ["check", "c.yaml", "run.directory=r", "data.train=nowhere"],
        ["preflight", "c.yaml"],
        ["eval", "perplexity", "run", "--data", "d", "--batch", "0"],
        ["eval", "needles", "run", "--filler", "none"],
        ["eval", "summaries", "run", "nothing.jsonl"],
        ["generate", "run", "--top-p", "2"],
        ["import", "from"],
        ["export", "run", "out", "--dtype", "fp8"],
    ]
    command = [sys.executable, "-c", REFUSED, json.dumps(commands)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "" and "Traceback" not in ended.stderr
    said = [line for line in ended.stderr.splitlines() if not line.startswith("  - ")]
    names = [words[0] if words[0] != "eval" else f"eval {words[1]}" for words in commands]
    assert said == [f"pretrain {name}: this command cannot run:" for name in names]


def test_mistakes_of_words_and_of_the_configuration_are_one_message(pretrain: Run) -> None:
    ended = pretrain("plan", "c.yaml", "train.stpes=3", "--nodes", "0", "--gpu", "h101", "=3")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[0] == "pretrain plan: this command cannot run:"
    for said in (
        "'=3': expected key=value", "did you mean train.steps?", "run.directory: not set",
        "--nodes: expected at least 1, found 0", "--gpu: expected one of a100, h100, h200, b200",
    ):  # fmt: skip
        assert ended.stderr.count(said) == 1, said


def test_every_command_has_a_help(pretrain: Run) -> None:
    commands = pretrain("--help").stdout
    for name in ("plan", "train", "eval", "generate", "import", "export", "plot", "check"):
        assert f"    {name} " in commands
        ended = pretrain(name, "--help")
        assert ended.returncode == 0 and ended.stdout.startswith(f"usage: pretrain {name} [-h]")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_the_log_changes_no_exit_code(tmp_path: Path) -> None:
    leaving = "from pretrain.jobs.launch import leave; print('said'); leave(75)"
    rank = ["-m", "pretrain.cli", "train", "c.yaml", "run.directory=r", "data.train=none"]
    (tmp_path / "c.yaml").touch()
    own = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for words, code in ((["-c", leaving], 75), (rank, 2)):
        with Path("/dev/full").open("w") as full:
            ended = subprocess.run(
                [sys.executable, *words], cwd=tmp_path, stdout=full, stderr=full, check=False,
                env={**os.environ, "PYTHONUNBUFFERED": "", **own},
            )  # fmt: skip
        assert ended.returncode == code
