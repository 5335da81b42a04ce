"""Plots: what is drawn, and that the files are images."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from data_prep.dataset import durable
from pretrain import plot
from pretrain.plot import PlotError


def test_a_run_gives_five_images_that_are_not_blank(tmp_path: Path) -> None:
    _write_run(tmp_path)
    paths = plot.plot(tmp_path)
    names = ["loss.png", "speed.png", "memory.png", "gates.png", "positions.png"]
    assert paths == [tmp_path / "plots" / name for name in names]
    for path in paths:
        image = imread(path)
        assert image.shape[0] >= 600 and image.shape[1] >= 1000
        assert 0.005 < np.mean(image[..., :3].min(axis=2) < 0.9) < 0.5
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(names)


def test_losses_and_rates_are_drawn_at_their_steps() -> None:
    train = [_train(step) for step in (10, 20, 30)]
    train[1]["loss"] = None
    figure = plot._loss(train, [{"step": 20, "loss": 2.5}])
    upper, lower = figure.axes
    assert _lines(upper.get_lines()) == {
        "training": [(10, 2.0), (20, None), (30, 2.0)],
        "validation": [(20, 2.5)],
    }
    assert _lines(lower.get_lines())["gates"] == [(10, 1e-2), (20, 2e-2), (30, 3e-2)]
    assert lower.get_xlabel() == "optimizer step" and "nats" in upper.get_ylabel()


def test_z_loss_and_the_loss_of_the_weights_average_are_drawn_where_there_are_any() -> None:
    train = [_train(10), _train(20, z_loss=0.125)]
    validation = [{"step": 10, "loss": 2.5}, {"step": 20, "loss": 2.25, "ema_loss": 2.0}]
    upper, middle, lower = plot._loss(train, validation).axes
    averaged = _lines(upper.get_lines())["validation, average of the weights"]
    assert averaged == [(10, None), (20, 2.0)]
    assert _lines(middle.get_lines()) == {"z-loss": [(10, None), (20, 0.125)]}
    assert lower.get_ylabel() == "learning rate (per step)"


def test_what_the_memory_reports_is_drawn_as_the_mean_of_its_layers() -> None:
    records = [_train(step, memory_norm=[1.0, step]) for step in (10, 20, 30)]
    records[1]["memory_norm"] = [1.0, None]
    records[2]["auxiliary_loss"] = 0.25
    figure = plot._memory(records)
    assert figure is not None
    norm, auxiliary = figure.axes
    assert (norm.get_title("left"), auxiliary.get_title("left")) == (
        "Memory norm",
        "Auxiliary loss",
    )
    assert _lines(norm.get_lines()) == {"memory_norm": [(10, 5.5), (20, None), (30, 15.5)]}
    assert _lines(auxiliary.get_lines()) == {"auxiliary_loss": [(10, None), (20, None), (30, 0.25)]}


def test_each_head_is_a_dot_in_its_layer_counted_from_1() -> None:
    figure = plot._gates(_train(10, gates=[[0.9, 0.1, 0.5], [], [0.2, 0.2, 0.7]]))
    assert figure is not None
    dots = [np.asarray(dots.get_offsets()) for dots in figure.axes[0].collections]
    heights = [sorted(layer[:, 1].tolist()) for layer in dots]
    assert heights == [[0.1, 0.5, 0.9], [], [0.2, 0.2, 0.7]]
    assert [np.round(layer[:, 0]).tolist() for layer in dots] == [[1] * 3, [], [3] * 3]
    heights = [bar.get_width() for bar in figure.axes[1].patches]
    assert sum(heights) == 6 and heights[4] == 2


def test_bits_by_position_and_what_memory_saves_are_drawn(tmp_path: Path) -> None:
    _write_evaluation(tmp_path / "eval-7-novels.json")
    figure = plot._positions(tmp_path)
    assert figure is not None
    upper, lower = figure.axes
    lines = _lines(upper.get_lines())
    # The bucket of EOS alone has no bits per byte.
    assert lines["with memory: 2.1000 over all"] == [(0, 3.0), (3, 2.0)]
    assert lines["memory read masked: 2.2000 over all"] == [(0, 3.0), (3, 2.5)]
    assert [bar.get_height() for bar in lower.patches] == [0, 0.5]
    assert [label.get_text() for label in lower.get_xticklabels()] == ["0", "4 to 7"]
    # The first segment, of 4 tokens, ends between the buckets of 2 to 3 and 4 to 7.
    assert lower.get_lines()[-1].get_xdata()[0] == 2.5


def test_the_newest_evaluation_is_of_the_highest_step(tmp_path: Path) -> None:
    assert plot.newest_evaluation(tmp_path) is None
    for number, name in enumerate(("eval-20-b", "eval-20-a", "eval-9-c", "eval-x-d")):
        path = tmp_path / f"{name}.json"
        _write_evaluation(path)
        path.write_text(path.read_text().replace('"novels"', f'"{name}"'))
        os.utime(path, (1000 + number, 1000 + number))
    newest = plot.newest_evaluation(tmp_path)
    assert newest is not None and newest["data"] == "eval-20-a"


def test_an_evaluation_that_cannot_be_read_costs_no_plot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write_run(tmp_path)
    for step, text in ((30, '{"total": {'), (31, "[]"), (32, '{"step": 32}')):
        (tmp_path / f"eval-{step}-novels.json").write_text(text)
    with caplog.at_level(logging.WARNING, logger="pretrain.plot"):
        assert len(plot.plot(tmp_path)) == 5
    reasons = ["it has no data, positions, segment, total"]
    reasons += ["it is no JSON object that can be read"] * 2
    assert [record.message.rpartition("/")[2] for record in caplog.records] == [
        f"eval-{step}-novels.json is passed over: {reason}; expected what `pretrain eval "
        "perplexity` writes"
        for step, reason in zip((32, 31, 30), reasons, strict=True)
    ]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["total"], {"bits_per_byte": {}}, "no bits_per_byte of memory, masked or none"),
        (["total", "bits_per_byte"], 2.1, "no bits_per_byte of memory, masked or none"),
        (["segment"], "4", "its segment is '4'"),
        (["positions"], {}, "no range of its positions has bytes"),
        (["positions"], [3], "positions[0] lacks first, end or bytes"),
        (["positions", 2, "end"], None, "positions[2] lacks first, end or bytes"),
        (["positions", 2, "bits_per_byte"], {"memory": 2.0}, "or its bits_per_byte of memory, m"),
    ],
)
def test_an_evaluation_by_another_hand_is_drawn_or_passed_over_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, path: list[Any], value: Any, said: str
) -> None:
    _write_evaluation(tmp_path / "eval-7-novels.json")
    report = json.loads((tmp_path / "eval-7-novels.json").read_text())
    assert plot._fault(report) == ""
    del report["total"]["nats"], report["positions"][1]["bits_per_byte"]
    (tmp_path / "eval-8-novels.json").write_text(json.dumps(report))
    assert plot.newest_evaluation(tmp_path) == report and plot._positions(tmp_path)
    part = report
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (tmp_path / "eval-8-novels.json").write_text(json.dumps(report))
    with caplog.at_level(logging.WARNING, logger="pretrain.plot"):
        newest = plot.newest_evaluation(tmp_path)
    assert newest is not None and "nats" in newest["total"]
    assert said in caplog.text and "eval-8-novels.json is passed over" in caplog.text


def test_a_record_without_all_of_its_numbers_costs_no_plot(tmp_path: Path) -> None:
    _write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 98, "loss": "2.0", "memory_norm": [null, "x"]}\n')
        file.write('{"kind": "train", "step": 99, "gates": [[null, 0.5], null]}\n')
    assert {path.name for path in plot.plot(tmp_path)} >= {"loss.png", "speed.png"}


def test_what_there_is_nothing_of_is_skipped_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = _train(10, gates=[])
    del without["memory_norm"]
    _write_records(tmp_path, [without])
    with caplog.at_level(logging.WARNING, logger="pretrain.plot"):
        paths = plot.plot(tmp_path)
    assert [path.name for path in paths] == ["loss.png", "speed.png"]
    assert "gates.png is skipped" in caplog.text and "memory.png is skipped" in caplog.text
    assert "pretrain eval" in caplog.text


def test_a_model_without_memory_has_one_curve(tmp_path: Path) -> None:
    _write_evaluation(tmp_path / "eval-7-novels.json", columns=("none",))
    figure = plot._positions(tmp_path)
    assert figure is not None
    (axes,) = figure.axes
    assert list(_lines(axes.get_lines())) == ["model without memory: 2.1000 over all"]


def test_a_run_without_training_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlotError, match=r"no training record in metrics\.jsonl"):
        plot.plot(tmp_path)
    _write_records(tmp_path, [{"kind": "validation", "step": 1, "loss": 2.0}])
    with pytest.raises(PlotError, match="no training record"):
        plot.plot(tmp_path)


def test_a_directory_that_takes_no_plots_is_one_sentence(tmp_path: Path) -> None:
    _write_run(tmp_path)
    (tmp_path / "plots").touch()
    with pytest.raises(PlotError, match="plots is a file; give a directory"):
        plot.plot(tmp_path)


def _write_run(directory: Path) -> None:
    records = [_train(step) for step in range(10, 300, 10)]
    _write_records(directory, [*records, {"kind": "validation", "step": 100, "loss": 2.5}])
    _write_evaluation(directory / "eval-7-novels.json")


def _write_records(directory: Path, records: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines)


def _train(step: int, **given: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "loss": 2.0,
        "lr": 1e-4 * step,
        "gate_lr": 1e-3 * step,
        "tokens_per_second": 1000.0 + step,
        "gates": [[0.1, 0.9], [0.5, 0.6]],
        "memory_norm": [3.0, 4.0],
        **given,
    }


def _write_evaluation(path: Path, columns: tuple[str, ...] = ("memory", "masked")) -> None:
    def row(first: int, end: int, bits: tuple[float | None, ...]) -> dict[str, Any]:
        by_column = dict(zip(columns, bits, strict=False))
        size = 0 if bits[0] is None else 3
        return {"first": first, "end": end, "bytes": size, "bits_per_byte": by_column}

    report = {
        "step": 7,
        "data": "novels",
        "segment": 4,
        "total": {
            "nats": dict.fromkeys(columns, 1.0),
            "bits_per_byte": dict(zip(columns, (2.1, 2.2), strict=False)),
        },
        "positions": [row(0, 1, (3.0, 3.0)), row(1, 2, (None, None)), row(4, 8, (2.0, 2.5))],
    }
    durable.write_json(path, report)  # as `pretrain eval perplexity` writes it


def _lines(lines: Any) -> dict[str, list[tuple[float, float | None]]]:
    """Points of the labelled lines; None for a gap."""
    return {
        line.get_label(): [
            (x, None if np.isnan(y) else y) for x, y in zip(*line.get_data(), strict=True)
        ]
        for line in lines
        if not line.get_label().startswith("_")
    }
