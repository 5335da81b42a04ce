"""The commands that README and docs show work as written; the paths that they name exist."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep.cli import main as data_prep_main
from pretrain.cli.main import main as pretrain_main
from tests import ranks

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# In this order, since commands build on what those before them made.
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("training", "data", "memories")),
]
COMMANDS = [
    line.removeprefix("$ ")
    for page in PAGES
    for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
]
NOVELS = [
    line.removeprefix("$ ")
    for line in (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("$ ") and "novels" in line and not line.startswith("$ python")
]

# The README shows what a mistake is answered with.
MISTAKEN = "pretrain train configs/my_texts.yaml train.stepz=10 model.n_kv_heads=3"
# These run as users run them, by the installed programs; and torchrun.
AS_INSTALLED = (
    "data-prep run configs/data/my_texts.yaml root=my_texts",
    "pretrain train configs/my_texts.yaml",
)

# What makes a recipe short enough for a test; it goes behind the README's own words.
SHORTER = {
    "data-prep run": ["tokenizer.vocab_size=400"],
    "pretrain train": [
        *("train.steps=2", "optim.warmup_steps=0", "train.window_segments=2"),
        "launch.ranks=1",  # torchrun brings its own two
    ],
}
SHORTER_VALIDATION = "train.validation_windows=1"  # of recipes that have one
WORDS = ("the", "sea", "was", "calm", "and", "light", "wind", "came", "over", "harbour")


def _text(seed: int, words: int) -> str:
    """A text whose words have endings of their own, so that 400 pieces can be learned from it."""
    draw = random.Random(seed)
    stems = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(300)]
    return " ".join(draw.choice(WORDS) + draw.choice(["", "s", "ly"]) + draw.choice(stems)
                    for _ in range(words))  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the recipes, some texts and a few short novels."""
    directory = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", directory / "configs")
    (directory / "my_texts").mkdir()
    for number in range(8):
        path = directory / "my_texts" / f"{number}.txt"
        path.write_text(_text(number, 400), encoding="utf-8")
    (directory / "corpus").mkdir()
    for name, first, count in (("train-00", 0, 40), ("val", 100, 8)):
        with gzip.open(directory / "corpus" / f"novels-{name}.jsonl.gz", "wt") as file:
            for number in range(first, first + count):
                record = {"id": f"{name}-{number}", "text": _text(number, 300)}
                file.write(json.dumps(record) + "\n")
    return directory


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    output: str
    errors: str


def _run(command: str, capfd: pytest.CaptureFixture[str]) -> Done:
    """Run a command here.

    Most need no process of their own, whose imports would take longest: their programs' functions
    are called; what trains is one rank of ours.
    """
    program, *words = shlex.split(command)
    verb = " ".join([program, *words[:1]])
    words += SHORTER.get(verb, SHORTER["pretrain train"] if "train" in words else [])
    if "train" in words and "configs/novels_cpu.yaml" in words:
        words.append(SHORTER_VALIDATION)
    if command in AS_INSTALLED or program == "torchrun":
        environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            [program, *words], env=environment, capture_output=True, text=True, check=False
        )
        return Done(done.returncode, done.stdout, done.stderr)
    if verb == "pretrain train" and command != MISTAKEN:
        ranks.train(1, *words[1:])
        return Done(0, "", "")
    capfd.readouterr()
    code = data_prep_main(words) if program == "data-prep" else _exit_code(words)
    return Done(code, *capfd.readouterr())


def _exit_code(words: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        pretrain_main(words)
    return int(str(ended.value.code))


def test_every_command_of_the_readme_works(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    ours = [command for command in COMMANDS + NOVELS if not command.startswith("make ")]
    assert len(ours) >= 15 and {*AS_INSTALLED, MISTAKEN} <= set(ours)
    for command in ours:
        done = _run(command, capfd)
        wrong = command == MISTAKEN
        assert done.code == (2 if wrong else 0), f"{command}\n{done.output}\n{done.errors}"
        if wrong:
            assert "train.stepz: unknown key; did you mean train.steps?" in done.errors
            assert "model.n_heads: 4 query heads cannot share 3" in done.errors
            assert "Traceback" not in done.errors
    resumed = (place / "runs/my_texts/log.txt").read_text(encoding="utf-8")
    assert resumed.count("finished already") == 2  # by our launcher and by torchrun


ALL_PAGES = ["README.md", "CONTRIBUTING.md", "slurm/README.md",
             *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]  # fmt: skip


@pytest.mark.parametrize("page", ALL_PAGES)
def test_every_path_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    # In slurm/README.md `slurm/` is a run directory's.
    roots = "pretrain|data_prep|configs|tests|tools|docs"
    named = set(re.findall(rf"`((?:{roots})/[\w./-]+)`", text))
    linked = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    missing = {path for path in named if not (ROOT / path).exists()}
    missing |= {path for path in linked if not ((ROOT / page).parent / path).exists()}
    assert missing == set()


@pytest.mark.parametrize("page", ALL_PAGES)
def test_every_section_that_a_page_links_to_exists(page: str) -> None:
    for target, section in re.findall(
        r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")
    ):
        path = (ROOT / page).parent / target if target else ROOT / page
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        # As GitHub names them.
        anchors = {
            re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
        }
        assert section in anchors, f"{target}#{section}"


@pytest.mark.parametrize("page", [page for page in ALL_PAGES if page != "README.md"])
def test_every_page_can_be_reached_from_the_readme(page: str) -> None:
    assert f"]({page})" in README


def test_the_readme_is_a_first_page() -> None:
    assert len(README.splitlines()) <= 200


def test_the_readme_names_targets_that_make_has() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?:`|\$ )make ([a-z-]+)", README)
    assert {"demo", "test", "test-slow", "setup"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.slow
def test_the_demo_runs_and_states_each_part_with_its_figure() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "demo.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    closing = done.stdout.split("The demo in figures")[1]
    for part in ("prepared:", "trained:", "killed after", "wandb:", "evaluated:", "generated:",
                 "plotted:"):  # fmt: skip
        assert part in closing
    found = re.search(r"(\d+) of (\d+) losses recorded twice are equal", closing)
    assert found is not None and found[1] == found[2] and int(found[2]) > 0
