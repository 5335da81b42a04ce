"""A checkpoint by one process that has all of a model, and holds one tensor of it at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from data_prep.dataset import durable
from pretrain.checkpoint.manifest import (
    FileInfo,
    Manifest,
    TensorInfo,
    json_bytes,
    layout_file,
    tensor_file,
    write_manifest,
)
from pretrain.checkpoint.pieces import Extent, stream_tensors


def write_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    trainer: Mapping[str, Any],
) -> None:
    """Write into `directory`, which is new, what `read` gives for each of the `tensors`.

    Any number of ranks can read it. It has no lanes, so a run cannot be resumed from it.
    Nothing else may see the directory under a checkpoint's name before this returns.
    """
    directory.mkdir(parents=True)
    extents = {
        name: Extent(name, info.dtype, info.shape, 0, math.prod(info.shape))
        for name, info in tensors.items()
    }
    stored = {extent.key: TensorInfo(extent.dtype, (extent.length,)) for extent in extents.values()}
    of_key = {extent.key: name for name, extent in extents.items()}
    layout = json_bytes(
        {"pieces": [[name, 0, extent.length] for name, extent in extents.items()], "lanes": {}}
    )
    info = stream_tensors(
        directory / tensor_file(0, 1), stored, lambda key: read(of_key[key]).reshape(-1)
    )
    durable.write_bytes(directory / layout_file(0, 1), layout)
    layout_info = FileInfo(len(layout), hashlib.sha256(layout).hexdigest())
    files = {tensor_file(0, 1): info, layout_file(0, 1): layout_info}
    write_manifest(directory, Manifest(step, 1, files, dict(tensors), {}, trainer))
