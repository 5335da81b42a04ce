"""An error on one rank reaches all; run as a script it is one of two gloo ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.ranks import GroupRanks, Ranks, SoloRanks, agreed, of_first
from pretrain.jobs.launch import leave


def fail_on(*failing: int) -> Any:
    def work(ranks: Ranks) -> int:
        def action() -> int:
            if ranks.rank in failing:
                raise OSError(28, "No space left on device", "state.safetensors")
            return ranks.rank * 10

        return agreed(ranks, action)

    return work


def test_every_rank_gets_its_own_result_once_all_have_succeeded(run_ranks: Any) -> None:
    assert run_ranks(3, fail_on()) == [0, 10, 20]
    batch = object()
    assert agreed(SoloRanks(), lambda: batch) is batch


def test_an_error_on_one_rank_is_raised_on_all_in_the_same_words(run_ranks: Any) -> None:
    errors = run_ranks(3, fail_on(1))
    assert [type(error) for error in errors] == [CheckpointError] * 3
    told = {str(error) for error in errors}
    assert told == {"state.safetensors: No space left on device (rank 1)"}
    assert isinstance(errors[1].__cause__, OSError)


def test_what_all_ranks_say_is_said_once(run_ranks: Any) -> None:
    errors = run_ranks(2, fail_on(0, 1))
    assert {str(error) for error in errors} == {"state.safetensors: No space left on device"}
    errors = run_ranks(3, fail_on(0, 2))
    assert {str(error) for error in errors} == {
        "state.safetensors: No space left on device (rank 0, 2)"
    }


def test_every_rank_gets_what_the_first_one_alone_has_done(run_ranks: Any, tmp_path: Path) -> None:
    def work(ranks: Ranks) -> list[str]:
        return of_first(ranks, lambda: [f"by rank {ranks.rank}", str((tmp_path / "one").mkdir())])

    assert run_ranks(3, work) == [["by rank 0", "None"]] * 3
    errors = run_ranks(3, work)
    assert {str(error) for error in errors} == {f"{tmp_path}/one: File exists (rank 0)"}


def test_a_mistake_of_the_user_on_one_rank_is_that_mistake_on_all(run_ranks: Any) -> None:
    def work(ranks: Ranks) -> int:
        def action() -> int:
            if ranks.rank == 1:
                raise SettingsError(["wandb.mode: no key", "wandb.project: no name"])
            if ranks.rank == 2 and ranks.size == 4:
                raise OSError(28, "No space left on device", "metrics.jsonl")
            return 0

        return agreed(ranks, action)

    errors = run_ranks(3, work)
    assert [error.problems for error in errors] == [
        ["wandb.mode: no key", "wandb.project: no name"]
    ] * 3
    # The same may work later where the disk is not full.
    assert [type(error) for error in run_ranks(4, work)] == [CheckpointError] * 4


def test_a_bug_on_one_rank_is_no_hang_on_the_others_and_leaves_its_trace(
    run_ranks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def work(ranks: Ranks) -> float:
        return agreed(ranks, lambda: 1 / ranks.rank)

    errors = run_ranks(2, work)
    assert {str(error) for error in errors} == {"ZeroDivisionError('division by zero') (rank 0)"}
    (logged,) = caplog.records
    assert logged.exc_info is not None and logged.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize(
    ("failure", "text"),
    [(DataError("shard 3 is cut"), "shard 3 is cut"), (ValueError("3"), "ValueError('3')")],
)
def test_an_error_for_the_user_keeps_its_words_in_the_class_that_the_caller_names(
    failure: ValueError, text: str
) -> None:
    class OurError(ValueError):
        pass

    def action() -> None:
        raise failure

    with pytest.raises(OurError) as caught:
        agreed(SoloRanks(), action, OurError)
    assert str(caught.value) == text


@pytest.mark.timeout(120)
def test_a_process_group_gathers_json_of_any_length(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    outputs = [json.loads(rank.communicate()[0]) for rank in ranks]
    values: list[Any] = [[], {"rank": 1, "text": "ü" * 1000, "none": None, "list": [1.5, True]}]
    assert outputs == [[values, "nothing left (rank 1)", [1.5, 2.0**-60]]] * 2


def _gloo_rank(rank: int, store: str) -> None:
    import os

    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    ranks = GroupRanks()
    mine: Any = {"rank": 1, "text": "ü" * 1000, "none": None, "list": (1.5, True)} if rank else []
    gathered = ranks.gather(mine)

    def action() -> None:
        if ranks.rank == 1:
            raise CheckpointError("nothing left")

    try:
        agreed(ranks, action)
    except CheckpointError as error:
        print(json.dumps([gathered, str(error), ranks.sum([0.75, rank * 2.0**-60])]))
    ranks.gather(None)
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    _gloo_rank(int(sys.argv[1]), sys.argv[2])
