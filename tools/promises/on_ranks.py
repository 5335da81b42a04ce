"""Promises 6 and 12: layouts of ranks, and gradients that are not finite on one of them.

Run as a script, this is one rank: on_ranks.py ACTION JOB.json
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpoint.manifest import step_name
from pretrain.config.optim import OPTIMIZERS
from pretrain.jobs.launch import leave, place_in, start_ranks
from tools.promises import data_sets
from tools.promises.campaign import BrokenError, Promise, Room, check
from tools.promises.states import differences, stored

LANES, SHARDS = 12, 24  # for 1, 2, 3 and 4 ranks
SAVED, STEPS = 3, 6
POISONS = 10  # of a case
_WORDS = (f"data.lanes={LANES}", "model.n_heads=2", "model.n_kv_heads=1", "model.d_head=16")
_TOLERANCE = 1e-5  # relative, of losses

PROGRAM = __file__
"""What every rank runs."""

Job = dict[str, Any]


def work(action: str, ranks: int, job: Job, here: Path) -> list[Any]:
    """Run an action of this module on so many ranks; what each rank says."""
    path = here / f"{action}.json"
    path.write_text(json.dumps(job))
    command = [sys.executable, "-P", PROGRAM, action, str(path)]
    code = start_ranks(command, ranks)
    check(code == 0, f"{action} on {ranks} ranks ended with {code}")
    said = [here / f"{action}-{rank}.json" for rank in range(ranks)]
    return [json.loads(path.read_text()) for path in said]


def _data(room: Room) -> Path:
    make = lambda path: data_sets.small(path, seed=1, documents=480, count=SHARDS)  # noqa: E731
    return room.made("data", make)


# 6. Layouts.


def _train(job: Job) -> Any:
    """On a rank: load, store what was loaded elsewhere, go on, save."""
    from tools.promises.small_runs import SmallRun

    run = SmallRun(Path(job["directory"]), job["data"], job["words"])
    if "loaded" in job:
        run.save(Path(job["loaded"]))
    losses = run.take(job["before"])
    run.save()
    return losses


def _base(room: Room, data: Path) -> Path:
    """Two ranks of stage 3: a checkpoint of step SAVED and the losses that follow."""

    def make(path: Path) -> None:
        path.mkdir()
        job: Job = {"directory": str(path / "run"), "data": str(data), "words": [*_WORDS]}
        work("train", 2, {**job, "before": SAVED}, path)
        shutil.copytree(path / "run", path / "saved")
        (losses, _) = work("train", 2, {**job, "before": STEPS - SAVED}, path)
        (path / "losses.json").write_text(json.dumps(losses))

    return room.made("base", make)


def has_any_layout(seed: int, room: Room) -> dict[str, Any]:
    """A checkpoint of two ranks goes to another layout, which stores it again and goes on."""
    from pretrain.training import ledger

    layouts = [*itertools.product((1, 2, 3, 4), (0, 1, 2, 3), (1, 2, 3))]
    ranks, stage, micro_batch = random.Random(6).sample(layouts, len(layouts))[seed % len(layouts)]
    data = _data(room)
    base = _base(room, data)
    run = room.here / "run"
    shutil.copytree(base / "saved", run)
    words = [*_WORDS, f"zero.stage={stage}", f"train.micro_batch={micro_batch}"]
    job: Job = {
        "directory": str(run), "data": str(data), "words": words, "before": STEPS - SAVED,
        "loaded": str(room.here / "loaded"),
    }  # fmt: skip
    losses = work("train", ranks, job, room.here)[0]
    name = Path("checkpoints") / step_name(SAVED)
    wrong = differences(stored(base / "saved" / name), stored(room.here / "loaded" / name))
    check(not wrong, f"the state differs: {wrong}")
    expected = json.loads((base / "losses.json").read_text())
    for (loss, _), (wanted, _) in zip(losses, expected, strict=True):
        check(math.isclose(loss, wanted, rel_tol=_TOLERANCE), f"losses {losses}, not {expected}")
    problems = ledger.check(run)
    check(not problems, f"ledger: {problems}")
    return {"ranks": ranks, "stage": stage, "micro_batch": micro_batch, "ledgers": 1}


# 12. Gradients that are not finite.


def _poison(job: Job) -> Any:
    """On a rank: every second step is bad on one rank; what went wrong, and what each step did."""
    from tools.promises.small_runs import SmallRun

    run = SmallRun(Path(job["directory"]), job["data"], job["words"])
    rank, choose = run.run.ranks.rank, random.Random(job["seed"])
    plans = [_plan(choose) for _ in range(POISONS)]
    wrong: list[str] = []
    told: list[Any] = []
    run.take(1)
    for plan in plans:
        # A memory is read in lanes where no document starts; a weight's gradient always counts.
        before = _weights(run.state())
        hook = _bad_gradient(run, plan) if rank == plan["rank"] else None
        (result,) = run.results(1)
        if hook is not None:
            hook.remove()
        changed = differences(before, _weights(run.state()))
        if result.applied or changed:
            wrong.append(f"{plan}: applied {result.applied}, changed {changed[:3]}")
        (following,) = run.results(1)
        if not following.applied or not math.isfinite(following.loss):
            wrong.append(f"after {plan}: applied {following.applied}, loss {following.loss}")
        if not differences(before, _weights(run.state())):
            wrong.append(f"after {plan}: the weights stand still")
        told.append([result.applied, following.applied, following.loss])
    return {"wrong": wrong, "told": told}


def _plan(choose: random.Random) -> dict[str, Any]:
    return {
        "rank": choose.randrange(2),
        "value": choose.choice(["nan", "inf", "-inf"]),
        "parameter": choose.random(),
        "all": choose.random() < 0.3,
    }


def _bad_gradient(run: Any, plan: Mapping[str, Any]) -> Any:
    """Put the plan's value in the gradient of one parameter of this rank."""
    named = [p for p in run.run.engine.module.parameters() if p.requires_grad]
    parameter = named[int(plan["parameter"] * len(named))]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        spoiled = gradient.clone()
        spoiled.view(-1)[slice(None) if plan["all"] else slice(1)] = float(plan["value"])
        return spoiled

    return parameter.register_hook(spoil)


