"""Runs as users start them: killed, signalled, damaged, changed, and under other launchers.

Whatever happens to a run, the same command ends with the losses and the checkpoint of a run to
which nothing happened. The runs are real: `pretrain train` with two gloo ranks under ZeRO-3.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.recall.tasks import Haystack
from pretrain import trained
from pretrain.checkpoint.attempts import claim
from pretrain.checkpoint.manifest import step_name, step_of
from pretrain.config.root import load
from pretrain.data.lanes import Dataset, Lane, Mix
from pretrain.evaluate import perplexity, recall
from pretrain.evaluate.questions import Questions
from pretrain.model.transformer import Transformer
from pretrain.training import ledger
from pretrain.training.metrics import read_records
from tests.ranks import train
from tools.promises.servers import Web, faulty
from tools.promises.states import differences, stored

VOCABULARY = 320
STEPS = 24
EVERY = 4
SETTINGS = (
    "data.lanes=4",
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.d_head=8",
    "model.d_ff=48",
    "model.segment=8",
    f"train.steps={STEPS}",
    "train.window_segments=4",
    "train.micro_batch=1",
    "train.log_every=1",
    "train.validate_every=6",
    "train.validation_windows=2",
    "optim.warmup_steps=5",
    f"checkpoint.every={EVERY}",
    "launch.device=cpu",
    "launch.ranks=2",
    "wandb.mode=disabled",
)
MARK = "PRETRAIN_TEST_RUN"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    orphans: list[int]

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1]


class Command:
    """`pretrain train` of a run directory, as a process whose descendants can be found."""

    def __init__(self, data: Mapping[str, Path], directory: Path) -> None:
        self.directory = directory
        self.words = [
            *SETTINGS,
            f"data.train={data['train']}",
            f"data.validation={data['validation']}",
            f"run.directory={directory}",
        ]
        # The file holds nothing: all that differs from the defaults is said in words.
        self.config = directory.parent / "config.yaml"
        self.config.write_text("{}\n")
        self.mark = uuid.uuid4().hex

    def start(
        self, *settings: str, launcher: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[str]:
        program = [sys.executable, *(launcher or ("-m", "pretrain.cli"))]
        return subprocess.Popen(
            [*program, "train", str(self.config), *self.words, *settings],
            env={**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *settings: str, launcher: Sequence[str] = (), **environment: str) -> Ended:
        return self.end(self.start(*settings, launcher=launcher, **environment))

    def end(self, process: subprocess.Popen[str]) -> Ended:
        """Wait for the command, and 10 s for whatever it started."""
        output, _ = process.communicate(timeout=500)
        deadline = time.monotonic() + 10
        while (orphans := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return Ended(process.returncode, output, orphans)

    def processes(self, rank: int | None = None) -> list[int]:
        """Living processes that have the mark in their environment: all, or those of a rank."""
        wanted = {f"{MARK}={self.mark}"} | ({f"RANK={rank}"} if rank is not None else set())
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (directory / "environ").read_text(errors="replace").split("\0")
                if wanted <= set(variables):
                    found.append(int(directory.name))
        return found

    def start_and_train(self, steps: int) -> subprocess.Popen[str]:
        """Start the run, and return when it has recorded so many steps after its checkpoint."""
        path = self.directory / "metrics.jsonl"
        step = max(self.checkpoints(), default=0) + steps
        # A resumed run replaces the file; what the last process wrote is of no interest.
        before = path.stat().st_ino if path.exists() else None
        process = self.start()
        while (
            not path.exists()
            or path.stat().st_ino == before
            or max((line["step"] for line in read_records(path)), default=0) < step
        ):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        return process

    def checkpoints(self) -> list[int]:
        """The steps of all checkpoints."""
        names = [path.name for path in (self.directory / "checkpoints").glob("step-*")]
        return sorted(step for name in names if (step := step_of(name)) is not None)

    def checkpoint(self, step: int) -> Path:
        return self.directory / "checkpoints" / step_name(step)


def recorded(run: Command, kind: str) -> list[dict[str, Any]]:
    """The run's records of a kind: train, validation or checkpoint."""
    records = read_records(run.directory / "metrics.jsonl")
    return [record for record in records if record["kind"] == kind]


