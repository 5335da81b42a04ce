"""Which files patterns match."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import config
from data_prep.sources import globs, inputs


def find(root: Path, pattern: str, *exclude: str) -> list[str] | str:
    """Paths, or why they are unknown."""
    (found,) = globs.matches(str(root), [pattern], globs.Excluded(str(root), exclude))
    return found if isinstance(found, str) else [one.path for one in found.files]


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")


# Names, hidden names, wildcards at every depth, and names with the signs of wildcards.
TREE = [
    f"{directory}{name}"
    for directory in ("", "a/", "a/b/", "a/b/t/", "a/.h/", "a/.h/t/", "t/", "t/b/a/", "[x]/t/")
    for name in ("1.txt", "2.py", ".h.txt", "t.txt")
]
GLOBS = ("**", "**/*.txt", "*/**", "a/**", "**/t/**", "**/b/*", "*/*/t/**/1*", "t", "t/**/b/**/*")
HIDDEN = ("**/.h/**", "a/.h/t/*.txt", "a/.*/*", "**/.*", "[[]x]/**/[!1]*", "*/b//*.txt", "*/")
LITERAL = ("a/b/1.txt", "*/b/1.txt", "**/t/1.txt", "*/../t/*.txt", "a/.h/t/.h.txt", "none/*")


def globbed(root: Path, pattern: str) -> set[str]:
    found = (root / name for name in glob.glob(pattern, root_dir=root, recursive=True))  # noqa: PTH207
    return {str(path) for path in found if path.is_file()}


@pytest.mark.parametrize("pattern", [*GLOBS, *HIDDEN, *LITERAL])
def test_what_is_left_out_is_what_its_globs_find(pattern: str, tmp_path: Path) -> None:
    make(tmp_path, *TREE)
    (tmp_path / "link").symlink_to(tmp_path / "a/b")
    everything = [*GLOBS, *HIDDEN, "link/**"]
    for left_out in [(), *itertools.combinations(everything, 1), ("**/t/**", "a/.h/*", "link/**")]:
        expected = globbed(tmp_path, pattern).difference(*(globbed(tmp_path, p) for p in left_out))
        assert find(tmp_path, pattern, *left_out) == sorted(expected)


def test_a_directory_that_is_left_out_is_not_entered(tmp_path: Path) -> None:
    make(tmp_path, "a/x.txt", "b/x.txt")
    # Looking at it fails: it leads to itself.
    (tmp_path / "b/loop").symlink_to("loop")
    problem = find(tmp_path, "**", "a/**")
    assert isinstance(problem, str) and "b/loop" in problem
    assert find(tmp_path, "**", "b/**") == [str(tmp_path / "a/x.txt")]


def test_a_pattern_is_divided_at_its_first_wildcard(tmp_path: Path) -> None:
    for root, pattern, base, rest in (
        (str(tmp_path), "a/b/*/c.txt", f"{tmp_path}/a/b", "*/c.txt"),
        (str(tmp_path), "../x.txt", str(tmp_path.parent), "x.txt"),
        (str(tmp_path), "/data/**", "/data", "**"),
        (str(tmp_path), "s3://bucket/a/*.gz", "s3://bucket/a/", "*.gz"),
        ("s3://bucket/", "a/x?/b", "s3://bucket/a/", "x?/b"),
        ("s3://bucket", "/data/x", "/data", "x"),
        ("/r/[x]", "a/*", "/r/[x]/a", "*"),
    ):
        assert globs.anchored(root, pattern) == (base, rest)


def test_a_link_that_leads_back_is_not_followed_for_ever(tmp_path: Path) -> None:
    make(tmp_path, "a/x.txt", "b/y.txt")
    (tmp_path / "a/loop").symlink_to(".")
    (tmp_path / "a/again").symlink_to(".")
    (tmp_path / "a/b").symlink_to("../b")
    (tmp_path / "b/a").symlink_to("../a")
    (tmp_path / "b/up").symlink_to("..")
    names = [path.removeprefix(f"{tmp_path}/") for path in find(tmp_path, "**/*.txt")]
    assert names == ["a/b/y.txt", "a/x.txt", "b/a/x.txt", "b/y.txt"]
    # What is named is found, as by glob itself.
    assert find(tmp_path, "a/loop/*/x.txt") == [
        str(tmp_path / f"a/loop/{name}/x.txt") for name in ("again", "loop")
    ]
    evaluation = "cleaning: {decontaminate: ['a/**/*.txt']}"
    words = [f"root={tmp_path}", f"sources=[{{name: s, paths: [x], {evaluation}}}]", "output=/x"]
    loaded = config.load(None, words)
    assert [*inputs.evaluation_files(loaded, loaded.sources[0], [])] == [
        "evaluation/a/b/y.txt",
        "evaluation/a/x.txt",
    ]


@contextlib.contextmanager
def as_anybody() -> Iterator[None]:
    """With the rights of a user that owns nothing here, where this one may read all."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("rights", [0o000, 0o444, 0o111])
@pytest.mark.parametrize("pattern", ["**/*.txt", "*/*.txt", "shut/in/*.txt", "shut/in/1.txt"])
def test_a_directory_that_cannot_be_read_is_no_empty_one(
    pattern: str, rights: int, shared: Path
) -> None:
    make(shared, "open/1.txt", "shut/in/1.txt", "shut/2.txt")
    (shared / "shut").chmod(rights)
    with as_anybody():
        found, without = find(shared, pattern), find(shared, pattern, "shut/**")
    (shared / "shut").chmod(0o755)
    if rights == 0o111 and pattern.startswith("shut"):
        assert found == [str(shared / "shut/in/1.txt")]
    else:
        assert isinstance(found, str)
        assert f"{shared}/shut" in found and "Permission denied; repair it" in found
    assert isinstance(without, list) or pattern.startswith("shut")


def test_a_link_into_a_directory_that_cannot_be_read_is_told(shared: Path) -> None:
    make(shared, "shut/in/1.txt", "open/2.txt")
    (shared / "open/link").symlink_to("../shut/in")
    (shared / "shut").chmod(0)
    with as_anybody():
        found = find(shared, "open/**/*.txt")
    (shared / "shut").chmod(0o755)
    assert isinstance(found, str) and "open/link" in found
