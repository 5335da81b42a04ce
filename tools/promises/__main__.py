"""Try to break what users rely on, and say what was found.

python tools/promises [NAME ...]; without a name all promises are tried, which takes hours. A
campaign that is stopped goes on where it was. The table goes to docs/promises.md and .json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The modules beside this file are found by their package, and never stand before others' names.
sys.path[0] = str(ROOT)

from tools.bench.machine import described  # noqa: E402
from tools.promises import campaign, ledgers, page  # noqa: E402
from tools.promises.campaign import Promise, Result  # noqa: E402
from tools.promises.listed import PROMISES  # noqa: E402


def main() -> None:
    """Run what the command line names; the exit code is 1 where a promise is broken."""
    options = _parser().parse_args()
    by_name = {promise.name: promise for promise in PROMISES}
    if unknown := [name for name in options.names if name not in by_name]:
        sys.exit(f"no such promise: {', '.join(unknown)}; expected {', '.join(by_name)}")
    machine = described()
    commit = machine["commit"]
    for name in options.names or by_name:
        promise = by_name[name]
        if promise.case is None:
            continue
        count = promise.cases if options.cases is None else options.cases
        seeds = range(count) if options.seed is None else [options.seed]
        again = options.seed is not None
        for result in campaign.run(options.output, promise, seeds, commit, again=again):
            _say(options.output, promise, result)
    found = {one: campaign.results(options.output, one, commit) for one in PROMISES}
    for one in (one for one in PROMISES if one.case is None):
        found[one] = ledgers.counted(found.values())
    print("\n".join(page.write(options.page, machine, [*found.items()])))
    sys.exit(any(result.failure for results in found.values() for result in results))


def _say(output: Path, promise: Promise, result: Result) -> None:
    if result.failure:
        where = output / promise.name / f"case-{result.seed:06d}"
        print(f"{promise.name}, seed {result.seed}: BROKEN\n{result.failure}\nleft in {where}")
    else:
        print(f"{promise.name}, seed {result.seed}: {result.seconds:.2f} s, {result.did}")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tools/promises", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{one.name:16} {one.sentence}" for one in PROMISES),
    )  # fmt: skip
    made.add_argument("names", nargs="*", metavar="NAME", help="promises; without any, all")
    made.add_argument("--cases", type=int, help="cases of each; without it, as many as wanted")
    made.add_argument("--seed", type=int, help="one case, again")
    made.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "promises",
        help="folder of results and of what failures leave (%(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--page", type=Path, default=ROOT / "docs" / "promises.md",
        help="page to write, with .json beside it (%(default)s)",
    )  # fmt: skip
    return made


if __name__ == "__main__":
    main()