def curve(directory: Path) -> list[tuple[Any, ...]]:
    """What a run recorded that does not depend on time: each record once, in order."""
    left_out = ("checkpoint", "evaluation")
    records = [r for r in read_records(directory / "metrics.jsonl") if r["kind"] not in left_out]
    keys = ("kind", "step", "loss", "grad_norm", "lr", "tokens", "skipped", "gates", "memory_norm",
            "epochs")  # fmt: skip
    return [tuple(json.dumps(record.get(key)) for key in keys) for record in records]


def assert_as_uninterrupted(run: Command, uninterrupted: Command) -> None:
    """Records and final checkpoint are equal to the bit."""
    assert curve(run.directory) == curve(uninterrupted.directory)
    assert_same_checkpoint(run, uninterrupted, STEPS)


def assert_same_checkpoint(run: Command, uninterrupted: Command, step: int) -> None:
    """The checkpoints of a step are equal to the bit, but for their configuration."""
    wrong = differences(stored(run.checkpoint(step)), stored(uninterrupted.checkpoint(step)))
    assert wrong == []


@pytest.fixture(scope="module")
def data(
    tmp_path_factory: pytest.TempPathFactory,
    write_data_set: Callable[..., Any],
    tokenizer_model: Path,
) -> dict[str, Path]:
    """Small data sets with a real tokenizer, of documents that are shorter and longer than a
    window."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    for name in ("train", "validation", "other"):
        sizes = rng.integers(1, 150, size=80)
        documents = [rng.integers(3, VOCABULARY, size=int(size)) for size in sizes]
        write_data_set(root / name, documents, 8, VOCABULARY, tokenizer=tokenizer_model)
    return {name: root / name for name in ("train", "validation", "other")}


@pytest.fixture(scope="module")
def new_run(
    data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Command]:
    return lambda: Command(data, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def uninterrupted(new_run: Callable[[], Command]) -> Command:
    """A run that nothing happened to; it keeps all its checkpoints."""
    run = new_run()
    ended = run.run(f"checkpoint.keep_every={EVERY}", "train.profile_steps=2")
    assert ended.code == 0, ended.output
    assert [step for _, step, *_ in curve(run.directory)] == sorted(
        map(str, [*range(1, STEPS + 1), 6, 12, 18, 24]), key=int
    )
    return run


def copy_of(run: Command, other: Command, last_step: int) -> Command:
    """`other`, at the point where `run` was when it had committed the checkpoint of a step."""
    shutil.copytree(run.directory, other.directory)
    for step in range(last_step + EVERY, STEPS + 1, EVERY):
        shutil.rmtree(other.checkpoint(step))
    return other


# Killed and stopped.


def interrupt(run: Command, number: signal.Signals, steps: int, rank: int | None = None) -> Ended:
    """Signal the launcher, or a rank, at a random moment after so many steps."""
    process = run.start_and_train(steps)
    time.sleep(random.uniform(0, 0.05))
    os.kill(process.pid if rank is None else run.processes(rank)[0], number)
    return run.end(process)


def interrupt_start(run: Command, number: signal.Signals) -> Ended:
    """Start the run, and signal the launcher as soon as its ranks exist."""
    process = run.start()
    while not run.processes(rank=1):
        time.sleep(0.005)
    process.send_signal(number)
    return run.end(process)


@dataclass(frozen=True)
class Interrupted:
    """A run that was interrupted in every way before it ended, and what each command did.

    Its weights are evaluated meanwhile.
    """

    run: Command
    ended: dict[str, Ended]
    steps: dict[str, int]  # that the checkpoint held when the command had ended
    endings: dict[str, dict[str, Any]]  # what it left in exit.json


@pytest.fixture(scope="module")
def interrupted(new_run: Callable[[], Command], data: dict[str, Path]) -> Interrupted:
    run = new_run()
    run.words.append(
        "train.evaluate=[{kind: passkey, every: 2, lengths: [400], samples: 1, depths: [1]}, "
        f"{{kind: perplexity, every: 6, data: {data['other']}, documents: 2, batch: 2}}]"
    )
    ended, steps, endings = {}, {}, {}
    ways: list[tuple[str, Callable[[], Ended]]] = [
        ("start-up", lambda: interrupt_start(run, signal.SIGINT)),
        ("SIGKILL", lambda: interrupt(run, signal.SIGKILL, 4)),
        ("SIGTERM", lambda: interrupt(run, signal.SIGTERM, 2)),
        ("SIGKILL of a rank", lambda: interrupt(run, signal.SIGKILL, 3, rank=1)),
        ("SIGUSR1 of a rank", lambda: interrupt(run, signal.SIGUSR1, 1, rank=1)),
        ("end", run.run),
    ]
    for name, way in ways:
        ended[name] = way()
        steps[name] = max(run.checkpoints())
        endings[name] = json.loads((run.directory / "exit.json").read_text())
    return Interrupted(run, ended, steps, endings)


def test_a_run_interrupted_in_every_way_ends_as_if_nothing_had_happened(
    interrupted: Interrupted, uninterrupted: Command
) -> None:
    assert interrupted.ended["end"].code == 0, interrupted.ended["end"].output
    assert_as_uninterrupted(interrupted.run, uninterrupted)


def test_evaluations_are_made_once_and_say_what_the_checkpoint_says(
    interrupted: Interrupted, data: dict[str, Path]
) -> None:
    records = recorded(interrupted.run, "evaluation")
    for name, every in (("passkey", 2), ("perplexity", 6)):
        own = [record["step"] for record in records if name in record]
        assert own == list(range(every, STEPS + 1, every)), name
    (passkey,) = (r["passkey"] for r in records if r["step"] == STEPS and "passkey" in r)
    (books,) = (r["perplexity"] for r in records if r["step"] == STEPS and "perplexity" in r)
    model = trained.load(interrupted.run.directory, torch.device("cpu"))
    asked = Questions(["passkey"], [400], [1.0], 1, 0)
    report = recall.evaluate(model, Haystack.repeated(), asked, lambda line: None)
    assert recall.numbers(report) == {"passkey": passkey["passkey"]}
    said = perplexity.evaluate(
        model, data["other"], window_segments=None, max_documents=2, batch=2,
        report=lambda line: None,
    )  # fmt: skip
    assert perplexity.numbers(said).items() <= books.items()
    assert "| passkey: exact answers" in (interrupted.run.directory / "log.txt").read_text()


@pytest.mark.parametrize("way", ["SIGTERM", "SIGUSR1 of a rank"])
def test_a_stop_signal_finishes_the_step_and_saves_it(interrupted: Interrupted, way: str) -> None:
    ended = interrupted.ended[way]
    assert ended.code == 75, ended.output
    step = interrupted.steps[way]
    assert ended.last_line.endswith(
        f"stopped after step {step} with a checkpoint; the same command resumes the run"
    )
    assert f"step {step}/{STEPS} |" in ended.output
    assert f"step {step + 1}/{STEPS} |" not in ended.output


def test_a_stop_signal_while_ranks_start_lets_them_do_one_step(interrupted: Interrupted) -> None:
    ended = interrupted.ended["start-up"]
    assert (ended.code, interrupted.steps["start-up"]) == (75, 1), ended.output


def test_no_rank_outlives_a_launcher_or_a_peer_that_was_killed(interrupted: Interrupted) -> None:
    assert interrupted.ended["SIGKILL"].code == -signal.SIGKILL
    assert interrupted.ended["SIGKILL of a rank"].code == 128 + signal.SIGKILL
    for name, ended in interrupted.ended.items():
        assert ended.orphans == [], name


def test_a_killed_rank_is_named_in_the_last_line(interrupted: Interrupted) -> None:
    assert interrupted.ended["SIGKILL of a rank"].last_line == (
        "rank 1 was killed by SIGKILL; the same command resumes from the last good checkpoint"
    )


@pytest.fixture
def aborting(tmp_path: Path) -> str:
    """A PYTHONPATH under which a rank that unmakes its interpreter aborts.

    What a thread of gloo meets there may abort it too.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\nif 'RANK' in os.environ: atexit.register(os.abort)\n"
    )
    return str(tmp_path)


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted: Command, aborting: str) -> None:
    files = set(uninterrupted.directory.rglob("*.json*")) - {uninterrupted.directory / "exit.json"}
    before = {path: path.stat().st_mtime_ns for path in files}
    words = ("launch.ranks=1", f"checkpoint.keep_every={EVERY}")
    ended = uninterrupted.run(*words, PYTHONPATH=aborting)
    assert ended.code == 0, ended.output
    assert "finished already: the checkpoint is of step 24 of 24" in ended.output
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_rank_that_fails_does_not_unmake_its_interpreter(
    uninterrupted: Command, aborting: str
) -> None:
    ended = uninterrupted.run("run.seed=2", "launch.ranks=1", PYTHONPATH=aborting)
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output


