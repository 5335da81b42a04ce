"""Pieces that do not make whole tensors are refused; the file is what safetensors reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.checkpoint.manifest import CheckpointError, TensorInfo
from pretrain.checkpoint.pieces import Extent, Piece, extent_of, whole_tensors, write_tensors


def of_w(*slices: tuple[int, int], shape: tuple[int, ...] = (2, 5)) -> list[Extent]:
    return [Extent("w", "F32", shape, start, end - start) for start, end in slices]


@pytest.mark.parametrize(
    "slices",
    [
        [(0, 10)],
        [(4, 10), (0, 4)],
        [(0, 3), (3, 3), (3, 10), (10, 10)],
        [(0, 0), (0, 10), (0, 0)],
        [(7, 7), (0, 5), (5, 10)],
    ],
)
def test_slices_that_cover_each_element_once_make_a_whole_tensor(
    slices: list[tuple[int, int]],
) -> None:
    assert whole_tensors(of_w(*slices)) == {"w": TensorInfo("F32", (2, 5))}


@pytest.mark.parametrize(
    ("slices", "told"),
    [
        ([(0, 4), (5, 10)], "w: nobody stores elements 4 to 5"),
        ([(1, 10)], "w: nobody stores elements 0 to 1"),
        ([(0, 9)], "w: the pieces end at element 9 of 10"),
        ([(0, 12)], "w: the pieces end at element 12 of 10"),
        ([(0, 0)], "w: the pieces end at element 0 of 10"),
        ([(0, 6), (5, 10)], "w: stored more than once: elements 5 to 6"),
        ([(0, 10), (0, 10)], "w: stored more than once: elements 0 to 10"),
        ([(-1, 10)], "w: stored more than once: elements -1 to 0"),
    ],
)
def test_a_gap_or_an_overlap_is_reported_by_name_and_elements(
    slices: list[tuple[int, int]], told: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        whole_tensors(of_w(*slices))
    assert str(error.value) == f"the ranks' pieces do not make whole tensors: {told}"


def test_ranks_that_disagree_about_shape_or_dtype_are_refused() -> None:
    with pytest.raises(CheckpointError, match="w: the ranks disagree about dtype and shape"):
        whole_tensors(of_w((0, 5)) + of_w((5, 10), shape=(10,)))
    with pytest.raises(CheckpointError, match="w: the ranks disagree about dtype and shape"):
        whole_tensors([*of_w((0, 5)), Extent("w", "BF16", (2, 5), 5, 5)])


def test_scalars_hold_one_element_and_empty_tensors_none() -> None:
    scalar, empty = Extent("s", "I64", (), 0, 1), Extent("e", "F32", (0, 4), 0, 0)
    assert set(whole_tensors([scalar, empty])) == {"s", "e"}
    with pytest.raises(CheckpointError, match="s: the pieces end at element 0 of 1"):
        whole_tensors([Extent("s", "I64", (), 0, 0)])


def test_a_piece_that_is_no_slice_or_of_a_strange_dtype_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"w: a piece is 1-D, found \(2, 5\)"):
        extent_of(Piece("w", (2, 5), 0, torch.zeros(2, 5)))
    with pytest.raises(CheckpointError, match=r"torch.complex64 cannot be stored; expected one of"):
        extent_of(Piece("w", (5,), 0, torch.zeros(5, dtype=torch.complex64)))


def test_the_file_holds_what_the_librarys_own_writer_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(7, dtype=torch.uint8),
        "b": torch.randn(3, 4, dtype=torch.float64),
        "c": torch.randn(5).bfloat16(),
        "d": torch.tensor(3),
        "e": torch.zeros(0, 3),
        "ünïcode/key": torch.tensor([True, False]),
        "large": torch.arange(3_000_000, dtype=torch.int32),
        "transposed": torch.randn(4, 6).t(),
    }
    info = write_tensors(tmp_path / "ours", tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs")
    data = (tmp_path / "ours").read_bytes()
    assert (info.bytes, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].equal(tensor), name
