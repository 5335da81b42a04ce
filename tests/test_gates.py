"""The plot of gates by layer: from models, and from the reports that recipes keep."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gates
import pytest
import torch

from pretrain.config.memory import MemorizingConfig, MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.model.transformer import Transformer


def _model(memory: MemoryConfig) -> Transformer:
    config = ModelConfig(
        d_model=16, n_layers=3, n_heads=2, n_kv_heads=2, d_head=8, d_ff=16, memory=memory
    )
    return Transformer(config, 11)


def test_gates_are_the_shares_of_the_memory_by_layer_and_head() -> None:
    model = _model(MemoryConfig(kind="linear"))
    named = dict(model.named_parameters())
    betas = {
        "layers.0.attention.gate": [0.0, math.log(3)],
        "layers.2.attention.gate": [-20.0, 20.0],
    }
    for name, values in betas.items():
        named[name].data = torch.tensor(values, dtype=torch.bfloat16)
    first, _, last = gates.of(model)
    assert first == pytest.approx([0.5, 0.75], abs=2e-3)
    assert last == pytest.approx([0.0, 1.0], abs=1e-6)


def test_a_layer_without_gates_has_none_and_a_model_without_memory_has_no_layers() -> None:
    assert gates.of(_model(MemoryConfig(kind="none"))) == []
    one = MemoryConfig(kind="memorizing", memorizing=MemorizingConfig(layer=2))
    assert [len(layer) for layer in gates.of(_model(one))] == [0, 2, 0]


def _report(path: Path, layers: list[list[float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gates": layers} if layers else {"rows": []}))


def test_a_panel_has_the_gates_of_all_seeds_of_a_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _report(tmp_path / "novels/delta-1.json", [[0.1, 0.2], [0.3, 0.4]])
    _report(tmp_path / "novels/delta-3.json", [[0.5, 0.6], [0.7, 0.8]])
    _report(tmp_path / "novels/none-1.json", [])
    _report(tmp_path / "passkey/linear-2/passkey-512.json", [[0.9]])
    _report(tmp_path / "passkey/linear-2/passkey-2048.json", [[0.9]])
    drawn = []
    monkeypatch.setattr(gates, "write_figure", lambda path, figure: drawn.append(figure))
    gates.main([str(tmp_path / "p.png"), str(tmp_path / "novels"), str(tmp_path / "passkey")])
    novels, passkey = drawn[0].axes
    assert (novels.get_title(), passkey.get_title()) == ("novels: delta", "passkey: linear")
    places = [dots.get_offsets().tolist() for dots in novels.collections]
    assert places == [
        [[pytest.approx(0.9), 0.1], [pytest.approx(0.9), 0.2]],
        [[pytest.approx(1.9), 0.3], [pytest.approx(1.9), 0.4]],
        [[pytest.approx(1.1), 0.5], [pytest.approx(1.1), 0.6]],
        [[pytest.approx(2.1), 0.7], [pytest.approx(2.1), 0.8]],
    ]
    assert [dots.get_offsets().tolist() for dots in passkey.collections] == [[[1.0, 0.9]]]
    assert (novels.get_xlim(), passkey.get_xlim()) == ((0.5, 2.5), (0.5, 1.5))
    assert capsys.readouterr().out == f"{tmp_path / 'p.png'}\n"


def test_the_plot_is_a_png_file_and_a_directory_without_gates_is_named(tmp_path: Path) -> None:
    _report(tmp_path / "novels/delta-1.json", [[0.1]])
    gates.main([str(tmp_path / "p.png"), str(tmp_path / "novels")])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    _report(tmp_path / "other/none-1.json", [])
    with pytest.raises(SystemExit, match="other: has no report with gates"):
        gates.main([str(tmp_path / "q.png"), str(tmp_path / "other")])


def test_directories_of_one_name_have_panels_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in ("near", "far"):
        _report(tmp_path / out / "reports/delta-1.json", [[0.1]])
    _report(tmp_path / "novels/delta-1.json", [[0.1]])
    drawn = []
    monkeypatch.setattr(gates, "write_figure", lambda path, figure: drawn.append(figure))
    gates.main(["p.png", "near/reports", "far/reports", "novels"])
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == ["near/reports: delta", "far/reports: delta", "novels: delta"]


def test_files_that_are_no_reports_of_a_model_are_passed_over(tmp_path: Path) -> None:
    _report(tmp_path / "reports/passkey/delta-1.json", [[0.1]])
    (tmp_path / "reports/passkey.json").write_text("[]")
    with pytest.raises(SystemExit, match="reports: has no report with gates; give the directory"):
        gates.main([str(tmp_path / "p.png"), str(tmp_path / "reports")])
