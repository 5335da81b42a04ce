"""A campaign of faults: whatever happens to a run on a real Slurm, it ends in the same weights.

The faults come in an order drawn by CAMPAIGN_SEED, each once the run has recovered from the one
before it: every kind once, or CAMPAIGN_FAULTS of them (30: every kind twice, and four more). The
job is submitted once and not touched again, except for its time limit. The recovery times are
printed as a table and written as JSON, to the directory in CAMPAIGN_RESULTS if it is set.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cluster import ROOT, Cluster, running_cluster, skip_without_cluster
from tests.slurm.job import Job, losses, wait_for
from tests.slurm.watch import Rename, Watch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SEED = 4
CHANCE = int(os.environ.get("CAMPAIGN_SEED", SEED))  # of the faults alone
STEPS_PER_FAULT = 24  # trained while a run recovers from a fault, with some to spare
ELASTIC_STEPS = 100
# At the demo's rate rounding grows: 2 and 4 ranks, undisturbed, differ by 8e-4 after 100 steps.
ELASTIC_RATE = "optim.lr=3.0e-4"
PATIENCE = 600  # seconds, for the run to recover from a fault

# The model of the demo; a step takes half a second on two cores. Lanes for 2, 4 and 6 ranks.
CONFIG = """
data: {train: data, lanes: 12}
model: {d_model: 128, n_layers: 3, n_heads: 4, n_kv_heads: 2, d_head: 32, d_ff: 344, segment: 64}
train: {window_segments: 2, log_every: 1, validate_every: 0}
optim: {lr: 3.0e-3, warmup_steps: 30}
checkpoint: {every: 5}
watchdog: {start: 300, step: 40, save: 40}
wandb: {mode: disabled}
launch: {device: cpu, ranks: 2}
"""
SITE = f"""
PARTITION=low GPUS_PER_NODE=0 GRACE_SECONDS=30 PYTHON={sys.executable}
PREFLIGHT_OPTIONS=(--slow-factor=1000) # other work on this machine is no fault of a node
export OMP_NUM_THREADS=1
"""


@dataclass
class Fault:
    """What was done and what it took; times in seconds.

    `recovery` is from the fault to the first step that had not been trained before: until Slurm
    has taken the nodes away (`noticed`), without nodes (`waiting`), and the rest (`starting`: the
    checks, launching the ranks, and steps that are trained again, `repeated` of them).
    """

    kind: str
    moment: str
    step: int
    recovery: float
    noticed: float
    waiting: float
    starting: float
    starts: int
    repeated: int


@dataclass
class Campaign:
    """A run, what happens to it, and what is seen of it."""

    cluster: Cluster
    job: Job
    watch: Watch
    chance: random.Random
    struck: float = 0.0
    faults: list[Fault] = field(default_factory=list)

    def scontrol(self, *words: str) -> None:
        done = self.cluster.on("ctl", "timeout", "20", "scontrol", *words)
        assert done.returncode == 0, (words, done.stderr)

    def shown(self, name: str) -> str:
        """A field of `scontrol show job`."""
        output = self.cluster.on("ctl", "scontrol", "-o", "show", "job", self.job.number).stdout
        found = re.search(rf" {name}=(\S+)", output)
        assert found, output
        return found[1]

    def node(self) -> str:
        """One of the job's nodes."""
        names = self.cluster.on("ctl", "scontrol", "show", "hostnames", self.shown("NodeList"))
        return self.chance.choice(names.stdout.split())

    def wait_for_loss(self) -> None:
        """Wait until Slurm has taken the job's nodes away."""
        since = self.struck
        lost = lambda: any(t > since and s != "RUNNING" for t, s in self.watch.states)  # noqa: E731
        wait_for(lost, "the job without nodes", PATIENCE)

    def wait_for_the_next_start(self) -> None:
        """Wait until the job has nodes again."""
        self.wait_for_loss()
        wait_for(lambda: self.watch.running, "the job on nodes again", PATIENCE)

    def wait_for_nodes(self) -> None:
        """Wait until every node answers again."""

        def up() -> bool:
            states = self.cluster.on("ctl", "sinfo", "-hNp", "main", "-o", "%t").stdout.split()
            return len(states) == 3 and set(states) <= {"idle", "alloc", "mix", "comp"}

        wait_for(up, "three nodes that answer")

    def strike(
        self, kind: str, inject: Callable[[Campaign], None], ends: bool, moment: str
    ) -> None:
        """Do a fault, and wait until the run has recovered."""
        if moment == "save":
            saves = self.watch.saves
            wait_for(lambda: self.watch.saves > saves, "a save", PATIENCE)
        self.struck, attempt, reached = time.monotonic(), self.watch.attempt, self.watch.reached
        inject(self)
        since = self.struck
        wait_for(
            lambda: self.watch.first_new_step(since, attempt, ends) or self.job.ended(),
            f"a step after {kind} at step {reached}\n{self.job.log()[-3000:]}",
            PATIENCE,
        )
        at = self.watch.first_new_step(since, attempt, ends)
        assert at is not None, self.job.log()
        self.wait_for_nodes()
        noticed, waiting = self.watch.not_running(since, at)
        repeated = self.watch.trained_by(attempt) - self.watch.resumed_step() if ends else 0
        self.faults.append(
            Fault(
                kind,
                moment,
                reached,
                at - since,
                noticed if ends else 0.0,
                waiting,
                at - since - noticed - waiting if ends else at - since,
                self.watch.attempt - attempt,
                repeated,
            )
        )
        print(json.dumps(asdict(self.faults[-1])), file=sys.__stderr__, flush=True)


