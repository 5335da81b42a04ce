"""Every slice comes back bit for bit, whatever ranks wrote it and whatever ranks read it."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_prep.dataset.settings import SettingsError
from pretrain.checkpoint.load import Checkpoint, newest_good
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.pieces import LaneRecord
from pretrain.checkpoint.ranks import Ranks, SoloRanks


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("step", range(1, 6))
def test_what_two_ranks_saved_any_number_of_ranks_reads_back_to_the_bit(
    tmp_path: Path, save_on_ranks: Any, run_ranks: Any, tensors: Any, size: int, step: int
) -> None:
    save_on_ranks(tmp_path, step)
    expected = tensors(step)

    def work(ranks: Ranks) -> dict[str, Tensor]:
        found = newest_good(tmp_path, ranks)
        assert found.path is not None
        with Checkpoint(found.path) as checkpoint:
            parts = {}
            for name, shape in checkpoint.names().items():
                count = torch.Size(shape).numel()
                share = -(-count // ranks.size)  # padded to a multiple of the ranks, as ZeRO does
                start = min(ranks.rank * share, count)
                parts[name] = checkpoint.read(name, start, min(share, count - start))
            return parts

    parts = run_ranks(size, work)
    assert set(parts[0]) == set(expected)
    for name, tensor in expected.items():
        gathered = torch.cat([part[name] for part in parts])
        assert gathered.dtype == tensor.dtype
        assert bits(gathered) == bits(tensor), name


def test_any_slice_equals_the_slice_of_the_flattened_tensor(
    tmp_path: Path, save_on_ranks: Any, tensors: Any
) -> None:
    checkpoint = Checkpoint(save_on_ranks(tmp_path, 3, size=4))
    choose = random.Random(0)
    for name, tensor in tensors(3).items():
        flat = tensor.reshape(-1)
        for _ in range(40):
            start, end = sorted(choose.randint(0, len(flat)) for _ in range(2))
            assert bits(checkpoint.read(name, start, end - start)) == bits(flat[start:end]), name


def test_whole_tensors_scalars_and_empty_ones_keep_their_shape(
    tmp_path: Path, save_on_ranks: Any, tensors: Any
) -> None:
    checkpoint = Checkpoint(save_on_ranks(tmp_path, 7))
    expected = tensors(7)
    assert checkpoint.names() == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        read = checkpoint.tensor(name, dtype=tensor.dtype)
        assert read.shape == tensor.shape
        assert bits(read) == bits(tensor)
    assert checkpoint.tensor("step").item() == 7


def test_lanes_come_back_by_number_whichever_rank_stored_them(
    tmp_path: Path, save_on_ranks: Any, lane_records: Callable[[int, int], dict[int, LaneRecord]]
) -> None:
    checkpoint = Checkpoint(save_on_ranks(tmp_path, 5, size=3))
    assert checkpoint.lanes() == 4
    for lane, record in lane_records(5, 4).items():
        read = checkpoint.lane(lane)
        assert read.place == record.place
        assert set(read.tensors) == set(record.tensors)
        for name, tensor in record.tensors.items():
            assert read.tensors[name].shape == tensor.shape
            assert bits(read.tensors[name]) == bits(tensor)
    with pytest.raises(CheckpointError, match=r"lanes 0 to 3, lane 4 .*data\.lanes"):
        checkpoint.lane(4)


def test_what_was_read_outlives_the_checkpoint(tmp_path: Path, save_on_ranks: Any) -> None:
    path = save_on_ranks(tmp_path, 1)
    with Checkpoint(path) as checkpoint:
        random_state, memory = checkpoint.tensor("random"), checkpoint.lane(0).tensors["0.matrix"]
        before = bits(random_state), bits(memory)
    for file in path.iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    assert (bits(random_state), bits(memory)) == before


def test_the_files_are_safetensors_that_the_library_reads(
    tmp_path: Path, save_on_ranks: Any, tensors: Any
) -> None:
    path = save_on_ranks(tmp_path, 2, size=1)
    loaded = load_file(path / "rank-00000-of-00001.safetensors")
    assert loaded["lane.00003.count"].item() == 3
    flat = tensors(2)["random"]
    pieces = {key: value for key, value in loaded.items() if key.startswith("random[")}
    for key, value in pieces.items():
        start, end = map(int, key[len("random[") : -1].split(":"))
        assert bits(value) == bits(flat[start:end])
    assert sum(map(len, pieces.values())) == len(flat)


def test_a_name_or_dtype_or_shape_that_does_not_fit_is_reported(
    tmp_path: Path, save_on_ranks: Any
) -> None:
    checkpoint = Checkpoint(save_on_ranks(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"step-00000001 has no tensor 'layers\.9\.weight'"):
        checkpoint.read("layers.9.weight", 0, 1)
    with pytest.raises(CheckpointError, match=r"no tensor 'layers\.9\.weight'"):
        checkpoint.tensor("layers.9.weight")
    with pytest.raises(CheckpointError, match=r"counts is torch\.int64, expected torch\.float32"):
        checkpoint.tensor("counts", dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"random has shape \[501\], elements 500 to 502"):
        checkpoint.read("random", 500, 2)


def test_expect_names_what_is_missing_unexpected_and_of_another_shape(
    tmp_path: Path, save_on_ranks: Any
) -> None:
    checkpoint = Checkpoint(save_on_ranks(tmp_path, 1))
    names = checkpoint.names()
    checkpoint.expect(names)
    changed = {**names, "random": (502,), "new": (1,)}
    del changed["mask"]
    with pytest.raises(CheckpointError) as told:
        checkpoint.expect(changed)
    for part in ("new is missing", "mask is not expected", "random has shape [501], expected [502"):
        assert part in str(told.value)


@pytest.mark.parametrize("left", [[], ["step-00000007.writing"], ["step-00000007.trash", "notes"]])
def test_without_any_checkpoint_a_run_starts_from_scratch(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).mkdir()
    assert newest_good(tmp_path, SoloRanks()).path is None
    assert newest_good(tmp_path / "absent", SoloRanks()).path is None


def test_checkpoints_of_which_none_is_good_stop_the_run_with_every_reason(
    tmp_path: Path, save_on_ranks: Any, run_ranks: Any
) -> None:
    (save_on_ranks(tmp_path, 1) / "manifest.json").unlink()
    with (save_on_ranks(tmp_path, 2) / "rank-00001-of-00002.json").open("ab") as file:
        file.write(b"\n")
    errors = run_ranks(3, lambda ranks: newest_good(tmp_path, ranks))
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    told = str(errors[0])
    assert "none is good" in told
    assert "step-00000001: manifest.json is missing" in told
    assert "step-00000002: rank-00001-of-00002.json has" in told
    assert told.index("step-00000002:") < told.index("step-00000001:")


def test_a_checkpoint_of_a_newer_version_of_the_program_is_a_mistake_and_not_passed_over(
    tmp_path: Path, save_on_ranks: Any, run_ranks: Any
) -> None:
    save_on_ranks(tmp_path, 1)
    newer = save_on_ranks(tmp_path, 2)
    text = (
        (newer / "manifest.json").read_text().replace('"format_version": 1', '"format_version": 2')
    )
    (newer / "manifest.json").write_text(text)
    # As long as its checksum is another, it is no checkpoint at all.
    assert newest_good(tmp_path, SoloRanks()).path == tmp_path / "step-00000001"
    digest = hashlib.sha256(text.encode()).hexdigest()
    (newer / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
    errors = run_ranks(2, lambda ranks: newest_good(tmp_path, ranks))
    assert all(isinstance(error, SettingsError) for error in errors)
    assert [error.problems for error in errors] == 2 * [
        [
            f"{newer}: a newer version of this program wrote it (format 2; this one reads 1); "
            "update infini-pretrain, or move it away to continue from an older checkpoint"
        ]
    ]


def test_a_checkpoint_that_changed_after_it_was_verified_is_not_parsed(
    tmp_path: Path, save_on_ranks: Any
) -> None:
    path = save_on_ranks(tmp_path, 1)
    (path / "rank-00000-of-00002.json").write_text('{"pieces": [], "lanes": {}}')
    with pytest.raises(CheckpointError, match="changed after it was verified"):
        Checkpoint(path)


def test_a_checkpoint_that_training_deletes_while_it_is_read_is_named_with_what_to_do(
    tmp_path: Path, save_on_ranks: Any
) -> None:
    path = save_on_ranks(tmp_path, 1)
    with Checkpoint(path) as checkpoint:
        checkpoint.tensor("random")
        checkpoint.close()  # as an export does after each tensor
        shutil.rmtree(path)
        alone = rf"^{path}: was deleted while it was read, .*; have the run keep more \(checkpoint"
        with pytest.raises(CheckpointError, match=alone):
            checkpoint.tensor("random")
        newest = save_on_ranks(tmp_path, 3)
        with pytest.raises(CheckpointError, match=rf"; read {newest}, or have the run keep more"):
            checkpoint.tensor("random")
    with pytest.raises(CheckpointError, match="was deleted while it was read"):
        Checkpoint(path)


def test_where_training_deletes_what_is_verified_the_checkpoint_that_it_wrote_is_found(
    tmp_path: Path, save_on_ranks: Any
) -> None:
    first, newest = save_on_ranks(tmp_path / "run", 1), save_on_ranks(tmp_path / "written", 2)

    class Overtaken(SoloRanks):
        """Once it has listed the checkpoints, the run saves and prunes."""

        def sum(self, values: Sequence[float]) -> list[float]:
            if first.exists():
                shutil.rmtree(first)
                newest.rename(first.with_name(newest.name))
            return super().sum(values)

    found = newest_good(tmp_path / "run", Overtaken())
    assert found.path == first.with_name("step-00000002")
    assert found.passed_over == ((first.name, "was deleted while it was verified"),)