def test_every_start_is_an_attempt_and_leaves_its_ending(interrupted: Interrupted) -> None:
    ways = list(interrupted.ended)
    directory = interrupted.run.directory
    attempts = [json.loads(p.read_text()) for p in sorted((directory / "attempts").iterdir())]
    assert [one["attempt"] for one in attempts] == list(range(1, len(ways) + 1))
    started_from = [0, *(interrupted.steps[way] for way in ways)][:-1]
    assert [one["step"] for one in attempts] == started_from
    for number, way in enumerate(ways, 1):
        code, ending = interrupted.ended[way].code, interrupted.endings[way]
        if code in (0, 75):
            why = "finished" if code == 0 else "stopped by a signal after a checkpoint"
            step = interrupted.steps[way]
            assert ending == {"attempt": number, "code": code, "step": step, "why": why}
        elif way == "SIGKILL":  # of all its processes at once: what is there is of an older one
            assert ending["attempt"] < number


def test_the_ledger_proves_that_committed_steps_consumed_every_token_once(
    interrupted: Interrupted, uninterrupted: Command
) -> None:
    assert ledger.check(interrupted.run.directory) == []
    assert ledger.check(uninterrupted.directory) == []
    lines = read_records(interrupted.run.directory / "ledger.jsonl")
    assert lines[-1]["step"] == STEPS
    assert len({line["attempt"] for line in lines}) >= 4


