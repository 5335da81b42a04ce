"""One step against plain torch, and the state that it leaves; a real engine in this process."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.checkpoint.ranks import SoloRanks
from pretrain.config.root import Config
from pretrain.data.loader import Batch
from pretrain.data.packing import IGNORE
from pretrain.model.state import ModelState
from pretrain.model.transformer import Transformer
from pretrain.training.parallel import Share
from pretrain.training.run import Run
from pretrain.training.run_state import Preface
from pretrain.training.step import Stepper, StepResult
from tests.pretrain import kinds

VOCABULARY = 48
BIASED = ("model.qkv_bias=true", "model.qk_norm=true")
Batches = Callable[[Run, int], list[tuple[Batch, Batch | None]]]
Take = Callable[[Run, int], list[StepResult]]


def plain_model(config: Config) -> Transformer:
    """The model with the weights that a new run draws."""
    torch.manual_seed(config.run.seed)
    return Transformer(config.model, VOCABULARY)


def flat(state: ModelState) -> list[torch.Tensor]:
    return [tensor.detach() for layer in state for tensor in layer]


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    pieces = {piece.name: piece for piece in run.engine.pieces()}
    return {
        name.removesuffix("/param"): piece.values.view(piece.shape).clone()
        for name, piece in pieces.items()
        if name.endswith("/param")
    }


def step_in_plain_torch(model: Transformer, config: Config, batch: Batch) -> dict[str, Any]:
    """The first step over the whole batch at once, with torch's own AdamW, spelt out."""
    memory = model.initial_state(len(batch.tokens), "cpu")
    output = model(batch.tokens, batch.starts, memory)
    losses = F.cross_entropy(output.logits.mT, batch.targets, reduction="none")
    weights = (batch.targets != IGNORE).float() if batch.weights is None else batch.weights
    loss = (losses * weights).double().sum() / weights.double().sum()
    squares = output.logits.logsumexp(dim=-1).square() * weights
    z_loss = config.train.z_loss * squares.double().sum() / weights.double().sum()
    own = model(batch.tokens, batch.starts, memory, batch.targets)
    if own.auxiliary is None:
        (loss + z_loss).backward()
    else:  # the memory's loss is what is left of the sum without the targets'
        (loss + z_loss + (own.loss - losses.sum()).double() / weights.double().sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
    assert norm > config.train.clip_norm, "clipping should take part"
    named = dict(model.named_parameters())
    gates = [p for name, p in named.items() if name.endswith(".gate")]
    vectors = [p for n, p in named.items() if p.ndim == 1 and not n.endswith(".gate")]
    groups = [([p for p in named.values() if p.ndim > 1], 0.01, 0.1), (vectors, 0.01, 0.0),
              (gates, config.optim.gate_lr, 0.0)]  # fmt: skip
    torch.optim.AdamW(
        # The first of five steps of warm-up.
        [{"params": p, "lr": rate / 5, "weight_decay": decay} for p, rate, decay in groups],
        betas=(0.9, 0.95),
    ).step()
    found = {"loss": loss.item(), "z_loss": z_loss.item(), "norm": norm.item()}
    return {**found, "memory": flat(output.state)}


def test_a_run_says_that_nothing_trains_what_it_writes_to_its_memory(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    for segments, warned in ((1, True), (2, False)):
        caplog.clear()
        open_run(f"train.window_segments={segments}", name=f"run-{segments}")
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert any("no gradient reaches what is written" in text for text in said) == warned


@pytest.mark.parametrize(
    "words",
    [
        *((*kinds.words(kind), *BIASED, "train.micro_batch=2") for kind in kinds.KINDS),
        ("train.micro_batch=1",),
        ("zero.stage=0",),
        ("train.z_loss=0.1", "train.micro_batch=2"),
        (*kinds.words("compressive"), "train.z_loss=0.1"),
    ],
)
@pytest.mark.parametrize("prompts", [False, True])
def test_a_step_is_that_of_plain_torch_over_the_whole_batch(
    open_run: Any, next_batches: Batches, data_sets: Any, words: tuple[str, ...], prompts: bool
) -> None:
    if prompts:
        words += (f"data.train={data_sets['pairs']}", "data.prompt_weight=0.25")
    run = open_run(*words)
    ((batch, _),) = next_batches(run, 1)
    assert (batch.weights is not None) == prompts
    model = plain_model(run.config)
    expected = step_in_plain_torch(model, run.config, batch)
    run.state, result = run.stepper.step(run.state, batch, run.stepper.own_weight(batch))
    assert result.loss == pytest.approx(expected["loss"], rel=1e-6)
    z_loss = pytest.approx(expected["z_loss"], rel=1e-6) if run.config.train.z_loss else None
    assert result.z_loss == z_loss
    assert result.grad_norm == pytest.approx(expected["norm"], rel=1e-5)
    assert result.applied and not result.forward_only
    for found, other in zip(flat(run.state.memory), expected["memory"], strict=True):
        assert not found.requires_grad
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-6)
    for name, weights in weights_of(run).items():
        # AdamW's first step turns rounding, where a gradient is near 0, into a part of the rate.
        expected_weights = dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(weights, expected_weights, atol=2e-4, rtol=0, msg=name)


def test_the_state_after_a_step_continues_the_one_before(
    open_run: Any, next_batches: Batches
) -> None:
    run = open_run()
    before = run.state
    (first, _), (second, _) = next_batches(run, 2)
    for number, batch in enumerate((first, second), 1):
        run.state, _ = run.stepper.step(run.state, batch, run.stepper.own_weight(batch))
        assert (run.state.step, run.state.tokens) == (number, number * 4 * 32)
        assert run.state.places == batch.places
    assert (before.step, before.tokens, before.places) == (0, 0, None)
    for lane, history in enumerate(run.state.histories):
        expected = b""
        for batch in (first, second):
            window = batch.tokens[lane].numpy().tobytes() + batch.starts[lane].numpy().tobytes()
            expected = hashlib.sha256(expected + window).digest()
        assert history == expected.hex()


def test_the_memory_of_a_window_is_read_in_the_next_one(
    open_run: Any, next_batches: Batches
) -> None:
    run = open_run("optim.lr=0", "optim.gate_lr=0")
    model = plain_model(run.config)
    memory = model.initial_state(4, "cpu")
    losses = []
    for batch, _ in next_batches(run, 2):
        run.state, result = run.stepper.step(run.state, batch, run.stepper.own_weight(batch))
        with torch.no_grad():
            output = model(batch.tokens, batch.starts, memory, batch.targets)
            forgotten = model(
                batch.tokens, batch.starts, model.initial_state(4, "cpu"), batch.targets
            )
        memory = output.state
        count = (batch.targets != IGNORE).sum()
        assert result.loss == pytest.approx((output.loss / count).item(), rel=1e-6)
        losses.append((output.loss - forgotten.loss).item())
    assert losses[0] == 0.0 and losses[1] != 0.0


def test_windows_without_any_weight_go_through_the_memory_and_move_no_weight(
    open_run: Any, next_batches: Batches, take_steps: Take, engine_state: Any
) -> None:
    run = open_run()
    take_steps(run, 1)
    before, memory = engine_state(run), run.state.memory
    ((batch, _),) = next_batches(run, 1)
    batch = replace(batch, weights=torch.zeros_like(batch.targets, dtype=torch.float32))
    assert run.stepper.own_weight(batch) == 0.0
    run.state, result = run.stepper.step(run.state, batch, 0.0)
    assert result == StepResult(0.0, applied=True, grad_norm=0.0, forward_only=True)
    assert all(torch.equal(values, before[name]) for name, values in engine_state(run).items())
    assert run.engine.optimizer_steps == 1 and run.engine.module.training
    assert (run.state.step, run.state.skipped, run.state.places) == (2, 0, batch.places)
    for found, old in zip(flat(run.state.memory), flat(memory), strict=True):
        assert not torch.equal(found, old)


def test_a_step_that_is_not_finite_changes_no_weight_and_empties_the_memory_that_was_not(
    open_run: Any, next_batches: Batches, take_steps: Take, engine_state: Any
) -> None:
    run = open_run("train.micro_batch=2")
    take_steps(run, 2)
    ((batch, _),) = next_batches(run, 1)
    # A lane that reads its memory: no document starts in its window.
    batch = replace(batch, starts=batch.starts.clone())
    batch.starts[2] = False
    run.state.memory[0].matrix[2, 0, 0, 0] = math.nan
    before = engine_state(run)
    run.state, result = run.stepper.step(run.state, batch, run.stepper.own_weight(batch))
    assert (result.applied, result.grad_norm) == (False, math.inf)
    assert all(torch.equal(values, before[name]) for name, values in engine_state(run).items())
    assert (run.state.step, run.state.skipped, run.state.skipped_in_a_row) == (3, 1, 1)
    for tensor in flat(run.state.memory):
        assert [bool(lane.any()) for lane in tensor] == [True, True, False, True]
    (result,) = take_steps(run, 1)
    assert result.applied and math.isfinite(result.loss)
    assert (run.state.step, run.state.skipped, run.state.skipped_in_a_row) == (4, 1, 0)


def test_a_step_without_any_weight_does_not_end_a_row_of_skipped_ones(
    open_run: Any, next_batches: Batches
) -> None:
    run = open_run()
    (first, nothing, last) = (batch for batch, _ in next_batches(run, 3))
    nothing = replace(nothing, weights=torch.zeros_like(nothing.targets, dtype=torch.float32))
    counts = []
    for batch in (first, nothing, last):
        for layer in run.state.memory:
            layer.matrix.fill_(math.nan)
        batch.starts[:] = False
        weight = run.stepper.own_weight(batch)
        run.state, result = run.stepper.step(run.state, batch, weight)
        counts.append((result.applied, result.forward_only, run.state.skipped_in_a_row))
    assert counts == [(False, False, 1), (True, True, 1), (False, False, 2)]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("loss", "norm", "of"), [(1.0, 1e9, "loss"), (1e9, 0.01, "gradient norm")])
