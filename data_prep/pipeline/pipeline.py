"""From input files to a data set: survey, sample, train, tokenize, order, write, manifest.

Every stage may be killed at any moment: the same command continues where it was. The bytes of the
data set depend on the input files, the configuration and the seed alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.accounts import ACCOUNTS, REJECTS, SAMPLE_CHARACTERS, Accounts
from data_prep.config import Config
from data_prep.dataset import cores, durable, shards
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import InputInfo, Manifest, ShardInfo, TokenizerInfo
from data_prep.dataset.wording import counted
from data_prep.pipeline import duplicates, order, table, unchanged, workspace, writing
from data_prep.pipeline.ngrams import hashes_of_record, words
from data_prep.pipeline.stages import (
    DrawSample,
    MatchDuplicates,
    Stage,
    SurveyFiles,
    Tokenize,
    TrainTokenizer,
    given_tokenizer,
)
from data_prep.pipeline.workers import Workers
from data_prep.pipeline.workspace import Work, WorkspaceError
from data_prep.pipeline.writing import WriteParts, WriteShards
from data_prep.sources import evaluation, inputs, readers
from data_prep.sources.inputs import InputFile
from data_prep.tokenizer import contract, tokenizer
from data_prep.tokenizer.contract import TokenizerError

# Runs of spaces, line ends and tabs, with and without a space before the first word: a normaliser
# that loses text changes these first.
_PROBES = ("a  b\n\n\tc \r\n", " a")

# Files that say what became of the records; the manifest has their sha256.
_REPORTS = (ACCOUNTS, REJECTS)


@dataclass(frozen=True)
class Outcome:
    """A finished data set: `already` where there was nothing to do."""

    manifest: Manifest
    seconds: float
    already: bool


def run(config: Config, part: Literal["all", "shards"] = "all") -> Outcome:
    """Make the data set, or continue making it. `part="shards"` needs the tokenizer to be there.

    Raises what the user can fix: SettingsError, WorkspaceError, TokenizerError,
    InputChangedError; DataError where a finished data set's manifest is damaged.
    """
    started = time.monotonic()
    work = open_work(config)

    def make() -> None:
        if part == "shards" and not work.marker(TrainTokenizer.name, 0).exists():
            raise WorkspaceError(
                f"{work.output}: has no tokenizer yet; run `data-prep tokenizer` with the same "
                "configuration first"
            )
        _run(config, work, stages(config))

    manifest, already = workspace.make_once(work, lambda: finished(config, work), make)
    if already:
        unchanged.renew(work)
    return Outcome(manifest, 0.0 if already else time.monotonic() - started, already)


def run_tokenizer(config: Config) -> Path:
    """Train or copy the tokenizer alone; `run` continues from there. Raises as `run` does."""
    work = open_work(config)
    if finished(config, work) is None:
        with workspace.locked(work):
            needed = stages(config)
            _run(config, work, needed[: needed.index(TrainTokenizer) + 1])
    return tokenizer.find(work.output)


def _run(config: Config, work: Work, needed: Sequence[type[Stage]]) -> None:
    workspace.begin(work, config)
    with Workers(config, work, workers(config)) as processes:
        for stage in needed:
            processes.run(stage)


def open_work(config: Config) -> Work:
    """The input files and paths of a run. Raises SettingsError and TokenizerError."""
    output, model = Path(config.output).expanduser(), Path(config.tokenizer.path).expanduser()
    problems = []
    finished = (output / shards.MANIFEST).exists()  # nothing is written, so it may be read-only
    if not finished and (
        reason := durable.obstacle(output, directory=True) or would_replace(output)
    ):
        problems.append(f"output: {reason}")
    if config.tokenizer.path and not model.is_file():
        problems.append(f"tokenizer.path: {_no_tokenizer(model)}")
    known = len(problems)
    files = inputs.find(config, problems)
    if len(problems) == known:  # else files may be other ones, or hold something else
        problems += _without_texts(config, files)
    evaluation = _evaluation(config, problems)
    if problems:
        raise SettingsError(problems)
    for idle in config.without_effect():
        print(idle, file=sys.stderr)
    if config.tokenizer.path:
        check_lossless(model, config.tokenizer.eos_token)
        _check_end(config, model)
    return Work(output, files, evaluation, config.limit)


def _without_texts(config: Config, files: list[InputFile]) -> list[str]:
    """Problems of sources that seem to hold no text at all, or no id that is set.

    Where such a source has files of another kind, too, it prints a warning instead.
    """
    found = []
    by_source: dict[str, list[InputFile]] = {source.name: [] for source in config.sources}
    for file in files:
        by_source[file.source].append(file)
    for index, own in enumerate(by_source.values()):
        if why := readers.without_texts(own):
            problem = f"sources[{index}]: {why}; correct it, or exclude such files"
            if all(file.format in readers.KEYED for file in own):
                found.append(problem)
            else:
                print(problem, file=sys.stderr)
    return found


def would_replace(output: Path) -> str:
    """Which files of something else a data set in this directory would replace, or ""."""
    if Work(output, []).directory.exists():
        return ""  # they are of a run that was begun here
    names = (*contract.FILES, REJECTS, ACCOUNTS, unchanged.VERSIONS)
    there = [name for name in names if (output / name).exists()]
    there += sorted(path.name for path in output.glob("shard-*.tar"))[:1]
    if not there:
        return ""
    return (
        f"{output} holds {', '.join(there)}, which a data set there would replace, and none was "
        "begun there; give another directory"
    )


def _no_tokenizer(model: Path) -> str:
    """What to give instead of a path at which there is no file."""
    if not model.is_dir():
        return f"{model} does not exist; prepare or copy it first"
    inside = next((model / name for name in contract.FILES if (model / name).is_file()), None)
    return f"{model} is a directory; give the file in it{f', {inside}' if inside else ''}"


def _evaluation(config: Config, problems: list[str]) -> dict[str, dict[str, Path]]:
    """The evaluation files of each source, by name; adds what is wrong to `problems`."""
    found: dict[str, dict[str, Path]] = {}
    for index, source in enumerate(config.sources):
        key, wrong = f"sources[{index}].cleaning.decontaminate", list[str]()
        files = inputs.evaluation_files(config, source, wrong)
        problems += [f"{key}: {problem}" for problem in wrong]
        unread = [f"{key}: {why}" for path in files.values() if (why := evaluation.problem(path))]
        problems += unread
        if files and not unread:
            _tell_short(key, list(files.values()), source.cleaning.ngram, problems)
        found[source.name] = files
    return found


def _tell_short(key: str, paths: list[Path], size: int, problems: list[str]) -> None:
    """Tell how many evaluation records have no n-gram; it is a problem if none has one."""
    long = short = 0
    for texts in itertools.chain.from_iterable(map(evaluation.records, paths)):
        if next(hashes_of_record(texts, size), None) is not None:
            long += 1
        elif any(map(words, texts)):
            short += 1
    if not long:
        problems.append(
            f"{key}: no evaluation text has {size} words, the n-gram that is looked for; lower "
            "cleaning.ngram, or leave decontaminate out"
        )
    elif short:
        print(
            f"{key}: {short:,} of {long + short:,} evaluation texts have fewer than {size} words, "
            "the n-gram that is looked for, and cannot be found; a lower cleaning.ngram finds more",
            file=sys.stderr,
        )


def workers(config: Config) -> int:
    """Number of processes: those configured, or one for each core that this process may use."""
    return config.workers or cores.usable()


def finished(config: Config, work: Work) -> Manifest | None:
    """The manifest of the finished data set; None if there is none.

    Raises WorkspaceError where it was made from another configuration, corpus or tokenizer.
    """
    manifest = workspace.finished(work.output, config)
    if manifest is None:
        return None
    if changed := unchanged.changed(work, manifest):
        others = f" and {counted(len(changed) - 1, 'other')} differ" if changed[1:] else " differs"
        raise WorkspaceError(
            f"{work.output}: was made from other input files: {changed[0]}{others}; give another "
            "output"
        )
    if config.tokenizer.path:
        _, data = given_tokenizer(config)
        if hashlib.sha256(data).hexdigest() != manifest.tokenizer.sha256:
            raise WorkspaceError(
                f"{work.output}: was made with another tokenizer.path file; restore that file, or "
                "give another output"
            )
    return manifest


def check_lossless(path: Path, eos_token: str = "") -> None:
    """Raise TokenizerError where the model changes white space, or has no such token."""
    model = tokenizer.load(path, eos_token)
    if any(model.decode(model.encode(probe)) != probe for probe in _PROBES):
        raise TokenizerError(
            f"tokenizer.path: {path} changes white space, so texts cannot be restored from their "
            "tokens; give one that does not normalise (such as Llama 2's or Llama 3's), or leave "
            "it empty to train one"
        )


def _check_end(config: Config, path: Path) -> None:
    """Raise TokenizerError where answers would have no end-of-text token to learn."""
    pairs = [source.name for source in config.sources if source.has_pairs]
    if pairs and tokenizer.load(path, config.tokenizer.eos_token).eos_id is None:
        raise TokenizerError(
            f"tokenizer.path: {path} has no end-of-text token, which has to end the answers of "
            f"{', '.join(pairs)}; give a tokenizer that names one (eos_token), or leave it empty "
            "to train one"
        )


class OrderDocuments(Stage):
    """Leave out duplicates, shuffle, cut into shards; write the accounts and the rejects.

    Returns the counts of all kinds of records, and the parts of shards. Holds 50 to 100 bytes a
    document, in arrays.
    """

    name = "order"
    label = "ordering documents"
    serial = True

    def do(self, unit: int) -> Any:
        work, tables = self.work, self.work.tables
        accounts, reasons = _write_rejects(work)
        left_out = np.zeros(len(tables), np.uint8)
        if self.config.duplicates.wanted:
            left_out = duplicates.find(tables.column("fingerprint"), tables.starts, work.directory)
            _account_for(left_out, work, accounts)
        assert all(account.is_whole() for account in accounts.sources.values())
        durable.write_json(work.output / ACCOUNTS, accounts.plain())
        kept = np.flatnonzero(left_out == 0)
        if not len(kept):
            for account in accounts.sources.values():
                reasons.update({f"dropped: {why}": n for why, n in account.dropped.items()})
            more = f" (each is in {REJECTS} or {ACCOUNTS} there)"
            raise workspace.nothing_left(work, accounts.total("read"), reasons, more)
        prompts = int(tables.column("prompt")[kept].sum())
        parts = _write_recipe(self.config, work, kept)
        totals = {name: accounts.total(name) for name in ("rejected", "dropped", "duplicates")}
        return {"documents": len(kept), "prompt_tokens": prompts, **totals, "parts": parts}


class WriteManifest(Stage):
    """Write the manifest, which makes the directory a data set."""

    name = "finish"
    label = "writing the manifest"
    serial = True

    def do(self, unit: int) -> Any:
        ordered = self.work.read(OrderDocuments.name, 0)
        parts = ordered["parts"]
        written = [
            ShardInfo(**self.work.read(WriteShards.name, shard))
            for shard in range(parts[-1][0] + 1)
        ]
        manifest = Manifest(
            format_version=shards.FORMAT_VERSION,
            tokenizer=_tokenizer_info(self.work),
            dtype=shards.dtype_of(self.work.tokenizer.vocab_size),
            configuration=self.config.identity(),
            inputs=_input_infos(self.work),
            shards=written,
            documents=sum(info.documents for info in written),
            tokens=sum(info.tokens for info in written),
            text_bytes=sum(size for *_, size in parts),
            rejected=ordered["rejected"],
            dropped=ordered["dropped"],
            duplicates=ordered["duplicates"],
            prompt_tokens=ordered["prompt_tokens"],
            reports={name: durable.sha256_of(self.work.output / name) for name in _REPORTS},
        )
        assert manifest.documents == ordered["documents"]
        unchanged.write(self.work)
        shards.write_manifest(self.work.output, manifest)


def stages(config: Config) -> list[type[Stage]]:
    """The stages of a run; the units of each are known once the stage before it is done."""
    sample = [] if config.tokenizer.path else [DrawSample]
    near = [MatchDuplicates] if config.duplicates.near else []
    before = [SurveyFiles, *sample, TrainTokenizer, Tokenize, *near]
    return [*before, OrderDocuments, WriteParts, WriteShards, WriteManifest]


def _write_rejects(work: Work) -> tuple[Accounts, Counter[str]]:
    """Write the rejected records in the order of the corpus; add up the accounts of all units.

    Returns these and the number of rejects by reason.
    """
    accounts, reasons = Accounts(), Counter[str]()
    keys = ("file", "line", "offset", "reason", "detail")
    with durable.replacing(work.output / REJECTS) as out:
        for unit in range(len(work.units)):
            marker = work.read(Tokenize.name, unit)
            accounts.add(marker["accounts"])
            # A unit has whole groups, or consecutive records.
            for file, *rest in sorted(marker["rejects"]):
                record = dict(zip(keys, (work.files[file].name, *rest), strict=True))
                reasons[f"rejected: {record['reason']}"] += 1
                out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    return accounts, reasons


def _account_for(left_out: np.ndarray, work: Work, accounts: Accounts) -> None:
    """Count the documents left out as duplicates, no longer as accepted, and keep samples."""
    model = work.tokenizer
    dtype = shards.dtype_of(model.vocab_size)
    numbers = np.flatnonzero(left_out)
    for unit, own in work.tables.split(numbers):
        rows, ids, _ = table.pick(work.tables.paths[unit], numbers[own] - work.tables.starts[unit])
        for row, id, kind in zip(rows, ids, left_out[numbers[own]].tolist(), strict=True):
            file = work.files[row["file"]]
            reason, account = f"{duplicates.KINDS[kind]} duplicate", accounts.of(file.source)
            account.accepted -= 1
            account.duplicates[duplicates.KINDS[kind]] += 1
            if accounts.wants_sample(file.source, reason):
                count = min(int(row["tokens"]), SAMPLE_CHARACTERS)
                text = model.decode(work.read_tokens(unit, int(row["first"]), count, dtype))
                accounts.sample(file.source, reason, id, file.name, int(row["line"]), text)


def _write_recipe(config: Config, work: Work, kept: np.ndarray) -> list[tuple[int, ...]]:
    """Write the order of the documents `kept`, which are numbers in the corpus.

    Returns (shard, first document, the one after the last, bytes of text) of each part of a shard.
    """
    tables, wanted = work.tables, config.shards
    keys = tables.column("key")[kept]
    ordered, numbers = order.shuffled(keys, config.seed, lambda places: tables.ids(kept[places]))
    del keys
    documents, numbers = kept[ordered], numbers[ordered]
    del ordered
    tokens = tables.column("tokens")[documents]
    total = int(tokens.sum())
    count = order.shard_count(total, len(documents), wanted.count, wanted.tokens)
    parts = writing.parts(order.cut(tokens, count))
    del tokens
    writing.write_recipe(work, documents, numbers)
    sizes = np.add.reduceat(tables.column("bytes")[documents], [first for _, first, _ in parts])
    return [(*part, size) for part, size in zip(parts, sizes.tolist(), strict=True)]


def _tokenizer_info(work: Work) -> TokenizerInfo:
    model = work.tokenizer
    return TokenizerInfo(
        file=tokenizer.find(work.output).name,
        sha256=work.read(TrainTokenizer.name, 0)["sha256"],
        vocab_size=model.vocab_size,
        bos_id=model.bos_id,
        eos_id=model.eos_id,
        pad_id=model.pad_id,
        unk_id=model.unk_id,
    )


def _input_infos(work: Work) -> list[InputInfo]:
    workspace.check_evaluation(work)
    read = [
        InputInfo(file.name, found.bytes, found.sha256)
        for file, found in zip(work.files, work.surveys, strict=True)
    ]
    evaluation = [
        InputInfo(name, path.stat().st_size, durable.sha256_of(path))
        for name, path in sorted(work.evaluation_files.items())
    ]
    return read + evaluation
