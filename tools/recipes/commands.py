"""What the recipes share: their parser, and the commands that they run as a person types them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

_BIN = Path(sys.executable).parent


def parser(about: str | None, *positional: tuple[str, str]) -> argparse.ArgumentParser:
    """A parser with a recipe's docstring, less its usage, as help; `positional` are directories."""
    title, _, *rest = (about or "").split("\n\n")
    found = argparse.ArgumentParser(
        description="\n\n".join([title, *rest]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, help in positional:
        found.add_argument(name, type=Path, help=help)
    return found


def run(command: str, *words: str | Path) -> None:
    """Show and run a command of this environment; where it fails the recipe ends with its code."""
    line = [str(_BIN / command), *map(str, words)]
    print("$", command, *line[1:], flush=True)
    done = subprocess.run(line, check=False)
    if done.returncode:
        sys.exit(done.returncode)
