"""The report on runs: what it shows of any run, in a browser too, and what it never shows."""

from __future__ import annotations

import html
import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli.main import main
from pretrain.report import figures, page
from tests.browser import browse, probed
from tests.pretrain.report.directories import CONFIGURATION, train, written

NOW = datetime(2026, 11, 2, 12, tzinfo=UTC)
EVIL = "<script>document.title='owned'</script>"
# Run in the browser after the page is there: what was drawn, loaded and laid over each other.
PROBE = """
  const box = node => node.getBoundingClientRect();
  const texts = [...document.querySelectorAll(".plot text")];
  const overlap = (one, other) => {
    const a = box(one), b = box(other);
    return a.left < b.right && b.left < a.right && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  };
  const inside = line => {
    const a = box(line), b = box(line.closest(".plot"));
    return a.left >= b.left - 3 && a.right <= b.right + 3
      && a.top >= b.top - 3 && a.bottom <= b.bottom + 3;
  };
  return {
    plots: [...document.querySelectorAll(".plot")].map(node => [box(node).width, box(node).height]),
    titles: [...document.querySelectorAll("figcaption")].map(node => node.textContent),
    labelled: [...document.querySelectorAll(".plot")]
      .every(node => node.getAttribute("aria-label")),
    lines: [...document.querySelectorAll(".line")].filter(line => line.getAttribute("d")).length,
    outside: [...document.querySelectorAll(".line")]
      .filter(line => line.getAttribute("d") && !inside(line)).length,
    colours: [...document.querySelectorAll(".line, .swatch path")]
      .map(node => getComputedStyle(node).stroke),
    overlaps: texts.flatMap((a, n) => texts.slice(n + 1)
      .filter(b => a.closest(".plot") === b.closest(".plot") && overlap(a, b))
      .map(b => [a.textContent, b.textContent])),
    targets: [...document.querySelectorAll("nav a")]
      .map(node => document.querySelector(node.getAttribute("href"))?.tagName),
    scripts: document.querySelectorAll("body script").length,
    requests: performance.getEntriesByType("resource").map(entry => entry.name),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with everything: faults, validations, evaluations, metrics that nobody knows."""
    records: list[dict[str, Any]] = [
        train(step, z_loss=1e-4 * step, spikes=step // 20, noise=0.1, drift={"up": step // 20})
        for step in range(1, 31)
    ]
    records[11] |= {"loss": None, "grad_norm": None}
    records += [{"kind": "validation", "step": step, "loss": 5.0 - step / 10} for step in (10, 20)]
    records += [{"kind": "checkpoint", "step": 20, "seconds": 0.1, "stall": 0.02}]
    records += [{"kind": "evaluation", "step": 20, "passkey": {"4k": 0.5, "32k": 0.25}}]
    train_set = json.dumps(f"s3://me:hunter2@{EVIL}/x")
    configuration = CONFIGURATION + f"data: {{train: {train_set}}}\n"
    end = {"attempt": 2, "code": 1, "why": f"the disk is full {EVIL}", "step": 20}
    directory = written(tmp_path / "run & a", records, configuration=configuration, end=end)
    rows = [
        {"task": "passkey", "length": 4096 * 8**n, "depth": depth, "token_accuracy": 0.9 - 0.4 * n}
        for n in (0, 1)
        for depth in (0.0, 1.0)
    ]
    (directory / "passkey-20.json").write_text(json.dumps({"step": 20, "rows": rows}))
    return directory


def section(shown: str, name: str) -> str:
    return shown.partition(f'<section id="{name}">')[2].partition("</section>")[0]


def titles(shown: str) -> list[str]:
    return re.findall("<figcaption>(.*?)</figcaption>", shown)


def rows(shown: str) -> list[list[str]]:
    """The cells of all rows of tables, without markup."""
    found = re.findall(r"<tr>(.*?)</tr>", shown, re.DOTALL)
    cells = [re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL) for row in found]
    return [[html.unescape(re.sub("<[^>]*>", "", cell)).strip() for cell in row] for row in cells]


