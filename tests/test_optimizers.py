"""The comparison of optimizers: where a curve reaches a loss, and the table, by hand."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from pydoc_data.topics import topics

import evidence
import pytest

from pretrain.config import root as configuration
from pretrain.config.optim import OPTIMIZERS
from tools.recipes import optimizers
from tools.recipes.optimizers import Curve, Result, Steps, row, table


def test_a_loss_is_reached_between_the_validations_around_it() -> None:
    curve = Curve({100: 4.0, 200: 3.0, 300: 3.5, 400: 2.0}, 0.5)
    assert curve.final == 2.0
    assert curve.reaches(3.25) == pytest.approx(175.0)
    assert curve.reaches(5.0) == 100.0
    assert curve.reaches(2.5) == pytest.approx(300 + 100 * 2 / 3)
    assert curve.reaches(1.9) is None


def test_a_row_says_how_many_seeds_reached_the_target_and_averages_those() -> None:
    curves = [Curve({10: 4.0, 20: 2.0}, 2.0), Curve({10: 4.0, 20: 3.5}, 3.0)]
    cells = row(Result("muon", {0.004: 3.0}, 0.004, 20, curves), [3.0, 3.25])
    assert cells["steps to the target"] == "15 (1 of 2 seeds)"
    assert cells["seconds to it"] == "30"
    assert cells["final loss"] == "2.7500" and cells["by seed"] == "2.0000, 3.5000"
    assert cells["steps"] == "20" and cells["seconds per step"] == "2.50"


def test_the_targets_are_the_first_optimizers_final_losses_with_the_same_seed() -> None:
    tried = {0.001: 5.25, 0.002: 5.0}
    base = Result("adamw", tried, 0.002, 10, [Curve({10: 3.0}, 1.0), Curve({10: 4.0}, 1.0)])
    other = Result("muon", {0.004: 9.5}, 0.004, 8, [Curve({8: 3.5}, 1.0), Curve({8: 3.5}, 1.0)])
    text = table([base, other], Steps.of(10, 1 / 3, 0.7))
    assert "adamw's final validation loss (nats a token) with the same seed after 10 steps" in text
    assert "rates by runs of 3 steps" in text
    assert "| muon | 0.004 | 8 | 3.5000 | 3.5000, 3.5000 | 8 (1 of 2 seeds) | 8 | 1.00 |" in text
    assert text.endswith("- adamw: 0.001 (5.2500), 0.002 (5.0000)\n- muon: 0.004 (9.5000)\n")


class Recorder(optimizers.Trainer):
    """Trains nothing: the loss is the rate's distance from 0.02, and more with later seeds."""

    asked: list[tuple[float, int, int]]

    def curve(self, name: str, rate: float, seed: int, steps: int) -> Curve:
        self.asked.append((rate, seed, steps))
        return Curve({steps: abs(rate - 0.02) + 0.75 + seed / 4}, 1.0)


def asked_for(base: Result | None) -> tuple[Result, list[tuple[float, int, int]]]:
    """The result of a search among three rates with two seeds, and what was trained for it."""
    nowhere = Path("unused")
    words = argparse.Namespace(
        corpus=nowhere, out=nowhere, config=optimizers.CONFIG, jobs=1, reports=None
    )
    trainer = Recorder(words, [])
    trainer.asked = []
    plan = Steps(full=9, search=3, fewer=6)
    return trainer.result("muon", [0.01, 0.02, 0.04], 2, plan, base), trainer.asked


def test_the_best_rate_of_the_search_is_trained_in_full_with_every_seed() -> None:
    result, asked = asked_for(base=None)
    assert result.rate == 0.02 and list(result.tried) == [0.01, 0.02, 0.04]
    assert asked[:3] == [(0.01, 1, 3), (0.02, 1, 3), (0.04, 1, 3)]
    assert asked[3:] == [(0.02, 1, 9), (0.02, 2, 9)] and result.steps == 9


FEWER, ALL = [(0.02, 1, 6), (0.02, 2, 6)], [(0.02, 1, 9), (0.02, 2, 9)]


