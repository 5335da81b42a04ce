"""What is wrong with settings, as the tests of each section ask."""

from __future__ import annotations

from data_prep.dataset.settings import SettingsError
from pretrain.config.root import load

MINIMUM = ("run.directory=runs/x", "data.train=data/x")


def problems(*words: str, minimum: bool = True) -> list[str]:
    try:
        load(None, [*(MINIMUM if minimum else ()), *words])
    except SettingsError as error:
        return error.problems
    return []
