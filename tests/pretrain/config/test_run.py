"""Settings of a run as a whole: checkpoints, ranks and tracking."""

from __future__ import annotations

import pytest

from tests.pretrain.config.loading import problems


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["checkpoint.keep_last=1"], "checkpoint.keep_last: expected at least 2, found 1"),
        (["zero.stage=4"], "zero.stage: expected one of 0, 1, 2, 3; found 4"),
        (
            ["checkpoint.every=200", "checkpoint.keep_every=500"],
            "checkpoint.keep_every: a checkpoint is written every 200 steps, so of the multiples "
            "of 500 only those of 1000 would be kept; choose a multiple of every, e.g. 600",
        ),
        (
            ["zero.stage=1", "zero.live_parameters=10"],
            "zero.live_parameters: has no effect with zero.stage=1; remove it, or set zero.stage=3",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_said_in_one_sentence(words: list[str], said: str) -> None:
    (problem,) = problems(*words)
    assert said in problem


def test_checkpoints_are_kept_at_multiples_of_their_interval_or_all_of_them() -> None:
    for kept in (0, 50, 100, 200, 1000):
        assert problems("checkpoint.every=200", f"checkpoint.keep_every={kept}") == []


def test_a_project_that_wandb_refuses_is_refused_with_the_configuration() -> None:
    assert problems("wandb.project=Infini 1b, long-context") == []
    assert problems("wandb.project=team/infini", "wandb.mode=disabled") == []
    for project in ("team/infini", "infini: long", "a" * 129):
        (problem,) = problems(f"wandb.project='{project}'")
        assert problem.startswith(f"wandb.project: '{project}': wandb takes names of at most 128")
