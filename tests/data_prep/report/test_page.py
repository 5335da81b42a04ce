"""The page of a data set shows its figures in a browser and runs nothing that the data hold."""

from __future__ import annotations

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_prep import cli, config
from data_prep.accounts import ACCOUNTS
from data_prep.dataset import shards
from data_prep.dataset.shards import DataError
from data_prep.pipeline import pipeline
from data_prep.report import page, statistics
from tests.browser import browse, probed

EVIL = "<script>document.title='owned'</script>"
SOURCE = "a & <b>bold</b> $x_1$"
TEXT = "the segment reads the memory and then the segment writes the memory. "
# Run in the browser after the page is there: what was drawn, loaded and logged.
PROBE = """
  const size = node => { const r = node.getBoundingClientRect(); return [r.width, r.height]; };
  const texts = [...document.querySelectorAll(".bars bdi, .bars span, svg text")];
  const overlap = (one, other) => {
    const a = one.getBoundingClientRect(), b = other.getBoundingClientRect();
    return a.left < b.right && b.left < a.right && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  };
  return {
    charts: [...document.querySelectorAll(".bars, .plot")].map(size),
    bars: [...document.querySelectorAll(".bars svg")].map(size),
    texts: texts.map(node => node.textContent),
    overlaps: texts.flatMap((a, n) => texts.slice(n + 1).filter(b => overlap(a, b))
      .map(b => [a.textContent, b.textContent])),
    colours: [...document.querySelectorAll("rect")].map(node => getComputedStyle(node).fill),
    targets: [...document.querySelectorAll("nav a")]
      .map(node => document.querySelector(node.getAttribute("href"))?.tagName),
    scripts: document.querySelectorAll("body script").length,
    bold: [...document.querySelectorAll("bdi *")].length,
    requests: performance.getEntriesByType("resource").map(entry => entry.name),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
"""


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


@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_charts_and_runs_nothing(
    cleaned: Path, tmp_path: Path, width: int
) -> None:
    path = tmp_path / "page.html"
    page.write(cleaned, path)
    probe, dom, logged = probed(path, PROBE, width)
    assert len(probe["charts"]) == 8
    assert all(across > 200 and high > 30 for across, high in probe["charts"])
    widths = {across for across, _ in probe["charts"]}
    assert len(probe["bars"]) > 10 and {across for across, _ in probe["bars"]} <= widths
    assert all(5 < high < 15 for _, high in probe["bars"]) and probe["overlaps"] == []
    # A colour that the style does not define would be drawn black.
    assert probe["colours"] and "rgb(0, 0, 0)" not in probe["colours"]
    assert probe["targets"] == ["SECTION"] * 7
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


class _Isolated(HTMLParser):
    """The texts of a page, and whether each is isolated from the writing direction around it."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[tuple[str, bool]] = []
        self._isolated = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._isolated |= tag == "bdi"

    def handle_endtag(self, tag: str) -> None:
        self._isolated &= tag != "bdi"

    def handle_data(self, data: str) -> None:
        self.texts.append((data, self._isolated))


def _section(shown: str, section: str) -> str:
    return shown.partition(f'<section id="{section}">')[2].partition("</section>")[0]


def _rows(shown: str, section: str) -> list[list[str]]:
    """The cells of all rows of a section's tables, as they are escaped in the page."""
    rows = re.findall(r"<tr>(.*?)</tr>", _section(shown, section), re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return [[re.sub("</?bdi>", "", cell) for cell in row] for row in cells]


def test_the_page_holds_the_figures_escaped(cleaned: Path) -> None:
    shown = page.page(cleaned)
    stats = statistics.stats(cleaned).plain()
    for figure in (
        f"{stats['tokens']:,}",
        f"{stats['bytes_per_token']:.3f}",
        "f.jsonl:77",
        "9 dropped",
    ):
        assert figure in shown
    assert ["ftfy", html.escape(SOURCE), "7", "23.3%"] in _rows(shown, "records-read")
    assert "2 rejected" in shown and "not an object" in shown
    assert "<script" not in shown and "<b>bold" not in shown and "<i>short" not in shown
    assert "&lt;script&gt;" in shown and "\u202e" not in shown
    assert "default-src 'none'" in shown
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", shown)
    assert shown == page.page(cleaned)


def test_a_data_set_without_cleaning_shows_its_records(made: Path) -> None:
    shown = page.page(made)
    assert "None was removed." in _section(shown, "duplicates")
    assert _rows(shown, "records-read")[1:] == [
        [html.escape(SOURCE), *("14", "11", "0", "0", "0", "3"), "78.6%"],
        ["two", *("1", "1", "0", "0", "0", "0"), "100.0%"],
    ]


def test_the_command_writes_the_page_beside_the_shards_or_where_it_is_asked_for(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(made, tmp_path / "set")
    assert cli.main(["report", str(directory)]) == 0
    assert capsys.readouterr().out == f"report: {directory / 'report.html'}\n"
    assert cli.main(["report", str(directory), "--output", str(tmp_path / "p.html")]) == 0
    assert (tmp_path / "p.html").read_bytes() == (directory / "report.html").read_bytes()
    assert shards.verify(directory) == []
    nowhere = tmp_path / "nowhere" / "p.html"
    assert cli.main(["report", str(directory), "--output", str(nowhere)]) == 0
    assert nowhere.read_bytes() == (directory / "report.html").read_bytes()
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


def test_a_value_is_shown_as_it_is_written_and_isolated(cleaned: Path) -> None:
    """Hostile values are in every place that shows a text of the data."""
    path = cleaned / ACCOUNTS
    path.write_text(path.read_text().replace(json.dumps(SOURCE)[1:-1], "a & <b>\\u0000bold\\u202e"))
    shown = page.page(cleaned)
    assert "a &amp; &lt;b&gt;\ufffdbold\ufffd" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", shown)
    reader = _Isolated()
    reader.feed(shown)
    hostile = [
        (text, inside) for text, inside in reader.texts if re.search("<b>|<i>|<script", text)
    ]
    assert len(hostile) > 20 and all(inside for _, inside in hostile)


def test_a_chart_shows_the_largest_sources_and_says_so(cleaned: Path) -> None:
    path = cleaned / ACCOUNTS
    written = json.loads(path.read_text())
    none: dict[str, int] = {}
    for number in range(24):
        counts = {"read": number + 1, "accepted": 0, "rejected": number, "dropped": none}
        written["sources"][f"s{number:02}"] = {**counts, "duplicates": {"near": 1}, "changed": none}
    path.write_text(json.dumps(written))
    shown = page.page(cleaned)
    records, duplicates = (
        re.findall("<li><bdi>(.*?)</bdi>", _section(shown, section))[:21]
        for section in ("records-read", "duplicates")
    )
    *records, reason = records
    assert reason.startswith("gopher")
    assert records == [html.escape(SOURCE), *(f"s{number:02}" for number in range(23, 4, -1))]
    assert duplicates == [html.escape(SOURCE), *(f"s{number:02}" for number in range(19))]
    assert shown.count("The 20 largest of 25 sources.") == 2
    assert len(_rows(shown, "records-read")) > 25
