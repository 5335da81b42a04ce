"""Which files a configuration means."""

from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import config
from data_prep.sources import inputs, readers
from data_prep.sources.documents import Reject
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


def test_files_that_are_all_left_out_are_told_as_such(tmp_path: Path) -> None:
    make(tmp_path, "d/a.txt", "d/e/b.txt", "c.md")
    for exclude in ("**", "d/**", "**/*.txt"):
        source = f"{{name: s, paths: ['d/**/*.txt'], exclude: ['{exclude}']}}"
        assert find(tmp_path, f"[{source}]")[1] == [
            f"sources[0].paths[0]: `exclude` leaves out every file that matches '**/*.txt' below "
            f"{tmp_path}/d, such as {tmp_path}/d/a.txt"
        ]
    assert "no file matches" in find(tmp_path, "[{name: s, paths: ['*.x'], exclude: ['**']}]")[1][0]


def test_files_that_are_read_more_than_once_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "blobs/1", "blobs/2", "a/x.txt", "b/y.txt")
    one = "{name: one, paths: ['*/*.txt']}"
    assert find(tmp_path, f"[{one}]")[1] == []
    assert capsys.readouterr().err == ""
    # As in the cache of Hugging Face's hub, where a revision is a directory of links.
    for revision in ("old", "new"):
        (tmp_path / revision).mkdir()
        for number in (1, 2):
            (tmp_path / revision / f"{number}.txt").symlink_to(f"../blobs/{number}")
    assert find(tmp_path, f"[{one}]")[1] == []
    assert capsys.readouterr().err == (
        f"2 input files are read more than once, such as {tmp_path}/new/1.txt in source one and "
        f"{tmp_path}/old/1.txt in source one; if that is not meant, use `exclude`, or set "
        "duplicates.exact: true\n"
    )
    both = "[{name: one, paths: ['a/*.txt']}, {name: two, paths: ['[ab]/*']}]"
    assert find(tmp_path, both)[1] == []
    assert capsys.readouterr().err.startswith(
        f"1 input file is read more than once, such as {tmp_path}/a/x.txt in source one and "
        f"{tmp_path}/a/x.txt in source two;"
    )
    for more in ({"duplicates.exact": "true"}, {"duplicates.near": "true"}):
        assert find(tmp_path, both, **more)[1] == []
    assert capsys.readouterr().err == ""


def test_evaluation_files_of_a_root_on_a_server_are_refused_as_such(tmp_path: Path) -> None:
    paths = ["eval/a.jsonl", f"{tmp_path}/b.jsonl", "s3://b/c.jsonl"]
    source = f"sources=[{{name: s, paths: ['*.txt'], cleaning: {{decontaminate: {paths}}}}}]"
    wanted, problems = (
        config.load(None, ["root=memory://corpus", f"output={tmp_path}/set", source]),
        [],
    )
    make(tmp_path, "b.jsonl")
    assert inputs.evaluation_files(wanted, wanted.sources[0], problems) == {
        f"evaluation{tmp_path}/b.jsonl": tmp_path / "b.jsonl"
    }
    assert problems == [
        f"{url}: evaluation files are read from local paths; copy it, and give its absolute path"
        for url in ("memory://corpus/eval/a.jsonl", "s3://b/c.jsonl")
    ]


def test_what_a_run_left_in_the_output_below_the_root_is_no_input(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "d/b.jsonl", "out/rejects.jsonl", "out/work/begun.json")
    (tmp_path / "link").symlink_to("out")
    for pattern in ("**/*.json*", "**", "*/*.jsonl"):
        files, problems = find(tmp_path, f"[{{name: s, paths: ['{pattern}']}}]")
        assert problems == []
        assert [file.relative for file in files] == ["a.jsonl", "d/b.jsonl"][
            pattern[0:3] == "*/*" :
        ]
    # The output is told by where it leads, too.
    (tmp_path / "again").symlink_to(".")
    sources = "sources=[{name: s, paths: ['**'], cleaning: {decontaminate: ['*/*.jsonl']}}]"
    words = [f"root={tmp_path}", f"output={tmp_path}/again/out", sources]
    loaded, problems = config.load(None, words), []
    assert [file.relative for file in inputs.find(loaded, problems)] == ["a.jsonl", "d/b.jsonl"]
    assert [*inputs.evaluation_files(loaded, loaded.sources[0], problems)] == [
        *("evaluation/again/a.jsonl", "evaluation/d/b.jsonl")
    ]
    assert problems == []


