"""Places, ranks and signals, with real processes that need no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from data_prep.dataset.settings import SettingsError
from pretrain.config.root import Config
from pretrain.config.run import LaunchConfig
from pretrain.jobs.launch import Place, default_ranks, place_in, start_ranks

# A rank that notes its place, and then waits for a stop signal as a training loop does.
WAITING = """
import os, pathlib, sys, time
from pretrain.jobs.launch import EXIT_STOPPED, StopFlag
if "slow" in sys.argv:
    time.sleep(1)  # imports, before there is a flag
stop = StopFlag()
pathlib.Path(os.environ["RANK"]).write_text(str(os.getpid()))
end = time.monotonic() + 60
while stop.signal is None and time.monotonic() < end:
    time.sleep(0.01)
pathlib.Path("signal-" + os.environ["RANK"]).write_text(stop.signal.name)
sys.exit(EXIT_STOPPED)
"""
LAUNCHER = (
    "import sys; from pretrain.jobs.launch import start_ranks;"
    "sys.exit(start_ranks([sys.executable, '-c', *sys.argv[2:]], int(sys.argv[1])))"
)


def launcher(directory: Path, *words: str, ranks: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(ranks), *words],
        cwd=directory,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for(*paths: Path) -> list[str]:
    """The texts of files that appear; empty ones are still being written."""
    end = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < end
        time.sleep(0.01)
    return [path.read_text() for path in paths]


def is_alive(process: int) -> bool:
    """Whether a process that is nobody's child here is alive, zombies apart."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_death(*processes: int) -> None:
    end = time.monotonic() + 10
    while any(is_alive(process) for process in processes):
        assert time.monotonic() < end, "a rank outlived its launcher"
        time.sleep(0.01)


# Places.


def test_a_shell_has_no_place() -> None:
    assert place_in({"PATH": "/bin"}) is None


def test_our_own_ranks_meet_in_a_file() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "PRETRAIN_STORE": "/t/store"}
    assert place_in(environment) == Place(1, 2, 1, "file:///t/store")


def test_torchrun_gives_a_place() -> None:
    environment = {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "1",
        "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    assert place_in(environment) == Place(5, 8, 1, "env://")


def test_variables_of_torchrun_that_give_no_place_are_named_with_what_to_do() -> None:
    with pytest.raises(SettingsError, match="without MASTER_ADDR and MASTER_PORT; launch with to"):
        place_in({"RANK": "0", "WORLD_SIZE": "1"})
    meeting = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    with pytest.raises(SettingsError) as caught:
        place_in({"RANK": "", "WORLD_SIZE": "two", "LOCAL_RANK": "1", **meeting})
    assert [one.split(":")[0] for one in caught.value.problems] == ["RANK", "WORLD_SIZE"]
    with pytest.raises(SettingsError, match="RANK: 2 is none of WORLD_SIZE=2 ranks"):
        place_in({"RANK": "2", "WORLD_SIZE": "2", **meeting})


SRUN = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_NTASKS": "16", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip


def test_a_task_of_srun_has_a_place() -> None:
    assert place_in(SRUN) == Place(9, 16, 1, "tcp://node1:29500")


def test_torchrun_inside_a_task_of_srun_decides() -> None:
    environment = {**SRUN, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}
    assert place_in(environment) == Place(3, 4, 3, "env://")


def test_a_batch_shell_is_no_rank_though_it_has_a_task_number() -> None:
    shell = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}
    assert place_in(shell) is None


