"""The comparison of optimizers: where a curve reaches a loss, and the table, by hand."""

from __future__ import annotations

import pytest

from pretrain import config as configuration
from tools.recipes import optimizers
from tools.recipes.optimizers import Curve, Result, row, table


def test_a_loss_is_reached_between_the_validations_around_it() -> None:
    curve = Curve({100: 4.0, 200: 3.0, 300: 3.5, 400: 2.0}, 0.5)
    assert curve.final == 2.0
    assert curve.reaches(3.25) == pytest.approx(175.0)
    assert curve.reaches(5.0) == 100.0
    assert curve.reaches(2.5) == pytest.approx(300 + 100 * 2 / 3)
    assert curve.reaches(1.9) is None


def test_a_row_says_how_many_seeds_reached_the_target_and_averages_those() -> None:
    curves = [Curve({10: 4.0, 20: 2.0}, 2.0), Curve({10: 4.0, 20: 3.5}, 3.0)]
    cells = row(Result("muon", 0.004, curves, [Curve({7: 3.25}, 2.0)]), target=3.0)
    assert cells["steps to the target"] == "15 (1 of 2 seeds)"
    assert cells["seconds to it"] == "30"
    assert cells["final loss"] == "2.7500" and cells["by seed"] == "2.0000, 3.5000"
    assert cells["final loss of the shorter runs"] == "3.2500"


def test_the_target_is_the_first_optimizers_mean_final_loss() -> None:
    base = Result("adamw", 0.002, [Curve({10: 3.0}, 1.0), Curve({10: 4.0}, 1.0)], [])
    text = table([base, Result("muon", 0.004, [Curve({10: 9.0}, 1.0)], [])], 10, 0.7)
    assert "adamw's final validation loss, 3.5000" in text and "7 steps" in text
    assert text.count("\n") == 6 and "not reached" in text


def test_every_rate_of_the_grids_is_a_configuration_and_every_optimizer_has_some() -> None:
    assert set(optimizers.GRID) == set(configuration.OPTIMIZERS)
    assert next(iter(optimizers.GRID)) == "adamw", "the baseline is trained first"
    words = ["data.train=d", "run.directory=r"]
    recipe = configuration.load(optimizers.CONFIG, words).optim.lr
    assert recipe in optimizers.GRID["adamw"]
    for name, rates in optimizers.GRID.items():
        for rate in rates:
            own = [*words, f"optim.name={name}", f"optim.lr={rate:g}"]
            assert configuration.load(optimizers.CONFIG, own).optim.peak == rate
