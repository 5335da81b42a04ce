"""Checks of the nodes of a job, in a few seconds: a bad node is reported before it is used.

Each node checks its devices and the run directory, then all connect to the first node, which
compares their reports, their clocks, and the time of an exchange between neighbours. The batch
script reads the lines that the first node prints:

    preflight: bad node NAME: REASON        the node's own fault
    preflight: run directory: REASON        every node's, so no node is to blame
    preflight: no answer from NAME: REASON  of the first node, from another one
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from data_prep.dataset import durable
from data_prep.dataset.shards import DataError
from data_prep.dataset.wording import counted
from pretrain.config.optim import OPTIMIZERS
from pretrain.config.root import Config
from pretrain.data.files import manifest_of
from pretrain.model.transformer import on_meta

RECORDS = "preflight.jsonl"

# Seconds of a Report that are compared.
_MEASURED = {"product": "a matrix product", "exchange": "an exchange with a neighbour"}
_SKEW_SECONDS = 2.0
_HOT_CELSIUS = 85
_BUSY_BYTES = 2 << 30
_SMI_SECONDS = 20
_PRODUCT_SECONDS = 0.5
_EXCHANGE_VALUES = 1 << 20  # float32
# The environment variables that are recorded; they hold no secrets.
_RECORDED = (
    *("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),
    *("NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_DEBUG"),
)


@dataclass(frozen=True)
class Meeting:
    """Where the nodes meet: `names` of all, the first of which listens at `address`."""

    names: Sequence[str]
    node: str
    address: str
    port: int
    timeout: float  # seconds


@dataclass
class Report:
    """What a node found; times in seconds."""

    problems: list[str] = field(default_factory=list)  # the node's own
    directory: list[str] = field(default_factory=list)  # of the run directory, as it sees it
    versions: dict[str, str] = field(default_factory=dict)
    product: float = 0.0  # a matrix product, on its slowest device
    exchange: float = 0.0  # with its faster neighbour
    skew: float = 0.0  # its clock, less the first node's


def run(config: Config, ranks: int, meeting: Meeting, slow_factor: float) -> int:
    """Check this node, and with the others all of them; the exit code, 0 if all are good."""
    started = time.monotonic()
    report = look(config, ranks, len(meeting.names))
    if len(meeting.names) == 1:
        reports: dict[str, Report | None] = {meeting.node: report}
    else:
        met = _meet(meeting, report)
        if met is None:
            return 1
        if meeting.node != meeting.names[0]:
            return 0
        reports = met
    bad, shared = verdict(reports, slow_factor)
    for node, reasons in bad.items():
        print(f"preflight: bad node {node}: {'; '.join(reasons)}", flush=True)
    for reason in shared:
        print(f"preflight: run directory: {reason}", flush=True)
    _record(Path(config.run.directory), reports, bad, shared)
    if bad or shared:
        return 1
    print(_summary(reports, time.monotonic() - started), flush=True)
    return 0


def verdict(
    reports: Mapping[str, Report | None], slow_factor: float
) -> tuple[dict[str, list[str]], list[str]]:
    """Why each bad node is one, and what is wrong with the run directory on every node.

    None is the report of a node that did not answer. A node is slow if it takes more than
    `slow_factor` times the median.
    """
    answered = {node: report for node, report in reports.items() if report is not None}
    shared: list[str] = []
    if answered and all(report.directory for report in answered.values()):
        shared = sorted({reason for report in answered.values() for reason in report.directory})
    usual = _usual_versions([report.versions for report in answered.values()])
    medians = {
        what: statistics.median_low([getattr(report, what) for report in answered.values()])
        for what in (_MEASURED if answered else ())
    }
    bad = {}
    for node, report in reports.items():
        if report is None:
            bad[node] = ["does not answer"]
            continue
        own = [*report.problems, *([] if shared else report.directory)]
        if reasons := [*own, *_differences(report, usual, medians, slow_factor)]:
            bad[node] = reasons
    return bad, shared


def _differences(
    report: Report, usual: Mapping[str, str], medians: Mapping[str, float], slow_factor: float
) -> list[str]:
    """Why a node is bad beside the others: its versions, its speed, its clock."""
    reasons = [
        f"{name} is {report.versions.get(name, 'missing')}, elsewhere {version}"
        for name, version in usual.items()
        if report.versions.get(name, "missing") != version
    ]
    reasons += [
        f"{_MEASURED[what]} took {1e3 * seconds:.1f} ms, the median is {1e3 * median:.1f} ms"
        for what, median in medians.items()
        if (seconds := getattr(report, what)) > slow_factor * median > 0
    ]
    if abs(report.skew) > _SKEW_SECONDS:
        reasons.append(f"its clock is {report.skew:+.1f} s from the first node's")
    return reasons


def look(config: Config, ranks: int, nodes: int = 1) -> Report:
    """What this node, one of `nodes` with `ranks` ranks each, finds by itself."""
    report = Report(directory=_directory_problems(config), versions=_versions())
    report.problems += host_memory_problems(_checkpoint_bytes(config) // nodes, memory_granted())
    devices = [torch.device("cpu")]
    if config.launch.device != "cpu" and torch.cuda.is_available():
        report.problems += _gpu_problems()
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        if len(devices) < ranks:
            report.problems.append(
                f"{counted(len(devices), 'GPU is', 'GPUs are')} visible for {ranks} ranks"
            )
    elif config.launch.device == "cuda":
        report.problems.append("torch finds no GPU")
    elif config.launch.device == "auto" and (given := _gpus_of_slurm()):
        # Training would begin on the CPU.
        report.problems.append(f"torch finds none of the {counted(given, 'GPU')} of the job")
    for device in devices:
        try:
            seconds, right = _product(device)
        except RuntimeError as error:
            report.problems.append(f"{device}: {str(error).splitlines()[0]}")
            continue
        report.product = max(report.product, seconds)
        if not right:
            report.problems.append(f"{device}: a matrix product is wrong")
    return report


def _gpus_of_slurm() -> int:
    """The GPUs that a step of Slurm has on this node; 0 where there is no step, or it has none."""
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(given) if given.isdecimal() else 0


def _directory_problems(config: Config) -> list[str]:
    """Whether this node can write the run directory, and two checkpoints have space there."""
    directory = Path(config.run.directory).absolute()
    probe = directory / f".preflight-{platform.node()}-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(probe, b"preflight")
        if probe.read_bytes() != b"preflight":
            return [f"{directory} returns other bytes than were written"]
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return [f"{directory} cannot be written: {error.strerror}"]
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    needed = 2 * _checkpoint_bytes(config)
    if free < needed:
        return [
            f"{directory} has {free / 1e9:.1f} GB free, but two checkpoints need "
            f"{needed / 1e9:.1f} GB"
        ]
    return []


def host_memory_problems(needed: int, granted: float) -> list[str]:
    """Whether this node has memory for `needed` bytes, from which its ranks write checkpoints, and
    they are `granted` that much."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return []  # another system than Linux
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    copies = f"but the host copies of a checkpoint need {needed / 1e9:.1f} GB"
    available = int(kibibytes) << 10
    if available < needed:
        return [f"{available / 1e9:.1f} GB of host memory are available, {copies}"]
    if granted < needed:
        return [f"this job may use {granted / 1e9:.1f} GB of host memory, {copies}: request more"]
    return []


