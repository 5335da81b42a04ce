"""A training step: micro-batches forward and backward, the optimizer, and the next state.

The random seed and the learning rate are functions of the step's number, so from the same state and
batch every attempt computes the same step to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.ranks import Ranks
from pretrain.config.root import Config
from pretrain.data.loader import Batch
from pretrain.data.packing import IGNORE
from pretrain.model import state
from pretrain.model.state import ModelState
from pretrain.model.transformer import Output
from pretrain.training import spikes
from pretrain.training.engine import Engine
from pretrain.training.ledger import extended
from pretrain.training.optim import rate_fraction
from pretrain.training.parallel import Share
from pretrain.training.run_state import Preface, RunState


@dataclass(frozen=True)
class StepResult:
    """The result of a step, over all ranks."""

    loss: float
    """Nats per unit of target weight; 0 if no target had any weight, which is no measurement."""
    applied: bool
    """False if the update was skipped: a gradient was not finite, or the step is a spike."""
    grad_norm: float
    """Global L2 norm before clipping; inf if it was not finite."""
    forward_only: bool = False
    """No target had any weight, so there was no update to apply."""
    auxiliary: float | None = None
    """The memory's auxiliary loss, which `loss` leaves out, per unit of target weight; None for a
    memory without one."""
    z_loss: float | None = None
    """The z-loss, which `loss` leaves out, per unit of target weight; None without one."""
    spike: str = ""
    """Of a step that was skipped as a spike, what exceeded which bound."""


class Stepper:
    """Computes steps on this rank's share of the windows."""

    def __init__(self, engine: Engine, config: Config, share: Share, ranks: Ranks) -> None:
        self._engine = engine
        self._config = config
        self._share = share
        self._ranks = ranks
        lanes = len(share.lanes)
        size = config.train.micro_batch or lanes
        self._micro_batches = [slice(first, first + size) for first in range(0, lanes, size)]
        none = torch.empty(0, dtype=torch.int64, device=share.device)
        self._nowhere = none, none  # the places of no logits

    def empty_memory(self) -> ModelState:
        """The empty memory of this rank's lanes."""
        return self._engine.empty_memory(len(self._share.lanes))

    def own_weight(self, batch: Batch) -> float:
        """The sum of the weights of all targets in this rank's part of the windows.

        The weights have few bits, so the sum is exact and does not depend on the number of ranks.
        """
        part = self._share.tokens
        if batch.weights is None:
            return float((batch.targets[:, part] != IGNORE).sum())
        return float(batch.weights[:, part].double().sum())

    def own_scored(self, batch: Batch) -> int:
        """The tokens of this rank's part of the windows that the loss needs logits of: those whose
        target has a weight, or all without weights."""
        part = self._share.tokens
        if batch.weights is None:
            return batch.tokens[:, part].numel()
        return int(batch.weights[:, part].count_nonzero())

    def step(
        self, run: RunState, batch: Batch, weight: float, preface: Batch | None = None
    ) -> tuple[RunState, StepResult]:
        """One optimizer step over the rank's lanes, micro-batch by micro-batch; then the preface.

        `weight` is the sum of `own_weight` over all ranks. The gradient is that of the weighted
        mean loss over all targets of the step, however they are distributed over ranks and
        micro-batches. If no target has any weight, the step is forward-only. Every rank must call
        it.
        """
        torch.manual_seed(_seed(self._config.run.seed, run.step + 1, self._share.rank))
        if weight:
            memory, result = self._trained(run, batch, weight)
        else:
            # No weight changes, not even by momentum or weight decay. This is a third of a step's
            # work, and the usual case in long prompts when only answers have a weight.
            memory = self.memory_after(batch, run.memory, run.initial)
            result = StepResult(0.0, applied=True, grad_norm=0.0, forward_only=True)
        return self._advanced(run, batch, preface, memory, result), result

    def _trained(self, run: RunState, batch: Batch, weight: float) -> tuple[ModelState, StepResult]:
        """Forward, backward and optimizer step; the memory after the windows, and the result."""
        # The engine averages gradients over the ranks.
        scale = self._ranks.size / weight
        # All of the loss, and what of it the memory's and the z-loss are.
        total = torch.zeros(3, dtype=torch.float64, device=self._share.device)
        memories, output = [], None
        for output in self._forward(batch, run.memory, run.initial):
            assert output.loss is not None
            self._engine.backward(output.loss * scale)
            for part, sum_ in enumerate((output.loss.detach(), output.auxiliary, output.z_loss)):
                if sum_ is not None:
                    total[part] += sum_.double()
            memories.append(state.detached(output.state))
        assert output is not None
        whole, auxiliary, z_loss = (each / weight for each in self._ranks.sum(total.tolist()))
        result = self._updated(run, whole - auxiliary - z_loss)
        if output.auxiliary is not None:
            result = replace(result, auxiliary=auxiliary)
        if output.z_loss is not None:
            result = replace(result, z_loss=z_loss)
        return state.joined(memories), result

    def _updated(self, run: RunState, loss: float) -> StepResult:
        """The optimizer's step after the backward of all micro-batches, of this loss."""
        config = self._config
        rate = rate_fraction(config.optim, config.train.steps, run.step + 1)
        bounds = spikes.bounds(run.recent, config.train.spikes)
        # No gradient is small enough where the loss is too large.
        largest_norm = -1.0 if loss > bounds.loss else bounds.grad_norm
        applied, norm = self._engine.step(rate, largest_norm)
        spike = "" if applied or norm == math.inf else bounds.exceeded(loss, norm)
        return StepResult(loss, applied, norm, spike=spike)

    def forward_only(self, batch: Batch, memory: ModelState) -> list[Output]:
        """The model's outputs over the windows, one per micro-batch, without gradients."""
        with self._engine.evaluating():
            return list(self._forward(batch, memory, None))

    def memory_after(
        self, batch: Batch, memory: ModelState, initial: ModelState | None = None
    ) -> ModelState:
        """The memory after the windows, without gradients, losses or any logits."""
        with self._engine.evaluating():
            outputs = self._forward(batch, memory, initial, scored=False)
            return state.joined([output.state for output in outputs])

    def _forward(
        self, batch: Batch, memory: ModelState, initial: ModelState | None, scored: bool = True
    ) -> Iterator[Output]:
        """The model's output over this rank's part of each micro-batch of windows, in turn; with
        losses if they are to be `scored`.

        `memory` and `initial` are those of all the rank's lanes. A micro-batch is computed when its
        output is requested.
        """
        for rows in self._micro_batches:
            yield self._engine.forward(
                self._own(batch.tokens, rows),
                self._own(batch.starts, rows),
                state.of_lanes(memory, rows),
                parts=self._share.group,
                initial=None if initial is None else state.of_lanes(initial, rows),
                **(self._asked(batch, rows) if scored else {"places": self._nowhere}),
            )

    def _asked(self, batch: Batch, rows: slice) -> dict[str, Any]:
        """The targets of a micro-batch and their weights, as arguments of the model."""
        weights = None if batch.weights is None else self._own(batch.weights, rows)
        return {"targets": self._own(batch.targets, rows), "weights": weights}

    def _own(self, windows: Tensor, rows: slice) -> Tensor:
        """This rank's part of a micro-batch, on its device."""
        return windows[rows, self._share.tokens].to(self._share.device, non_blocking=True)

    def _advanced(
        self,
        run: RunState,
        batch: Batch,
        preface: Batch | None,
        memory: ModelState,
        result: StepResult,
    ) -> RunState:
        """The state after a step that left `memory`; reads the preface's next windows."""
        histories, recent = _extended(run.histories, batch), run.recent
        # A step without any target says nothing about whether the run diverges.
        in_a_row = run.skipped_in_a_row + (not result.applied)
        if result.applied and not result.forward_only:
            in_a_row = 0
            watched = self._config.train.spikes
            recent = spikes.noted(recent, result.loss, result.grad_norm, watched)
        read = run.preface
        if preface is not None and run.preface is not None:
            histories = _extended(histories, preface)
            after = self.memory_after(preface, run.preface.memory)
            if not result.applied:
                after = state.without_nonfinite(after)
            read = Preface(preface.places, after)
        return replace(
            run,
            step=run.step + 1,
            tokens=run.tokens + self._config.data.lanes * self._config.window,
            skipped=run.skipped + (not result.applied),
            skipped_in_a_row=in_a_row,
            places=batch.places,
            histories=histories,
            memory=memory if result.applied else state.without_nonfinite(memory),
            preface=read,
            spikes=run.spikes + bool(result.spike),
            recent=recent,
        )


def _extended(histories: Sequence[str], batch: Batch) -> list[str]:
    return [
        extended(history, tokens.numpy(), starts.numpy())
        for history, tokens, starts in zip(histories, batch.tokens, batch.starts, strict=True)
    ]


def _seed(*numbers: int) -> int:
    """A distinct seed for each combination of small numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 63)
    return seed
