"""Which files a configuration means."""

from __future__ import annotations

import sysconfig
from pathlib import Path

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
