"""Rouge of summaries against their references, as a table of the paper has it (Table 4).

R-1, R-2: F-measure of words and of pairs of words; R-L: of the longest common subsequence of the
whole texts (rouge-score's rougeL). Its rougeLsum joins the subsequences of lines and comes near to
R-1: the 18 that the table has beside an R-1 of 40 are not that. Words are runs of a to z and digits
in lower case, not stemmed. *Overall* is the geometric mean of the three means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

KINDS = ("rouge1", "rouge2", "rougeL")
_DRAWS = 10_000


def scores(answers: Sequence[str], said: Sequence[str]) -> np.ndarray:
    """F-measures, 0 to 100, of each pair: float64 [pairs, 3], in the order of KINDS."""
    scorer = RougeScorer(list(KINDS))
    found = [
        [scored[kind].fmeasure for kind in KINDS]
        for answer, text in zip(answers, said, strict=True)
        for scored in [scorer.score(answer, text)]
    ]
    return 100 * np.array(found, dtype=np.float64)


def means(each: np.ndarray) -> dict[str, dict[str, Any]]:
    """Of KINDS and "overall": the mean over pairs and its 95 % `interval`; `each` [pairs, 3].

    The interval is the middle of 10,000 draws of as many pairs with replacement, the same draws for
    any scores, so that what is compared is drawn alike.
    """
    count = len(each)
    times = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_DRAWS)
    drawn = _with_overall(times @ each / count)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    values = _with_overall(each.mean(axis=0))
    return {
        kind: {"value": float(value), "interval": [float(less), float(more)]}
        for kind, value, less, more in zip((*KINDS, "overall"), values, low, high, strict=True)
    }


def _with_overall(values: np.ndarray) -> np.ndarray:
    """[..., 3] -> [..., 4], the geometric mean behind them."""
    overall = np.cbrt(values.prod(axis=-1, keepdims=True))
    together: np.ndarray = np.concatenate([values, overall], axis=-1)
    return together
