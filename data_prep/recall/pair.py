"""A prompt that ends in a question, its answer, and a prompt of the length that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

_FIRST_GUESS = 32  # pieces of filler


class Pair(NamedTuple):
    """What a model is given, and what it is to say; the answer begins with its space."""

    prompt: str
    answer: str


def hidden(facts: Sequence[tuple[float, str]], filler: Sequence[str]) -> str:
    """Facts among pieces of filler, each at its depth: 0 before all of them, 1 behind.

    Facts of equal depth stand in the order given; pieces are joined by spaces.
    """
    pieces: list[str] = []
    taken = 0
    for depth, fact in sorted(facts, key=lambda item: item[0]):
        place = round(depth * len(filler))
        pieces += [*filler[taken:place], fact]
        taken = place
    return " ".join([*pieces, *filler[taken:]])


def fitted(made_of: Callable[[int], Pair], count: Callable[[str], int], length: int) -> Pair | None:
    """The pair of a prompt of at most `length` tokens, and of more than it less a piece's mean.

    `made_of(n)` has n pieces of filler, `count` says how many tokens a text has. None where the
    prompt is longer without any filler.
    """
    best, below = made_of(0), 0
    bare = tokens = count(best.prompt)
    if bare > length:
        return None
    above, guess = length + 1, _FIRST_GUESS
    while above - below > 1:
        guess = min(max(guess, below + 1), above - 1)
        tried = made_of(guess)
        now = count(tried.prompt)
        if now > length:
            above = guess
        else:
            best, below, tokens = tried, guess, now
        if now <= bare:
            break  # the task has no filler
        a_piece = (now - bare) / guess
        if below and length - tokens < a_piece:
            break
        guess = int((length - bare) / a_piece)
    return best
