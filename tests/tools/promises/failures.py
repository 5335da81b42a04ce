"""Runs cases of a promise for a test."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tools.promises import campaign
from tools.promises.listed import PROMISES


def failures(output: Path, name: str, seeds: Iterable[int]) -> dict[int, str]:
    """What failed, by seed; each case runs in a fork of this process, with its patches."""
    (promise,) = (one for one in PROMISES if one.name == name)
    wanted = list(seeds)
    found = list(campaign.run(output, promise, wanted, "test"))
    assert [result.seed for result in found] == wanted
    assert not any(result.unavailable for result in found)
    return {result.seed: result.failure for result in found if result.failure}
