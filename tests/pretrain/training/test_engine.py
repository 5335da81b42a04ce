"""Steps under every ZeRO stage, number of ranks and precision, against one another and plain torch.

The ranks are real processes of this file (`_rank`), which work through a list of jobs in one
process group: starting them is the long part. A job trains, or saves what it loaded, and leaves
its records and checkpoints to be compared here.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_prep.dataset.shards import Document
from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.load import Checkpoint
from pretrain.checkpoint.manifest import step_name
from pretrain.config.optim import OPTIMIZERS
from pretrain.config.root import Config, load
from pretrain.data.lanes import Dataset, Lane, Mix
from pretrain.data.loader import Batch
from pretrain.data.packing import IGNORE
from pretrain.jobs.launch import EXIT_STOPPED, StopFlag, leave, place_in
from pretrain.jobs.watchdog import Watchdog
from pretrain.model.memories.infini import MemoryState
from pretrain.model.transformer import Transformer
from pretrain.training import engine, ledger
from pretrain.training.engine import Engine, build_ops, deepspeed_settings
from pretrain.training.evaluator import Evaluator
from pretrain.training.metrics import configure_logging, read_records
from pretrain.training.run import Run
from pretrain.training.run_state import TrainingError
from pretrain.training.saver import Saver, reserved
from pretrain.training.step import StepResult
from pretrain.training.trainer import Trainer
from tests.pretrain import kinds
from tests.pretrain.training import naive_optimizers
from tests.ranks import work
from tools.promises.states import differences, stored

# Beside delta, the memory of most jobs, and linear, that of some.
KINDS = [kind for kind in kinds.REMEMBERING if kind not in ("delta", "linear")]
# Beside adamw, the optimizer of all other jobs.
OPTIMIZERS = [name for name in OPTIMIZERS if name != "adamw"]
# Two ranks train each from scratch at every stage, 1 and 3 ranks at these (ranks divide a flat
# group under both 1 and 2), and at stage 3 as they continue what two ranks saved.
STAGES = {1: (2,), 3: (0, 1)}
VOCABULARY = 48
LANES = 12  # divisible by 1, 2, 3 and 4 ranks
STEPS = 8
SAVED = 4  # the step from which other ranks and stages go on
SETTINGS = (
    f"data.lanes={LANES}",
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",  # so that a gate has fewer elements than there are ranks
    "model.n_kv_heads=1",
    "model.d_head=16",
    "model.d_ff=48",
    "model.segment=8",
    "model.init_std=0.1",
    f"train.steps={STEPS}",
    "train.window_segments=4",
    "train.log_every=1",
    "train.clip_norm=0.5",
    "optim.lr=0.01",
    "optim.warmup_steps=3",
    f"checkpoint.every={SAVED}",
    "launch.device=cpu",
    "wandb.mode=disabled",
)
WEIGHTED = ("data.prompt_weight=0.1", f"train.validate_every={STEPS}", "train.validation_windows=2")
# What long runs are protected by. Some steps lie above the bounds of the two before.
LONG = ("optim.ema_decay=0.5", "optim.lr=0.06", "train.z_loss=0.02", "train.max_skipped=99",
        "train.spikes.deviations=0.05", "train.spikes.steps=2")  # fmt: skip
Job = dict[str, Any]


# What runs on the ranks.


def _rank(jobs: Path) -> None:
    place = place_in(os.environ)
    assert place is not None
    stop = StopFlag()
    dist.init_process_group(
        "gloo", init_method=place.init_method, rank=place.rank, world_size=place.size
    )
    limits = {"start": 3600, "step": 3600, "save": 3600}  # of all jobs together
    watchdog = Watchdog(jobs.parent, place.rank, limits)
    for job in json.loads(jobs.read_text()):
        config = load(None, job["settings"])
        directory = Path(config.run.directory)
        if place.rank == 0 and "start_from" in job:
            name = step_name(SAVED)
            shutil.copytree(
                Path(job["start_from"]) / "checkpoints" / name, directory / "checkpoints" / name
            )
        directory.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        configure_logging(place.rank, directory)
        run = Run(config, Attempt(directory, 1), torch.device("cpu"))
        copy = reserved(run.engine, run.share.owned, run.state)
        (directory / f"host-copy-{place.rank}").write_text(str(copy.bytes))
        if job["action"] == "train":
            assert _trainer(run, watchdog).train(stop) == 0
        elif job["action"] == "give up":
            try:
                _trainer(run, watchdog).train(stop)
            except TrainingError as error:
                (directory / f"error-{place.rank}").write_text(str(error))
        elif job["action"] == "one step":
            stop.signal = signal.SIGTERM
            assert _trainer(run, watchdog).train(stop) == EXIT_STOPPED
            stop.signal = None
        elif job["action"] == "save":
            Saver(
                run.engine, run.share.owned, copy, Attempt(Path(job["to"]), 1), config.checkpoint,
                run.described, run.ranks, lambda step: None, lambda step: None, None,
            ).save(run.state, finish=True)  # fmt: skip
        elif job["action"] == "go back":
            # One step more, and back to where the checkpoint was.
            with run.data.loader(run.share.lanes, run.state) as loader:
                _step(run, next(loader))
            run.state = run.resumer.resume_or_start(run.attempt)
            assert _trainer(run, watchdog).train(stop) == 0
        else:
            torch.save(_poisoned(run), directory / f"rank-{place.rank}.pt")
    (jobs.parent / f"imported-{place.size}").write_text("\n".join(sys.modules))
    dist.destroy_process_group()
    leave(0)


def _step(run: Run, batch: Batch) -> StepResult:
    (weight,) = run.ranks.sum([run.stepper.own_weight(batch)])
    run.state, result = run.stepper.step(run.state, batch, weight)
    return result


def _trainer(run: Run, watchdog: Watchdog) -> Trainer:
    directory = Path(run.config.run.directory)
    return Trainer(run, watchdog, Evaluator(run.config, run.engine, run.ranks, directory))


def _poisoned(run: Run) -> Job:
    """Three steps; before the second, one memory of rank 1 becomes NaN."""
    told: Job = {}
    with run.data.loader(run.share.lanes, run.state) as loader:
        _step(run, next(loader))
        told["before"] = _own_state(run.engine)
        batch = next(loader)
        # A lane that reads its memory: no document starts in its window.
        told["lane"] = int((~batch.starts.any(dim=1)).nonzero()[0])
        if run.ranks.rank == 1:
            run.state.memory[0].matrix[told["lane"], 0, 0, 0] = math.nan
        result = _step(run, batch)
        told["skipped"] = (result.applied, result.grad_norm, run.state.skipped_in_a_row)
        told["after"] = _own_state(run.engine)
        told["memory"] = [tensor.clone() for layer in run.state.memory for tensor in layer]
        result = _step(run, next(loader))
        told["next"] = (result.applied, result.loss, run.state.skipped_in_a_row)
        told["skips"] = run.state.skipped
        told["end"] = _own_state(run.engine)
    return told


def _own_state(engine: Engine) -> dict[str, torch.Tensor]:
    """This rank's masters and moments, AdamW's count, and what the forward reads."""
    state = {f"{p.name}@{p.offset}": p.values.clone() for p in engine.pieces()}
    state["steps"] = torch.tensor(engine.optimizer_steps)
    for name, parameter in engine.module.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)
        state[f"forward {name}"] = held.detach().clone()
    return state


# What is started and compared here.


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Any]) -> Path:
    """Long documents in every second shard, and one-token documents, without a target, between."""
    directory = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    documents = []
    for shard in range(2 * LANES):
        sizes = [1] * 58 + [2, 3] if shard % 2 else rng.integers(20, 200, size=60)
        documents += [rng.integers(0, VOCABULARY, size=int(size)) for size in sizes]
    write_data_set(directory, documents, 2 * LANES, VOCABULARY, bos_id=None, eos_id=None)
    return directory


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Any]) -> Path:
    """Up to three prompts and answers of unequal lengths; some shards hold plain documents."""
    directory = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(1)
    documents = []
    for number in range(40 * LANES):
        tokens = rng.integers(3, VOCABULARY, size=int(rng.integers(2, 70)))
        count = 0 if number % 80 < 10 else (1, 3, 5)[number % 3]
        turns = tuple(sorted(rng.integers(1, len(tokens), size=count).tolist()))
        documents.append(Document(f"pair {number}", "test", 1, tokens, turns))
    write_data_set(directory, documents, 2 * LANES, VOCABULARY)
    return directory


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Any]) -> Path:
    """Documents of three and a half windows, of which the last two tokens are the answer."""
    directory = tmp_path_factory.mktemp("prompts")
    rng = np.random.default_rng(2)
    documents = [
        Document(f"prompt {number}", "test", 1, rng.integers(3, VOCABULARY, size=110), (108,))
        for number in range(8 * LANES)
    ]
    write_data_set(directory, documents, LANES, VOCABULARY)
    return directory


class Bench:
    """Starts ranks on jobs, and knows where their results lie."""

    def __init__(self, root: Path, corpus: Path, pairs: Path, prompts: Path) -> None:
        self.root, self.corpus, self.pairs, self.prompts = root, corpus, pairs, prompts

    def job(self, name: str, *settings: str, action: str = "train", **more: str) -> Job:
        words = [*SETTINGS, f"data.train={self.corpus}", f"run.directory={self.root / name}"]
        paths = {key: str(self.root / value) for key, value in more.items()}
        return {"action": action, "settings": [*words, *settings], **paths}

    def of_kind(self, kind: str) -> list[str]:
        """Settings of a run with a memory of this kind, with prefaces, biases and norms."""
        more = ("model.qkv_bias=true", "model.qk_norm=true")
        return [*kinds.words(kind), *more, f"data.preface={self.pairs}"]

    def of_optimizer(self, name: str) -> list[Job]:
        """On two ranks: each stage, resumed, from stage to stage, in bf16, one step, a bad one."""
        own = f"optim.name={name}"
        bf16 = ("train.precision=bf16", "zero.stage=1", f"train.steps={SAVED + 1}")
        begun = ("train.steps=1", "optim.schedule=wsd", "optim.warmup_steps=0",
                 "optim.decay_steps=0", "optim.weight_decay=0")  # fmt: skip
        return [
            self.job(name, own),
            *(self.job(f"{name}-{stage}", own, f"zero.stage={stage}") for stage in (0, 1, 2)),
            self.job(f"{name}-on", own, start_from=name),
            self.job(f"{name}-a", own, "zero.stage=1", action="save", start_from=name,
                     to=f"{name}-b"),
            self.job(f"{name}-b", own, "zero.stage=0", action="save", to=f"{name}-c"),
            self.job(f"{name}-c", own, "zero.stage=2", action="save", to=f"{name}-d"),
            self.job(f"{name}-d", own, "zero.stage=2"),
            self.job(f"{name}-bf16", own, *bf16),
            self.job(f"{name}-bf16-on", own, *bf16, start_from=f"{name}-bf16"),
            *(self.job(f"{name}-one-{stage}", own, *begun, f"zero.stage={stage}")
              for stage in range(4)),
            *(self.job(f"{name}-bad-{stage}", own, f"zero.stage={stage}", action="poison",
                       start_from=name) for stage in (0, 3)),
        ]  # fmt: skip

    def long_runs(self) -> list[Job]:
        """On two ranks: each stage, shared windows, resumed, from stage to stage, in bf16."""
        bf16 = ("train.precision=bf16", "zero.stage=1")
        validated = (f"data.validation={self.corpus}", f"train.validate_every={STEPS}",
                     "train.validation_windows=2", "train.validate_ema=true")  # fmt: skip
        return [
            self.job("long", *LONG, *validated),
            self.job("long-2", *LONG, *validated, "zero.stage=2", "train.micro_batch=2"),
            self.job("long-1", *LONG, *validated, "zero.stage=1", "parallel.sequence=2"),
            self.job("long-0", *LONG, *validated, "zero.stage=0"),
            self.job("long-on", *LONG, start_from="long"),
            self.job("long-a", *LONG, "zero.stage=1", action="save", start_from="long",
                     to="long-b"),
            self.job("long-b", *LONG, "zero.stage=0", action="save", to="long-c"),
            self.job("long-c", *LONG, "zero.stage=2", action="save", to="long-d"),
            self.job("long-d", *LONG, "zero.stage=2"),
            self.job("long-bf16", *LONG, *bf16),
            self.job("long-bf16-on", *LONG, *bf16, start_from="long-bf16"),
            self.job("long-end", *LONG, "train.max_skipped=1", action="give up"),
        ]  # fmt: skip

    def work(self, ranks: int, *jobs: Job) -> None:
        path = self.root / f"jobs-{ranks}.json"
        path.write_text(json.dumps(jobs))
        work(__file__, ranks, path)

    def curve(self, name: str) -> dict[int, tuple[float, float]]:
        """Loss and gradient norm of each step in which a target has a weight."""
        measured = [line for line in self.records(name, "train") if "loss" in line]
        return {line["step"]: (line["loss"], line["grad_norm"]) for line in measured}

    def records(self, name: str, kind: str) -> list[dict[str, Any]]:
        records = read_records(self.root / name / "metrics.jsonl")
        return [line for line in records if line["kind"] == kind]

    def state(self, name: str, step: int) -> dict[str, Any]:
        return stored(self.root / name / "checkpoints" / step_name(step))


def assert_near(
    curve: dict[int, tuple[float, float]],
    expected: dict[int, tuple[float, float]],
    tolerance: float = 1e-5,
) -> None:
    """Losses and gradient norms agree, relative to their size."""
    assert curve
    for step, values in curve.items():
        assert values == pytest.approx(expected[step], rel=tolerance), f"step {step}"


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, pairs: Path, prompts: Path
) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), corpus, pairs, prompts)


@pytest.fixture(scope="module")
def two_ranks(bench: Bench) -> Bench:
    """What two ranks did; every other test compares with their `base`, ZeRO-3 in float32."""
    bf16, stage_2 = "train.precision=bf16", "zero.stage=2"
    shared = "parallel.sequence=2"
    validated = (
        f"data.validation={bench.corpus}",
        "train.validate_every=4",
        "train.validation_windows=2",
    )
    weighted = (f"data.train={bench.pairs}", f"data.validation={bench.pairs}", *WEIGHTED)
    jobs = [
        bench.job("base"),
        *(bench.job(f"stage-{stage}", f"zero.stage={stage}") for stage in (2, 1, 0)),
        bench.job("micro-batch", "train.micro_batch=2"),
        bench.job("recomputed", "train.micro_batch=3", "train.activation_checkpointing=full"),
        bench.job("recomputed-whole", "train.activation_checkpointing=full", "zero.stage=0"),
        # Of what is compared with a run under ZeRO-3, by its numbers or by its bits, the other is
        # of a lower stage, whose steps take a third of the time.
        bench.job("linear", "model.memory.kind=linear", "zero.stage=0"),
        *(bench.job(kind, *bench.of_kind(kind), "zero.stage=1") for kind in KINDS),
        bench.job("weighted", *weighted, "train.micro_batch=3", stage_2),
        bench.job("weighted-on", *weighted, "train.micro_batch=3", stage_2, start_from="weighted"),
        bench.job("weighted-shared", *weighted, shared),
        bench.job("read", f"data.train={bench.prompts}"),
        bench.job("read-parts", f"data.train={bench.prompts}", "train.micro_batch=2"),
        bench.job("read-0", f"data.train={bench.prompts}", "zero.stage=0", start_from="read"),
        bench.job("linear-shared", "model.memory.kind=linear", shared),
        bench.job("validated", *validated, "zero.stage=0"),
        bench.job("shared", shared, "train.micro_batch=3", *validated),
        bench.job("shared-on", shared, "train.micro_batch=3", *validated, start_from="shared"),
        bench.job(
            "shared-recomputed", shared, "train.activation_checkpointing=full", "zero.stage=2"
        ),
        bench.job("elastic", action="one step"),
        bench.job("elastic", shared, action="one step"),
        # 3 -> 1 -> 0 -> 2, stored again at each stop, and on from there.
        bench.job("from-3", "zero.stage=1", action="save", start_from="base", to="from-1"),
        bench.job("from-1", "zero.stage=0", action="save", to="from-0"),
        bench.job("from-0", "zero.stage=2", action="save", to="from-2"),
        bench.job("from-2", "zero.stage=2"),
        bench.job("back-3", action="go back", start_from="base"),
        bench.job("back-1", "zero.stage=1", action="go back", start_from="base"),
        bench.job("bf16", bf16),
        bench.job("bf16-on", bf16, start_from="bf16"),
        bench.job("bf16-2", bf16, stage_2),
        bench.job("bf16-3", bf16, stage_2, action="save", start_from="bf16", to="bf16-at-2"),
        bench.job("bf16-at-2", bf16, stage_2),
        *(
            bench.job(f"bad-{n}", f"zero.stage={n}", action="poison", start_from="base")
            for n in (3, 1, 0)
        ),
        *(job for name in OPTIMIZERS for job in bench.of_optimizer(name)),
        *bench.long_runs(),
        bench.job(
            "gates", "train.steps=1", "optim.schedule=wsd", "optim.warmup_steps=0",
            "optim.decay_steps=0", "optim.gate_lr=0.03", "model.memory.initial_gate=1.0",
            "zero.stage=1",
        ),
    ]  # fmt: skip
    bench.work(2, *jobs)
    return bench


# Plain torch.


def reference(
    config: Config,
    corpus: Path,
    steps: int,
    skip: Callable[[float, float], bool] | None = None,
    after: Callable[[Transformer], None] = lambda model: None,
) -> tuple[dict[int, tuple[float, float]], Any]:
    """One process, one batch of all lanes, a naive optimizer, torch's clipping, the schedule.

    Returns the loss and gradient norm of each step, and the model. `skip` says of these two whether
    the step is left out, `after` sees the model after each that was not.
    """
    mix = Mix([Dataset(corpus)], prompt_weight=config.data.prompt_weight)
    lanes = [Lane(mix, g, LANES, config.run.seed) for g in range(LANES)]
    torch.manual_seed(config.run.seed)
    model = Transformer(config.model, VOCABULARY)
    named = dict(model.named_parameters())
    update = naive_optimizers.stepper(named, config.optim, config.optim.peak)
    state = model.initial_state(LANES, "cpu")
    curve = {}
    for step in range(1, steps + 1):
        windows = [lane.window(config.window) for lane in lanes]
        tokens, targets, starts = (
            torch.from_numpy(np.stack(x)) for x in list(zip(*windows, strict=True))[:3]
        )
        weights = torch.tensor(
            np.stack(
                [np.where(t == IGNORE, 0.0, 1.0 if w is None else w) for _, t, _, w in windows]
            )
        )
        output = model(tokens, starts, state)
        state = tuple(MemoryState(*(t.detach() for t in layer)) for layer in output.state)
        losses = F.cross_entropy(output.logits.mT, targets, reduction="none")
        if not weights.any():
            curve[step] = (0.0, 0.0)
            continue
        loss = (losses.double() * weights).sum() / weights.sum()
        squares = output.logits.exp().sum(dim=-1).log().double().square() * weights
        model.zero_grad()
        (loss + config.train.z_loss * squares.sum() / weights.sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3)))
        rate = step / 3 if step <= 3 else 0.1 + 0.9 * cosine
        curve[step] = (loss.item(), norm.item())
        if skip is None or not skip(*curve[step]):
            update(rate)
            after(model)
    return curve, model


def test_lanes_of_very_unequal_targets_train_as_one_batch_in_plain_torch(two_ranks: Bench) -> None:
    config = load(None, two_ranks.job("base")["settings"])
    lanes = [
        Lane(Mix([Dataset(two_ranks.corpus)]), g, LANES, config.run.seed) for g in range(LANES)
    ]
    counts = [int((lane.window(config.window)[1] != IGNORE).sum()) for lane in lanes]
    assert min(counts) <= 2 and max(counts) >= 30, "the lanes should differ greatly"

    curve, model = reference(config, two_ranks.corpus, STEPS)
    assert any(norm > 0.5 for _, norm in curve.values()), "clipping should take part"
    assert_near(two_ranks.curve("base"), curve)
    final = two_ranks.state("base", STEPS)
    for name, parameter in model.named_parameters():
        # Where a gradient is near 0, AdamW's first steps turn rounding into a part of the rate.
        torch.testing.assert_close(final[f"{name}/param"], parameter.detach(), atol=2e-5, rtol=0)


def test_weighted_losses_train_as_one_batch_in_plain_torch(two_ranks: Bench) -> None:
    config = load(
        None, two_ranks.job("weighted", f"data.validation={two_ranks.pairs}", *WEIGHTED)["settings"]
    )
    curve, _ = reference(config, two_ranks.pairs, STEPS)
    assert_near(two_ranks.curve("weighted"), curve)
    assert_near(two_ranks.curve("weighted-shared"), curve)
    # Validation over the same lanes from their start: of two windows, weighted over both.
    (found,) = two_ranks.records("weighted", "validation")
    (shared,) = two_ranks.records("weighted-shared", "validation")
    assert shared["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_windows_without_any_weight_go_through_the_memory_and_move_no_weight(
    two_ranks: Bench,
) -> None:
    config = load(None, two_ranks.job("read", f"data.train={two_ranks.prompts}")["settings"])
    curve, model = reference(config, two_ranks.prompts, STEPS)
    curve = {step: values for step, values in curve.items() if values != (0.0, 0.0)}
    assert list(curve) == [4, 7]
    for name in ("read", "read-parts"):
        assert len(two_ranks.records(name, "train")) == STEPS
        assert_near(two_ranks.curve(name), curve)
    # The answer at step 7 stands on the memory of windows before and behind the checkpoint.
    assert_near(two_ranks.curve("read-0"), {7: curve[7]})
    final = two_ranks.state("read", STEPS)
    assert final["trainer optimizer_steps"] == 2
    for name, parameter in model.named_parameters():
        # As above; with two steps more of it is left.
        torch.testing.assert_close(final[f"{name}/param"], parameter.detach(), atol=5e-4, rtol=0)


def test_a_resume_of_weighted_losses_is_exact_to_the_bit(two_ranks: Bench) -> None:
    resumed, whole = two_ranks.curve("weighted-on"), two_ranks.curve("weighted")
    assert resumed == {step: whole[step] for step in range(SAVED + 1, STEPS + 1)}
    end = two_ranks.state("weighted", STEPS)
    assert differences(two_ranks.state("weighted-on", STEPS), end) == []


@pytest.mark.parametrize(
    "name", ["stage-2", "stage-1", "stage-0", "micro-batch", "recomputed", "recomputed-whole"]
)
def test_losses_are_the_same_for_every_stage_micro_batch_and_checkpointing(
    two_ranks: Bench, name: str
) -> None:
    assert list(two_ranks.curve(name)) == list(range(1, STEPS + 1))
    assert_near(two_ranks.curve(name), two_ranks.curve("base"))


@pytest.fixture(scope="module", params=[1, 3, 4])
def other_ranks(request: pytest.FixtureRequest, two_ranks: Bench) -> tuple[Bench, int]:
    """What another number of ranks did from scratch, and with the two ranks' checkpoint."""
    ranks, bench = request.param, two_ranks
    jobs = [
        bench.job(f"scratch-{ranks}"),
        bench.job(
            f"weighted-{ranks}",
            *(f"data.train={bench.pairs}", "data.prompt_weight=0.1", "zero.stage=1"),
        ),
        bench.job(f"load-{ranks}", action="save", start_from="base", to=f"on-{ranks}"),
        bench.job(f"on-{ranks}"),
    ]
    for kind in KINDS:
        own, on = bench.of_kind(kind), f"{kind}-on-{ranks}"
        jobs += [
            bench.job(
                f"{kind}-{ranks}", *own, "zero.stage=1", action="save", start_from=kind, to=on
            ),
            *([bench.job(on, *own)] if ranks == 3 else []),
        ]
    for name in OPTIMIZERS if ranks != 4 else ():
        own, on = f"optim.name={name}", f"{name}-on-{ranks}"
        jobs += [
            *(bench.job(f"{name}-{ranks}-{n}", own, f"zero.stage={n}") for n in STAGES[ranks]),
            bench.job(f"{name}-load-{ranks}", own, action="save", start_from=name, to=on),
            bench.job(on, own),
        ]
    if ranks != 4:
        jobs += [
            bench.job(f"long-{ranks}-ranks", *LONG, "zero.stage=1"),
            bench.job(f"long-load-{ranks}", *LONG, action="save", start_from="long",
                      to=f"long-on-{ranks}"),
            bench.job(f"long-on-{ranks}", *LONG),
        ]  # fmt: skip
    if ranks == 4:
        jobs += [
            bench.job("elastic", "parallel.sequence=4", action="one step"),
            bench.job("elastic", "parallel.sequence=2", "train.micro_batch=3", action="one step"),
            bench.job("elastic", "parallel.sequence=4"),
        ]
    bench.work(ranks, *jobs)
    return bench, ranks


