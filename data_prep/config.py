"""The configuration of a data set. Does not import datatrove, so mistakes are reported at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.dataset import credentials, settings
from data_prep.dataset.settings import group, setting

# The bytes of the data set do not depend on these.
_WHERE_AND_SPEED = ("root", "output", "workers", "slurm")

# An sbatch argument, and those that are set by other settings or by the order of the stages.
_SBATCH = re.compile(r"--([a-z0-9-]+)(=\S+)?")
_DECIDED = {
    *("array", "dependency", "kill-on-invalid-dep", "hold", "export", "wrap", "nodes", "ntasks"),
    *("partition", "time", "cpus-per-task", "mem-per-cpu", "mem", "job-name", "output", "error"),
}
_SEPARATOR = "\n\n"

# The languages of fastText's lid.176.
_LANGUAGES = (
    "af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb "
    "ckb co cs cv cy da de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom "
    "gu gv he hi hif hr hsb ht hu hy ia id ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw "
    "ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my myv mzn nah nap "
    "nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco "
    "sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo "
    "wa war wuu xal xmf yi yo yue zh"
)


@dataclass(frozen=True)
class CleaningConfig:
    """How a source's documents are cleaned, in this order; by default not at all."""

    repair: bool = setting(False, "repair broken encodings, remove control characters (ftfy)")
    nfc: bool = setting(False, "compose characters (Unicode NFC)")
    languages: list[str] = setting(
        [], "keep documents in these languages (codes as en, de); empty: all"
    )
    language_score: float = setting(
        0.65, "drop documents whose language has a lower score", low=0, high=1
    )
    rules: list[Literal["gopher_quality", "gopher_repetition", "c4", "fineweb"]] = setting(
        [], "quality rules for English text, in order; c4 also removes lines from documents"
    )
    max_words: int = setting(0, "words above which gopher_quality drops; 0: no limit", low=0)
    decontaminate: list[str] = setting(
        [],
        "evaluation files (of json, jsonl, parquet, csv, tsv every string, else the text; also "
        ".gz, .zst); documents that share an n-gram are dropped",
    )
    ngram: int = setting(13, "words of an n-gram of decontaminate", low=1)
    mask: list[Literal["email", "ip"]] = setting(
        [], "replace email addresses, public IP addresses by placeholders"
    )

    def problems(self) -> list[str]:
        """Unknown values, and settings that would have no effect."""
        found = [
            f"languages: {code!r} is not a known language code; give codes such as en, de, zh"
            for code in self.languages
            if code not in _LANGUAGES.split()
        ]
        if self.max_words and "gopher_quality" not in self.rules:
            found.append("max_words: has no effect without gopher_quality; add it to rules")
        if self.ngram != CleaningConfig.ngram and not self.decontaminate:
            found.append("ngram: has no effect without decontaminate; give evaluation files")
        if self.language_score != CleaningConfig.language_score and not self.languages:
            found.append("language_score: has no effect without languages; give their codes")
        return found


@dataclass(frozen=True)
class DuplicatesConfig:
    """Which duplicates are left out, over all sources; of equal documents the first is kept."""

    exact: bool = setting(False, "leave out documents of equal text")
    near: bool = setting(False, "leave out documents of similar text, by MinHash; exact ones too")
    ngram: int = setting(5, "words of an n-gram for MinHash", low=1)
    buckets: int = setting(20, "buckets, in one of which similar documents must match", low=1)
    rows: int = setting(5, "hashes that must be equal for documents to match in a bucket", low=1)

    def problems(self) -> list[str]:
        """Settings that would have no effect."""
        changed = [
            name
            for name in ("ngram", "buckets", "rows")
            if getattr(self, name) != getattr(DuplicatesConfig, name)
        ]
        return [
            f"{name}: has no effect without near; set near: true, or leave it out"
            for name in changed
            if not self.near
        ]

    @property
    def wanted(self) -> bool:
        """Whether any duplicates are left out."""
        return self.exact or self.near