def last_step(run: Command) -> int:
    """The last step in the run's records; a resume drops those after its checkpoint."""
    records = recorded(run, "train")
    return records[-1]["step"] if records else 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_twelve_kills_at_random_moments_leave_no_trace(
    new_run: Callable[[], Command], stage: int, precision: str
) -> None:
    if (stage, precision) == (0, "bf16"):
        pytest.skip("stage 0 has no float32 masters")
    settings = (f"zero.stage={stage}", f"train.precision={precision}",
                "train.max_attempts_without_progress=100")  # fmt: skip
    whole, killed = new_run(), new_run()
    for run in (whole, killed):
        run.words += settings
    assert whole.run().code == 0
    kill_at_random(killed, 12)
    ended = killed.run()
    assert ended.code == 0, ended.output
    assert_as_uninterrupted(killed, whole)


def kill_at_random(run: Command, count: int) -> None:
    """Start the run again and again, and kill one of its processes so many times."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    kills = 0
    while kills < count:
        before = last_step(run)
        process = run.start()
        # From the first import to well into the steps; some kills come before the first step.
        deadline = time.monotonic() + moments.uniform(0, 20)
        goal = before + moments.randint(1, 3)
        while time.monotonic() < deadline and last_step(run) < min(goal, STEPS - 1):
            time.sleep(0.01)
        victims = [process.pid, *run.processes(rank=0), *run.processes(rank=1)]
        # The run may have ended by now; its last kills then strike it while it says so.
        with contextlib.suppress(ProcessLookupError):
            os.kill(moments.choice(victims), signal.SIGKILL)
            kills += 1
        assert run.end(process).orphans == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills_while_shards_are_fetched_over_a_bad_network_leave_no_trace(
    new_run: Callable[[], Command], data: dict[str, Path], tmp_path: Path
) -> None:
    whole, killed = new_run(), new_run()
    assert whole.run().code == 0
    shards = [path.stat().st_size for path in data["train"].glob("*.tar")]
    cache = tmp_path / "cache"
    chance = random.Random(1)
    with Web(data["train"].parent) as web, faulty(web.port) as proxy:
        proxy.faults.extend(chance.choices([None, "reset", "refuse", "slow"], [7, 1, 1, 1], k=9999))
        place = f"http://127.0.0.1:{proxy.port}"
        killed.words += [
            f"data.train={place}/train",
            f"data.validation={place}/validation",
            f"data.cache.directory={cache}",
            # A shard for each lane of both sets and two more: some are evicted and fetched again.
            f"data.cache.gigabytes={10 * max(shards) / 1e9}",
            "train.max_attempts_without_progress=100",
        ]
        kill_at_random(killed, 30)
        ended = killed.run()
    assert ended.code == 0, ended.output
    assert {"reset", "refuse", "slow"} == set(proxy.done)
    assert_as_uninterrupted(killed, whole)


# Saved while training continues.

# For PYTHONPATH: what rank 1 does where it opens its file of the checkpoint of `step`.
SAVING = """
import json, os, time
from pathlib import Path
def act(event, arguments):
    path = Path(str(arguments[0])) if event == "open" else Path()
    if not (path.name.startswith("rank-00001") and path.parent.suffix == ".writing"):
        return
    run, step = path.parents[2], int(path.parent.name.split(".")[0].removeprefix("step-"))
    {action}
