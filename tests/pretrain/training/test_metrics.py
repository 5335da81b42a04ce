"""Records of a run: what is kept, dropped and sent on, and that no secret is among it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.checkpoint.attempts import Attempt
from pretrain.config.root import Config
from pretrain.config.run import WandbConfig
from pretrain.training import metrics
from pretrain.training.metrics import (
    Meter,
    Recorder,
    Work,
    configure_logging,
    log_line,
    peak_memory,
    read_records,
)
from pretrain.training.trackers import run_identity
from tests import ranks

UNTRACKED = Config(wandb=WandbConfig(mode="disabled"))
# Of the form that wandb accepts, and one that nothing should ever look at.
SECRETS = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "HF_TOKEN": "hf_qwertzuiopasdf"}


def lines(path: Path) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in read_records(path)]


def test_the_half_line_of_a_killed_writer_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == []
    for half in ("", "{", '{"kind": "train", "st', '{"kind": "train", "step": 3'):
        path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n' + half)
        assert lines(path) == [("train", 1), ("train", 2)]
    path.write_text('{"kind": "train", "step": 3}')  # an editor's, which ends a file without \n
    assert lines(path) == [("train", 3)]


# Of a hand, of two writers, of a power loss, and of no step.
UNREADABLE = [
    b"",
    b"  ",
    b'{"kind": "tr{"kind"',
    bytes(40),
    b"\xff",
    b"[1]",
    b'{"kind": "x"}',
    b"7",
]


def test_a_line_that_cannot_be_read_costs_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    readable = [b'{"kind":"train",  "step": %d}' % step for step in range(1, 20)]
    readable[4] += b"\r"
    mixed = [*readable[:3], *UNREADABLE, *readable[3:9], b"", *readable[9:]]
    path.write_bytes(b"\n".join([*mixed, b'{"kind": "train", "st']))
    assert lines(path) == [("train", step) for step in range(1, 20)]
    with caplog.at_level("WARNING"):
        Recorder(Attempt(tmp_path, 1), UNTRACKED, 15).close()
    # To the byte, but for the steps that are repeated and the line that was cut.
    assert path.read_bytes() == b"\n".join([*mixed[:-4], b""])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 6 and said[0] == f"{path}: line 6 cannot be read; it is kept as it is"
    Recorder(Attempt(tmp_path, 1), UNTRACKED, 15).close()
    assert path.read_bytes() == b"\n".join([*mixed[:-4], b""])


def test_a_resumed_run_drops_what_was_recorded_after_its_checkpoint(tmp_path: Path) -> None:
    first = Recorder(Attempt(tmp_path, 1), UNTRACKED, 0)
    for step in (1, 2, 3):
        first.record("train", {"step": step, "loss": float(step)})
        if step == 2:
            first.record("validation", {"step": step, "loss": 9.0})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')  # killed here
    second = Recorder(Attempt(tmp_path, 1), UNTRACKED, 2)
    assert lines(path) == [("train", 1), ("train", 2), ("validation", 2)]
    second.record("train", {"step": 3, "loss": 3.5})
    second.close()
    first.close()
    assert lines(path) == [("train", 1), ("train", 2), ("validation", 2), ("train", 3)]
    assert read_records(path)[-1]["loss"] == 3.5


def test_a_record_is_on_disk_when_it_was_made_and_is_strict_json(tmp_path: Path) -> None:
    recorder = Recorder(Attempt(tmp_path, 1), UNTRACKED, 0)
    recorder.record("train", {"step": 1, "grad_norm": math.inf, "loss": math.nan, "gates": [[0.5]]})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == (
        '{"kind": "train", "step": 1, "grad_norm": null, "loss": null, "gates": [[0.5]]}\n'
    )
    recorder.close()


def test_a_number_that_is_not_finite_inside_a_list_is_null_too(tmp_path: Path) -> None:
    recorder = Recorder(Attempt(tmp_path, 1), UNTRACKED, 0)
    recorder.record("train", {"step": 1, "memory_norm": [1.0, math.inf, math.nan]})
    recorder.close()
    assert read_records(tmp_path / "metrics.jsonl")[0]["memory_norm"] == [1.0, None, None]


def test_a_run_keeps_the_identity_it_was_given_first(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    identity = run_identity(tmp_path)
    assert run_identity(tmp_path) == identity
    assert run_identity(tmp_path / "other")["id"] != identity["id"]
    # Of a version that did not store the directory.
    (tmp_path / "run.json").write_text(json.dumps({"id": "old"}))
    assert run_identity(tmp_path) == {"id": "old", "directory": str(tmp_path)}


def test_a_copied_run_has_an_identity_of_its_own_and_a_moved_one_keeps_it(tmp_path: Path) -> None:
    first, copy, moved = (tmp_path / name for name in ("a", "b", "c"))
    first.mkdir()
    identity = run_identity(first)["id"]
    shutil.copytree(first, copy)
    own = run_identity(copy)
    assert own["id"] != identity and own["copied_from"] == identity
    assert run_identity(copy) == own
    assert run_identity(first)["id"] == identity
    first.rename(moved)
    assert run_identity(moved) == {"id": identity, "directory": str(moved)}
    # Another way to the same directory is no copy of it.
    first.symlink_to(moved)
    assert run_identity(first) == run_identity(moved)
    (copy / "run.json").write_text("{")
    assert run_identity(copy)["id"] not in (identity, own["id"])


def test_rates_are_those_of_the_interval() -> None:
    meter = Meter(tokens=60_000, scored=60_000, data_wait=50.0, since=time.perf_counter() - 200)
    read = meter.read(Work(7e5, 3e5, 0.0), peak_flops=1e9, steps_left=10, steps=400)
    assert read == {
        "tokens_per_second": pytest.approx(300, rel=0.01),
        "mfu": pytest.approx(0.3, rel=0.01),
        "data_wait": pytest.approx(0.25, rel=0.01),
        "eta_seconds": pytest.approx(5.0, rel=0.01),
        "seconds_per_step": pytest.approx(0.5, rel=0.01),
    }
    assert (meter.tokens, meter.scored, meter.data_wait) == (0, 0, 0.0)
    assert time.perf_counter() - meter.since < 1.0


def test_tokens_that_had_no_backward_count_as_read_alone() -> None:
    meter = Meter(since=time.perf_counter() - 100)
    meter.add(3_000, forward_only=False, preface=0, scored=3_000)
    meter.add(6_000, forward_only=True, preface=0, scored=6_000)
    read = meter.read(Work(1e6, 0.0, 2.5e5), peak_flops=1e9, steps_left=1, steps=2)
    assert read["tokens_per_second"] == pytest.approx(90, rel=0.01)
    assert read["mfu"] == pytest.approx((3_000 * 1e6 + 6_000 * 2.5e5) / 100 / 1e9, rel=0.01)
    assert (meter.tokens, meter.forward_only) == (0, 0)
    # A preface's tokens are work, and none of them is trained on.
    meter = Meter(since=time.perf_counter() - 100)
    meter.add(6_000, forward_only=False, preface=6_000, scored=6_000)
    read = meter.read(Work(1e6, 0.0, 2.5e5), peak_flops=1e9, steps_left=1, steps=2)
    assert read["tokens_per_second"] == pytest.approx(60, rel=0.01)
    assert read["mfu"] == pytest.approx(6_000 * (1e6 + 2.5e5) / 100 / 1e9, rel=0.01)
    assert meter.preface == 0


def test_logits_that_nobody_needs_are_no_work() -> None:
    meter = Meter(since=time.perf_counter() - 100)
    meter.add(6_000, forward_only=False, preface=3_000, scored=600)
    meter.add(3_000, forward_only=True, preface=3_000, scored=0)
    read = meter.read(Work(1e6, 5e6, 4e5), peak_flops=1e9, steps_left=1, steps=2)
    # 6,000 whole passes, 3,000 + 6,000 forwards alone, and the logits of 600 answers.
    work = 6_000 * 1e6 + 9_000 * 4e5 + 600 * 5e6
    assert read["mfu"] == pytest.approx(work / 100 / 1e9, rel=0.01)


def test_the_time_of_a_pause_is_not_trainings() -> None:
    meter = Meter(tokens=600, since=time.perf_counter() - 10)
    with meter.paused():
        time.sleep(1)
    assert meter.read(Work(1.0, 0.0, 0.0), None, 1, 2)["tokens_per_second"] == pytest.approx(
        60, rel=0.05
    )


def test_there_is_no_mfu_without_a_known_peak() -> None:
    meter = Meter(tokens=1, since=time.perf_counter() - 1)
    assert meter.read(Work(1e6, 1e6, 1e6), None, 1, 1)["mfu"] is None


RECORD = {
    "step": 7, "loss": 1.23456, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 12345.6,
    "mfu": None, "memory_bytes": 3 << 30, "data_wait": 0.011, "eta_seconds": 3725.4, "skipped": 0,
    "spikes": 0, "epochs": {"novels": 0.25},
}  # fmt: skip


def test_a_log_line_says_what_is_known_and_nothing_else() -> None:
    assert log_line(RECORD, 100, {}) == (
        "step 7/100 | loss 1.2346 | grad 0.500 | lr 1.00e-03 | 12,346 tok/s | MFU n/a | "
        "mem 3.00 GiB | data 1.1% | ETA 1:02:05"
    )
    held = {"memory_norm": [1.5, 2.0], "cached_tokens": [64.0, 64.0]}
    assert "| data 1.1% | memory norm 1.75 | cached tokens 64 | ETA" in log_line(RECORD, 100, held)
    assert "1.1% | auxiliary loss 0.25 | ETA" in log_line({**RECORD, "auxiliary_loss": 0.25}, 9, {})
    epochs = {"novels": 0.25, "code": 1.5}
    assert "| ETA 1:02:05 | epochs novels 0.25, code 1.50" in log_line(
        {**RECORD, "epochs": epochs}, 100, {}
    )
    assert "| MFU 38.2% |" in log_line({**RECORD, "mfu": 0.382}, 100, {})
    assert log_line({**RECORD, "skipped": 2, "grad_norm": math.inf}, 100, {}).endswith(
        "| skipped 2"
    )
    assert log_line({**RECORD, "skipped": 2, "spikes": 1}, 100, {}).endswith(
        "| skipped 2, of them spikes 1"
    )
    assert "1.1% | z-loss 0.0025 | ETA" in log_line({**RECORD, "z_loss": 0.0025}, 9, {})


def test_memory_is_the_peak_of_the_process_on_a_cpu() -> None:
    before = peak_memory(torch.device("cpu"))
    block = bytearray(64 << 20)
    block[:: 1 << 12] = b"x" * (len(block) >> 12)
    after = peak_memory(torch.device("cpu"))
    del block
    assert before > 10 << 20
    assert after >= before
    assert peak_memory(torch.device("cpu")) == after


@pytest.fixture
def restored_logging() -> Iterator[None]:
    log = logging.getLogger("pretrain")
    before = (log.handlers, log.level, log.propagate)
    yield
    for handler in log.handlers:
        handler.close()
    log.handlers, log.level, log.propagate = before


@pytest.mark.usefixtures("restored_logging")
def test_a_log_that_nobody_reads_any_more_costs_no_line_and_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        configure_logging(0, tmp_path)
        for line in ("one", "two"):
            logging.getLogger("pretrain.somewhere").info(line)
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            gone.close()
    assert capfd.readouterr() == ("", "")
    assert [line.split()[1] for line in (tmp_path / "log.txt").open()] == ["one", "two"]


@pytest.mark.usefixtures("restored_logging")
def test_rank_0_logs_everything_and_the_others_their_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("pretrain.somewhere")
    configure_logging(0, tmp_path)
    log.info("told")
    configure_logging(3, tmp_path)
    log.info("not told")
    log.warning("warned")
    out, err = capsys.readouterr()
    assert out.endswith(" told\n") and out.count("\n") == 1
    assert err.endswith(" rank 3: warned\n") and err.count("\n") == 1
    assert (tmp_path / "log.txt").read_text() == out


def test_numbers_have_names_and_texts_are_left_out() -> None:
    found = {"step": 4, "passkey": {"400": {"0.5": {"exact": 1.0}}, "seconds": 2.5},
             "books": {"error": "it failed"}, "gates": [[0.5], None]}  # fmt: skip
    assert metrics._flat(found) == [
        ("step", 4.0), ("passkey/400/0.5/exact", 1.0), ("passkey/seconds", 2.5),
        ("gates/00/00", 0.5),
    ]  # fmt: skip


# A real run, with wandb.


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Any]) -> Path:
    """A run of one rank with wandb's offline mode, stopped at step 2 and resumed to step 4."""
    root = tmp_path_factory.mktemp("tracked")
    rng = np.random.default_rng(2)
    write_data_set(root / "data", [rng.integers(3, 40, size=50) for _ in range(8)], 2, 48)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        for steps in (2, 4):
            ranks.train(1, _configuration(root), f"train.steps={steps}")
    return root / "run"


