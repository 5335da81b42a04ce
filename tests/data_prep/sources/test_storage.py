"""Files under URLs, from a web server and an S3 server on this machine."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from data_prep import cli, config
from data_prep.dataset import shards
from data_prep.pipeline import pipeline
from data_prep.sources import globs, inputs, storage


class Web(ThreadingHTTPServer):
    """Serves `files`; answers the first `failures` requests for a file's bytes with 503."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.failures, self.ranges, self.accept_ranges = 0, True, ""
        self.tags = True
        self.asked: list[str] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    server: Web

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, *, send: bool) -> None:
        web = self.server
        wanted = self.headers.get("Range") if web.ranges else None
        data = web.files.get(self.path.lstrip("/"))
        code, start, stop = 200, 0, len(data or b"")
        if data is None:
            code = 404
        elif send and web.failures:
            web.failures -= 1
            code, data = 503, None
        elif wanted:
            web.asked.append(wanted)
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
            assert match
            code, start, stop = 206, int(match[1]), min(int(match[2]) + 1, len(data))
        body = (data or b"")[start:stop]
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        if web.accept_ranges:
            self.send_header("Accept-Ranges", web.accept_ranges)
        if data is not None and web.tags:
            self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        if code == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data or b'')}")
        self.end_headers()
        if send:
            self.wfile.write(body)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(storage, "_WAITS", (0.01, 0.01, 0.01))
    with Web() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of an S3 server; its credentials and place are in the environment."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(key, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        boto3.client("s3").create_bucket(Bucket="corpus")
        yield f"http://127.0.0.1:{port}"
    server.stop()


def put(key: str, data: bytes) -> None:
    boto3.client("s3").put_object(Bucket="corpus", Key=key, Body=data)


def story(kind: str, n: int) -> str:
    return f"{kind} number {n}: {hashlib.sha256(f'{kind}{n}'.encode()).hexdigest()} and on " * 2


def lines(count: int, kind: str) -> bytes:
    return b"".join(
        json.dumps({"id": f"{kind} {n}", "text": story(kind, n)}).encode() + b"\n"
        for n in range(count)
    )


def rows(path: Path, count: int) -> bytes:
    texts = [story("row", n) for n in range(count)]
    table = pa.table({"text": texts, "id": [f"row {n}" for n in range(count)]})
    pq.write_table(table, path, row_group_size=40)
    return path.read_bytes()


def words(output: Path, *paths: str) -> list[str]:
    """Settings of a small data set."""
    sources = "sources=[" + ", ".join(f"{{name: s{n}, {p}}}" for n, p in enumerate(paths)) + "]"
    model = ["tokenizer.vocab_size=320", "shards.count=3", "workers=2"]
    return [f"output={output}", sources, *model]


def test_the_web_gives_what_is_at_a_url(web: Web) -> None:
    url = web.url("d/a%20b.jsonl")
    web.files["d/a%20b.jsonl"] = data = lines(2000, "web")
    listed = storage.page(url)
    assert (listed.path, listed.relative, listed.status.bytes) == (url, "d/a b.jsonl", len(data))
    assert listed.status == storage.status(url)
    with storage.open_binary(url, 10_000) as file:
        assert file.read(100) == data[:100]
        assert file.read(len(data)) == data[100:]
        assert file.seek(5000) == file.tell() == 5000
        assert file.read(100) == data[5000:5100]
    assert web.asked[0] == "bytes=0-9999"
    web.files["d/a%20b.jsonl"] = data.upper()
    assert storage.status(url) != listed.status


def test_what_fails_for_a_moment_is_asked_for_again(web: Web) -> None:
    web.files["a"] = data = lines(100, "again")
    web.failures = 3
    with storage.open_binary(web.url("a")) as file:
        assert file.read() == data
    web.failures = 9
    with (
        storage.open_binary(web.url("a")) as file,
        pytest.raises(OSError, match="its server answers 503") as caught,
    ):
        file.read()
    assert caught.value.filename == web.url("a")
    assert web.failures == 5