if os.environ.get("RANK") == "1":
    import sys
    sys.addaudithook(act)
"""
# Training has taken two more steps, if there are so many; step 8 must be let go besides.
AFTERWARDS = """while (
        step == 8 and (run.parent / "hold").exists()
        or '"step": %d' % min(step + 2, 24) not in (run / "metrics.jsonl").read_text()
    ):
        time.sleep(0.01)"""


def saving(directory: Path, action: str) -> str:
    """A PYTHONPATH under which rank 1 does so when it saves."""
    (directory / "sitecustomize.py").write_text(SAVING.format(action=action))
    return os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])


def test_training_continues_while_a_slow_save_writes_the_state_of_its_step(
    new_run: Callable[[], Command], uninterrupted: Command, tmp_path: Path
) -> None:
    run = new_run()
    path = saving(tmp_path, AFTERWARDS)
    hold = run.directory.parent / "hold"
    hold.touch()
    process = run.start(PYTHONPATH=path)
    # Step 9 comes while step 8 is being saved, which waited for step 4.
    writing = run.directory / "checkpoints/step-00000008.000001.writing"
    while last_step(run) < 2 * EVERY + 1 or not writing.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.kill()
    run.end(process)
    assert run.checkpoints() == [EVERY] and writing.exists()
    hold.unlink()
    ended = run.run(PYTHONPATH=path)
    assert ended.code == 0, ended.output
    assert_as_uninterrupted(run, uninterrupted)
    assert ledger.check(run.directory) == []
    records = [(r["kind"], r["step"]) for r in read_records(run.directory / "metrics.jsonl")]
    for step in range(2 * EVERY, STEPS - EVERY, EVERY):
        noted = records.index(("checkpoint", step))
        assert records.index(("train", step + 2)) < noted
        # The next save waits for it.
        assert noted < records.index(("train", step + EVERY + 1))


def test_a_save_that_fails_in_the_background_ends_all_ranks_and_leaves_the_one_before(
    new_run: Callable[[], Command], uninterrupted: Command, tmp_path: Path
) -> None:
    run = new_run()
    failure = "if step == 8: raise OSError(28, 'No space left on device', 'rank-00001')"
    ended = run.run(PYTHONPATH=saving(tmp_path, failure))
    assert ended.code == 1, ended.output
    assert "Traceback" not in ended.output
    reason = (
        f"{run.checkpoint(2 * EVERY)} could not be saved: rank-00001: No space left on device "
        "(rank 1); earlier checkpoints are untouched"
    )
    for rank in (0, 1):
        assert f"pretrain train: rank {rank}: {reason}" in ended.output
    assert json.loads((run.directory / "exit.json").read_text())["why"] == reason
    assert run.checkpoints() == [EVERY]
    # At the latest where the next one would have been saved.
    assert 2 * EVERY <= last_step(run) <= 3 * EVERY
    assert_same_checkpoint(run, uninterrupted, EVERY)


def test_every_save_is_recorded_with_its_time_and_that_for_which_training_stalled(
    uninterrupted: Command,
) -> None:
    saves = recorded(uninterrupted, "checkpoint")
    assert [save["step"] for save in saves] == list(range(EVERY, STEPS + 1, EVERY))
    assert all(save["seconds"] > 0 and save["stall"] > 0 for save in saves)
    # The last one is waited for.
    assert saves[-1]["stall"] > saves[-1]["seconds"]


def test_profiled_steps_leave_a_trace_of_rank_0_and_the_losses_of_steps_that_are_not(
    uninterrupted: Command, interrupted: Interrupted
) -> None:
    stem = "steps-00000006-00000007.rank-00000"
    directory = uninterrupted.directory / "profile"
    assert {p.name for p in directory.iterdir()} == {f"{stem}.pt.trace.json.gz", f"{stem}.txt"}
    assert "aten::mm" in (directory / f"{stem}.txt").read_text()
    assert curve(uninterrupted.directory) == curve(interrupted.run.directory)


# Hanging, slow, left over, and without progress.

ENDLESS = ("train.steps=100000", "train.validate_every=0", "watchdog.step=10", "watchdog.save=10")


def stacks(run: Command, attempt: int) -> list[str]:
    """What each rank of an attempt was doing when one hung."""
    directory = run.directory / "stacks" / f"attempt-{attempt:06d}"
    return [(directory / f"rank-{rank:05d}.txt").read_text() for rank in (0, 1)]


def test_a_stopped_rank_ends_the_run_with_the_stacks_of_all(
    new_run: Callable[[], Command],
) -> None:
    run = new_run()
    run.words += [*ENDLESS, "checkpoint.every=1000"]
    process = run.start_and_train(3)
    os.kill(run.processes(rank=1)[0], signal.SIGSTOP)
    stopped = time.monotonic()
    ended = run.end(process)
    assert time.monotonic() - stopped < 10 + 30
    assert (ended.code, ended.orphans) == (128 + signal.SIGKILL, []), ended.output
    assert "rank 1 on " in ended.output and "it was stopped by a signal (SIGSTOP)" in ended.output
    log = (run.directory / "log.txt").read_text()
    assert "and watchdog.step=10 ends a hang; the stacks of all ranks go to" in log
    waiting, stood = stacks(run, 1)
    assert "in _loop\n" in waiting and "in train\n" in waiting
    assert "in train\n" in stood and "SIGSTOP" in stood
    ending = json.loads((run.directory / "exit.json").read_text())
    assert (ending["attempt"], ending["code"], ending["step"]) == (1, 137, 0)
    assert "watchdog.step=10 ends a hang" in ending["why"]


@pytest.mark.slow
def test_a_slow_rank_is_named_in_the_log_and_the_records(new_run: Callable[[], Command]) -> None:
    run = new_run()
    run.words += [*ENDLESS, "train.log_every=20", "checkpoint.every=1000"]
    process = run.start_and_train(20)
    rank = run.processes(rank=1)[0]
    # Most of the time it is stopped.
    log, end = run.directory / "log.txt", time.monotonic() + 120
    while "straggler: rank 1 (" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        for number, seconds in ((signal.SIGSTOP, 0.04), (signal.SIGCONT, 0.01)):
            os.kill(rank, number)
            time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    assert run.end(process).code == 75
    records = read_records(run.directory / "metrics.jsonl")
    named = [record["stragglers"] for record in records if record["kind"] == "train"]
    assert any(one.get("compute/1", 0) > 1.5 for one in named)


# For PYTHONPATH: rank 1 hangs in C code, with the interpreter's lock, where it opens such a file
# after the checks before the start, once it has met the other rank.
HANGING = """
import ctypes, os, sys
def hang(event, arguments):
    if event == "open" and {name!r} in str(arguments[0]):
        ranks = sys.modules.get("torch.distributed")
        if ranks is not None and ranks.is_initialized():
            ctypes.PyDLL(None).sleep(600)
