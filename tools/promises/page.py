"""The table of promises: what was run of each, and what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.promises.campaign import Promise, Result

_HEAD = """# What a user may rely on

Written by `tools/promises` from the cases that it ran; a line that was not run, or not in full,
says so. Every case is known by its seed: `python tools/promises NAME --seed SEED` repeats one, and
leaves its directory in `runs/promises/NAME/` where it fails. `python tools/promises NAME` runs a
line, or continues it, and `python tools/promises` all of them: hours.

"""


def state_of(promise: Promise, found: Sequence[Result]) -> str:
    """In a word or two: what the cases at hand say of the promise."""
    ran = [result for result in found if not result.unavailable]
    failed = sum(bool(result.failure) for result in ran)
    if failed:
        return f"BROKEN in {failed}"
    if not ran:
        why = sorted({str(result.did["unavailable"]) for result in found})
        return f"not run ({'; '.join(why)})" if why else "not run"
    return "held" if len(ran) >= promise.cases else "held, in part"


def figures(promise: Promise, found: Sequence[Result]) -> dict[str, Any]:
    """A line of the table as plain JSON."""
    ran = [result for result in found if not result.unavailable]
    return {
        "number": promise.number,
        "name": promise.name,
        "promise": promise.sentence,
        "unit": promise.unit,
        "wanted": promise.cases * promise.each,
        "done": len(ran) * promise.each,
        "failures": [{"seed": r.seed, "failure": r.failure} for r in ran if r.failure],
        "seconds": {
            "longest": max((r.seconds for r in ran), default=0.0),
            "all": round(sum(r.seconds for r in ran), 1),
        },
        "state": state_of(promise, found),
    }


def table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines as a table in Markdown."""
    rows = ["| # | name | promise | done | failures | longest case | state |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for line in lines:
        done = f"{line['done']:,} of {line['wanted']:,} {line['unit']}"
        longest = f"{line['seconds']['longest']:.1f} s" if line["done"] else ""
        failures = str(len(line["failures"])) if line["done"] else ""
        rows.append(
            f"| {line['number']} | {line['name']} | {line['promise']} | {done} | {failures} | "
            f"{longest} | {line['state']} |"
        )
    return rows


def write(
    page: Path,
    machine: Mapping[str, Any],
    found: Sequence[tuple[Promise, Sequence[Result]]],
) -> list[str]:
    """Write the page and, beside it, its figures as JSON; the table."""
    lines = [figures(promise, results) for promise, results in found]
    rows = table(lines)
    described = ", ".join(f"{key} {value}" for key, value in machine.items())
    failures = [
        f"- {line['name']}, seed {one['seed']}: `{one['failure'].strip().splitlines()[-1]}`"
        for line in lines
        for one in line["failures"]
    ]
    how = [f"- **{promise.name}**: {promise.how}" for promise, _ in found if promise.how]
    text = f"{_HEAD}{chr(10).join(rows)}\n\nRun at: {described}.\n\n## How each is tried\n\n"
    text += "\n".join(how) + "\n"
    if failures:
        text += "\n## Failures\n\n" + "\n".join(failures) + "\n"
    page.write_text(text, encoding="utf-8")
    figures_file = page.with_suffix(".json")
    plain = {"machine": dict(machine), "promises": lines}
    figures_file.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    return rows
