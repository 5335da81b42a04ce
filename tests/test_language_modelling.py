"""The comparison of language models: its models, its table, and a whole run of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import evidence
import pytest

from pretrain.config import root as configuration
from pretrain.config.memory import MEMORY_KINDS
from pretrain.model import flops
from tools.recipes import language_modelling, scores
from tools.recipes.language_modelling import TITLES, models, table

WORDS = ["data.train=d", "run.directory=r"]


def test_every_kind_of_memory_is_compared_and_the_base_comes_first() -> None:
    base = configuration.load(language_modelling.CONFIG, WORDS)
    assert set(TITLES) == set(MEMORY_KINDS)
    names = [model.name for model in models(base, list(MEMORY_KINDS))]
    assert names[0] == "none" and set(MEMORY_KINDS) < set(names)
    some = [model.name for model in models(base, ["linear"])]
    assert some == ["none", "linear", "none_lanes", "none_steps"]
    whole = [model.name for model in models(base, ["linear"], shortened=False)]
    assert whole == ["none", "linear"]


def test_models_have_one_size_and_one_budget() -> None:
    base = configuration.load(language_modelling.CONFIG, WORDS)
    sizes, tokens = {}, {}
    for model in models(base, list(MEMORY_KINDS)):
        config = configuration.load(language_modelling.CONFIG, [*WORDS, *model.settings])
        sizes[model.name] = flops.parameters(config.model, 4096)
        tokens[model.name] = config.window * config.data.lanes * config.train.steps
    assert len(set(tokens.values())) == 1 and tokens["none"] >= 10_000_000
    # What a kind adds of its own: gates, vectors, convolutions.
    assert all(size - sizes["none"] < 0.1 * sizes["none"] for size in sizes.values())
    assert sizes["delta"] - sizes["none"] == base.model.n_layers * base.model.n_heads


def test_windows_a_quarter_as_long_have_the_lanes_or_the_tokens_of_the_others() -> None:
    base = configuration.load(language_modelling.CONFIG, WORDS)
    found = {
        model.name: configuration.load(language_modelling.CONFIG, [*WORDS, *model.settings])
        for model in models(base, ["delta"])
    }
    for kind in ("none", "delta"):
        wide, long = found[f"{kind}_lanes"], found[f"{kind}_steps"]
        assert wide.window == long.window == base.window // 4
        assert wide.data.lanes == 4 * base.data.lanes and long.data.lanes == base.data.lanes
        assert wide.train.steps == base.train.steps and long.train.steps == 4 * base.train.steps
        assert long.optim.warmup_steps == 4 * base.optim.warmup_steps


def test_the_table_has_gains_with_intervals_and_the_cost_of_each_model() -> None:
    titles = {"none": "local", "delta": "Delta"}
    reports = {
        name: [
            {
                "documents": 2, "text_bytes": 1234, "tokens": 5678, "parameters": 1000 + size,
                "state_bytes": size, "seconds": 60.0 * (1 + size),
            }
        ]
        for name, size in (("none", 0), ("delta", 2048))
    }  # fmt: skip
    rows = [
        {"model": name, "bits": bits, "interval": (1.0, 3.0), "seeds": [bits],
         "gain": 2.0 - bits, "gain_interval": (0.25, 0.75)}
        for name, bits in (("none", 2.0), ("delta", 1.5))
    ]  # fmt: skip
    far = [{**row, "gain": 2 * row["gain"]} for row in rows]
    text = table(rows, far, titles, reports)
    assert text.startswith("2 whole documents, 1,234 bytes, after 5,678 tokens; 1 seed;")
    assert "| local | 2.0000 (1.0000 to 3.0000) | 2.0000 |  |  | 1,000 | 0 | 1 |" in text
    gains = "+0.5000 (+0.2500 to +0.7500) | +1.0000 (+0.2500 to +0.7500)"
    assert f"| Delta | 1.5000 (1.0000 to 3.0000) | 1.5000 | {gains} | 3,048 | 2,048 |" in text


@pytest.mark.parametrize("words", [["--kinds", "linaer"], ["--corpora", "books"]])
def test_an_unknown_kind_or_corpus_is_refused_with_those_there_are(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        language_modelling.main([str(tmp_path), str(tmp_path / "out"), *words])
    found = capsys.readouterr().err
    assert f"{words[1]!r}: expected some of " in found
    assert not (tmp_path / "out").exists()


def test_mistakes_in_settings_are_reported_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        language_modelling.main([str(tmp_path), str(tmp_path / "out"), "model.d_modle=8"])
    assert "model.d_modle" in str(ended.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_recipe_makes_a_table_of_packages_and_repeats_no_finished_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [
        str(tmp_path), str(out), "--corpora", "repositories", "--kinds", "delta,rmt", "--steps",
        "2", "--seeds", "2", "--documents", "2", "--jobs", "2", "model.n_layers=1",
        "model.d_model=16", "model.n_heads=2", "model.n_kv_heads=2", "model.d_head=8",
        "model.d_ff=16", "optim.warmup_steps=1", "data.lanes=2", "train.window_segments=4",
        "train.compile=false", "model.segment=64",
    ]  # fmt: skip
    language_modelling.main(words)
    made = out / "repositories" / "comparison.json"
    found = json.loads(made.read_text())
    names = ["none", "delta", "rmt", "none_lanes", "none_steps", "delta_lanes", "delta_steps"]
    assert [row["model"] for row in found["rows"]] == names
    for row, far in zip(found["rows"], found["far"], strict=True):
        assert len(row["seeds"]) == 2 and 2 < row["bits"] < 12 and math.isfinite(far["gain"])
    kept = out / "reports" / "repositories"
    reports = {
        name: [json.loads((kept / f"{name}-{seed}.json").read_text()) for seed in (1, 2)]
        for name in names
    }
    assert {report["tokens"] for two in reports.values() for report in two} == {2 * 2 * 4 * 64}
    assert scores.scores_of(reports["rmt"]).nats.shape == (2, 2)
    assert (made.parent / "positions.png").exists() and (made.parent / "gates.png").exists()
    table = (made.parent / "comparison.md").read_text()
    assert table.endswith(f"\n\nCommit {evidence.commit()}.\n")
    # With the reports alone, somewhere else: nothing is prepared, trained or evaluated.
    capfd.readouterr()
    other = tmp_path / "other"
    words[1:2] = [str(other), "--reports", str(out / "reports")]
    language_modelling.main(words)
    assert "$" not in capfd.readouterr().out
    assert (other / "repositories" / "comparison.md").read_text() == table
