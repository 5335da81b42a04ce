"""Gates by layer after training (the paper's Figure 3), from reports that recipes keep.

    python tools/recipes/gates.py PLOT REPORTS ...

Each REPORTS is a directory of one recipe's or one corpus's reports, such as
docs/results/reports/passkey. The plot, a PNG file, has a panel for each kind of memory with gates
in each of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pretrain.evaluate.results import write_figure
from pretrain.model.transformer import Transformer

Gates: TypeAlias = Sequence[Sequence[float]]
"""sigmoid(β), the share of the memory, by layer and head; a layer without gates has none."""


def main(words: Sequence[str] | None = None) -> None:
    """Read the reports and draw the plot. Exits where a directory has no report with gates."""
    parsed = _parser().parse_args(words)
    names = Counter(directory.resolve().name for directory in parsed.reports)
    panels: dict[str, dict[int, Gates]] = {}
    for directory in parsed.reports:
        name = directory.resolve().name
        # As of several recipes whose reports are where they put them, in OUT/reports.
        title = name if names[name] == 1 else str(directory)
        panels |= {f"{title}: {kind}": seeds for kind, seeds in _read(directory).items()}
    write_figure(parsed.plot, figure(panels))
    print(parsed.plot)


def _parser() -> argparse.ArgumentParser:
    title, _, about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(description=f"{title}\n\n{about}")
    parser.add_argument("plot", type=Path, help="PNG file")
    parser.add_argument("reports", type=Path, nargs="+", help="directories of reports")
    return parser


def of(model: Transformer) -> Gates:
    """The gates of a trained model."""
    parameters = dict(model.named_parameters())
    found: list[list[float]] = [[] for _ in model.layers] if model.gates() else []
    for name, layer in model.gates().items():
        found[layer] = torch.sigmoid(parameters[name].detach().float()).tolist()
    return found


def figure(panels: Mapping[str, Mapping[int, Gates]]) -> Figure:
    """Every head's gate by layer; a panel for each title, with the gates of its seeds."""
    drawn = Figure(figsize=(3.5 * len(panels), 4), layout="constrained")
    places = drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, seeds) in zip(places, panels.items(), strict=True):
        for index, (seed, layers) in enumerate(seeds.items()):
            for layer, gates in enumerate(layers):
                place = layer + 1 + 0.2 * (index - (len(seeds) - 1) / 2)
                axes.scatter([place] * len(gates), gates, s=14, color=f"C{seed - 1}")
        axes.axhline(0.5, color="grey", linestyle=":", linewidth=1)
        axes.set_xlim(0.5, max(map(len, seeds.values())) + 0.5)
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("layer (one dot per head, one colour per seed)", fontsize=8)
    places[0].set_ylabel("sigmoid(β), share of the memory")
    return drawn


def _read(directory: Path) -> dict[str, dict[int, Gates]]:
    """The gates of a directory's models by kind of memory and seed."""
    found: dict[str, dict[int, Gates]] = {}
    for path in sorted(directory.rglob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        # KIND-SEED.json, or a directory KIND-SEED of reports.
        name = path.relative_to(directory).parts[0].removesuffix(".json")
        kind, _, seed = name.rpartition("-")
        if seed.isdecimal() and isinstance(report, dict) and report.get("gates"):
            found.setdefault(kind, {})[int(seed)] = report["gates"]
    if not found:
        sys.exit(f"{directory}: has no report with gates; give the directory of a recipe's reports")
    return found


if __name__ == "__main__":
    main()
