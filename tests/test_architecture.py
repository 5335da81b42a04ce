"""What may import what (docs/architecture.md), read from the imports; and the form of the code."""

from __future__ import annotations

import ast
import functools
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pretrain", "data_prep")

# A room (a package or a module of the first level) imports from its own and from those below it.
FLOORS = {
    "pretrain.config": 1,
    "pretrain.data": 2,
    "pretrain.model": 2,
    "pretrain.checkpoint": 2,
    "pretrain.jobs": 3,
    "pretrain.trained": 3,
    "pretrain.evaluate": 4,
    "pretrain.training": 5,
    "pretrain.planning": 6,
    "pretrain.convert": 6,
    "pretrain.plot": 6,
    "pretrain.report": 6,
    "pretrain.cli": 7,
    "data_prep.dataset": 1,
    "data_prep.accounts": 2,
    "data_prep.config": 2,
    "data_prep.pages": 2,
    "data_prep.tokenizer": 2,
    "data_prep.recall": 3,
    "data_prep.report": 3,
    "data_prep.sources": 3,
    "data_prep.pipeline": 4,
    "data_prep.adapter": 5,
    "data_prep.cli": 5,
}
# What pretrain takes from data_prep: the contract of data sets, the tokenizer, the tasks of recall,
# which training and evaluation must word alike, the frame and charts of reports, and the reader of
# URLs.
SHARED = {"dataset", "tokenizer", "recall", "pages"}
READER = "data_prep.sources.storage"
# What a model may import: no ranks, no files, no engine.
OF_A_MODEL = {"pretrain.config", "pretrain.model", "torch", "flash_attn", "triton"} | {
    *("__future__", "abc", "collections", "contextlib", "dataclasses", "functools", "importlib"),
    *("logging", "math", "typing"),
}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return found


MODULES = modules()


@functools.cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree, which several tests read."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, anywhere in it; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room_of(name: str) -> str:
    """The package or module of the first level that a dotted name lies in."""
    return ".".join(name.split(".")[:2])


def module_of(name: str) -> str | None:
    """The module of ours that an imported name is, or is taken from; None for others."""
    return next((one for one in (name, name.rpartition(".")[0]) if one in MODULES), None)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and length in lines of every function, decorators and docstring included."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            assert node.end_lineno is not None
            yield f"{path.relative_to(ROOT)}:{node.name}", node.end_lineno - first + 1


def of(package: str) -> list[str]:
    return [name for name in MODULES if is_under(name, package)]


def test_there_is_something_to_look_at() -> None:
    assert len(of("pretrain")) > 20 and len(of("data_prep")) > 10
    assert "pretrain.training.engine" in MODULES
    assert "data_prep.dataset.shards.DataError" in imports(MODULES["pretrain.data.loader"])
    assert "deepspeed" in imports(MODULES["pretrain.training.engine"])


@pytest.mark.parametrize("name", of("data_prep"))
def test_data_prep_knows_neither_torch_nor_pretrain(name: str) -> None:
    for imported in imports(MODULES[name]):
        assert imported.split(".")[0] not in ("torch", "pretrain", "deepspeed"), imported


@pytest.mark.parametrize("name", of("pretrain"))
def test_pretrain_takes_from_data_prep_only_what_is_shared(name: str) -> None:
    for imported in imports(MODULES[name]):
        parts = imported.split(".")
        if parts[0] == "data_prep":
            shared = len(parts) > 1 and parts[1] in SHARED
            assert shared or is_under(imported, READER), imported


@pytest.mark.parametrize("name", of("pretrain.model"))
def test_a_model_knows_tensors_and_its_configuration_alone(name: str) -> None:
    for imported in imports(MODULES[name]):
        assert any(is_under(imported, package) for package in OF_A_MODEL), imported
        assert not is_under(imported, "torch.distributed"), imported


@pytest.mark.parametrize("name", [*of("pretrain.data"), *of("pretrain.checkpoint")])
def test_data_and_checkpoints_know_no_model(name: str) -> None:
    own = ".".join(name.split(".")[:2])
    for imported in imports(MODULES[name]):
        known = any(is_under(imported, package) for package in (own, "pretrain.config.data"))
        assert known or not is_under(imported, "pretrain"), imported


@pytest.mark.parametrize("name", list(MODULES))
def test_one_module_alone_imports_deepspeed(name: str) -> None:
    if any(is_under(imported, "deepspeed") for imported in imports(MODULES[name])):
        assert name == "pretrain.training.engine"


@pytest.mark.parametrize("name", list(MODULES))
def test_no_module_imports_from_another_room_on_its_own_floor_or_above(name: str) -> None:
    if name in PACKAGES:
        return
    own = room_of(name)
    assert own in FLOORS, f"{own} has no floor; give it one in FLOORS"
    for imported in imports(MODULES[name]):
        other = room_of(imported)
        if imported.split(".")[0] == name.split(".")[0] and other not in (own, *PACKAGES):
            assert FLOORS[other] < FLOORS[own], f"{name} imports {imported}"


def test_no_imports_go_in_a_circle() -> None:
    arrows = {
        name: {found for one in imports(path) if (found := module_of(one)) and found != name}
        for name, path in MODULES.items()
    }
    while leaves := [name for name, seen in arrows.items() if not seen & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert arrows == {}


WITHOUT_TORCH = ["config", "cli.main", "jobs.launch", "jobs.job", "jobs.origin", "jobs.watchdog",
                 "checkpoint.attempts", "checkpoint.manifest", "evaluate.questions", "cli.train",
                 "cli.jobs", "cli.evaluate", "cli.convert", "cli.outcome", "jobs.start_checks",
                 "training.rank"]  # fmt: skip


@pytest.mark.parametrize("name", [f"pretrain.{name}" for name in WITHOUT_TORCH])
def test_a_configuration_is_checked_and_a_rank_watched_without_torch(name: str) -> None:
    tree = parsed(MODULES[name])
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in at_import:
        names = [alias.name for alias in node.names]
        module = node.module if isinstance(node, ast.ImportFrom) else None
        for imported in [*names, module or ""]:
            assert imported.split(".")[0] != "torch"


@pytest.mark.parametrize("name", list(MODULES))
def test_no_drawer_for_things_without_a_place(name: str) -> None:
    names = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "core", "base"}
    assert not names & set(name.split("."))


@pytest.mark.parametrize("name", list(MODULES))
def test_a_package_exports_nothing_of_others(name: str) -> None:
    if MODULES[name].name == "__init__.py":
        tree = parsed(MODULES[name])
        assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))


def test_functions_and_classes_are_short() -> None:
    lengths = {name: length for path in MODULES.values() for name, length in functions(path)}
    assert {name: length for name, length in lengths.items() if length > 60} == {}
    assert statistics.quantiles(lengths.values(), n=10)[-1] < 30
    classes = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, path in MODULES.items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef)
    }
    assert {name: length for name, length in classes.items() if length > 250} == {}


@pytest.mark.parametrize("name", list(MODULES))
def test_every_signature_is_typed(name: str) -> None:
    for node in ast.walk(parsed(MODULES[name])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [
                a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")
            ]
            assert not untyped and node.returns is not None, f"{name}.{node.name}: {untyped}"
