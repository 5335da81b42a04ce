"""Charts of evaluations: bits per byte of every kind of model, results of one step told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.evaluate import perplexity
from pretrain.report import evaluations
from pretrain.report.evaluations import figures
from pretrain.report.figures import styles
from pretrain.report.runs import Run, read
from tests.pretrain.report.directories import train, written


def run_with(directory: Path, **results: dict[str, float]) -> Run:
    """A run with these results of step 20, bits per byte by column of the evaluation."""
    written(directory, [train(20)])
    for name, bits in results.items():
        positions = [{"end": end, "bytes": 9, "bits_per_byte": bits} for end in (64, 128)]
        report: dict[str, Any] = {"step": 20, "data": "novels", "positions": positions}
        report["total"] = {"bits_per_byte": bits}
        path = directory / f"eval-20-{name.replace('_', '-')}.json"
        path.write_text(json.dumps(report))
    return read(directory)


def curves(*runs: Run) -> list[tuple[str, str, str]]:
    """The (name, colour, dash) of every curve of bits per byte by position."""
    (figure,) = figures(runs, styles([run.directory.name for run in runs]))
    assert figure.title == "Bits per byte by position: novels"
    return [(one.name, one.colour, one.dash) for one in figure.chart.strokes]


def test_the_columns_are_those_that_an_evaluation_writes() -> None:
    assert set(evaluations._COLUMNS) == {
        perplexity.MEMORY,
        perplexity.MASKED,
        perplexity.NO_MEMORY,
    }


def test_a_model_without_memory_is_in_the_chart_and_in_the_table(tmp_path: Path) -> None:
    run = run_with(tmp_path / "plain", data={"none": 2.5})
    assert [name for name, *_ in curves(run)] == ["model without memory"]
    ((_, file, step, found),) = evaluations.table([run], styles(["plain"]))
    assert (file, step) == ("eval-20-data.json", 20) and "2.5" in found


def test_a_range_of_positions_without_an_end_is_left_out_of_the_chart(tmp_path: Path) -> None:
    run = run_with(tmp_path / "plain", data={"none": 2.5})
    for row, end in zip(run.results[0].report["positions"], ("64", 128), strict=True):
        row["end"] = end
    (figure,) = figures([run], styles(["plain"]))
    assert [name for _, name in figure.chart.x_ticks] == ["128"]


def test_two_results_of_a_step_have_names_and_lines_of_their_own(tmp_path: Path) -> None:
    both = {"memory": 2.0, "masked": 2.25}
    one = run_with(tmp_path / "a", data=both, data_2={"memory": 1.75, "masked": 2.0})
    other = run_with(tmp_path / "b", data=both)
    alone = curves(one)
    assert [name for name, *_ in alone] == [
        "with memory (eval-20-data-2.json)",
        "memory read masked (eval-20-data-2.json)",
        "with memory (eval-20-data.json)",
        "memory read masked (eval-20-data.json)",
    ]
    assert len({line[1:] for line in alone}) == 4
    side_by_side = curves(one, other)
    assert [name for name, *_ in side_by_side][-2:] == ["b, with memory", "b, memory read masked"]
    assert len({line[1:] for line in side_by_side}) == 4 + 2


def test_the_table_has_a_figure_of_every_kind_of_evaluation_and_says_which_weights(
    tmp_path: Path,
) -> None:
    rouge = {"overall": {"value": 12.5, "interval": [10.0, 15.0]}}
    metrics = {"alias": "one", "acc,none": 0.25, "acc_stderr,none": 0.125, "samples": 8}
    results: dict[str, dict[str, Any]] = {
        "mqar-20": {"rows": [{"pairs": 4, "accuracy": 0.75}, {"pairs": 8, "accuracy": 0.25}]},
        "summaries-20-books": {"rows": [{"share": 1.0, "rouge": rouge}, {"share": 0.5}]},
        "summaries-20-half": {"rows": [{"share": 0.5, "rouge": rouge}]},
        "harness-20": {"results": {"one": metrics, "two": {"f1,none": 0.5}, "group": {}}},
        "harness-20-2": {"results": {f"t{n}": {"acc,none": 1.0} for n in range(8)}},
        "eval-20-ema": {"total": {"bits_per_byte": {"memory": 2.0}}, "weights": "ema"},
        "other-20": {"rows": [[], {"rouge": 1, "share": None, "accuracy": "x"}], "results": [1]},
    }
    written(tmp_path / "run", [train(20)])
    for name, report in results.items():
        (tmp_path / "run" / f"{name}.json").write_text(json.dumps(report))
    table = evaluations.table([read(tmp_path / "run")], styles(["run"]))
    assert {file: found for _, file, _, found in table} == {
        "mqar-20.json": "values right: 50.0%",
        "summaries-20-books.json": "Rouge, overall: 12.5",
        "summaries-20-half.json": "Rouge, overall: 12.5 at 50% read",
        "harness-20.json": "one acc 0.25, two f1 0.5",
        "harness-20-2.json": f"{', '.join(f't{n} acc 1' for n in range(6))}, and 2 more",
        "eval-20-ema.json": "bits per byte: 2 with memory (weights ema)",
        "other-20.json": "\N{EN DASH}",
    }
