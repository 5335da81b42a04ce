"""The page of a data set shows its figures in a browser and runs nothing that the data hold."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from data_prep import charts, cli, config, page, pipeline, report, shards
from data_prep.accounts import ACCOUNTS
from data_prep.report import Sample
from data_prep.shards import DataError
from tests import programs

CHROMIUM = programs.find("chromium", "chromium-browser")
EVIL = "<script>document.title='owned'</script>"
SOURCE = "a & <b>bold</b> $x_1$"
TEXT = "the segment reads the memory and then the segment writes the memory. "
# Run in the browser after the page is there: what was drawn, loaded and logged.
PROBE = """<script>addEventListener("load", () => {
  const size = node => { const r = node.getBoundingClientRect(); return [r.width, r.height]; };
  document.documentElement.setAttribute("data-probe", JSON.stringify({
    charts: [...document.querySelectorAll("svg")].map(size),
    texts: [...document.querySelectorAll("svg text")].map(node => node.textContent),
    scripts: document.querySelectorAll("body script").length,
    bold: [...document.querySelectorAll("bdi *")].length,
    requests: performance.getEntriesByType("resource").map(entry => entry.name),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  }));
})</script>"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    lines = [json.dumps({"id": f"{EVIL}{n}", "text": TEXT * n}) for n in range(1, 12)]
    (root / "a.jsonl").write_text("\n".join([*lines, "[]", '{"text": 1}', "[]"]))
    (root / "b.txt").write_text("\U0001f600 and \u2581", encoding="utf-8")
    sources = [{"name": SOURCE, "paths": ["*.jsonl"]}, {"name": "two", "paths": ["*.txt"]}]
    words = [f"root={root}", f"output={root / 'set'}", f"sources={json.dumps(sources)}"]
    more = ["tokenizer.vocab_size=300", "tokenizer.character_coverage=0.99", "shards.count=2"]
    pipeline.run(config.load(None, [*words, *more]))
    return root / "set"


@pytest.fixture
def cleaned(made: Path, tmp_path: Path) -> Path:
    """The data set with a record of its cleaning."""
    shutil.copytree(made, tmp_path / "set")
    reason = "gopher: <i>short</i>"
    fate = {
        **{"read": 30, "accepted": 11, "rejected": 3, "dropped": {reason: 9, "language: de": 2}},
        **{"duplicates": {"exact": 4, "near": 1}, "changed": {"ftfy": 7}},
    }
    sample = {"source": SOURCE, "reason": reason, "id": f"no & {EVIL}", "file": "f.jsonl"}
    samples = [{**sample, "line": 77, "text": f"{EVIL} & \u202ereversed \ud800"}]
    written = json.dumps({"sources": {SOURCE: fate}, "samples": samples})
    (tmp_path / "set" / ACCOUNTS).write_text(written)
    return tmp_path / "set"