def test_globs_inside_of_the_output_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "out/a.txt", "out/d/b.txt")
    for root, pattern in (("", "out/*.txt"), ("", "out/d/b.txt"), ("out", "*")):
        sources = f"sources=[{{name: s, paths: ['{pattern}']}}]"
        words = [f"root={tmp_path / root}", f"output={tmp_path / 'out'}", sources]
        problems: list[str] = []
        inputs.find(config.load(None, words), problems)
        (problem,) = problems
        assert problem.startswith(f"sources[0].paths[0]: {tmp_path}/out")
        assert "is in the output directory; give files outside of it" in problem


def test_a_directory_where_files_are_asked_for_is_told(tmp_path: Path) -> None:
    make(tmp_path, "a.tsv", "b.tsv/part-0", "b.tsv/_SUCCESS", "c.tsv/part-0", "d/x.txt")
    (tmp_path / "empty.tsv").mkdir()

    def problem(*patterns: str) -> str:
        _, (found,) = find(tmp_path, f"[{{name: s, format: text, paths: {list(patterns)}}}]")
        return found.removeprefix("sources[0].paths[0]: ")

    told = f"{tmp_path}/b.tsv and 1 other are directories; give '*.tsv/**' for the files inside"
    assert problem("*.tsv") == told
    assert problem("d") == f"{tmp_path}/d is a directory; give 'd/**' for the files inside"
    assert problem("d/") == problem("d")
    assert problem("*/") == "no file matches '*/' below " + str(tmp_path)
    # Its files are found by another pattern, it is left out, or every file beside it is meant.
    for patterns in (
        *("paths: ['*.tsv', '*.tsv/p*']", "paths: ['**/*.t*', '**/part-?']"),
        *("paths: ['*.tsv'], exclude: ['?.tsv/**']", "paths: ['*', '**']"),
    ):
        assert find(tmp_path, f"[{{name: s, format: text, {patterns}}}]")[1] == []
    sources = "sources=[{name: s, paths: ['*'], cleaning: {decontaminate: [d]}}]"
    loaded = config.load(None, [f"root={tmp_path}", "output=/x", sources])
    wrong: list[str] = []
    assert inputs.evaluation_files(loaded, loaded.sources[0], wrong) == {}
    assert wrong == [problem("d")]


def test_globs_that_leave_out_nothing_of_their_name_are_told(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "private/b.txt", "c[1]/d.txt", "e.txt", "in/private/f.txt")

    def problems(*exclude: str) -> list[str]:
        return find(tmp_path, f"[{{name: s, paths: ['**'], exclude: {list(exclude)}}}]")[1]

    told = f"{tmp_path}/private is a directory; give 'private/**' for the files inside"
    assert problems("a.txt", "private") == [f"sources[0].exclude[1]: {told}"]
    assert problems("private/") == [f"sources[0].exclude[0]: {told}"]
    (problem,) = problems("**/private")
    assert problem.endswith("is a directory; give '**/private/**' for the files inside")
    assert problems("c[1]/**") == [
        "sources[0].exclude[0]: 'c[1]/**' leaves out nothing; give 'c[[]1]' for the name 'c[1]', "
        "which has the signs of a wildcard"
    ]
    # Those that need not find anything, and a name that is left out by another.
    assert problems("**/*.tmp", "none", "out/**", "private/**", "c[[]1]/*", "?.txt") == []
    assert problems("private", "private/**") == []