def test_one_task_of_srun_starts_its_ranks_itself() -> None:
    assert place_in({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_a_task_of_srun_without_an_address_says_which_variable_is_missing() -> None:
    environment = {key: value for key, value in SRUN.items() if key != "MASTER_PORT"}
    with pytest.raises(SettingsError, match="srun started 16 tasks without setting MASTER_PORT;"):
        place_in(environment)


def test_a_shell_of_srun_with_several_tasks_says_how_to_launch_the_ranks_in_it() -> None:
    shell = {key: value for key, value in SRUN.items() if not key.startswith("MASTER_")}
    with pytest.raises(SettingsError, match="srun --pty, unset SLURM_STEP_ID"):
        place_in(shell)
    del shell["SLURM_STEP_ID"]
    assert place_in(shell) is None


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"])
def test_processes_of_mpirun_are_refused_since_each_would_launch_all_ranks(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}=4: mpirun started several of this command"):
        place_in({name: "4"})
    assert place_in({name: "1"}) is None
    assert place_in({**SRUN, name: "16"}) == place_in(SRUN)


def test_a_cpu_has_one_rank_unless_set_otherwise() -> None:
    assert default_ranks(Config(launch=LaunchConfig(device="cpu"))) == 1


def test_a_gpu_that_is_not_there_is_a_mistake() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert default_ranks(Config(launch=LaunchConfig(device="auto"))) == 1
    with pytest.raises(SettingsError, match=r"launch\.device: cuda, but torch finds no GPU here"):
        default_ranks(Config(launch=LaunchConfig(device="cuda")))


# Ranks.


def test_ranks_share_the_cores_that_the_launcher_may_use(tmp_path: Path) -> None:
    code = "import os, pathlib; name = os.environ['RANK']; " \
        "pathlib.Path(name).write_text(os.environ['OMP_NUM_THREADS'])"  # fmt: skip
    one_core = f"{{{min(os.sched_getaffinity(0))}}}"
    limited = f"import os; os.sched_setaffinity(0, {one_core}); {LAUNCHER}"
    command = [sys.executable, "-c", limited, "1", code]
    without = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run(command, cwd=tmp_path, env=without, check=True)
    assert (tmp_path / "0").read_text() == "1"


def test_every_rank_gets_its_place(tmp_path: Path) -> None:
    script = f"""
import os, pathlib
from pretrain.jobs.launch import place_in
place = place_in(os.environ)
assert place.init_method.startswith("file://")
assert not pathlib.Path(place.init_method[7:]).exists()
pathlib.Path({str(tmp_path)!r}, str(place.rank)).write_text(f"{{place.local_rank}} {{place.size}}")
"""
    assert start_ranks([sys.executable, "-c", script], 3) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "0": "0 3", "1": "1 3", "2": "2 3"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((75, 75), 75), ((0, 75), 75), ((0, 3), 3), ((2, 2), 2), ((75, 1), 1)],
)
def test_the_exit_code_is_that_of_the_ranks(codes: tuple[int, int], expected: int) -> None:
    script = f"import os, sys; sys.exit({codes}[int(os.environ['RANK'])])"
    assert start_ranks([sys.executable, "-c", script], 2) == expected


def test_ranks_that_wait_for_a_failed_one_are_ended(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit('shard-00003.tar: is damaged')\n"
        "time.sleep(600)"
    )
    process = launcher(tmp_path, script)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "shard-00003.tar: is damaged\n")


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (40, "signal 40")])
def test_a_rank_killed_by_a_signal_is_named(tmp_path: Path, number: int, name: str) -> None:
    kill = f"os.kill(os.getpid(), {number})"
    script = f"import os, time; os.environ['RANK'] == '1' and {kill}; time.sleep(9)"
    process = launcher(tmp_path, script)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert output.startswith(f"rank 1 was killed by {name}; the same command resumes")


def test_ranks_die_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    process = launcher(tmp_path, WAITING)
    ranks = [int(text) for text in wait_for(tmp_path / "0", tmp_path / "1")]
    assert all(is_alive(rank) for rank in ranks)
    process.kill()
    process.wait()
    wait_for_death(*ranks)


def test_ranks_die_when_starting_them_fails_in_the_launcher(tmp_path: Path) -> None:
    """As when a test's time limit raises in the middle of waiting; the process itself lives on."""
    script = (
        "import signal, sys, time\n"
        "from pretrain.jobs.launch import start_ranks\n"
        "def limit(number, frame): raise TimeoutError\n"
        "signal.signal(signal.SIGUSR2, limit)\n"
        "try: start_ranks([sys.executable, '-c', sys.argv[1]], 2)\n"
        "except TimeoutError: print('raised', flush=True)\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, WAITING], cwd=tmp_path, text=True, stdout=subprocess.PIPE
    )
    ranks = [int(text) for text in wait_for(tmp_path / "0", tmp_path / "1")]
    process.send_signal(signal.SIGUSR2)
    assert process.stdout is not None and process.stdout.readline() == "raised\n"
    assert not any(is_alive(rank) for rank in ranks)
    process.kill()
    process.communicate()


