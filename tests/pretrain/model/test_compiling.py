"""What `fused` compiles, by torch's own count; what it computes is in test_pointwise.py."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pretrain.model import compiling


def test_every_shape_is_compiled_in_every_thread_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    # Traced without a C++ compiler; how many graphs there are does not depend on it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    @compiling.fused
    def doubled(x: Tensor) -> Tensor:
        return x + x

    def double(lengths: range) -> list[list[float]]:
        return [doubled(torch.ones(length)).tolist() for length in lengths]

    reset()
    counters.clear()
    compiling.switch(True)
    try:
        with ThreadPoolExecutor(1) as backward:  # as on a GPU
            for _ in range(2):
                found = double(range(1, 13))
                found += backward.submit(double, range(13, 25)).result()
    finally:
        compiling.switch(False)
        reset()
    assert found == [[2.0] * length for length in range(1, 25)]
    assert counters["stats"]["unique_graphs"] == 24
