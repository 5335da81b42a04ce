"""What a rank holds of the parameters' float32 masters and the optimizer's states."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.checkpoint.load import Checkpoint
from pretrain.checkpoint.pieces import Piece
from pretrain.training.adafactor import Adafactor
from pretrain.training.muon import Muon
from pretrain.training.optim import EMA, Kept
from pretrain.training.partitions import Partition

_log = logging.getLogger("pretrain.training.states")


class Place(NamedTuple):
    """A parameter's place in the optimizer, and what the optimizer keeps of it."""

    partition: Partition
    kept: Kept


class States:
    """The states of an optimizer, made here: DeepSpeed makes them in the first step, too late to
    restore them.

    `places` are of all parameters, by name; `step_device` is where the optimizer counts its steps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        places: Mapping[str, Place],
        step_device: torch.device | None,
    ) -> None:
        self._optimizer = optimizer
        self._places = places
        self.kinds = {kind for _, kept in places.values() for kind in kept.moments}
        """The moments that are kept of one parameter or another."""
        for partition, kept in places.values():
            if partition.flat not in optimizer.state:
                optimizer.state[partition.flat] = {
                    "step": torch.zeros((), dtype=torch.float32, device=step_device),
                    **{moment: torch.zeros_like(partition.flat.data) for moment in kept.moments},
                }
        partitions = [place.partition for place in places.values()]
        if isinstance(optimizer, Muon):
            optimizer.place(partitions)
        self.factors: dict[str, Tensor] = {}
        """NAME/KIND: states that are whole on every rank."""
        if isinstance(optimizer, Adafactor):
            optimizer.place(partitions, [name for name in places if places[name].kept.factors])
            self.factors = {
                f"{name}/{kind}": whole
                for name, of in optimizer.factors.items()
                for kind, whole in of.items()
            }

    @property
    def steps(self) -> int:
        """The number of steps that the optimizer has applied."""
        return int(next(iter(self._optimizer.state.values()))["step"])

    @steps.setter
    def steps(self, count: int) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(count)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Average the masters into what is kept of them, if it is; with 0 it begins with them."""
        if EMA not in self.kinds:
            return
        for flat, state in self._optimizer.state.items():
            state[EMA].lerp_(flat.data, 1.0 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange the masters and their average."""
        assert EMA in self.kinds
        for flat, state in self._optimizer.state.items():
            masters = flat.clone()
            flat.copy_(state[EMA])
            state[EMA].copy_(masters)

    @property
    def nbytes(self) -> int:
        """Bytes of the states, masters not included."""
        flat = [
            tensor
            for state in self._optimizer.state.values()
            for kind, tensor in state.items()
            if kind != "step"
        ]
        return sum(tensor.nbytes for tensor in [*flat, *self.factors.values()])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """NAME/KIND of every master and state, and the whole tensor's shape."""
        found = {
            f"{name}/{kind}": partition.shape
            for name, (partition, kept) in self._places.items()
            for kind in ("param", *kept.moments)
        }
        return found | {name: tuple(whole.shape) for name, whole in self.factors.items()}

    def expected(self, checkpoint: Checkpoint) -> set[str]:
        """The kinds of moments to read from a checkpoint that must have these tensors.

        An average of the weights may be missing on either side, which is logged. Raises
        CheckpointError if another tensor is missing or has another shape.
        """
        shapes, kinds = self.shapes(), set(self.kinds)
        averages = {f"{name}/{EMA}": place.partition.shape for name, place in self._places.items()}
        averaged = not averages.keys().isdisjoint(checkpoint.names())
        if averaged and EMA not in kinds:
            shapes |= averages
            _log.info("later checkpoints have no average of the weights: optim.ema_decay is 0")
        elif EMA in kinds and not averaged:
            shapes = {name: shape for name, shape in shapes.items() if name not in averages}
            kinds.remove(EMA)
            _log.info("the average of the weights begins with those of step %d", checkpoint.step)
        checkpoint.expect(shapes)
        return kinds

    def own(self, name: str) -> tuple[int, dict[str, Tensor]]:
        """The offset of this rank's part of the flattened parameter, and writable flat views of
        its master and moments, by kind."""
        partition, kept = self._places[name]
        state = self._optimizer.state[partition.flat]
        views = {moment: partition.of(state[moment]) for moment in kept.moments}
        return partition.own.start, {"param": partition.of(partition.flat.data), **views}

    def pieces(self, rank: int, ranks: int) -> Iterator[Piece]:
        """This rank's part of everything, as views; of what is whole on all ranks, a share.

        The pieces of all ranks cover each tensor exactly once.
        """
        for name, (partition, _) in self._places.items():
            offset, views = self.own(name)
            if partition.replicated:
                share = _share(partition.numel, rank, ranks)
                offset, views = share.start, {kind: v[share] for kind, v in views.items()}
            for kind, view in views.items():
                yield Piece(f"{name}/{kind}", partition.shape, offset, view.detach())
        for name, whole in self.factors.items():
            share = _share(whole.numel(), rank, ranks)
            yield Piece(name, tuple(whole.shape), share.start, whole[share])


def _share(length: int, rank: int, ranks: int) -> slice:
    """The part of `length` elements that `rank` writes if every rank has all of them."""
    return slice(length * rank // ranks, length * (rank + 1) // ranks)
