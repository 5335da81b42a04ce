"""Commands, exit codes and messages, as a person meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import cli

SOURCES = "sources: [{name: s, paths: ['*.jsonl', '*.txt']}]\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, its configuration and a finished data set, in one directory."""
    home = tmp_path_factory.mktemp("cli")
    lines = [
        json.dumps({"text": f"document {n} reads and writes {n * n}. " * 20}) for n in range(60)
    ]
    (home / "a.jsonl").write_text("\n".join([*lines, "[]", ""]))
    (home / "c.yaml").write_text(
        f"root: {home}\noutput: {home / 'set'}\n{SOURCES.replace(', ' + repr('*.txt'), '')}"
        "tokenizer: {vocab_size: 320}\nshards: {count: 3}\n"
    )
    assert cli.main(["run", str(home / "c.yaml")]) == 0
    return home


def test_the_whole_way_by_the_installed_command(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "set")
    command = [sys.executable, "-m", "data_prep.cli", "run", str(home / "c.yaml")]
    made = subprocess.run(
        [*command, f"output={output}", "workers=2"], check=False, capture_output=True, text=True
    )
    assert made.returncode == 0
    assert "61 records in: 60 documents out, 1 rejected" in made.stdout
    assert f"data set: {output}" in made.stdout
    assert f"next: data-prep report {output}" in made.stdout
    assert "datatrove" not in made.stderr
    assert cli.main(["run", str(home / "c.yaml"), f"output={output}"]) == 0
    told = capsys.readouterr().out
    assert "is finished already, from the same configuration: nothing to do" in told


def test_in_two_steps(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(home / "c.yaml"), f"output={tmp_path / 'set'}"]
    assert cli.main(["tokenizer", *words]) == 0
    assert f"tokenizer: {tmp_path / 'set' / 'tokenizer.model'}" in capsys.readouterr().out
    assert cli.main(["shards", *words]) == 0
    manifest = (tmp_path / "set" / "manifest.json").read_bytes()
    assert manifest == (home / "set" / "manifest.json").read_bytes()


