"""`pretrain eval KIND` and `pretrain generate`: what a trained model can do."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.dataset.command import (
    DATA_SET,
    DIRECTORY,
    TOKENS,
    Command,
    Kind,
    one_of,
    option,
    path_kind,
    word,
)
from data_prep.dataset.durable import sha256_of
from data_prep.dataset.settings import SettingsError, at_home
from data_prep.dataset.shards import DataError, no_data_set
from data_prep.recall import mqar
from data_prep.recall.tasks import PASSKEY, TASKS
from data_prep.sources.storage import is_url
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import TokenizerError
from pretrain.checkpoint.runs import no_run, run_directory_of
from pretrain.config.run import Weights
from pretrain.config.training import EvaluationConfig
from pretrain.data.files import incomplete, manifest_of
from pretrain.evaluate import pairs
from pretrain.evaluate.pairs import Fields, Pair
from pretrain.evaluate.questions import Associations, Questions, Sampling

RUN = path_kind(no_run)
_LOCATION = Kind(
    "a directory or a URL",
    str,
    refusal=lambda location: "" if is_url(location) else no_data_set(Path(location)),
)
_NAME = Kind(
    "a name",
    str,
    refusal=lambda name: (
        f"{name} contains /, and is to be part of a file's name; leave it out"
        if "/" in name
        else ""
    ),
)
WEIGHTS_MEANING = "last: those after the last step; ema: their moving average (optim.ema_decay)"
_IN_TRAINING = EvaluationConfig()
_NEEDLES = [task for task in TASKS if task != PASSKEY]
_TRAINED_ON = "as in the pairs that the run was trained on"


class OnModel(Command):
    """A command on a trained model."""

    path: Path = word("run directory, or one checkpoint of it", kind=RUN)
    weights: Weights = option("last", WEIGHTS_MEANING)


class Perplexity(OnModel):
    """Bits per byte by position, with memory and with memory reads masked.

    Streams whole documents through a model and reports how well it predicts them.
    """

    data: str = option(
        MISSING, "data set: the directory that data-prep wrote, or its URL", kind=_LOCATION
    )
    documents: int | None = option(None, "evaluate only the first N", low=1, otherwise="all")
    batch: int = option(8, "documents per batch", low=1)
    window_segments: int | None = option(None, "segments per window", low=1, otherwise="the run's")
    check: bool = option(
        False, "evaluate nothing: check the command line and print the run's directory"
    )

    def run(self) -> int:
        if self.check:
            if problems := self._data_problems():
                raise SettingsError(problems)
            print(f"directory={run_directory_of(self.path).resolve()}")
            return 0
        from pretrain.evaluate import perplexity

        return perplexity.run(
            self.path,
            self.data,
            window_segments=self.window_segments,
            max_documents=self.documents,
            batch=self.batch,
            weights=self.weights,
        )

    def _data_problems(self) -> list[str]:
        """What would end the evaluation once it has the run's checkpoint, which may be made yet."""
        try:
            manifest = manifest_of(self.data)
        except DataError as error:
            return [f"--data: {error}"]
        lacking = [] if self.documents else incomplete(self.data, manifest)
        found = [f"--data: {reason}" for reason in lacking]
        with suppress(TokenizerError):  # of a run that has not begun
            own = tokenizer.find(run_directory_of(self.path))
            if sha256_of(own) != manifest.tokenizer.sha256:
                found.append(
                    f"--data: {self.data} was prepared with another tokenizer than the run's; "
                    f"prepare it again with tokenizer.path={own}"
                )
        return found


class Harness(OnModel):
    """Tasks of EleutherAI's lm-evaluation-harness, from local files.

    Runs the harness's tasks in a directory, offline; needs the extra `harness`. Python functions
    that a task file names are executed.
    """

    tasks_directory: Path = option(MISSING, "directory of task files (YAML)", kind=DIRECTORY)
    tasks: list[str] = option([], "their names", many="words", otherwise="all there", unique=True)
    shots: int | None = option(
        None, "few-shot examples before a question", low=0, otherwise="the task's"
    )
    limit: int | None = option(None, "evaluate only the first N documents of each task", low=1)

    def problems(self) -> list[str]:
        if importlib.util.find_spec("lm_eval") is None:
            return ["lm-eval is not installed; install the extra `harness` (README)"]
        return []

    def run(self) -> int:
        from pretrain.evaluate import harness

        return harness.run(
            self.path,
            self.tasks_directory,
            tasks=self.tasks,
            shots=self.shots,
            limit=self.limit,
            weights=self.weights,
        )


def _lengths(*kibi: int) -> Any:
    doc = "tokens of the prompts, k for 1,024 and m for 1,048,576"
    return option([1024 * size for size in kibi], doc, kind=TOKENS, low=1, unique=True)


class _Recall(OnModel):
    lengths: list[int] = _lengths(4, 32, 128)
    samples: int = option(_IN_TRAINING.samples, "prompts per cell", low=1)
    seed: int = option(_IN_TRAINING.seed, "same seed, same prompts", low=0)

    def ask(
        self, name: str, tasks: Sequence[str], depths: Sequence[float | None], filler: Path | None
    ) -> int:
        """Ask the model; the exit code."""
        from pretrain.evaluate import recall

        asked = Questions(tasks, self.lengths, depths, self.samples, self.seed)
        return recall.run(self.path, name, asked, filler, self.weights)


