"""RULER's own rule: an answer is right if it is anywhere in what the model generates.

As `string_match_all` of Hsieh et al. 2024 (RULER), after greedy generation and without regard to
case: the share of a question's answers that are found. `string_match_part`, which RULER has for
questions with several right answers, is the same where there is one, as in the stories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data_prep.recall.pair import Pair
from pretrain.evaluate.generate import generate
from pretrain.evaluate.questions import Sampling
from pretrain.trained import Trained

TOKENS = {
    **dict.fromkeys(("single", "multikey", "multivalue", "multiquery"), 128),
    "variables": 30,
    "words": 120,
    **dict.fromkeys(("qa1", "qa2", "qa3"), 32),
}
"""Tokens that RULER generates for a task: the tasks that it has a rule for."""


def share(
    trained: Trained, task: str, pair: Pair, is_exact: bool, report: Callable[[str], None]
) -> float:
    """The share of the pair's answers that the model's greedy continuation holds.

    An answer that `is_exact` is what it begins with, so it is not generated. Otherwise the prompt
    is read once more, and at most as many tokens are generated as RULER does, or as twice the
    answer has, since a small tokenizer spells it in more. `report` is given lines of progress.
    """
    if is_exact:
        return 1.0
    model = trained.tokenizer
    most = max(TOKENS[task], 2 * len(model.encode(pair.answer)))
    text, found = "", 0.0
    for piece in generate(trained, model.encode(pair.prompt), Sampling(most, 0.0), report):
        text += piece
        found = match(text, pair.answers)
        if found == 1:
            break
    return found


def match(text: str, answers: Sequence[str]) -> float:
    """The share of the answers that are anywhere in the text, without regard to case."""
    lower = text.lower()
    return sum(answer.lower() in lower for answer in answers) / len(answers)
