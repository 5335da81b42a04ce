"""Which files a configuration means."""

from __future__ import annotations

import glob
import itertools
import sysconfig
from pathlib import Path

import pytest

from data_prep import config
from data_prep.sources import inputs
from data_prep.sources.inputs import InputFile


def find(root: Path, sources: str, **more: str) -> tuple[list[InputFile], list[str]]:
    words = [f"{key}={value}" for key, value in more.items()]
    loaded = config.load(
        None, [f"root={root}", f"output={root / 'out'}", f"sources={sources}", *words]
    )
    problems: list[str] = []
    return inputs.find(loaded, problems), problems


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")


def test_files_are_in_order_with_paths_below_the_fixed_directory(tmp_path: Path) -> None:
    make(tmp_path, "d/b.txt", "d/a.txt", "d/e/c.txt", "d/x.md")
    files, problems = find(
        tmp_path, "[{name: z, paths: ['d/**/*.txt']}, {name: a, paths: [d/x.md]}]"
    )
    assert problems == []
    assert [file.name for file in files] == ["a/x.md", "z/a.txt", "z/b.txt", "z/e/c.txt"]
    assert files[-1].path == str(tmp_path / "d/e/c.txt")


def test_a_file_is_taken_once_and_can_be_left_out(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "b.txt", "t/c.txt")
    files, _ = find(
        tmp_path, "[{name: s, paths: ['**/*.txt', 'a*'], exclude: ['t/**', 'b.txt', 'none']}]"
    )
    assert [file.relative for file in files] == ["a.txt"]


# Names, hidden names, wildcards at every depth, and names with the signs of wildcards.
TREE = [
    f"{directory}{name}"
    for directory in ("", "a/", "a/b/", "a/b/t/", "a/.h/", "a/.h/t/", "t/", "t/b/a/", "[x]/t/")
    for name in ("1.txt", "2.py", ".h.txt", "t.txt")
]
GLOBS = ("**", "**/*.txt", "*/**", "a/**", "**/t/**", "**/b/*", "*/*/t/**/1*", "t", "t/**/b/**/*")
HIDDEN = ("**/.h/**", "a/.h/t/*.txt", "a/.*/*", "**/.*", "[[]x]/**/[!1]*", "*/b//*.txt", "*/")


def globbed(root: Path, pattern: str) -> set[str]:
    found = (root / name for name in glob.glob(pattern, root_dir=root, recursive=True))  # noqa: PTH207
    return {str(path) for path in found if path.is_file()}


@pytest.mark.parametrize("pattern", [*GLOBS, *HIDDEN])
def test_what_is_left_out_is_what_its_globs_find(pattern: str, tmp_path: Path) -> None:
    make(tmp_path, *TREE)
    (tmp_path / "link").symlink_to(tmp_path / "a/b")
    everything = [*GLOBS, *HIDDEN, "link/**"]
    for left_out in [(), *itertools.combinations(everything, 1), ("**/t/**", "a/.h/*", "link/**")]:
        sources = f"[{{name: s, paths: ['{pattern}'], exclude: {list(left_out)}}}]"
        files, problems = find(tmp_path, sources)
        expected = globbed(tmp_path, pattern).difference(*(globbed(tmp_path, p) for p in left_out))
        assert [file.path for file in files] == sorted(expected)
        assert bool(problems) == (not expected)


def test_a_directory_that_is_left_out_is_not_entered(tmp_path: Path) -> None:
    make(tmp_path, "a/x.txt", "b/x.txt")
    # Looking at it fails: it leads to itself.
    (tmp_path / "b/loop").symlink_to("loop")
    _, problems = find(tmp_path, "[{name: s, paths: ['**'], exclude: ['a/**']}]")
    assert len(problems) == 1 and "b/loop" in problems[0]
    files, problems = find(tmp_path, "[{name: s, paths: ['**'], exclude: ['b/**']}]")
    assert ([file.relative for file in files], problems) == (["a/x.txt"], [])


