"""Logs and records steps and validations."""

from __future__ import annotations

import logging
import math
import socket
from typing import Any

import torch

from pretrain.checkpoint.ranks import Ranks
from pretrain.config.root import Config
from pretrain.model import flops
from pretrain.model.state import ModelState
from pretrain.trained import PRECISIONS
from pretrain.training.data import RunData
from pretrain.training.engine import Engine
from pretrain.training.evaluator import KIND as EVALUATION
from pretrain.training.evaluator import Evaluation
from pretrain.training.metrics import Meter, Work, log_line, peak_memory
from pretrain.training.optim import rate_fraction
from pretrain.training.parallel import Share
from pretrain.training.records import Records
from pretrain.training.run_state import RunState
from pretrain.training.step import StepResult
from pretrain.training.stragglers import Stragglers
from pretrain.training.validator import KIND as VALIDATION
from pretrain.training.validator import Validation

_log = logging.getLogger("pretrain.training.reporter")


class Reporter:
    """Reports on a run that continues after `step`; all ranks take part, `records` are rank 0's.

    `meter` measures the steps between reports.
    """

    def __init__(
        self,
        config: Config,
        data: RunData,
        engine: Engine,
        share: Share,
        ranks: Ranks,
        records: Records | None,
        step: int,
    ) -> None:
        self._config = config
        self._data = data
        self._engine = engine
        self._share = share
        self._ranks = ranks
        self._records = records
        self._step = step  # of the last report
        self._hosts = ranks.gather(socket.gethostname())
        self._stragglers = Stragglers(ranks, share.device)
        vocabulary = data.tokenizer.vocab_size
        head = 3 * flops.head_flops(config.model, vocabulary)
        whole = flops.training_flops_per_token(config.model, vocabulary, config.window)
        reading = flops.reading_flops_per_token(config.model, config.window)
        self._work = Work(whole - head, head, reading)
        self._peak_flops = peak_flops(
            _device_name(share.device), config.train.precision, ranks.size
        )
        self.meter = Meter()

    def report(self, run: RunState, result: StepResult) -> None:
        """Log and record the step that led to `run`, with the rates since the last report."""
        slow = self._stragglers.look(self.meter.own_wait, self.meter.seconds)
        rates = self._rates(run.step)
        gates = [torch.sigmoid(gate).tolist() for gate in self._engine.gates()]
        memory = self.memory_metrics(run.memory)
        epochs = self.epochs(run)
        if self._records is None:
            return
        optim, steps = self._config.optim, self._config.train.steps
        fraction = rate_fraction(optim, steps, run.step)
        # Without any weighted target nothing was measured: a loss of 0 would be drawn as one.
        measured = {"loss": result.loss, "grad_norm": result.grad_norm}
        record = {
            "step": run.step,
            **({} if result.forward_only else measured),
            "lr": optim.peak * fraction,
            "gate_lr": optim.gate_lr * fraction,
            **rates,
            "memory_bytes": peak_memory(self._share.device),
            "tokens": run.tokens,
            "epochs": epochs,
            "skipped": run.skipped,
            "spikes": run.spikes,
            "gates": gates,
            **memory,
            "stragglers": {f"{one.cause}/{one.rank}": one.excess for one in slow},
        }
        if result.auxiliary is not None:
            record["auxiliary_loss"] = result.auxiliary
        if result.z_loss is not None:
            record["z_loss"] = result.z_loss
        self._records.add("train", record)
        _log.info(log_line(record, steps, memory))
        for one in slow:
            _log.warning("straggler: %s", one.described(self._hosts[one.rank]))

    def report_spike(self, step: int, spike: str) -> None:
        """Log that `step` was skipped, and why."""
        if self._records is not None:
            watched = self._config.train.spikes
            _log.warning(
                "step %d was skipped: %s, the mean of the last %d applied steps and %g standard "
                "deviations", step, spike, watched.steps, watched.deviations,
            )  # fmt: skip

    def report_validation(
        self, step: int, found: Validation, averaged: Validation | None = None
    ) -> None:
        """Log and record a validation after `step`, and that of the weights' average.

        One without any weighted target has measured nothing: its record has no loss.
        """
        if self._records is None:
            return
        if not found.weight:
            _log.warning(
                "step %d | validation: no token of its windows has a weight in the loss, so there "
                "is no loss; raise train.validation_windows or data.prompt_weight", step,
            )  # fmt: skip
            self._records.add(VALIDATION, {"step": step})
            return
        record = {"step": step, "loss": found.loss}
        beside, seconds = "", found.seconds
        if averaged is not None:
            record["ema_loss"] = averaged.loss
            beside = f", {averaged.loss:.4f} of the weights' average"
            seconds += averaged.seconds
        self._records.add(VALIDATION, record)
        _log.info(
            "step %d | validation loss %.4f%s | perplexity %.2f | %d tokens in %.1f s",
            step, found.loss, beside, math.exp(min(found.loss, 700.0)), found.weight, seconds,
        )  # fmt: skip

    def report_evaluation(self, step: int, name: str, found: Evaluation) -> None:
        """Log and record an evaluation after `step`."""
        if self._records is None:
            return
        values = {**found.numbers, "seconds": found.seconds}
        self._records.add(EVALUATION, {"step": step, name: values})
        level = logging.WARNING if "error" in found.numbers else logging.INFO
        _log.log(level, "step %d | %s: %s | in %.1f s", step, name, found.line, found.seconds)

    def memory_metrics(self, memory: ModelState) -> dict[str, list[float]]:
        """The memory's metrics by name, means over all lanes, one number per layer.

        A name that ends in `_norm` is a root mean square; see `Attention.metrics`.
        """
        found = {}
        for name, sums in self._engine.module.metrics(memory).items():
            means = [total / self._config.data.lanes for total in self._sum_of_lanes(sums)]
            found[name] = [math.sqrt(x) for x in means] if name.endswith("_norm") else means
        return found

    def epochs(self, run: RunState) -> dict[str, float]:
        """Epochs of each source: documents read by all lanes over the source's documents."""
        assert run.places is not None
        of_lanes = zip(*(place.sources for place in run.places), strict=True)
        counts = [float(sum(place.read for place in places)) for places in of_lanes]
        return {
            source.name: count / data.manifest.documents
            for source, count, data in zip(
                self._config.data.sources.values(),
                self._sum_of_lanes(counts),
                self._data.mix.datasets,
                strict=True,
            )
        }

    def _rates(self, step: int) -> dict[str, Any]:
        """The meter's rates over the steps since the last report."""
        left, done = self._config.train.steps - step, step - self._step
        self._step = step
        return self.meter.read(self._work, self._peak_flops, left, done)

    def _sum_of_lanes(self, own: list[float]) -> list[float]:
        """Sums over all lanes, given this rank's sums over its lanes."""
        return self._ranks.sum(own if self._share.owned else [0.0] * len(own))


def peak_flops(device: str, precision: str, ranks: int) -> float | None:
    """FLOP/s of all ranks' devices together; None if the device's peak is not known."""
    peak = flops.peak_flops(device, PRECISIONS[precision])
    return None if peak is None else peak * ranks


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