if os.environ.get("RANK") == "1":
    sys.addaudithook(hang)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "phase", "function"),
    [
        (".writing/rank-00001", [], "save", "write_tensors"),
        ("step-00000004/manifest.json", ["watchdog.start=80"], "start", "read_manifest"),
        ("shard-00003.tar", ["watchdog.step=11"], "step", "check_shard"),
    ],
)
def test_a_rank_that_hangs_in_a_save_a_load_or_its_data_ends_the_run_with_the_stacks_of_all(
    uninterrupted: Command,
    new_run: Callable[[], Command],
    tmp_path: Path,
    name: str,
    settings: list[str],
    phase: str,
    function: str,
) -> None:
    run = copy_of(uninterrupted, new_run(), last_step=4)
    (tmp_path / "sitecustomize.py").write_text(HANGING.format(name=name))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = run.run("watchdog.save=10", "watchdog.start=80", *settings, PYTHONPATH=path)
    assert (ended.code, ended.orphans) == (137, []), ended.output
    waiting, hanging = stacks(run, 2)
    assert f": {phase} after step" in hanging
    assert f"in {function}\n" in hanging and f"in {function}\n" not in waiting
    ended = run.run(f"checkpoint.keep_every={EVERY}")
    assert ended.code == 0, ended.output
    assert_as_uninterrupted(run, uninterrupted)