def test_a_file_that_shrinks_while_it_is_read_is_reported(web: Web) -> None:
    web.files["a"] = lines(100, "long")
    with storage.open_binary(web.url("a"), 100) as file:
        assert len(file.read(100)) == 100
        web.files["a"] = lines(1, "short")
        with pytest.raises(OSError, match="received 106 of 1000 bytes at 100") as caught:
            file.read(1000)
    assert caught.value.filename == web.url("a")


def test_a_server_without_ranges_is_reported(web: Web) -> None:
    web.files["a"], web.ranges = lines(1000, "whole"), False
    with storage.open_binary(web.url("a"), 1000) as file:
        file.seek(50_000)
        with pytest.raises(OSError, match="does not support byte ranges"):
            file.read(10)
    web.accept_ranges = "none"
    with pytest.raises(OSError, match="does not support byte ranges"):
        storage.open_binary(web.url("a"))


def test_an_empty_file_on_the_web_is_empty(web: Web) -> None:
    web.files["a"] = b""
    with storage.open_binary(web.url("a")) as file:
        assert (file.seek(0), file.read(10), file.read()) == (0, b"", b"")


def test_what_cannot_be_listed_is_reported_with_its_cause(
    web: Web, s3: str, tmp_path: Path
) -> None:
    names = ["http://127.0.0.1:1/a", "s3://none/*.txt", "s3://corpus/none/*", "nosuch://x/y"]
    given = ", ".join(f"'{name}'" for name in [web.url("none"), *names])
    problems: list[str] = []
    wanted = config.load(None, words(tmp_path / "set", f"paths: [{given}]"))
    assert inputs.find(wanted, problems) == []
    expected = ["answers 404", "127.0.0.1:1", "s3://none/", "no file matches", "nosuch"]
    assert len(problems) == len(expected)
    for index, part in enumerate(expected):
        (problem,) = [one for one in problems if one.startswith(f"sources[0].paths[{index}]")]
        assert part in problem


def test_s3_is_matched_as_a_tree(s3: str, tmp_path: Path) -> None:
    names = ("t/a.jsonl", "t/u/b.jsonl", "t/u/v/c.jsonl", "t/u/d.txt")
    for name in names:
        put(name, b"x")
    globs = "paths: ['s3://corpus/t/**/*.jsonl'], exclude: ['s3://corpus/t/u/v/*']"
    problems: list[str] = []
    wanted = config.load(None, words(tmp_path / "set", globs))
    found = inputs.find(wanted, problems)
    assert problems == []
    assert [file.relative for file in found] == ["a.jsonl", "u/b.jsonl"]
    assert found[1].path == "s3://corpus/t/u/b.jsonl"
    below = config.load(None, ["root=s3://corpus/t", *words(tmp_path / "set", "paths: ['u/*']")])
    assert [file.name for file in inputs.find(below, problems)] == ["s0/b.jsonl", "s0/d.txt"]


