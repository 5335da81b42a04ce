"""The configuration: shipped files load, and what cannot work is said, all of it at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.dataset import settings
from data_prep.dataset.settings import SettingsError
from pretrain.config.memory import MEMORY_KINDS
from pretrain.config.root import Config, load
from tests.pretrain.config.loading import MINIMUM, problems

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    # A path that the user is to give may be left open.
    load(path, ["run.directory=runs/x", "data.train=data/x"])


def test_the_defaults_need_a_directory_and_a_data_set_and_nothing_else() -> None:
    assert [problem.split(":")[0] for problem in problems(minimum=False)] == [
        "data.train", "run.directory"
    ]  # fmt: skip
    assert load(None, MINIMUM).model == Config().model


def test_a_word_goes_before_the_file_and_the_file_before_the_default(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: {train: x, lanes: 6}\ntrain: {steps: 7}\nrun: {directory: r}\n")
    config = load(path, ["train.steps=8", "optim.warmup_steps=2"])
    assert (config.train.steps, config.data.lanes, config.train.log_every) == (8, 6, 10)


def test_the_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = load(None, [*MINIMUM, "optim.lr=1e-4", "model.memory.kind=linear", "zero.stage=1"])
    path = tmp_path / "config.yaml"
    path.write_text(settings.to_yaml(config))
    assert load(path) == config
    assert settings.from_plain(Config, settings.to_plain(config)) == config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.stpes=3"], "train.stpes: unknown key; did you mean train.steps?"),
        (["model.memory.knd=none"], "model.memory.knd: unknown key; did you mean"),
        (["train.steps=many"], "train.steps: expected a whole number, found 'many'"),
        (["train.steps=2.5"], "train.steps: expected a whole number, found 2.5"),
        (["train.steps=0", "optim.warmup_steps=0"], "train.steps: expected at least 1, found 0"),
        (["data.lanes=8", "launch.ranks=3"], "data.lanes: 8 lanes cannot be shared evenly by 3"),
        (
            ["data.lanes=8", "launch.ranks=2", "train.micro_batch=3"],
            "data.lanes: 8 lanes cannot be shared evenly in micro-batches of 3 by 2 ranks; choose "
            "a train.micro_batch that divides 4, or data.lanes=6 or 12",
        ),
        (
            ["parallel.sequence=3"],
            "parallel.sequence: 3 ranks cannot share the 16 segments of a window "
            "(train.window_segments) evenly; choose a divisor of them",
        ),
        (
            ["parallel.sequence=4", "launch.ranks=6"],
            "parallel.sequence: 6 ranks are not whole groups of 4 that share a window; choose "
            "4, 8, 16 or 32 ranks, or parallel.sequence=1 or 2",
        ),
        (
            ["parallel.sequence=2", "launch.ranks=6"],
            "data.lanes: 8 lanes cannot be shared evenly by 6 ranks in groups of 2 "
            "(parallel.sequence); choose 2, 4, 8 or 16 ranks, or data.lanes=6 or 9",
        ),
        (["zero.stage=0", "train.precision=bf16"], "zero.stage: 0 has no float32 master weights"),
        (
            ["data.preface=d", "model.memory.kind=none"],
            "data.preface: documents begin with the memory of a preface, and "
            "model.memory.kind=none has no memory",
        ),
        (
            ["model.memory.kind=full", "model.memory.full.segments=3"],
            "model.memory.full.segments: 3 does not divide train.window_segments=16; choose a "
            "divisor of it",
        ),
        (["model.local_attention=flash"], "model.local_attention: flash computes in bf16"),
        (["model.local_attention=varlen"], "model.local_attention: varlen computes in bf16"),
        (
            ["model.local_attention=flash", "train.precision=bf16", "launch.device=cpu"],
            "model.local_attention: flash needs a GPU",
        ),
        (
            ["model.local_attention=varlen", "train.precision=bf16", "launch.device=cpu"],
            "model.local_attention: varlen needs a GPU",
        ),
        (
            ["model.local_attention=flash", "train.precision=bf16", "model.d_head=258"],
            "model.local_attention: flash takes heads of at most 256, found d_head=258; set it to",
        ),
        (
            ["model.local_attention=varlen", "train.precision=bf16", "model.d_head=60"],
            "model.local_attention: varlen takes heads of at most 256, in multiples of 8, found "
            "d_head=60; set it to sdpa or auto",
        ),
        (["model.memory.kernel=triton"], "model.memory.kernel: triton computes in bf16"),
        (["model.memory.kernel=mixed"], "model.memory.kernel: mixed computes in bf16"),
        (
            ["model.memory.kernel=mixed", "train.precision=bf16", "launch.device=cpu"],
            "model.memory.kernel: mixed needs a GPU; set it to torch or auto",
        ),
        (
            ["model.memory.kernel=triton", "train.precision=bf16", "launch.device=cpu"],
            "model.memory.kernel: triton needs a GPU",
        ),
        (
            ["model.memory.kernel=triton", "train.precision=bf16", "model.d_head=160"],
            "model.memory.kernel: triton holds heads of at most 128, found d_head=160",
        ),
        (
            ["model.memory.kernel=triton", "launch.device=cpu", "model.memory.kind=none"],
            "model.memory.kernel: has no effect with memory.kind=none; remove it, or set",
        ),
        (
            ["train.validate_ema=true", "data.validation=v"],
            "train.validate_ema: there is no average of the weights; set optim.ema_decay",
        ),
        (
            ["data.train=''", "data.mix=[{data: a, weights: [[0, 1], [1000, 2]]}]"],
            "data.mix[0].weights[1]: never holds, since train.steps=1000 and it begins after step "
            "1000; remove it, or raise train.steps",
        ),
        (["train.steps=10"], "train.steps=10; set it to at most that, or raise train.steps"),
        (
            ["optim.schedule=wsd", "train.steps=250"],
            "optim.decay_steps: warm-up and decay together are longer than train.steps=250; set "
            "it to at most 150, or raise train.steps",
        ),
        (
            ["optim.ema_decay=0.9", "train.validate_ema=true"],
            "train.validate_ema: there is nothing to validate on; set data.validation",
        ),
        (["train.validate_every=5"], "train.validate_every: there is nothing to validate on; set"),
        (["train.validation_windows=9"], "train.validation_windows: there is nothing to validate"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_in_one_sentence(words: list[str], said: str) -> None:
    (problem,) = problems(*words)
    assert said in problem


def test_no_validation_may_be_asked_for_where_there_is_nothing_to_validate_on() -> None:
    assert problems("train.validate_every=0") == []
    asked = ["train.validate_every=5", "train.validation_windows=9", "data.validation=v"]
    assert problems(*asked) == []


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_ranks_share_windows_and_documents_have_prefaces_where_a_memory_can(kind: str) -> None:
    traits, chosen = MEMORY_KINDS[kind], f"model.memory.kind={kind}"
    shared = problems(chosen, "parallel.sequence=2")
    assert shared == [
        "parallel.sequence: ranks cannot share windows with model.memory.kind="
        f"{kind}; set it to 1"
    ] * (not traits.shares_windows)  # fmt: skip
    found = problems(chosen, "data.preface=d")
    assert [problem.split(":")[0] for problem in found] == ["data.preface"] * (not traits.remembers)


def test_a_section_whose_lines_are_all_commented_out_has_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "run: {directory: r}\n"
        "data:\n  train: d\n  mix:\n  # - {data: a}\n  cache:\n"
        "train:\n  # steps: 3\nmodel: {memory: }\n"
    )
    assert load(path) == load(None, ["run.directory=r", "data.train=d"])
    path.write_text("run: {directory: r, seed: }\ndata: {train: d}\n")
    with pytest.raises(SettingsError, match=r"run\.seed: expected a whole number, found None"):
        load(path)


def test_mistakes_are_said_all_at_once() -> None:
    found = problems(
        "train.stpes=3", "optim.lr=fast", "zero.stage=7", "modle.d_model=3", "data.lanes=0"
    )
    assert sorted(problem.split(":")[0] for problem in found) == [
        "data.lanes", "modle", "optim.lr", "train.stpes", "zero.stage"
    ]  # fmt: skip


def test_a_resolver_that_could_store_a_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hunter2")
    (problem,) = problems("wandb.name=${oc.env:SOME_TOKEN}")
    assert problem.startswith("wandb.name:") and "hunter2" not in problem


def test_lanes_are_blocks_of_equal_size() -> None:
    config = load(None, [*MINIMUM, "data.lanes=12"])
    assert [list(config.lanes_of_rank(rank, 3)) for rank in range(3)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]
    ]  # fmt: skip
    assert config.rank_problems(3) == []


@pytest.mark.parametrize(
    ("lanes", "micro", "ranks", "choose"),
    [
        (12, 0, 5, "2, 3, 4, 6 or 12 ranks, or data.lanes=10 or 15"),
        (12, 0, 24, "4, 6 or 12 ranks, or data.lanes=24"),
        (256, 2, 24, "4, 8, 16, 32, 64 or 128 ranks, or data.lanes=240 or 288"),
        (24, 4, 4, "1, 2, 3 or 6 ranks, or a train.micro_batch that divides 6, or "
                   "data.lanes=16 or 32"),
        (7, 2, 7, "a train.micro_batch that divides 1, or data.lanes=14"),
    ],
)  # fmt: skip
def test_a_number_of_ranks_that_does_not_fit_is_reported_with_what_to_choose(
    lanes: int, micro: int, ranks: int, choose: str
) -> None:
    config = load(None, [*MINIMUM, f"data.lanes={lanes}", f"train.micro_batch={micro}"])
    (problem,) = config.rank_problems(ranks)
    assert problem.endswith(f"by {ranks} ranks; choose {choose}")
    for count in config.fitting_ranks():
        assert config.rank_problems(count) == []


def test_ranks_are_found_at_once_also_where_tokens_were_given_as_lanes() -> None:
    config = load(None, [*MINIMUM, "data.lanes=1000000000000"])
    # 2^a 5^b with a and b from 0 to 12; a loop over all lanes would take a day.
    powers = [2**a * 5**b for a in range(13) for b in range(13)]
    assert config.fitting_ranks() == sorted(powers)
    (problem,) = config.rank_problems(3)
    assert "lanes cannot be shared evenly by 3 ranks; choose 1, 2, 4, 5 or 8 ranks" in problem


def test_consecutive_ranks_share_windows_in_equal_parts() -> None:
    config = load(
        None,
        [*MINIMUM, "data.lanes=6", "model.segment=8", "train.window_segments=4",
         "parallel.sequence=2"],
    )  # fmt: skip
    assert config.fitting_ranks() == [2, 4, 6, 12]
    assert config.lanes_a_rank(4) == 3
    assert [list(config.lanes_of_rank(rank, 4)) for rank in range(4)] == [
        [0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]
    ]  # fmt: skip
    parts = [config.tokens_of_rank(rank) for rank in range(4)]
    assert parts == [slice(0, 16), slice(16, 32)] * 2


def test_a_window_is_its_segments() -> None:
    assert load(None, [*MINIMUM, "model.segment=8", "train.window_segments=3"]).window == 24


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_writing_that_nothing_trains_is_named_with_what_to_do(kind: str) -> None:
    def said(*words: str) -> str:
        return load(None, [*MINIMUM, f"model.memory.kind={kind}", *words]).unlearned_writing

    learns = MEMORY_KINDS[kind].learns_to_write
    assert said("train.window_segments=16") == ""
    one = said(*("train.window_segments=1", *(["model.memory.full.segments=1"] * (kind == "full"))))
    assert one.startswith("train.window_segments: with 1, no gradient reaches") == learns
    if kind == "autocompressor":
        group = said("model.memory.autocompressor.backprop_segments=1")
        assert group.startswith("model.memory.autocompressor.backprop_segments: with 1")
    if kind == "compressive":
        none = said("model.memory.compressive.reconstruction_weight=0")
        assert none.startswith("model.memory.compressive.reconstruction_weight: with 0, nothing")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.init_std=0"], "model.init_std: with 0 all matrices begin as zeros"),
        (
            ["optim.schedule=wsd", "optim.decay_steps=0", "optim.final_fraction=0.2"],
            "optim.final_fraction: has no effect with decay_steps=0; remove it, or raise",
        ),
        (
            ["model.memory.kind=linear", "model.memory.normaliser=paper"],
            "model.memory.normaliser: has no effect with memory.kind=linear",
        ),
        (
            ["train.spikes.deviations=6", "train.steps=128", "optim.warmup_steps=0"],
            "train.spikes.steps: no step is skipped before 128 were applied",
        ),
    ],
)
def test_a_run_may_not_begin_with_what_was_once_accepted(words: list[str], said: str) -> None:
    (problem,) = load(None, [*MINIMUM, *words]).problems_of_new()
    assert problem.startswith(said)


def test_a_run_may_begin_without_drawn_weights_or_with_a_rate_that_falls() -> None:
    assert load(None, [*MINIMUM]).problems_of_new() == []
    words = ["model.init_std=0", "train.start_from=runs/y", "optim.final_fraction=0"]
    words += ["train.spikes.deviations=6", "train.steps=129"]
    assert load(None, [*MINIMUM, *words]).problems_of_new() == []