def kill_a_rank(c: Campaign) -> None:
    c.cluster.fault("kill_rank", c.node())


def kill_torchrun(c: Campaign) -> None:
    c.cluster.fault("kill_torchrun", c.node())


def stop_a_rank(c: Campaign) -> None:
    c.cluster.fault("stop_rank", c.node())


def kill_slurmd(c: Campaign) -> None:
    node = c.node()
    c.cluster.fault("kill_slurmd", node)
    time.sleep(c.chance.uniform(1, 4))
    c.cluster.fault("start_slurmd", node)


def kill_slurmctld(c: Campaign) -> None:
    c.cluster.fault("kill_slurmctld")
    time.sleep(c.chance.uniform(1, 4))
    c.cluster.fault("start_slurmctld")


def lose_power(c: Campaign) -> None:
    node = c.node()
    c.cluster.fault("power_off", node)
    c.wait_for_loss()
    c.cluster.fault("power_on", node)


def cut_a_link(c: Campaign) -> None:
    node = c.node()
    c.cluster.fault("cut_link", node)
    c.wait_for_loss()
    c.cluster.fault("heal_link", node)


def cut_a_link_for_a_moment(c: Campaign) -> None:
    node = c.node()
    c.cluster.fault("cut_link", node)
    time.sleep(c.chance.uniform(1, 3))
    c.cluster.fault("heal_link", node)


def preempt(c: Campaign) -> None:
    line = ("--partition=main", "--exclusive", "--nodes=3", "--output=/dev/null")
    done = c.cluster.on("ctl", "sbatch", *line, "--wrap=sleep 10")
    assert done.returncode == 0, done.stderr
    c.wait_for_loss()


def reach_the_time_limit(c: Campaign) -> None:
    minutes = re.match(r"(\d+):(\d+):", c.shown("RunTime"))
    assert minutes
    signals = c.job.log().count("signal USR1:")
    limit = 60 * int(minutes[1]) + int(minutes[2]) + 1
    c.scontrol("update", f"JobId={c.job.number}", f"TimeLimit={limit}")
    wait_for(lambda: c.job.log().count("signal USR1:") > signals, "a signal", PATIENCE)
    c.struck = time.monotonic()
    c.wait_for_loss()
    c.scontrol("update", f"JobId={c.job.number}", "TimeLimit=60")


def signal_the_batch_script(c: Campaign) -> None:
    c.cluster.on("ctl", "scancel", "--signal=USR1", "--batch", c.job.number)


def requeue(c: Campaign) -> None:
    c.scontrol("requeue", c.job.number)


def fill_the_disk(c: Campaign) -> None:
    c.cluster.fault("fill_disk", c.job.run)
    c.wait_for_loss()
    c.cluster.fault("free_disk", c.job.run)


def lose_power_for_longer(c: Campaign) -> None:
    node = c.node()
    c.cluster.fault("power_off", node)
    c.wait_for_the_next_start()
    c.cluster.fault("power_on", node)


def kill_a_rank_while_slurmctld_is_away(c: Campaign) -> None:
    node = c.node()
    c.cluster.fault("kill_slurmctld")
    c.cluster.fault("kill_rank", node)
    time.sleep(30)  # Slurm's commands give up after 8 s
    c.cluster.fault("start_slurmctld")


def preempt_on_two_nodes(c: Campaign) -> None:
    line = ("--parsable", "--partition=main", "--exclusive", "--nodes=2", "--output=/dev/null")
    other = c.cluster.on("ctl", "sbatch", *line, "--wrap=sleep 600").stdout.strip()
    c.wait_for_the_next_start()
    c.cluster.on("ctl", "scancel", other)