def test_a_name_with_the_signs_of_wildcards_is_told_how_to_give(tmp_path: Path) -> None:
    make(tmp_path, "run[1]/x.txt", "a*b.txt")
    for pattern in ("run[1]/x.txt", "run[1]/*.txt"):
        _, (problem,) = find(tmp_path, f"[{{name: s, paths: ['{pattern}']}}]")
        assert problem.startswith(f"sources[0].paths[0]: no file matches {pattern!r} below")
        assert problem.endswith(
            "; give 'run[[]1]' for the name 'run[1]', which has the signs of a wildcard"
        )
    files, problems = find(tmp_path, "[{name: s, paths: ['run[[]1]/*', 'a*b.txt']}]")
    assert problems == [] and len(files) == 2


def test_a_root_that_is_no_directory_is_told(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    for name, wrong in (("none", "does not exist"), ("a.txt", "is not a directory")):
        _, problems = find(tmp_path / name, "[{name: s, paths: ['*', 'x/*']}]")
        expected = (
            f"root: {tmp_path / name} {wrong}; give the directory below which the sources lie"
        )
        assert problems == [expected]
        files, problems = find(tmp_path / name, f"[{{name: s, paths: ['{tmp_path}/*.txt']}}]")
        assert problems == [] and len(files) == 1


def test_a_directory_that_is_read_twice_by_a_link_is_told(tmp_path: Path) -> None:
    make(tmp_path, "2024-01/a.txt", "2024-01/b.txt", "c.txt")
    (tmp_path / "d.txt").hardlink_to(tmp_path / "c.txt")
    (tmp_path / "e.txt").symlink_to("c.txt")
    (tmp_path / "2024-01/c.txt").symlink_to("../c.txt")
    assert find(tmp_path, "[{name: s, paths: ['**/*.txt']}]")[1] == []
    (tmp_path / "latest").symlink_to("2024-01")
    _, (problem,) = find(tmp_path, "[{name: s, paths: ['**/*.txt']}]")
    assert problem == (
        f"sources[0].paths: {tmp_path}/2024-01/a.txt and {tmp_path}/latest/a.txt are one file, "
        "which would be read twice by way of a link to a directory, as would 2 others; exclude the "
        "link"
    )
    for more in (", exclude: ['latest/**']", ", group_by: top"):
        assert find(tmp_path, f"[{{name: s, paths: ['**/*.txt']{more}}}]")[1] == []


def test_suffixes_tell_tables_and_archives(tmp_path: Path) -> None:
    names = ("a.parquet", "b.warc", "c.warc.gz", "d.warc.wet.gz", "e.wet.zst", "f.warc.wat.gz")
    for name in names:
        (tmp_path / name).touch()
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
    (tmp_path / "g.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    _, problems = find(tmp_path, "[{name: s, paths: ['*']}]")
    assert problems == [
        f"sources[0].paths: {tmp_path}/g.parquet.gz is compressed, and parquet is not read so; "
        "decompress it"
    ]


@pytest.mark.parametrize("more", ["", ", format: parquet"])
def test_parquet_named_by_the_compression_of_its_pages_is_parquet(
    more: str, tmp_path: Path
) -> None:
    # As in pandas' documentation: df.to_parquet("df.parquet.gzip", compression="gzip").
    for name, kind in (("a.parquet.gzip", "gzip"), ("b.parquet.snappy", "snappy")):
        pq.write_table(pa.table({"text": [name] * 3}), tmp_path / name, compression=kind)
    files, problems = find(tmp_path, f"[{{name: s, paths: ['*']{more}}}]")
    assert problems == []
    assert [(file.format, file.compression) for file in files] == [("parquet", None)] * 2
    for file in files:
        found = readers.survey(file, 1 << 20)
        texts = [record.text for record in readers.records(file, found, (0, 1), found.size)]
        assert texts == [file.relative] * 3
    (tmp_path / "c.parquet.lz4").write_bytes(b"\x04\x22\x4d\x18")
    _, (problem,) = find(tmp_path, f"[{{name: s, paths: ['c*']{more}}}]")
    assert "*.lz4 files are not read; decompress" in problem or "it is lz4 data, not" in problem


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


@pytest.mark.parametrize(
    ("grouped", "name"),
    [("directory", "x"), ("top", "x"), ("directory", ".")],
)
def test_directories_of_one_name_below_two_globs_are_not_joined(
    grouped: str, name: str, tmp_path: Path
) -> None:
    inside = "" if name == "." else f"{name}/"
    make(tmp_path, f"a/{inside}1.txt", f"b/{inside}2.txt", f"b/{inside}3.md", "b/y/4.txt")
    globs = "['a/**/*.txt', 'b/**/*.txt', 'b/**/*.md']"
    _, problems = find(tmp_path, f"[{{name: s, paths: {globs}, group_by: {grouped}}}]")
    assert problems == [
        f"sources[0].paths: {tmp_path}/a/{inside}1.txt and {tmp_path}/b/{inside}2.txt would be "
        f"joined in one document, called {name!r}, though they lie below different globs; give one "
        "glob from their common directory, or two sources"
    ]
    globs = "['[ab]/**/*.txt', '[ab]/**/*.t*']"
    files, problems = find(tmp_path, f"[{{name: s, paths: {globs}, group_by: {grouped}}}]")
    assert problems == []
    assert len({file.group for file in files}) == (2 if grouped == "top" else 3)


ROWS = b"".join(b'{"id": "%d", "text": "row %d"}\n' % (n, n) for n in range(9))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def problems_of(root: Path, name: str, data: bytes, more: str = "") -> list[str]:
    (root / name).write_bytes(data)
    _, problems = find(root, f"[{{name: s, paths: ['{name}']{more}}}]")
    (root / name).unlink()
    return problems


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.csv", b"id,text\n1,hello\n", "*.csv files are no plain text; convert the texts"),
        ("a.tsv.gz", gzip.compress(b"id\ttext\n"), "*.tsv files are no plain text"),
        ("a.xlsx", b"PK\3\4", "*.xlsx files are no plain text"),
        ("a.pdf", b"%PDF-1.7", "*.pdf files are no plain text"),
        ("a.arrow", b"ARROW1\0\0", "*.arrow files are no plain text"),
        ("a.zip", b"PK\3\4", "*.zip files are not read; unpack"),
        ("a.tar.gz", gzip.compress(bytes(999)), "*.tar files are not read; unpack"),
        ("a.jsonl.xz", b"\xfd7zXZ\0", "*.xz files are not read; decompress"),
        ("a.txt.bz2", b"BZh91AY&SY", "*.bz2 files are not read; decompress"),
        (
            "a.arc.gz",
            gzip.compress(b"filedesc://a"),
            "*.arc files are not read; convert them to WARC",
        ),
        ("rows", ROWS, "it is JSON lines; set format: jsonl, or format: text"),
        ("a.txt", ROWS, "it is JSON lines; set format: jsonl"),
        ("a.txt.zst", zstandard.compress(ROWS), "it is JSON lines; set format: jsonl"),
        ("a.data", ROWS[:29], "it is JSON lines; set format: jsonl"),
        ("a.log", b'{"text": "' + b"x" * 100_000, "it is JSON lines; set format: jsonl"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}]', "it is no JSON lines (an object a line)"),
        ("a.json", b'{\n "text": "a"\n}\n', "it is no JSON lines (an object a line)"),
        ("a.json.gz", gzip.compress(b'"text"'), "it is no JSON lines (an object a line)"),
        ("a.txt", gzip.compress(b"text"), "it is gzip data, not text; rename it"),
        ("a.jsonl", zstandard.compress(ROWS), "it is zstd data, not jsonl; rename it"),
        ("a.parquet", b"PK\3\4", "it is a zip archive or office document, not parquet"),
        ("a", b"PAR1\x15\x04\x15", "it is a parquet table, not text"),
        ("a", b"WARC/1.0\r\nWARC-Type: x\r\n", "it is a WARC archive, not text"),
        ("a.jsonl.gz", ROWS, "it is plain text, not gzip data as its name says; rename"),
        ("a.jsonl.zst", gzip.compress(ROWS), "it is gzip data, not zstd data as its name says"),
        ("a.warc.gz", b"WARC/1.0\r\n", "it is a WARC archive, not gzip data as its name says"),
        ("a.log", b'{"content": "' + b"x" * 100_000, "it is JSON lines; set format: jsonl"),
        ("a.log", b'{"content": "x"}', "it is JSON lines; set format: jsonl"),
        (
            "a.json",
            b'{"content": "x", "url": "y"}\n' * 2,
            "its first records have no key 'text', but 'content', 'url'; set text_field, set",
        ),
        ("a.json", b'{"content": "x"}', "its first records have no key 'text', but 'content';"),
        ("a.html", b"<p>", "*.html files are no plain text; convert the texts"),
        ("a.xml", b"<mediawiki>", "*.xml files are no plain text"),
        ("a.ipynb", b'{\n "cells": []}', "*.ipynb files are no plain text"),
        ("a.txt", b"{\\rtf1\\ansi a}", "it is an RTF document, not text"),
        ("a.txt", b"%!PS-Adobe-3.0\n", "it is a PostScript document, not text"),
        (
            "a.txt",
            b"\n<!DOCTYPE html>\n<html>",
            "it is an HTML page; extract its text (trafilatura)",
        ),
        (
            "page",
            b'<?xml version="1.0"?>\n<!-- a -->\n<HTML lang="en">',
            "it is an HTML page; extract",
        ),
        ("a.parquet", b"id,text\n", "it is plain text, not parquet; rename it, set `format`"),
        ("a.warc", b"only words", "it is plain text, not warc; rename it, set `format`"),
        ("a.txt", "text".encode("utf-16-le"), "it is text in UTF-16-LE; convert it to UTF-8"),
        ("a.txt", ("line\n" * 99).encode("utf-16-be"), "it is text in UTF-16-BE; convert it"),
        ("a.txt", "Title: \u706f\u53f0".encode("iso2022_jp"), "it is text in ISO-2022-JP;"),
        ("a.txt", "one".encode("utf-16"), "it is text in UTF-16; convert it to UTF-8"),
        ("a.txt", b"\xfe\xff" + "\u706f".encode("utf-16-be"), "it is text in UTF-16;"),
        ("a.jsonl", ROWS.decode().encode("utf-16"), "it is text in UTF-16; convert it to UTF-8"),
        ("a.jsonl.gz", gzip.compress("one".encode("utf-32")), "it is text in UTF-32;"),
        ("a.txt", "some text\n".encode("utf-32-le"), "it is text in UTF-32-LE; convert it"),
        ("a.txt", "some text\n".encode("utf-32-be"), "it is text in UTF-32-BE; convert it"),
        ("a.txt", POINTER, "it is a Git LFS pointer, not text; fetch the file that it stands for"),
        ("a.jsonl", POINTER, "it is a Git LFS pointer, not jsonl; fetch the file that it stands"),
        ("a.parquet", POINTER, "it is a Git LFS pointer, not parquet; fetch the file that it"),
        ("a.jsonl.gz", POINTER, "it is a Git LFS pointer, not gzip data as its name says; fetch"),
    ],
)
def test_what_a_file_holds_contradicts_how_it_would_be_read(
    name: str, data: bytes, problem: str, tmp_path: Path
) -> None:
    (found,) = problems_of(tmp_path, name, data)
    assert found.startswith(f"sources[0].paths: {tmp_path}/{name}: {problem}")