class Passkey(_Recall):
    """A key far back in the prompt, by length and depth.

    Hides a five-digit key at several depths of a long prompt and asks for it. All prompts of one
    length are streamed as a batch; what they share is read once.
    """

    depths: list[float] = option(
        _IN_TRAINING.depths,
        "places of the key, 0 the prompt's start, 1 its end",
        low=0,
        high=1,
        unique=True,
    )

    def run(self) -> int:
        return self.ask("passkey", [PASSKEY], self.depths, None)


class Needles(_Recall):
    """Facts in books: several needles, chains, common words, stories.

    Tasks after RULER and BABILong among the sentences of books. The facts are at random places.
    """

    lengths: list[int] = _lengths(4, 16, 64, 128)
    filler: Path = option(MISSING, "data set directory of data-prep with books", kind=DATA_SET)
    tasks: list[str] = option(
        _NEEDLES,
        "some of single, multikey, multivalue, multiquery (needles), variables, words, and qa1, "
        "qa2, qa3 (stories)",
        kind=one_of(_NEEDLES),
        unique=True,
        otherwise="all",
    )

    def run(self) -> int:
        return self.ask("needles", self.tasks, [None], self.filler)


class Mqar(OnModel):
    """How many pairs of a key and a value a memory holds, over which distance.

    Multi-query associative recall (after Zoology) of a run that was trained on documents of
    `data-prep mqar`: the prompt states pairs, then asks for every key.
    """

    pairs: list[int] = option(
        [4, 8, 16, 32, 64, 128, 256, 512],
        "numbers of pairs",
        low=1,
        high=mqar.MOST_PAIRS,
        unique=True,
    )
    distances: list[int] = option(
        [0, 1, 4, 16, 64], "segments between the pairs and the questions", low=0, unique=True
    )
    answers: int = option(256, "values asked for per cell, at least", low=1)
    seed: int = option(0, "same seed, same prompts", low=0)

    def run(self) -> int:
        from pretrain.evaluate import mqar as capacity

        asked = Associations(self.pairs, self.distances, self.answers, self.seed)
        return capacity.run(self.path, asked, self.weights)


def _undrawn(asked: Summaries | Generate) -> list[str]:
    """Options of how tokens are drawn, where the likeliest one is taken."""
    if asked.temperature != 0:
        return []
    return [
        f"--{name.replace('_', '-')}: has no effect with --temperature 0, which takes the "
        "likeliest token each time; leave out one of them"
        for name in ("top_p", "seed")
        if getattr(asked, name) != getattr(type(asked), name)
    ]


class Summaries(OnModel):
    """Answers about whole documents, scored by Rouge.

    Streams each document, samples its answer, and compares it with the reference of the pair.
    The defaults of sampling are the paper's.
    """

    pairs: list[Path] = word("one pair per line", metavar="PAIRS.jsonl[.gz]")
    name: str = option("", "name of the report", kind=_NAME, otherwise="the first file's name")
    documents: int | None = option(None, "evaluate only the first N", low=1, otherwise="all")
    shares: list[float] = option(
        [1.0],
        "share of each document to read, from its start; several give a plot, e.g. 0.1,0.25,0.5,1",
        above=0,
        high=1,
        unique=True,
    )
    prompt_field: str | None = option(None, "key of a line's document", otherwise=_TRAINED_ON)
    answer_field: str | None = option(None, "key of its reference", otherwise=_TRAINED_ON)
    question: str | None = option(
        None, "text between the document and the answer", otherwise=_TRAINED_ON
    )
    max_tokens: int = option(1024, "maximum length of an answer", low=1)
    temperature: float = option(0.5, "0: greedy", low=0)
    top_p: float = option(0.95, "probability mass of nucleus sampling", above=0, high=1)
    seed: int = option(0, "same seed, same answers", low=0)

    @cached_property
    def fields(self) -> tuple[Fields, list[str]]:
        """Keys and question of the pairs, and what is missing."""
        return pairs.fields(self.path, self.prompt_field, self.answer_field, self.question)

    @cached_property
    def pairs_read(self) -> tuple[list[Pair], list[str]]:
        """The pairs, and every mistake in them."""
        return pairs.read(self.pairs, self.fields[0])

    def problems(self) -> list[str]:
        return [*_undrawn(self), *self.fields[1], *self.pairs_read[1]]

    def run(self) -> int:
        from pretrain.evaluate import summaries

        sampling = Sampling(self.max_tokens, self.temperature, self.top_p, self.seed)
        name = self.name or self.pairs[0].name.removesuffix(".gz").removesuffix(".jsonl")
        read = self.pairs_read[0][: self.documents]
        question = self.fields[0].question
        return summaries.run(self.path, name, read, question, self.shares, sampling, self.weights)


class Generate(OnModel):
    """Continue a text.

    Continues a prompt of any length in constant memory; the text goes to stdout.
    """

    prompt_file: str | None = option(
        None, "file with the prompt; - is stdin", kind=Kind("a path", at_home), metavar="FILE"
    )
    prompt: str | None = option(
        None, "the prompt", otherwise="empty: the start of a document", instead_of="prompt_file"
    )
    max_tokens: int = option(256, "maximum number of tokens to generate", low=1)
    temperature: float = option(0.8, "0: greedy", low=0)
    top_p: float = option(0.95, "probability mass of nucleus sampling", above=0, high=1)
    seed: int = option(0, "same seed, same text", low=0, high=2**63 - 1)

    def problems(self) -> list[str]:
        return _undrawn(self)

    def run(self) -> int:
        from pretrain.evaluate import generate

        return generate.run(
            self.path,
            prompt=self.prompt or "",
            prompt_file=self.prompt_file,
            sampling=Sampling(self.max_tokens, self.temperature, self.top_p, self.seed),
            weights=self.weights,
        )