def test_a_checkpoint_of_two_ranks_is_the_same_after_any_number_of_ranks_took_it(
    other_ranks: tuple[Bench, int],
) -> None:
    bench, ranks = other_ranks
    with Checkpoint(bench.root / f"on-{ranks}" / "checkpoints" / step_name(SAVED)) as checkpoint:
        assert checkpoint.ranks == ranks
    base = bench.state("base", SAVED)
    assert base["trainer optimizer_steps"] == SAVED
    assert differences(bench.state(f"on-{ranks}", SAVED), base) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_every_memory_goes_to_any_number_of_ranks_to_the_bit(
    other_ranks: tuple[Bench, int], kind: str
) -> None:
    bench, ranks = other_ranks
    base, on = bench.state(kind, SAVED), f"{kind}-on-{ranks}"
    flags = [value for name, value in base.items() if name.endswith("held")]
    assert any(bool(value.any()) for value in flags)
    assert differences(bench.state(on, SAVED), base) == []
    if ranks == 3:
        assert list(bench.curve(on)) == list(range(SAVED + 1, STEPS + 1))
        assert_near(bench.curve(on), bench.curve(kind))


def test_losses_that_follow_are_those_of_two_ranks(other_ranks: tuple[Bench, int]) -> None:
    bench, ranks = other_ranks
    assert list(bench.curve(f"on-{ranks}")) == list(range(SAVED + 1, STEPS + 1))
    assert_near(bench.curve(f"on-{ranks}"), bench.curve("base"))


