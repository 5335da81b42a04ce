"""What is recorded of a step: every number, from a state whose numbers are known."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from pretrain import plot
from pretrain.checkpoint.ranks import Ranks, SoloRanks
from pretrain.data.lanes import LanePlace, SourcePlace
from pretrain.model import flops
from pretrain.model.memories.infini import MemoryState
from pretrain.training.metrics import read_records
from pretrain.training.records import Records
from pretrain.training.reporter import Reporter, peak_flops
from pretrain.training.run import Run
from pretrain.training.run_state import RunState
from pretrain.training.step import StepResult
from pretrain.training.validator import Validation
from tests.pretrain import kinds

T = TypeVar("T")
KEYS = ["kind", "step", "loss", "grad_norm", "lr", "gate_lr", "tokens_per_second", "mfu",
        "data_wait", "eta_seconds", "seconds_per_step", "memory_bytes", "tokens", "epochs",
        "skipped", "spikes", "gates", "memory_norm", "stragglers"]  # fmt: skip


class TwoRanks:
    """Rank 0 of two whose other one has the same numbers, but is slow."""

    rank, size = 0, 2

    def gather(self, value: T) -> list[T]:
        if isinstance(value, list):  # seconds a product, of data wait, of the interval
            return [value, [4.0 * value[0], *value[1:]]]  # type: ignore[list-item]
        return [value, "n7"]  # type: ignore[list-item]

    def sum(self, values: Sequence[float]) -> list[float]:
        return [2 * value for value in values]


def known_state(run: RunState) -> RunState:
    """Step 14: each lane has read so many documents, and its M is as large, as its number + 1."""
    sizes = torch.arange(1.0, 5.0)
    memory = tuple(
        MemoryState(
            torch.ones(4, 2, 8, 8) * sizes.view(4, 1, 1, 1) * (layer + 1), torch.ones(4, 2, 8)
        )
        for layer in range(2)
    )
    places = [
        LanePlace(0, 5, (SourcePlace(read=lane + 1), SourcePlace(read=10 * lane)))
        for lane in range(4)
    ]
    return replace(run, step=14, tokens=1792, skipped=3, places=places, memory=memory)


@pytest.fixture
def run(open_run: Any, data_sets: dict[str, Path]) -> Run:
    mix = f"[{{data: {data_sets['train']}, weight: 3}}, {{data: {data_sets['other']}}}]"
    opened: Run = open_run(f"data.mix={mix}", "model.memory.initial_gate=1.0")
    return opened


def reporter(run: Run, records: Records | None, ranks: Ranks | None = None) -> Reporter:
    return Reporter(
        run.config, run.data, run.engine, run.share, ranks or SoloRanks(), records, step=10
    )


RESULT = StepResult(2.5, applied=False, grad_norm=math.inf)


def test_a_record_has_every_number_of_its_step(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    records = Records(run.attempt, 1, run.config, run.data, 10)
    made = reporter(run, records)
    made.meter.since = time.perf_counter() - 80.0
    made.meter.data_wait = 20.0
    for _ in range(4):
        made.meter.add(128, forward_only=False, preface=0, scored=128)
    with caplog.at_level(logging.INFO, "pretrain.training.reporter"):
        made.report(known_state(run.state), RESULT)
    (record,) = read_records(run.attempt.directory / "metrics.jsonl")
    assert list(record) == KEYS
    # 9 of the 19 steps after warm-up: cosine from 1 to final_fraction = 0.1.
    rate = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 9 / 19))
    assert record["lr"] == pytest.approx(0.01 * rate)
    assert record["gate_lr"] == pytest.approx(run.config.optim.gate_lr * rate)
    assert (record["kind"], record["step"], record["loss"]) == ("train", 14, 2.5)
    assert (record["grad_norm"], record["skipped"], record["tokens"]) == (None, 3, 1792)
    assert record["gates"] == [[pytest.approx(1 / (1 + math.exp(-1.0)))] * 4] * 2
    # 2 heads of 8 x 8 of the size s: a Frobenius norm of s sqrt(128).
    squares = [128 * sum((s * layer) ** 2 for s in (1, 2, 3, 4)) / 4 for layer in (1, 2)]
    assert record["memory_norm"] == pytest.approx([math.sqrt(square) for square in squares])
    assert record["epochs"] == {"train": 10 / 40, "other": 60 / 40}
    assert record["tokens_per_second"] == pytest.approx(512 / 80, rel=0.05)
    assert record["seconds_per_step"] == pytest.approx(20.0, rel=0.05)
    assert record["eta_seconds"] == pytest.approx(200.0, rel=0.05)
    assert record["data_wait"] == pytest.approx(0.25, rel=0.05)
    assert record["mfu"] is None and record["stragglers"] == {}
    assert record["memory_bytes"] > 10_000_000
    assert "step 14/24 | loss 2.5000 |" in caplog.text and "| skipped 3" in caplog.text
    records.close()


def test_a_step_without_any_weighted_target_has_no_loss_that_could_be_taken_for_one(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(run.attempt, 1, run.config, run.data, 10)
    made = reporter(run, records)
    result = StepResult(0.0, applied=True, grad_norm=0.0, forward_only=True)
    with caplog.at_level(logging.INFO, "pretrain.training.reporter"):
        made.report(known_state(run.state), result)
        made.report_validation(14, Validation(0.0, 0.0, 0.5))
    records.close()
    record, validation = read_records(run.attempt.directory / "metrics.jsonl")
    assert validation == {"kind": "validation", "step": 14}
    assert list(record) == [key for key in KEYS if key not in ("loss", "grad_norm")]
    assert "step 14/24 | no target has a weight | lr " in caplog.text
    assert "step 14 | validation: no token of its windows has a weight in the loss" in caplog.text
    assert "perplexity" not in caplog.text
    assert (run.attempt.directory / "plots" / "loss.png") in plot.plot(run.attempt.directory)


@kinds.of_every_kind
def test_the_numbers_of_every_memory_are_recorded_by_layer_logged_and_plotted(
    open_run: Any, take_steps: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(*kinds.words(kind))
    take_steps(run, 1)
    records = Records(run.attempt, 1, run.config, run.data, 0)
    made = reporter(run, records)
    made.meter.add(128, forward_only=False, preface=0, scored=128)
    with caplog.at_level(logging.INFO, "pretrain.training.reporter"):
        made.report(run.state, RESULT)
    records.close()
    (record,) = read_records(run.attempt.directory / "metrics.jsonl")
    sums = run.engine.module.metrics(run.state.memory)
    assert bool(sums) == (kind in kinds.REMEMBERING)
    for name, layers in sums.items():
        means = [value / 4 for value in layers]
        squares = name.endswith("_norm")
        assert record[name] == pytest.approx([math.sqrt(x) for x in means] if squares else means)
        assert all(value > 0 for value in record[name])
        assert f"| {name.replace('_', ' ')} " in caplog.text
    assert bool(record["gates"]) == bool(run.engine.module.gates())
    drawn = {path.name for path in plot.plot(run.attempt.directory)}
    by_name = {"memory.png": bool(sums), "gates.png": bool(record["gates"])}
    assert drawn == {"loss.png", "speed.png"} | {name for name, some in by_name.items() if some}
    of_layers = [len(gates) for gates in record["gates"]]
    heads = run.config.model.n_heads
    assert kind != "memorizing" or of_layers == [heads, *[0] * (run.config.model.n_layers - 1)]


def test_rates_are_those_since_the_last_report(run: Run) -> None:
    records = Records(run.attempt, 1, run.config, run.data, 10)
    made = reporter(run, records)
    state = known_state(run.state)
    for step in (14, 24):
        made.meter.since = time.perf_counter() - 80.0
        made.report(replace(state, step=step), RESULT)
    first, second = read_records(run.attempt.directory / "metrics.jsonl")
    assert first["seconds_per_step"] == pytest.approx(80 / 4, rel=0.05)
    assert second["seconds_per_step"] == pytest.approx(80 / 10, rel=0.05)
    assert second["eta_seconds"] == 0.0
    records.close()


def test_sums_are_over_all_lanes_and_a_straggler_is_named_with_its_host(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(run.attempt, 1, run.config, run.data, 10)
    made, state = reporter(run, records, TwoRanks()), known_state(run.state)
    alone = reporter(run, None)
    assert made.epochs(state) == {name: 2 * n for name, n in alone.epochs(state).items()}
    norms = [math.sqrt(2) * norm for norm in alone.memory_metrics(state.memory)["memory_norm"]]
    assert made.memory_metrics(state.memory) == {"memory_norm": pytest.approx(norms)}
    for step in (15, 16):  # slow twice in a row
        made.report(replace(state, step=step), RESULT)
    first, second = read_records(run.attempt.directory / "metrics.jsonl")
    assert first["stragglers"] == {}
    assert second["stragglers"] == {"compute/1": 4.0}
    assert "straggler: rank 1 (n7) computes 4.0 times slower than others" in caplog.text
    records.close()


def test_a_rank_that_shares_lanes_with_one_before_it_counts_none(run: Run) -> None:
    share = replace(run.share, tokens=slice(16, 32))
    made = Reporter(run.config, run.data, run.engine, share, SoloRanks(), None, step=0)
    state = known_state(run.state)
    assert made.epochs(state) == {"train": 0.0, "other": 0.0}
    assert made.memory_metrics(state.memory) == {"memory_norm": [0.0, 0.0]}


def test_only_the_rank_with_records_reports(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    made = reporter(run, None)
    with caplog.at_level(logging.INFO, "pretrain"):
        made.report(known_state(run.state), RESULT)
        made.report_validation(14, Validation(1.5, 200.0, 0.5))
        made.report_spike(14, "loss 9 above 4")
    assert caplog.text == ""
    assert not (run.attempt.directory / "metrics.jsonl").exists()


def test_the_peak_is_that_of_all_ranks_devices() -> None:
    one = flops.peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16)
    assert one is not None and one > 9e14
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16", 3) == 3 * one
    assert peak_flops("cpu", "bf16", 3) is None


def test_a_validation_is_recorded_and_logged_with_its_perplexity(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(run.attempt, 1, run.config, run.data, 10)
    with caplog.at_level(logging.INFO, "pretrain.training.reporter"):
        reporter(run, records).report_validation(14, Validation(1.5, 200.0, 0.5))
        reporter(run, records).report_validation(15, Validation(9999.0, 200.0, 0.5))
    text = (run.attempt.directory / "metrics.jsonl").read_text().splitlines()
    assert json.loads(text[0]) == {"kind": "validation", "step": 14, "loss": 1.5}
    assert "step 14 | validation loss 1.5000 | perplexity 4.48 | 200 tokens in 0.5 s" in caplog.text
    assert "step 15 | validation loss 9999.0000" in caplog.text
    records.close()


def test_a_validation_of_the_average_stands_beside_that_of_the_weights(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(run.attempt, 1, run.config, run.data, 10)
    with caplog.at_level(logging.INFO, "pretrain.training.reporter"):
        reporter(run, records).report_validation(
            14, Validation(1.5, 200.0, 0.5), Validation(1.25, 200.0, 0.25)
        )
    (record,) = read_records(run.attempt.directory / "metrics.jsonl")
    assert record == {"kind": "validation", "step": 14, "loss": 1.5, "ema_loss": 1.25}
    assert (
        "step 14 | validation loss 1.5000, 1.2500 of the weights' average | perplexity 4.48 | "
        "200 tokens in 0.8 s" in caplog.text
    )
    records.close()


def test_a_spike_and_the_z_loss_are_recorded_and_logged(
    open_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run("train.spikes.deviations=6")
    records = Records(run.attempt, 1, run.config, run.data, 10)
    made = reporter(run, records)
    result = StepResult(9.0, applied=False, grad_norm=0.5, z_loss=0.0025, spike="loss 9 above 4")
    with caplog.at_level(logging.INFO, "pretrain.training.reporter"):
        made.report_spike(14, result.spike)
        made.meter.add(128, forward_only=False, preface=0, scored=128)
        places = [LanePlace(0, 5, (SourcePlace(read=1),))] * 4
        made.report(replace(known_state(run.state), places=places, spikes=2), result)
    (record,) = read_records(run.attempt.directory / "metrics.jsonl")
    assert (record["skipped"], record["spikes"]) == (3, 2)
    assert (record["loss"], record["grad_norm"], record["z_loss"]) == (9.0, 0.5, 0.0025)
    assert (
        "step 14 was skipped: loss 9 above 4, the mean of the last 128 applied steps and 6 "
        "standard deviations" in caplog.text
    )
    assert "| z-loss 0.0025 |" in caplog.text and "| skipped 3, of them spikes 2" in caplog.text
    records.close()
