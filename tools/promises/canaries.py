"""Promise 13: no input executes code.

A canary would make an empty file if anything ran it. It is put where inputs, names and settings go.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import config as data_prep_config
from data_prep.dataset import shards
from data_prep.dataset.shards import DataError, ShardInfo
from data_prep.pipeline import pipeline
from pretrain.checkpoint.load import Checkpoint, newest_good
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.ranks import SoloRanks
from pretrain.config import root as pretrain_config
from pretrain.config.data import CacheConfig
from pretrain.data.lanes import Dataset
from tools.promises import data_sets, kills
from tools.promises.campaign import Promise, Room, check

ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 120  # seconds for a command


class Canary:
    """Texts and objects that make the file `mark` if anything runs them."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark
        self.command = f"touch {mark}"

    def texts(self) -> list[str]:
        """For shells, Python, YAML, templates, and resolvers of configurations."""
        python = f"__import__('os').system('{self.command}')"
        return [
            f"$({self.command})", f"`{self.command}`", f"x; {self.command}; x", f"| {self.command}",
            f"x\n{self.command}\n", f"'; {self.command}; '", f'"; {self.command}; "',
            f"pipe:{self.command}", python, f"{{{{ {python} }}}}",
            f"!!python/object/apply:os.system ['{self.command}']",
            f"${{oc.create:{python}}}", f"${{{python}}}", f"%({self.command})s",
            "{{ cycler.__init__.__globals__.os.system('" + self.command + "') }}",
        ]  # fmt: skip

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)

    def pickled(self) -> bytes:
        """A pickle that runs the command where it is loaded."""
        return pickle.dumps(self)


Place = Callable[[Canary, str, Path], object]


def _in_records(canary: Canary, text: str, here: Path) -> object:
    (here / "in").mkdir()
    record = {"text": text, "id": text, text: text}
    (here / "in" / "a.jsonl").write_text(json.dumps(record) + "\n" + text)
    (here / "in" / "b.txt").write_text(text)
    return _prepare(here)


def _in_names(canary: Canary, text: str, here: Path) -> object:
    name = text.replace("/", "_")
    (here / "in" / name).mkdir(parents=True)
    (here / "in" / f"{name}.txt").write_text("a text under an odd name")
    (here / "in" / name / f"{name}.jsonl").write_text('{"text": "another one"}\n')
    return _prepare(here)


def _prepare(here: Path) -> object:
    return pipeline.run(data_prep_config.load(None, [
        f"root={here / 'in'}", f"output={here / 'set'}", "workers=1", "tokenizer.vocab_size=300",
        "sources=[{name: s, paths: ['**/*.*']}]", "shards.count=1",
    ]))  # fmt: skip


def _in_settings(canary: Canary, text: str, here: Path) -> object:
    for number, written in enumerate((text, json.dumps(text))):
        path = here / f"{number}.yaml"
        path.write_text(f"run: {{directory: d}}\ndata:\n  train: {written}\nwandb: {written}\n")
        for load in (data_prep_config.load, pretrain_config.load):
            with suppress(ValueError):
                load(path)
    return None


def _in_words(canary: Canary, text: str, here: Path) -> object:
    for key in ("data.train", "data.mix", "train.steps", "wandb", "run.directory", "sources"):
        for load in (data_prep_config.load, pretrain_config.load):
            with suppress(ValueError):
                load(None, [f"{key}={text}"])
            with suppress(ValueError):
                load(None, [f"{key}=[{text}]"])
    return None


def _as_a_data_set(canary: Canary, text: str, here: Path) -> object:
    return Dataset(text, CacheConfig(str(here / "cache"), 1.0))


def _as_an_input(canary: Canary, text: str, here: Path) -> object:
    wanted = data_prep_config.load(
        None,
        [f"root={here}", f"output={here / 'set'}", f"sources=[{{name: s, paths: ['{text}']}}]"],
    )
    return pipeline.run(wanted)


def _in_a_manifest(canary: Canary, text: str, here: Path) -> object:
    manifest = data_sets.small(here / "set", seed=1, documents=4, count=1)
    path = here / "set" / shards.MANIFEST
    data = path.read_text()
    for name in (manifest.shards[0].name, manifest.tokenizer.file):
        plain = json.loads(data.replace(name, json.dumps(text)[1:-1]))
        del plain["checksum"]
        path.write_text(json.dumps(plain))
        with suppress(DataError):
            deep = Dataset(here / "set")
            list(deep.documents())
            deep.files.tokenizer()
    return None


def _in_an_array(canary: Canary, text: str, here: Path) -> object:
    out = io.BytesIO()
    np.save(out, np.array([canary, text], dtype=object), allow_pickle=True)
    return _read_shard(
        here, {"00000000.json": b'{"id": "a"}', "00000000.tokens.npy": out.getvalue()}
    )


def _as_a_member(canary: Canary, text: str, here: Path) -> object:
    members = {f"00000000.{suffix}": canary.pickled() for suffix in ("pyd", "pkl", "pth", "pt")}
    members |= {"00000000.json": json.dumps({"id": text}).encode(), "00000000.tokens.npy": b"\x93"}
    return _read_shard(here, members)


def _read_shard(here: Path, members: dict[str, bytes]) -> object:
    path = here / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    info_ = ShardInfo(path.name, path.stat().st_size, digest, 1, 2)
    shards.check_shard(path, info_)
    return list(shards.read_shard(path, info_))


