"""The table of memories: formulas against states, the paper's figures, reach against models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.dataset import settings
from pretrain.cli.memories import Memories
from pretrain.config import root as configuration
from pretrain.config.memory import MEMORY_KINDS, MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.model.transformer import on_meta
from pretrain.planning import memory_table
from pretrain.planning.memory_table import SYSTEMS, Row
from tests.pretrain.model.small import VOCABULARY, build, random_tokens, starts_at

PAPER = Path(__file__).parents[3] / "configs/paper_pg19.yaml"
of_every_kind = pytest.mark.parametrize("kind", MEMORY_KINDS)

# Of segments of 4 tokens: none of the sizes equals another, the store is read as a whole.
SMALL = {
    "full": ["full.segments=3"],
    "transformer_xl": ["transformer_xl.cache=6"],
    "compressive": ["compressive.cache=8", "compressive.compressed=3", "compressive.rate=2"],
    "memorizing": ["memorizing.capacity=12", "memorizing.cache=3", "memorizing.neighbours=12"],
    "rmt": ["rmt.vectors=3"],
    "autocompressor": ["autocompressor.vectors=2", "autocompressor.capacity=5"],
}


def memory(kind: str, *words: str) -> MemoryConfig:
    return settings.load(MemoryConfig, None, [f"kind={kind}", *SMALL.get(kind, []), *words])


def shape(kind: str, **sizes: int) -> ModelConfig:
    wanted = {"d_model": 10, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_head": 6}
    return ModelConfig(**{**wanted, "segment": 4, **sizes}, memory=memory(kind))


def numbers_of(config: ModelConfig) -> int:
    state = on_meta(config, VOCABULARY).initial_state(1, "meta")
    return sum(x.numel() for layer in state for x in layer if x.is_floating_point())


def test_every_kind_has_a_line() -> None:
    assert set(SYSTEMS) == set(MEMORY_KINDS)


@of_every_kind
def test_the_formula_of_a_state_counts_what_it_holds(kind: str) -> None:
    for sizes in ({}, {"n_kv_heads": 4, "d_model": 16, "n_layers": 2, "d_head": 4}):
        config = shape(kind, **sizes)
        assert SYSTEMS[kind].held(config) == numbers_of(config)


@of_every_kind
def test_where_the_paper_counts_other_numbers_the_table_says_why(kind: str) -> None:
    system, config = SYSTEMS[kind], shape(kind)
    assert bool(system.formula) == (system.published is not None)
    if system.published is not None:
        assert (system.published(config) != system.held(config)) == bool(system.difference)
    else:
        assert system.held(config) == 0 and not MEMORY_KINDS[kind].remembers


def test_the_formulas_give_the_papers_figures_at_its_shape() -> None:
    paper = configuration.load(PAPER).model
    words = {
        "memorizing": ["memorizing.capacity=65536"],
        "rmt": ["rmt.vectors=100"],
    }
    found = {}
    for kind, system in SYSTEMS.items():
        own = settings.load(MemoryConfig, None, [f"kind={kind}", *words.get(kind, [])])
        if system.published is not None:
            found[kind] = system.published(replace(paper, memory=own)) / 1e6
    # Table 2. It counts a store of 65,000 tokens, 183.5M; ours is a whole number of segments.
    assert found["transformer_xl"] == pytest.approx(50, abs=0.5)
    assert found["memorizing"] == pytest.approx(183, rel=0.01)
    assert found["rmt"] == pytest.approx(2.5, abs=0.05)
    assert found["linear"] == found["delta"] == pytest.approx(1.6, abs=0.05)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_table_counts_a_store_in_any_layer(layer: int) -> None:
    own = memory("memorizing", f"memorizing.layer={layer}")
    config = replace(shape("memorizing"), memory=own)
    assert SYSTEMS["memorizing"].held(config) == numbers_of(config)
    assert first_that_matters(config) == 40 - SYSTEMS["memorizing"].reach(config, 40)


@of_every_kind
def test_the_reach_is_that_of_a_model(kind: str) -> None:
    config = shape(kind)
    # Not a window of `full`'s three segments more.
    length = 36 if MEMORY_KINDS[kind].whole_window else 40
    assert first_that_matters(config, length) == length - SYSTEMS[kind].reach(config, length)


def first_that_matters(config: ModelConfig, length: int = 40) -> int:
    """The first token of a document whose change changes the logits after its last one."""
    sizes = {name: getattr(config, name) for name in ("n_layers", "segment")}
    model = build(config.memory, **sizes)
    tokens, starts = random_tokens(1, length), starts_at([0], length=length)

    @torch.no_grad()
    def last(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, starts, model.initial_state(1, "cpu")).logits
        return logits[0, -1]  # type: ignore[no-any-return]

    expected = last(tokens)
    for place in range(length):
        changed = tokens.clone()
        changed[0, place] = (tokens[0, place] + 1) % VOCABULARY
        if not torch.equal(last(changed), expected):
            return place
    raise AssertionError("nothing matters")


def test_the_reach_ends_with_the_document() -> None:
    for kind in MEMORY_KINDS:
        assert SYSTEMS[kind].reach(shape(kind), 4) == 4


def test_flags_are_counted_apart_and_infinis_numbers_are_always_float32() -> None:
    cached = {
        precision: memory_table.row("transformer_xl", shape("transformer_xl"), 16, 40, precision)
        for precision in ("float32", "bf16")
    }
    assert cached["bf16"].numbers == 6 * 10 * 3
    assert cached["bf16"].bytes * 2 == cached["float32"].bytes == 4 * 6 * 10 * 3
    assert cached["bf16"].flag_bytes == cached["float32"].flag_bytes == 6 * 3
    assert memory_table.row("linear", shape("linear"), 16, 40, "bf16").bytes == 4 * 6 * 7 * 2 * 3


def test_the_page_shows_the_table_at_the_papers_shape(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.memory.memorizing.capacity=65536", "model.memory.rmt.vectors=100"]
    Memories(config=PAPER, overrides=words).run()
    page = (PAPER.parents[1] / "docs/memories.md").read_text(encoding="utf-8")
    assert f"pretrain memories configs/{PAPER.name} {' '.join(words)}" in page
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "\n".join(table) in page


def rows(kinds: list[str]) -> dict[str, Row]:
    return {kind: memory_table.row(kind, shape(kind), 24, 40, "float32") for kind in kinds}


def test_flops_are_of_a_window_without_the_output_head() -> None:
    found = rows(["none", "linear"])
    # Projections, local attention, feed-forward; per token, by hand.
    projections, local = 2 * 10 * 6 * (2 * 4 + 2 * 2), 2 * 2 * 4 * 4 * 6
    plain = 3 * (projections + local + 2 * 3 * 10 * ModelConfig().d_ff)
    assert found["none"].forward_flops == plain
    assert found["linear"].forward_flops == plain + 3 * (2 * 4 * 6 * 7 + 2 * 2 * 6 * 6)


def test_the_table_is_printed_and_written_as_markdown_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration.load(
        None, ["run.directory=r", "data.train=d", "train.window_segments=6"]
    )
    config = replace(config, model=shape("none"))
    kinds = {kind: shape(kind) for kind in ("none", "transformer_xl", "linear")}
    assert memory_table.run(config, kinds, 40, tmp_path / "new") == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "new/memories.md").read_text() == printed
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {table[0].count("|")}
    assert [line.split()[1] for line in table[2:]] == list(kinds)
    assert "- transformer_xl: the inputs are kept" in printed and "- linear" not in printed
    report = json.loads((tmp_path / "new/memories.json").read_text())
    assert (report["length"], report["window"]) == (40, 24)
    found = {row["kind"]: row for row in report["kinds"]}
    assert found["transformer_xl"]["published_numbers"] == 2 * 6 * 2 * 6 * 3
    assert found["transformer_xl"]["settings"] == {"transformer_xl": {"cache": 6}}
    assert found["linear"]["numbers"] == 6 * 7 * 2 * 3


def test_counts_have_three_digits_and_the_unit_of_what_they_round_to() -> None:
    counts = (0, 999, 999.6, 1_234, 999_499, 999_500, 25_165_824, 2e9, 1.5e12)
    shown = [memory_table._short(count) for count in counts]
    assert shown == ["0", "999", "1k", "1.23k", "999k", "1M", "25.2M", "2G", "1.5T"]
