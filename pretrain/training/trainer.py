"""The training loop: lanes in, steps, and a run directory that the same command resumes.

Everything that a step depends on is a function of the configuration and of the last checkpoint:
the learning rate and the seed of random numbers are computed from the step's number, batches from
the lanes' places. So a run that was killed and resumed repeats the other's losses to the bit.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.dataset import durable, settings
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError
from data_prep.tokenizer import tokenizer
from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.background import BackgroundSave
from pretrain.checkpoint.commit import save, take_over
from pretrain.checkpoint.copies import HostCopy
from pretrain.checkpoint.load import Checkpoint, newest_good
from pretrain.checkpoint.manifest import CHECKPOINTS, CheckpointError
from pretrain.checkpoint.pieces import LaneRecord, Piece
from pretrain.checkpoint.ranks import GroupRanks, agreed
from pretrain.config import Config
from pretrain.data.lanes import IGNORE, Dataset, LanePlace, Mix
from pretrain.data.loader import Batch, Loader
from pretrain.jobs.launch import EXIT_STOPPED, Place, StopFlag
from pretrain.jobs.watchdog import Watchdog
from pretrain.model import compiling, flops, state
from pretrain.model.state import ModelState
from pretrain.model.transformer import Transformer
from pretrain.trained import CONFIG_FILE, DTYPES, locate
from pretrain.training.engine import Engine, StepResult
from pretrain.training.heap import keep_freed_memory
from pretrain.training.ledger import Ledger, extended
from pretrain.training.metrics import (
    Meter,
    Recorder,
    TrackingError,
    configure_logging,
    log_line,
    peak_memory,
)
from pretrain.training.optim import rate_fraction
from pretrain.training.parallel import SequenceGroup
from pretrain.training.profiling import StepProfiler
from pretrain.training.stragglers import Straggler, Stragglers

T = TypeVar("T")


_log = logging.getLogger("pretrain.training.trainer")

# Within which a watchdog that has lost its patience has ended the rank, with its stacks.
_WATCHDOG_SECONDS = 120.0
# Begins the names of a lane's tensors that are its preface's, in a checkpoint.
_PREFACE = "preface."


class TrainingError(ValueError):
    """A run that cannot go on; the message says why and what to do."""


@dataclass
class Progress:
    """How far the run is; with the engine's pieces, all that a checkpoint holds.

    `places`, `histories` (as the ledger has them) and `memory` are of this rank's lanes, the same
    on all ranks of a sequence group; `memory` is the state before the next window. `preface` is
    None without `data.preface`.
    """

    step: int
    tokens: int
    skipped: int
    skipped_in_a_row: int
    places: Sequence[LanePlace] | None
    histories: Sequence[str]
    memory: ModelState
    preface: Preface | None


@dataclass(frozen=True)
class Preface:
    """What the lanes have read of `data.preface`: with its memory their next documents begin."""

    places: Sequence[LanePlace] | None
    memory: ModelState


def train(config: Config, place: Place, watchdog: Watchdog, attempt: int) -> int:
    """Train as one of `place.size` ranks, from the run's newest good checkpoint or from scratch.

    `attempt` is the number that rank 0 claimed; other ranks learn it here.
    Returns the exit code: 0 finished, EXIT_STOPPED after a signal. Raises TrainingError, DataError,
    SettingsError and CheckpointError with a message for the user.
    """
    stop = StopFlag()
    with _ranks_joined(config, place) as device:
        directory = Path(config.run.directory)
        directory.mkdir(parents=True, exist_ok=True)
        configure_logging(place.rank, directory)
        (attempt, *_) = GroupRanks().gather(attempt)
        watchdog.beat("start", attempt=attempt)
        return Trainer(config, Attempt(directory, attempt), device, watchdog).run(stop)


class Trainer:
    """A run on this rank: data, engine, progress, and what is recorded of them."""

    def __init__(
        self, config: Config, attempt: Attempt, device: torch.device, watchdog: Watchdog
    ) -> None:
        self.config = config
        self.attempt = attempt
        self.directory = attempt.directory
        self.device = device
        self.watchdog = watchdog
        self.ranks = GroupRanks()
        self.hosts = self.ranks.gather(socket.gethostname())
        self.stragglers = Stragglers(self.ranks, device)
        self.profiler = StepProfiler(self.directory, self.ranks.rank, device, config.train)
        self.ledger: Ledger | None = None  # of rank 0
        self.lanes = config.lanes_of_rank(self.ranks.rank, self.ranks.size)
        sequence = config.parallel.sequence
        self.parts = SequenceGroup(sequence) if sequence > 1 else None
        self.part = config.tokens_of_rank(self.ranks.rank)
        # A lane is stored and counted once, by the first of the ranks that share its windows.
        self.keeps_lanes = self.part.start == 0
        sources, prompt_weight = config.data.sources.values(), config.data.prompt_weight
        self.mix = Mix(
            [Dataset(Path(source.data)) for source in sources],
            [source.weight for source in sources],
            prompt_weight,
        )
        self.prefaces = Mix([Dataset(Path(config.data.preface))]) if config.data.preface else None
        self.tokenizer = self.mix.datasets[0].manifest.tokenizer
        self.validation = (
            Mix([Dataset(Path(config.data.validation))], prompt_weight=prompt_weight)
            if config.data.validation
            else None
        )
        vocabulary = self.tokenizer.vocab_size
        parameters = flops.parameters(config.model, vocabulary)
        self.flops_per_token = flops.training_flops_per_token(
            config.model, vocabulary, config.window
        )
        peak = flops.peak_flops(_device_name(device), DTYPES[config.train.precision])
        self.peak_flops = None if peak is None else peak * self.ranks.size
        compiling.switch(config.train.compile)
        self.engine = Engine(
            lambda: Transformer(config.model, vocabulary, config.train.activation_checkpointing),
            parameters,
            config,
            device,
        )
        assert isinstance(self.engine.module, Transformer)
        self.model = self.engine.module
        self.origin: dict[str, Any] | None = None  # where the first weights came from
        self.progress = self._resume() or self._start()
        # Of its own, so that the collectives of a save come in no order with those of a step.
        patience = timedelta(seconds=config.watchdog.save + _WATCHDOG_SECONDS)
        self.saving_ranks = GroupRanks(dist.new_group(backend="gloo", timeout=patience))
        self.saves = BackgroundSave(watchdog.saving)
        self.stood_still = 0.0  # seconds, for the save that began last
        self.host_copy = self._agreed(self._reserved)
        _log.info(
            "%s parameters, %d ranks on %s, ZeRO stage %d, %d lanes of %d tokens a step%s",
            f"{parameters:,}", self.ranks.size, device, config.zero.stage,
            config.data.lanes, config.window,
            f", each lane's on {sequence} ranks" if sequence > 1 else "",
        )  # fmt: skip

    def run(self, stop: StopFlag) -> int:
        """Train to the last step, or until a signal came and the step in flight was saved."""
        progress, steps = self.progress, self.config.train.steps
        if progress.step >= steps:
            _log.info("finished already: the checkpoint is of step %d of %d", progress.step, steps)
            return 0
        recorder = self._agreed(self._open_records)
        try:
            with (
                self._loader(self.mix, progress.places) as loader,
                self._preface_loader(progress.preface) as prefaces,
            ):
                return self._loop(loader, prefaces, recorder, stop)
        finally:
            self._let_save_end()
            if recorder is not None:
                recorder.close()
            if self.ledger is not None:
                self.ledger.close()

    def _loop(
        self, loader: Loader, prefaces: Loader | None, recorder: Recorder | None, stop: StopFlag
    ) -> int:
        train, every = self.config.train, self.config.checkpoint.every
        progress, meter, logged = self.progress, Meter(), self.progress.step
        while progress.step < train.steps:
            with self.profiler.step(progress.step + 1):
                batch = self._next(loader, meter)
                preface = None if prefaces is None else self._next(prefaces, meter)
                stopping, loss, result = self._step(batch, stop, preface)
            self.watchdog.beat("step", progress.step)
            self._note_save(recorder)
            read = self.config.data.lanes * self.config.window
            meter.add(read, result.forward_alone, 0 if preface is None else read)
            last = progress.step == train.steps
            with meter.paused():
                self.profiler.write_if_done(last or stopping)
            if progress.step % train.log_every == 0 or last:
                slow = self.stragglers.look(meter.own_wait, meter.seconds)
                rates = meter.read(
                    self.flops_per_token,
                    self.peak_flops,
                    train.steps - progress.step,
                    progress.step - logged,
                )
                logged = progress.step
                self._report(recorder, loss, result, rates, slow)
            if self.validation is not None and self._is_due(train.validate_every, last):
                with meter.paused():
                    self._validate(self.validation, recorder)
            if progress.skipped_in_a_row >= train.max_skipped:
                raise TrainingError(
                    f"the loss or a gradient was not finite in {progress.skipped_in_a_row} steps "
                    f"in a row, up to step {progress.step}; no such step reached the weights. The "
                    "last checkpoint is from before; resume with a lower optim.lr, or look at the "
                    "data of these steps"
                )
            if progress.step % every == 0 or last or stopping:
                with meter.paused():
                    self._save(recorder, finish=last or stopping)
                if not last and not stopping:
                    self.watchdog.beat("step", progress.step)
            if stopping and not last:
                _log.info(
                    "stopped after step %d with a checkpoint; the same command goes on",
                    progress.step,
                )
                return EXIT_STOPPED
        _log.info("finished: %d steps, %s tokens", progress.step, f"{progress.tokens:,}")
        return 0

    def _open_records(self) -> Recorder | None:
        """What rank 0 writes besides checkpoints; None on other ranks."""
        if self.ranks.rank != 0:
            return None
        durable.write_bytes(self.directory / CONFIG_FILE, settings.to_yaml(self.config).encode())
        name = self.tokenizer.file
        data = (self.mix.datasets[0].directory / name).read_bytes()
        tokenizer.write(self.directory, name, data)
        self.ledger = Ledger(self.directory, self.progress.step)
        return Recorder(self.directory, self.config, self.progress.step)

    def _agreed(self, action: Callable[[], T]) -> T:
        """What `action` gives on this rank, or on all ranks the error of those where it failed.

        A rank that stopped alone would leave the others waiting, and then failing for its absence.
        """
        results: list[T] = []
        failure: ValueError | None = None
        try:
            results.append(action())
        except (CheckpointError, DataError, TrackingError) as error:
            failure = error
        if self._sum([float(failure is not None)]) != [0.0]:
            told = self.ranks.gather(str(failure or ""))
            raise TrainingError("\n".join(sorted({text for text in told if text}))) from failure
        return results[0]

    def _next(self, loader: Loader, meter: Meter) -> Batch:
        """The next batch, once every rank has its own."""

        def own() -> Batch:
            batch = next(loader)
            meter.own_wait += time.perf_counter() - began
            return batch

        began = time.perf_counter()
        batch = self._agreed(own)
        meter.data_wait += time.perf_counter() - began
        return batch

    def _step(
        self, batch: Batch, stop: StopFlag, preface: Batch | None = None
    ) -> tuple[bool, float, StepResult]:
        """One optimizer step over the rank's lanes, micro-batch by micro-batch; then the preface.

        Returns whether some rank was told to stop, the loss (nats a token, over all ranks), and
        what the step did. The loss is weighted by tokens: its gradient is that of the weighted
        mean over all targets of the step, however they lie on ranks and micro-batches. Where none
        of them has any weight, the windows are read alone. Raises on all ranks what a save in the
        background raised.
        """
        progress = self.progress
        number = progress.step + 1
        torch.manual_seed(_key(self.config.run.seed, number, self.ranks.rank))
        stopping, failed, weight = self._sum(
            [float(stop.signal is not None), float(self.saves.failed), self._own_weight(batch)]
        )
        if failed:
            self.saves.wait()
        if not weight:
            memory = self._read(batch, progress.memory, self._initial)
            result = StepResult(applied=True, grad_norm=0.0, forward_alone=True)
            self._advance(batch, preface, memory, result)
            return stopping > 0, 0.0, result
        # The engine averages gradients over the ranks.
        scale = self.ranks.size / (weight or 1.0)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        memories = []
        for rows in self._micro_batches():
            output = self._forward(batch, rows, progress.memory, self._initial)
            loss = output.loss
            self.engine.backward(loss * scale)
            total += loss.detach().double()
            memories.append(state.detached(output.state))
        rate = rate_fraction(self.config.optim, self.config.train.steps, number)
        result = self.engine.step(rate)
        (loss_sum,) = self._sum([float(total)])
        self._advance(batch, preface, state.joined(memories), result)
        return stopping > 0, loss_sum / (weight or 1.0), result

    @property
    def _initial(self) -> ModelState | None:
        """The memory that the next window's documents begin with; None: the empty one."""
        return None if self.progress.preface is None else self.progress.preface.memory

    def _read(self, batch: Batch, memory: ModelState, initial: ModelState | None) -> ModelState:
        """The memories after windows that nothing is to be learned from: forward alone.

        No weight moves, not by momentum or decay either. It is a third of a step's work, and the
        most of what long prompts are whose answers alone have a weight.
        """
        self.engine.train(False)
        with torch.no_grad():
            states = [
                self._forward(batch, rows, memory, initial).state for rows in self._micro_batches()
            ]
        self.engine.train(True)
        return state.joined(states)

    def _micro_batches(self) -> list[slice]:
        """The rows of each micro-batch of this rank's lanes."""
        size = self.config.train.micro_batch or len(self.lanes)
        return [slice(first, first + size) for first in range(0, len(self.lanes), size)]

    def _forward(
        self, batch: Batch, rows: slice, memory: ModelState, initial: ModelState | None = None
    ) -> Any:
        """The model's Output over this rank's part of some of its lanes' windows.

        `memory` and `initial` are of all of them.
        """
        return self.engine.forward(
            batch.tokens[rows, self.part].to(self.device, non_blocking=True),
            batch.starts[rows, self.part].to(self.device, non_blocking=True),
            state.of_lanes(memory, rows),
            batch.targets[rows, self.part].to(self.device, non_blocking=True),
            parts=self.parts,
            weights=(
                None
                if batch.weights is None
                else batch.weights[rows, self.part].to(self.device, non_blocking=True)
            ),
            initial=None if initial is None else state.of_lanes(initial, rows),
        )

    def _own_weight(self, batch: Batch) -> float:
        """The sum of the weights of all targets in this rank's part of the windows.

        Of numbers with few bits, so that it is the same in any order: however many ranks there are.
        """
        if batch.weights is None:
            return float((batch.targets[:, self.part] != IGNORE).sum())
        return float(batch.weights[:, self.part].double().sum())

    def _advance(
        self, batch: Batch, preface: Batch | None, memory: ModelState, result: StepResult
    ) -> None:
        """Take `progress` past a step that left `memory`, and read the preface's next windows."""
        progress = self.progress
        progress.step += 1
        progress.tokens += self.config.data.lanes * self.config.window
        progress.places = batch.places
        for windows in (batch, preface):
            if windows is not None:
                progress.histories = [
                    extended(history, tokens.numpy(), starts.numpy())
                    for history, tokens, starts in zip(
                        progress.histories, windows.tokens, windows.starts, strict=True
                    )
                ]
        if preface is not None and progress.preface is not None:
            read = self._read(preface, progress.preface.memory, None)
            if not result.applied:
                read = state.without_nonfinite(read)
            progress.preface = Preface(preface.places, read)
        if result.applied:
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            memory = state.without_nonfinite(memory)
        progress.memory = memory

    def _is_due(self, every: int, last: bool) -> bool:
        return last or (every > 0 and self.progress.step % every == 0)

    def _report(
        self,
        recorder: Recorder | None,
        loss: float,
        result: StepResult,
        rates: dict[str, Any],
        slow: Sequence[Straggler],
    ) -> None:
        progress, optim = self.progress, self.config.optim
        gates = [torch.sigmoid(gate).tolist() for gate in self.engine.gates()]
        norms = self._memory_norms()
        epochs = self._epochs()
        fraction = rate_fraction(optim, self.config.train.steps, progress.step)
        if recorder is None:
            return
        record = {
            "step": progress.step,
            "loss": loss,
            "grad_norm": result.grad_norm,
            "lr": optim.lr * fraction,
            "gate_lr": optim.gate_lr * fraction,
            **rates,
            "memory_bytes": peak_memory(self.device),
            "tokens": progress.tokens,
            "epochs": epochs,
            "skipped": progress.skipped,
            "gates": gates,
            "memory_norm": norms,
            "stragglers": {f"{one.cause}/{one.rank}": one.excess for one in slow},
        }
        recorder.record("train", record)
        _log.info(log_line(record, self.config.train.steps))
        for one in slow:
            _log.warning("straggler: %s", one.told(self.hosts[one.rank]))

    def _memory_norms(self) -> list[float]:
        """Root mean square over all lanes of the Frobenius norm of M, a number a layer."""
        squares = self.model.metrics(self.progress.memory).get("memory_norm", [])
        sums = self._sum_of_lanes(squares) if squares else []
        return [math.sqrt(square / self.config.data.lanes) for square in sums]

    def _epochs(self) -> dict[str, float]:
        """Documents read of each source over its documents, over all lanes."""
        assert self.progress.places is not None
        of_lanes = zip(*(place.sources for place in self.progress.places), strict=True)
        counts = [float(sum(place.read for place in places)) for places in of_lanes]
        read = self._sum_of_lanes(counts)
        return {
            source.name: count / data.manifest.documents
            for source, count, data in zip(
                self.config.data.sources.values(), read, self.mix.datasets, strict=True
            )
        }

    def _validate(self, mix: Mix, recorder: Recorder | None) -> None:
        """Weighted mean loss over the first windows of validation's lanes, memory carried."""
        started = time.perf_counter()
        self.engine.train(False)
        memory = self._empty_memory()
        total, weight = 0.0, 0.0
        with self._loader(mix, None) as loader, torch.no_grad():
            for _ in range(self.config.train.validation_windows):
                batch = self._agreed(lambda: next(loader))
                self.watchdog.beat("step", self.progress.step)
                outputs = [self._forward(batch, rows, memory) for rows in self._micro_batches()]
                memory = state.joined([output.state for output in outputs])
                total += sum(float(output.losses.double().sum()) for output in outputs)
                weight += self._own_weight(batch)
        self.engine.train(True)
        total, weight = self._sum([total, weight])
        loss = total / (weight or 1.0)
        if recorder is not None:
            recorder.record("validation", {"step": self.progress.step, "loss": loss})
            _log.info(
                "step %d | validation loss %.4f | perplexity %.2f | %d tokens in %.1f s",
                self.progress.step, loss, math.exp(min(loss, 700.0)), weight,
                time.perf_counter() - started,
            )  # fmt: skip

    def _save(self, recorder: Recorder | None, finish: bool) -> None:
        """Copy out what the step left and have it committed meanwhile; with `finish`, before long.

        At most one save is in flight: the next one waits for it. Raises CheckpointError, the same
        on all ranks, where it or the one before fails.
        """
        began, progress = time.perf_counter(), self.progress
        self.watchdog.beat("save", progress.step)
        self.saves.wait()
        self._note_save(recorder)
        lanes = {
            lane: LaneRecord(self._place_of_lane(row), self._tensors_of_lane(row))
            for row, lane in enumerate(self.lanes if self.keeps_lanes else ())
        }
        pieces, lanes = self.host_copy.take(self.engine.pieces(), lanes)
        trainer = {
            "step": progress.step,
            "tokens": progress.tokens,
            "skipped": progress.skipped,
            "skipped_in_a_row": progress.skipped_in_a_row,
            "optimizer_steps": self.engine.optimizer_steps,
            "sources": _fingerprints(self.mix),
            "preface": None if self.prefaces is None else _fingerprints(self.prefaces),
            "vocab_size": self.tokenizer.vocab_size,
            "origin": self.origin,
            "configuration": settings.to_plain(self.config),
        }
        commit = partial(self._commit, progress.step, pieces, lanes, trainer, recorder)
        self.saves.begin(progress.step, commit)
        if finish:
            self.saves.wait()
        self.stood_still = time.perf_counter() - began
        if finish:
            self._note_save(recorder)

    def _commit(
        self,
        step: int,
        pieces: Sequence[Piece],
        lanes: Mapping[int, LaneRecord],
        trainer: Mapping[str, Any],
        recorder: Recorder | None,
    ) -> Path:
        """Commit the checkpoint of copies, in another thread than training's; its directory.

        What the step recorded, and its line in the ledger, are durable before.
        """
        # Lanes lie in blocks on the ranks, so these are in the lanes' order.
        own = [record.place["history"] for record in lanes.values()]
        histories = [one for rank in self.saving_ranks.gather(own) for one in rank]

        def account() -> None:
            if recorder is not None:
                recorder.sync()
            if self.ledger is not None:
                number, size = self.attempt.number, self.ranks.size
                self.ledger.add(step, number, size, self.config, histories)

        agreed(self.saving_ranks, account)
        return save(
            self.directory / CHECKPOINTS,
            step,
            pieces,
            lanes,
            trainer,
            self.saving_ranks,
            self.config.checkpoint.keep_last,
            self.config.checkpoint.keep_every,
            self.attempt,
        )

    def _note_save(self, recorder: Recorder | None) -> None:
        """Record the save that has ended since the last call, if one has."""
        saved = self.saves.ended()
        if saved is None:
            return
        times = {"seconds": saved.seconds, "stall": self.stood_still}
        if recorder is not None:
            recorder.record("checkpoint", {"step": saved.step, **times})
        _log.info(
            "checkpoint %s in %.1f s, for %.2f s of which training stood still",
            saved.path, saved.seconds, self.stood_still,
        )  # fmt: skip

    def _let_save_end(self) -> None:
        """Give a save that is in flight when training fails its time: its step is a good one.

        What that raises is told, but is not why the run ends.
        """
        try:
            self.watchdog.beat("save", self.progress.step)
            self.saves.wait(self.config.watchdog.save)
        except Exception as error:
            _log.warning("the checkpoint in flight failed: %s", error)

    def _reserved(self) -> HostCopy:
        """Host memory for this rank's part of a checkpoint. Raises CheckpointError."""
        memories = [
            tensor
            for row in range(len(self.lanes) if self.keeps_lanes else 0)
            for tensor in self._tensors_of_lane(row).values()
        ]
        return HostCopy([*(piece.values for piece in self.engine.pieces()), *memories])

    def _start(self) -> Progress:
        """Step 0, with new weights or those of `train.start_from`."""
        if self.config.train.start_from:
            _, path = locate(Path(self.config.train.start_from), self.ranks)
            with Checkpoint(path) as checkpoint:
                self.engine.take_weights(checkpoint)
                step, digest = checkpoint.step, checkpoint.sha256
            self.origin = {"path": str(path.resolve()), "step": step, "sha256": digest}
            _log.info("weights of %s, step %d, sha256 of its manifest %s", path, step, digest)
        preface = None if self.prefaces is None else Preface(None, self._empty_memory())
        histories = [""] * len(self.lanes)
        return Progress(0, 0, 0, 0, None, histories, self._empty_memory(), preface)

    def _resume(self) -> Progress | None:
        """The newest good checkpoint's progress, its weights in the engine; None without any."""
        root = self.directory / CHECKPOINTS
        agreed(self.ranks, lambda: take_over(root, self.attempt) if self.ranks.rank == 0 else None)
        found = newest_good(root, self.ranks)
        for name, reason in found.passed_over:
            _log.warning("passed over checkpoint %s: %s", name, reason)
        if found.path is None:
            return None
        with Checkpoint(found.path) as checkpoint:
            trainer = checkpoint.trainer
            if "optimizer_steps" not in trainer:
                raise CheckpointError(
                    f"run.directory: {self.directory} is an imported model, which no run goes on "
                    f"from; give another, and train.start_from={self.directory}"
                )
            self._check_resumable(trainer)
            self.engine.restore(checkpoint, trainer["optimizer_steps"])
            self.origin = trainer.get("origin")
            records = [checkpoint.lane(lane) for lane in self.lanes]
        if "history" not in records[0].place:
            raise CheckpointError(
                f"{found.path} is of a version without a ledger; go on with that version"
            )
        _log.info("resumed from %s, step %d", found.path, trainer["step"])
        return Progress(
            trainer["step"],
            trainer["tokens"],
            trainer["skipped"],
            trainer["skipped_in_a_row"],
            [LanePlace.of(record.place) for record in records],
            [record.place["history"] for record in records],
            _memory_of(records, self._empty_memory()),
            None if self.prefaces is None else self._preface_of(records),
        )

    def _place_of_lane(self, row: int) -> dict[str, Any]:
        """Where a lane goes on, as a checkpoint holds it."""
        progress = self.progress
        assert progress.places is not None
        place = {**asdict(progress.places[row]), "history": progress.histories[row]}
        if progress.preface is not None:
            assert progress.preface.places is not None
            place["preface"] = asdict(progress.preface.places[row])
        return place

    def _tensors_of_lane(self, row: int) -> dict[str, Tensor]:
        """The memories that a lane carries, by the names that a checkpoint has them under."""
        tensors = _lane_tensors(self.progress.memory, row)
        if self.progress.preface is not None:
            tensors |= _lane_tensors(self.progress.preface.memory, row, _PREFACE)
        return tensors

    def _preface_of(self, records: Sequence[LaneRecord]) -> Preface:
        """What `_place_of_lane` and `_tensors_of_lane` stored of it."""
        places = [LanePlace.of(record.place["preface"]) for record in records]
        return Preface(places, _memory_of(records, self._empty_memory(), _PREFACE))

    def _check_resumable(self, trainer: dict[str, Any]) -> None:
        """Say what changed since the checkpoint; refuse what makes its state meaningless."""
        before = dict(_leaves(trainer["configuration"]))
        now = dict(_leaves(settings.to_plain(self.config)))
        changed = [key for key in now if key in before and before[key] != now[key]]
        changes = {key: f"{key}: {before[key]!r} -> {now[key]!r}" for key in changed}
        refused = [text for key, text in changes.items() if _is_fixed(key)]
        refused += self._other_sources(trainer.get("sources"))
        preface = None if self.prefaces is None else _fingerprints(self.prefaces)
        if trainer.get("preface") != preface:
            refused.append("data.preface: its shards are others than before, or there were none")
        if refused:
            raise SettingsError(
                [
                    f"{text}: the run's checkpoint needs the former; set it back, or start a new "
                    "run in another run.directory"
                    for text in refused
                ]
            )
        for text in changes.values():
            _log.info("changed since the checkpoint: %s", text)

    def _other_sources(self, before: list[list[str]] | None) -> list[str]:
        """Which data sets are others than the checkpoint's. Their weights may change: they hold
        from the next document of each lane on.
        """
        if before is None:
            return ["lanes' places are those of a version without data.mix; go on with that one"]
        keys, now = list(self.config.data.sources), _fingerprints(self.mix)
        if len(now) != len(before):
            return [f"data.mix: {len(before)} data sets -> {len(now)}"]
        return [
            f"{key}: the data set's shards are others than before"
            for key, ours, theirs in zip(keys, now, before, strict=True)
            if ours != theirs
        ]

    def _preface_loader(self, preface: Preface | None) -> AbstractContextManager[Loader | None]:
        if preface is None or self.prefaces is None:
            return nullcontext()
        return self._loader(self.prefaces, preface.places)

    def _loader(self, mix: Mix, places: Sequence[LanePlace] | None) -> Loader:
        config = self.config
        return Loader(
            mix,
            self.lanes,
            config.data.lanes,
            config.window,
            config.run.seed,
            places,
            config.data.prefetch,
            config.data.workers,
        )

    def _empty_memory(self) -> ModelState:
        return self.model.initial_state(len(self.lanes), self.device)

    def _sum_of_lanes(self, values: list[float]) -> list[float]:
        """Sums over all lanes of what this rank found of its own."""
        return self._sum(values if self.keeps_lanes else [0.0] * len(values))

    def _sum(self, values: list[float]) -> list[float]:
        """Sums over the ranks, the same on all of them."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()


@contextmanager
def _ranks_joined(config: Config, place: Place) -> Iterator[torch.device]:
    """The process group of all ranks, and this rank's device."""
    cuda = config.launch.device == "cuda" or (
        config.launch.device == "auto" and torch.cuda.is_available()
    )
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    # Small agreements between ranks are made on the CPU, tensors of the model on its device.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=place.init_method,
        rank=place.rank,
        world_size=place.size,
    )
    yield device
    # Not after an error: NCCL would wait here for peers that wait for this rank's message.
    dist.destroy_process_group()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _key(*numbers: int) -> int:
    """A seed of its own for each combination of small numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 63)
    return seed


def _lane_tensors(memory: ModelState, row: int, prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{index}.{name}": getattr(layer, name)[row]
        for index, layer in enumerate(memory)
        for name in layer._fields
    }


def _memory_of(records: Sequence[LaneRecord], like: ModelState, prefix: str = "") -> ModelState:
    """The lanes' memories as one state, on the device and in the form of `like`."""
    return tuple(
        layer._make(
            torch.stack([record.tensors[f"{prefix}{index}.{name}"] for record in records]).to(
                getattr(layer, name).device
            )
            for name in layer._fields
        )
        for index, layer in enumerate(like)
    )


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _leaves(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            for index, each in enumerate(item):
                yield from _leaves(each, f"{prefix}{key}[{index}].")
        else:
            yield f"{prefix}{key}", item


def _is_fixed(key: str) -> bool:
    """Whether a checkpoint's state means nothing under another value of this setting."""
    kernels = ("model.local_attention", "model.memory.kernel")
    model = key.startswith("model.") and key not in kernels
    return model or key in ("data.lanes", "run.seed", "train.start_from")


def _fingerprints(mix: Mix) -> list[list[str]]:
    return [[shard.sha256 for shard in data.manifest.shards] for data in mix.datasets]