def memory_granted(
    own: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")
) -> float:
    """Bytes that the control groups of this process allow it, as Slurm sets them; infinite if they
    set no limit. A group's limit holds for the groups in it."""
    limits = [math.inf]
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            root, name = groups, "memory.max"
            if controllers:  # of version 1
                root, name = groups / "memory", "memory.limit_in_bytes"
            if controllers and "memory" not in controllers.split(","):
                continue
            group = root / path.strip("/")
            for directory in (one for one in (group, *group.parents) if one.is_relative_to(root)):
                with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                    limits.append(int((directory / name).read_text(encoding="ascii")))
    return min(limits)


def _checkpoint_bytes(config: Config) -> int:
    """Float32 master, average and moments of every weight; 0 where the data set cannot be read.

    What vectors have other than matrices, Adafactor's means and the lanes' memories are left out,
    which are small beside them.
    """
    source = next(iter(config.data.sources.values()))
    try:
        vocabulary = manifest_of(source.data).tokenizer.vocab_size
    except DataError:
        return 0  # the trainer says why
    whole = bool(config.optim.ema_decay) + 1
    of_blocks, elsewhere = OPTIMIZERS[config.optim.name].moments
    return 4 * sum(
        parameter.numel() * (whole + (of_blocks if name.startswith("layers.") else elsewhere))
        for name, parameter in on_meta(config.model, vocabulary).named_parameters()
    )


