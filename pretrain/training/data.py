"""The data sets of a run: what it trains on, its prefaces, and what it validates on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from data_prep.dataset.shards import TokenizerInfo
from pretrain.config.root import Config
from pretrain.data.lanes import Dataset, LanePlace, Mix
from pretrain.data.loader import Loader
from pretrain.training.run_state import RunState

# Of the order of validation data, whatever the run's seed.
VALIDATION_SEED = 0


class RunData:
    """The data sets in a configuration. Raises DataError if one cannot be opened."""

    def __init__(self, config: Config) -> None:
        data, self._config = config.data, config
        self.mix = Mix(
            [Dataset(source.data, data.cache) for source in data.sources.values()],
            [source.schedule for source in data.sources.values()],
            data.prompt_weight,
        )
        self.prefaces = Mix([Dataset(data.preface, data.cache)]) if data.preface else None
        self.validation = (
            Mix([Dataset(data.validation, data.cache)], prompt_weight=data.prompt_weight)
            if data.validation
            else None
        )

    @property
    def tokenizer(self) -> TokenizerInfo:
        """The tokenizer of all its data sets."""
        return self.mix.datasets[0].manifest.tokenizer

    def tokenizer_bytes(self) -> bytes:
        """The tokenizer's file."""
        return self.mix.datasets[0].files.tokenizer()

    def fingerprints(self) -> dict[str, list[list[str]] | None]:
        """The sha256 of every shard of the mix's data sets (`sources`) and of the `preface`'s."""
        return {
            "sources": _fingerprints(self.mix),
            "preface": None if self.prefaces is None else _fingerprints(self.prefaces),
        }

    def loader(self, lanes: range, run: RunState) -> Loader:
        """The windows of `lanes` that follow `run`."""
        return self._loader(self.mix, lanes, run.places, run.step, self._config.run.seed)

    def preface_loader(self, lanes: range, run: RunState) -> AbstractContextManager[Loader | None]:
        """The prefaces' windows that follow `run`; None without `data.preface`."""
        if self.prefaces is None or run.preface is None:
            return nullcontext()
        places = run.preface.places
        return self._loader(self.prefaces, lanes, places, run.step, self._config.run.seed)

    def validation_loader(self, lanes: range) -> Loader:
        """The first windows of the validation set's lanes.

        The same text for every seed, so that the losses of runs with several can be compared.
        """
        assert self.validation is not None
        return self._loader(self.validation, lanes, None, 0, VALIDATION_SEED)

    def _loader(
        self, mix: Mix, lanes: range, places: Sequence[LanePlace] | None, step: int, seed: int
    ) -> Loader:
        config = self._config
        return Loader(
            mix,
            lanes,
            config.data.lanes,
            config.window,
            seed,
            places,
            config.data.prefetch,
            config.data.workers,
            step,
        )


def _fingerprints(mix: Mix) -> list[list[str]]:
    return [[shard.sha256 for shard in data.manifest.shards] for data in mix.datasets]
