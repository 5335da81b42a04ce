"""What tells a run from other directories."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.attempts import claim
from pretrain.checkpoint.manifest import step_name
from pretrain.checkpoint.runs import is_run


def test_a_directory_that_other_programs_named_checkpoints_or_attempts_makes_no_run(
    tmp_path: Path,
) -> None:
    for name in ("checkpoints", "attempts"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoints" / "epoch=3.ckpt").touch()
    assert not is_run(tmp_path)


def test_a_run_has_a_checkpoint_or_a_first_attempt(tmp_path: Path) -> None:
    (tmp_path / "imported" / "checkpoints" / step_name(0)).mkdir(parents=True)
    claim(tmp_path / "young", ranks=1, steps=1, most_without_progress=None)
    assert is_run(tmp_path / "imported") and is_run(tmp_path / "young")