def test_suffixes_tell_format_and_compression(tmp_path: Path) -> None:
    names = ("a.jsonl", "b.jsonl.gz", "c.ndjson.zst", "d.txt", "e.txt.gz", "f.PY", "g")
    make(tmp_path, *names)
    files, _ = find(tmp_path, "[{name: s, paths: ['*']}]")
    assert [(file.format, file.compression) for file in files] == [
        ("jsonl", None),
        ("jsonl", "gzip"),
        ("jsonl", "zstd"),
        ("text", None),
        ("text", "gzip"),
        ("text", None),
        ("text", None),
    ]
    files, _ = find(tmp_path, "[{name: s, paths: ['*'], format: jsonl}]")
    assert {file.format for file in files} == {"jsonl"}


def test_the_standard_library_is_a_corpus(tmp_path: Path) -> None:
    files, problems = find(tmp_path, "[{name: s, paths: ['{stdlib}/json/*.py']}]")
    assert problems == []
    assert "s/decoder.py" in {file.name for file in files}
    assert Path(files[0].path).is_relative_to(sysconfig.get_path("stdlib"))


def test_globs_that_find_nothing_are_all_reported(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    _, problems = find(tmp_path, "[{name: s, paths: ['*.md', 'a.txt', 'q/*.txt']}]")
    assert problems == [
        f"sources[0].paths[0]: no file matches '*.md' below {tmp_path}",
        f"sources[0].paths[2]: no file matches '*.txt' below {tmp_path / 'q'}",
    ]


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "d/a.txt", "e/a.txt")
    _, problems = find(tmp_path, "[{name: s, paths: ['d/*.txt', 'e/*.txt']}]")
    assert len(problems) == 1
    assert "are both called 'a.txt'" in problems[0]


def test_the_output_is_no_input(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "out/rejects.jsonl")
    _, problems = find(tmp_path, "[{name: s, paths: ['**/*.jsonl']}]")
    assert len(problems) == 1
    assert "is in the output directory" in problems[0]


def test_suffixes_tell_tables_and_archives(tmp_path: Path) -> None:
    names = ("a.parquet", "b.warc", "c.warc.gz", "d.warc.wet.gz", "e.wet.zst", "f.warc.wat.gz")
    make(tmp_path, *names)
    files, problems = find(tmp_path, "[{name: s, paths: ['*']}]")
    assert problems == []
    assert [(file.format, file.compression) for file in files] == [
        ("parquet", None),
        ("warc", None),
        ("warc", "gzip"),
        ("warc", "gzip"),
        ("warc", "zstd"),
        ("warc", "gzip"),
    ]
    make(tmp_path, "g.parquet.gz")
    _, problems = find(tmp_path, "[{name: s, paths: ['*']}]")
    assert problems == [
        f"sources[0].paths: {tmp_path}/g.parquet.gz is a compressed parquet file; decompress it"
    ]


def test_members_of_a_group_are_in_natural_order_and_together(tmp_path: Path) -> None:
    make(tmp_path, *(f"{name}.txt" for name in ("a/2", "a/10", "a/b/1", "a-1/1", "a/02", "a/b")))
    files, _ = find(tmp_path, "[{name: s, paths: ['**/*.txt'], group_by: top}]")
    assert [file.relative for file in files] == [
        *("a/02.txt", "a/2.txt", "a/10.txt", "a/b/1.txt", "a/b.txt", "a-1/1.txt")
    ]
    assert inputs.groups(files) == [range(5), range(5, 6)]
    files, _ = find(tmp_path, "[{name: s, paths: ['**/*.txt'], group_by: directory}]")
    assert [file.group for file in files] == ["a", "a", "a", "a", "a-1", "a/b"]
    files, _ = find(tmp_path, "[{name: s, paths: ['**/*.txt']}]")
    assert inputs.groups(files) == [range(n, n + 1) for n in range(6)]
