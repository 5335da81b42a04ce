"""Promise 14: secrets of the environment, of credentials and of URLs stay where they are."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.promises import data_sets
from tools.promises.campaign import Promise, Room, check

ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 600  # seconds for a command
_LOGS = "said"  # what commands print; Slurm would write it to files

VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN", "OPENAI_API_KEY", "SSH_AUTH_SOCK"),
    *("DATABASE_PASSWORD", "SLURM_JWT", "MY_OWN_SECRET"),
)
FILES = (".netrc", ".aws/credentials")
URLS = ("data.train", "data.validation", "data.mix", "data.preface", "sources", "decontaminate")
SECRETS: dict[str, str] = {
    name: f"Secret{number:02d}Q7x9Zk3" for number, name in enumerate((*VARIABLES, *FILES, *URLS))
}
"""A value of each place; of 20 places."""

_CONFIG = """
data: {train: set, lanes: 2}
model: {d_model: 16, n_layers: 1, n_heads: 2, n_kv_heads: 2, d_head: 8, d_ff: 16, segment: 8}
train: {steps: 3, window_segments: 2, log_every: 1, validate_every: 0}
checkpoint: {every: 2}
optim: {warmup_steps: 1}
run: {directory: run}
wandb: {mode: offline}
launch: {device: cpu, ranks: 1}
"""


def stays_secret(seed: int, room: Room) -> dict[str, Any]:
    """Look for one of the planted secrets in whatever the commands wrote or printed."""
    work = room.made("work", _work)
    name = [*SECRETS][seed % len(SECRETS)]
    secret = SECRETS[name].encode()
    hits = [str(path.relative_to(work)) for path in _files(work) if secret in _bytes(path)]
    check(not hits, f"the secret of {name} is in {hits}")
    return {"place": name, "files": len(_files(work))}


def _files(work: Path) -> list[Path]:
    """All but the files in which secrets were planted."""
    found = [path for path in work.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in found if (work / "home") not in path.parents or "cache" in str(path)]


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data


def _work(work: Path) -> None:
    """Commands in an environment that is full of secrets; raises where one ends in another way."""
    work.mkdir()
    home = work / "home"
    (home / ".aws").mkdir(parents=True)
    (home / ".netrc").write_text(f"machine h login u password {SECRETS['.netrc']}\n")
    key = f"[default]\naws_secret_access_key = {SECRETS['.aws/credentials']}\n"
    (home / ".aws" / "credentials").write_text(key)
    environment = {
        **os.environ, **{name: SECRETS[name] for name in VARIABLES}, "HOME": str(home),
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_DIR": str(work),
    }  # fmt: skip
    (work / "texts").mkdir()
    for number in range(30):
        (work / "texts" / f"{number}.txt").write_text(f"Text number {number} of some. " * 20)
    data_sets.small(work / "set", seed=1, documents=20, count=2)
    (work / "c.yaml").write_text(_CONFIG)
    (work / "d.yaml").write_text(
        "root: texts\noutput: prepared\ntokenizer: {vocab_size: 300}\nworkers: 1\n"
        "sources: [{name: s, paths: ['*.txt']}]\n"
    )
    (work / "site.env").write_text(f"GPUS_PER_NODE=0 PYTHON={sys.executable}\n")
    _run(work, environment, 0, "data_prep.cli", "run", "d.yaml")
    _run(work, environment, 0, "data_prep.cli", "report", "prepared")
    _run(work, environment, 0, "pretrain.cli", "train", "c.yaml")
    _submit(work, environment, 0)
    for name in URLS:
        _refused(work, environment, name)


def _refused(work: Path, environment: Mapping[str, str], name: str) -> None:
    url = f"https://user:{SECRETS[name]}@127.0.0.1:9/set"
    if name == "data.preface":
        url = f"https://127.0.0.1:9/set?X-Amz-Signature={SECRETS[name]}"
    if name == "sources":
        word = f"sources=[{{name: s, paths: ['{url}']}}]"
        _run(work, environment, 2, "data_prep.cli", "run", "d.yaml", word, "output=other")
    elif name == "decontaminate":
        word = f"sources=[{{name: s, paths: ['*'], cleaning: {{decontaminate: ['{url}']}}}}]"
        _run(work, environment, 2, "data_prep.cli", "run", "d.yaml", word, "output=other")
    else:
        word = f"data.mix=[{{data: '{url}', weight: 1}}]" if name == "data.mix" else f"{name}={url}"
        _run(work, environment, 2, "pretrain.cli", "train", "c.yaml", word, "run.directory=other")
        _submit(work, environment, 2, "--", word)


def _submit(work: Path, environment: Mapping[str, str], code: int, *words: str) -> None:
    command = [str(ROOT / "slurm" / "submit"), "train", "c.yaml", "--nodes", "1", "--dry-run"]
    _logged(work, environment, code, [*command, "--site", "site.env", *words])


def _run(work: Path, environment: Mapping[str, str], code: int, module: str, *words: str) -> None:
    _logged(work, environment, code, [sys.executable, "-m", module, *words])


def _logged(work: Path, environment: Mapping[str, str], code: int, command: list[str]) -> None:
    done = subprocess.run(
        command, cwd=work, env=dict(environment), capture_output=True, text=True,
        timeout=_PATIENCE,
    )  # fmt: skip
    number = len(list(work.glob(f"{_LOGS}-*.json")))
    said = [done.returncode, done.stdout, done.stderr]
    (work / f"{_LOGS}-{number:02d}.json").write_text(json.dumps(said, indent=1))
    check(done.returncode == code, f"{command[:5]} ended with {said}")


PROMISES = (
    Promise(
        14, "secrets", "no secret reaches disk, tracker or Slurm",
        len(SECRETS), "planted secrets", stays_secret, limit=1800.0,
        how="variables, files of credentials, and URLs in settings (refused), around data-prep "
        "run and report, training with an offline tracker, and slurm/submit; then every file that "
        "was written, and what was printed, is searched.",
    ),
)  # fmt: skip
