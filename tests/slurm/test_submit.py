"""slurm/submit before anything is queued: the plan, and what is refused."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import programs

ROOT = Path(__file__).resolve().parents[2]
Submit = Callable[..., subprocess.CompletedProcess[str]]


def sbatch_words(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The arguments of every sbatch that would be called."""
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("would submit: sbatch ")]
    return [shlex.split(line)[3:] for line in lines]


def mistakes(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "would submit" not in done.stdout and "Traceback" not in done.stderr
    return [line[4:] for line in done.stderr.splitlines() if line.startswith("  - ")]


def test_a_dry_run_shows_the_plan_the_command_and_the_script(dry: Submit, place: Path) -> None:
    done = dry("train", "c.yaml", "--nodes", "1-2", "--partition", "low", "--", "train.steps=7")
    (words,) = sbatch_words(done)
    *options, script, project, site, run, ranks, patience, excluded, config, setting = words
    assert (script, project) == (str(ROOT / "slurm/train.sbatch"), str(ROOT))
    assert (site, run) == (str(place / "site.env"), str(place / "run"))
    assert (ranks, patience, excluded) == ("1", "2", "")
    assert (config, setting) == ("c.yaml", "train.steps=7")
    assert {"--nodes=1-2", "--partition=low", "--job-name=run", "--requeue"} <= set(options)
    assert {f"--output={place}/run/slurm/%j.log", "--signal=B:USR1@60"} <= set(options)
    assert "ranks:   1 on each of 1-2 nodes, sharing 12 lanes" in done.stdout
    assert (ROOT / "slurm/train.sbatch").read_text() in done.stdout
    assert not (place / "run").exists()


def test_no_file_of_the_user_is_imported_in_place_of_ours(dry: Submit, place: Path) -> None:
    files = [place / f"{name}.py" for name in ("pretrain", "data_prep", "yaml", "queue")]
    for file in files:
        file.write_text("raise SystemExit('a file of the user')")
    try:
        assert sbatch_words(dry("train", "c.yaml", "--nodes=1-4"))
    finally:
        for file in files:
            file.unlink()


def test_a_path_behind_an_equals_sign_may_begin_at_home(
    dry: Submit, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place))
    words = ["--nodes=1-4", "--site=~/site.env", "--", "run.directory=~/at home #2"]
    ((*_, site, run, _, _, _, _, _),) = sbatch_words(dry("train", "~/c.yaml", *words))
    assert (site, run) == (str(place / "site.env"), str(place / "at home #2"))
    (place / "R&D").symlink_to(place)
    monkeypatch.setenv("HOME", str(place / "R&D"))
    assert sbatch_words(dry("train", "~/c.yaml", *words))


def test_lanes_must_divide_evenly_over_every_number_of_nodes(dry: Submit) -> None:
    assert mistakes(dry("train", "c.yaml", "--nodes", "4-6", "--", "launch.ranks=1")) == [
        "nodes: 12 lanes (data.lanes) cannot be shared evenly by 5 nodes of 1 rank; choose "
        "1, 2, 3, 4, 6, 12 nodes, or data.lanes a multiple of 60"
    ]
    assert sbatch_words(dry("train", "c.yaml", "--nodes=1-4"))


def test_all_mistakes_in_a_configuration_are_reported_before_a_job_is_queued(dry: Submit) -> None:
    found = mistakes(
        dry("train", "c.yaml", "--nodes", "0-3", "--", "data.train=nowhere", "run.directory=a%j")
    )
    assert [problem.split(":")[0] for problem in found] == ["run.directory", "nodes", "data.train"]
    found = mistakes(dry("train", "c.yaml", "--nodes", "2", "--", "train.stepz=1", "zero.stage=7"))
    assert [problem.split(":")[0] for problem in found] == ["train.stepz", "zero.stage"]


def test_all_mistakes_in_a_command_line_are_reported_at_once(dry: Submit) -> None:
    found = mistakes(dry("train", "c.yaml", "-N", "2", "--wrap=id", "--chain=x", "train.steps=1"))
    assert [problem.split(":")[0] for problem in found] == [
        *("-N", "2", "--wrap", "train.steps=1", "--nodes", "--chain")
    ]
    assert "expected an option written as --name=value" in found[0]