def test_a_remote_corpus_gives_the_bytes_of_a_local_one(
    web: Web, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.pipeline.workspace.CUT_BYTES", 4000)
    packed = gzip.compress(lines(150, "packed"), mtime=0)
    plain, table = lines(150, "plain"), rows(tmp_path / "table", 200)
    here = tmp_path / "here"
    (here / "p").mkdir(parents=True)
    for name, data in (("p/a.jsonl.gz", packed), ("b.jsonl", plain), ("c.parquet", table)):
        (here / name).write_bytes(data)
    web.files["p/a.jsonl.gz"] = packed
    put("one/b.jsonl", plain)
    put("one/c.parquet", table)
    local = ["paths: ['**/*.gz']", "paths: ['*.jsonl']", "paths: ['*.parquet']"]
    pipeline.run(config.load(None, [f"root={here}", *words(tmp_path / "local", *local)]))
    remote = [
        f"paths: ['{web.url('p/a.jsonl.gz')}']",
        "paths: ['s3://corpus/one/*.jsonl']",
        "paths: ['s3://corpus/one/**/*.parquet']",
    ]
    pipeline.run(config.load(None, words(tmp_path / "remote", *remote)))
    ours, theirs = (shards.read_manifest(tmp_path / name) for name in ("local", "remote"))
    assert ours.documents == 500
    assert ours.inputs == theirs.inputs
    assert ours.shards == theirs.shards
    assert shards.verify(tmp_path / "remote") == []
    assert "test" not in json.dumps(theirs.configuration)


def test_a_network_failure_is_one_message_and_the_command_continues(
    web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    web.files["a.jsonl"] = lines(200, "web")
    (tmp_path / "c.yaml").write_text("")
    command = ["run", str(tmp_path / "c.yaml")]
    command += words(tmp_path / "set", f"paths: ['{web.url('a.jsonl')}']")
    web.failures = 10**9
    assert cli.main(command) == 1
    shown = capfd.readouterr().err
    assert shown.splitlines()[-1] == (
        f"data-prep: {web.url('a.jsonl')}: its server answers 503 Service Unavailable; when that "
        "is fixed, the same command continues"
    )
    assert "Traceback" not in shown
    web.failures = 0
    assert cli.main(command) == 0
    assert shards.read_manifest(tmp_path / "set").documents == 200


def test_a_remote_file_that_changes_stops_the_run(web: Web, tmp_path: Path) -> None:
    web.files["a.jsonl"] = lines(200, "web")
    wanted = config.load(None, words(tmp_path / "set", f"paths: ['{web.url('a.jsonl')}']"))
    pipeline.run_tokenizer(wanted)
    web.files["a.jsonl"] = lines(200, "bew")
    with pytest.raises(inputs.InputChangedError, match=r"a\.jsonl: changed since"):
        pipeline.run(wanted)


def test_a_file_of_a_server_without_etags_is_read_to_see_whether_it_changed(
    web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    web.tags = False
    web.files["a.jsonl"] = lines(200, "web")
    (tmp_path / "c.yaml").write_text("")
    command = ["run", str(tmp_path / "c.yaml")]
    command += words(tmp_path / "set", f"paths: ['{web.url('a.jsonl')}']")
    some = [*command, "limit=9", f"output={tmp_path / 'some'}"]  # which does not read all of it
    for wanted in (command, some):
        assert cli.main(wanted) == cli.main(wanted) == 0
    web.files["a.jsonl"] = lines(200, "bew")
    assert cli.main(command) == 2
    assert "was made from other input files: s0/a.jsonl differs" in capfd.readouterr().err


def test_two_colons_belong_to_a_url_of_the_web(web: Web) -> None:
    # As in http://[::1]/x; fsspec divides other URLs there.
    web.files["a::b.jsonl"] = lines(3, "row")
    url = web.url("a::b.jsonl")
    assert storage.page(url).relative == "a::b.jsonl"
    with storage.open_binary(url) as raw:
        assert raw.read() == lines(3, "row")


def test_secrets_and_wildcards_are_refused_in_urls() -> None:
    wrong = ["https://me:word@h/a", "https://h/a?X-Amz-Signature=1", "https://h/*.jsonl"]
    right = ["https://h/a?download=true", "http://[::1]:9/x.jsonl", "http://h/a?list=[1]"]
    source = config.SourceConfig(name="s", paths=[*wrong, *right])
    assert [problem[:30] for problem in source.problems()] == [
        "paths[0]: holds credentials, w",
        "paths[1]: holds credentials, w",
        "paths[2]: the web cannot list ",
    ]


def test_a_listing_on_a_server_finds_what_a_local_one_finds(s3: str) -> None:
    for key in ("list/a/1.txt", "list/a/b/2.txt", "list/3.md", "list/.h/4.txt"):
        put(key, b"text")
    root = "s3://corpus/list"
    for pattern, names in (
        ("**/*.txt", ["a/1.txt", "a/b/2.txt"]),
        ("*/*.txt", ["a/1.txt"]),
        ("*", ["3.md"]),
        ("a/**", ["1.txt", "b/2.txt"]),
        ("*/b/**/2*", ["a/b/2.txt"]),
        ("none/*", []),
        ("a/1.txt", ["1.txt"]),
    ):
        (found,) = globs.matches(root, [pattern], globs.Excluded(root, []))
        assert isinstance(found, globs.Found) and not found.directories
        assert [one.relative for one in found.files] == names, pattern
    for pattern, directories in (("a", ["a"]), ("a/", ["a"]), ("[ab]", ["a"]), ("no/", [])):
        (found,) = globs.matches(root, [pattern], globs.Excluded(root, []))
        assert found == globs.Found([], [f"{root}/{name}" for name in directories]), pattern


def test_an_object_that_marks_a_directory_is_no_file(s3: str) -> None:
    for key in ("marked/", "marked/a/", "marked/a/b/", "marked/empty/"):
        put(key, b"")
    put("marked/a/1.txt", b"text")
    put("marked/a/b/2.txt", b"text")
    root = "s3://corpus/marked"
    for pattern, names in (
        ("**", ["a/1.txt", "a/b/2.txt"]),
        ("a/**", ["1.txt", "b/2.txt"]),
        ("*/*", ["a/1.txt"]),
        ("a/*", ["1.txt"]),
        ("empty/**", []),
    ):
        (found,) = globs.matches(root, [pattern], globs.Excluded(root, []))
        assert isinstance(found, globs.Found) and not found.directories
        assert [one.relative for one in found.files] == names, pattern


def test_a_bucket_that_does_not_exist_is_no_empty_one(s3: str) -> None:
    root = "s3://mistyped/list"
    for pattern in ("**/*.txt", "*.txt", "1.txt"):
        (found,) = globs.matches(root, [pattern], globs.Excluded(root, []))
        assert isinstance(found, str) and "404 The specified bucket does not exist" in found


class _Failing(BaseHTTPRequestHandler):
    """As an S3 server that answers every request with an error, of the status `code`."""

    code = 0

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"<Error><Code>Wrong</Code><Message>It fails</Message></Error>")

    def _answer(self, body: bytes) -> None:
        self.send_response(self.code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize(("code", "may_pass"), [(500, True), (503, True), (400, False)])
def test_an_s3_server_that_fails_is_told_from_one_that_refuses(
    s3: str, monkeypatch: pytest.MonkeyPatch, code: int, may_pass: bool
) -> None:
    import s3fs

    monkeypatch.setattr(_Failing, "code", code)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(OSError, match=f"its server answers {code} ") as asked:
            storage.open_binary("s3://corpus/list/1.txt")
        with pytest.raises(OSError, match=f"its server answers {code} It fails") as listed:
            storage.entries("s3://corpus/list")
        for raised in (asked, listed):
            assert isinstance(raised.value, storage.UnansweredError) == may_pass
        server.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()


class _Refusing(BaseHTTPRequestHandler):
    """As an S3 server that lists two directories, of which it refuses to list the second."""

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = parse_qs(urlsplit(self.path).query)
        prefix, flat = asked.get("prefix", [""])[0], "delimiter" not in asked
        refused = flat or prefix == "list/b/"
        names = "".join(
            f"<CommonPrefixes><Prefix>list/{n}/</Prefix></CommonPrefixes>" for n in "ab"
        )
        if prefix == "list/a/":
            names = "<Contents><Key>list/a/1.txt</Key><Size>4</Size><ETag>x</ETag></Contents>"
        body = f"<ListBucketResult>{names}</ListBucketResult>"
        if refused:
            body = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403 if refused else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


def test_a_listing_that_a_server_refuses_is_no_empty_one(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        s3fs.S3FileSystem.clear_instance_cache()
        root = "s3://corpus/list"
        for pattern in ("**/*.txt", "*/*.txt"):
            (found,) = globs.matches(root, [pattern], globs.Excluded(root, []))
            assert isinstance(found, str) and "Access Denied" in found
        server.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()