def test_a_rank_imports_neither_torchs_compiler_nor_triton(other_ranks: tuple[Bench, int]) -> None:
    bench, ranks = other_ranks
    imported = (bench.root / f"imported-{ranks}").read_text().split()
    assert "deepspeed" in imported
    assert not {"torch._dynamo", "triton"} & set(imported)


def test_losses_from_scratch_are_the_same_for_any_number_of_ranks(
    other_ranks: tuple[Bench, int],
) -> None:
    bench, ranks = other_ranks
    assert_near(bench.curve(f"scratch-{ranks}"), bench.curve("base"))
    assert_near(bench.curve(f"weighted-{ranks}"), bench.curve("weighted"))
    # Data and memory places too, up to the last window.
    end, base = bench.state(f"scratch-{ranks}", STEPS), bench.state("base", STEPS)
    for lane in range(LANES):
        assert end[f"lane {lane} place"] == base[f"lane {lane} place"]


# Windows that ranks share.


@pytest.mark.parametrize(
    ("name", "base"),
    [("shared", "base"), ("shared-recomputed", "base"), ("linear-shared", "linear")],
)
def test_losses_are_the_same_where_ranks_share_windows(
    two_ranks: Bench, name: str, base: str
) -> None:
    assert list(two_ranks.curve(name)) == list(range(1, STEPS + 1))
    assert_near(two_ranks.curve(name), two_ranks.curve(base))
    one, other = two_ranks.records(name, "train"), two_ranks.records(base, "train")
    for record, expected in zip(one, other, strict=True):
        assert record["epochs"] == expected["epochs"]
        assert record["memory_norm"] == pytest.approx(expected["memory_norm"], rel=1e-4)


