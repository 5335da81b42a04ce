"""Jobs on a real Slurm: a run resumes by itself, or ends with a clear last line."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from pretrain.checkpoint.manifest import MANIFEST, PASSED_OVER, step_name
from tests.slurm.job import Job, Run, losses, text, wait_for

ROOT = Path(__file__).resolve().parents[2]


Submit = Callable[..., Job]


@contextmanager
def submitting(on_cluster: Run, place: Path) -> Iterator[Submit]:
    """slurm/submit train on the cluster; its first job. `end`: shell code, run by the recorder.

    `inside` are variables of the shell that submits. Every submitted job is cancelled at the end
    of the `with` block.
    """
    submitted: list[str] = []

    def submit(
        name: str,
        *words: str,
        site: str = "recorder.env",
        end: str = "",
        inside: Sequence[str] = (),
    ) -> Job:
        if end:
            (place / name).mkdir(exist_ok=True)
            (place / name / "end").write_text(end)
        line = [ROOT / "slurm/submit", "train", "c.yaml", f"--site={site}", *words]
        more = [] if "--" in words else ["--"]
        done = on_cluster("env", *inside, *line, *more, f"run.directory={name}", cwd=place)
        assert done.returncode == 0, done.stderr
        numbers = next(x for x in done.stdout.splitlines() if x.startswith("job:")).split()[1:]
        submitted.extend(numbers)
        return Job(on_cluster, numbers[0], place / name)

    try:
        yield submit
    finally:
        on_cluster("scancel", *submitted)


@pytest.fixture
def submit(on_cluster: Run, place: Path) -> Iterator[Submit]:
    """Submits jobs of one test."""
    with submitting(on_cluster, place) as submit:
        yield submit


@pytest.fixture(scope="module")
def jobs(on_cluster: Run, place: Path) -> Iterator[dict[str, Job]]:
    """Jobs that mostly wait, submitted together; each is the subject of one test."""
    (place / "older" / "attempts").mkdir(parents=True)
    (place / "older" / "attempts" / "000004.json").write_text("{}")
    (place / "older" / "exit.json").write_text('{\n "attempt": 3,\n "code": 2\n}\n')
    # As `pretrain train` writes it for this attempt; torchrun's own code is always 1.
    mistaken = (
        "mkdir -p mistaken/attempts\n"
        'echo \'{"attempt": 1, "code": 2, "step": 3, "why": "x"}\' >mistaken/exit.json\n'
        "exit 1\n"
    )
    good, damaged = (f"older/checkpoints/{step_name(step)}" for step in (7, 9))
    passed_over = f"mkdir -p {good} {damaged} && touch {good}/{MANIFEST} {damaged}/{MANIFEST}\n"
    passed_over += f"touch {damaged}/{PASSED_OVER}\nexit 1\n"
    replaced = '[ "${SLURM_RESTART_COUNT:-0}" = 1 ] && sleep 600; exit 1'
    chain = 'trap "exit 1" USR1; for i in $(seq 6000); do sleep 0.1; done'
    with submitting(on_cluster, place) as submit:
        yield {
            "stuck": submit("stuck", "--nodes=2", end="exit 1"),
            "mistaken": submit("mistaken", "--nodes=1", end=mistaken),
            "older": submit("older", "--nodes=1", end=passed_over),
            "replaced": submit("replaced", "--nodes=1", end=replaced),
            "cancelled": submit("cancelled", "--nodes=2", end="sleep 600"),
            "chain": submit("chain", "--nodes=2", "--chain=2", end=chain),
        }


def recorded(job: Job, task: int = 0, restart: int = 0) -> list[str]:
    """Job id, working directory and arguments of what a task of the job would run."""
    path = job.run.parent / "record" / f"{job.number}.{task}.{restart}"
    wait_for(lambda: text(path), f"job {job.number}, task {task} of restart {restart}")
    return path.read_text().split("\0")[:-1]


def test_a_job_without_progress_stops_with_a_clear_last_line(
    jobs: dict[str, Job], submit: Submit
) -> None:
    job = jobs["stuck"]
    job.restart(1)
    wait_for(job.ended, "the end")
    assert job.state() == "FAILED"
    last = job.log().splitlines()[-1]
    assert (
        "stopped: no progress in 2 attempts, all from checkpoint none; the last one: failed" in last
    )
    assert last.endswith("Fix the cause and submit again")
    again = submit("stuck", "--nodes=1")  # resets the count
    wait_for(lambda: "; requeued, " in again.log(), "another attempt")


def test_the_exit_code_that_the_trainer_recorded_decides(jobs: dict[str, Job]) -> None:
    job = jobs["mistaken"]
    wait_for(job.ended, "the end")
    assert job.state() == "FAILED"
    assert "stopped: an error in the configuration" in job.log().splitlines()[-1], job.log()
    assert not list((job.run / "slurm" / "starts").iterdir())  # it does not count as an attempt


def test_the_exit_code_of_an_older_attempt_is_ignored(jobs: dict[str, Job]) -> None:
    job = jobs["older"]
    wait_for(lambda: "; requeued, " in job.log(), "a requeue")
    assert "failed with exit code 1" in job.log()


def test_a_checkpoint_that_the_trainer_passed_over_is_not_the_newest(jobs: dict[str, Job]) -> None:
    job = jobs["older"]
    wait_for(lambda: "; requeued, " in job.log(), "a requeue")
    assert "from checkpoint step-00000007" in job.log()
    assert "step-00000009" not in job.log()


def test_an_attempt_that_was_replaced_does_not_disturb_its_successor(
    jobs: dict[str, Job], on_host: Run, place: Path
) -> None:
    job = jobs["replaced"]
    job.restart(1)
    recorded(job, restart=1)
    # The first attempt's shell, as a node that lost contact would still have it.
    shown = job.on_cluster("scontrol", "-o", "show", "job", job.number).stdout
    node = next(w for w in shown.split() if w.startswith("NodeList=")).partition("=")[2]
    environment = [f"SLURM_JOB_ID={job.number}", f"SLURM_JOB_NODELIST={node}"]
    words = [str(ROOT), str(place / "recorder.env"), str(job.run), "1", "2", "", "c.yaml"]
    old = on_host(node, "env", *environment, "bash", str(ROOT / "slurm/train.sbatch"), *words)
    assert old.returncode == 1 and "; restart 1 of this job has replaced this one" in old.stdout
    assert job.state() == "RUNNING" and len(list((job.run / "slurm/starts").iterdir())) == 2
    job.on_cluster("scancel", job.number)


def test_a_cancelled_job_is_not_requeued(jobs: dict[str, Job], on_cluster: Run) -> None:
    job = jobs["cancelled"]
    recorded(job, task=1)
    on_cluster("scancel", job.number)
    wait_for(job.ended, "the end")
    time.sleep(2)
    assert job.state() == "CANCELLED" and "; requeued, " not in job.log()
    assert job.log().endswith("not requeued: Slurm is ending this job (COMPLETING None)\n")


def test_jobs_of_a_chain_run_one_after_the_other_and_end_with_the_time_limits_signal(
    jobs: dict[str, Job], on_cluster: Run
) -> None:
    job = jobs["chain"]
    first, second = text(job.run / "slurm/jobs").split()
    recorded(job, task=1)
    later = Job(on_cluster, second, job.run)
    assert later.state() == "PENDING"
    on_cluster("scancel", "--signal=USR1", "--batch", first)
    wait_for(job.ended, "the end of the first")
    assert "Slurm refused to requeue this job; the next job of this run resumes" in job.log()
    recorded(later, task=1)
    on_cluster("scancel", second)


def test_a_run_has_one_job_at_a_time(submit: Submit, on_cluster: Run, place: Path) -> None:
    job = submit("single", "--nodes=1", "--hold")
    line = [ROOT / "slurm/submit", "train", "c.yaml", "--site=recorder.env", "--nodes=1"]
    again = on_cluster(*line, "--", "run.directory=single", cwd=place)
    assert again.returncode == 2
    assert f"only one may be; first scancel {job.number}" in again.stderr
    # A copy of the run has the list of its jobs, and none of them.
    shutil.copytree(place / "single", place / "copied")
    assert submit("copied", "--nodes=1", "--hold").number != job.number


def test_a_second_job_is_refused_whatever_the_users_squeue_lists_and_where_it_fails(
    submit: Submit, on_cluster: Run, place: Path
) -> None:
    job = submit("unlisted", "--nodes=1", "--hold")
    line = [ROOT / "slurm/submit", "train", "c.yaml", "--site=recorder.env", "--nodes=1"]
    for variable, why in {
        "SQUEUE_STATES=RUNNING": f"only one may be; first scancel {job.number}",
        "SLURM_CONF=/dev/null": "squeue cannot say whether jobs of this run are queued or running",
    }.items():
        again = on_cluster("env", variable, *line, "--", "run.directory=unlisted", cwd=place)
        assert again.returncode == 2 and why in again.stderr, again.stderr


def test_a_job_is_requeued_whatever_the_users_squeue_lists_and_if_it_fails_once(
    submit: Submit, place: Path
) -> None:
    late = place / "late" / "squeue"
    late.parent.mkdir()
    late.write_text(
        f'#!/bin/sh\n[ -e {place}/asked ] && exec {shutil.which("squeue")} "$@"\n'
        f"touch {place}/asked\necho 'Socket timed out on send/recv operation' >&2\nexit 1\n"
    )
    late.chmod(0o755)
    site = (place / "recorder.env").read_text()
    (place / "late.env").write_text(f"{site}export PATH={late.parent}:$PATH\n")
    inside = ["SQUEUE_STATES=PENDING"]
    job = submit("late_answer", "--nodes=1", site="late.env", end="exit 1", inside=inside)
    job.restart(1)
    assert (place / "asked").exists()


def test_a_job_does_not_inherit_the_job_from_whose_shell_it_was_submitted(
    submit: Submit, on_cluster: Run, place: Path
) -> None:
    memory = "SLURM_MEM_PER_CPU=100", "SLURM_MEM_PER_NODE=2000"  # srun takes only one of them
    salloc = "SLURM_JOB_ID=1", "SLURM_RESTART_COUNT=3", "SRUN_CPUS_PER_TASK=64", *memory
    job = submit("inherited", "--nodes=2", inside=salloc)
    wait_for(job.ended, "the end", shown=job.log)
    assert " restart 0, on 2 nodes" in job.log() and job.log().endswith(" finished\n"), job.log()


def test_steps_have_the_variables_of_the_site_where_sbatch_exports_none(
    submit: Submit, place: Path
) -> None:
    # As conda's activation does, it reads a variable that is not set.
    setup = 'site_setup() { export FROM_SITE="$CONDA_BACKUP_CC"set; }\n'
    (place / "conda.env").write_text((place / "recorder.env").read_text() + setup)
    kept = f'echo "$PRETRAIN_STARTS_COUNTED $FROM_SITE $PYTHONPATH" >{place}/kept; exit 0'
    inside = ["SBATCH_EXPORT=NONE"]
    job = submit("exporting_none", "--nodes=1", site="conda.env", end=kept, inside=inside)
    wait_for(job.ended, "the end", shown=job.log)
    assert job.log().endswith(" finished\n"), job.log()
    assert text(place / "kept").startswith(f"1 set {ROOT}")
    assert "warning" not in job.log()


def test_ranks_without_a_cpu_each_are_warned_of(submit: Submit) -> None:
    job = submit("crowded", "--nodes=1", "--", "launch.ranks=2")
    wait_for(job.ended, "the end", shown=job.log)
    assert "the 2 ranks of a node share what Slurm gave of its CPUs, here 1, which" in job.log()


def trained_alone(place: Path, name: str, *overrides: str) -> subprocess.Popen[bytes]:
    """Start a run on this machine without Slurm, for comparison."""
    line = ["pretrain.cli", "train", "c.yaml", f"run.directory={name}", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *line], cwd=place, env=environment, stdout=subprocess.DEVNULL
    )


def test_a_run_on_two_nodes_excludes_a_bad_node_saves_at_a_signal_and_resumes(
    submit: Submit, on_host: Run, on_cluster: Run, place: Path
) -> None:
    run = place / "two"
    run.mkdir()
    on_host("n2", "mount", "--bind", run, run)
    on_host("n2", "mount", "-o", "remount,bind,ro", run)
    # Slurm takes whichever nodes earlier jobs have left first: without n3 it has to take n2.
    on_cluster("scontrol", "update", "nodename=n3", "state=drain", "reason=test")
    job = submit("two", "--nodes=2", "--", "train.steps=60", site="site.env")
    alone = trained_alone(place, "alone", "launch.ranks=2", "train.steps=60")
    wait_for(lambda: "; requeued, " in job.log(), "the requeue", shown=job.log)
    on_cluster("scontrol", "update", "nodename=n3", "state=resume")
    job.restart(1)
    assert text(run / "slurm/exclude").startswith("n2\t")
    assert f"node n2 is excluded: {run} cannot be written: Read-only file system" in job.log()
    wait_for(lambda: len(losses(run)) > 2, "a step")
    on_cluster("scancel", "--signal=USR1", "--batch", job.number)
    job.restart(2)
    wait_for(job.ended, "the end of the run")
    on_host("n2", "umount", run)
    assert job.state() == "COMPLETED" and job.log().endswith(" finished\n"), job.log()
    assert "restart 1, on 2 nodes (n1 n3), from checkpoint none" in job.log()
    assert "signal USR1: the ranks finish their step and save" in job.log()
    assert alone.wait() == 0
    assert sorted(losses(run)) == list(range(1, 61)) and losses(run) == losses(place / "alone")
    ranks = [text(run / "slurm" / f"{job.number}-task-{task}.log") for task in (0, 1)]
    assert "resumed from" in ranks[0] and all("death signal" in log for log in ranks)
    found = [json.loads(line) for line in text(run / "preflight.jsonl").splitlines()]
    assert [list(record["bad"]) for record in found] == [["n2"], [], []]
    assert found[1]["environment"]["SLURM_JOB_ID"] == job.number
    assert set(found[1]["nodes"]["n3"]["versions"]) >= {"python", "torch", "deepspeed", "code"}


def test_nodes_excluded_by_hand_stay_excluded_once_the_job_is_requeued_without_others(
    submit: Submit, on_cluster: Run, place: Path
) -> None:
    logs = place / "by_hand" / "slurm"
    logs.mkdir(parents=True)
    (logs / "exclude").write_text("n2\tyesterday\t3\ta reason\n")
    job = submit("by_hand", "--nodes=1", "--exclude=n3", end="exit 1")
    job.restart(1)
    wait_for(lambda: ", restart 1, on 1 node (n1)" in job.log(), "the restart", shown=job.log)
    shown = on_cluster("scontrol", "-o", "show", "job", job.number).stdout.split()
    (excluded,) = (word.partition("=")[2] for word in shown if word.startswith("ExcNodeList="))
    nodes = on_cluster("scontrol", "show", "hostnames", excluded).stdout.split()
    assert sorted(nodes) == ["n2", "n3"]


@pytest.mark.slow
def test_a_job_that_fails_while_slurm_is_restarted_is_requeued(
    submit: Submit, on_cluster: Run, place: Path
) -> None:
    end = '[ "$SLURM_RESTART_COUNT" ] && sleep 60; sleep 3; exit 1'
    job = submit("restarted", "--nodes=1", end=end)
    recorded(job)
    on_cluster("pkill", "-x", "slurmctld")
    time.sleep(30)  # its clients give up after 8 s
    on_cluster("slurmctld")
    job.restart(1)


@pytest.mark.slow
def test_attempts_without_progress_are_counted_over_the_jobs_of_a_chain(
    submit: Submit, on_cluster: Run
) -> None:
    job = submit("vain", "--nodes=1", "--chain=3", end="exit 1")
    first, second, third = (
        Job(on_cluster, number, job.run) for number in text(job.run / "slurm/jobs").split()
    )
    wait_for(third.ended, "the end of the last job")
    assert first.log().splitlines()[-1].endswith("resumes from checkpoint none")
    for stopped in (second, third):
        assert "stopped: no progress in 2 attempts" in stopped.log().splitlines()[-1]
    assert "; this job does not try again. " in third.log()


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
    (("--job-name=a\ntouch canary",), "contains a control character"),
    (("--wrap=touch canary",), "--wrap: unknown option"),
    (("--output=$(touch canary)",), "--output: unknown option"),
    (("--export=ALL,A=$(touch canary)",), "--export: unknown option"),
    (("touch canary",), "touch canary: expected an option written as"),
    (("--nodes=1; touch canary",), "nodes: '1; touch canary' is not a number"),
    (("--chain=a[$(touch canary)]",), "--chain: a[$(touch canary)] is not a number"),
    (("--partition=main; touch canary",), "Invalid partition name specified"),
    (("--", "run.directory=a\ntouch canary"), "contains a control character"),
    (("--", "run.directory=a%j"), "goes into the names of Slurm's logs"),
    (("--", "wandb.name=${oc.env:HOME}"), "uses a resolver"),
    (("--", "--wandb.name=x"), "--wandb.name=x: expected overrides, key=value, after --"),
    (("--", "data.mix=[!!python/object/apply:os.system ['touch canary']]"), "cannot be read"),
    (("--", "$(touch canary)"), "'$(touch canary)': expected key=value"),
]


def test_hostile_names_arrive_as_they_were_given(
    submit: Submit, on_cluster: Run, place: Path
) -> None:
    directories = [*_DIRECTORIES, *(f"n{index}" for index in range(len(_DIRECTORIES), len(_NAMES)))]
    jobs = [
        submit(directory, "--nodes=1", f"--job-name={name}", "--", *_OVERRIDES)
        for directory, name in zip(directories, _NAMES, strict=True)
    ]
    shown = on_cluster("squeue", "--states=all", "--noheader", "--format=%i %j").stdout
    names = dict(line.split(" ", 1) for line in shown.splitlines())
    assert [names[job.number] for job in jobs] == _NAMES
    for job, directory in zip(jobs, directories, strict=True):
        words = recorded(job)
        assert words[1] == str(place)
        assert words[-len(_OVERRIDES) - 1 :] == [*_OVERRIDES, f"run.directory={directory}"]
    for job in jobs:
        wait_for(job.ended, "the end of all")
        assert job.log().endswith(" finished\n")
    assert not list(place.rglob("canary*")) and not list(ROOT.glob("canary*"))


@pytest.mark.parametrize(("words", "message"), _REFUSED, ids=[message for _, message in _REFUSED])
def test_hostile_words_are_refused(
    on_cluster: Run, place: Path, words: tuple[str, ...], message: str
) -> None:
    line = [ROOT / "slurm/submit", "train", "c.yaml", "--site=recorder.env", "--nodes=1", *words]
    more = [] if "--" in words else ["--", "run.directory=refused"]
    done = on_cluster(*line, *more, cwd=place)
    assert done.returncode in (1, 2) and "job:" not in done.stdout, done.stdout
    assert "Traceback" not in done.stderr and message in done.stderr, done.stderr
    assert not list(place.rglob("canary*")) and not list(ROOT.glob("canary*"))


@pytest.mark.slow
def test_a_run_resumes_on_other_numbers_of_nodes_after_preemption_and_the_time_limit(
    submit: Submit, on_cluster: Run
) -> None:
    words = ("--partition=low", "--exclusive", "--nodes=1-3", "--time=2")
    job = submit("elastic", *words, "--", "train.steps=100000", site="site.env")
    wait_for(lambda: len(losses(job.run)) > 2, "a step on three nodes")
    other = on_cluster("sbatch", "--parsable", "--exclusive", "--output=/dev/null",
                       "--wrap=sleep 300").stdout.strip()  # fmt: skip
    job.restart(1)
    assert "stopped by a signal after a checkpoint" in job.log()
    reached = max(losses(job.run))
    wait_for(lambda: "restart 1, on 2 nodes" in job.log(), "two nodes")
    wait_for(lambda: max(losses(job.run)) > reached, "a step on two nodes")
    on_cluster("scancel", other)
    job.restart(2)  # by the time limit
    assert "signal USR1: the ranks finish their step and save" in job.log()
    wait_for(lambda: "restart 2, on 3 nodes" in job.log(), "three nodes again")


@pytest.mark.slow
def test_every_attempt_takes_the_free_nodes_and_the_run_ends_as_on_one(
    submit: Submit, on_cluster: Run, place: Path
) -> None:
    def leave(*nodes: str) -> None:
        for node in ("n1", "n2", "n3"):
            state = ["state=resume"] if node in nodes else ["state=drain", "reason=test"]
            on_cluster("scontrol", "update", f"nodename={node}", *state)

    alone = trained_alone(place, "on_one", "train.steps=600")
    leave("n1", "n2")
    job = submit("anywhere", "--nodes=1-3", "--exclusive", "--", "train.steps=600", site="site.env")
    wait_for(lambda: "restart 0, on 2 nodes" in job.log(), "two nodes")
    for count, nodes in enumerate((("n3",), ("n1", "n2", "n3"), ("n2", "n3")), 1):
        reached = max(losses(job.run), default=0)
        wait_for(lambda: max(losses(job.run), default=0) > reached + 2, "some steps")  # noqa: B023
        leave(*nodes)
        on_cluster("scancel", "--signal=USR1", "--batch", job.number)
        job.restart(count)
        wait_for(lambda: f"restart {count}, on {len(nodes)} node" in job.log(), str(nodes))  # noqa: B023
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
