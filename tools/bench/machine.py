"""Shared by the benchmarks: options, a description of the machine, and writing the figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def described() -> dict[str, Any]:
    """The machine and versions; `threads` are torch's in this process."""
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "deepspeed", "numpy")},
    }


def _processor() -> str:
    """The processor's name: ratios to peers depend on it too."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _commit() -> str:
    """The commit, with -dirty if files outside docs/ (where figures are written) have changed.

    That of `tools/gpu/pack` where the sources were unpacked from its folder.
    """
    packed = ROOT / "COMMIT"
    if packed.exists():
        return packed.read_text(encoding="utf-8").strip()
    try:
        described = _git("describe", "--always", "--tags").stdout.strip() or "unknown"
        changed = _git("diff", "--quiet", "HEAD", "--", ".", ":!docs").returncode == 1
    except OSError:  # no git
        return "unknown"
    return f"{described}-dirty" if changed else described


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=False)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with `--json`; `description` is shown unwrapped."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, help="file for the figures")
    return made


def report(found: dict[str, Any], table: list[str], file: Path | None) -> None:
    """Print the machine and the table; write `found` to `file` if it is given."""
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    print("\n".join(table))
    if file:
        write(found, file)


def write(found: dict[str, Any], file: Path) -> None:
    """Write figures, complete at any time."""
    beside = file.with_name(f".{file.name}")
    beside.write_text(json.dumps(found, indent=1) + "\n")
    beside.replace(file)