def test_validation_losses_are_the_same_where_ranks_share_windows(two_ranks: Bench) -> None:
    shared, expected = (
        {line["step"]: line["loss"] for line in two_ranks.records(name, "validation")}
        for name in ("shared", "validated")
    )
    assert list(expected) == [4, 8]
    assert shared == pytest.approx(expected, rel=1e-5)


def test_a_resume_with_shared_windows_is_exact_to_the_bit(two_ranks: Bench) -> None:
    resumed, whole = two_ranks.curve("shared-on"), two_ranks.curve("shared")
    assert resumed == {step: whole[step] for step in range(SAVED + 1, STEPS + 1)}
    assert differences(two_ranks.state("shared-on", STEPS), two_ranks.state("shared", STEPS)) == []


@pytest.mark.parametrize("other_ranks", [4], indirect=True)
def test_a_run_continues_however_many_ranks_share_a_window(other_ranks: tuple[Bench, int]) -> None:
    """1 of 2 ranks, then 2 of 2, 4 of 4, 2 of 4, and 4 of 4."""
    bench, _ = other_ranks
    assert list(bench.curve("elastic")) == list(range(1, STEPS + 1))
    assert_near(bench.curve("elastic"), bench.curve("base"))
    assert ledger.check(bench.root / "elastic") == []
    end, base = bench.state("elastic", STEPS), bench.state("base", STEPS)
    for lane in range(LANES):
        assert end[f"lane {lane} place"] == base[f"lane {lane} place"]