def test_one_run_shows_all_that_it_recorded(run: Path) -> None:
    shown = page.page([run], NOW)
    assert titles(section(shown, "losses")) == ["Loss", "z-loss"]
    assert titles(section(shown, "optimization")) == [
        *("Learning rates", "Gradient norm", "Spikes")
    ]
    memory = section(shown, "gates-and-memory")
    assert titles(memory) == ["Gates", "Memory norm", "Gates of all heads by layer"]
    assert titles(section(shown, "speed-and-waits")) == [
        *("Tokens per second", "Seconds per step", "Waiting for data", "Peak memory"),
        *("Seconds to write a checkpoint", "Stalls by checkpoints"),
    ]
    # What no version of this page knows shows by itself.
    assert titles(section(shown, "other-metrics")) == ["Noise", "Drift", "Evaluation: passkey"]
    assert titles(section(shown, "recall-and-evaluations")) == ["Recall by distance: passkey"]
    losses = rows(section(shown, "losses"))
    assert losses[1:] == [
        ["training", "0.2667", "0.2667 @ 30", "8 @ 1", "1"],
        ["validation", "3", "3 @ 20", "4 @ 10", "0"],
        ["Curve", "Last", "Least @", "Greatest @"],
        ["run & a", "0.003", "0.0001 @ 1", "0.003 @ 30"],
    ]
    assert ["layer 2", "0.3", "0.3 @ 1", "0.3 @ 1"] in rows(memory)
    recall = rows(section(shown, "recall-and-evaluations"))
    assert recall[1] == ["passkey", "0.5", "0.5 @ 32,768", "0.9 @ 4,096"]
    assert recall[-1] == [run.name, "passkey-20.json", "20", "tokens right: 70.0%"]
    assert shown == page.page([run], NOW)


def test_attempts_and_faults_are_told_in_order(run: Path) -> None:
    life = section(page.page([run], NOW), "attempts-and-faults")
    assert titles(life) == ["Steps over time", "Steps of the attempts"]
    # 17 h 30 s pass between the first and the last line; step 30 was reached, and 20 done again.
    assert "hours since the run" in life and "step 0 to 30" in life and "step 20 to 30" in life
    _, *attempts = (row for row in rows(life) if len(row) == 6)
    assert [row[0] for row in attempts] == ["2", "1"]
    assert [row[4:] for row in attempts] == [["20", "30"], ["0", "30"]]
    assert attempts[0][3] == f"the disk is full {EVIL}" and attempts[1][3].startswith("rank 1 fail")
    kinds = [row[1] for row in rows(life) if len(row) == 5 and row[0].startswith("2026")]
    assert kinds == ["Resumed", "Checkpoint passed over", "Fault", "Straggler"]


def test_nothing_of_a_run_is_markup_and_no_credential_is_shown(run: Path) -> None:
    shown = page.page([run, shutil.copytree(run, run.with_name(EVIL.replace("/", "")))], NOW)
    assert "<script" not in shown and "<b>lost" not in shown and "hunter2" not in shown
    assert "&lt;script&gt;" in shown and "[hidden]@" in shown
    assert "default-src 'none'" in shown
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", shown)


def test_runs_side_by_side_share_charts_and_show_what_differs(run: Path, tmp_path: Path) -> None:
    configuration = CONFIGURATION.replace("0.001", "0.01")
    other = written(
        tmp_path / "b", [train(step, tokens=step * 8192) for step in (5, 40)], log="",
        configuration=configuration + "zero: {stage: 2}\n",
    )  # fmt: skip
    shown = page.page([run, other], NOW)
    assert titles(section(shown, "losses")) == [
        *("Training loss", "Validation loss", "z-loss", "Training loss by tokens")
    ]
    assert [row[0] for row in rows(section(shown, "losses"))][1:3] == [run.name, "b"]
    assert titles(section(shown, "gates-and-memory"))[:3] == [
        *("Gates, mean of the layers", f"Gates \u00b7 {run.name}".replace("&", "&amp;")),
        "Gates \u00b7 b",
    ]
    differences = [row[:1] + row[2:] for row in rows(section(shown, "configuration"))]
    assert differences == [
        *(["Setting", "b"], ["optim.lr", "0.01"], ["data.train", "\u2013"], ["zero.stage", "2"]),
    ]
    header = rows(shown.partition("<nav>")[0])
    assert [row[:3] for row in header[1:]] == [
        [run.name, "failed", "30 of 100"], ["b", "no end recorded", "40 of 100"],
    ]  # fmt: skip


def test_one_run_shows_what_differs_from_the_defaults(tmp_path: Path) -> None:
    shown = page.page([written(tmp_path / "a", configuration="optim: {warmup_steps: 7}\n")], NOW)
    assert ["optim.warmup_steps", "7"] in [row[:2] for row in rows(shown)]
    own = page.page([written(tmp_path / "b", configuration="zero: {stage: 3}\n")], NOW)
    assert "zero.stage" not in [row[0] for row in rows(own) if row]


def test_gates_that_are_not_finite_and_losses_that_are_no_number_cost_no_page(
    tmp_path: Path,
) -> None:
    records = [
        train(1, gates=[[None], [0.5]]),
        {"kind": "validation", "step": 1, "loss": [2.0, 3.0]},
    ]
    shown = page.page([written(tmp_path / "a", records)], NOW)
    assert "Gates of all heads by layer" in shown
    assert "<figcaption>Training loss" in shown and "<figcaption>Validation loss" in shown


def test_runs_without_a_record_are_shown_as_such(tmp_path: Path) -> None:
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    for directories in ([tmp_path / "empty"], [tmp_path / "empty", written(tmp_path / "never")]):
        shown = page.page(directories, NOW)
        assert "No run here has recorded a step yet" in shown
        assert "nothing logged yet" in shown and "never started" in shown
    assert "no end recorded" in shown


