"""Charts of the runs' numbers, by section; what no section knows is under "Other metrics"."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from data_prep.pages.curves import Chart, Curve, Scale, drawn
from pretrain.report.runs import Run
from pretrain.report.series import Family, families, numbers

LOSSES, OPTIMIZATION, MEMORY = "Losses", "Optimization", "Gates and memory"
SPEED, DATA, OTHER = "Speed and waits", "Data", "Other metrics"

_COLOURS = 8
_DASHES = ("", "6 4", "2 4")
MOST_RUNS = _COLOURS * len(_DASHES)
"""Runs that colours and dashes tell apart."""
# Of more charts than these in a section, the first are shown.
_MOST_FIGURES = 48


class Style(NamedTuple):
    """How a run is drawn in every chart."""

    name: str
    colour: str
    dash: str


@dataclass(frozen=True)
class Figure:
    """A chart with its title; `label` is that of its x axis, `note` the unit and what to know.

    `folded`: the table beside it is long, and opened by hand.
    """

    title: str
    chart: Chart
    note: str = ""
    label: str = "optimizer step"
    folded: bool = False


class _Known(NamedTuple):
    section: str
    title: str
    unit: str
    from_zero: bool = False
    linear: bool = False

    def scale(self, curves: Iterable[Curve]) -> Scale:
        """The y axis of these curves."""
        return Scale.around(curves, from_zero=self.from_zero, linear=self.linear)


_KNOWN = {
    ("train", "loss"): _Known(LOSSES, "Training loss", "Nats per token."),
    ("validation", "loss"): _Known(LOSSES, "Validation loss", "Nats per token."),
    ("validation", "ema_loss"): _Known(
        LOSSES, "Validation loss of the weights' average", "Nats per token."
    ),
    ("train", "z_loss"): _Known(LOSSES, "z-loss", "Per token, added to the loss."),
    ("train", "auxiliary_loss"): _Known(LOSSES, "Auxiliary loss of the memory", "Per token."),
    ("train", "lr"): _Known(OPTIMIZATION, "Learning rate", "Of the weights."),
    ("train", "gate_lr"): _Known(OPTIMIZATION, "Learning rate of the gates", ""),
    ("train", "grad_norm"): _Known(OPTIMIZATION, "Gradient norm", "Global L2 norm, not clipped."),
    ("train", "skipped"): _Known(
        OPTIMIZATION, "Skipped steps", "Since the run's first step.", from_zero=True
    ),
    ("train", "spikes"): _Known(
        OPTIMIZATION, "Spikes", "Steps skipped as such, since the run's first step.", from_zero=True
    ),
    ("train", "gates"): _Known(
        MEMORY,
        "Gates",
        "Sigmoid of β, the memory's share: 0 local attention only, 1 memory only.",
        linear=True,
    ),
    ("train", "tokens_per_second"): _Known(
        SPEED, "Tokens per second", "All ranks together.", from_zero=True
    ),
    ("train", "seconds_per_step"): _Known(
        SPEED, "Seconds per step", "Without validations and checkpoints.", from_zero=True
    ),
    ("train", "data_wait"): _Known(
        SPEED, "Waiting for data", "Share of the time, of the slowest rank.", from_zero=True
    ),
    ("train", "mfu"): _Known(SPEED, "Model FLOPs utilisation", "Share of the peak.", True),
    ("train", "memory_bytes"): _Known(
        SPEED, "Peak memory", "Bytes of a rank's device, or of its process.", from_zero=True
    ),
    ("checkpoint", "seconds"): _Known(SPEED, "Seconds to write a checkpoint", "", from_zero=True),
    ("checkpoint", "stall"): _Known(
        SPEED, "Stalls by checkpoints", "Seconds that training stood still.", from_zero=True
    ),
    ("train", "tokens"): _Known(DATA, "Tokens read", "Since the run's first step.", True),
    ("train", "epochs"): _Known(DATA, "Epochs", "Of each source.", from_zero=True),
}
_COUNTED = (("train", "skipped"), ("train", "spikes"))
# Drawn together where a report is on one run: first, name, second, name, title, unit.
_PAIRS = (
    (
        ("train", "loss"),
        "training",
        ("validation", "loss"),
        "validation",
        "Loss",
        "Nats per token.",
    ),
    (("train", "lr"), "weights", ("train", "gate_lr"), "gates", "Learning rates", ""),
)


def styles(names: Sequence[str]) -> list[Style]:
    """A colour and a dash for each of up to MOST_RUNS runs."""
    return [
        Style(name, f"var(--c{n % _COLOURS + 1})", _DASHES[n // _COLOURS])
        for n, name in enumerate(names)
    ]


def sections(runs: Sequence[Run], shown: Sequence[Style]) -> dict[str, list[Figure]]:
    """The figures of each section, in order; sections without any are left out."""
    return _Figures(runs, shown).sections


@dataclass
class _Figures:
    """Makes the figures of all runs. `x` is the axis of steps, which all of them share."""

    runs: Sequence[Run]
    shown: Sequence[Style]
    found: list[dict[tuple[str, str], Family]] = field(init=False)
    x: Scale = field(init=False)
    sections: dict[str, list[Figure]] = field(init=False)

    def __post_init__(self) -> None:
        self.found = [families(run) for run in self.runs]
        steps = [r["step"] for run in self.runs for of in run.records.values() for r in of]
        self.x = Scale(0.0, float(max([1, *steps])), whole=True)
        order = (LOSSES, OPTIMIZATION, MEMORY, SPEED, DATA, OTHER)
        self.sections = {section: [] for section in order}
        for key in self._keys():
            known = _KNOWN.get(key) or self._unknown(key)
            self.sections[known.section] += self._figures(key, known)
        self.sections[LOSSES] += self._by_tokens()
        self.sections[MEMORY] += self._last_gates()
        self.sections = {
            section: own[:_MOST_FIGURES] for section, own in self.sections.items() if own
        }

    def _keys(self) -> list[tuple[str, str]]:
        """Known ones in the table's order, then all others in that of the records."""
        present = dict.fromkeys(key for own in self.found for key in own)
        return [
            *(key for key in _KNOWN if key in present),
            *(k for k in present if k not in _KNOWN),
        ]

    def _unknown(self, key: tuple[str, str]) -> _Known:
        kind, name = key
        layered = any(own[key].layers for own in self.found if key in own)
        words = name.replace("_", " ")
        if kind == "train" and layered:
            return _Known(MEMORY, words.capitalize(), "Of each layer, mean of the lanes.")
        title = words if kind == "train" else f"{kind}: {words}".replace("_", " ")
        return _Known(OTHER, title[:1].upper() + title[1:], "")

    def _figures(self, key: tuple[str, str], known: _Known) -> Iterator[Figure]:
        own = [(pair[0][key], pair[1]) for pair in self._of_runs() if key in pair[0]]
        if key in _COUNTED and not any(family.mean()[1].any() for family, _ in own):
            return  # the overview says that there are none
        if all(family.single for family, _ in own):
            yield from self._of_numbers(key, known, own)
            return
        if len(self.runs) > 1 and own[0][0].layers:
            means = [_curve(style, *family.mean()) for family, style in own]
            yield self._figure(f"{known.title}, mean of the layers", known, means)
        curves = [_of_layers(one) if one.layers else _of_names(one) for one, _ in own]
        # One scale, so that the runs' charts can be compared.
        y = known.scale(itertools.chain(*curves))
        for (_, style), of_run in zip(own, curves, strict=True):
            name = f" \N{MIDDLE DOT} {style.name}" if len(self.runs) > 1 else ""
            yield self._figure(f"{known.title}{name}", known, of_run, y)

    def _of_numbers(
        self, key: tuple[str, str], known: _Known, own: Sequence[tuple[Family, Style]]
    ) -> Iterator[Figure]:
        pair = next((pair for pair in _PAIRS if key in (pair[0], pair[2])), None)
        beside = self.found[0].keys() if len(self.runs) == 1 else set()
        if pair and all(one in beside and self.found[0][one].single for one in (pair[0], pair[2])):
            if key == pair[0]:
                first, one, second, other, title, unit = pair
                curves = [
                    Curve(one, *self.found[0][first].curves[""], "var(--c1)"),
                    Curve(other, *self.found[0][second].curves[""], "var(--c2)"),
                ]
                yield self._figure(title, known._replace(unit=unit), curves)
            return
        curves = [_curve(style, *family.curves[""]) for family, style in own]
        yield self._figure(known.title, known, curves)

    def _figure(
        self, title: str, known: _Known, curves: Sequence[Curve], y: Scale | None = None
    ) -> Figure:
        chart = drawn(curves, self.x, y or known.scale(curves))
        return Figure(title, chart, known.unit, folded=len(curves) > 6)

    def _of_runs(self) -> Iterator[tuple[dict[tuple[str, str], Family], Style]]:
        yield from zip(self.found, self.shown, strict=True)

    def _by_tokens(self) -> Iterator[Figure]:
        """Losses by tokens, where runs have read different numbers in as many steps."""
        curves, rates = [], set()
        for own, style in self._of_runs():
            loss, tokens = own.get(("train", "loss")), own.get(("train", "tokens"))
            if loss is None or tokens is None or not (loss.single and tokens.single):
                continue
            (steps, read), (at, values) = tokens.curves[""], loss.curves[""]
            if len(steps) and steps[-1] > 0:
                rates.add(round(float(read[-1] / steps[-1])))
                curves.append(_curve(style, np.interp(at, steps, read), values))
        if len(rates) > 1:
            x = Scale(0.0, max(float(curve.x.max()) for curve in curves))
            chart = drawn(curves, x, Scale.around(curves))
            yield Figure("Training loss by tokens", chart, "Nats per token.", "tokens read")

    def _last_gates(self) -> Iterator[Figure]:
        """The gates of all heads after each run's last record, by layer."""
        curves = []
        for run, style in zip(self.runs, self.shown, strict=True):
            gates = next((r["gates"] for r in reversed(run.train) if r.get("gates")), None)
            x, y = _heads(gates)
            if len(x):
                curves.append(_curve(style, x, y, marks=True))
        if curves:
            last = max(float(curve.x.max()) for curve in curves)
            layers = Scale(0.3, round(last) + 0.7, whole=True)
            chart = drawn(curves, layers, Scale.around(curves, linear=True))
            note = "A dot per head, after the last record."
            yield Figure("Gates of all heads by layer", chart, note, "layer")