def _versions() -> dict[str, str]:
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for package in ("data_prep", "pretrain"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.read_bytes())
    found = {"python": platform.python_version(), "code": digest.hexdigest()[:12]}
    found |= {name: metadata.version(name) for name in ("torch", "deepspeed", "numpy")}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
        found["driver"] = (_smi("driver_version") or [["?"]])[0][0]
    return found


def _usual_versions(versions: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Of each name the commonest version; of equally common ones the first node's."""
    names = {name for one in versions for name in one}
    return {
        name: Counter(one.get(name, "missing") for one in versions).most_common(1)[0][0]
        for name in sorted(names)
    }


def _smi(*fields: str) -> list[list[str]] | None:
    """nvidia-smi's values of each GPU; None where it fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return [[value.strip() for value in line.split(",")] for line in done.stdout.splitlines()]


def _gpu_problems() -> list[str]:
    """What is wrong with the GPUs that torch sees, by the driver: errors, heat, memory in use."""
    ours = {
        str(torch.cuda.get_device_properties(index).uuid)
        for index in range(torch.cuda.device_count())
    }
    fields = ("ecc.errors.uncorrected.volatile.total", "temperature.gpu", "memory.used")
    queried = _smi("uuid", "index", *fields)
    if queried is None:
        return ["nvidia-smi fails, or does not answer"]
    found = []
    for uuid, index, errors, celsius, used in queried:
        if uuid.removeprefix("GPU-") not in ours:
            continue
        if errors.isdigit() and int(errors):
            found.append(f"GPU {index} has {counted(int(errors), 'uncorrectable ECC error')}")
        if celsius.isdigit() and int(celsius) >= _HOT_CELSIUS:
            found.append(f"GPU {index} is at {celsius} degrees Celsius before any work")
        if used.isdigit() and int(used) << 20 > _BUSY_BYTES:
            found.append(f"GPU {index} has {used} MiB in use: another process is on it")
    return found


def _product(device: torch.device) -> tuple[float, bool]:
    """Seconds of a product of two matrices (the best in half a second), and whether it is right.

    The entries are small integers, so float32 is exact and the sum of each row of A B is known.
    """
    size = 4096 if device.type == "cuda" else 512
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.randint(-4, 5, (size, size), generator=generator).float().to(device) for _ in "AB"
    )
    times: list[float] = []
    while len(times) < 5 or sum(times) < _PRODUCT_SECONDS:
        started = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    expected = left.double() @ right.double().sum(1)
    return min(times), bool(torch.equal(product.double().sum(1), expected))


def _meet(meeting: Meeting, report: Report) -> dict[str, Report | None] | None:
    """The reports of all nodes, whole on the first one; None where it was not reached."""
    names, rank = meeting.names, list(meeting.names).index(meeting.node)
    patience = timedelta(seconds=meeting.timeout)
    try:
        # It tries twice, and waits as long again in between.
        store = TCPStore(
            meeting.address, meeting.port, len(names), rank == 0, patience / 3,
            wait_for_workers=False,
        )  # fmt: skip
        _write(store, "report", rank, report)
        present = _present(store, rank, meeting, report)
        store.set_timeout(patience)
        if len(present) == len(names):
            _exchange(store, rank, len(names), patience, report)
        _write(store, "measured", rank, report)
        if rank:
            store.wait(["end"])
            return {}
        measured = _arrived(store, "measured", present, meeting.timeout)
        reports: dict[str, Report | None] = dict.fromkeys(names)
        for index in measured:
            reports[names[index]] = Report(**json.loads(store.get(f"measured/{index}")))
        store.set("end", "")
        # Its clients lose their answer if this process ends at once.
        time.sleep(0.2)
        return reports
    except (dist.DistError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        print(f"preflight: no answer from {names[0]}: {reason} ({meeting.node})", flush=True)
        return None


def _write(store: TCPStore, key: str, rank: int, report: Report) -> None:
    store.set(f"{key}/{rank}", json.dumps(asdict(report)))


def _present(store: TCPStore, rank: int, meeting: Meeting, report: Report) -> list[int]:
    """The ranks that have come, as the first node found; adds this node's clock to its report."""
    if rank == 0:
        present = _arrived(store, "report", range(len(meeting.names)), meeting.timeout)
        store.set("go", json.dumps({"present": present, "time": time.time()}))
        return present
    store.set_timeout(timedelta(seconds=2 * meeting.timeout))
    store.wait(["go"])
    now = time.time()
    first = json.loads(store.get("go"))
    report.skew = now - first["time"]
    return list(first["present"])


def _arrived(store: TCPStore, key: str, ranks: Sequence[int], timeout: float) -> list[int]:
    """Those of `ranks` whose `key` is there, when all are or `timeout` seconds have passed."""
    deadline = time.monotonic() + timeout
    while True:
        found = [rank for rank in ranks if store.check([f"{key}/{rank}"])]
        if len(found) == len(ranks) or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def _exchange(store: TCPStore, rank: int, size: int, patience: timedelta, report: Report) -> None:
    """Add up a number over all nodes, then time an exchange of 4 MB with each neighbour of a ring.

    The faster neighbour's time is kept: a slow node is slow with both.
    """
    try:
        group = PrefixStore("exchange", store)
        dist.init_process_group("gloo", store=group, rank=rank, world_size=size, timeout=patience)
        total = torch.ones(_EXCHANGE_VALUES)
        dist.all_reduce(total)
        if not bool((total == size).all()):
            report.problems.append("an all-reduce over the nodes is wrong")
        times = []
        for first, second in _ring(size):
            if rank in (first, second):
                times.append(_swap(second if rank == first else first, total))
        report.exchange = min(times)
    except RuntimeError as error:
        report.problems.append(f"no exchange with the other nodes: {str(error).splitlines()[0]}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _ring(size: int) -> list[tuple[int, int]]:
    """Pairs of neighbours in an order where few wait for others."""
    pairs = [(rank, (rank + 1) % size) for rank in range(size if size > 2 else 1)]
    return pairs[::2] + pairs[1::2]


def _swap(other: int, values: torch.Tensor) -> float:
    """Seconds to send `values` to another rank and receive as many, the best of three."""
    received = torch.empty_like(values)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        sent = dist.isend(values, other)
        dist.recv(received, other)
        assert sent is not None
        sent.wait()
        times.append(time.perf_counter() - started)
    return min(times)


def _record(
    directory: Path,
    reports: Mapping[str, Report | None],
    bad: Mapping[str, Sequence[str]],
    shared: Sequence[str],
) -> None:
    """Append what was found to the run directory, if it can be written."""
    record: dict[str, Any] = {
        "time": time.time(),
        "environment": {name: os.environ[name] for name in _RECORDED if name in os.environ},
        "nodes": {node: report and asdict(report) for node, report in reports.items()},
        "bad": bad,
        "run_directory": shared,
    }
    try:
        with (directory / RECORDS).open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # A line that a kill cut must not swallow this one.
                file.write(b"" if file.read() == b"\n" else b"\n")
            file.write(json.dumps(record).encode() + b"\n")
    except OSError as error:
        print(f"preflight: {directory / RECORDS} cannot be written: {error.strerror}", flush=True)


def _summary(reports: Mapping[str, Report | None], seconds: float) -> str:
    found = [report for report in reports.values() if report is not None]
    products, exchanges = [r.product for r in found], [r.exchange for r in found]
    return (
        f"preflight: {counted(len(found), 'node is', 'nodes are')} good, in {seconds:.1f} s: "
        f"matrix product {1e3 * min(products):.1f} to {1e3 * max(products):.1f} ms, exchange "
        f"{1e3 * min(exchanges):.1f} to {1e3 * max(exchanges):.1f} ms, clocks within "
        f"{max(abs(r.skew) for r in found):.2f} s"
    )