def test_a_spike_changes_no_weight_and_goes_on_with_memory_and_data(
    open_run: Any, next_batches: Batches, take_steps: Take, engine_state: Any,
    stage: int, loss: float, norm: float, of: str,
) -> None:  # fmt: skip
    watched = ("train.spikes.deviations=3", "train.spikes.steps=2", "optim.ema_decay=0.9")
    run = open_run(*watched, "train.micro_batch=2", f"zero.stage={stage}")
    take_steps(run, 2)
    recent = ((loss, norm), (loss, norm))
    run.state = replace(run.state, recent=recent)
    before, memory = engine_state(run), run.state.memory
    ((batch, _), (following, _)) = next_batches(run, 2)
    outputs = run.stepper.forward_only(batch, memory)
    run.state, result = run.stepper.step(run.state, batch, run.stepper.own_weight(batch))
    assert not result.applied and 0.01 < result.grad_norm < 1e9
    value = result.loss if of == "loss" else result.grad_norm
    assert result.spike == f"{of} {value:.4g} above {min(loss, norm):.4g}"
    assert all(torch.equal(values, before[name]) for name, values in engine_state(run).items())
    assert any(name.endswith("/ema") for name in before)
    state = run.state
    assert (state.step, state.skipped, state.spikes, state.skipped_in_a_row) == (3, 1, 1, 1)
    assert state.places == batch.places and state.recent == recent
    after = [flat(output.state) for output in outputs]
    for found, *expected in zip(flat(state.memory), *after, strict=True):
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-6, atol=1e-7)
    # One that is no spike is applied, and counts.
    run.state = replace(run.state, recent=((1e9, 1e9), (1e9, 1e9)))
    run.state, result = run.stepper.step(run.state, following, run.stepper.own_weight(following))
    assert result.applied and not result.spike
    assert run.state.recent == ((1e9, 1e9), (result.loss, result.grad_norm))
    assert (run.state.skipped, run.state.skipped_in_a_row) == (1, 0)