@dataclass(frozen=True)
class SourceConfig:
    """Files of one kind; their documents carry the source's name."""

    name: str = setting("", "name that each of its documents carries")
    paths: list[str] = setting(
        [],
        "globs below `root` (** crosses directories), or URLs (s3://bucket/**/*.parquet; https:// "
        "without wildcards); {stdlib} is Python's own library",
    )
    exclude: list[str] = setting([], "globs, as in `paths`, of files that are left out")
    format: Literal["auto", "text", "jsonl", "parquet", "warc"] = setting(
        "auto",
        "a document is: jsonl: a line; parquet: a row; warc: a page, or a record of plain text "
        "(WET); text: a file; auto: by suffix, if what the files hold does not contradict it",
    )
    text_field: str = setting("text", "key or column of a jsonl or parquet record's text")
    prompt_field: str = setting(
        "",
        "instead of text_field: key of a jsonl record's prompt, which its answer follows, or of a "
        "list of prompts, each followed by its answer",
    )
    answer_field: str = setting(
        "",
        "key of the answer, or of a list of them; training weighs prompts by data.prompt_weight",
    )
    question: str = setting(
        "", "text between each prompt and its answer, e.g. a line 'Summary:'; part of the prompt"
    )
    id_field: str = setting("id", "key of its id; without one the id is path:line")
    group_by: Literal["file", "directory", "top"] = setting(
        "file",
        "text files that form one document: each alone; those of a directory; all below a first "
        "directory under the glob's fixed part. In natural order: chapter-2 before chapter-10",
    )
    group_separator: str = setting(_SEPARATOR, "text between the files of a group")
    max_record_bytes: int = setting(
        1 << 32, "bytes of a record or group above which it is rejected", low=1
    )
    max_held_bytes: int = setting(
        1 << 26,
        "bytes of a record that a worker holds: a longer text file or group is read in passages, a "
        "longer record of another kind is rejected",
        low=1,
    )
    cleaning: CleaningConfig = group(CleaningConfig)

    def problems(self) -> list[str]:
        """Missing settings, and those that contradict each other."""
        found = []
        listed = {"paths": self.paths, "exclude": self.exclude}
        listed["cleaning.decontaminate"] = self.cleaning.decontaminate
        for key, paths in listed.items():
            for index, path in enumerate(paths):
                try:
                    settings.at_home(path)  # where files are listed
                except ValueError as error:
                    found.append(f"{key}[{index}]: {error}")
                if wrong := credentials.refusal(path):
                    found.append(f"{key}[{index}]: {wrong}")
        if not self.name:
            found.append("name: not set; documents carry it, e.g. name: novels")
        if not self.paths:
            found.append("paths: not set; give globs of files, e.g. paths: ['*.jsonl.gz']")
        for key in ("paths", "exclude"):
            for index, pattern in enumerate(getattr(self, key)):
                found += [f"{key}[{index}]: {wrong}" for wrong in _wrong_url(pattern)]
        if self.group_by != "file" and self.format not in ("auto", "text"):
            found.append(f"group_by: joins text files, but format is {self.format}; leave it out")
        if self.group_by == "file" and self.group_separator != _SEPARATOR:
            found.append("group_separator: has no effect while group_by is file; leave it out")
        if self.format in ("text", "warc"):
            found += [f"{name}: {self.unused_field(self.format)}" for name in self.changed_fields()]
        return found + self._pair_problems()

    def changed_fields(self) -> list[str]:
        """The settings of keys and columns that are not the default."""
        names = ("text_field", "id_field")
        return [name for name in names if getattr(self, name) != getattr(SourceConfig, name)]

    @staticmethod
    def unused_field(format: str) -> str:
        """Why a key or column is not looked for in files of this format."""
        return f"has no effect on {format}, where no keys or columns are read; leave it out"

    @property
    def has_pairs(self) -> bool:
        """Whether each document is a prompt and an answer."""
        return bool(self.prompt_field or self.answer_field)

    def _pair_problems(self) -> list[str]:
        if not self.has_pairs:
            alone = "question: needs prompt_field and answer_field; set them too"
            return [alone] if self.question else []
        found = []
        if not self.prompt_field:
            found.append("prompt_field: not set, but answer_field is; name the prompt's key")
        if not self.answer_field:
            found.append("answer_field: not set, but prompt_field is; name the answer's key")
        if self.prompt_field == self.answer_field:
            found.append(
                f"answer_field: equals prompt_field, {self.prompt_field!r}; name another key"
            )
        if self.text_field != "text":
            found.append("text_field: cannot be set with prompt_field and answer_field; drop one")
        if self.format != "jsonl":
            found.append(
                f"prompt_field: is read from jsonl, but format is {self.format}; set format: jsonl"
            )
        if self.cleaning != CleaningConfig():
            found.append(
                "cleaning: works on running text, not on a prompt and its answer; leave it out and "
                "clean the texts before making the pairs"
            )
        return found