def test_json_lines_of_any_name_are_jsonl_and_what_is_set_goes_first(tmp_path: Path) -> None:
    for name, data in (
        ("c4.json.gz", gzip.compress(ROWS)),
        ("a.json", ROWS),
        ("b.JSONLINES", ROWS),
        ("c.json", b'\xef\xbb\xbf{"text": "one"}'),
        ("d.json", b'{"raw": "' + b"x" * 100_000 + b'", "text": "one"}\n'),
    ):
        assert problems_of(tmp_path, name, data) == []
        (tmp_path / name).write_bytes(data)
    files, _ = find(tmp_path, "[{name: s, paths: ['*']}]")
    assert {file.format for file in files} == {"jsonl"}
    page = ("b.txt", b"<!doctype html>")
    others = (("a.csv", b"a,b\n"), ("a.json", b"[1]"), ("a.txt", ROWS), ("rows", ROWS))
    for name, data in (page, *others):
        assert problems_of(tmp_path, name, data, ", format: text") == []
        assert problems_of(tmp_path, name, data, ", group_by: top") == []
    for name, data in (
        ("a.txt", b"PARIS is a text\n"),
        ("b.txt", b"ORC, a word\n"),
        ("c.txt", b"{a} is\n{b}\n"),
        ("d.txt", b"[1] A footnote.\n"),
        ("e.txt", b""),
        ("f.txt", b'{"a": 1}\nis one line of JSON\n'),
        ("g.txt", b"\xe9\xff"),
        ("h.jsonl", b"[1]\n"),
        ("i.json", b""),
        ("j.txt", b"a\0b"),
        ("k.txt", b"\x1b[1mbold\x1b$"),
        ("l.txt", b"{a: 1}"),
        # Source code, and texts about pages.
        ("l.warc", b"\r\n\r\nWARC/1.0\r\nWARC-Type: conversion\r\n"),
        ("l.php", b"<!DOCTYPE html>\n<?php echo 1 ?>"),
        ("l.md", b"<html>"),
        ("o.txt", b"<html> is a tag"[1:]),
        ("p.txt", b"<htmlish>"),
        # Damage, which is told record by record.
        ("m.jsonl.gz", bytes(99)),
        ("n.jsonl.gz", b"\xff" * 99),
    ):
        assert problems_of(tmp_path, name, data) == [], name
    field = "\u0442\u0435\u043a\u0441\u0442"
    row = json.dumps({field: "a"}, ensure_ascii=False).encode()
    assert problems_of(tmp_path, "a.json", row, f", text_field: {field}") == []