@pytest.mark.slow
def test_a_save_that_hangs_while_training_continues_ends_the_run_with_the_stacks_of_all(
    new_run: Callable[[], Command], tmp_path: Path
) -> None:
    run = new_run()
    run.words += [*ENDLESS, "checkpoint.every=400", "train.log_every=10"]
    ended = run.run(PYTHONPATH=saving(tmp_path, "time.sleep(600)"))
    assert (ended.code, ended.orphans) == (137, []), ended.output
    waiting, hanging = stacks(run, 1)
    assert "save after step 400, no progress for 5." in hanging
    assert "in write_tensors\n" in hanging and "in write_tensors\n" not in waiting
    assert "in _loop\n" in hanging
    assert last_step(run) > 400


@pytest.mark.slow
def test_a_run_left_over_from_an_older_attempt_commits_nothing_when_it_wakes(
    uninterrupted: Command, new_run: Callable[[], Command]
) -> None:
    """As on a node that was cut off while it saved, and that comes back."""
    run = new_run()
    left_over = run.start()
    root = run.directory / "checkpoints"
    while not root.exists() or not list(root.glob("step-00000008.*.writing")):
        assert left_over.poll() is None
        time.sleep(0.0005)
    old = run.processes()
    for process in old:
        os.kill(process, signal.SIGSTOP)
    ended = run.run(f"checkpoint.keep_every={EVERY}")
    files = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    ending = (run.directory / "exit.json").read_bytes()
    for process in old:
        os.kill(process, signal.SIGCONT)
    left_over.communicate(timeout=300)
    assert ended.code == 0, ended.output
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == files
    assert (run.directory / "exit.json").read_bytes() == ending
    assert_as_uninterrupted(run, uninterrupted)
    assert ledger.check(run.directory) == []


def test_attempts_without_progress_end_with_a_code_of_their_own_and_say_so_last(
    new_run: Callable[[], Command],
) -> None:
    run = new_run()
    for _ in range(2):
        claim(run.directory, 1, STEPS, 2)
    ended = run.run("launch.ranks=1", "train.max_attempts_without_progress=2")
    assert ended.code == 78
    reason = (
        "no progress: attempts 1 to 2 started from step 0, and none committed a later checkpoint"
    )
    assert reason in ended.last_line
    assert reason in (run.directory / "log.txt").read_text().splitlines()[-1]
    ending = json.loads((run.directory / "exit.json").read_text())
    assert (ending["attempt"], ending["code"], ending["step"]) == (3, 78, 0)
    assert reason in ending["why"]


@pytest.mark.slow
def test_a_mistake_that_rank_0_alone_meets_ends_all_ranks_with_its_code(
    new_run: Callable[[], Command], tmp_path: Path
) -> None:
    run = new_run()
    ended = run.run("wandb.mode=online", HOME=str(tmp_path), WANDB_API_KEY="")
    ending = json.loads((run.directory / "exit.json").read_text())
    assert ended.code == ending["code"] == 2, ended.output
    assert "- wandb.mode=online: No API key configured" in ending["why"]