# Signals.


STOPPING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU,
            signal.SIGUSR1]  # fmt: skip


@pytest.mark.parametrize("sent", STOPPING)
def test_a_stop_signal_is_handed_on_to_every_rank_and_said(
    tmp_path: Path, sent: signal.Signals
) -> None:
    process = launcher(tmp_path, WAITING)
    wait_for(tmp_path / "0", tmp_path / "1")
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    said = f"{sent.name}: the ranks finish their step and save\n"
    assert (process.returncode, output) == (75, said)
    assert wait_for(tmp_path / "signal-0", tmp_path / "signal-1") == [sent.name] * 2


def test_under_nohup_a_run_goes_on_when_the_terminal_is_closed(tmp_path: Path) -> None:
    words = ["nohup", sys.executable, "-c", LAUNCHER, "2", WAITING]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ranks = [int(text) for text in wait_for(tmp_path / "0", tmp_path / "1")]
    for one in (process.pid, *ranks):
        os.kill(one, signal.SIGHUP)
    time.sleep(0.3)
    assert not list(tmp_path.glob("signal-*"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert wait_for(tmp_path / "signal-0", tmp_path / "signal-1") == ["SIGTERM"] * 2


def test_a_terminal_that_is_closed_ends_a_run_as_any_signal(tmp_path: Path) -> None:
    # The launcher leads the session of a terminal of its own, which then goes.
    terminal, own = os.openpty()
    # Else what cannot be written stays in no buffer, of which the interpreter would complain.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl; fcntl.ioctl(0, {termios.TIOCSCTTY}, 0); {LAUNCHER}",
         "2", WAITING],
        cwd=tmp_path, stdin=own, stdout=own, stderr=own, start_new_session=True, env=environment,
    )  # fmt: skip
    os.close(own)
    wait_for(tmp_path / "0", tmp_path / "1")
    os.close(terminal)
    assert process.wait(60) == 75
    assert wait_for(tmp_path / "signal-0", tmp_path / "signal-1") == ["SIGHUP"] * 2


def test_a_signal_that_comes_while_a_rank_imports_waits_for_its_flag(tmp_path: Path) -> None:
    process = launcher(tmp_path, WAITING, "slow")
    # The ranks are started, and sleep where imports would be.
    end = time.monotonic() + 60
    while len(children := _children(process.pid)) < 2 or not all(map(_runs_python, children)):
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert wait_for(tmp_path / "signal-0", tmp_path / "signal-1") == ["SIGTERM"] * 2


def _children(process: int) -> list[int]:
    try:
        return [
            int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except OSError:
        return []


def _runs_python(process: int) -> bool:
    """Whether the child has become the rank, with its place in its environment."""
    return b"\0RANK=" in b"\0" + Path(f"/proc/{process}/environ").read_bytes()


def test_a_rank_leaves_with_its_output_and_nothing_of_its_interpreters_end() -> None:
    script = (
        "import atexit, os; from pretrain.jobs.launch import leave; atexit.register(os.abort);"
        "print('said'); leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "said\n")


def test_signals_are_as_before_when_the_ranks_have_ended(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in STOPPING}
    assert start_ranks([sys.executable, "-c", ""], 1) == 0
    assert {number: signal.getsignal(number) for number in before} == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOPPING)


def test_a_terminals_interrupt_reaches_the_launcher_alone(tmp_path: Path) -> None:
    """A rank in the terminal's process group would be interrupted twice."""
    process = launcher(tmp_path, WAITING)
    ranks = [int(text) for text in wait_for(tmp_path / "0", tmp_path / "1")]
    groups = {os.getpgid(rank) for rank in ranks}
    assert os.getpgid(process.pid) not in groups and len(groups) == 2
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
