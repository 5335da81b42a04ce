"""Jobs on a real Slurm: a run comes back by itself, or ends with a clear last line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.job import Job, Run, losses, text, wait_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def submit(on_cluster: Run, place: Path) -> Iterator[Callable[..., Job]]:
    """slurm/submit train on the cluster; its first job. What a test leaves behind is cancelled."""

    def run(name: str, *words: str, site: str = "site.env") -> Job:
        line = [ROOT / "slurm/submit", "train", "c.yaml", f"--site={site}", *words]
        more = [] if "--" in words else ["--"]
        done = on_cluster(*line, *more, f"run.directory={name}", cwd=place)
        assert done.returncode == 0, done.stderr
        numbers = next(x for x in done.stdout.splitlines() if x.startswith("job:")).split()[1:]
        return Job(on_cluster, numbers[0], place / name)

    yield run
    on_cluster("scancel", "--me")


@pytest.fixture
def ends(on_cluster: Run, place: Path) -> Iterator[Callable[[str], None]]:
    """Says in shell how what is recorded in place of torchrun ends."""
    path = place / "record" / "end"
    yield lambda line: (path.write_text(line), None)[1]
    path.unlink(missing_ok=True)


def test_a_run_on_two_nodes_leaves_out_a_bad_node_saves_at_a_signal_and_comes_back(
    submit: Callable[..., Job], on_host: Run, on_cluster: Run, place: Path
) -> None:
    run = place / "two"
    run.mkdir()
    on_host("n2", "mount", "--bind", run, run)
    on_host("n2", "mount", "-o", "remount,bind,ro", run)
    job = submit("two", "--nodes=2", "--", "train.steps=60")
    # The same run by two ranks on this machine, for comparison.
    alone = subprocess.Popen(
        [sys.executable, "-m", "pretrain.cli", "train", "c.yaml", "run.directory=alone",
         "launch.ranks=2", "train.steps=60"],
        cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    job.start_again(1)
    assert text(run / "slurm/exclude").startswith("n2\t")
    assert f"node n2 is excluded: {run} cannot be written: Read-only file system" in job.log()
    wait_for(lambda: len(losses(run)) > 2, "a step")
    on_cluster("scancel", "--signal=USR1", "--batch", job.number)
    job.start_again(2)
    wait_for(job.ended, "the end of the run")
    on_host("n2", "umount", run)
    assert job.state() == "COMPLETED" and job.log().endswith(" finished\n"), job.log()
    assert "start 1, on 2 nodes (n1 n3), from checkpoint none" in job.log()
    assert "signal USR1: the ranks finish their step and save" in job.log()
    assert alone.wait() == 0
    assert sorted(losses(run)) == list(range(1, 61)) and losses(run) == losses(place / "alone")
    ranks = [text(run / "slurm" / f"{job.number}-task-{task}.log") for task in (0, 1)]
    assert "resumed from" in ranks[0] and all("death signal" in log for log in ranks)
    found = [json.loads(line) for line in text(run / "preflight.jsonl").splitlines()]
    assert [list(record["bad"]) for record in found] == [["n2"], [], []]
    assert found[1]["environment"]["SLURM_JOB_ID"] == job.number
    assert set(found[1]["nodes"]["n3"]["versions"]) >= {"python", "torch", "deepspeed", "code"}


def test_a_job_without_progress_stops_with_a_clear_last_line(
    submit: Callable[..., Job], ends: Callable[[str], None]
) -> None:
    ends("exit 1")
    job = submit("stuck", "--nodes=2", site="recorder.env")
    job.start_again(1)
    wait_for(job.ended, "the end")
    assert job.state() == "FAILED"
    last = job.log().splitlines()[-1]
    assert (
        "stopped: no progress in 2 starts, all from checkpoint none; the last one: failed" in last
    )
    assert last.endswith("Mend the cause and submit again")
    again = submit("stuck", "--nodes=1", site="recorder.env")  # counts anew
    again.start_again(1)


def test_what_the_trainer_says_of_its_end_decides(
    submit: Callable[..., Job], ends: Callable[[str], None]
) -> None:
    # As `pretrain train` leaves it, of this attempt; torchrun makes 1 of every code.
    ends(
        "mkdir -p mistaken/attempts\n"
        'echo \'{"attempt": 1, "code": 2, "step": 3, "why": "x"}\' >mistaken/exit.json\n'
        "exit 1\n"
    )
    job = submit("mistaken", "--nodes=1", site="recorder.env")
    wait_for(job.ended, "the end")
    assert job.state() == "FAILED"
    assert "stopped: a mistake in the configuration" in job.log().splitlines()[-1], job.log()


def test_what_an_older_attempt_left_decides_nothing(
    submit: Callable[..., Job], ends: Callable[[str], None], place: Path
) -> None:
    (place / "older" / "attempts").mkdir(parents=True)
    (place / "older" / "attempts" / "000004.json").write_text("{}")
    (place / "older" / "exit.json").write_text('{\n "attempt": 3,\n "code": 2\n}\n')
    ends("exit 1")
    job = submit("older", "--nodes=1", site="recorder.env")
    job.start_again(1)
    assert "failed with exit code 1" in job.log()


def test_a_start_that_was_replaced_does_not_disturb_the_one_that_goes_on(
    submit: Callable[..., Job], ends: Callable[[str], None], on_host: Run, place: Path
) -> None:
    ends('[ "${SLURM_RESTART_COUNT:-0}" = 1 ] && sleep 60; exit 1')
    job = submit("replaced", "--nodes=1", site="recorder.env")
    job.start_again(1)
    recorded = place / "record" / f"{job.number}.0.1"
    wait_for(recorded.exists, "the second start at work")
    # The first start's shell, as a node that was cut off would still have it.
    told = job.on_cluster("scontrol", "-o", "show", "job", job.number).stdout
    node = next(w for w in told.split() if w.startswith("NodeList=")).partition("=")[2]
    environment = [f"SLURM_JOB_ID={job.number}", f"SLURM_JOB_NODELIST={node}"]
    words = [str(ROOT), str(place / "recorder.env"), str(job.run), "1", "2", "c.yaml"]
    old = on_host(node, "env", *environment, "bash", str(ROOT / "slurm/train.sbatch"), *words)
    assert old.returncode == 1 and "; start 1 of this job goes on with the run" in old.stdout
    assert job.state() == "RUNNING" and len(list((job.run / "slurm/starts").iterdir())) == 2


@pytest.mark.slow
def test_a_start_that_ends_while_slurm_is_restarted_is_requeued(
    submit: Callable[..., Job], ends: Callable[[str], None], on_cluster: Run, place: Path
) -> None:
    ends('[ "$SLURM_RESTART_COUNT" ] && sleep 60; sleep 3; exit 1')
    job = submit("restarted", "--nodes=1", site="recorder.env")
    wait_for((place / "record" / f"{job.number}.0.0").exists, "a running task")
    on_cluster("pkill", "-x", "slurmctld")
    time.sleep(30)  # its clients give up after 8 s
    on_cluster("slurmctld")
    job.start_again(1)


def test_a_cancelled_job_does_not_come_back(
    submit: Callable[..., Job], ends: Callable[[str], None], on_cluster: Run
) -> None:
    ends("sleep 60")
    job = submit("cancelled", "--nodes=2", site="recorder.env")
    record = job.run.parent / "record" / f"{job.number}.1.0"
    wait_for(record.exists, "a running task")
    on_cluster("scancel", job.number)
    wait_for(job.ended, "the end")
    time.sleep(2)
    assert job.state() == "CANCELLED" and "; requeued, " not in job.log()
    assert job.log().endswith("not requeued: Slurm is ending this job (COMPLETING None)\n")


def test_a_run_has_one_job_at_a_time(
    submit: Callable[..., Job], on_cluster: Run, place: Path
) -> None:
    job = submit("single", "--nodes=1", "--hold", site="recorder.env")
    line = [ROOT / "slurm/submit", "train", "c.yaml", "--site=recorder.env", "--nodes=1"]
    again = on_cluster(*line, "--", "run.directory=single", cwd=place)
    assert again.returncode == 2
    assert f"some are queued or running: scancel {job.number}" in again.stderr


def test_jobs_of_a_chain_run_one_after_the_other_and_end_with_the_time_limits_signal(
    submit: Callable[..., Job], ends: Callable[[str], None], on_cluster: Run, place: Path
) -> None:
    ends('trap "exit 1" USR1; for i in $(seq 300); do sleep 0.1; done')
    job = submit("chain", "--nodes=2", "--chain=2", site="recorder.env")
    first, second = text(job.run / "slurm/jobs").split()
    wait_for((place / "record" / f"{first}.1.0").exists, "a running task")
    later = Job(on_cluster, second, job.run)
    assert later.state() == "PENDING"
    on_cluster("scancel", "--signal=USR1", "--batch", first)
    wait_for(job.ended, "the end of the first")
    assert "Slurm does not requeue this job; what is submitted next goes on" in job.log()
    wait_for((place / "record" / f"{second}.1.0").exists, "the second job")


@pytest.mark.slow
def test_starts_without_progress_are_counted_over_the_jobs_of_a_chain(
    submit: Callable[..., Job], ends: Callable[[str], None], on_cluster: Run
) -> None:
    ends("exit 1")
    job = submit("vain", "--nodes=1", "--chain=3", site="recorder.env")
    first, second, third = (
        Job(on_cluster, number, job.run) for number in text(job.run / "slurm/jobs").split()
    )
    wait_for(third.ended, "the end of the last job")
    assert first.log().splitlines()[-1].endswith("goes on from checkpoint none")
    for stopped in (second, third):
        assert "stopped: no progress in 2 starts" in stopped.log().splitlines()[-1]
    assert "; this one is not tried. " in third.log()


# What the shell or Slurm might take for more than a name. None may make a file `canary`; each is
# refused, or arrives as it was given.
_NAMES = [
    "$(touch canary)", "`touch canary`", "a; touch canary", "a && touch canary", "> canary",
    "it's \"quoted\"", "--wrap=touch canary", "%j%x \\n", "* ?", "${PATH}",
]  # fmt: skip
_OVERRIDES = [
    "wandb.name=$(touch canary)", "wandb.name=a`touch canary`", "wandb.name=a; touch canary",
    "wandb.name='a|touch canary'", "wandb.name=<(touch canary)", "wandb.name=\\$(touch canary)",
]  # fmt: skip
_DIRECTORIES = ["r $(touch canary)", "r'q' \"d\" `touch canary`", "r; touch canary &"]
_REFUSED = [
    (("--job-name=a\ntouch canary",), "holds a control character"),
    (("--wrap=touch canary",), "--wrap: is not an option of this command"),
    (("--output=$(touch canary)",), "--output: is not an option of this command"),
    (("--export=ALL,A=$(touch canary)",), "--export: is not an option of this command"),
    (("touch canary",), "touch canary: is not an option in full"),
    (("--nodes=1; touch canary",), "nodes: '1; touch canary' is not a number"),
    (("--chain=a[$(touch canary)]",), "--chain: a[$(touch canary)] is not a number"),
    (("--partition=main; touch canary",), "Invalid partition name specified"),
    (("--", "run.directory=a\ntouch canary"), "holds a control character"),
    (("--", "run.directory=a%j"), "goes into the names of Slurm's logs"),
    (("--", "wandb.name=${oc.env:HOME}"), "uses a resolver"),
    (("--", "--wandb.name=x"), "--wandb.name=x: unknown option"),
    (("--", "wandb.name=!!python/object/apply:os.system ['touch canary']"), "is not valid YAML"),
    (("--", "$(touch canary)"), "'$(touch canary)': expected key=value"),
]


def recorded(job: Job) -> list[str]:
    """Job id, working directory and arguments of what the job would run on its first node."""
    path = job.run.parent / "record" / f"{job.number}.0.0"
    wait_for(path.exists, f"job {job.number}")
    return path.read_text().split("\0")[:-1]


def test_hostile_names_arrive_as_they_were_given(
    submit: Callable[..., Job], on_cluster: Run, place: Path
) -> None:
    named = [
        submit(f"n{index}", "--nodes=1", f"--job-name={name}", site="recorder.env")
        for index, name in enumerate(_NAMES)
    ]
    shown = on_cluster("squeue", "--states=all", "--noheader", "--format=%i %j").stdout
    names = dict(line.split(" ", 1) for line in shown.splitlines())
    assert [names[job.number] for job in named] == _NAMES
    job = submit("overridden", "--nodes=2", "--", *_OVERRIDES, site="recorder.env")
    words = recorded(job)
    assert words[1] == str(place) and words[-len(_OVERRIDES) - 1 : -1] == _OVERRIDES
    placed = [submit(name, "--nodes=1", site="recorder.env") for name in _DIRECTORIES]
    assert [recorded(job)[-1] for job in placed] == [f"run.directory={n}" for n in _DIRECTORIES]
    for each in [*named, job, *placed]:
        wait_for(each.ended, "the end of all")
        assert each.log().endswith(" finished\n")
    assert not list(place.rglob("canary*")) and not list(ROOT.glob("canary*"))


@pytest.mark.parametrize(("words", "told"), _REFUSED, ids=[told for _, told in _REFUSED])
def test_hostile_words_are_refused(
    on_cluster: Run, place: Path, words: tuple[str, ...], told: str
) -> None:
    line = [ROOT / "slurm/submit", "train", "c.yaml", "--site=recorder.env", "--nodes=1", *words]
    more = [] if "--" in words else ["--", "run.directory=refused"]
    done = on_cluster(*line, *more, cwd=place)
    assert done.returncode in (1, 2) and "job:" not in done.stdout, done.stdout
    assert "Traceback" not in done.stderr and told in done.stderr, done.stderr
    assert not list(place.rglob("canary*")) and not list(ROOT.glob("canary*"))


@pytest.mark.slow
def test_preemption_and_the_time_limit_are_survived_on_other_numbers_of_nodes(
    submit: Callable[..., Job], on_cluster: Run
) -> None:
    words = ("--partition=low", "--exclusive", "--nodes=1-3", "--time=2")
    job = submit("elastic", *words, "--", "train.steps=100000")
    wait_for(lambda: len(losses(job.run)) > 2, "a step on three nodes")
    other = on_cluster("sbatch", "--parsable", "--exclusive", "--output=/dev/null",
                       "--wrap=sleep 300").stdout.strip()  # fmt: skip
    job.start_again(1)
    assert "stopped by a signal after a checkpoint" in job.log()
    reached = max(losses(job.run))
    wait_for(lambda: "start 1, on 2 nodes" in job.log(), "two nodes")
    wait_for(lambda: max(losses(job.run)) > reached, "a step on two nodes")
    on_cluster("scancel", other)
    job.start_again(2)  # by the time limit
    assert "signal USR1: the ranks finish their step and save" in job.log()
    wait_for(lambda: "start 2, on 3 nodes" in job.log(), "three nodes again")


@pytest.mark.slow
def test_every_start_takes_the_nodes_that_there_are_and_the_run_ends_as_on_one(
    submit: Callable[..., Job], on_cluster: Run, place: Path
) -> None:
    def leave(*nodes: str) -> None:
        for node in ("n1", "n2", "n3"):
            state = ["state=resume"] if node in nodes else ["state=drain", "reason=test"]
            on_cluster("scontrol", "update", f"nodename={node}", *state)

    alone = subprocess.Popen(
        [sys.executable, "-m", "pretrain.cli", "train", "c.yaml", "run.directory=on_one",
         "train.steps=600"],
        cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    leave("n1", "n2")
    job = submit("anywhere", "--nodes=1-3", "--exclusive", "--", "train.steps=600")
    wait_for(lambda: "start 0, on 2 nodes" in job.log(), "two nodes")
    for count, nodes in enumerate((("n3",), ("n1", "n2", "n3"), ("n2", "n3")), 1):
        reached = max(losses(job.run), default=0)
        wait_for(lambda: max(losses(job.run), default=0) > reached + 2, "some steps")  # noqa: B023
        leave(*nodes)
        on_cluster("scancel", "--signal=USR1", "--batch", job.number)
        job.start_again(count)
        wait_for(lambda: f"start {count}, on {len(nodes)} nodes" in job.log(), str(nodes))  # noqa: B023
    wait_for(job.ended, "the end of the run", 300)
    leave("n1", "n2", "n3")
    assert job.state() == "COMPLETED", job.log()
    assert alone.wait() == 0
    ours, theirs = losses(job.run), losses(place / "on_one")
    assert sorted(ours) == list(range(1, 601)) == sorted(theirs)
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-5
    command = [sys.executable, ROOT / "tools/check_ledger.py", job.run]
    checked = subprocess.run(command, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)},
                             capture_output=True, text=True)  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
def test_a_pipeline_prepares_verifies_trains_and_evaluates(on_cluster: Run, place: Path) -> None:
    texts = place / "corpus"
    texts.mkdir()
    source = random.Random(5)
    for number in range(24):
        words = ("".join(source.choices("abcdefghij", k=5)) for _ in range(400))
        (texts / f"{number}.txt").write_text(" ".join(words))
    for name, extra in (("train", ""), ("val", ", path: set_train/tokenizer.model")):
        (place / f"set_{name}.yaml").write_text(
            f"output: set_{name}\nroot: corpus\nsources: [{{name: s, paths: ['*.txt']}}]\n"
            f"shards: {{count: 12}}\ntokenizer: {{vocab_size: 350{extra}}}\n"
        )
    done = on_cluster(
        *(ROOT / "slurm/submit", "pipeline", "c.yaml", "--site=site.env", "--nodes=1-2"),
        *("--data=set_train.yaml", "slurm.tasks=2", "slurm.time=0-00:10", "--data=set_val.yaml"),
        *("--", "run.directory=piped", "data.train=set_train", "data.validation=set_val"),
        *("train.steps=5",),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    evaluation = next(x for x in done.stdout.splitlines() if x.startswith("eval:")).split()[2][:-1]
    job = Job(on_cluster, evaluation, place / "piped")
    wait_for(job.ended, "the evaluation", 400)
    assert job.state() == "COMPLETED", text(job.run / "slurm" / f"eval-{evaluation}.log")
    assert list((place / "piped").glob("eval-*.json"))
    (verified,) = (place / "set_val/slurm").glob("verify-*.log")
    assert "every checksum right" in verified.read_text()