def test_a_long_run_makes_no_larger_page_and_keeps_its_extremes(tmp_path: Path) -> None:
    sizes = []
    for name, count in (("short", 2_000), ("long", 20_000)):
        noise = [((step * 7919) % 1009) / 1009 for step in range(count)]
        records = [
            {"kind": "train", "step": n + 1, "loss": 5 + noise[n], "norms": [noise[n], noise[-n]]}
            for n in range(count)
        ]
        records[count // 3]["loss"] = 99.0
        log = "".join(
            f"07:{n // 60 % 60:02}:{n % 60:02} straggler: rank {n} is slow\n" for n in range(count)
        )
        shown = page.page([written(tmp_path / name, records, log=log)], NOW)
        assert f"99 @ {count // 3 + 1:,}" in shown and f"of {count:,}; log.txt has all" in shown
        sizes.append(len(shown))
    assert sizes[1] < 1.1 * sizes[0] < 300_000


def test_runs_of_one_name_are_told_apart_and_colours_by_dashes(tmp_path: Path) -> None:
    directories = [written(tmp_path / name / "run", [train(1)]) for name in ("a", "b")]
    shown = page.page(directories, NOW)
    assert {"a/run", "b/run"} <= {row[0] for row in rows(section(shown, "losses"))}
    styles = figures.styles([str(n) for n in range(figures.MOST_RUNS)])
    assert len({(style.colour, style.dash) for style in styles}) == figures.MOST_RUNS


def ran(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["report", *arguments])
    return int(str(ended.value.code))


def test_the_command_writes_one_file_and_says_where(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = written(tmp_path / "b", [train(1)])
    wanted = [
        ([str(run)], run / "report.html"),
        ([str(run), "b"], Path("report.html")),
        ([str(run), "--out", "pages/of_one.html"], Path("pages/of_one.html")),
    ]
    for arguments, path in wanted:
        assert ran(*arguments) == 0
        assert capsys.readouterr().out == f"{path}\n"
        assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert {path.name for path in other.iterdir()} == {
        *("attempts", "checkpoints", "config.yaml", "log.txt", "metrics.jsonl")
    }


def test_all_mistakes_are_one_message(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain").mkdir()
    words = [str(tmp_path / "none"), str(tmp_path / "plain"), str(run), str(run)]
    assert ran(*words, "--out", str(tmp_path)) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "pretrain report: this command cannot run:" and len(said) == 5
    for line, part in zip(
        said[1:],
        ("none: there is no such", "plain: is neither a run", "is given twice", "is a directory"),
        strict=True,
    ):
        assert part in line
    (run / "checkpoints/step-00000020").mkdir(parents=True, exist_ok=True)
    (tmp_path / "link").symlink_to(run)
    again = [str(run / "checkpoints/step-00000020"), str(tmp_path / "link")]
    assert ran(str(run), *again, "--out", str(tmp_path / "p.html")) == 2
    assert capsys.readouterr().err.count(f"is of the same run as {run}; leave one") == 2
    many = [str(written(tmp_path / str(n))) for n in range(figures.MOST_RUNS + 1)]
    assert ran(*many, "--out", str(tmp_path / "p.html")) == 2
    assert f"expected at most {figures.MOST_RUNS}" in capsys.readouterr().err


@pytest.mark.parametrize(("width", "others"), [(1200, 3), (500, 0)])
def test_a_browser_draws_every_chart_within_its_frame_and_runs_nothing(
    run: Path, tmp_path: Path, width: int, others: int
) -> None:
    directories = [run]
    for name in range(others):
        made = [train(step, loss=(2.0 + name) / step) for step in range(1, 90)]
        directories.append(written(tmp_path / f"other {name}", made))
    path = tmp_path / "page.html"
    page.write(directories, path)
    plain = path.read_text(encoding="utf-8")
    probe, dom, logged = probed(path, PROBE, width)
    assert len(probe["plots"]) == plain.count('class="plot"') > 12
    assert all(across > 200 and high > 100 for across, high in probe["plots"])
    assert {"Gradient norm", "Steps over time", "z-loss"} <= set(probe["titles"])
    assert probe["labelled"] and probe["lines"] > 20 and probe["outside"] == 0
    # A colour that the style does not define would not be drawn.
    assert not {"none", "rgb(0, 0, 0)"} & set(probe["colours"])
    assert probe["overlaps"] == [] and set(probe["targets"]) == {"SECTION"}
    assert (probe["scripts"], probe["wide"]) == (0, 0)
    assert all(name.startswith("data:") for name in probe["requests"])
    assert "CONSOLE" not in logged and "owned" not in re.findall("<title>(.*?)</title>", dom)[0]
    path.write_text(plain, encoding="utf-8")
    assert "CONSOLE" not in browse(path, width)[1]