def test_a_checkpoint_goes_from_stage_3_to_1_to_0_to_2_unchanged(two_ranks: Bench) -> None:
    base = two_ranks.state("base", SAVED)
    for name in ("from-1", "from-0", "from-2"):
        assert differences(two_ranks.state(name, SAVED), base) == [], name
    assert list(two_ranks.curve("from-2")) == list(range(SAVED + 1, STEPS + 1))
    assert_near(two_ranks.curve("from-2"), two_ranks.curve("base"))


@pytest.mark.parametrize(("name", "trained"), [("back-3", "base"), ("back-1", "stage-1")])
def test_an_engine_that_has_stepped_goes_back_to_a_checkpoint_whole(
    two_ranks: Bench, name: str, trained: str
) -> None:
    tolerance = 0.0 if name == "back-3" else 1e-5  # stage 1 starts from what stage 3 saved
    assert list(two_ranks.curve(name)) == list(range(SAVED + 1, STEPS + 1))
    assert_near(two_ranks.curve(name), two_ranks.curve(trained), tolerance)


def test_bf16_resumes_to_the_bit(two_ranks: Bench) -> None:
    resumed, base = two_ranks.curve("bf16-on"), two_ranks.curve("bf16")
    assert resumed == {step: base[step] for step in range(SAVED + 1, STEPS + 1)}
    end = two_ranks.state("bf16-on", STEPS)
    assert differences(end, two_ranks.state("bf16", STEPS)) == []
    assert end["embedding.weight/param"].dtype == torch.float32


