"""Where curves of a run go besides `metrics.jsonl`: wandb and TensorBoard, each by its setting."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from data_prep.dataset import durable, settings
from data_prep.dataset.parsing import json_value
from data_prep.dataset.settings import SettingsError
from pretrain.config.root import Config
from pretrain.config.run import WandbConfig

TENSORBOARD = "tensorboard"
"""The directory of a run's event files."""

_IDENTITY_FILE = "run.json"

_log = logging.getLogger(__name__)


class TrackingError(ValueError):
    """A tracker could not be started; the message says why and what to do."""


class Tracker(Protocol):
    """Receives the numbers of a step by name. The run continues without one that raises."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take in numbers of a step; a step may come again, with other names."""

    def flush(self) -> None:
        """Before a commit: steps up to here are not repeated."""

    def close(self) -> None:
        """Store what is left, and end."""


def started(directory: Path, config: Config, resumed_step: int) -> dict[str, Tracker]:
    """The trackers that are switched on, by name; steps after `resumed_step` come anew.

    Raises TrackingError and SettingsError.
    """
    trackers: dict[str, Tracker] = {}
    if config.wandb.mode != "disabled":
        trackers["wandb"] = Wandb(directory, config)
    if config.tensorboard.enabled:
        trackers["TensorBoard"] = TensorBoard(directory, config, resumed_step)
    return trackers


class TensorBoard:
    """Event files in the run directory's tensorboard/, one more with each attempt."""

    def __init__(self, directory: Path, config: Config, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrackingError(
                f"tensorboard.enabled: {error}; install the extra `tensorboard` (README), or set "
                "it to false"
            ) from error
        # TensorBoard drops what earlier files have of these steps: they are repeated.
        self._writer = SummaryWriter(str(directory / TENSORBOARD), purge_step=resumed_step + 1)
        shown = "\n".join(f"    {line}" for line in settings.to_yaml(config).splitlines())
        self._writer.add_text("configuration", shown, resumed_step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """A scalar each."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def flush(self) -> None:
        """Write what the writer's thread still holds."""
        self._writer.flush()

    def close(self) -> None:
        """Write the rest and end the writer's thread."""
        self._writer.close()


class Wandb:
    """wandb's run and its process. Only the checked configuration is stored: no arguments,
    environment, source code or console, any of which could hold a secret.

    Raises TrackingError, and SettingsError for what only the user can mend, as a missing key.
    """

    def __init__(self, directory: Path, config: Config) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        identity = run_identity(directory)
        link = {key: value for key, value in identity.items() if key == "copied_from"}
        name = config.wandb.name or directory.resolve().name
        try:
            for sentence in _unheeded(wandb.setup().settings, config.wandb, name, identity["id"]):
                _log.warning("%s", sentence)
            self._run: Any = wandb.init(
                project=config.wandb.project,
                entity=config.wandb.entity or None,
                name=name,
                id=identity["id"],
                resume="allow",
                mode=config.wandb.mode,
                dir=str(directory),
                config={**settings.to_plain(config), **link},
                settings=wandb.Settings(
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    x_disable_meta=True,
                    x_save_requirements=False,
                ),
            )
            # Charts count optimizer steps; wandb's own step counts records of all kinds, and begins
            # at 0 with each attempt that is offline.
            self._run.define_metric("*", step_metric="step")
        except ValueError as error:
            # pydantic's, of which wandb's settings are a model.
            problems = " ".join(str(error).partition("\n    For further")[0].split())
            raise SettingsError(
                [
                    "wandb: a setting that it has from the environment (WANDB_...), or from its "
                    f"own settings file, cannot be used: {problems}; correct it, or set "
                    "wandb.mode=disabled"
                ]
            ) from error
        except wandb.errors.Error as error:
            text = f"wandb.mode={config.wandb.mode}: {error}"
            if config.wandb.mode == "online":
                text += " Or set wandb.mode=offline and `wandb sync` the run's wandb/ later"
            # A job is not to be started again, as it is for a server that does not answer.
            if isinstance(error, wandb.errors.UsageError | wandb.errors.AuthenticationError):
                raise SettingsError([text]) from error
            raise TrackingError(text) from error

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """An entry of wandb's history."""
        self._run.log({**numbers, "step": step})

    def flush(self) -> None:
        """Nothing to do: wandb's process has every entry."""

    def close(self) -> None:
        """End the run and wandb's process."""
        import wandb

        self._run.finish()
        # wandb does this at interpreter exit, which a rank never reaches.
        wandb.teardown()


def _unheeded(own: Any, config: WandbConfig, name: str, identity: str) -> list[str]:
    """What wandb has from its variables or settings file, and the run decides otherwise.

    Its other settings (group, tags, notes, ...) are taken as they are.
    """
    decided = {
        "mode": ("WANDB_MODE, `wandb disabled`", config.mode, "wandb.mode is"),
        "project": ("WANDB_PROJECT", config.project, "wandb.project is"),
        "entity": ("WANDB_ENTITY", config.entity, "wandb.entity is"),
        "run_name": ("WANDB_NAME", name, "wandb.name is"),
        "run_id": ("WANDB_RUN_ID", identity, "the id in run.json is"),
        "root_dir": ("WANDB_DIR", "wandb/", "its files go to the run directory's"),
    }
    return [
        f"wandb's own {field} ({source}, or its settings file) has no effect, since {reason} "
        f"{value}"
        for field, (source, value, reason) in decided.items()
        if value and field in own.model_fields_set and getattr(own, field) != value
    ]


def run_identity(directory: Path) -> dict[str, str]:
    """The run's `id`, with which wandb continues a resumed run's curves, and its `directory`.

    A copy of a run that is still where it was gets an id of its own, and has the other's as
    `copied_from`: two runs must not write to one curve. A run that was moved keeps its id.
    """
    path, place = directory / _IDENTITY_FILE, str(directory.resolve())
    known = _identity(path)
    before = Path(known.get("directory", place)) / _IDENTITY_FILE
    if not known:
        identity = {"id": uuid.uuid4().hex[:12]}
    elif _identity(before).get("id") == known["id"] and not before.samefile(path):
        identity = {"id": uuid.uuid4().hex[:12], "copied_from": known["id"]}
        _log.info("a copy of %s, so wandb's id is another: %s", before.parent, identity["id"])
    else:
        identity = known
    identity = {**identity, "directory": place}
    if identity != known:
        durable.write_json(path, identity)
    return identity


def _identity(path: Path) -> dict[str, str]:
    """What is stored of a run; empty where that cannot be read."""
    try:
        stored = json_value(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) and isinstance(stored.get("id"), str) else {}
