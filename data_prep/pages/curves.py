"""Line charts for a page without scripts: scales, ticks, thinned paths, figures beside them.

A path is drawn in units of a box of WIDTH x HEIGHT, which the template stretches over the chart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_prep.pages.rendering import scaled

WIDTH, HEIGHT = 2000, 1000

# Intervals of a chart's width, of all its curves together: each is drawn by at most four points.
_INTERVALS = 600
_MOST_INTERVALS, _LEAST_INTERVALS = 200, 25
# A curve of so few points has a dot with a tooltip at each.
_DOTS = 40
# Above this ratio of the greatest to the least, positive values have a logarithmic axis.
_RATIO = 50.0
# A curve of so many points that travels so many times its own range up and down is smoothed.
_SMOOTHED, _NOISY = 60, 4.0


@dataclass(frozen=True)
class Curve:
    """Values y [n] at places x [n], both float64; a y that is not finite is a gap.

    `colour` is CSS, `dash` SVG's stroke-dasharray. `marks` are points that no line joins, with the
    tooltips `titles` [n] if there are any.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    dash: str = ""
    marks: bool = False
    titles: Sequence[str] = ()


class Dot(NamedTuple):
    """A point, or points, with a tooltip."""

    path: str
    title: str


class Row(NamedTuple):
    """What the table beside a chart says of a curve."""

    last: str
    least: str
    greatest: str
    lost: int


class Stroke(NamedTuple):
    """A curve as it is drawn. `faint` are its values where `path` is their running mean.

    `lost` marks the places of values that are not finite. `row` is None for marks.
    """

    name: str
    colour: str
    dash: str
    path: str
    faint: str
    dots: list[Dot]
    lost: str
    row: Row | None


class Chart(NamedTuple):
    """Strokes in one frame; ticks are (place in [0, 1], label)."""

    strokes: list[Stroke]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    logarithmic: bool

    @property
    def smoothed(self) -> bool:
        """Whether any curve is drawn as a running mean over its faint values."""
        return any(stroke.faint for stroke in self.strokes)


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, `low` < `high`, both positive where it is logarithmic."""

    low: float
    high: float
    logarithmic: bool = False
    whole: bool = False
    """Ticks at whole numbers only."""

    @staticmethod
    def around(curves: Iterable[Curve], *, from_zero: bool = False, linear: bool = False) -> Scale:
        """A scale with room for all finite values; logarithmic where they span much, unless it is
        to be linear or to begin at zero.
        """
        values = np.concatenate([np.zeros(0), *(curve.y for curve in curves)])
        values = values[np.isfinite(values)]
        if not values.size:
            return Scale(0.0, 1.0)
        low, high = float(values.min()), float(values.max())
        if low > 0 and high / low > _RATIO and not (from_zero or linear):
            return Scale(low / 1.15, high * 1.15, logarithmic=True)
        low = min(low, 0.0) if from_zero else low
        # Of equal values, so that they are drawn half way up.
        room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
        return Scale(low if from_zero and low == 0 else low - room, high + room)

    def places(self, values: np.ndarray) -> np.ndarray:
        """Where finite values [n] are, in [0, 1]: [n]."""
        ends = np.array([self.low, self.high])
        low, high = np.log(ends) if self.logarithmic else ends
        found: np.ndarray = ((np.log(values) if self.logarithmic else values) - low) / (high - low)
        return found

    def ticks(self) -> list[tuple[float, str]]:
        """Round numbers with their places."""
        values, digits = self._logarithmic() if self.logarithmic else self._linear()
        places = self.places(np.array(values, float)).tolist()
        return [(place, label(tick, digits)) for place, tick in zip(places, values, strict=True)]

    def _linear(self) -> tuple[list[float], int]:
        """Ticks, and how many digits tell them apart."""
        wanted = (self.high - self.low) / 4.5
        power = 10 ** math.floor(math.log10(wanted))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted)
        step = max(step, 1) if self.whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        values = [n * step for n in range(first, last + 1)]
        largest = max(map(abs, values), default=0) or step
        return values, math.floor(math.log10(largest)) - math.floor(math.log10(step)) + 1

    def _logarithmic(self) -> tuple[list[float], int]:
        decades = math.log10(self.high / self.low)
        factors = (1,) if decades > 2.5 else (1, 2, 5)
        powers = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if self.low <= tick <= self.high]
        if len(ticks) < 2:
            ticks = [self.low, self.high]
        return ticks[:: math.ceil(len(ticks) / 9)], 3


def drawn(curves: Sequence[Curve], x: Scale, y: Scale) -> Chart:
    """The curves in one frame; any number of points, of bounded size."""
    # All of a chart or none, so that they can be compared.
    noisy = any(_is_noisy(curve) for curve in curves)
    smooth = [_smoothed(curve.y) if noisy else None for curve in curves]
    buckets = min(max(_INTERVALS // max(len(curves), 1), _LEAST_INTERVALS), _MOST_INTERVALS)
    strokes = [_stroke(*pair, x, y, buckets) for pair in zip(curves, smooth, strict=True)]
    return Chart(strokes, x.ticks(), y.ticks(), y.logarithmic)


def thinned(places: np.ndarray, y: np.ndarray, buckets: int) -> np.ndarray:
    """Indices of the points to draw, of all that are finite: of each interval of the width the
    first, the last, the least and the greatest, as M4 of Jugel et al. (VLDB 2014).

    places [n] in [0, 1] ascending, y [n] finite; up to 4 * buckets indices, ascending.
    """
    if len(y) <= 4 * buckets:
        return np.arange(len(y))
    bucket = np.minimum((places * buckets).astype(int), buckets - 1)
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    ends = np.append(starts[1:], len(y))
    kept = [
        (start, end - 1, start + y[start:end].argmin(), start + y[start:end].argmax())
        for start, end in zip(starts, ends, strict=True)
    ]
    return np.unique(np.array(kept))


def label(value: float, digits: int = 3) -> str:
    """A number at an axis, as 0.25, 1.5k or 5e-4; `digits` tell it from the ticks beside it."""
    size, form = abs(value), f".{max(digits, 3)}g"
    if size >= 1000:
        text = scaled(size, form=form)
    elif size >= 0.001 or size == 0:
        text = f"{size:{form}}"
    else:
        text = f"{size:.{max(digits, 1)}g}".replace("e-0", "e-")
    return f"\N{MINUS SIGN}{text}" if value < 0 and float(f"{size:{form}}") else text


def number(value: float) -> str:
    """A number in a table, to four digits."""
    if not math.isfinite(value):
        return "not finite"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}".replace("-", "\N{MINUS SIGN}")
    return label(value, 4)


def _stroke(curve: Curve, smooth: np.ndarray | None, x: Scale, y: Scale, buckets: int) -> Stroke:
    finite = np.isfinite(curve.y)
    places = x.places(curve.x)
    style = (curve.name, curve.colour, curve.dash)
    if curve.marks:
        dots = list(_dots(curve, places, y))
        if not curve.titles:
            dots = [Dot("".join(dot.path for dot in dots), curve.name)]
        return Stroke(*style, "", "", dots, "", None)
    values = _path(places, curve.y, y, buckets)
    path, faint = values, ""
    if smooth is not None:
        path, faint = _path(places, smooth, y, buckets // 2), values
    lost = np.unique(np.round(places[~finite] * 500) / 500)
    marks = "".join(f"M{place * WIDTH:.0f} 0v40" for place in lost)
    dots = list(_dots(curve, places, y)) if finite.sum() <= _DOTS else []
    return Stroke(*style, path, faint, dots, marks, _row(curve, finite))


def _path(places: np.ndarray, values: np.ndarray, y: Scale, buckets: int) -> str:
    """SVG's path of the finite values, broken where some between them are not."""
    finite = np.isfinite(values)
    # The number of gaps before each point: where it grows, the line is broken.
    gaps = np.cumsum(~finite)[finite]
    places, values = places[finite], values[finite]
    kept = thinned(places, values, buckets)
    across = np.round(places[kept] * WIDTH).astype(int).tolist()
    down = np.round((1 - y.places(values[kept])) * HEIGHT).astype(int).tolist()
    breaks = np.diff(gaps[kept], prepend=-1) > 0
    breaks[:1] = True
    # A line of no length shows a point that stands alone.
    return "".join(
        f"M{a} {b}h0" if new else f"L{a} {b}"
        for a, b, new in zip(across, down, breaks.tolist(), strict=True)
    )