def browse(path: Path, width: int) -> tuple[str, str]:
    """The file's DOM in a browser, and what the browser logged."""
    if CHROMIUM is None:
        programs.skip_without("chromium")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    more = "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    done = subprocess.run(
        [
            *(
                CHROMIUM,
                *flags.split(),
                *more.split(),
                f"--user-data-dir={path.parent / 'profile'}",
            ),
            *(f"--window-size={width},1600", path.as_uri()),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_charts_and_runs_nothing(
    cleaned: Path, tmp_path: Path, width: int
) -> None:
    path = tmp_path / "page.html"
    page.write(cleaned, path)
    told = path.read_text(encoding="utf-8")
    # The page forbids all scripts: one is let in to look at what came out.
    allowed = told.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    path.write_text(allowed.replace("</head>", f"{PROBE}</head>"), encoding="utf-8")
    dom, logged = browse(path, width)
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found
    probe = json.loads(html.unescape(found[1]))
    assert len(probe["charts"]) == 8
    assert all(across > 200 and high > 30 for across, high in probe["charts"])
    assert {SOURCE, "two", "gopher: <i>short</i>"} <= set(probe["texts"])
    assert "30 read \u00b7 36.7% accepted" in probe["texts"]
    assert (probe["scripts"], probe["bold"], probe["wide"]) == (0, 0, 0)
    assert all(name.startswith("data:") for name in probe["requests"])
    assert "CONSOLE" not in logged
    assert "<title>set</title>" in dom


def test_a_browser_logs_nothing_and_a_script_in_it_would_not_run(
    cleaned: Path, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    page.write(cleaned, path)
    dom, logged = browse(path, 1200)
    assert "CONSOLE" not in logged
    assert f"<h1><bdi>{cleaned.name}</bdi></h1>" in dom
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", EVIL), encoding="utf-8")
    dom, logged = browse(path, 1200)
    assert "<title>set</title>" in dom
    assert "Content Security Policy" in logged


def test_the_page_holds_the_figures_escaped(cleaned: Path) -> None:
    told = page.page(cleaned)
    stats = report.stats(cleaned)
    for figure in (f"{stats.tokens:,}", f"{stats.bytes_per_token:.3f}", "f.jsonl:77", "9 dropped"):
        assert figure in told
    rows = re.findall(r"<tr>(.*?)</tr>", told)
    cells = [re.sub(r"<[^>]*>", " ", row).split() for row in rows]
    assert ["ftfy", "a", "&amp;", "&lt;b&gt;bold&lt;/b&gt;", "$x_1$", "7", "23.3%"] in cells
    assert "two 1" not in told and "2 rejected" in told and "not an object" in told
    assert "<script" not in told and "<b>bold" not in told and "<i>short" not in told
    assert "&lt;script&gt;" in told and "\u202e" not in told
    assert "default-src 'none'" in told
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", told)
    assert told == page.page(cleaned)


def test_a_data_set_without_cleaning_says_so(made: Path, tmp_path: Path) -> None:
    made = shutil.copytree(made, tmp_path / "old")
    recorded = report.cleaning(made, report.count(made))
    (made / ACCOUNTS).unlink()
    told = page.page(made)
    assert "There was no cleaning" in told
    assert "duplicates were not looked for" in told
    found = report.cleaning(made, report.count(made))
    assert (recorded.cleaned, found.cleaned) == (True, False)
    assert recorded.sources == found.sources
    fate = found.sources[SOURCE]
    assert (fate.read, fate.accepted, fate.rejected) == (14, 11, 3)
    assert found.sources["two"].read == 1
    assert next(report.rejects(made, [SOURCE, "two"])) == Sample(
        SOURCE, "not an object", "", f"{SOURCE}/a.jsonl", 12, "found list"
    )


def test_the_command_writes_the_page_beside_the_shards_or_where_it_is_told(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(made, tmp_path / "set")
    assert cli.main(["report", str(directory)]) == 0
    assert capsys.readouterr().out == f"report: {directory / 'report.html'}\n"
    assert cli.main(["report", str(directory), "--output", str(tmp_path / "p.html")]) == 0
    assert (tmp_path / "p.html").read_bytes() == (directory / "report.html").read_bytes()
    assert shards.verify(directory) == []
    nowhere = tmp_path / "nowhere" / "p.html"
    assert cli.main(["report", str(directory), "--output", str(nowhere)]) == 2
    told = capsys.readouterr().err
    assert told == f"data-prep: {nowhere}: cannot be written (No such file or directory)\n"
    (directory / "shard-00001.tar").unlink()
    assert cli.main(["report", str(directory)]) == 1


def test_a_cleaning_that_does_not_add_up_is_refused(cleaned: Path) -> None:
    path = cleaned / ACCOUNTS
    path.write_text(path.read_text().replace('"accepted": 11', '"accepted": 12'))
    with pytest.raises(DataError, match=r"cleaning\.json: the records of .* do not add up"):
        page.page(cleaned)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"cleaning\.json: cannot be read"):
        page.page(cleaned)


@pytest.mark.parametrize("tokens", [[1], [5, 5, 5], [0, 1, 10**7]])
def test_any_lengths_can_be_drawn(tokens: list[int]) -> None:
    drawn = charts.lengths(np.array(tokens, dtype=np.uint64))
    assert drawn.startswith("<svg") and "tokens of a document" in drawn


def test_a_chart_keeps_a_hostile_name_as_text() -> None:
    drawn = charts.bars("t", {EVIL: 1.0, "\u65e5\u672c\n\0 $a$": 0.0}, ["1", "0 & 1"])
    assert "<script" not in drawn and "&lt;script&gt;" in drawn
    assert "\u65e5\u672c \ufffd $a$" in drawn and "0 &amp; 1" in drawn
    assert "#0" not in drawn and "var(--c1)" in drawn
