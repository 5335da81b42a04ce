"""What is decided about a job of several nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data_prep.dataset.settings import SettingsError
from pretrain.config.data import DataConfig
from pretrain.config.root import Config
from pretrain.config.run import LaunchConfig, ParallelConfig, RunConfig
from pretrain.config.training import TrainConfig
from pretrain.jobs.job import ranks_per_node


def config(lanes: int = 16, micro: int = 0, ranks: int = 0, device: str = "auto") -> Config:
    return Config(
        run=RunConfig("runs/a"),
        data=DataConfig("d", lanes=lanes),
        train=TrainConfig(micro_batch=micro),
        launch=LaunchConfig(device, ranks),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("ranks", "device", "gpus", "expected"),
    [(0, "auto", 8, 8), (4, "auto", 8, 4), (0, "cpu", 8, 1), (2, "cpu", 0, 2), (0, "auto", 0, 1)],
)
def test_a_node_has_a_rank_per_gpu_unless_the_configuration_says_how_many(
    ranks: int, device: str, gpus: int, expected: int
) -> None:
    assert ranks_per_node(config(ranks=ranks, device=device), "1-2", gpus) == expected


@pytest.mark.parametrize("nodes", ["0", "2-1", "1-", "-1", "1,2", "a", "", "1 ", "٣", "1-2-3"])
def test_nodes_are_a_number_or_a_range(nodes: str) -> None:
    with pytest.raises(SettingsError, match="is not a number N or a range N-M"):
        ranks_per_node(config(), nodes, 0)


def test_numbers_of_nodes_that_would_fit_are_reported() -> None:
    with pytest.raises(SettingsError) as caught:
        ranks_per_node(config(lanes=48, micro=2), "1-4", 8)
    # 48 lanes on 8, 16, 24 and 32 ranks: 6, 3, 2 and 1.5 lanes, in micro-batches of 2.
    assert caught.value.problems == [
        "nodes: 48 lanes (data.lanes) cannot be shared evenly by 2 or 4 nodes of 8 ranks in "
        "micro-batches of 2; choose 1, 3 nodes, or data.lanes a multiple of 192"
    ]
    assert ranks_per_node(config(lanes=192, micro=2), "1-4", 8) == 8


def test_nodes_that_cannot_be_cut_into_sequence_groups_are_reported() -> None:
    shared = replace(config(lanes=8), parallel=ParallelConfig(sequence=4))
    assert ranks_per_node(shared, "1-2", 8) == 8
    with pytest.raises(SettingsError) as caught:
        ranks_per_node(shared, "1-3", 2)
    # 2 ranks are half a group, 6 a group and a half.
    assert caught.value.problems == [
        "nodes: 8 lanes (data.lanes) cannot be shared evenly by 1 or 3 nodes of 2 ranks in groups "
        "of 4 (parallel.sequence); choose 2, 4, 8, 16 nodes"
    ]
    with pytest.raises(SettingsError) as caught:
        ranks_per_node(shared, "2-3", 4)
    assert caught.value.problems == [
        "nodes: 8 lanes (data.lanes) cannot be shared evenly by 3 nodes of 4 ranks in groups of 4 "
        "(parallel.sequence); choose 1, 2, 4, 8 nodes, or data.lanes a multiple of 6"
    ]


def test_devices_must_be_there() -> None:
    with pytest.raises(SettingsError, match=r"launch\.device: cuda, but the nodes have no GPUs"):
        ranks_per_node(config(device="cuda"), "1", 0)
    with pytest.raises(SettingsError, match=r"launch\.ranks: 8 ranks per node, but a node has 4"):
        ranks_per_node(config(ranks=8), "1", 4)
