"""The data sets of a run: what it trains on, its prefaces, and what it validates on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import fields

from data_prep.dataset.shards import DataError, TokenizerInfo
from data_prep.sources.storage import is_url
from pretrain.config.data import CacheConfig, DataConfig
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
        """The tokenizer's file, from the first data set that has it: one that is retired, or not
        begun, may lack its files. Raises DataError where none has it."""
        for data in self.mix.datasets:
            with suppress(DataError):
                return data.files.tokenizer()
        return self.mix.datasets[0].files.tokenizer()

    def fingerprints(self) -> dict[str, list[list[str]] | None]:
        """The sha256 of every shard of the mix's data sets (`sources`) and of the `preface`'s."""
        return {
            "sources": _fingerprints(self.mix),
            "preface": None if self.prefaces is None else _fingerprints(self.prefaces),
        }

    def without_effect(self) -> list[str]:
        """Settings that are not the default and do nothing with these data sets, and why."""
        found, data, default = [], self._config.data, DataConfig()
        weighted = [self.mix, *([] if self.validation is None else [self.validation])]
        manifests = [one.manifest for mix in weighted for one in mix.datasets]
        if data.prompt_weight != default.prompt_weight and not any(
            manifest.prompt_tokens for manifest in manifests
        ):
            found.append(
                f"data.prompt_weight: {data.prompt_weight:g} has no effect, since no document has "
                "a prompt: all tokens have weight 1"
            )
        read = [source.data for source in data.sources.values()]
        read += [data.preface, data.validation, *(one.data for one in self._config.train.evaluate)]
        if not any(map(is_url, read)):
            found += [
                f"data.cache.{field.name}: has no effect, since all data sets are directories, and "
                "only those under URLs are cached"
                for field in fields(CacheConfig)
                if getattr(data.cache, field.name) != getattr(default.cache, field.name)
            ]
        return found

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