def test_bf16_goes_from_stage_3_to_2_unchanged(two_ranks: Bench) -> None:
    assert differences(two_ranks.state("bf16-at-2", SAVED), two_ranks.state("bf16", SAVED)) == []
    # In bf16 the stages round their gradients differently, resumed or not: the step that follows
    # has the very weights, later ones differ by bf16's rounding.
    followed, base = two_ranks.curve("bf16-at-2"), two_ranks.curve("bf16")
    assert followed[SAVED + 1][0] == pytest.approx(base[SAVED + 1][0], rel=1e-5)
    assert_near(followed, base, tolerance=1e-2)
    assert_near(two_ranks.curve("bf16-2"), base, tolerance=1e-2)


@pytest.mark.parametrize(
    ("name", "own"),
    [("base", "train.precision=float32"), ("bf16", "train.precision=bf16")]
    + [(name, f"optim.name={name}") for name in OPTIMIZERS],
)
def test_a_rank_copies_as_much_to_host_memory_as_was_planned(
    two_ranks: Bench, name: str, own: str
) -> None:
    from pretrain.planning import plan  # it imports torch's compiler, which ranks do without

    config = load(None, two_ranks.job(name, own)["settings"])
    planned = plan.make(config, VOCABULARY, plan.cluster("h100", 1, 2, 0.4), False).host_copy
    tensors = 3 * len(two_ranks.state(name, STEPS)) + 2 * 2 * LANES
    for rank in (0, 1):
        copied = int((two_ranks.root / name / f"host-copy-{rank}").read_text())
        # What does not divide evenly is padding in the plan; a tensor starts at a multiple of 64.
        assert abs(copied - planned) < 64 * tensors
        assert planned > 64 * tensors


# Other optimizers.


def assert_trained_as(bench: Bench, run: str, name: str) -> None:
    """The run's losses, gradient norms and final weights are those of the naive optimizer."""
    config = load(None, bench.job(name, f"optim.name={name}")["settings"])
    curve, model = reference(config, bench.corpus, STEPS)
    assert list(bench.curve(run)) == list(range(1, STEPS + 1))
    assert_near(bench.curve(run), curve, tolerance=5e-5)
    final = bench.state(run, STEPS)
    for parameter, value in model.named_parameters():
        torch.testing.assert_close(final[f"{parameter}/param"], value.detach(), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stage", range(4))
def test_an_optimizer_steps_whole_matrices_at_every_stage(
    two_ranks: Bench, name: str, stage: int
) -> None:
    assert_trained_as(two_ranks, name if stage == 3 else f"{name}-{stage}", name)


@pytest.mark.parametrize("other_ranks", [1, 3], indirect=True)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_the_same_on_other_ranks_and_goes_on_there(
    other_ranks: tuple[Bench, int], name: str
) -> None:
    bench, ranks = other_ranks
    for stage in STAGES[ranks]:
        assert_trained_as(bench, f"{name}-{ranks}-{stage}", name)
    on = f"{name}-on-{ranks}"
    assert differences(bench.state(on, SAVED), bench.state(name, SAVED)) == []
    assert list(bench.curve(on)) == list(range(SAVED + 1, STEPS + 1))
    assert_near(bench.curve(on), bench.curve(name), tolerance=5e-5)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *(f"{name}-bf16" for name in OPTIMIZERS)])
