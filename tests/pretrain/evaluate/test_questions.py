"""What cannot be asked is told, all at once."""

from __future__ import annotations

from dataclasses import replace

from pretrain.evaluate.questions import Asked

GOOD = Asked(["passkey", "qa1"], [512, 1024], [0.0, 0.5, 1.0], samples=1, seed=0)


def test_what_can_be_asked_has_no_problems() -> None:
    assert GOOD.problems() == []
    assert replace(GOOD, depths=[None]).problems() == []


def test_every_mistake_is_told() -> None:
    asked = Asked(["riddle", "qa1", "qa1"], [0, 512, 512], [0.5, 1.5], samples=0, seed=-1)
    told = asked.problems()
    assert len(told) == 7
    for part in (
        *("riddle is not known; there are passkey", "qa1 is given twice", "0 is not a number"),
        *("512 is given twice", "1.5 is not between", "--samples: expected", "--seed: expected"),
    ):
        assert sum(part in line for line in told) == 1, part
