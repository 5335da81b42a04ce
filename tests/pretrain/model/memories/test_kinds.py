"""`memory.kind` decides in one place, and what is known of a kind before torch is true."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.config.memory import MEMORY_KINDS, MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.model.memories.kinds import attention_of, is_of_memory
from pretrain.model.transformer import on_meta
from tests.pretrain import kinds

ROOT = Path(__file__).parents[4]
SOURCES = sorted(path for room in ("pretrain", "data_prep") for path in (ROOT / room).rglob("*.py"))
# It is loaded without pretrain, and so compares what its config.json says.
EXPORTED = ROOT / "pretrain/convert/modeling_infini_llama.py"


def decisions(source: str) -> Iterator[str]:
    """Expressions of `source` that decide by a memory's kind: compared, matched or looked up."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts: list[ast.expr] = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            parts = [node.subject]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        else:
            continue
        by_kind = any(ast.unparse(part).endswith("memory.kind") for part in parts)
        if by_kind or any(isinstance(p, ast.Constant) and p.value == "delta" for p in parts):
            yield ast.unparse(node)


def test_decisions_are_found() -> None:
    found = decisions("if shape.memory.kind != 'none' or x == 'delta' or KINDS[memory.kind]: pass")
    assert sorted(found) == [
        "KINDS[memory.kind]", "shape.memory.kind != 'none'", "x == 'delta'"
    ]  # fmt: skip
    assert not list(decisions("report = {'memory_kind': config.memory.kind}"))


def test_only_kinds_decides_by_the_kind_of_a_memory() -> None:
    found = {
        str(path.relative_to(ROOT)): text
        for path in SOURCES
        if path != EXPORTED and (text := list(decisions(path.read_text(encoding="utf-8"))))
    }
    assert found == {"pretrain/model/memories/kinds.py": ["_KINDS[memory.kind]"]}


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_every_kind_of_the_configuration_has_an_attention(kind: str) -> None:
    assert attention_of(MemoryConfig(kind=kind)).__doc__  # type: ignore[arg-type]


def test_every_kind_is_in_the_list_of_the_tests() -> None:
    assert set(kinds.KINDS) == set(MEMORY_KINDS)


@kinds.of_every_kind
def test_a_memorys_parameters_are_those_that_a_model_without_it_lacks(kind: str) -> None:
    own, plain = (
        {name for name, _ in on_meta(ModelConfig(memory=memory), 300).named_parameters()}
        for memory in (kinds.memory(kind), MemoryConfig(kind="none"))
    )
    assert {name for name in own if is_of_memory(name)} == own - plain
    assert own >= plain and not any(map(is_of_memory, plain))
