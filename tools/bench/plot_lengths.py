"""Plots tokens per second and peak memory against the window length, from measured figures.

    python tools/bench/plot_lengths.py docs/bench

Reads llama.json and length.json in that directory and writes lengths.png beside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def main() -> None:
    """Draw the plot."""
    if len(sys.argv) != 2:
        sys.exit("expected one argument: the directory with llama.json and length.json")
    directory = Path(sys.argv[1])
    rows = [
        row
        for name in ("llama", "length")
        for row in json.loads((directory / f"{name}.json").read_text())["rows"]
    ]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for who in dict.fromkeys(row["who"] for row in rows):
        own = [row for row in rows if row["who"] == who]
        windows = [row["settings"]["window"] for row in own]
        speed.plot(windows, [row["tokens_per_second"] for row in own], marker="o", label=who)
        memory.plot(windows, [row["peak_bytes"] / 2**30 for row in own], marker="o", label=who)
    for axes, what in ((speed, "tokens/s"), (memory, "peak resident memory, GiB")):
        _dress(axes, what)
    speed.legend(fontsize="small")
    figure.savefig(directory / "lengths.png", dpi=120)


def _dress(axes: Any, what: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("window, tokens")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
