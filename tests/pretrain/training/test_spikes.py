"""Which steps are spikes: bounds by hand, and what is remembered."""

from __future__ import annotations

import math

import pytest

from pretrain.config.training import SpikeConfig
from pretrain.training.spikes import Bounds, bounds, noted

WATCHED = SpikeConfig(deviations=2.0, steps=4)


def test_bounds_are_the_mean_and_deviations_of_the_last_steps() -> None:
    # Means 5 and 2; squared distances 9 + 1 + 1 + 9 and 0, over 4 - 1.
    recent = ((100.0, 100.0), (2.0, 2.0), (4.0, 2.0), (6.0, 2.0), (8.0, 2.0))
    found = bounds(recent, WATCHED)
    assert found.loss == pytest.approx(5 + 2 * math.sqrt(20 / 3))
    assert found.grad_norm == 2.0


def test_nothing_is_a_spike_before_there_are_as_many_steps_or_where_none_are_skipped() -> None:
    recent = ((2.0, 1.0),) * 3
    assert bounds(recent, WATCHED) == Bounds(math.inf, math.inf)
    assert bounds((*recent, (2.0, 1.0)), WATCHED) == Bounds(2.0, 1.0)
    assert bounds(recent * 2, SpikeConfig()) == Bounds(math.inf, math.inf)


def test_as_many_steps_as_are_needed_are_remembered_and_none_without_need() -> None:
    recent: tuple[tuple[float, float], ...] = ()
    for step in range(6):
        recent = noted(recent, float(step), 1.0, WATCHED)
    assert recent == ((2.0, 1.0), (3.0, 1.0), (4.0, 1.0), (5.0, 1.0))
    assert noted(recent, 1.0, 1.0, SpikeConfig()) == ()


def test_what_exceeded_its_bound_is_said() -> None:
    found = Bounds(4.0, 0.5)
    assert found.exceeded(4.5, 0.5) == "loss 4.5 above 4"
    assert found.exceeded(4.0, 0.75) == "gradient norm 0.75 above 0.5"
    assert found.exceeded(9.0, 7.0) == "loss 9 above 4 and gradient norm 7 above 0.5"
