"""Charts as inline SVG: their text is the page's text, their colours are the page's variables."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, PercentFormatter

# Stand-ins that matplotlib takes for colours, by the page's variable that replaces each.
_VARIABLES = ("ink", "muted", "track", "c1", "c2", "c3", "c4", "c5")
_COLOURS = {name: f"#0{n}0{n}0{n}" for n, name in enumerate(_VARIABLES, 1)}
# One chart fits a phone and half of a laptop's page: inches, and points of text.
_WIDTH, _ROW, _POINTS = 5.0, 0.42, 9.5
# Characters of a row's name and value together.
_LINE = 56
_BINS = 32
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "data-prep",
    # A name with two dollar signs is no formula.
    "text.parse_math": False,
    "font.size": _POINTS,
    "text.color": _COLOURS["ink"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.edgecolor": _COLOURS["track"],
    "xtick.color": _COLOURS["muted"],
    "ytick.color": _COLOURS["muted"],
}


def plain(text: str) -> str:
    """`text` with U+FFFD for what would change how a page shows the rest: controls, overrides."""
    return _HIDDEN.sub("\ufffd", text)


@mpl.rc_context(_STYLE)
def lengths(tokens: np.ndarray) -> str:
    """Shares of the documents and of the tokens by length of the document: uint64 [documents]."""
    low, high = max(int(tokens.min()), 1), int(tokens.max()) + 1
    edges = np.geomspace(low, max(high, low * 2), _BINS + 1)
    edges[0] = 0
    documents, _ = np.histogram(tokens, edges)
    weights, _ = np.histogram(tokens, edges, weights=tokens.astype(float))
    edges[0] = low
    figure, axes = _figure(2.9)
    axes.set_axis_on()
    axes.stairs(documents / documents.sum(), edges, fill=True, color=_COLOURS["c1"], alpha=0.55)
    axes.stairs(weights / weights.sum(), edges, color=_COLOURS["c2"], linewidth=1.8)
    axes.set_xscale("log")
    decades = np.log10(edges[-1] / edges[0])
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2.5 else (1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(LogLocator(subs=()))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("tokens of a document")
    axes.grid(axis="y", color=_COLOURS["track"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    return _svg(figure, "Shares of documents and of tokens by length of the document")


def bars(title: str, rows: Mapping[str, float], told: Sequence[str], colour: str = "c1") -> str:
    """A bar a row, `told` at its end; the longest fills the width."""
    longest = max(rows.values(), default=0) or 1
    shares = {name: [value / longest] for name, value in rows.items()}
    return stacked(title, shares, told, (colour,))


@mpl.rc_context(_STYLE)
def stacked(
    title: str, rows: Mapping[str, Sequence[float]], told: Sequence[str], colours: Sequence[str]
) -> str:
    """A bar a row of parts that are shares of the whole width, one part a colour."""
    figure, axes = _figure(max(len(rows), 1) * _ROW + 0.08)
    for row, ((name, shares), value) in enumerate(zip(rows.items(), told, strict=True)):
        name = " ".join(plain(name).split())
        room = max(_LINE - len(value), _LINE // 4)
        short = name if len(name) <= room else f"{name[: room - 1]}\u2026"
        axes.text(0, row - 0.08, short, va="bottom")
        axes.text(1, row - 0.08, value, va="bottom", ha="right", color=_COLOURS["muted"])
        axes.barh(row + 0.12, 1, 0.24, color=_COLOURS["track"])
        left = 0.0
        for share, colour in zip(shares, colours, strict=True):
            if share:
                axes.barh(row + 0.12, share, 0.24, left, color=_COLOURS[colour])
            left += share
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(rows), 1) - 0.6, -0.65)
    return _svg(figure, title)


def _figure(height: float) -> tuple[Figure, Axes]:
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02)
    figure = Figure(figsize=(_WIDTH, height), layout=layout)
    axes = figure.subplots()
    axes.set_axis_off()
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    out = io.StringIO()
    nothing: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        # The reader's fonts draw the text, not the one that it is measured with here.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(out, format="svg", metadata=nothing, transparent=True)
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<style.*?</style>", "", drawn, count=1, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*">', "<g>", drawn)
    for name, colour in _COLOURS.items():
        drawn = drawn.replace(f": {colour}", f": var(--{name})")
    return drawn.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