def test_gpus_are_requested_as_the_site_file_says(dry: Submit, place: Path) -> None:
    site = place / "gpu.env"
    site.write_text((place / "site.env").read_text() + "GPUS_PER_NODE=4\nSBATCH_OPTIONS=(--x=1)\n")
    words = ("--site", "gpu.env", "--nodes", "3", "--", "launch.device=auto", "launch.ranks=0")
    ((*options,),) = sbatch_words(dry("train", "c.yaml", *words))
    assert options[options.index("--x=1") - 1] == "--gpus-per-node=4"
    site.write_text(site.read_text() + "GPU_REQUEST=--gres=gpu:h100:\n")
    ((*options,),) = sbatch_words(dry("train", "c.yaml", *words))
    assert "--gres=gpu:h100:4" in options
    ((*options,),) = sbatch_words(dry("train", "c.yaml", "--site", "gpu.env", "--nodes", "3"))
    assert not any(option.startswith("--g") for option in options)  # the configuration is for CPUs
    words = ("--nodes", "3", "--", "launch.device=cuda")
    assert mistakes(dry("train", "c.yaml", *words)) == [
        "launch.device: cuda, but the nodes have no GPUs; give their number per node"
    ]


def test_the_jobs_of_a_chain_share_one_name_and_wait_for_each_other(dry: Submit) -> None:
    jobs = sbatch_words(dry("train", "c.yaml", "--nodes", "2", "--chain", "3"))
    assert len(jobs) == 3 and jobs[0] == jobs[1] == jobs[2]
    assert {"--dependency=singleton", "--no-requeue", "--job-name=run"} <= set(jobs[0])


def test_what_a_job_waits_for_is_in_one_option_of_which_sbatch_takes_the_last(dry: Submit) -> None:
    def waits(verb: str, *words: str) -> list[str]:
        options = [word for job in sbatch_words(dry(verb, "c.yaml", *words)) for word in job]
        return [word for word in options if word.startswith("--dependency")]

    words = ("--nodes=2", "--dependency", "afterok:12,afterany:9")
    assert waits("train", *words) == ["--dependency=afterok:12,afterany:9"]
    joined = "--dependency=afterok:12,afterany:9,singleton"
    assert waits("train", *words, "--chain=2") == [joined] * 2
    assert waits("train", "--nodes=2", "--dependency=afterok:1?afterok:2")
    (found,) = mistakes(
        dry("train", "c.yaml", "--nodes=2", "--chain=2", "--dependency=afterok:1?afterok:2")
    )
    assert found.startswith("--dependency: afterok:1?afterok:2 cannot be joined with what the jobs")


def test_options_without_a_value_or_behind_the_overrides_are_refused(dry: Submit) -> None:
    found = mistakes(
        dry("train", "c.yaml", "--time", "--data=x", "--exclusive", "--mem", "--", "--help", "a=1")
    )
    assert [problem.split(":")[0] for problem in found] == [
        *("--time", "--mem", "--help", "--data", "--nodes")
    ]
    assert found[0] == "--time: expected a value, as in --time=VALUE"
    assert found[2].startswith("--help: expected overrides, key=value, after --")


def test_an_evaluation_is_checked_whole_and_logs_beside_the_run(dry: Submit, place: Path) -> None:
    checkpoint = place / "trained" / "checkpoints" / "step-00000007"
    checkpoint.mkdir(parents=True, exist_ok=True)
    words = ("--data", "data", "--dependency=afterok:5", "--", "--documents", "4")
    for subject in (place / "trained", checkpoint):
        ((*options, script, _, _, path, data, name, count),) = sbatch_words(
            dry("eval", str(subject.relative_to(place)), *words)
        )
        assert (path, data, name, count) == (str(subject), "--data=data", "--documents", "4")
        assert script == str(ROOT / "slurm/eval.sbatch")
        assert f"--output={place}/trained/slurm/eval-%j.log" in options
        assert "--dependency=afterok:5" in options
    found = mistakes(dry("eval", "data", "--data=c.yaml", "--", "--documentz", "4"))
    assert [problem.split(":")[0] for problem in found] == ["--documentz", "path", "--data"]
    found = mistakes(dry("eval", "trained", "--data=data", "--", "--documents=0"))
    assert found == ["--documents: expected at least 1, found 0"]
    gone = "nowhere://data"
    (found,) = mistakes(dry("eval", "trained", f"--data={gone}"))
    assert found.startswith(f"--data: {gone}/manifest.json: cannot be fetched: ")
    (place / "trained" / "tokenizer.model").write_text("another than that of the data")
    (found,) = mistakes(dry("eval", "trained", "--data=data"))
    assert found.startswith("--data: data was prepared with another tokenizer than the run's")
    (found,) = mistakes(dry("eval", "trained", "--", "--help"))[:1]
    assert found.startswith("--help: expected options of the evaluation after --")


