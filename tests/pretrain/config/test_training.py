"""Settings of `train`: evaluations in training, spikes and profiles."""

from __future__ import annotations

from dataclasses import fields

import pytest

from data_prep.recall.tasks import TASKS
from pretrain.config.training import EVALUATIONS, EvaluationConfig
from tests.pretrain.config.loading import problems


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train.spikes.steps=64"],
            "train.spikes.steps: has no effect with deviations=0; remove it, or set deviations",
        ),
        (["train.spikes.deviations=-1"], "train.spikes.deviations: expected at least 0.0, found"),
        (["train.z_loss=-1"], "train.z_loss: expected at least 0.0, found -1.0"),
        (
            ["train.profile_after=6"],
            "train.profile_after: has no effect with profile_steps=0; remove it, or set profile_st",
        ),
        (["train.profile_ranks=all"], "train.profile_ranks: has no effect with profile_steps=0"),
        (
            ["train.profile_steps=3", "train.profile_after=1000"],
            "train.profile_after: no step is left to profile after 1000 of steps=1000; lower it",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_said_in_one_sentence(words: list[str], said: str) -> None:
    (problem,) = problems(*words)
    assert said in problem


def test_all_mistakes_in_evaluations_are_reported_at_once() -> None:
    evaluations = [
        "{kind: passkey, lengths: [4096, 4096], data: d}",
        "{kind: needles, every: 5, tasks: [single, treble]}",
        "{kind: needles, depths: [0.5], name: step}",
        "{kind: perplexity, lengths: [5], every: -1}",
        "{lengths: [5], depths: []}",
        "{kind: harness}",
    ]
    assert problems(f"train.evaluate=[{', '.join(evaluations)}]") == [
        "train.evaluate[1].tasks[1]: expected one of single, multikey, multivalue, multiquery, "
        "variables, words, qa1, qa2, qa3; found 'treble'",
        "train.evaluate[3].every: expected at least 0, found -1",
        "train.evaluate[5].kind: expected one of passkey, needles, perplexity; found 'harness'",
        "train.evaluate[0].data: has no effect with kind=passkey; remove it, or set "
        "kind=perplexity",
        "train.evaluate[0].lengths: [4096, 4096] names one of them twice; list each once",
        "train.evaluate[1].lengths: not set, and kind=needles needs it; give what `pretrain eval "
        "needles` takes as --lengths",
        "train.evaluate[1].filler: not set, and kind=needles needs it; give what `pretrain eval "
        "needles` takes as --filler",
        "train.evaluate[2].depths: has no effect with kind=needles; remove it, or set kind=passkey",
        "train.evaluate[2].lengths: not set, and kind=needles needs it; give what `pretrain eval "
        "needles` takes as --lengths",
        "train.evaluate[2].filler: not set, and kind=needles needs it; give what `pretrain eval "
        "needles` takes as --filler",
        "train.evaluate[2].name: 'step' is a key of every record; choose another",
        "train.evaluate[3].lengths: has no effect with kind=perplexity; remove it, or set "
        "kind=passkey or needles",
        "train.evaluate[3].data: not set, and kind=perplexity needs it; give what `pretrain eval "
        "perplexity` takes as --data",
        "train.evaluate[4].depths: none given; list some, e.g. [0, 0.5, 1]",
        "train.evaluate: two evaluations have the name 'passkey'; give each a different `name`",
    ]


def test_evaluations_name_the_tasks_of_recall_and_every_one_of_their_settings() -> None:
    assert ["passkey", *EvaluationConfig(kind="needles").tasks_asked] == list(TASKS)
    assert EvaluationConfig(kind="perplexity").tasks_asked == []
    assert EvaluationConfig(kind="needles").depths_asked == [None]
    read = {name for traits in EVALUATIONS.values() for name in traits.settings}
    own = {field.name for field in fields(EvaluationConfig)}
    assert own == read | {"kind", "every", "name"}