# What each does, and whether it ends the job's current attempt.
FAULTS: dict[str, tuple[Callable[[Campaign], None], bool]] = {
    "SIGKILL of a rank": (kill_a_rank, True),
    "SIGKILL of torchrun": (kill_torchrun, True),
    "SIGSTOP of a rank": (stop_a_rank, True),
    "SIGKILL of slurmd, started again": (kill_slurmd, False),
    "SIGKILL of slurmctld, started again": (kill_slurmctld, False),
    "power loss of a node": (lose_power, True),
    "link cut until Slurm gives the node up": (cut_a_link, True),
    "link cut for 1 to 3 s": (cut_a_link_for_a_moment, False),
    "preemption": (preempt, True),
    "time limit": (reach_the_time_limit, True),
    "scancel --signal=USR1 --batch": (signal_the_batch_script, True),
    "scontrol requeue": (requeue, True),
    "full disk": (fill_the_disk, True),
}
COUNT = int(os.environ.get("CAMPAIGN_FAULTS", len(FAULTS)))
STEPS = STEPS_PER_FAULT * (COUNT + 8)
# For a job on 1 to 3 nodes, in this order; and the nodes of the attempt that follows.
ELASTIC: dict[str, tuple[Callable[[Campaign], None], int]] = {
    "power loss of a node until the run has resumed": (lose_power_for_longer, 2),
    "SIGKILL of a rank, slurmctld away for 30 s": (kill_a_rank_while_slurmctld_is_away, 3),
    "preemption on two nodes": (preempt_on_two_nodes, 1),
    "scancel --signal=USR1 --batch": (signal_the_batch_script, 3),
}


def order_of_faults(chance: random.Random, count: int) -> list[tuple[str, str]]:
    """Every kind equally often, others drawn, shuffled; a third of them strikes during a save."""
    kinds = [*FAULTS] * (count // len(FAULTS))
    quick = [kind for kind in FAULTS if kind not in ("time limit", "preemption")]
    kinds += chance.choices(quick, k=count - len(kinds))
    chance.shuffle(kinds)
    return [(kind, "save" if chance.random() < 1 / 3 else "step") for kind in kinds]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Any]) -> Path:
    """A directory with data and configuration; its `runs` is a small file system of its own."""
    root = tmp_path_factory.mktemp("campaign")
    chance = np.random.default_rng(SEED)
    lengths = chance.integers(200, 3000, size=300)
    documents = [3 + np.minimum(chance.zipf(1.3, size=length), 252) for length in lengths]
    write_data_set(root / "data", documents, 12, 256)
    (root / "c.yaml").write_text(CONFIG)
    (root / "site.env").write_text(SITE)
    (root / "runs").mkdir()
    return root


