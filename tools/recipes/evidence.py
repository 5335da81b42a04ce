"""Reports of trained models, kept apart from their runs.

A recipe trains for hours and its tables need a few kilobytes of that. With a directory of reports
(`--reports`) it makes its tables again, and trains what is missing, where neither runs nor data
are left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from commands import CONFIGS
from stages import Stage

from data_prep.dataset import durable
from pretrain.evaluate.results import Report

BEGUN = "begun.json"


@dataclass(frozen=True)
class Reports:
    """JSON files of one directory, each with the commit and the settings that it is of."""

    directory: Path

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def once(self, name: str, made_by: Any, make: Callable[[], Report]) -> Report:
        """The report `name`; if it is missing, it is first written with what `make` returns.

        `made_by` are the settings, as JSON. Exits if those of the report are others.
        """
        path = self._path(name)
        if not path.exists():
            made = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.write_json(path, {"commit": commit(), "made_by": made_by, **made}, None)
        found: Report = json.loads(path.read_text(encoding="utf-8"))
        if found["made_by"] != json.loads(json.dumps(made_by)):
            sys.exit(f"{path} is of other settings: choose another directory of reports, or OUT")
        return found

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"


def add_option(parser: argparse.ArgumentParser) -> None:
    """The option `--reports`."""
    parser.add_argument(
        "--reports",
        type=Path,
        help="directory of the trained models' reports; a model whose report is there is not "
        "trained again (default OUT/reports)",
    )


def of(parsed: argparse.Namespace) -> Reports:
    """The reports that a command line means."""
    return Reports(parsed.reports or parsed.out / "reports")


def made_by(
    config: Path, settings: Sequence[str], plan: Sequence[Stage[Any]] = ()
) -> dict[str, Any]:
    """What a report depends on: the recipe's configuration, its stages and settings."""
    return {
        "config": yaml.safe_load(config.read_text(encoding="utf-8")),
        "stages": [asdict(stage) for stage in plan],
        "settings": list(settings),
    }


def begin(out: Path, made_by: dict[str, Any]) -> None:
    """Note in `out` what its documents and runs are made by; exits if that was something else.

    Without this, runs that have no report yet would be continued with other settings, from as many
    documents as others need, and their reports would tell the new settings alone.
    """
    path, wanted = out / BEGUN, json.loads(json.dumps(made_by))
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        durable.write_json(path, made_by, None)
    before = json.loads(path.read_text(encoding="utf-8"))
    if changed := [key for key in wanted if before.get(key) != wanted[key]]:
        sys.exit(f"{out} was begun with other {' and '.join(changed)} ({path}): choose another OUT")


def commit() -> str:
    """The commit of the sources; with -dirty if they have changed since. "unknown" without git."""
    words = ["git", "-C", str(CONFIGS.parent), "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"


def commits(of: Iterable[str]) -> str:
    """A line that names the commits of reports."""
    names = sorted(set(of))
    return f"Commit{'s' if len(names) > 1 else ''} {', '.join(names)}."