def _wrong_url(pattern: str) -> list[str]:
    # The brackets of an IPv6 address are none, nor is what follows the path.
    if re.match(r"https?://(\[[^/\]]*\])?+[^?#]*[*\[]", pattern, re.DOTALL):
        return ["the web cannot list files; give each URL, without wildcards"]
    return []


@dataclass(frozen=True)
class TokenizerConfig:
    """An existing tokenizer, or how a SentencePiece model is trained on a sample of documents."""

    path: str = setting(
        "", "SentencePiece model or tokenizer.json to use; empty: train one", path=True
    )
    eos_token: str = setting(
        "", "special token of that tokenizer.json with which documents end; empty: its own EOS"
    )
    # 256 bytes, three special pieces, the line end and a character: no text allows fewer.
    vocab_size: int = setting(8192, "pieces of a trained model", low=261, high=1 << 20)
    sample_bytes: int = setting(
        20_000_000, "UTF-8 bytes of text to train on, drawn over all documents", low=1
    )
    character_coverage: float = setting(
        0.9995, "share of characters that get a piece; others are spelled in bytes", low=0.9, high=1
    )

    def problems(self) -> list[str]:
        """A setting that would have no effect."""
        if self.eos_token and not self.path:
            return ["eos_token: has no effect on a tokenizer that is trained; leave it out"]
        return []


@dataclass(frozen=True)
class ShardsConfig:
    """How documents are cut into shards; training needs at least as many shards as lanes."""

    count: int = setting(0, "number of shards; 0: as many as `tokens` makes", low=0)
    tokens: int = setting(32_000_000, "target tokens per shard, where count is 0", low=1)


@dataclass(frozen=True)
class SlurmConfig:
    """How `data-prep submit` submits jobs: each stage is an array of tasks."""

    partition: str = setting("", "partition of the jobs; `submit` needs it")
    time: str = setting("1-00:00", "time limit of a task: DAYS-HOURS:MINUTES")
    tasks: int = setting(16, "tasks that each stage's work is divided into", low=1)
    workers: int = setting(0, "tasks of an array that may run at a time; 0: all", low=0)
    cpus_per_task: int = setting(1, "processes of a task", low=1)
    mem_per_cpu_gb: int = setting(4, "memory per process, in GB", low=1)
    sbatch: list[str] = setting([], "further sbatch arguments, e.g. [--account=lab, --qos=low]")

    def problems(self) -> list[str]:
        """Values that sbatch would not accept, or that data-prep sets."""
        found = []
        # YAML reads 12:00 as 720; with days it stays text.
        if not re.fullmatch(r"\d+-\d{1,2}:\d\d", self.time):
            found.append(f"time: {self.time!r} is not DAYS-HOURS:MINUTES, e.g. 0-12:00")
        for index, word in enumerate(self.sbatch):
            match = _SBATCH.fullmatch(word)
            if match is None:
                found.append(f"sbatch[{index}]: {word!r} is not of the form --name=value or --name")
            elif match[1] in _DECIDED:
                found.append(f"sbatch[{index}]: --{match[1]} is set by data-prep; leave it out")
        return found