def _dots(curve: Curve, places: np.ndarray, y: Scale) -> Iterator[Dot]:
    for n in np.flatnonzero(np.isfinite(curve.y)).tolist():
        down = (1 - float(y.places(curve.y[n : n + 1])[0])) * HEIGHT
        title = f"{curve.name}: {number(curve.y[n])} at {_place(curve.x[n])}"
        path = f"M{places[n] * WIDTH:.0f} {down:.0f}h0"
        yield Dot(path, curve.titles[n] if curve.titles else title)


def _row(curve: Curve, finite: np.ndarray) -> Row:
    x, y = curve.x[finite], curve.y[finite]
    lost = int(len(finite) - len(y))
    if not len(y):
        return Row("\N{EN DASH}", "\N{EN DASH}", "\N{EN DASH}", lost)
    least, greatest = y.argmin(), y.argmax()
    ends = [f"{number(y[at])} @ {_place(x[at])}" for at in (least, greatest)]
    return Row(number(curve.y[-1]), ends[0], ends[1], lost)


def _place(x: float) -> str:
    return f"{x:,.0f}" if x == round(x) else f"{x:,.4g}"


def _is_noisy(curve: Curve) -> bool:
    values = curve.y[np.isfinite(curve.y)]
    if curve.marks or len(values) < _SMOOTHED:
        return False
    travelled = float(np.abs(np.diff(values)).sum())
    return travelled > _NOISY * float(values.max() - values.min())


def _smoothed(y: np.ndarray) -> np.ndarray | None:
    """The running mean of a fortieth of the points; None where that would be of too few."""
    finite = np.isfinite(y)
    if finite.sum() < _SMOOTHED:
        return None
    half = len(y) // 80 or 1
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(y))
    begin, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(y))
    with np.errstate(invalid="ignore", divide="ignore"):
        means: np.ndarray = (sums[end] - sums[begin]) / (counts[end] - counts[begin])
    means[~finite] = math.nan
    return means