def _curve(style: Style, x: np.ndarray, y: np.ndarray, *, marks: bool = False) -> Curve:
    return Curve(style.name, x, y, style.colour, style.dash, marks)


def _of_layers(family: Family) -> list[Curve]:
    """A curve per layer, from one colour to another."""
    last = max(len(family.curves) - 1, 1)
    return [
        Curve(f"layer {name}", x, y, _between(n / last))
        for n, (name, (x, y)) in enumerate(family.curves.items())
    ]


def _between(share: float) -> str:
    return f"color-mix(in oklab, var(--c2) {share:.0%}, var(--c1))"


def _of_names(family: Family) -> list[Curve]:
    kept = dict(list(family.curves.items())[:MOST_RUNS])
    shown = styles([name or family.key for name in kept])
    return [_curve(style, *points) for style, points in zip(shown, kept.values(), strict=True)]


def _heads(gates: Any) -> tuple[np.ndarray, np.ndarray]:
    """Layers, from 1, and gates: by height, side by side, so that equal heads are all seen."""
    x, y = [np.zeros(0)], [np.zeros(0)]
    for layer, of_heads in enumerate(gates if isinstance(gates, list) else [], 1):
        values = np.sort([number for _, number in numbers(of_heads)])
        across = np.linspace(-0.3, 0.3, len(values)) if len(values) > 1 else np.zeros(len(values))
        x.append(layer + across)
        y.append(values)
    return np.concatenate(x), np.concatenate(y)