def _as_a_checkpoint(canary: Canary, text: str, here: Path) -> object:
    """In the place of the tensors, under checksums that hold."""
    root = here / "checkpoints"
    kills.save_step(root, 1, SoloRanks())
    step = root / "step-00000001"
    (step / "state.pt").write_bytes(canary.pickled())
    plain = json.loads((step / "manifest.json").read_bytes())
    name = next(name for name in plain["files"] if name.endswith(".safetensors"))
    (step / name).write_bytes(canary.pickled())
    digest = hashlib.sha256(canary.pickled()).hexdigest()
    plain["files"][name] = {"bytes": len(canary.pickled()), "sha256": digest}
    plain["trainer"] = {"text": text}
    data = json.dumps(plain).encode()
    (step / "manifest.json").write_bytes(data)
    seal = f"{hashlib.sha256(data).hexdigest()}  manifest.json\n"
    (step / "manifest.sha256").write_text(seal)
    found = newest_good(root, SoloRanks())
    assert found.path is not None
    with Checkpoint(found.path) as checkpoint:
        return checkpoint.tensor("w")


def _in_a_model(canary: Canary, text: str, here: Path) -> object:
    """A Hugging Face model that brings code, pickles and a template."""
    from pretrain.convert import llama

    model = here / "model"
    model.mkdir()
    code = f"import os\nos.system({canary.command!r})\n"
    for name in ("modeling_llama.py", "configuration_llama.py", "tokenization.py"):
        (model / name).write_text(code)
    auto = {"AutoConfig": "configuration_llama.C", "AutoModelForCausalLM": "modeling_llama.M"}
    plain = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": auto,
             "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
             "intermediate_size": 48, "vocab_size": 320, "name": text}  # fmt: skip
    (model / "config.json").write_text(json.dumps(plain))
    (model / "pytorch_model.bin").write_bytes(canary.pickled())
    (model / "model.safetensors").write_bytes(canary.pickled())
    told = {"chat_template": text, "tokenizer_class": "tokenization.T",
            "auto_map": {"AutoTokenizer": ["tokenization.T", None]}}  # fmt: skip
    (model / "tokenizer_config.json").write_text(json.dumps(told))
    (model / "chat_template.jinja").write_text(text)
    return llama.run(model, here / "imported", [], None)


def _in_the_working_directory(canary: Canary, text: str, here: Path) -> object:
    """Modules with the names of what the commands import."""
    for name in ("pretrain", "data_prep", "torch", "yaml", "json", "random", "numpy"):
        (here / f"{name}.py").write_text(f"import os\nos.system({canary.command!r})\n")
    program = Path(sys.executable).parent / ("pretrain" if len(text) % 2 else "data-prep")
    verb = ["check", "c.yaml"] if len(text) % 2 else ["run", "c.yaml", "--dry-run"]
    (here / "c.yaml").write_text("{}\n")
    return subprocess.run([str(program), *verb], cwd=here, capture_output=True, timeout=_PATIENCE)


def _in_a_job(canary: Canary, text: str, here: Path) -> object:
    """Words of a job's command line; the script is printed, and parsed by a shell."""
    (here / "c.yaml").write_text("run: {directory: run}\ndata: {train: data}\n")
    (here / "site.env").write_text(f"GPUS_PER_NODE=0 PYTHON={sys.executable}\n")
    words = ["c.yaml", "--nodes", "1", "--dry-run", "--site", "site.env", f"--comment={text}", "--"]
    done = subprocess.run(
        [str(ROOT / "slurm" / "submit"), "train", *words, f"run.directory={text}"],
        cwd=here, capture_output=True, timeout=_PATIENCE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True)


PLACES: tuple[Place, ...] = (
    *(_in_records, _in_names, _in_settings, _in_words, _as_a_data_set, _as_an_input),
    *(_in_a_manifest, _in_an_array, _as_a_member, _as_a_checkpoint, _in_a_model),
    *(_in_the_working_directory, _in_a_job),
)


def runs_nothing(seed: int, room: Room) -> dict[str, Any]:
    """A canary in one of the places; whether the input is taken or refused does not matter here."""
    mark = room.here.parent / f"canary-{seed}"
    canary = Canary(mark)
    place = PLACES[seed % len(PLACES)]
    texts = canary.texts()
    text = texts[seed // len(PLACES) % len(texts)]
    os.chdir(room.here)
    refused = ""
    try:
        place(canary, text, room.here)
    except (ValueError, OSError, CheckpointError) as error:
        refused = type(error).__name__
    except Exception as error:  # a library's own refusal
        refused = f"{type(error).__module__}.{type(error).__name__}"
    ran = mark.exists()
    mark.unlink(missing_ok=True)
    check(not ran, f"{place.__name__}: {text!r} was run")
    return {"place": place.__name__.strip("_"), "text": text.replace(str(mark), "CANARY"),
            "refused": refused}  # fmt: skip


PROMISES = (
    Promise(
        13, "canaries", "no input executes code",
        104, "canaries", runs_nothing, limit=300.0,
        how="commands of shells, Python, YAML, templates and pickles that would make a file, "
        + ", ".join(place.__name__.strip("_").replace("_", " ") for place in PLACES) + ".",
    ),
)  # fmt: skip
