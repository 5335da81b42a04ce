"""Rouge by hand, and its intervals."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.evaluate import rouge


def test_rouge_by_hand() -> None:
    # Of 6 and 5 words 4 are shared; of 5 and 4 pairs of words, "the cat" and "on the".
    # The longest common subsequence is "the cat on the".
    (found,) = rouge.scores(["The cat sat on the mat."], ["the cat on the\nsofa"])
    assert found.tolist() == pytest.approx([100 * 8 / 11, 100 * 4 / 9, 100 * 8 / 11])
    # The same words in another order share no pairs of words, and one word in order.
    (turned,) = rouge.scores(["Sara, Becky, Emma"], ["emma becky sara"])
    assert turned.tolist() == pytest.approx([100, 0, 100 / 3])


def test_the_longest_common_subsequence_is_that_of_the_whole_texts() -> None:
    # By lines, as rougeLsum has it, both lines would be found: 100.
    ((_, _, longest),) = rouge.scores(["one two\nthree four"], ["three four\none two"])
    assert longest == pytest.approx(50)


def test_what_says_nothing_scores_nothing() -> None:
    assert rouge.scores(["Sara"], [""]).tolist() == [[0, 0, 0]]
    means = rouge.means(rouge.scores(["Sara", "Becky"], ["", "..."]))
    assert all(one == {"value": 0.0, "interval": [0.0, 0.0]} for one in means.values())


def test_overall_is_the_geometric_mean_of_the_means() -> None:
    # The paper's row of Infini Linear + Delta, Table 4.
    found = rouge.means(np.array([[30.0, 8.8, 7.9], [50.0, 8.8, 27.9]]))
    assert [found[kind]["value"] for kind in rouge.KINDS] == pytest.approx([40.0, 8.8, 17.9])
    assert round(found["overall"]["value"], 1) == 18.5


def test_an_interval_is_from_resampled_pairs() -> None:
    each = np.random.default_rng(3).normal([30.0, 20.0, 10.0], 6.0, size=(400, 3))
    found = rouge.means(each)
    for kind, values in zip(rouge.KINDS, each.T, strict=True):
        low, high = found[kind]["interval"]
        # 1.96 standard errors of the mean to each side.
        error = 1.96 * values.std() / 20
        assert low == pytest.approx(values.mean() - error, abs=0.15)
        assert high == pytest.approx(values.mean() + error, abs=0.15)
    assert rouge.means(each) == found
    low, high = found["overall"]["interval"]
    assert low < found["overall"]["value"] < high
    # A single pair says nothing of others: every draw is that pair.
    (one,) = (rouge.means(each[:1])["rouge1"]["interval"],)
    assert one == pytest.approx([each[0, 0]] * 2)