def test_a_dry_run_checks_the_configuration_of_a_data_set(dry: Submit, place: Path) -> None:
    (place / "one_data.yaml").write_text("output: made\nsources: [{name: s, paths: [c.yaml]}]\n")
    done = dry("data_prep", "one_data.yaml", "--", "slurm.tasks=2")
    shown = "would submit: data-prep submit one_data.yaml slurm.partition=main slurm.tasks=2"
    assert done.returncode == 0 and shown in done.stdout.splitlines()
    found = mistakes(dry("data_prep", "one_data.yaml", "--", "slurm.taskz=2"))
    assert [problem.split(":")[0] for problem in found] == ["slurm.taskz"]


def test_the_number_of_a_job_is_the_last_line_that_sbatch_prints(
    place: Path, tmp_path: Path
) -> None:
    greeting = tmp_path / "sbatch"  # in place of a cluster's own
    greeting.write_text("#!/bin/sh\necho 'Welcome to the supercomputer'\necho '45;main'\n")
    greeting.chmod(0o755)
    line = [ROOT / "slurm/submit", "train", "c.yaml", "--site=site.env", "--nodes=1"]
    done = subprocess.run(
        [*line, "--", "run.directory=greeted"],
        cwd=place,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "\njob:     45\n" in done.stdout, done.stderr
    assert (place / "greeted/slurm/jobs").read_text() == "45\n"


@pytest.fixture
def fake(place: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """slurm/submit with an sbatch that numbers its jobs and runs SECOND for the second of them, and
    a scancel that writes what it cancels to the file `cancelled`, in place of a cluster's own."""
    for name, text in (
        (
            "sbatch",
            'cd "$(dirname "$0")" && echo >>count && number=$(wc -l <count)\n'
            '[ "$number" != 2 ] || eval "${SECOND:-}"\necho "$((40 + number))"\n',
        ),
        ("scancel", 'echo "$@" >>"$(dirname "$0")/cancelled"\n'),
        ("scontrol", "echo 'MaxArraySize = 1001'\n"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ROOT / "slurm/submit", *words],
            cwd=place,
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **more},
            capture_output=True,
            text=True,
            start_new_session=True,
        )

    return run


def test_a_job_that_cannot_be_noted_is_cancelled(fake: Submit, place: Path, tmp_path: Path) -> None:
    logs = place / "unnoted/slurm"
    logs.mkdir(parents=True)
    (logs / "jobs").symlink_to("/dev/full")  # a disk without space
    words = ("c.yaml", "--site=site.env", "--nodes=1", "--", "run.directory=unnoted")
    done = fake("train", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert "No space left on device" in done.stderr
    assert "slurm/submit: nothing was submitted; the error is shown above" in done.stderr
    assert (tmp_path / "cancelled").read_text() == "41\n"


def test_an_interrupted_submission_leaves_no_part_of_a_chain(fake: Submit, tmp_path: Path) -> None:
    words = ("c.yaml", "--site=site.env", "--nodes=1", "--chain=3", "--", "run.directory=stopped")
    done = fake("train", *words, SECOND="kill -INT 0; sleep 9")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "slurm/submit: nothing was submitted; it was interrupted\n"
    assert (tmp_path / "cancelled").read_text() == "41\n"


def test_a_pipeline_whose_logs_have_no_place_is_cancelled_whole(
    fake: Submit, place: Path, tmp_path: Path
) -> None:
    (place / "sea").mkdir()
    (place / "sea/a.txt").write_text("The sea was calm.")
    (place / "sea.yaml").write_text(
        "output: sea_data\nroot: sea\nsources: [{name: s, paths: ['*.txt']}]\n"
    )
    (place / "no_logs").mkdir()
    (place / "no_logs/slurm").touch()
    words = ("c.yaml", "--site=site.env", "--nodes=1", "--data=sea.yaml")
    done = fake("pipeline", *words, "--", "data.train=sea_data", "run.directory=no_logs")
    assert (done.returncode, done.stdout) == (1, "")
    assert "File exists\nslurm/submit: nothing was submitted; the error is" in done.stderr
    jobs = (tmp_path / "count").read_text().count("\n")
    cancelled = (tmp_path / "cancelled").read_text().split()
    assert cancelled == [str(41 + number) for number in range(jobs)]


def test_a_chain_says_that_its_next_job_resumes(fake: Submit) -> None:
    words = ("c.yaml", "--site=site.env", "--nodes=1")
    one = fake("train", *words, "--", "run.directory=requeued").stdout
    assert "save:    scancel --signal=USR1 --batch 41    (the job is then requeued)\n" in one
    two = fake("train", *words, "--chain=2", "--", "run.directory=chained").stdout
    assert "--batch 42    (the job then ends, and the next one resumes)\n" in two


def test_job_arrays_get_the_account_and_the_qos_of_the_site(place: Path, tmp_path: Path) -> None:
    if programs.find("sbatch") is None:
        programs.skip_without("sbatch")
    python = tmp_path / "python"  # in place of data-prep, whose jobs need a cluster
    python.write_text('#!/bin/sh\necho "account $SBATCH_ACCOUNT, qos $SBATCH_QOS"\n')
    python.chmod(0o755)
    site = tmp_path / "site.env"
    site.write_text(f"PYTHON={python} ACCOUNT=lab QOS=low\n")
    line = [ROOT / "slurm" / "submit", "data_prep", "c.yaml", "--site", site]
    done = subprocess.run(line, cwd=place, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "account lab, qos low\n"), done.stderr


def test_nodes_that_a_run_has_excluded_are_not_requested(dry: Submit, place: Path) -> None:
    logs = place / "marked" / "slurm"
    logs.mkdir(parents=True)
    (logs / "exclude").write_text("n7\tyesterday\t3\ta reason\nn2\ttoday\t4\tanother\n")
    words = ("--nodes", "2", "--exclude", "n9", "--", "run.directory=marked")
    ((*options,),) = sbatch_words(dry("train", "c.yaml", *words))
    assert "--exclude=n2,n7,n9" in options


def test_a_run_is_not_evaluated_on_nodes_that_it_has_excluded(dry: Submit, place: Path) -> None:
    (place / "tested/checkpoints/step-00000007").mkdir(parents=True)
    (place / "tested/slurm").mkdir()
    (place / "tested/slurm/exclude").write_text("n7\tyesterday\t3\ta reason\n")
    for words, excluded in ((), "n7"), (("--exclude=n9",), "n7,n9"):
        ((*options,),) = sbatch_words(dry("eval", "tested", "--data=data", *words))
        assert [word for word in options if word.startswith("--ex")] == [f"--exclude={excluded}"]


def test_nodes_that_the_site_excludes_stay_excluded_beside_those_of_a_run(
    dry: Submit, place: Path
) -> None:
    logs = place / "kept_out" / "slurm"
    logs.mkdir(parents=True)
    (logs / "exclude").write_text("n7\tyesterday\t3\ta reason\n")
    site = place / "excluding.env"
    site.write_text((place / "site.env").read_text() + "SBATCH_OPTIONS=(--exclude=n[4-5] --x=1)\n")

    def excluded(*words: str) -> tuple[set[str], str]:
        """The nodes of the option that counts, and those that the job adds when it is requeued."""
        line = ("--nodes=2", "--site=excluding.env", *words, "--", "run.directory=kept_out")
        ((*options, by_hand, _, _),) = sbatch_words(dry("train", "c.yaml", *line))
        counts = [word for word in options if word.startswith("--exclude=")][-1]
        return set(counts.removeprefix("--exclude=").split(",")), by_hand

    assert excluded() == ({"n7", "n[4-5]"}, "n[4-5]")
    assert excluded("--exclude=n9") == ({"n7", "n9"}, "n9")  # in place of the site's


def test_an_empty_value_in_the_site_file_is_no_option(dry: Submit, place: Path) -> None:
    names = ("SBATCH_OPTIONS", "CPU_OPTIONS", "SRUN_OPTIONS", "PREFLIGHT_OPTIONS")
    site = place / "empty.env"
    site.write_text((place / "site.env").read_text() + "".join(f"{name}=\n" for name in names))
    ((*options, _, _, _, _, _, _, excluded, _),) = sbatch_words(
        dry("train", "c.yaml", "--nodes=1", "--site=empty.env")
    )
    assert excluded == "" not in options
    lengths = " ".join(f"${{#{name}[@]}}" for name in names)
    script = f"PROJECT={ROOT} SITE={site}; . {ROOT}/slurm/site.sh; echo {lengths}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout == "0 0 0 0\n", done.stderr


def test_options_of_the_site_that_would_be_misread_or_have_no_effect_are_refused(
    dry: Submit, place: Path
) -> None:
    words = "--exclude n1 -t 10 --nodes=9 --signal=USR2@3 --mem=0 --exclusive"
    site = place / "misread.env"
    site.write_text((place / "site.env").read_text() + f"SBATCH_OPTIONS=({words})\n")
    found = mistakes(dry("train", "c.yaml", "--nodes=1", "--site=misread.env"))
    assert [problem.split(": ")[1].split(" ")[0].strip("'") for problem in found] == [
        *("n1", "-t", "10", "--nodes=9", "--signal=USR2@3")
    ]
    assert "write each as one word in" in found[0] and "--exclude=n1" in found[0]
    assert "has no effect, since slurm/submit sets --nodes" in found[3]


def test_a_pipeline_is_a_sequence_of_dependent_jobs(dry: Submit, place: Path) -> None:
    texts = place / "texts"
    texts.mkdir(exist_ok=True)
    (texts / "a.txt").write_text("The sea was calm.")
    for name, extra in (("train", ""), ("val", "tokenizer: {path: made_train/tokenizer.model}\n")):
        (place / f"{name}_data.yaml").write_text(
            f"output: made_{name}\nroot: texts\nsources: [{{name: s, paths: ['*.txt']}}]\n{extra}"
        )
    line = (
        *("c.yaml", "--nodes", "1-2", "--data", "train_data.yaml", "slurm.tasks=3"),
        *("--data", "val_data.yaml", "--", "data.train=made_train", "data.validation=made_val"),
    )
    done = dry("pipeline", *line)
    first, second, train, evaluation = sbatch_words(done)
    assert "data-prep submit train_data.yaml slurm.partition=main slurm.tasks=3" in done.stdout
    assert first[-3:] == ["train_data.yaml", "slurm.partition=main", "slurm.tasks=3"]
    assert second[-2:] == ["val_data.yaml", "slurm.partition=main"]
    waits = [[w for w in job if w.startswith("--dependency")] for job in (first, train, evaluation)]
    assert waits == [
        ["--dependency=afterok:JOB"], ["--dependency=afterok:JOB:JOB"], ["--dependency=afterok:JOB"]
    ]  # fmt: skip
    assert evaluation[-2:] == [str(place / "run"), "--data=made_val"]
    _, _, train, _ = sbatch_words(dry("pipeline", *line[:3], "--dependency=after:7", *line[3:]))
    assert [w for w in train if w.startswith("--dep")] == ["--dependency=after:7,afterok:JOB:JOB"]
    # What the training reads must exist, or be made by the pipeline.
    found = mistakes(dry("pipeline", *line[:-1], "data.validation=no"))
    assert [problem.split(":")[0] for problem in found] == ["data.validation"]
    assert not (place / "made_train").exists()


def test_the_mistakes_of_every_configuration_of_a_pipeline_are_told_at_once(
    dry: Submit, place: Path
) -> None:
    (place / "texts").mkdir(exist_ok=True)
    for name in ("one", "two"):
        (place / f"{name}.yaml").write_text(
            f"output: {name}\nroot: texts\nsources: [{{name: s, paths: ['{name}/*.txt']}}]\n"
            + "tokenizer: {path: one/tokenizer.model}\n" * (name == "two")
        )
    line = ("c.yaml", "--nodes", "1", "--data", "one.yaml", "--data", "two.yaml")
    done = dry("pipeline", *line, "--", "data.train=one", "data.validation=three")
    assert [problem.split(":")[0] for problem in mistakes(done)] == [
        "sources[0].paths[0]", "sources[0].paths[0]", "data.validation"
    ]  # fmt: skip
    for name in ("one", "two"):
        assert f"submitted; the mistakes above are in --data {name}.yaml" in done.stderr
    # Without its output it is not known what is made.
    done = dry("pipeline", *line[:5], "output=", *line[5:], "--", "data.train=one")
    assert [problem.split(":")[0] for problem in mistakes(done)] == ["output"]


def test_a_site_file_and_slurm_are_required(place: Path, tmp_path: Path) -> None:
    for name in ("bash", "dirname", "readlink"):
        (tmp_path / name).symlink_to(programs.find(name) or name)
    done = subprocess.run(
        [ROOT / "slurm" / "submit", "train", "c.yaml", "--nodes=2", "--site=none.env"],
        cwd=place, env={"PATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert mistakes(done) == [
        "none.env: no such file; copy slurm/site.env.example and edit it",
        "sbatch: not found; submit from a login node of the cluster, or use --dry-run",
    ]


def test_all_mistakes_in_a_site_file_are_reported_at_once(dry: Submit, place: Path) -> None:
    site = place / "wrong.env"
    site.write_text(
        "PYTHON=/nowhere/python\nGPUS_PER_NODE=eight\nGRACE_SECONDS=5m\n"
        "SBATCH_OPTIONS='--exclusive --mem=0'\nSRUN_OPTIONS=(--mpi pmix '--export=A=b c')\n"
        "PREFLIGHT_OPTIONS='--timeout 9'\n"
    )
    found = mistakes(dry("train", "c.yaml", "--nodes=1", "--site=wrong.env"))
    assert [problem.split(":")[0] for problem in found] == [
        "PYTHON", "GPUS_PER_NODE", "GRACE_SECONDS", "SBATCH_OPTIONS", "PREFLIGHT_OPTIONS",
    ]  # fmt: skip
    assert "SBATCH_OPTIONS=(--mem=0 --exclusive)" in found[3] and str(site) in found[3]


def test_a_time_limit_within_the_time_to_save_is_refused(dry: Submit, place: Path) -> None:
    """GRACE_SECONDS are 60 here."""
    for limit in ("1", "0:60", "00:01:00", "0-0:1", "0-0:00:60", "0-0:1:0"):
        (found,) = mistakes(dry("train", "c.yaml", "--nodes=1", f"--time={limit}"))
        assert found.startswith(f"--time: {limit} is not longer than GRACE_SECONDS=60 ({place}/")
    for limit in ("1:01", "08:09:00", "1-0", "0"):
        assert sbatch_words(dry("train", "c.yaml", "--nodes=1", f"--time={limit}"))
    site = place / "short.env"
    site.write_text((place / "site.env").read_text() + "TIME=1\n")
    line = ("train", "c.yaml", "--nodes=1", "--site=short.env")
    assert len(mistakes(dry(*line))) == 1 and sbatch_words(dry(*line, "--time=2"))


@pytest.mark.parametrize("line", ["false", "if [ ; then", "PARTITION=$NOT_SET"])
def test_a_site_file_that_ends_with_an_error_is_named(dry: Submit, place: Path, line: str) -> None:
    site = place / "failing.env"
    site.write_text(f"{(place / 'site.env').read_text()}{line}\n")
    (found,) = mistakes(dry("train", "c.yaml", "--nodes=1", "--site=failing.env"))
    assert found.startswith(f"{site}: ends with exit code ")


def test_the_example_of_a_site_file_sets_what_the_launchers_read() -> None:
    example = (ROOT / "slurm/site.env.example").read_text()
    defaults = (ROOT / "slurm/site.sh").read_text()
    names = set(re.findall(r"\b([A-Z_]+)=", defaults)) - {"PYTHONPATH", "PYTHONSAFEPATH"}
    assert names == set(re.findall(r"^([A-Z_]+)=", example, re.MULTILINE))


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").iterdir()), ids=lambda path: path.name)
def test_the_launchers_contain_no_hyperparameters(path: Path) -> None:
    text = path.read_text()
    if path.suffix != ".md":
        assert not re.search(r"\b(train|model|optim|zero|data)\.[a-z_]+=", text)
