"""A rank's part of a checkpoint in host memory, so that it is written while training continues."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.pieces import LaneRecord, Piece

_ALIGNMENT = 64  # bytes; of any dtype's elements, and of a cache line

_log = logging.getLogger(__name__)


class HostCopy:
    """Host memory for all that a rank stores, made once and filled anew at each save.

    `tensors` are of the sizes that each save will bring. The memory is touched here, so that where
    there is too little, a CheckpointError says so before the first step. What lies on a GPU
    is copied by the GPU itself into page-locked memory.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        given = list(tensors)
        self.bytes = sum(_aligned(tensor.nbytes) for tensor in given)
        try:
            self._block = torch.zeros(self.bytes, dtype=torch.uint8)
        except RuntimeError:
            raise CheckpointError(
                f"the host copy of a checkpoint needs {self.bytes / 1e9:.1f} GB of "
                "host memory on each rank, which could not be allocated; start fewer ranks on a "
                "node, or more of them in all"
            ) from None
        self._on_gpu = any(tensor.is_cuda for tensor in given)
        if self._on_gpu:
            _lock_pages(self._block)
        self._end = 0

    def take(
        self, pieces: Iterable[Piece], lanes: Mapping[int, LaneRecord]
    ) -> tuple[list[Piece], dict[int, LaneRecord]]:
        """The same with copied values, which stay as they are until the next call."""
        self._end = 0
        copied = [dataclasses.replace(p, values=self._copied(p.values)) for p in pieces]
        records = {
            lane: LaneRecord(
                record.place, {name: self._copied(each) for name, each in record.tensors.items()}
            )
            for lane, record in lanes.items()
        }
        if self._on_gpu:
            torch.cuda.synchronize()
        return copied, records

    def _copied(self, tensor: Tensor) -> Tensor:
        begin, self._end = self._end, self._end + _aligned(tensor.nbytes)
        assert self._end <= self.bytes, "more is to be stored than at first"
        place = self._block[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor, non_blocking=True)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _lock_pages(block: Tensor) -> None:
    """Lock the block where it is; torch's allocator of such memory rounds up to powers of two."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0))
    if status:
        _log.warning(
            "%.1f GB of host memory could not be page-locked (CUDA error %d): checkpoints are "
            "copied out more slowly",
            block.nbytes / 1e9,
            status,
        )
