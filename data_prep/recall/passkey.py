"""Passkey retrieval, in the format of Mohtashami and Jaggi 2023 ("Landmark Attention")."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.recall.draws import Draws
from data_prep.recall.pair import Pair, hidden

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DIGITS = 5
_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
_QUESTION = "What is the pass key? The pass key is"


def passkey(draws: Draws, filler: Sequence[str], depth: float | None) -> Pair:
    """A five-digit key at `depth` of the filler (None: drawn), asked for at the end."""
    key = draws.number(_DIGITS)
    drawn = draws.fraction()
    fact = f"The pass key is {key}. Remember it. {key} is the pass key."
    text = hidden([(drawn if depth is None else depth, fact)], filler)
    return Pair(f"{_TASK}\n{text}\n{_QUESTION}", f" {key}")