def _configuration(root: Path) -> Path:
    """The file of a run in `root`."""
    (root / "c.yaml").write_text(
        f"run: {{directory: {root / 'run'}}}\n"
        f"data: {{train: {root / 'data'}, validation: {root / 'data'}, lanes: 2}}\n"
        "model: {d_model: 16, n_layers: 2, n_heads: 2, n_kv_heads: 2, d_head: 8, d_ff: 16,"
        " segment: 8}\n"
        "train: {window_segments: 2, log_every: 1, validate_every: 2, validation_windows: 1}\n"
        "optim: {warmup_steps: 1}\n"
        "launch: {device: cpu}\n"
    )
    return root / "c.yaml"


def _refused(root: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-m", "pretrain.cli", "train", str(_configuration(root)), *settings],
        env={**environment, **SECRETS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def _wandb_records(run: Path) -> list[Any]:
    """What `wandb sync` would upload, of all its files in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for content in _logged(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            records.append(record)
    return records


def _logged(data: bytes) -> Iterator[bytes]:
    """The entries of a log in LevelDB's form, after wandb's 7 bytes of header."""
    assert data[:4] == b":W&B"
    place, entry = 7, b""
    while place + 7 <= len(data):
        left_in_block = 32768 - place % 32768
        if left_in_block < 7:
            place += left_in_block
            continue
        _, length, part = struct.unpack_from("<IHB", data, place)  # checksum, length, which part
        entry += data[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # the whole entry, or its last part
            yield entry
            entry = b""


def test_a_resumed_run_continues_its_curve_under_one_id(tracked: Path) -> None:
    identity = json.loads((tracked / "run.json").read_text())["id"]
    files = sorted(path.name for path in tracked.glob("wandb/offline-run-*/*.wandb"))
    assert files == [f"run-{identity}.wandb"] * 2
    records = _wandb_records(tracked)
    assert {r.run.run_id for r in records if r.WhichOneof("record_type") == "run"} == {identity}


def test_wandb_gets_every_record_as_numbers_by_name(tracked: Path) -> None:
    history: list[dict[str, Any]] = []
    for record in _wandb_records(tracked):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append(
                {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
            )
    wanted = read_records(tracked / "metrics.jsonl")
    assert [(r["kind"], r["step"]) for r in wanted] == [
        ("train", 1), ("train", 2), ("checkpoint", 2), ("validation", 2),
        ("train", 3), ("train", 4), ("checkpoint", 4), ("validation", 4),
    ]  # fmt: skip
    assert [entry["step"] for entry in history] == [record["step"] for record in wanted]
    for entry, record in zip(history, wanted, strict=True):
        number = "stall" if record["kind"] == "checkpoint" else "loss"
        assert entry[f"{record['kind']}/{number}"] == record[number]
        if record["kind"] == "train":
            assert entry["train/gates/01/00"] == record["gates"][1][0]
            assert entry["train/memory_norm/00"] == record["memory_norm"][0]
            # Of 8 documents of 52 tokens each of 2 lanes ends one, in its 4th window of 16.
            assert record["epochs"] == {"data": 0.25 if record["step"] == 4 else 0.0}
            assert entry["train/epochs/data"] == record["epochs"]["data"]
            assert "train/mfu" not in entry


def test_wandbs_charts_count_optimizer_steps_in_every_attempt(tracked: Path) -> None:
    records = _wandb_records(tracked)
    defined = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert [(one.glob_name, one.step_metric) for one in defined if one.glob_name] == [
        ("*", "step")
    ] * 2


def test_records_of_a_cpu_have_no_mfu_and_all_else(tracked: Path) -> None:
    records = [r for r in read_records(tracked / "metrics.jsonl") if r["kind"] == "train"]
    for record in records:
        assert record["mfu"] is None
        assert record["tokens"] == record["step"] * 2 * 16
        assert record["tokens_per_second"] > 0 and record["memory_bytes"] > 10 << 20
        assert [len(layer) for layer in record["gates"]] == [2, 2]
        assert len(record["memory_norm"]) == 2
    assert "| MFU n/a |" in (tracked / "log.txt").read_text()


def test_no_secret_of_the_environment_is_in_any_file_of_the_run(tracked: Path) -> None:
    files = [path for path in tracked.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, f"{name} is in {path}"


def test_wandb_gets_the_configuration_but_not_the_command_or_the_machine(tracked: Path) -> None:
    records = _wandb_records(tracked)
    kinds = {record.WhichOneof("record_type") for record in records}
    assert "run" in kinds and "environment" not in kinds
    for path in (tracked / "wandb").rglob("*"):
        if path.is_file():
            # The file that the command named.
            assert b"c.yaml" not in path.read_bytes(), path
    (update,) = [r.run.config.update for r in records if r.WhichOneof("record_type") == "run"][:1]
    stored = {item.key: json.loads(item.value_json) for item in update}
    assert stored["model"]["d_model"] == 16 and stored["optim"]["warmup_steps"] == 1


def test_a_secret_that_a_setting_asks_for_is_refused_and_stored_nowhere(
    tracked: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").symlink_to(tracked.parent / "data")
    for key in ("HF_TOKEN", "WANDB_API_KEY"):
        ended = _refused(tmp_path, f"wandb.name=${{oc.env:{key}}}")
        assert ended.returncode == 2
        assert "wandb.name" in ended.stdout and SECRETS[key] not in ended.stdout
    assert not (tmp_path / "run").exists()


# Records nothing, with wandb in the mode and the directory that are given.
_TRACKED = """
import logging, sys
from pathlib import Path
from data_prep.dataset.settings import SettingsError
from pretrain.checkpoint.attempts import Attempt
from pretrain.config.root import Config
from pretrain.config.run import WandbConfig
from pretrain.training.metrics import Recorder
mode, directory = sys.argv[1:]
logging.basicConfig(stream=sys.stdout, format="%(message)s")
try:
    Recorder(Attempt(Path(directory), 1), Config(wandb=WandbConfig(mode=mode)), 0).close()
except SettingsError as error:
    print(*error.problems)
"""


def _tracked_alone(place: Path, *words: str, **variables: str) -> str:
    """What a process in `place` says that does this."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    ended = subprocess.run(
        [sys.executable, "-c", _TRACKED, *words],
        cwd=place,
        env={**environment, "HOME": str(place), **variables},  # no netrc of this user
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_online_tracking_without_a_key_is_a_mistake_and_refused_with_what_to_do(
    tmp_path: Path,
) -> None:
    (tmp_path / "run").mkdir()
    said = _tracked_alone(tmp_path, "online", "run")
    assert said.startswith("wandb.mode=online: No API key configured")
    assert "set wandb.mode=offline" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_variable_that_wandb_cannot_use_is_a_mistake_and_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    said = _tracked_alone(tmp_path, "offline", "run", WANDB_INIT_TIMEOUT="5 min")
    assert said.startswith("wandb: a setting that it has from the environment (WANDB_...)")
    assert "init_timeout Input should be a valid number" in said and "5 min" in said
    assert said.endswith("correct it, or set wandb.mode=disabled\n") and "pydantic" not in said


def test_a_run_in_the_working_directory_has_its_name_in_wandb(tmp_path: Path) -> None:
    (tmp_path / "my run").mkdir()
    assert _tracked_alone(tmp_path / "my run", "offline", ".") == ""
    names = {record.run.display_name for record in _wandb_records(tmp_path / "my run")}
    assert names - {""} == {"my run"}


def test_what_wandb_is_told_elsewhere_and_the_run_decides_itself_is_said(tmp_path: Path) -> None:
    """Tags, group and notes, which no setting of a run is for, are taken."""
    for directory in ("run", "wandb"):
        (tmp_path / directory).mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = disabled\n")
    said = _tracked_alone(
        tmp_path, "offline", "run", WANDB_PROJECT="p", WANDB_NAME="n", WANDB_DIR="elsewhere",
        WANDB_ENTITY="e", WANDB_RUN_ID="abc", WANDB_TAGS="a,b", WANDB_RUN_GROUP="g",
    )  # fmt: skip
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["id"]
    decided = [
        ("mode", "wandb.mode is offline"), ("project", "wandb.project is infini-pretrain"),
        ("run_name", "wandb.name is run"), ("run_id", f"the id in run.json is {identity}"),
        ("root_dir", "its files go to the run directory's wandb/"),
    ]  # fmt: skip
    for line, (field, reason) in zip(said.splitlines(), decided, strict=True):
        assert line.startswith(f"wandb's own {field} (")
        assert line.endswith(f"has no effect, since {reason}")
    (run, *_) = [r.run for r in _wandb_records(tmp_path / "run") if r.HasField("run")]
    assert (run.entity, run.project, run.display_name) == ("e", "infini-pretrain", "run")
    assert (run.run_id, run.run_group, list(run.tags)) == (identity, "g", ["a", "b"])


def test_records_continue_when_a_signal_to_the_whole_job_ends_wandbs_process(
    tmp_path: Path,
) -> None:
    script = (
        "import logging, os, signal\n"
        "from pathlib import Path\n"
        "from pretrain.checkpoint.attempts import Attempt\n"
        "from pretrain.config.root import Config\n"
        "from pretrain.jobs.launch import StopFlag, leave\n"
        "from pretrain.training.metrics import Recorder, read_records\n"
        "logging.basicConfig(format='%(message)s')\n"
        "run = Path('run'); run.mkdir(); stop = StopFlag()\n"
        "recorder = Recorder(Attempt(run, 1), Config(), 0)\n"
        "children = [int(path.parent.name) for path in Path('/proc').glob('*/stat')\n"
        "            if path.parent.name.isdigit()\n"
        "            and path.read_text().rpartition(')')[2].split()[1] == str(os.getpid())]\n"
        "assert len(children) == 1, children\n"
        "os.kill(children[0], signal.SIGTERM); os.waitpid(children[0], 0)\n"
        "for step in range(5): recorder.record('train', {'step': step, 'loss': 1.0})\n"
        "recorder.close()\n"
        "print(len(read_records(run / 'metrics.jsonl')))\n"
        "leave(0)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (0, "5\n"), ended.stderr
    assert ended.stderr.count("wandb failed (") == 1
    assert "Traceback" not in ended.stderr
