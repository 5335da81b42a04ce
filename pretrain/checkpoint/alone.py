"""A checkpoint written by a single process, which holds one tensor at a time in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoint.manifest import (
    Manifest,
    TensorInfo,
    layout_file,
    tensor_file,
    write_manifest,
)
from pretrain.checkpoint.pieces import Extent, stream_tensors, write_layout


def write_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    trainer: Mapping[str, Any],
) -> None:
    """Write into `directory`, which is new, what `read` gives for each of the `tensors`.

    Any number of ranks can read it. It has no lanes, so a run cannot be resumed from it.
    The caller gives the directory a checkpoint's name only after this has returned.
    """
    directory.mkdir(parents=True)
    extents = [
        Extent(name, info.dtype, info.shape, 0, math.prod(info.shape))
        for name, info in tensors.items()
    ]
    names = {extent.key: extent.name for extent in extents}
    stored = {extent.key: TensorInfo(extent.dtype, (extent.length,)) for extent in extents}
    path = directory / tensor_file(0, 1)
    files = {
        path.name: stream_tensors(path, stored, lambda key: read(names[key]).reshape(-1)),
        layout_file(0, 1): write_layout(directory / layout_file(0, 1), extents, {}),
    }
    write_manifest(directory, Manifest(step, 1, files, dict(tensors), {}, trainer))
