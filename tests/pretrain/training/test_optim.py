"""Groups and schedules by values computed by hand."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.model import ModelConfig
from pretrain.config.optim import OptimConfig
from pretrain.model.transformer import Transformer
from pretrain.training.optim import parameter_groups, rate_fraction


def fractions(config: OptimConfig, steps: int, of: tuple[int, ...]) -> list[float]:
    return [rate_fraction(config, steps, step) for step in of]


def test_warm_up_rises_linearly_and_reaches_the_peak_at_its_last_step() -> None:
    config = OptimConfig(schedule="cosine", warmup_steps=4, final_fraction=0.1)
    assert fractions(config, 100, (1, 2, 3, 4)) == [0.25, 0.5, 0.75, 1.0]
    assert rate_fraction(config, 100, 5) < 1.0


def test_cosine_falls_to_the_final_fraction_at_the_last_step() -> None:
    config = OptimConfig(schedule="cosine", warmup_steps=4, final_fraction=0.1)
    # 12 steps after warm-up: a third of the way cos is 1/2, half way 0, two thirds -1/2.
    expected = [0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * 0.25, 0.1]
    assert fractions(config, 16, (8, 10, 12, 16)) == pytest.approx(expected, abs=1e-15)


def test_wsd_is_flat_and_then_falls_linearly_over_the_last_steps() -> None:
    config = OptimConfig(schedule="wsd", warmup_steps=2, decay_steps=4, final_fraction=0.2)
    assert fractions(config, 10, (1, 2, 3, 6)) == [0.5, 1.0, 1.0, 1.0]
    assert fractions(config, 10, (7, 8, 9, 10)) == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_schedules_without_warm_up_start_at_once() -> None:
    wsd = OptimConfig(schedule="wsd", warmup_steps=0, decay_steps=0)
    assert fractions(wsd, 3, (1, 2, 3)) == [1.0, 1.0, 1.0]
    cosine = OptimConfig(schedule="cosine", warmup_steps=0, final_fraction=0.0)
    assert fractions(cosine, 2, (1, 2)) == pytest.approx([0.5, 0.0])


def test_a_run_that_is_all_warm_up_or_all_decay_has_no_edge_to_fall_over() -> None:
    all_warm_up = OptimConfig(schedule="cosine", warmup_steps=3)
    assert fractions(all_warm_up, 3, (1, 2, 3)) == pytest.approx([1 / 3, 2 / 3, 1.0])
    all_decay = OptimConfig(schedule="wsd", warmup_steps=0, decay_steps=2, final_fraction=0.0)
    assert fractions(all_decay, 2, (1, 2)) == pytest.approx([0.5, 0.0])
    one_step = OptimConfig(schedule="cosine", warmup_steps=0, final_fraction=0.3)
    assert rate_fraction(one_step, 1, 1) == pytest.approx(0.3)


def test_gates_and_vectors_are_not_decayed_and_gates_have_a_rate_of_their_own() -> None:
    shape = ModelConfig(
        d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_head=8, qkv_bias=True, qk_norm=True
    )
    model = Transformer(shape, 10)
    named = dict(model.named_parameters())
    # Biases of queries, keys and values; norms of queries, of keys, before each part, and the last.
    assert sum(p.ndim == 1 for p in named.values()) == 2 * (3 + 2 + 2 + 1) + 1
    config = OptimConfig(lr=0.5, gate_lr=0.25, weight_decay=0.125)
    groups = parameter_groups(
        ((name, p, p.ndim) for name, p in named.items()), model.gates(), config
    )

    rates = {}
    for group in groups:
        for parameter in group["params"]:
            (name,) = (name for name, other in named.items() if other is parameter)
            rates[name] = (group["peak"], group["weight_decay"])
    assert rates.keys() == named.keys()
    # Of the paper: W_q, W_k, W_v, W_o; SwiGLU's three, one of which is called a gate; embedding.
    matrices = {name for name, p in named.items() if p.ndim == 2}
    assert len(matrices) == 2 * 7 + 1
    for name, found in rates.items():
        if name.endswith("attention.gate"):
            assert found == (0.25, 0.0)
        elif name in matrices:
            assert found == (0.5, 0.125)
        else:
            assert found == (0.5, 0.0)
    assert sum(found == (0.25, 0.0) for found in rates.values()) == 2


def test_groups_that_would_be_empty_are_left_out() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    (group,) = parameter_groups([("norm.weight", parameter, 1)], (), OptimConfig(lr=0.5))
    assert group == {
        "params": [parameter], "peak": 0.5, "weight_decay": 0.0, "lr": 0.0,
        "moments": ("exp_avg", "exp_avg_sq"),
    }  # fmt: skip
