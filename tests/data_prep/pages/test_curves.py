"""Curves are drawn in bounded size and lose neither an extreme nor a gap."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from data_prep.pages import curves
from data_prep.pages.curves import HEIGHT, WIDTH, Chart, Curve, Scale

NAN = math.nan


def chart(y: list[float] | np.ndarray, **more: bool) -> Chart:
    values = np.asarray(y, float)
    curve = Curve("run", np.arange(len(values), dtype=float), values, "red")
    x = Scale(0.0, max(len(values) - 1.0, 1.0), whole=True)
    return curves.drawn([curve], x, Scale.around([curve], **more))


def drawn(path: str) -> list[tuple[str, int, int]]:
    found = re.findall(r"([ML])(\d+) (\d+)(?:h0)?", path)
    assert "".join(f"{c}{x} {y}" for c, x, y in found) == path.replace("h0", "")
    return [(command, int(x), int(y)) for command, x, y in found]


def test_the_points_drawn_are_each_intervals_first_last_least_and_greatest() -> None:
    y = np.random.default_rng(0).normal(size=10_000)
    places = np.linspace(0, 1, 10_000)
    kept = curves.thinned(places, y, 50)
    wanted: set[int] = set()
    for bucket in range(50):
        own = [n for n in range(10_000) if min(int(places[n] * 50), 49) == bucket]
        wanted |= {own[0], own[-1], min(own, key=lambda n: y[n]), max(own, key=lambda n: y[n])}
    assert kept.tolist() == sorted(wanted)
    assert curves.thinned(places[:200], y[:200], 50).tolist() == list(range(200))


def test_one_value_of_a_hundred_thousand_is_seen_and_the_path_is_short() -> None:
    y = np.random.default_rng(1).normal(size=100_000)
    y[54_321] = 40.0
    (stroke,) = chart(y).strokes
    top = min(drawn(stroke.faint), key=lambda point: point[2])
    assert top[1] == round(54_321 / 99_999 * WIDTH) and top[2] < 0.06 * HEIGHT
    assert stroke.row.greatest == "40 @ 54,321"
    assert len(stroke.faint) + len(stroke.path) < 15_000


def test_a_value_that_is_not_finite_breaks_the_line_is_marked_and_counted() -> None:
    (stroke,) = chart([1.0, 2.0, NAN, 3.0, math.inf, 4.0, 5.0]).strokes
    assert "".join(command for command, *_ in drawn(stroke.path)) == "MLMML"
    assert stroke.row.lost == 2 and stroke.lost.count("M") == 2
    assert stroke.lost.startswith("M668 0")  # 2 / 6 of the width, to 4 units
    assert [dot.title for dot in stroke.dots][:3] == ["run: 1 at 0", "run: 2 at 1", "run: 3 at 3"]
    (none,) = chart([NAN, NAN]).strokes
    assert (none.path, none.row.last, none.row.lost) == ("", "\u2013", 2)
    assert chart([1.0, NAN]).strokes[0].row.last == "not finite"


def test_a_point_is_where_its_value_is_on_the_axes() -> None:
    found = chart([0.0, 10.0, 5.0])
    (stroke,) = found.strokes
    low, high = -0.5, 10.5
    for (_, x, y), (step, value) in zip(drawn(stroke.path), enumerate([0, 10, 5]), strict=True):
        assert x == round(step / 2 * WIDTH)
        assert y == round((high - value) / (high - low) * HEIGHT)
    assert found.x_ticks == [(0.0, "0"), (0.5, "1"), (1.0, "2")]
    assert [name for _, name in found.y_ticks] == ["0", "5", "10"]
    assert [place for place, _ in found.y_ticks] == pytest.approx([0.5 / 11, 5.5 / 11, 10.5 / 11])


def test_a_wide_range_of_positive_values_has_a_logarithmic_axis() -> None:
    found = chart([1e-3, 1.0, 1e3])
    assert found.logarithmic
    assert [name for _, name in found.y_ticks] == ["0.001", "0.01", "0.1", "1", "10", "100", "1k"]
    assert drawn(found.strokes[0].path)[1][2] == HEIGHT // 2
    for values in ([0.0, 1.0, 1e3], [-1.0, 1e3], [1.0, 40.0]):
        assert not chart(values).logarithmic
    assert not chart([1.0, 1e3], from_zero=True).logarithmic
    assert chart([1.0, 1e3], from_zero=True).y_ticks[0] == (0.0, "0")


@pytest.mark.parametrize("values", [[], [0.0], [7.0, 7.0], [-3.0], [1e-300], [1e300], [5e-5, 6e-5]])
def test_any_values_can_be_drawn(values: list[float]) -> None:
    found = chart(values)
    places = [place for place, _ in found.y_ticks]
    assert 2 <= len(places) <= 9 and all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert len({name for _, name in found.y_ticks}) == len(places)
    for _, _, y in drawn(found.strokes[0].path):
        assert 0 <= y <= HEIGHT


def test_ticks_that_differ_have_names_that_differ() -> None:
    for low, high in ((12_345.0, 12_346.0), (1.0001, 1.0002), (-2e6, 3e6), (1e-7, 2e-7)):
        names = [name for _, name in Scale(low, high).ticks()]
        assert len(set(names)) == len(names) >= 3


def test_only_a_noisy_curve_is_smoothed_and_its_values_stay_visible() -> None:
    steady = chart(np.linspace(0, 1, 500))
    assert not steady.smoothed and not chart(np.zeros(500)).smoothed
    noise = np.random.default_rng(2).normal(size=800)
    noise[400] = NAN
    found = chart(noise)
    assert found.smoothed
    means = np.array([np.nanmean(noise[max(n - 10, 0) : n + 11]) for n in range(800)])
    assert np.allclose(curves._smoothed(noise)[noise == noise], means[noise == noise])
    assert math.isnan(curves._smoothed(noise)[400])


def test_numbers_of_tables_have_four_digits() -> None:
    shown = [curves.number(x) for x in (0.0, 1.23456, 1234.5, 123_456.0, 1.23456e7, -0.5, 3e-5)]
    assert shown == ["0", "1.235", "1,234", "123,456", "12.35M", "\u22120.5", "3e-5"]
    assert curves.number(math.inf) == "not finite"
