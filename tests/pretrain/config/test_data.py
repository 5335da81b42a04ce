"""Settings of `data`: what cannot be read is said, and weights that change are counted."""

from __future__ import annotations

import json

import pytest

from data_prep.dataset import settings
from pretrain.config.data import SourceConfig
from pretrain.config.root import Config, describe, load
from tests.pretrain.config.loading import MINIMUM, problems


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.mix=[{data: a}]"], "data.mix: cannot be combined with data.train; give"),
        (["data.train=''", "data.mix=[]"], "data.train: not set; give the directory"),
        (["data.train=''", "data.mix=[{weight: 2}]"], "data.mix[0].data: not set"),
        (["data.train=''", "data.mix=[{data: a, wieght: 2}]"], "data.mix[0].wieght: unknown key"),
        (["data.train=''", "data.mix=[{data: a, weight: -1}]"], "mix[0].weight: expected at least"),
        (["data.train=''", "data.mix=[{data: a, weight: 0}]"], "data.mix: every weight is 0"),
        (
            ["data.train=''", "data.mix=[{data: a, weights: [[0, 1], [5, 0]]}]"],
            "data.mix: every weight is 0 after step 5, so nothing would be read",
        ),
        (
            ["data.train=''", "data.mix=[{data: x/a}, {data: x/b, name: c}, {data: x/../x/b}]"],
            "x/b is listed twice; list it once, with the sum of the weights",
        ),
        (
            ["data.train=''", "data.mix=[{data: x/a}, {data: y/a}]"],
            "data.mix: two data sets have the name 'a'; give each a different `name`",
        ),
        (
            ["data.cache.directory=s3://bucket/cache"],
            "data.cache.directory: s3://bucket/cache is a URL; give a directory on a disk",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_said_in_one_sentence(words: list[str], said: str) -> None:
    (problem,) = problems(*words)
    assert said in problem


def test_sources_are_the_mix_or_the_one_data_set_by_the_key_of_the_setting() -> None:
    one = load(None, MINIMUM).data.sources
    assert one == {"data.train": SourceConfig("data/x", 1.0, "x")}
    words = ["run.directory=r", "data.mix=[{data: d/a/}, {data: d/b, weight: 2, name: books}]"]
    assert load(None, words).data.sources == {
        "data.mix[0]": SourceConfig("d/a/", 1.0, "a"),
        "data.mix[1]": SourceConfig("d/b", 2.0, "books"),
    }
    assert "data.mix[].weight = 1.0" in "\n".join(describe())


def test_all_mistakes_in_a_schedule_of_weights_are_reported_at_once() -> None:
    schedule = "[[1000000, 1], [3, -1], [4.5, 1], [7], [9e6, 2]]"
    mix = f"data.mix=[{{data: a, weight: 2, weights: {schedule}}}, {{data: b}}]"
    assert problems("data.train=''", mix, "train.steps=9000000") == [
        "data.mix[0].weight: has no effect beside weights; remove one of them",
        "data.mix[0].weights[0]: the first weight holds from step 0 on, found 1000000",
        "data.mix[0].weights[1]: step 3 is not after 1000000; list the steps in order",
        "data.mix[0].weights[1]: expected a weight of at least 0, found -1",
        "data.mix[0].weights[2]: expected a whole number of steps, found 4.5",
        "data.mix[0].weights[3]: expected [step, weight], found [7]",
        "data.mix[0].weights[4]: never holds, since train.steps=9000000 and it begins after step "
        "9000000; remove it, or raise train.steps",
    ]


def test_a_schedule_of_weights_is_stored_and_counted() -> None:
    mix = "data.mix=[{data: a, weights: [[0, 1], [40, 0]]}, {data: b, weights: [[0, 3], [80, 5]]}]"
    config = load(None, ["run.directory=r", "train.steps=100", mix])
    assert settings.from_plain(Config, json.loads(json.dumps(settings.to_plain(config)))) == config
    assert config.data.phases == [0, 40, 80]
    first, second = config.data.mix
    assert [first.weight_after(step) for step in (0, 39, 40, 99)] == [1, 1, 0, 0]
    assert [second.weight_after(step) for step in (0, 79, 80)] == [3, 3, 5]
    # A quarter of the first 40 of 100 steps, and nothing of the others.
    assert config.data.shares(100) == pytest.approx({"a": 0.1, "b": 0.9})
