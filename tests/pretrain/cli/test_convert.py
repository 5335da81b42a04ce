"""`pretrain import`, `export` and `plot`: each mistake is one problem, with code 2."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
EXPECTED_RUN = "expected a run directory, or a checkpoint in its checkpoints/"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            "import org/model out",
            "source: org/model: is not there; expected a model's directory, or "
            "a GGUF file, on this machine (`hf download NAME --local-dir DIR` fetches one)",
        ),
        ("import c.yaml out", "source: c.yaml: is neither a directory nor a GGUF file"),
        (
            "import lfs.gguf out",
            "source: lfs.gguf: is a Git LFS pointer; fetch the file that it stands "
            "for (git lfs pull)",
        ),
        ("import empty out segment=abc", "segment: expected a whole number, found 'abc'"),
        ("import empty out segmnt=3", "segmnt: unknown key; did you mean segment?"),
        ("import empty empty", "out: empty already exists; choose a new directory"),
        (
            "import empty c.yaml/out",
            "out: c.yaml/out cannot be made, since c.yaml is not a directory; give another place",
        ),
        (
            "export run c.yaml/a/out",
            "out: c.yaml/a/out cannot be made, since c.yaml is not a directory; give another place",
        ),
        ("export nowhere out", f"path: nowhere: there is no such directory; {EXPECTED_RUN}"),
        ("plot c.yaml", f"path: c.yaml: is not a directory; {EXPECTED_RUN}"),
    ],
)
def test_a_mistake_is_one_problem(pretrain: Run, tmp_path: Path, words: str, problem: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "lfs.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:5\n")
    ended = pretrain(*words.split())
    name = words.split()[0]
    expected = f"pretrain {name}: this command cannot run:\n  - {problem}\n"
    assert (ended.returncode, ended.stderr) == (2, expected)


def test_an_import_names_mistakes_in_its_settings_beside_a_source_that_is_missing(
    pretrain: Run,
) -> None:
    ended = pretrain("import", "nowhere", "out", "segment=0", "memory.kind=foo", "foo=1")
    assert ended.returncode == 2
    assert [line[4:].split(":")[0] for line in ended.stderr.splitlines()[1:]] == [
        *("source", "foo", "segment", "memory.kind")
    ]


def test_what_a_directory_is_instead_of_a_run_is_said(
    pretrain: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/config.json").touch()
    (tmp_path / "empty").mkdir()
    for path, said in (
        (data["train"], f": is a data set; {EXPECTED_RUN}"),
        (tmp_path / "hub", ": is a Hugging Face model; give what `pretrain import` makes of it"),
        (tmp_path / "empty", ": is neither a run directory (no checkpoint in checkpoints/) nor a "),
    ):
        ended = pretrain("export", str(path), "out")
        assert ended.returncode == 2
        assert ended.stderr.splitlines()[1].startswith(f"  - path: {path}{said}")


def test_a_run_without_records_cannot_be_drawn(pretrain: Run, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/step-00000001").mkdir()
    for path in ("run", "run/checkpoints/step-00000001"):
        ended = pretrain("plot", path)
        assert ended.returncode == 2
        assert "run: no training record in metrics.jsonl; expected the directory" in ended.stderr
