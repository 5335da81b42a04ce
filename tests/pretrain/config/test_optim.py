"""Settings of `optim`: rates, schedules, and values that cannot train."""

from __future__ import annotations

import pytest

from pretrain.config.root import load
from tests.pretrain.config.loading import MINIMUM, problems


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=nan"], "optim.lr: expected a finite number, found nan"),
        (["optim.beta1=1.5"], "optim.beta1: expected 0.0 to 1.0, found 1.5"),
        (
            ["optim.decay_steps=50"],
            "optim.decay_steps: has no effect with optim.schedule=cosine; remove it, or set "
            "optim.schedule=wsd",
        ),
        (
            ["optim.muon.rms=0.4"],
            "optim.muon: has no effect with optim.name=adamw; remove it, or set optim.name=muon",
        ),
        (
            ["optim.name=adafactor", "optim.beta2=0.9"],
            "optim.beta2: has no effect with optim.name=adafactor; remove it, or set "
            "optim.name=adamw or muon",
        ),
        (["optim.ema_decay=1"], "optim.ema_decay: 1 averages nothing; lower it, e.g. to 0.999"),
        (["optim.ema_decay=1.5"], "optim.ema_decay: expected 0.0 to 1.0, found 1.5"),
        (["optim.name=lion"], "optim.name: expected one of adamw, adafactor, muon; found 'lion'"),
        (["optim.beta1=1"], "optim.beta1: 1 never takes a gradient in; lower it, e.g. to 0.9"),
        (["optim.name=muon", "optim.beta2=1"], "optim.beta2: 1 never takes a gradient in"),
        (["optim.name=muon", "optim.muon.momentum=1"], "optim.muon.momentum: 1 never takes a"),
        (["optim.eps=0"], "optim.eps: 0 divides 0 by 0 where a gradient is 0"),
        (["optim.name=adafactor", "optim.adafactor.eps1=0"], "optim.adafactor.eps1: "),
    ],
)  # fmt: skip
def test_a_mistake_is_said_in_one_sentence(words: list[str], said: str) -> None:
    (problem,) = problems(*words)
    assert said in problem


@pytest.mark.parametrize(("name", "rate"), [("adamw", 1e-3), ("adafactor", 0.01), ("muon", 1e-3)])
def test_an_optimizer_has_its_own_rate_unless_one_is_set(name: str, rate: float) -> None:
    words = [*MINIMUM, f"optim.name={name}"]
    assert load(None, words).optim.peak == rate
    assert load(None, [*words, "optim.lr=0"]).optim.peak == 0.0
