"""Try to break what users rely on, and say what was found.

python tools/promises [NAME ...]; without a name all promises are tried, which takes hours. A
campaign that is stopped goes on where it was. The table goes to docs/promises.md and .json.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The modules beside this file are found by their package, and never stand before others' names.
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tools" / "bench"))

from machine import described  # noqa: E402

from tools.promises import campaign, ledgers, page  # noqa: E402
from tools.promises.campaign import Promise, Result  # noqa: E402
from tools.promises.listed import PROMISES  # noqa: E402


def main() -> None:
    """Run what the command line names; the exit code is 1 where a promise is broken."""
    parser = _parser()
    options = parser.parse_args()
    by_name = {promise.name: promise for promise in PROMISES}
    if problems := _problems(options, by_name):
        parser.error("\n  - ".join(["this cannot run:", *problems]))
    # An end by SIGTERM ends the running case as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
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
    options.page.parent.mkdir(parents=True, exist_ok=True)
    print("\n".join(page.write(options.page, machine, [*found.items()])))
    sys.exit(any(result.failure for results in found.values() for result in results))


def _problems(options: argparse.Namespace, by_name: Mapping[str, Promise]) -> list[str]:
    """What is wrong with the command line."""
    found = [
        f"no such promise: {name}; expected some of {', '.join(by_name)}"
        for name in options.names
        if name not in by_name
    ]
    if options.cases is not None and options.cases < 0:
        found.append(f"--cases {options.cases}: expected a number, or 0 to write the page alone")
    if options.seed is not None:
        if len(options.names) != 1:
            found.append("--seed: repeats a case of one promise; name it")
        elif options.names[0] in by_name:
            last = by_name[options.names[0]].cases - 1
            if not 0 <= options.seed <= last:
                found.append(f"--seed {options.seed}: {options.names[0]} has seeds 0 to {last}")
    for option, directory in (("--output", options.output), ("--page", options.page.parent)):
        existing = next(one for one in (directory, *directory.absolute().parents) if one.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            found.append(f"{option}: {existing} is no directory that can be written to")
    return found


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
    made.add_argument("--cases", type=int, help="cases of each, 0: only the page (default: all)")
    made.add_argument("--seed", type=int, help="one case of one promise, again")
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
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
