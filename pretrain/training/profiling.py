"""Traces of PyTorch's profiler in the run directory, on request.

RUN/profile/steps-00000006-00000008.rank-00000.pt.trace.json.gz    for ui.perfetto.dev, TensorBoard
RUN/profile/steps-00000006-00000008.rank-00000.txt                 the operators by time
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from data_prep.dataset import durable
from pretrain.config.training import TrainConfig

PROFILE = "profile"

_ROWS = 40  # operators in the table

_log = logging.getLogger(__name__)


class StepProfiler:
    """Profiles `train.profile_steps` steps of this attempt, after `train.profile_after` others."""

    def __init__(
        self, directory: Path, rank: int, device: torch.device, train: TrainConfig
    ) -> None:
        self._directory, self._rank = directory / PROFILE, rank
        self._on_gpu = device.type == "cuda"
        self._after = train.profile_after
        taken = rank == 0 or train.profile_ranks == "all"
        self._count = train.profile_steps if taken else 0
        self._seen = 0  # steps of this attempt
        self._steps: list[int] = []  # that were profiled
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A block around step `number`, profiled if the settings ask for it."""
        if self._count and self._seen == self._after:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
            self._profile = profile(activities=activities)
            self._profile.start()
        self._seen += 1
        if self._profile is None:
            yield
            return
        with record_function(f"step {number}"):
            yield
        self._steps.append(number)

    def write_if_done(self, last: bool) -> None:
        """After a step: write the files if all steps are profiled or this is the last step."""
        if self._profile is None or not (last or len(self._steps) == self._count):
            return
        ended, self._profile = self._profile, None
        ended.stop()
        steps = f"steps-{self._steps[0]:08d}-{self._steps[-1]:08d}"
        stem = self._directory / f"{steps}.rank-{self._rank:05d}"
        self._directory.mkdir(exist_ok=True)
        trace = stem.with_name(f"{stem.name}.pt.trace.json.gz")
        half = trace.with_name(f"half-{trace.name}")
        ended.export_chrome_trace(str(half))
        half.replace(trace)
        order = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
        table = ended.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=60)
        durable.write_bytes(stem.with_name(f"{stem.name}.txt"), table.encode())
        _log.info("profiled steps %d to %d: %s", self._steps[0], self._steps[-1], trace)
