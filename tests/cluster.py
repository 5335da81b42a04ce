"""A Slurm cluster of three nodes on this machine, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import programs

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools" / "slurm_cluster"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "pgrep")


@dataclass
class Cluster:
    """A controller, ctl, and the nodes n1, n2 and n3."""

    directory: Path

    def on(
        self, host: str, *command: str | Path, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host."""
        return self.tool("on", host, *command, cwd=cwd)

    def fault(self, name: str, *where: str | Path) -> None:
        """Inject a fault that `tools/slurm_cluster/fault` lists."""
        done = self.tool("fault", name, *where)
        assert done.returncode == 0, (name, where, done.stderr)

    def tool(
        self, name: str, *words: str | Path, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of tools/slurm_cluster on this cluster."""
        return subprocess.run(
            [TOOLS / name, *words],
            env={
                **os.environ,
                "CLUSTER_DIR": str(self.directory),
                "CLUSTER_NODES": "3",
                "PYTHONPATH": str(ROOT),
            },
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def skip_without_cluster() -> None:
    """Skip the running test where no cluster can be started."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("a Slurm cluster in namespaces needs root on Linux")
    missing = [name for name in PROGRAMS if programs.find(name) is None]
    if missing:
        programs.skip_without(*missing)


@contextmanager
def running_cluster(directory: Path) -> Iterator[Cluster]:
    """A cluster in `directory` that sees the present mounts; skips the test where none can run."""
    skip_without_cluster()
    cluster = Cluster(directory)
    up = cluster.tool("up")
    try:
        if up.returncode:
            pytest.skip(f"no Slurm cluster: {(up.stderr.strip() or up.stdout.strip())[-300:]}")
        yield cluster
    finally:
        cluster.tool("down")
