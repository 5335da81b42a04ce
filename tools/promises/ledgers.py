"""Promise 7: every token exactly once, counted from the runs of the other promises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tools.promises.campaign import Promise, Result

WRONG = "ledger: "
"""How the failure of a case begins whose run's ledger does not prove it."""

PROMISES = (
    Promise(
        7, "ledger", "every token exactly once, in order, whatever lay between",
        124, "ledgers", None,
        how="not run by itself: the ledgers of the runs of resume, layouts, slurm, one-run and "
        "places are proven against their data (`tools/check_ledger.py` does it for any run).",
    ),
)  # fmt: skip


def counted(others: Iterable[Sequence[Result]]) -> list[Result]:
    """The cases of other promises whose ledgers were proven, or were found wrong."""
    return [
        result
        for results in others
        for result in results
        if result.did.get("ledgers") or result.failure.startswith(WRONG)
    ]
