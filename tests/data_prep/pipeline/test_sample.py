"""What a tokenizer is trained on does not depend on how the corpus is cut."""

from __future__ import annotations

import json
import random

import pytest

from data_prep.pipeline.sample import Lowest, Sample


def naive(texts: list[tuple[str, str]], size: int) -> list[tuple[str, str]]:
    """All in order, up to the one that reaches the size."""
    taken: list[tuple[str, str]] = []
    for key, text in sorted(texts):
        if sum(len(text.encode()) for _, text in taken) < size:
            taken.append((key, text))
    return taken


@pytest.mark.parametrize("size", [1, 20, 333, 10**6])
@pytest.mark.parametrize("units", [1, 3, 50])
def test_the_lowest_of_all_units_are_the_lowest_of_all(units: int, size: int) -> None:
    source = random.Random(size)
    texts = [
        (f"{source.getrandbits(64):016x}", "\u00fc" * source.randrange(1, 9)) for _ in range(200)
    ]
    parts = [Lowest(size) for _ in range(units)]
    for number, (key, text) in enumerate(texts):
        parts[number % units].add(key, text)
        # Twice the size, and one more.
        assert sum(len(text) * 2 for _, text in parts[number % units]._held) <= 2 * size + 16
    whole = Lowest(size)
    for part in parts:
        for key, text in part.passages:
            whole.add(key, text)
    assert whole.passages == naive(texts, size)


def test_samples_of_units_are_added_up() -> None:
    whole = Sample(Lowest(100))
    for key, why in (("b", "rejected: x"), ("a", "dropped: y"), ("c", "rejected: x")):
        one = Sample(Lowest(100), read=3)
        one.drawn.add(key, key * 3)
        one.left_out[why] += 1
        whole.add(json.loads(json.dumps(one.plain())))
    assert whole.drawn.passages == [("a", "aaa"), ("b", "bbb"), ("c", "ccc")]
    assert (whole.read, whole.undrawn) == (9, 6)
    assert whole.left_out == {"rejected: x": 2, "dropped: y": 1}