def test_a_step_that_is_not_finite_is_no_spike(
    open_run: Any, next_batches: Batches, take_steps: Take
) -> None:
    run = open_run("train.spikes.deviations=3", "train.spikes.steps=2")
    take_steps(run, 2)
    recent = run.state.recent
    assert len(recent) == 2
    ((batch, _),) = next_batches(run, 1)
    batch.starts[:] = False
    run.state.memory[0].matrix[:] = math.nan
    run.state, result = run.stepper.step(run.state, batch, run.stepper.own_weight(batch))
    assert (result.applied, result.grad_norm, result.spike) == (False, math.inf, "")
    assert (run.state.skipped, run.state.spikes, run.state.recent) == (1, 0, recent)


@kinds.of_every_kind_with_a_state
def test_documents_begin_with_the_memory_of_what_their_lane_has_read_of_the_preface(
    open_run: Any, next_batches: Batches, data_sets: Any, kind: str
) -> None:
    frozen = ("optim.lr=0", "optim.gate_lr=0", "train.micro_batch=1")
    run = open_run(f"data.preface={data_sets['other']}", *kinds.words(kind), *frozen)
    model = plain_model(run.config)
    memory = initial = model.initial_state(4, "cpu")
    histories = [b""] * 4
    for batch, preface in next_batches(run, 4):
        assert preface is not None
        with torch.no_grad():
            output = model(batch.tokens, batch.starts, memory, batch.targets, initial=initial)
            memory = output.state
            initial = model(preface.tokens, preface.starts, initial).state
        run.state, result = run.stepper.step(
            run.state, batch, run.stepper.own_weight(batch), preface
        )
        count = (batch.targets != IGNORE).sum()
        assert result.loss == pytest.approx((output.losses.sum() / count).item(), rel=1e-5)
        for windows in (batch, preface):
            histories = [
                hashlib.sha256(history + t.numpy().tobytes() + s.numpy().tobytes()).digest()
                for history, t, s in zip(histories, windows.tokens, windows.starts, strict=True)
            ]
    assert isinstance(run.state.preface, Preface) and preface is not None
    assert run.state.preface.places == preface.places
    assert list(run.state.histories) == [history.hex() for history in histories]
    for found, expected in ((run.state.memory, memory), (run.state.initial, initial)):
        assert found is not None
        for one, other in zip(flat(found), flat(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_preface_and_windows_without_any_weight_have_no_logits(
    open_run: Any, next_batches: Batches, data_sets: Any
) -> None:
    run = open_run(f"data.preface={data_sets['other']}")
    ((batch, preface),) = next_batches(run, 1)
    made: list[Any] = []
    run.engine.module.lm_head.register_forward_hook(lambda *given: made.append(given[-1]))
    for weight in (run.stepper.own_weight(batch), 0.0):
        run.stepper.step(run.state, batch, weight, preface)
    of_batch, *of_none = made
    assert of_batch.losses.count_nonzero() > 0
    assert [tuple(logits.shape) for logits in of_none] == [(0, VOCABULARY)] * 3


def test_a_preface_that_a_skipped_step_spoiled_is_emptied_in_its_lane(
    open_run: Any, next_batches: Batches, data_sets: Any
) -> None:
    run = open_run(f"data.preface={data_sets['other']}")
    (first, preface), (second, spoiled) = next_batches(run, 2)
    weight = run.stepper.own_weight(first)
    run.state, _ = run.stepper.step(run.state, first, weight, preface)
    assert run.state.preface is not None and spoiled is not None
    second.starts[1, 0] = True  # so that the document reads the preface's memory
    spoiled.starts[1] = False
    run.state.preface.memory[1].normaliser[1, 0, 0] = math.nan
    run.state, result = run.stepper.step(run.state, second, weight, spoiled)
    assert not result.applied and run.state.preface is not None
    for tensor in flat(run.state.preface.memory):
        assert [bool(lane.any()) for lane in tensor] == [True, False, True, True]


def test_a_steps_random_numbers_follow_from_seed_step_and_rank(
    open_run: Any, next_batches: Batches
) -> None:
    run = open_run()
    start = run.state
    ((batch, _),) = next_batches(run, 1)
    seeds = {}
    for step in (0, 1, 0):
        for rank in (0, 1):
            for seed in (1, 2):
                config = replace(run.config, run=replace(run.config.run, seed=seed))
                share = replace(run.share, rank=rank)
                stepper = Stepper(run.engine, config, share, SoloRanks())
                stepper.step(replace(start, step=step), batch, 0.0)
                drawn = torch.initial_seed()
                assert seeds.setdefault((step, rank, seed), drawn) == drawn
    assert len(set(seeds.values())) == 8


def test_a_ranks_weight_is_that_of_its_part_of_the_windows(open_run: Any) -> None:
    run = open_run()
    targets = torch.tensor([[5, IGNORE, 7, IGNORE], [IGNORE, IGNORE, 3, 4]])
    weights = torch.tensor([[0.5, 0.0, 1.0, 0.25], [2.0, 0.0, 0.0, 0.125]])
    batch = Batch(targets, targets, targets == 5, None, [])
    for part, counted, weighed, scored in (
        (slice(0, 2), 1.0, 2.5, 2),
        (slice(2, 4), 3.0, 1.375, 3),
    ):
        share = Share(0, range(2), part, None, torch.device("cpu"))
        stepper = Stepper(run.engine, run.config, share, SoloRanks())
        assert stepper.own_weight(batch) == counted
        assert stepper.own_weight(replace(batch, weights=weights)) == weighed
        assert stepper.own_scored(batch) == 4
        assert stepper.own_scored(replace(batch, weights=weights)) == scored
