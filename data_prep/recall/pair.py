"""A prompt that ends in a question, its answer, and prompts of a given length."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_FIRST_GUESS = 32  # pieces of filler


class Pair(NamedTuple):
    """A prompt and the continuation that is right; the answer begins with its space."""

    prompt: str
    answer: str

    @property
    def answers(self) -> list[str]:
        """The numbers or words that the answer lists."""
        return re.findall(r"\w+", self.answer)


def hidden(facts: Sequence[tuple[float, str]], filler: Sequence[str]) -> str:
    """Facts among pieces of filler, each at its depth: 0 before all of them, 1 after.

    Facts of equal depth are in the order given; pieces are joined by spaces.
    """
    pieces: list[str] = []
    taken = 0
    for depth, fact in sorted(facts, key=lambda item: item[0]):
        place = round(depth * len(filler))
        pieces += [*filler[taken:place], fact]
        taken = place
    return " ".join([*pieces, *filler[taken:]])


def fitted(made_of: Callable[[int], Pair], count: Callable[[str], int], length: int) -> Pair:
    """The pair with as much filler as fits into a prompt of `length` tokens, but for about a piece.

    `made_of(n)` has n pieces of filler, `count` gives the tokens of a text. Where the prompt is
    longer even without filler, it has none.
    """
    best, below = made_of(0), 0
    bare = tokens = count(best.prompt)
    if bare > length:
        return best
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