@dataclass(frozen=True)
class Config:
    """All settings of `data-prep run`."""

    output: str = setting(
        "", "directory of the data set; the same command on it continues", path=True
    )
    root: str = setting("", "directory below which sources lie; empty: the current one", path=True)
    seed: int = setting(1, "seed of the order of documents and of the sample", low=0)
    workers: int = setting(0, "processes; 0: one per core (changes only the speed)", low=0)
    limit: int = setting(
        0, "for a trial: take only this many records of each source, the first; 0: all", low=0
    )
    sources: list[SourceConfig] = setting([], "list of sources, see below")
    duplicates: DuplicatesConfig = group(DuplicatesConfig)
    tokenizer: TokenizerConfig = group(TokenizerConfig)
    shards: ShardsConfig = group(ShardsConfig)
    slurm: SlurmConfig = group(SlurmConfig)

    def problems(self) -> list[str]:
        """Missing settings, and those that contradict each other."""
        found = []
        if not self.output:
            found.append("output: not set; give the data set's directory, e.g. output=data/novels")
        if not self.sources:
            found.append("sources: none; give a list of {name, paths}")
        names = [source.name for source in self.sources]
        for name in sorted({name for name in names if names.count(name) > 1}):
            found.append(f"sources: the name {name!r} is given twice; rename one source")
        return found

    def without_effect(self) -> list[str]:
        """Settings that another one makes idle; often a file's, beside one of the command line."""
        found = []
        if self.tokenizer.path:
            found += [
                f"tokenizer.{name}: has no effect beside tokenizer.path, whose tokenizer is taken "
                "as it is"
                for name in ("vocab_size", "sample_bytes", "character_coverage")
                if getattr(self.tokenizer, name) != getattr(TokenizerConfig, name)
            ]
        if self.shards.count and self.shards.tokens != ShardsConfig.tokens:
            found.append(
                "shards.tokens: has no effect beside shards.count, which alone says how documents "
                "are cut"
            )
        return found

    def identity(self) -> dict[str, Any]:
        """The settings that decide the bytes of the data set; stored in the manifest."""
        plain = settings.to_plain(self)
        if not self.tokenizer.eos_token:
            # As for pairs below.
            del plain["tokenizer"]["eos_token"]
        for source in plain["sources"]:
            for key in ("prompt_field", "answer_field", "question"):
                # So that a data set without pairs has the identity it had before pairs existed.
                if not source[key]:
                    del source[key]
        return {key: value for key, value in plain.items() if key not in _WHERE_AND_SPEED}


def load(
    path: Path | None,
    overrides: Sequence[str] = (),
    also: Callable[[Config, Collection[str]], list[str]] | None = None,
) -> Config:
    """The configuration of a YAML file and overrides. Raises SettingsError with all mistakes.

    `also` adds to them, see `settings.load`.
    """
    return settings.load(Config, path, overrides, also=also)


def describe() -> list[str]:
    """Every key with its default and meaning."""
    return settings.describe(Config) + settings.describe(SourceConfig, "sources[].")


def differences(ours: Any, theirs: Any, key: str = "") -> list[str]:
    """Keys that differ between two plain configurations, with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found = []
        for name in sorted(ours.keys() | theirs.keys()):
            place = f"{key}.{name}" if key else name
            found += differences(ours.get(name), theirs.get(name), place)
        return found
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        found = []
        for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            found += differences(our, their, f"{key}[{index}]")
        return found
    return [] if ours == theirs else [f"{key}: {theirs!r} there, {ours!r} now"]