def test_two_ranks_then_one_then_three_then_two_consume_every_token_once(
    new_run: Callable[[], Command], data: dict[str, Path]
) -> None:
    # 6 of the 8 shards' lanes can be shared by each of these numbers of ranks.
    words = ["data.lanes=6", f"checkpoint.keep_every={EVERY}"]
    whole, elastic = new_run(), new_run()
    assert whole.run(*words).code == 0
    for ranks, steps in ((2, 7), (1, 13), (3, 18)):
        process = elastic.start(*words, f"launch.ranks={ranks}")
        while last_step(elastic) < steps:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        ended = elastic.end(process)
        assert ended.code == 75, ended.output
    ended = elastic.run(*words, "launch.ranks=2")
    assert ended.code == 0, ended.output
    assert ledger.check(elastic.directory) == ledger.check(whole.directory) == []
    ranks = [line["ranks"] for line in read_records(elastic.directory / "ledger.jsonl")]
    assert sorted(set(ranks), key=ranks.index) == [2, 1, 3]
    assert ranks[-1] == 2
    losses = [[record["loss"] for record in recorded(run, "train")] for run in (whole, elastic)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


# Damaged data, and steps that are not finite.


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_shard_stops_all_ranks_with_its_name(
    new_run: Callable[[], Command], data: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(data["train"], tmp_path / "damaged")
    shards = sorted((tmp_path / "damaged").glob("*.tar"))
    damage(shards[3])
    run = new_run()
    ended = run.run(f"data.train={tmp_path / 'damaged'}", "train.steps=400", "zero.stage=1")
    assert ended.code == 1
    assert "Traceback" not in ended.output
    assert f"{shards[3]}: sha256 differs" in ended.last_line


def test_steps_that_are_never_finite_end_the_run_with_the_checkpoint_from_before(
    uninterrupted: Command, new_run: Callable[[], Command]
) -> None:
    run = copy_of(uninterrupted, new_run(), last_step=20)
    # The first step with this rate makes the weights so large that no later loss is finite.
    ended = run.run(
        "optim.lr=1e30", "optim.weight_decay=0", "train.max_skipped=3", "train.steps=99"
    )
    assert ended.code == 1
    assert "Traceback" not in ended.output
    assert "the loss or a gradient was not finite in 3 steps in a row, up to step 24" in (
        ended.last_line
    )
    records = recorded(run, "train")
    assert [(r["step"], r["skipped"]) for r in records][-4:] == [
        (21, 0), (22, 1), (23, 2), (24, 3)
    ]  # fmt: skip
    assert records[-1]["grad_norm"] is None
    assert run.checkpoints()[-1] == 20


# Documents that begin after a preface.


def test_a_document_begins_with_the_memory_of_what_its_lane_has_read_of_the_preface(
    data: dict[str, Path], new_run: Callable[[], Command]
) -> None:
    # Weights that stay as they are: what two ranks carried is what the model reads at once.
    run = new_run()
    still = ("optim.lr=0", "optim.gate_lr=0", "train.steps=6")
    preface = f"data.preface={data['other']}"
    train(2, run.config, *run.words, preface, *still)
    assert ledger.check(run.directory) == []
    state = stored(run.checkpoint(6))
    model = Transformer(load(run.directory / "config.yaml").model, VOCABULARY)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.copy_(state[f"{name}/param"])
    prefaces, documents = (Mix([Dataset(data[name])]) for name in ("other", "train"))
    for lane in range(4):
        read, own = Lane(prefaces, lane, 4, 1), Lane(documents, lane, 4, 1)
        initial = memory = model.initial_state(1, "cpu")
        for _ in range(6):
            windows = (lane_.window(32) for lane_ in (own, read))
            (tokens, starts), (before, begun) = (
                (torch.tensor(tokens)[None], torch.tensor(starts)[None])
                for tokens, _, starts, _ in windows
            )
            with torch.no_grad():
                memory = model(tokens, starts, memory, initial=initial).state
                initial = model(before, begun, initial).state
        for layer in range(2):
            for name in ("matrix", "normaliser"):
                carried = state[f"lane {lane} preface.{layer}.{name}"]
                expected = getattr(initial[layer], name)[0]
                torch.testing.assert_close(carried, expected, rtol=1e-5, atol=1e-5)
                own_state = state[f"lane {lane} {layer}.{name}"]
                expected = getattr(memory[layer], name)[0]
                torch.testing.assert_close(own_state, expected, rtol=1e-5, atol=1e-5)


# Other launchers.


def test_torchrun_gives_the_same_run_to_the_bit(
    uninterrupted: Command, new_run: Callable[[], Command]
) -> None:
    run = new_run()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = run.run(launcher=[*torchrun, "-m", "pretrain.cli"])
    assert ended.code == 0, ended.output
    assert json.loads((run.directory / "exit.json").read_text())["code"] == 0
    assert_as_uninterrupted(run, uninterrupted)


def test_tasks_of_srun_give_the_same_run_to_the_bit(
    uninterrupted: Command, new_run: Callable[[], Command]
) -> None:
    run = new_run()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tasks = [
        run.start(
            SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=str(task),
            SLURM_LOCALID=str(task), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )
        for task in (0, 1)
    ]  # fmt: skip
    for ended in [run.end(task) for task in tasks]:
        assert ended.code == 0, ended.output
    assert_as_uninterrupted(run, uninterrupted)