def test_stats_in_words_and_as_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stats", str(home / "set")]) == 0
    assert "rejected" in capsys.readouterr().out
    assert cli.main(["stats", "--json", str(home / "set")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["documents"], found["rejected_by_reason"]) == (60, {"not an object": 1})


def test_verify_tells_damage_with_exit_code_1(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(home / "set")]) == 0
    assert "whole: 60 documents" in capsys.readouterr().out
    for path in (home / "set").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-2048])
    (tmp_path / "shard-00002.tar").unlink()
    assert cli.main(["verify", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"data-prep: {tmp_path}: 2 problems" in error
    assert "shard-00001.tar: is cut" in error
    assert "shard-00002.tar: is missing" in error
    assert cli.main(["stats", str(tmp_path)]) == 1


def test_all_mistakes_are_reported_at_once_without_torch(home: Path) -> None:
    code = (
        "import sys\nfrom data_prep import cli\ncode = cli.main(sys.argv[1:])\n"
        "assert not {'torch', 'datatrove', 'pretrain'} & set(sys.modules)\nsys.exit(code)"
    )
    words = ["sed=1", "seed=x", "workers=-1", "tokenizer.vocab_size=1", "shards.count=many"]
    told = subprocess.run(
        [sys.executable, "-c", code, "run", str(home / "c.yaml"), *words],
        check=False,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 2
    assert told.stdout == ""
    assert told.stderr.splitlines() == [
        "data-prep run: this command cannot run:",
        "  - sed: unknown key; did you mean seed?",
        "  - seed: expected a whole number, found 'x'",
        "  - workers: expected at least 0, found -1",
        "  - tokenizer.vocab_size: expected 261 to 1048576, found 1",
        "  - shards.count: expected a whole number, found 'many'",
    ]


def test_missing_files_are_reported_together(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(SOURCES)
    (tmp_path / "file").touch()
    words = [f"root={home}", f"output={tmp_path / 'file'}", "tokenizer.path=nowhere.model"]
    assert cli.main(["run", str(tmp_path / "c.yaml"), *words]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "data-prep run: this command cannot run:",
        f"  - output: {tmp_path / 'file'} is a file; give a directory",
        "  - tokenizer.path: nowhere.model does not exist; prepare or copy it first",
        f"  - sources[0].paths[1]: no file matches '*.txt' below {home}",
    ]


@pytest.mark.parametrize("command", ["run", "check"])
def test_missing_evaluation_files_are_reported_with_mistakes_in_values(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    def told(*words: str) -> list[str]:
        assert cli.main([command, str(home / "c.yaml"), *words]) == 2
        first, *rest = capsys.readouterr().err.splitlines()
        assert first == f"data-prep {command}: this command cannot run:"
        return [line.removeprefix("  - ") for line in rest]

    exam = "sources[0].cleaning.decontaminate=[exam.jsonl]"
    value = "seed: expected at least 0, found -1"
    missing = f"sources[0].cleaning.decontaminate: no file matches 'exam.jsonl' below {home}"
    assert told("seed=-1", exam) == [value, missing]
    assert told("seed=-1", exam, "sources[0].cleaning.max_words=9")[1:] == [
        "sources[0].cleaning.max_words: has no effect without gopher_quality; add it to rules",
        missing,
    ]
    # Below another root they may be there.
    assert told("seed=-1", exam, "rot=x") == ["rot: unknown key; did you mean root?", value]
    # A mistake in the pattern itself is reported once.
    elsewhere = "sources[0].cleaning.decontaminate=['~nobody-here/z']"
    assert len(told("seed=-1", elsewhere)) == 2
    (home / "exam.jsonl").touch()
    assert told("seed=-1", exam) == [value]
    (home / "exam.jsonl").unlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: cannot be read (No such file or directory)"),
        (["run", "{home}/c.yaml", "seed=9"], "another configuration (seed: 1 there, 9 now)"),
        (["run", "{home}/c.yaml", "shards.count=4"], "(shards.count: 3 there, 4 now)"),
        (["shards", "{home}/c.yaml", "output={home}/new"], "run `data-prep tokenizer`"),
        (["run", "{home}/c.yaml", "output={home}/big", "shards.count=99"], "at most 60"),
        (
            ["tokenizer", "{home}/c.yaml", "output={home}/v", "tokenizer.vocab_size=9999"],
            "lower it",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    words: list[str], message: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([word.format(home=home) for word in words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(("data-prep: ", f"data-prep {words[0]}: "))
    assert message in err
    assert "Traceback" not in err


def test_mistakes_in_the_words_are_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["rnu"], ["verify", "nowhere"], ["stats", ".", " extra"]):
        assert cli.main(words) == 2
    assert "DIR: nowhere: there is no such directory; expected the" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "label"),
    [
        ("run {home}/c.yaml output={out}", "output"),
        ("run {home}/c.yaml output={out} --dry-run", "output"),
        ("submit {home}/c.yaml output={out} slurm.partition=p", "output"),
        ("tokenizer {home}/c.yaml output={out}", "output"),
        ("shards {home}/c.yaml output={out}", "output"),
        ("check {home}/c.yaml output={out}", "output"),
        ("reshard {home}/set --shards 2 --output {out}", "--output"),
        ("report {home}/set --output {out}", "--output"),
        ("recall {out} --documents 1", "FILE.jsonl[.gz]"),
        ("pairs {out} --books {home}/set", "FILE.jsonl[.gz]"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_mistake(
    home: Path, tmp_path: Path, words: str, label: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file/below/x"
    assert cli.main([word.format(home=home, out=out) for word in words.split()]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"data-prep {words.split()[0]}: this command cannot run:",
        f"  - {label}: {out} cannot be made, since {tmp_path / 'file'} is not a directory; give "
        "another place",
    ]


@pytest.mark.parametrize(
    ("words", "label", "ends"),
    [
        ("report {home}/set --output {out}", "--output", ".html"),
        ("recall {out} --documents 1", "FILE.jsonl[.gz]", ".jsonl or .jsonl.gz"),
        ("pairs {out} --books {home}/set", "FILE.jsonl[.gz]", ".jsonl or .jsonl.gz"),
        ("mqar {out} --documents 1", "FILE.jsonl[.gz]", ".jsonl or .jsonl.gz"),
    ],
)
@pytest.mark.parametrize("name", ["manifest.json", "a.jsonl.zst", "a.parquet"])
def test_a_file_to_write_is_named_as_what_it_will_be(
    home: Path, tmp_path: Path, name: str, words: str, label: str, ends: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / name).write_text("of the user")
    out = tmp_path / name
    assert cli.main([word.format(home=home, out=out) for word in words.split()]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"  - {label}: {out}: expected a name that ends in {ends}, which is what is written"
    ]
    assert out.read_text() == "of the user"


def test_check_refuses_the_directory_of_another_data_set_as_run_does(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(home / "c.yaml")]) == 0
    for verb in ("check", "run"):
        assert cli.main([verb, str(home / "c.yaml"), "seed=2"]) == 2
        told = f"{home / 'set'}: holds a data set of another configuration (seed: 1 there, 2 now)"
        assert told in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("program", ["data_prep.cli", "pretrain.cli"])
def test_the_exit_code_is_that_of_the_mistake_also_where_nobody_can_be_told(
    program: str, tmp_path: Path
) -> None:
    # Else nothing stays in a buffer, which the interpreter flushes again as it exits.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    verb = "verify" if program == "data_prep.cli" else "plan"
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", program, verb, str(tmp_path / "nowhere")],
            stderr=full, env=environment, check=False,
        )  # fmt: skip
    assert ended.returncode == 2


def test_a_limit_that_is_given_twice_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(home / "c.yaml"), f"output={tmp_path}/o", "--limit", "3", "limit=5"]
    assert cli.main(words) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  - --limit: limit=5 is given, too; give one of the two"
    ]


def test_bounds_of_passages_are_refused_where_books_stay_whole(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pairs", str(tmp_path / "o.jsonl"), "--books", str(home / "set")]
    assert cli.main([*words, "--min-tokens", "5", "--max-tokens", "4"]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  - --min-tokens: has no effect without --passages; remove it, or give --passages N",
        "  - --max-tokens: has no effect without --passages; remove it, or give --passages N",
    ]
    assert cli.main([*words, "--min-tokens", "5", "--max-tokens", "4", "--passages", "1"]) == 2
    assert "expected bounds of a length, found 5 to 4" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["reshard {} --shards 1 --output o", "verify {}", "stats {}",
                                  "report {}", "recall o.jsonl --documents 1 --filler {}",
                                  "pairs o.jsonl --books {}"])  # fmt: skip
def test_what_a_directory_is_instead_of_a_data_set_is_said(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000001/manifest.sha256").touch()
    (tmp_path / "checkpoints/step-00000001/manifest.json").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for path, said in {
        "nowhere": "there is no such directory; expected",
        "file": "is not a directory; expected",
        ".": "is the directory of a training run; expected",
        "checkpoints/step-00000001": "is a checkpoint of a model; expected",
        "empty": "no manifest.json: not a data set, or its preparation has not finished",
    }.items():
        assert cli.main(verb.format(tmp_path / path).split()) == 2
        (problem,) = capsys.readouterr().err.splitlines()[1:]
        assert f": {tmp_path / path}: {said}" in problem


def test_a_reader_that_is_gone_ends_a_command_silently(home: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep.cli", "stats", "--json", str(home / "set")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


def test_help_names_every_key_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    for words in ("tokenizer.sample_bytes = 20000000", "sources[].paths", "examples:", "continues"):
        assert words in told


def test_a_command_restores_the_handlers_of_signals(home: Path, tmp_path: Path) -> None:
    handler = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert cli.main(["run", str(home / "c.yaml")]) == 0
        assert cli.main(["run", str(home / "c.yaml"), f"output={tmp_path}", "shards.count=99"]) == 2
        assert [signal.getsignal(number) for number in before] == [handler, handler]
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_with_one_line_and_the_command_continues(
    number: signal.Signals, home: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    # Small units: there is time to be interrupted.
    code = (
        "import sys\nfrom data_prep import cli\nfrom data_prep.pipeline import workspace\n"
        "workspace.CUT_BYTES = 3000\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    words = ["run", str(home / "c.yaml"), f"output={output}", "workers=2"]
    command = [sys.executable, "-c", code, *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list((output / "work" / "sample").glob("*.json")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert told == "data-prep: stopped; what is done is kept, the same command continues\n"
    assert process.returncode == 128 + number
    assert cli.main(words) == 2  # units of another size: what is done would not fit
    assert subprocess.run(command, check=False).returncode == 0
    assert (output / "manifest.json").read_bytes() == (home / "set/manifest.json").read_bytes()