def _weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a step may change of weights and moments; memories go on."""
    return {name: t for name, t in state.items() if not name.startswith(("memory", "preface"))}


def keeps_bad_gradients_out(seed: int, room: Room) -> dict[str, Any]:
    """Ten bad steps of two ranks, each followed by a good one."""
    optimizers = [*OPTIMIZERS]
    stage, optimizer = seed % 4, optimizers[seed // 4 % len(optimizers)]
    words = [*_WORDS, f"zero.stage={stage}", f"optim.name={optimizer}", "train.max_skipped=50"]
    job: Job = {
        "directory": str(room.here / "run"), "data": str(_data(room)), "words": words, "seed": seed
    }  # fmt: skip
    said = work("poison", 2, job, room.here)
    wrong = [f"rank {rank}: {one}" for rank, told in enumerate(said) for one in told["wrong"]]
    check(not wrong, "; ".join(wrong[:5]))
    check(said[0]["told"] == said[1]["told"], "the ranks do not agree")
    return {"stage": stage, "optimizer": optimizer}


def be_a_rank(action: str, path: Path) -> None:
    """A rank's life; it never returns."""
    place = place_in(os.environ)
    if place is None:
        raise BrokenError("not a rank")
    dist.init_process_group(
        "gloo", init_method=place.init_method, rank=place.rank, world_size=place.size
    )
    said = {"train": _train, "poison": _poison}[action](json.loads(path.read_text()))
    (path.parent / f"{action}-{place.rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


PROMISES = (
    Promise(
        6, "layouts",
        "any number of ranks, ZeRO stage and micro-batch: the state bitwise, losses within 1e-5",
        20, "layouts", has_any_layout, limit=600.0,
        how="1 to 4 ranks, stages 0 to 3, micro-batches of 1 to 3 lanes; each takes the checkpoint "
        "of two ranks, stores it again at once, and goes on.",
    ),
    Promise(
        12, "gradients", "bad gradients never enter the weights; all ranks skip alike",
        20, "bad steps", keeps_bad_gradients_out, each=POISONS, limit=600.0,
        how="NaN or infinity in one element, or in all, of one parameter's gradient on one of two "
        "ranks, at each stage and with each optimizer; the next step must be applied.",
    ),
)  # fmt: skip


if __name__ == "__main__":
    be_a_rank(sys.argv[1], Path(sys.argv[2]))
