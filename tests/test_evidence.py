"""Reports that recipes keep: made once, refused for other settings, named by their commits."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import evidence
import pytest
from stages import Stage, shortened

from tools.recipes import language_modelling, needles, optimizers, passkey, summaries
from tools.recipes import recall_capacity as capacity
from tools.recipes.recall_capacity import CONFIG, Documents

STAGE = Stage("1", ((Documents("a", (2, 4), 8), 1.0),), 3, 4, 4, 1e-3, 0.0)


def test_a_report_is_made_once_and_says_what_it_is_of(tmp_path: Path) -> None:
    kept = evidence.Reports(tmp_path / "reports")
    made_by = evidence.made_by(CONFIG, ["run.seed=2"], [STAGE])
    assert "novels/delta-1" not in kept
    first = kept.once("novels/delta-1", made_by, lambda: {"loss": 2.5})
    assert "novels/delta-1" in kept
    again = kept.once("novels/delta-1", made_by, lambda: pytest.fail("made twice"))
    assert first == again and again["loss"] == 2.5
    written = json.loads((tmp_path / "reports" / "novels" / "delta-1.json").read_text())
    assert written["commit"] == evidence.commit()
    assert written["made_by"]["settings"] == ["run.seed=2"]
    assert written["made_by"]["stages"][0]["steps"] == 3
    assert written["made_by"]["stages"][0]["shares"] == [[{"name": "a", "pairs": [2, 4], "gap": 8,
        "symbols": 512, "answers": "values"}, 1.0]]  # fmt: skip
    assert written["made_by"]["config"]["model"]["rope_theta"] == 10000


@pytest.mark.parametrize("other", ["settings", "stages", "config"])
def test_a_report_of_other_settings_is_refused(tmp_path: Path, other: str) -> None:
    kept = evidence.Reports(tmp_path)
    config = tmp_path / "own.yaml"
    config.write_text(CONFIG.read_text())
    kept.once("delta-1", evidence.made_by(config, ["optim.lr=1"], [STAGE]), dict)
    if other == "config":
        config.write_text("model: {n_layers: 3}\n")
    settings = ["optim.lr=2" if other == "settings" else "optim.lr=1"]
    plan = [] if other == "stages" else [STAGE]
    with pytest.raises(SystemExit) as stopped:
        kept.once("delta-1", evidence.made_by(config, settings, plan), dict)
    assert stopped.value.code == (
        f"{tmp_path / 'delta-1.json'} is of other settings: choose another directory of reports, "
        "or OUT"
    )


def test_the_commit_is_that_of_the_sources_and_says_whether_they_were_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *own, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "a.yaml").write_text("one\n")
    monkeypatch.setattr(evidence, "CONFIGS", configs)
    assert evidence.commit() == "unknown"
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    assert evidence.commit() == git("rev-parse", "--short", "HEAD")
    (configs / "a.yaml").write_text("two\n")
    assert evidence.commit() == git("rev-parse", "--short", "HEAD") + "-dirty"


def test_without_git_the_commit_of_a_finished_report_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert evidence.Reports(tmp_path).once("a", {}, lambda: {"loss": 1.5}) == {
        "commit": "unknown", "made_by": {}, "loss": 1.5
    }  # fmt: skip


def test_what_was_begun_is_continued_with_the_same_settings_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made_by = evidence.made_by(CONFIG, ["optim.lr=1"], [STAGE])
    for _ in range(2):
        evidence.begin(out, made_by)
    with pytest.raises(SystemExit) as stopped:
        evidence.begin(out, evidence.made_by(CONFIG, [], shortened([STAGE], 0.5)))
    assert stopped.value.code == (
        f"{out} was begun with other stages and settings ({out / 'begun.json'}): choose another OUT"
    )


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (passkey, ["OUT", "--kinds", "linear"]),
        (capacity, ["OUT", "--kinds", "linear", "--widths", "64"]),
        (needles, ["BOOKS", "OUT"]),
        (language_modelling, ["BOOKS", "OUT", "--corpora", "novels", "--kinds", "none"]),
        (optimizers, ["BOOKS", "OUT", "--rates", "1"]),
        (summaries, ["BOOKS", "OUT"]),
    ],
)
def test_no_recipe_continues_what_was_begun_with_other_settings(
    recipe: ModuleType, words: Sequence[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "novels-train-00.jsonl.gz").touch()
    evidence.begin(out, evidence.made_by(recipe.CONFIG, ["launch.ranks=7"]))
    given = {"OUT": str(out), "BOOKS": str(tmp_path)}
    with pytest.raises(SystemExit, match=r"out was begun with other .*settings"):
        recipe.main([given.get(word, word) for word in words])
    assert [path.name for path in out.iterdir()] == ["begun.json"]


def test_a_table_names_every_commit_of_its_reports_once() -> None:
    assert evidence.commits(["b", "a", "b"]) == "Commits a, b."
    assert evidence.commits(["a", "a"]) == "Commit a."