@pytest.fixture(scope="module")
def cluster(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose hosts see `runs`, which was mounted before they started."""
    skip_without_cluster()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "runs", place / "runs"], check=True)
    try:
        with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
            yield cluster
    finally:
        subprocess.run(["umount", "--lazy", place / "runs"], check=True)


def undisturbed(place: Path, *settings: str) -> Path:
    """The same run by four ranks on this machine."""
    run = place / f"undisturbed-{settings[0]}"
    command = [sys.executable, "-m", "pretrain.cli", "train", "c.yaml", "launch.ranks=4"]
    done = subprocess.run(
        [*command, f"run.directory={run.name}", *settings],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return run


def submitted(cluster: Cluster, place: Path, name: str, nodes: str, *settings: str) -> Job:
    """The job of a run, by the one command that its user types."""
    line = [ROOT / "slurm/submit", "train", "c.yaml", "--site=site.env", "--time=60"]
    words = [f"--nodes={nodes}", "--", f"run.directory=runs/{name}", *settings]
    done = cluster.on("ctl", *line, *words, cwd=place)
    assert done.returncode == 0, done.stderr
    number = next(x for x in done.stdout.splitlines() if x.startswith("job:")).split()[1]
    return Job(lambda *command: cluster.on("ctl", *command), number, place / "runs" / name)


def assert_one_writer(renames: Sequence[Rename]) -> None:
    """Once a later attempt has committed or pruned, no earlier one does; a step has one commit."""
    attempts = [rename.attempt for rename in renames]
    assert attempts == sorted(attempts)
    steps = [rename.step for rename in renames if rename.kind == "commit"]
    assert steps == sorted(set(steps)) and len(steps) > 1


def assert_every_token_once(run: Path, place: Path) -> None:
    checked = subprocess.run(
        [sys.executable, ROOT / "tools/check_ledger.py", run],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    print(checked.stdout)


def weights(run: Path, step: int) -> dict[str, bytes]:
    """Every rank's file of a checkpoint: weights, optimizer, and memories of lanes."""
    directory = run / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def results(campaign: Campaign, wall: float) -> dict[str, Any]:
    """What is published: by kind and over all, and goodput.

    Useful is the time of each step once, in the attempt whose result was kept; not the time of
    launches, checks, checkpoints, steps trained again, and waiting.
    """
    lines = (campaign.job.run / "metrics.jsonl").read_text().splitlines()
    useful = sum(json.loads(line).get("seconds_per_step", 0.0) for line in lines)
    waiting = sum(fault.waiting for fault in campaign.faults)
    return {
        "faults": [asdict(fault) for fault in campaign.faults],
        "wall_seconds": wall,
        "useful_seconds": useful,
        "goodput": useful / wall,
        "goodput_of_held_nodes": useful / (wall - waiting),
        "cpus": os.cpu_count(),
    }


def table(faults: Sequence[Fault]) -> str:
    """Seconds by kind: recovery, and the medians of its parts."""
    kinds = {kind: [fault for fault in faults if fault.kind == kind] for kind in FAULTS | ELASTIC}
    kinds = {kind: found for kind, found in kinds.items() if found} | {"all": list(faults)}
    rows = ["| fault | count | median | p95 | noticed | waiting | starting | steps repeated |"]
    rows.append("|---" * 8 + "|")
    for kind, found in kinds.items():
        recovery = [fault.recovery for fault in found]
        parts = [
            statistics.median(getattr(fault, part) for fault in found)
            for part in ("noticed", "waiting", "starting", "repeated")
        ]
        numbers = [statistics.median(recovery), percentile(recovery, 0.95), *parts]
        cells = [kind, str(len(found)), *(f"{number:.0f}" for number in numbers)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def publish(
    campaign: Campaign, wall: float, place: Path, terminal: pytest.CaptureFixture[str]
) -> None:
    found = results(campaign, wall)
    summary = {key: value for key, value in found.items() if key != "faults"}
    directory = Path(os.environ.get("CAMPAIGN_RESULTS", place))
    path = directory / f"{campaign.job.run.name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    with terminal.disabled():
        print(f"\n{path}\n{table(campaign.faults)}\n{json.dumps(summary)}", flush=True)


def test_a_run_ends_in_the_same_weights_whatever_happens_to_it(
    cluster: Cluster, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = undisturbed(place, f"train.steps={STEPS}")
    chance = random.Random(CHANCE)
    began = time.monotonic()
    job = submitted(cluster, place, "struck", "2", f"train.steps={STEPS}")
    with Watch(cluster, job.number, job.run) as watch:
        campaign = Campaign(cluster, job, watch, chance)
        for index, (kind, moment) in enumerate(order_of_faults(chance, COUNT)):
            # Some strike later than they are due, and the run must not end before the last one.
            due = STEPS * (index + chance.random()) // (COUNT + 8) + 1
            wait_for(lambda: watch.reached >= due, f"step {due}", PATIENCE)  # noqa: B023
            assert not job.ended(), f"the run ended before {kind}\n{job.log()}"
            campaign.strike(kind, *FAULTS[kind], moment)
        wait_for(job.ended, "the end of the run", PATIENCE)
    assert job.state() == "COMPLETED" and job.log().endswith(" finished\n"), job.log()
    publish(campaign, time.monotonic() - began, place, capsys)
    assert_every_token_once(job.run, place)
    assert_one_writer(watch.renames)
    assert losses(job.run) == losses(whole) and len(losses(whole)) == STEPS
    assert weights(job.run, STEPS) == weights(whole, STEPS) and len(weights(whole, STEPS)) == 4


def test_a_run_ends_as_undisturbed_on_whatever_number_of_ranks_it_comes_back(
    cluster: Cluster, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (f"train.steps={ELASTIC_STEPS}", ELASTIC_RATE)
    whole = undisturbed(place, *settings)
    began = time.monotonic()
    job = submitted(cluster, place, "elastic", "1-3", *settings)
    with Watch(cluster, job.number, job.run) as watch:
        campaign = Campaign(cluster, job, watch, random.Random(SEED))
        for index, (kind, (inject, nodes)) in enumerate(ELASTIC.items()):
            due = ELASTIC_STEPS * (index + 1) // (len(ELASTIC) + 2)
            wait_for(lambda: watch.reached >= due, f"step {due}", PATIENCE)  # noqa: B023
            campaign.strike(kind, inject, ends=True, moment="step")
            (*_, count) = re.findall(r"restart \d+, on (\d) nodes?", job.log())
            assert int(count) == nodes, job.log()
        wait_for(job.ended, "the end of the run", PATIENCE)
    assert job.state() == "COMPLETED" and job.log().endswith(" finished\n"), job.log()
    publish(campaign, time.monotonic() - began, place, capsys)
    assert_every_token_once(job.run, place)
    assert_one_writer(watch.renames)
    ours, theirs = losses(job.run), losses(whole)
    assert sorted(ours) == sorted(theirs) == list(range(1, ELASTIC_STEPS + 1))
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-5