@pytest.mark.parametrize(
    ("loss", "trained"),
    # Seed 1 ends at 1.0 and seed 2 at 1.25.
    [(1.5, FEWER), (1.125, FEWER), (1.1, [*FEWER, *ALL])],
)
def test_all_steps_are_trained_where_fewer_miss_the_baselines_loss_on_average(
    loss: float, trained: list[tuple[float, int, int]]
) -> None:
    base = Result("adamw", {0.001: loss}, 0.001, 9, [Curve({9: loss}, 1.0)] * 2)
    result, asked = asked_for(base)
    assert asked[3:] == trained
    assert result.steps == trained[-1][2] and len(result.curves) == 2


def test_every_rate_of_the_grids_is_a_configuration_and_every_optimizer_has_some() -> None:
    assert set(optimizers.GRID) == set(OPTIMIZERS)
    assert next(iter(optimizers.GRID)) == "adamw", "the baseline is trained first"
    words = ["data.train=d", "run.directory=r"]
    recipe = configuration.load(optimizers.CONFIG, words).optim.lr
    assert recipe in optimizers.GRID["adamw"]
    for name, rates in optimizers.GRID.items():
        for rate in rates:
            own = [*words, f"optim.name={name}", f"optim.lr={rate:g}"]
            assert configuration.load(optimizers.CONFIG, own).optim.peak == rate


def test_a_table_is_made_from_the_reports_alone_where_no_texts_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = evidence.Reports(tmp_path / "kept")
    for name, grid in optimizers.GRID.items():
        for steps in (4, 8, 12):
            own = [f"optim.name={name}", f"optim.lr={grid[0]:g}", "run.seed=1"]
            settings = ["train.validate_every=25", "wandb.mode=disabled", "train.steps=12",
                        "optim.warmup_steps=1", *own, f"train.steps={steps}"]  # fmt: skip
            report = {"losses": {steps: 12 / steps}, "seconds_per_step": 2.0}
            made_by = evidence.made_by(optimizers.CONFIG, settings)
            kept.once(f"{name}-{grid[0]:g}-1-{steps}", made_by, lambda report=report: report)
    words = ["--seeds", "1", "--rates", "1", "--budget", "0.7", "--reports", str(tmp_path / "kept")]
    words += ["train.steps=12", "optim.warmup_steps=1"]
    optimizers.main([str(tmp_path / "no texts"), str(tmp_path / "out"), *words])
    made = (tmp_path / "out" / "optimizers.md").read_text()
    assert made in capfd.readouterr().out
    assert "| muon | 0.004 | 12 | 1.0000 | 1.0000 | 12 | 24 | 2.00 |" in made
    assert [path.name for path in (tmp_path / "out").glob("[!o]*")] == []


@pytest.mark.slow
def test_the_recipe_makes_a_table_from_texts_and_repeats_no_finished_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    books = list(topics.values())
    for name, texts in (("train-00", books[:-20]), ("val", books[-20:])):
        with gzip.open(corpus / f"novels-{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            for number, text in enumerate(texts):
                file.write(json.dumps({"id": f"{name}-{number}", "text": text}) + "\n")
    out = tmp_path / "out"
    words = [
        str(corpus), str(out), "--seeds", "2", "--rates", "2", "--jobs", "2", "--budget", "0.5",
        "launch.ranks=1", "train.steps=4", "optim.warmup_steps=1", "train.validate_every=1",
        "train.window_segments=4", "model.n_layers=1", "model.d_model=16", "model.n_heads=2",
        "model.n_kv_heads=2", "model.d_head=8", "model.d_ff=16",
    ]  # fmt: skip
    optimizers.main(words)
    found = {one["name"]: one for one in json.loads((out / "optimizers.json").read_text())}
    assert set(found) == set(OPTIMIZERS)
    losses = found["adamw"]["curves"][0]["losses"]
    assert set(losses) == {"1", "2", "3", "4"} and 6 < losses["4"] < 9
    for name, one in found.items():
        tried = {float(rate): loss for rate, loss in one["tried"].items()}
        assert list(tried) == list(optimizers.GRID[name][:2])
        assert one["rate"] == min(tried, key=tried.__getitem__) and len(one["curves"]) == 2
    made = (out / "optimizers.md").read_text()
    assert made.endswith(f"\n\nCommit {evidence.commit()}.\n")
    capfd.readouterr()
    optimizers.main(words)
    assert "$ pretrain train" not in capfd.readouterr().out
    assert (out / "optimizers.md").read_text() == made
