"""The configuration: shipped files load, and what cannot work is said, all of it at once."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from data_prep.dataset import settings
from data_prep.dataset.settings import SettingsError
from data_prep.recall.tasks import TASKS
from pretrain.config import (
    EVALUATIONS,
    MEMORY_KINDS,
    Config,
    EvaluationConfig,
    MemoryConfig,
    SourceConfig,
    describe,
    load,
)

ROOT = Path(__file__).parents[2]
MINIMUM = ("run.directory=runs/x", "data.train=data/x")


def problems(*words: str, minimum: bool = True) -> list[str]:
    try:
        load(None, [*(MINIMUM if minimum else ()), *words])
    except SettingsError as error:
        return error.problems
    return []


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
        (["model.tied_embeddings=1"], "model.tied_embeddings: expected true or false, found 1"),
        (["optim.lr=nan"], "optim.lr: expected a finite number, found nan"),
        (["optim.beta1=1.5"], "optim.beta1: expected 0.0 to 1.0, found 1.5"),
        (["train.steps=0", "optim.warmup_steps=0"], "train.steps: expected at least 1, found 0"),
        (["checkpoint.keep_last=1"], "checkpoint.keep_last: expected at least 2, found 1"),
        (["zero.stage=4"], "zero.stage: expected one of 0, 1, 2, 3; found 4"),
        (["model.memory.kind=dleta"], "autocompressor; found 'dleta'"),
        (["model.n_heads=4", "model.n_kv_heads=3"], "n_heads: 4 query heads cannot share 3"),
        (["model.d_head=7"], "d_head: rotary embedding needs an even number, found 7; choose one"),
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
        (
            ["model.memory.kind=delta", "model.memory.transformer_xl.cache=9"],
            "model.memory.transformer_xl: has no effect with memory.kind=delta; remove it, or set "
            "memory.kind=transformer_xl",
        ),
        (
            ["model.memory.kind=transformer_xl", "model.memory.initial_gate=1"],
            "model.memory.initial_gate: has no effect with memory.kind=transformer_xl; remove it, "
            "or set memory.kind=linear or delta",
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
            ["model.memory.kind=compressive", "model.memory.compressive.cache=300"],
            "model.memory.compressive.cache: 300 is not a multiple of segment=256; choose one",
        ),
        (
            ["model.memory.kind=compressive", "model.memory.compressive.rate=3"],
            "model.memory.compressive.rate: 3 does not divide segment=256; choose a divisor of it",
        ),
        (
            ["model.memory.compressive.rate=4"],
            "model.memory.compressive: has no effect with memory.kind=delta; remove it, or set",
        ),
        (
            ["optim.decay_steps=50"],
            "optim.decay_steps: has no effect with optim.schedule=cosine; remove it, or set "
            "optim.schedule=wsd",
        ),
        (
            ["optim.muon.rms=0.4"],
            "optim.muon: has no effect with optim.name=adamw; remove it, or set optim.name=muon",
        ),
        (
            ["optim.name=adafactor", "optim.beta2=0.9"],
            "optim.beta2: has no effect with optim.name=adafactor; remove it, or set "
            "optim.name=adamw or muon",
        ),
        (["optim.ema_decay=1"], "optim.ema_decay: 1 averages nothing; lower it, e.g. to 0.999"),
        (["optim.ema_decay=1.5"], "optim.ema_decay: expected 0.0 to 1.0, found 1.5"),
        (
            ["train.validate_ema=true", "data.validation=v"],
            "train.validate_ema: there is no average of the weights; set optim.ema_decay",
        ),
        (
            ["train.spikes.steps=64"],
            "train.spikes.steps: has no effect with deviations=0; remove it, or set deviations",
        ),
        (["train.spikes.deviations=-1"], "train.spikes.deviations: expected at least 0.0, found"),
        (["train.z_loss=-1"], "train.z_loss: expected at least 0.0, found -1.0"),
        (["optim.name=lion"], "optim.name: expected one of adamw, adafactor, muon; found 'lion'"),
        (["data.mix=[{data: a}]"], "data.mix: cannot be combined with data.train; give"),
        (["data.train=''", "data.mix=[]"], "data.train: not set; give the directory"),
        (["data.train=''", "data.mix=[{weight: 2}]"], "data.mix[0].data: not set"),
        (["data.train=''", "data.mix=[{data: a, wieght: 2}]"], "data.mix[0].wieght: unknown key"),
        (["data.train=''", "data.mix=[{data: a, weight: -1}]"], "mix[0].weight: expected at least"),
        (["data.train=''", "data.mix=[{data: a, weight: 0}]"], "data.mix: every weight is 0"),
        (
            ["data.train=''", "data.mix=[{data: a, weights: [[0, 1], [5, 0]]}]"],
            "data.mix: every weight is 0 after step 5, so nothing would be read",
        ),
        (
            ["data.train=''", "data.mix=[{data: a, weights: [[0, 1], [1000, 2]]}]"],
            "data.mix[0].weights[1]: never holds, since train.steps=1000 and it begins after step "
            "1000; remove it, or raise train.steps",
        ),
        (
            ["data.train=''", "data.mix=[{data: x/a}, {data: x/b, name: c}, {data: x/../x/b}]"],
            "x/b is listed twice; list it once, with the sum of the weights",
        ),
        (
            ["data.train=''", "data.mix=[{data: x/a}, {data: y/a}]"],
            "data.mix: two data sets have the name 'a'; give each a different `name`",
        ),
        (["train.steps=10"], "train.steps=10; set it to at most that, or raise train.steps"),
        (
            ["optim.schedule=wsd", "train.steps=250"],
            "optim.decay_steps: warm-up and decay together are longer than train.steps=250; set "
            "it to at most 150, or raise train.steps",
        ),
        (
            ["checkpoint.every=200", "checkpoint.keep_every=500"],
            "checkpoint.keep_every: a checkpoint is written every 200 steps, so of the multiples "
            "of 500 only those of 1000 would be kept; choose a multiple of every, e.g. 600",
        ),
        (
            ["data.cache.directory=s3://bucket/cache"],
            "data.cache.directory: s3://bucket/cache is a URL; give a directory on a disk",
        ),
        (["optim.beta1=1"], "optim.beta1: 1 never takes a gradient in; lower it, e.g. to 0.9"),
        (["optim.name=muon", "optim.beta2=1"], "optim.beta2: 1 never takes a gradient in"),
        (["optim.name=muon", "optim.muon.momentum=1"], "optim.muon.momentum: 1 never takes a"),
        (["optim.eps=0"], "optim.eps: 0 divides 0 by 0 where a gradient is 0"),
        (["optim.name=adafactor", "optim.adafactor.eps1=0"], "optim.adafactor.eps1: "),
        (
            ["optim.ema_decay=0.9", "train.validate_ema=true"],
            "train.validate_ema: there is nothing to validate on; set data.validation",
        ),
        (["train.validate_every=5"], "train.validate_every: there is nothing to validate on; set"),
        (["train.validation_windows=9"], "train.validation_windows: there is nothing to validate"),
        (
            ["train.profile_after=6"],
            "train.profile_after: has no effect with profile_steps=0; remove it, or set profile_st",
        ),
        (["train.profile_ranks=all"], "train.profile_ranks: has no effect with profile_steps=0"),
        (
            ["train.profile_steps=3", "train.profile_after=1000"],
            "train.profile_after: no step is left to profile after 1000 of steps=1000; lower it",
        ),
        (
            ["zero.stage=1", "zero.live_parameters=10"],
            "zero.live_parameters: has no effect with zero.stage=1; remove it, or set zero.stage=3",
        ),
        (
            ["model.rope_scaling.low_turns=2"],
            "model.rope_scaling.low_turns: has no effect with kind=none; remove it, or set "
            "kind=llama3 or yarn",
        ),
        (
            ["model.rope_scaling.kind=linear", "model.rope_scaling.original_length=4"],
            "model.rope_scaling.original_length: has no effect with kind=linear; remove it",
        ),
        (
            ["model.rope_scaling.kind=llama3", "model.rope_scaling.truncate=false"],
            "model.rope_scaling.truncate: has no effect with kind=llama3; remove it, or set "
            "kind=yarn",
        ),
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


def test_the_settings_of_a_kind_are_those_of_a_group_or_of_infini_attention() -> None:
    names = {field.name for field in fields(MemoryConfig)} - {"kind"}
    assert names == {name for traits in MEMORY_KINDS.values() for name in traits.settings}


@pytest.mark.parametrize(("name", "rate"), [("adamw", 1e-3), ("adafactor", 0.01), ("muon", 1e-3)])
def test_an_optimizer_has_its_own_rate_unless_one_is_set(name: str, rate: float) -> None:
    words = [*MINIMUM, f"optim.name={name}"]
    assert load(None, words).optim.peak == rate
    assert load(None, [*words, "optim.lr=0"]).optim.peak == 0.0


def test_checkpoints_are_kept_at_multiples_of_their_interval_or_all_of_them() -> None:
    for kept in (0, 50, 100, 200, 1000):
        assert problems("checkpoint.every=200", f"checkpoint.keep_every={kept}") == []


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


def test_a_project_that_wandb_refuses_is_refused_with_the_configuration() -> None:
    assert problems("wandb.project=Infini 1b, long-context") == []
    assert problems("wandb.project=team/infini", "wandb.mode=disabled") == []
    for project in ("team/infini", "infini: long", "a" * 129):
        (problem,) = problems(f"wandb.project='{project}'")
        assert problem.startswith(f"wandb.project: '{project}': wandb takes names of at most 128")


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


def test_sources_are_the_mix_or_the_one_data_set_by_the_key_of_the_setting() -> None:
    one = load(None, MINIMUM).data.sources
    assert one == {"data.train": SourceConfig("data/x", 1.0, "x")}
    words = ["run.directory=r", "data.mix=[{data: d/a/}, {data: d/b, weight: 2, name: books}]"]
    assert load(None, words).data.sources == {
        "data.mix[0]": SourceConfig("d/a/", 1.0, "a"),
        "data.mix[1]": SourceConfig("d/b", 2.0, "books"),
    }
    assert "data.mix[].weight = 1.0" in "\n".join(describe())


def test_all_mistakes_in_evaluations_are_reported_at_once() -> None:
    evaluations = [
        "{kind: passkey, lengths: [4096, 4096], data: d}",
        "{kind: needles, every: 5, tasks: [single, treble]}",
        "{kind: needles, depths: [0.5], name: step}",
        "{kind: perplexity, lengths: [5], every: -1}",
        "{lengths: [5], depths: []}",
        "{kind: harness}",
    ]
    assert problems(f"train.evaluate=[{', '.join(evaluations)}]") == [
        "train.evaluate[1].tasks[1]: expected one of single, multikey, multivalue, multiquery, "
        "variables, words, qa1, qa2, qa3; found 'treble'",
        "train.evaluate[3].every: expected at least 0, found -1",
        "train.evaluate[5].kind: expected one of passkey, needles, perplexity; found 'harness'",
        "train.evaluate[0].data: has no effect with kind=passkey; remove it, or set "
        "kind=perplexity",
        "train.evaluate[0].lengths: [4096, 4096] names one of them twice; list each once",
        "train.evaluate[1].lengths: not set, and kind=needles needs it; give what `pretrain eval "
        "needles` takes as --lengths",
        "train.evaluate[1].filler: not set, and kind=needles needs it; give what `pretrain eval "
        "needles` takes as --filler",
        "train.evaluate[2].depths: has no effect with kind=needles; remove it, or set kind=passkey",
        "train.evaluate[2].lengths: not set, and kind=needles needs it; give what `pretrain eval "
        "needles` takes as --lengths",
        "train.evaluate[2].filler: not set, and kind=needles needs it; give what `pretrain eval "
        "needles` takes as --filler",
        "train.evaluate[2].name: 'step' is a key of every record; choose another",
        "train.evaluate[3].lengths: has no effect with kind=perplexity; remove it, or set "
        "kind=passkey or needles",
        "train.evaluate[3].data: not set, and kind=perplexity needs it; give what `pretrain eval "
        "perplexity` takes as --data",
        "train.evaluate[4].depths: none given; list some, e.g. [0, 0.5, 1]",
        "train.evaluate[5].lengths: not set, and kind=passkey needs it; give what `pretrain eval "
        "passkey` takes as --lengths",
        "train.evaluate: two evaluations have the name 'passkey'; give each a different `name`",
    ]


def test_evaluations_name_the_tasks_of_recall_and_every_one_of_their_settings() -> None:
    assert ["passkey", *EvaluationConfig(kind="needles").tasks_asked] == list(TASKS)
    assert EvaluationConfig(kind="perplexity").tasks_asked == []
    assert EvaluationConfig(kind="needles").depths_asked == [None]
    read = {name for traits in EVALUATIONS.values() for name in traits.settings}
    own = {field.name for field in fields(EvaluationConfig)}
    assert own == read | {"kind", "every", "name"}


def test_all_mistakes_in_a_schedule_of_weights_are_reported_at_once() -> None:
    schedule = "[[1000000, 1], [3, -1], [4.5, 1], [7], [9e6, 2]]"
    mix = f"data.mix=[{{data: a, weight: 2, weights: {schedule}}}, {{data: b}}]"
    assert problems("data.train=''", mix, "train.steps=9000000") == [
        "data.mix[0].weight: has no effect beside weights; remove one of them",
        "data.mix[0].weights[0]: the first weight holds from step 0 on, found 1000000",
        "data.mix[0].weights[1]: step 3 is not after 1000000; list the steps in order",
        "data.mix[0].weights[1]: expected a weight of at least 0, found -1",
        "data.mix[0].weights[2]: expected a whole number of steps, found 4.5",
        "data.mix[0].weights[3]: expected [step, weight], found [7]",
        "data.mix[0].weights[4]: never holds, since train.steps=9000000 and it begins after step "
        "9000000; remove it, or raise train.steps",
    ]


def test_a_schedule_of_weights_is_stored_and_counted() -> None:
    mix = "data.mix=[{data: a, weights: [[0, 1], [40, 0]]}, {data: b, weights: [[0, 3], [80, 5]]}]"
    config = load(None, ["run.directory=r", "train.steps=100", mix])
    assert settings.from_plain(Config, json.loads(json.dumps(settings.to_plain(config)))) == config
    assert config.data.phases == [0, 40, 80]
    first, second = config.data.mix
    assert [first.weight_after(step) for step in (0, 39, 40, 99)] == [1, 1, 0, 0]
    assert [second.weight_after(step) for step in (0, 79, 80)] == [3, 3, 5]
    # A quarter of the first 40 of 100 steps, and nothing of the others.
    assert config.data.shares(100) == pytest.approx({"a": 0.1, "b": 0.9})