def test_a_resume_of_an_optimizer_is_exact_to_the_bit(two_ranks: Bench, name: str) -> None:
    resumed, whole = two_ranks.curve(f"{name}-on"), two_ranks.curve(name)
    last = max(whole)
    assert last == (SAVED + 1 if "bf16" in name else STEPS)
    assert resumed == {step: whole[step] for step in range(SAVED + 1, last + 1)}
    end = two_ranks.state(f"{name}-on", last)
    assert differences(end, two_ranks.state(name, last)) == []
    assert {value.dtype for key, value in end.items() if key.startswith("layers.0.")} == {
        torch.float32
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_states_of_an_optimizer_go_from_stage_to_stage_unchanged(
    two_ranks: Bench, name: str
) -> None:
    for stop in "bcd":
        there = two_ranks.state(f"{name}-{stop}", SAVED)
        assert differences(there, two_ranks.state(name, SAVED)) == [], stop
    assert_near(two_ranks.curve(f"{name}-d"), two_ranks.curve(name), tolerance=5e-5)


def test_adafactor_keeps_a_row_and_a_column_of_matrices_and_no_moments(two_ranks: Bench) -> None:
    state = two_ranks.state("adafactor", STEPS)
    weight = "layers.0.feed_forward.up_proj"
    assert state[f"{weight}/row"].shape == (48,) and state[f"{weight}/column"].shape == (32,)
    kinds = {key.split("/")[1] for key in state if key.startswith(weight)}
    assert kinds == {"param", "row", "column"}
    assert state["norm.weight/exp_avg_sq"].shape == (32,)


@pytest.mark.parametrize("stage", range(4))
def test_muon_orthogonalises_hidden_matrices_and_no_others(two_ranks: Bench, stage: int) -> None:
    settings = two_ranks.job("muon")["settings"]
    config = load(None, settings)
    torch.manual_seed(config.run.seed)
    model = Transformer(config.model, VOCABULARY)
    state = two_ranks.state(f"muon-one-{stage}", 1)
    for name, before in model.named_parameters():
        moved = state[f"{name}/param"] - before.detach()
        if not (name.startswith("layers.") and before.ndim == 2):
            # AdamW's first step is the rate, wherever there is a gradient.
            assert float(moved.abs().max()) == pytest.approx(0.01, rel=1e-3)
            continue
        values = torch.linalg.svdvals(moved) / (0.01 * 0.2 * math.sqrt(max(before.shape)))
        # A gradient itself spreads its singular values over several powers of ten.
        assert 0.6 < float(values.median()) < 1.25 and float(values.max()) < 1.3, name
        assert float((values > 0.3).float().mean()) > 0.75, name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gates_keep_their_own_rate_with_every_optimizer(two_ranks: Bench, name: str) -> None:
    for stage in range(4):
        state = two_ranks.state(f"{name}-one-{stage}", 1)
        gates = [tensor for key, tensor in state.items() if key.endswith("gate/param")]
        assert len(gates) == 2
        for tensor in gates:
            assert tensor.abs().tolist() == pytest.approx([0.01] * 2, rel=1e-3)


# Long runs: spikes, z-loss and the average of the weights, all at once.


class NaiveLongRun:
    """The steps of a long run, in plain torch; which were skipped, and the weights' average."""

    def __init__(self, bench: Bench) -> None:
        self.skipped: list[bool] = []
        self.average: dict[str, torch.Tensor] = {}
        self._applied: list[tuple[float, float]] = []
        config = load(None, bench.job("long", *LONG)["settings"])
        torch.manual_seed(config.run.seed)
        self._take(Transformer(config.model, VOCABULARY), 0.0)
        self.curve, self.model = reference(config, bench.corpus, STEPS, self._is_spike, self._after)

    def _is_spike(self, loss: float, norm: float) -> bool:
        found = False
        if len(self._applied) >= 2:
            last = np.array(self._applied[-2:])
            bounds = last.mean(axis=0) + 0.05 * last.std(axis=0, ddof=1)
            found = loss > bounds[0] or norm > bounds[1]
        self.skipped.append(found)
        if not found:
            self._applied.append((loss, norm))
        return found

    def _after(self, model: Transformer) -> None:
        steps = len(self._applied)
        self._take(model, min(0.5, (1 + steps) / (10 + steps)))

    def _take(self, model: Transformer, decay: float) -> None:
        for name, weights in model.named_parameters():
            before = self.average.get(name, 0.0)
            self.average[name] = decay * before + (1 - decay) * weights.detach()


@pytest.fixture(scope="module")
def naive_long_run(bench: Bench) -> NaiveLongRun:
    return NaiveLongRun(bench)


def assert_long_run(bench: Bench, run: str, naive: NaiveLongRun) -> None:
    """The run skipped, averaged and lost what the naive one did."""
    assert list(bench.curve(run)) == list(range(1, STEPS + 1))
    assert_near(bench.curve(run), naive.curve, tolerance=5e-5)
    records = bench.records(run, "train")
    counts = list(np.cumsum(naive.skipped))
    assert [record["spikes"] for record in records] == counts
    assert [record["skipped"] for record in records] == counts
    state = bench.state(run, STEPS)
    assert state["trainer optimizer_steps"] == STEPS - counts[-1]
    for name, weights in naive.model.named_parameters():
        found, average = state[f"{name}/param"], state[f"{name}/ema"]
        torch.testing.assert_close(found, weights.detach(), atol=5e-5, rtol=0)
        torch.testing.assert_close(average, naive.average[name], atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["long", "long-2", "long-1", "long-0"])
def test_a_long_run_is_that_of_plain_torch_at_every_stage_and_with_shared_windows(
    two_ranks: Bench, naive_long_run: NaiveLongRun, name: str
) -> None:
    spikes = naive_long_run.skipped
    # Those behind the checkpoint are recognised by earlier steps.
    assert spikes[SAVED - 1] and spikes[SAVED] and not all(spikes[SAVED:])
    assert_long_run(two_ranks, name, naive_long_run)


def test_the_average_is_validated_beside_the_weights_however_they_are_partitioned(
    two_ranks: Bench, naive_long_run: NaiveLongRun
) -> None:
    model = naive_long_run.model
    expected = [validated(model, two_ranks.corpus)]
    averaged = copy.deepcopy(model)
    for name, weights in averaged.named_parameters():
        weights.data.copy_(naive_long_run.average[name])
    expected.append(validated(averaged, two_ranks.corpus))
    assert abs(expected[0] - expected[1]) > 1e-3
    for name in ("long", "long-2", "long-1", "long-0"):
        (record,) = two_ranks.records(name, "validation")
        found = [record["loss"], record["ema_loss"]]
        assert found == pytest.approx(expected, rel=5e-5), name


def validated(model: Transformer, corpus: Path) -> float:
    """The mean cross-entropy over the first two windows of each lane."""
    total, count, state = 0.0, 0, model.initial_state(LANES, "cpu")
    lanes = [Lane(Mix([Dataset(corpus)]), g, LANES, seed=0) for g in range(LANES)]
    for _ in range(2):
        windows = [lane.window(32)[:3] for lane in lanes]
        tokens, targets, starts = (
            torch.from_numpy(np.stack(x)) for x in zip(*windows, strict=True)
        )
        with torch.no_grad():
            output = model(tokens, starts, state)
        state = output.state
        total += float(F.cross_entropy(output.logits.mT, targets, reduction="sum"))
        count += int((targets != IGNORE).sum())
    return total / count


@pytest.mark.parametrize("other_ranks", [1, 3], indirect=True)
def test_a_long_run_is_the_same_on_other_ranks_and_goes_on_there(
    other_ranks: tuple[Bench, int], naive_long_run: NaiveLongRun
) -> None:
    bench, ranks = other_ranks
    assert_long_run(bench, f"long-{ranks}-ranks", naive_long_run)
    on = f"long-on-{ranks}"
    assert differences(bench.state(on, SAVED), bench.state("long", SAVED)) == []
    assert_near(bench.curve(on), bench.curve("long"), tolerance=5e-5)


@pytest.mark.parametrize("name", ["long", "long-bf16"])
def test_a_resume_of_a_long_run_is_exact_to_the_bit(two_ranks: Bench, name: str) -> None:
    resumed, whole = two_ranks.curve(f"{name}-on"), two_ranks.curve(name)
    assert resumed == {step: whole[step] for step in range(SAVED + 1, STEPS + 1)}
    end = two_ranks.state(f"{name}-on", STEPS)
    assert differences(end, two_ranks.state(name, STEPS)) == []
    assert end["embedding.weight/ema"].dtype == torch.float32
    assert len(end["trainer recent"]) == 2 and end["trainer spikes"] > 1


def test_an_average_goes_from_stage_to_stage_unchanged(two_ranks: Bench) -> None:
    for stop in "bcd":
        there = two_ranks.state(f"long-{stop}", SAVED)
        assert differences(there, two_ranks.state("long", SAVED)) == [], stop
    assert_near(two_ranks.curve("long-d"), two_ranks.curve("long"), tolerance=5e-5)


def test_too_many_spikes_in_a_row_end_the_run_on_all_ranks(
    two_ranks: Bench, naive_long_run: NaiveLongRun
) -> None:
    step = naive_long_run.skipped.index(True) + 1
    for rank in (0, 1):
        assert (two_ranks.root / "long-end" / f"error-{rank}").read_text() == (
            "the loss or a gradient was not finite, or lay more than 0.05 standard deviations "
            f"above those before, in 1 step in a row, up to step {step}; none of them changed the "
            "weights. The last checkpoint is from before; resume with a lower optim.lr or a larger "
            "train.spikes.deviations, or look at the data of these steps"
        )
    log = (two_ranks.root / "long-end" / "log.txt").read_text()
    assert f"step {step} was skipped: " in log
    assert max(two_ranks.curve("long-end")) == step


# A step that must not happen.


@pytest.mark.parametrize(
    "bad", ["bad-3", "bad-1", "bad-0", *(f"{name}-bad-{n}" for name in OPTIMIZERS for n in (0, 3))]
)
def test_one_lane_that_is_not_finite_skips_the_step_on_all_ranks(
    two_ranks: Bench, bad: str
) -> None:
    directory = two_ranks.root / bad
    ranks = [torch.load(directory / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        assert rank["skipped"] == (False, math.inf, 1)
        assert differences(rank["before"], rank["after"]) == []
        applied, loss, in_a_row = rank["next"]
        assert applied and math.isfinite(loss) and in_a_row == 0
        assert rank["skips"] == 1
        assert rank["end"]["steps"] == rank["after"]["steps"] + 1
        moved = differences(rank["after"], rank["end"])
        assert {name for name in rank["end"] if name.startswith("forward")} <= set(moved)
        assert all(tensor.isfinite().all() for tensor in rank["memory"])
    assert ranks[0]["next"] == ranks[1]["next"]


@pytest.mark.parametrize("stage", [3, 1, 0])
def test_only_the_memory_that_was_not_finite_is_emptied(two_ranks: Bench, stage: int) -> None:
    directory = two_ranks.root / f"bad-{stage}"
    for rank in (0, 1):
        told = torch.load(directory / f"rank-{rank}.pt", weights_only=True)
        for tensor in told["memory"]:
            empty = {row for row in range(LANES // 2) if not tensor[row].any()}
            # Lanes of one-token documents hold one token's write, never nothing.
            assert empty == ({told["lane"]} if rank == 1 else set())


def test_the_first_step_moves_each_gate_by_its_own_rate_and_nothing_decays_it(
    two_ranks: Bench,
) -> None:
    state = two_ranks.state("gates", 1)
    gates = {name: tensor for name, tensor in state.items() if name.endswith("gate/param")}
    assert len(gates) == 2
    for tensor in gates.values():
        # Adam's first step is the rate times g / (|g| + eps).
        assert (tensor - 1.0).abs().tolist() == pytest.approx([0.03] * 2, rel=1e-3)
    assert state["trainer optimizer_steps"] == 1


# Without ranks.


def test_deepspeed_is_configured_from_the_one_configuration() -> None:
    words = [*SETTINGS, "run.directory=x", "data.train=y", "train.micro_batch=3"]
    whole = deepspeed_settings(load(None, words), 2, 1000)
    assert whole["train_micro_batch_size_per_gpu"] == 3
    assert whole["gradient_accumulation_steps"] == 2
    assert whole["gradient_clipping"] == 0.5
    assert whole["zero_optimization"]["stage"] == 3
    assert "bf16" not in whole

    bf16 = deepspeed_settings(load(None, [*words, "train.precision=bf16"]), 4, 1000)
    assert bf16["bf16"] == {"enabled": True}
    assert bf16["gradient_accumulation_steps"] == 1


def test_a_process_on_a_cpu_prints_nothing_about_cuda(tmp_path: Path) -> None:
    # What DeepSpeed's import calls in torch's CUDA build, here with any build.
    program = (
        "from pretrain.training.engine import build_ops; build_ops();"
        "from torch.utils import cpp_extension; cpp_extension._find_cuda_home()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""


def test_a_lock_that_a_killed_build_left_is_reported_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A copy of the built operator, so that nothing is compiled here and no run is disturbed.
    built: list[str] = []
    build_ops(built.append)
    cache = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    shutil.copytree(cache, tmp_path / "cache")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    (operator,) = {path.parent for path in (tmp_path / "cache").rglob("*.so")}
    stale = operator / "lock"
    stale.touch()
    told: list[str] = []
    build_ops(told.append)
    assert len(told) == 1 and str(stale) in told[0]
    assert not stale.exists()


def test_an_installation_of_another_user_is_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, home = tmp_path / "tree", tmp_path / "home"
    (tree / "pretrain" / "training").mkdir(parents=True)
    (tree / "pyproject.toml").touch()
    home.mkdir()
    monkeypatch.setattr(engine, "__file__", str(tree / "pretrain" / "training" / "engine.py"))
    monkeypatch.setenv("HOME", str(home))
    assert tree / ".cache" in engine.cache_directory().parents
    shutil.rmtree(tree / ".cache")
    (tree / ".cache").touch()  # where no mode would stop root
    assert home / ".cache" / "infini-pretrain" in engine.cache_directory().parents
    shutil.rmtree(home)
    home.touch()
    with pytest.raises(TrainingError, match="set TORCH_EXTENSIONS_DIR to a directory of yours"):
        engine.cache_directory()


def test_an_environment_that_is_reached_by_two_paths_has_an_operator_for_each(
    tmp_path: Path,
) -> None:
    """They would else be compiled anew whenever the path is another than the time before."""
    (tmp_path / "link").symlink_to(sys.prefix)
    (tmp_path / "pyproject.toml").touch()
    script = (
        "import sys; from pretrain.training import engine; engine.__file__ = sys.argv[1];"
        "print(engine.cache_directory())"
    )

    def directory(prefix: Path) -> str:
        command = [prefix / "bin" / "python", "-c", script, tmp_path / "pretrain/training/e.py"]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

    own = directory(Path(sys.prefix))
    assert own == directory(Path(sys.prefix)) and str(tmp_path) in own
    assert own != directory(tmp_path / "link")


def test_a_first_launch_says_that_it_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "empty"))

    class NotHereError(Exception):
        """Stops before the compiler would start."""

    def report(text: str) -> None:
        assert "compiling" in text
        raise NotHereError

    with pytest.raises(NotHereError):
        build_ops(report)


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