def test_a_key_is_refused_where_no_file_has_keys(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "b.warc", "c.jsonl")
    (tmp_path / "b.warc").write_bytes(b"WARC/1.0\r\n")
    _, problems = find(tmp_path, "[{name: s, paths: ['a*', 'b*'], text_field: body}]")
    assert problems == [
        "sources[0].text_field: has no effect on text and warc, where no keys or columns are read; "
        "leave it out"
    ]
    _, problems = find(tmp_path, "[{name: s, paths: ['a*', 'c*'], text_field: body}]")
    assert problems == []


def test_files_of_one_suffix_are_one_problem(tmp_path: Path) -> None:
    make(tmp_path, "d/a.csv", "d/b.csv", "e/c.CSV", "e/d.txt")
    _, problems = find(tmp_path, "[{name: s, paths: ['**/*']}]")
    (problem,) = problems
    assert problem.startswith(f"sources[0].paths: {tmp_path}/d/a.csv and 2 others: *.csv files")
    _, problems = find(tmp_path, "[{name: s, paths: ['**/*'], exclude: ['**/*.csv', '**/*.CSV']}]")
    assert problems == []


def test_of_several_files_the_one_of_another_format_is_named(tmp_path: Path) -> None:
    for name, data in (("a.txt", b"one"), ("b.txt", ROWS), ("c.txt", b"three")):
        (tmp_path / name).write_bytes(data)
    _, (problem,) = find(tmp_path, "[{name: s, paths: ['*']}]")
    assert problem.startswith(f"sources[0].paths: {tmp_path}/b.txt: it is JSON lines; set format")
    _, (problem,) = find(tmp_path, "[{name: s, paths: ['b*', 'c*']}]")
    assert problem.startswith(f"sources[0].paths: {tmp_path}/b.txt: it is JSON lines; set format")


def test_a_text_that_was_not_looked_into_is_rejected_where_it_is_read(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number:03}.txt").write_bytes(b"text")
    odd = {"001.txt": ROWS, "003.txt": b"PK\3\4", "005.txt": b"<html><body>"}
    for name, data in odd.items():
        (tmp_path / name).write_bytes(data)
    files, problems = find(tmp_path, "[{name: s, paths: ['*.txt']}]")
    assert problems == []
    for file in files[1], files[3], files[5]:
        found = readers.survey(file, 1 << 20)
        (reject,) = readers.records(file, found, (0, 1), found.size)
        assert isinstance(reject, Reject) and reject.reason == "unsupported file"
