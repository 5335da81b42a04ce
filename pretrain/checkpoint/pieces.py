"""What a rank stores: slices of flattened tensors, and the lanes that it owns.

A tensor is known by a name that is the same on every rank and for every number of ranks. Each rank
stores the slices that it holds, so that a checkpoint written by R ranks is read by any number.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.dataset import durable
from pretrain.checkpoint.manifest import CheckpointError, FileInfo, TensorInfo, json_bytes

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WRITE_BYTES = 4 << 20


@dataclass(frozen=True)
class Piece:
    """`values` (1-D) are the elements from `offset` on of the flattened tensor `name` of `shape`.

    Padding is not part of it. A rank that holds nothing of a tensor may say so by an empty piece,
    or say nothing.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    values: Tensor


@dataclass(frozen=True)
class LaneRecord:
    """A lane's place in its documents (JSON) and the memory that it carries, by name."""

    place: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Extent:
    """A piece without its values: `length` elements from `offset` on of tensor `name`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    @property
    def key(self) -> str:
        """The piece's name in its rank's safetensors file."""
        return f"{self.name}[{self.offset}:{self.offset + self.length}]"


def lane_key(lane: int, name: str) -> str:
    """The name of a lane's tensor in its rank's safetensors file."""
    return f"lane.{lane:05d}.{name}"


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name in safetensors' terms. CheckpointError for one that is never stored."""
    if dtype not in _NAMES:
        raise CheckpointError(f"{dtype} cannot be stored; expected one of {', '.join(DTYPES)}")
    return _NAMES[dtype]


def extent_of(piece: Piece) -> Extent:
    """Where the piece's values lie. CheckpointError if they are not a slice."""
    if piece.values.ndim != 1:
        raise CheckpointError(f"{piece.name}: a piece is 1-D, found {tuple(piece.values.shape)}")
    return Extent(
        piece.name,
        dtype_name(piece.values.dtype),
        tuple(piece.shape),
        piece.offset,
        piece.values.numel(),
    )


def whole_tensors(extents: Iterable[Extent]) -> dict[str, TensorInfo]:
    """Every tensor that the extents of all ranks cover exactly once, by name.

    Raises CheckpointError that names the first tensors with a gap, an overlap, a slice out of
    bounds, or another dtype or shape on another rank: what would be stored is not the model.
    """
    of_name: dict[str, list[Extent]] = {}
    for extent in extents:
        of_name.setdefault(extent.name, []).append(extent)
    problems = [
        f"{name}: {problem}"
        for name, parts in of_name.items()
        if (problem := _coverage_problem(parts)) is not None
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the ranks' pieces do not make whole tensors: {'; '.join(problems[:3])}{more}"
        )
    return {name: TensorInfo(parts[0].dtype, parts[0].shape) for name, parts in of_name.items()}


def _coverage_problem(parts: Sequence[Extent]) -> str | None:
    kinds = {(part.dtype, part.shape) for part in parts}
    if len(kinds) > 1:
        return f"the ranks disagree about dtype and shape: {sorted(kinds)}"
    end = 0
    for part in sorted(parts, key=lambda part: (part.offset, part.length)):
        if part.length == 0:
            continue
        if part.offset != end:
            kind = "nobody stores" if part.offset > end else "stored more than once:"
            return f"{kind} elements {min(end, part.offset)} to {max(end, part.offset)}"
        end += part.length
    size = math.prod(parts[0].shape)
    return None if end == size else f"the pieces end at element {end} of {size}"


def write_layout(
    path: Path, extents: Iterable[Extent], lanes: Mapping[int, LaneRecord]
) -> FileInfo:
    """Write durably which pieces and lanes a rank's tensor file has; its size and sha256."""
    layout = json_bytes(
        {
            "pieces": [[extent.name, extent.offset, extent.length] for extent in extents],
            "lanes": {
                str(lane): {"place": dict(record.place), "tensors": sorted(record.tensors)}
                for lane, record in lanes.items()
            },
        }
    )
    durable.write_bytes(path, layout)
    return FileInfo(len(layout), hashlib.sha256(layout).hexdigest())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileInfo:
    """`stream_tensors` of what is in memory, or on a device, already."""
    infos = {
        key: TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape))
        for key, tensor in tensors.items()
    }
    return stream_tensors(path, infos, tensors.__getitem__)


def stream_tensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> FileInfo:
    """Write a safetensors file durably; its size and the sha256 of what was meant to be written.

    The library's own writer wants all tensors in host memory and would have the file read again
    for its hash; here `read` gives one after another, which is brought to the host, hashed and
    written. Reading is the library's.
    """
    sizes = {
        key: (DTYPES[info.dtype].itemsize, math.prod(info.shape)) for key, info in tensors.items()
    }
    # Wide dtypes first keeps every tensor aligned to its element size, as the library does.
    ordered = sorted(tensors, key=lambda key: (-sizes[key][0], key))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in ordered:
        start, end = end, end + math.prod(sizes[key])
        info = tensors[key]
        header[key] = {
            "dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    head = [memoryview(len(text).to_bytes(8, "little")), memoryview(text)]
    values = itertools.chain.from_iterable(_of(key, tensors[key], read(key)) for key in ordered)
    with durable.replacing(path) as file:
        for block in itertools.chain(head, values):
            digest.update(block)
            file.write(block)
    return FileInfo(8 + len(text) + end, digest.hexdigest())


def _of(key: str, info: TensorInfo, tensor: Tensor) -> Iterable[memoryview]:
    """The blocks of what was read as `key`."""
    found = TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape))
    assert found == info, f"{key}: announced as {info}, read as {found}"
    return _blocks(tensor)


def _blocks(tensor: Tensor) -> Iterable[memoryview]:
    """The tensor's bytes, row-major, in blocks that are hashed and written while still cached."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    view = flat.numpy().data
    return (view[start : start + _WRITE_BYTES] for start in range(0, len(view), _WRITE_BYTES))
