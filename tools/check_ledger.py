"""Prove that a run's committed steps consumed every token of the schedule once, in order.

python tools/check_ledger.py RUN_DIRECTORY; the exit code is 1 if they did not.
"""

from __future__ import annotations

import sys
from pathlib import Path

from data_prep.dataset.wording import counted
from pretrain.training import ledger
from pretrain.training.metrics import read_records


def main() -> None:
    """Check the run directory named on the command line and print the result."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    directory = Path(sys.argv[1])
    try:
        problems = ledger.check(directory)
    except (ValueError, OSError) as error:
        sys.exit(f"{directory}: cannot be checked:\n{error}")
    if problems:
        sys.exit("\n".join(problems))
    lines = read_records(directory / ledger.LEDGER_FILE)
    attempts = sorted({line["attempt"] for line in lines})
    last = lines[-1]["step"] if lines else 0
    print(
        f"{directory}: {counted(len(lines), 'commit')} up to step {last}, of "
        f"{'attempt' if len(attempts) == 1 else 'attempts'} {', '.join(map(str, attempts))}: every "
        "token once, in order"
    )


if __name__ == "__main__":
    main()
