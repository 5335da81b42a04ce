"""Without the system's programs the tests that need them are skipped, and nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import PROGRAMS, ROOT, TOOLS
from tests.programs import lacking

SCRIPT = ROOT / "tools" / "system_packages"


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has what scripts are made of, and no apt-get."""
    for name in ("bash", "dirname", "grep", "id", "readlink", "seq", "uname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    return {**os.environ, "PATH": str(tmp_path), "CLUSTER_DIR": str(tmp_path / "cluster")}


def test_where_there_is_no_apt_get_one_sentence_says_what_is_missing(bare: dict[str, str]) -> None:
    done = subprocess.run([SCRIPT], env=bare, capture_output=True, text=True, check=True)
    (line,) = (done.stdout + done.stderr).splitlines()
    assert "slurm-client" in line and "chromium" in line
    assert "which this script installs only on Debian and Ubuntu" in line
    assert line.endswith("the tests that need them are skipped")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_cluster_says_what_it_lacks_and_installs_nothing(bare: dict[str, str]) -> None:
    done = subprocess.run([TOOLS / "up"], env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("up: needs ")
    assert done.stderr.endswith(": run tools/system_packages\n")
    assert "sbatch" in done.stderr and "sbatch" in PROGRAMS
    assert not Path(bare["CLUSTER_DIR"]).exists()


def test_a_run_of_tests_ends_with_how_many_were_skipped_for_want_of_what(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "browser",
         "tests/data_prep/report/test_page.py"],
        cwd=ROOT, env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "3 tests skipped, which need chromium\ntools/system_packages installs" in done.stdout


def test_reasons_of_other_skips_are_not_counted() -> None:
    reasons = ["Skipped: needs a GPU", "Skipped: needs sbatch, ip: run tools/system_packages"] * 2
    assert lacking(reasons) == {"sbatch, ip": 2}
