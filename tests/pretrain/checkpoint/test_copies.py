"""What is copied out is the state of that moment, in memory that is made once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.copies import HostCopy
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.pieces import LaneRecord, Piece


@pytest.fixture
def stored(
    tensors: Callable[[int], dict[str, Tensor]], lane_records: Callable[[int, int], Any]
) -> tuple[list[Piece], dict[int, LaneRecord]]:
    """Pieces and lanes of every dtype, shape and bit pattern."""
    pieces = [
        Piece(name, tuple(tensor.shape), 0, tensor.reshape(-1))
        for name, tensor in tensors(3).items()
    ]
    return pieces, lane_records(3, 2)


def values(pieces: list[Piece], lanes: dict[int, LaneRecord]) -> list[Tensor]:
    return [
        *(piece.values for piece in pieces),
        *(each for record in lanes.values() for each in record.tensors.values()),
    ]


def bits(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return [(t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()) for t in tensors]


def test_a_copy_keeps_every_bit_while_the_originals_change(
    stored: tuple[list[Piece], dict[int, LaneRecord]],
) -> None:
    before = bits(values(*stored))
    pieces, lanes = HostCopy(values(*stored)).take(*stored)
    for original in values(*stored):
        original.reshape(-1).view(torch.uint8).fill_(1)
    assert bits(values(pieces, lanes)) == before
    assert [(p.name, p.shape, p.offset) for p in pieces] == [
        (p.name, p.shape, p.offset) for p in stored[0]
    ]
    assert {lane: record.place for lane, record in lanes.items()} == {
        lane: record.place for lane, record in stored[1].items()
    }


def test_the_memory_is_used_again_and_no_two_tensors_share_any(
    stored: tuple[list[Piece], dict[int, LaneRecord]],
) -> None:
    copy = HostCopy(values(*stored))
    first = values(*copy.take(*stored))
    second = values(*copy.take(*stored))
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in first if t.numel())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert copy.bytes >= sum(end - start for start, end in spans)


def test_memory_that_cannot_be_allocated_is_reported_before_the_first_step() -> None:
    huge = torch.empty(1 << 52, device="meta")
    with pytest.raises(CheckpointError, match=r"needs 18014398\.5 GB of host memory on each rank"):
        HostCopy([huge])
