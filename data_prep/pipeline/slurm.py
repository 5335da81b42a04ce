"""Runs the stages as Slurm job arrays, each after the one before it, on one directory.

Tasks check which units are done when they begin, so a local run or another number of tasks can
continue where an array was stopped. datatrove's completion marks, one per rank, are not used.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from data_prep.config import Config
from data_prep.dataset import durable
from data_prep.dataset.settings import SettingsError
from data_prep.pipeline import pipeline, unchanged, workspace
from data_prep.pipeline.stages import Stage
from data_prep.pipeline.workspace import Work

# Of sbatch, each for an option that the arrays have; WAIT would keep `submit` until their end.
_VARIABLES = (
    *("PARTITION", "TIMELIMIT", "MEM_PER_CPU", "MEM_PER_NODE", "JOB_NAME", "OUTPUT", "ERROR"),
    *("ARRAY_INX", "EXPORT", "WAIT"),
)


class SubmitError(RuntimeError):
    """Slurm refused a job; the others have been cancelled."""


class StageTask(PipelineStep):  # type: ignore[misc]
    """A task of a stage. The stage is created here, in the job, since its units are known then."""

    def __init__(self, stage: type[Stage], config: Config, work: Work) -> None:
        self.type, self.name = "data-prep", stage.name
        super().__init__()
        self.stage, self.config, self.work = stage, config, work

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Do this task's units, in one process per CPU."""
        stage = self.stage(self.config, self.work)
        stage.check()
        cpus = 1 if stage.serial else self.config.slurm.cpus_per_task
        with ProcessPoolExecutor(cpus, multiprocessing.get_context("fork")) as pool:
            ranks = [rank + world_size * cpu for cpu in range(cpus)]
            running = [pool.submit(stage.run_task, own, world_size * cpus) for own in ranks]
            for process in running:
                process.result()
        if self.stage is pipeline.stages(self.config)[-1]:
            workspace.clear(self.work)
        return data


class _Array(SlurmPipelineExecutor):  # type: ignore[misc]
    def launch_merge_stats(self) -> None:
        """Submit no job for datatrove's statistics: the units' markers hold the results."""


def submit(config: Config) -> dict[str, str]:
    """Submit the remaining stages; returns job ids by stage, none if the data set is finished.

    Raises SubmitError, and what `pipeline.run` raises before it begins.
    """
    work = _open(config)
    with workspace.locked(work):
        if pipeline.finished(config, work) is not None:
            workspace.clear(work)
            unchanged.renew(work)
            return {}
        workspace.begin(work, config)
        return _launch(config, work)


def logs(output: Path, stage: str) -> Path:
    """The directory of a stage's logs: JOB_TASK.out for each task."""
    return output / "slurm" / stage / "slurm_logs"


def _open(config: Config) -> Work:
    output = Path(config.output).expanduser().absolute()
    problems = []
    if not config.slurm.partition:
        problems.append("slurm.partition: not set; `sinfo` lists the cluster's partitions")
    if shlex.quote(str(output)) != str(output) or "%" in str(output):
        problems.append(
            f"output: {output} goes into job scripts, where a path may contain only letters, "
            "digits and @ + = : , . / - _; give another directory"
        )
    if not shutil.which("sbatch"):
        problems.append("submit: sbatch was not found; use a login node of the cluster, or `run`")
    try:
        work = pipeline.open_work(config)
    except SettingsError as error:
        raise SettingsError([*error.problems, *problems]) from None
    if problems:
        raise SettingsError(problems)
    return dataclasses.replace(work, output=output)


def _remaining(config: Config, work: Work) -> list[type[Stage]]:
    """The first stage that is not done, and those after it."""
    stages = pipeline.stages(config)
    for index, stage in enumerate(stages):
        todo = stage(config, work)
        todo.check()
        if not all(todo.done()):
            return stages[index:]
    raise AssertionError("every stage is done, and there is no data set")


def _set_aside_variables(config: Config) -> None:
    """Drop the environment variables with which Slurm would replace what is set here.

    datatrove writes options into the script, and SBATCH_* take precedence over these.
    """
    given = (word.removeprefix("--").partition("=")[0] for word in config.slurm.sbatch)
    for name in (*(name.upper().replace("-", "_") for name in given), *_VARIABLES):
        os.environ.pop(f"SBATCH_{name}", None)
    # They would have scancel ask, or leave jobs out.
    for name in [name for name in os.environ if name.startswith("SCANCEL_")]:
        del os.environ[name]


def _launch(config: Config, work: Work) -> dict[str, str]:
    _set_aside_variables(config)
    # datatrove logs several lines for each job.
    logger.disable("datatrove")
    jobs: dict[str, str] = {}
    array = None
    # Without cached readings of the directory: a task reads it when it runs.
    bare = dataclasses.replace(work)
    try:
        for stage in _remaining(config, work):
            array = _array(stage, config, bare, array)
            array.launch_job()
            jobs[stage.name] = array.job_id
        # The first job is held until all ids are written, so that other commands see them.
        durable.write_json(work.jobs, jobs)
        subprocess.run(["scontrol", "release", next(iter(jobs.values()))], check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        if jobs:
            subprocess.run(["scancel", *jobs.values()], check=False)
        raise SubmitError(
            f"{work.output}: nothing was submitted: {error}; see Slurm's message above"
        ) from None
    return jobs


def _array(stage: type[Stage], config: Config, work: Work, after: _Array | None) -> _Array:
    settings = config.slurm
    extra = dict(word.removeprefix("--").partition("=")[::2] for word in settings.sbatch)
    # Without this, the jobs after a failed one would wait forever.
    extra["kill-on-invalid-dep"] = "yes"
    if after is None:
        extra["hold"] = ""
    folder = work.output / "slurm" / stage.name
    return _Array(
        [StageTask(stage, config, work)],
        tasks=1 if stage.serial else settings.tasks,
        time=settings.time,
        partition=settings.partition,
        cpus_per_task=settings.cpus_per_task,
        mem_per_cpu_gb=settings.mem_per_cpu_gb,
        workers=settings.workers or -1,
        job_name=f"data-prep-{stage.name}",
        qos="",
        env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        sbatch_args=extra,
        # No splitting: an array too long for the cluster is refused. If it were split, a task that
        # fails in the first part would not stop the stages after it.
        max_array_size=-1,
        depends=after,
        logging_dir=str(folder),
        slurm_logs_folder=str(logs(work.output, stage.name)),
        skip_completed=False,
        requeue_signals=None,
        # srun would give the task only one of the job's CPUs.
        with_srun=False,
    )
