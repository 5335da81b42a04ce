"""The command line of data-prep."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import MISSING
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import Literal

from data_prep import accounts
from data_prep import config as configuration
from data_prep.config import Config
from data_prep.dataset import command, durable, shards
from data_prep.dataset.command import (
    DATA_SET,
    Command,
    CommandError,
    Configured,
    Program,
    file_to_write,
    option,
    word,
)
from data_prep.dataset.settings import EXIT_MISTAKE, MistakeError, SettingsError
from data_prep.dataset.shards import DataError
from data_prep.dataset.wording import counted
from data_prep.pipeline import reshard
from data_prep.recall import generate, mqar, name_pairs, tasks
from data_prep.report import statistics
from data_prep.sources import inputs
from data_prep.tokenizer import marks, tokenizer

_EXAMPLES = """examples:
  data-prep run configs/data/stdlib.yaml output=data/stdlib
  data-prep run configs/data/novels_train.yaml root=corpus output=data/novels workers=8
  data-prep reshard data/novels --shards 64 --output data/novels_64
  data-prep submit configs/data/novels_train.yaml output=data/novels slurm.partition=cpu
  data-prep verify data/novels
  data-prep run configs/data/novels_train.yaml root=corpus --dry-run
  data-prep stats data/novels --json
  data-prep report data/novels

To continue a run that was stopped or killed, give the same command again.
"""


class _StoppedError(Exception):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Make(Configured):
    limit: int | None = option(None, "the same as limit=N: a trial on some records")

    @classmethod
    def epilog(cls) -> str:
        keys = "\n  ".join(["configuration keys:", *configuration.describe()])
        return f"{keys}\n\n{_EXAMPLES}"

    @cached_property
    def wanted(self) -> Config:
        limit = [] if self.limit is None else [f"limit={self.limit}"]
        return configuration.load(self.config, [*self.overrides, *limit], inputs.missing_evaluation)

    def problems(self) -> list[str]:
        twice = [word for word in self.overrides if word.startswith("limit=")]
        given = twice[:1] if self.limit is not None else []
        found = [f"--limit: {word} is given, too; give one of the two" for word in given]
        return found + super().problems()


class _Run(_Make):
    """Make a data set, or continue making it."""

    dry_run: bool = option(False, "report the plan and an estimate, write nothing")

    def run(self) -> int:
        if not self.dry_run:
            return _made(self.wanted, "all")
        from data_prep.pipeline import estimate

        print("\n".join(estimate.lines(estimate.estimate(self.wanted))))
        return 0


class _Submit(_Make):
    """The same, as arrays of Slurm jobs."""

    def run(self) -> int:
        from data_prep.pipeline import slurm

        output = Path(self.wanted.output).expanduser()
        jobs = slurm.submit(self.wanted)
        if not jobs:
            print(f"{output} is finished already, from the same configuration: nothing to do")
            return 0
        for stage, job in jobs.items():
            print(f"{stage:<10} job {job}, logs in {slurm.logs(output, stage)}")
        print(f"watch:  squeue --jobs={','.join(jobs.values())}")
        print(f"cancel: scancel {' '.join(jobs.values())}")
        print(f"at the end: data-prep verify {output}; after a failure the same command continues")
        return 0


class _Tokenizer(_Make):
    """Train or copy only the tokenizer."""

    def run(self) -> int:
        from data_prep.pipeline import pipeline

        made = pipeline.run_tokenizer(self.wanted)
        print("\n".join([f"tokenizer: {made}", *marks.lines(tokenizer.load(made))]))
        print("next: data-prep shards with the same configuration")
        return 0


class _Shards(_Make):
    """Make the rest with the existing tokenizer."""

    def run(self) -> int:
        return _made(self.wanted, "shards")


def _made(wanted: Config, what: Literal["all", "shards"]) -> int:
    from data_prep.pipeline import pipeline

    outcome = pipeline.run(wanted, what)
    output = Path(wanted.output).expanduser()
    if outcome.already:
        print(f"{output} is finished already, from the same configuration: nothing to do")
    print("\n".join(statistics.closing(output, outcome.manifest, outcome.seconds)))
    return 0


class _Check(Configured):
    """Report every mistake in a configuration.

    Checks a configuration as `run` would, and prints the data set's directory, also where the files
    that it names are not as they are to be.
    """

    made_before: list[Path] = option(
        [],
        "a data set that is made first: its tokenizer need not exist yet; may be repeated",
        many="again",
        metavar="DIR",
    )

    @cached_property
    def wanted(self) -> Config:
        return configuration.load(self.config, self.overrides, inputs.missing_evaluation)

    def run(self) -> int:
        from data_prep.pipeline import pipeline, workspace

        print(f"output={Path(self.wanted.output).expanduser().absolute()}", flush=True)
        model = Path(self.wanted.tokenizer.path).expanduser().absolute()
        checked = self.wanted
        if any(directory.absolute() in model.parents for directory in self.made_before):
            checked = dataclasses.replace(
                checked, tokenizer=dataclasses.replace(checked.tokenizer, path="")
            )
        work = pipeline.open_work(checked)
        if checked is not self.wanted:
            workspace.finished(work.output, self.wanted)
        elif pipeline.finished(checked, work) is None:
            workspace.stale_stages(work, checked)
        return 0


class _DataSet(Command):
    directory: Path = word("data set", kind=DATA_SET, metavar="DIR")


class _Reshard(_DataSet):
    """Cut a data set into another number of shards.

    The same documents in the same order, in other shards: to the byte what `run` makes with that
    shards.count, without tokenizing again.
    """

    shards: int = option(MISSING, "number of shards")
    output: Path = option(MISSING, "directory of the new data set", metavar="DIR2")

    def run(self) -> int:
        if not reshard.run(self.directory, self.output, self.shards):
            print(f"{self.output} is finished already, from the same data set: nothing to do")
        manifest = shards.read_manifest(self.output)
        print(
            f"{counted(manifest.documents, 'document')}, {counted(manifest.tokens, 'token')} in "
            f"{counted(len(manifest.shards), 'shard')}, in the order of {self.directory}"
        )
        print(f"data set: {self.output}")
        return 0


class _Verify(_DataSet):
    """Read a data set and list every problem."""

    def run(self) -> int:
        problems = accounts.verify(self.directory)
        if problems:
            count = counted(len(problems), "problem")
            return _failed("\n".join([f"{self.directory}: {count}", *problems]), 1)
        manifest = shards.read_manifest(self.directory)
        print(
            f"{self.directory}: whole: {counted(manifest.documents, 'document')}, "
            f"{counted(manifest.tokens, 'token')}, {counted(len(manifest.shards), 'shard')}, every "
            "checksum right"
        )
        return 0


class _Stats(_DataSet):
    """Print statistics of a data set."""

    json: bool = option(False, "print one JSON object")

    def run(self) -> int:
        found = statistics.stats(self.directory)
        if self.json:
            print(json.dumps(found.plain(), indent=1))
        else:
            print("\n".join(statistics.lines(found)))
        return 0


class _Report(_DataSet):
    """Write a report on a data set as one HTML page."""

    output: Path | None = option(
        None,
        "the page's file",
        kind=file_to_write(".html"),
        metavar="FILE.html",
        otherwise="DIR/report.html",
    )

    @property
    def page(self) -> Path:
        """The file to write."""
        return self.output or self.directory / "report.html"

    def problems(self) -> list[str]:
        reason = "" if self.output else durable.obstacle(self.page, directory=False)
        return [f"--output: {reason}"] if reason else []

    def run(self) -> int:
        from data_prep.report import page

        page.write(self.directory, self.page)
        print(f"report: {self.page}")
        return 0


class _Drawn(Command):
    """A command that draws texts by a seed."""

    output: Path = word(
        "file to write", kind=file_to_write(".jsonl", ".jsonl.gz"), metavar="FILE.jsonl[.gz]"
    )
    seed: int = option(1, "same seed, same bytes")


class _Bounded(_Drawn):
    """A command whose texts have a bounded length."""

    min_tokens: int = option(128, "shortest prompt, except where a task's own text has more", low=1)
    max_tokens: int = option(8192, "longest prompt", low=1)

    def problems(self) -> list[str]:
        if self.min_tokens <= self.max_tokens:
            return []
        return [
            f"--min-tokens, --max-tokens: expected bounds of a length, found {self.min_tokens} to "
            f"{self.max_tokens}"
        ]


class _Recall(_Bounded):
    """Write documents that ask for facts far back in them.

    Writes prompts and answers as jsonl (keys id, prompt, answer): passkeys, or tasks after RULER
    and BABILong among the sentences of books. The bytes depend only on the options and the
    seed.
    """

    tasks: list[str] = option(
        [tasks.PASSKEY],
        f"tasks to alternate, some of {', '.join(tasks.TASKS)}",
        kind=command.one_of(tasks.TASKS),
    )
    documents: int = option(MISSING, "number of documents", low=1)
    workers: int = option(1, "processes", low=1)
    filler: Path | None = option(
        None,
        "data set of books to hide facts in; its tokenizer measures prompts",
        kind=DATA_SET,
        metavar="DIR",
    )
    tokenizer: Path | None = option(
        None,
        "tokenizer that measures prompts, instead of --filler; the filler is the passkey's. With "
        "neither, each byte counts as a token: for texts to train a first tokenizer on",
        metavar="FILE",
        instead_of="filler",
    )

    def run(self) -> int:
        wanted = generate.Wanted(
            self.tasks, self.documents, self.min_tokens, self.max_tokens, self.seed
        )
        model = None if self.tokenizer is None else tokenizer.load(self.tokenizer)
        if self.filler is None:
            haystack = tasks.Haystack.repeated()
        else:
            haystack = tasks.Haystack.of_books(self.filler)
            model = tokenizer.load(tokenizer.find(self.filler))
        line = partial(generate.document, wanted, haystack, model)
        generate.write(self.output, self.documents, line, self.workers)
        unit = "bytes" if model is None else "tokens"
        print(
            f"{counted(self.documents, 'document')}, prompts of {self.min_tokens:,} to "
            f"{self.max_tokens:,} {unit}: {self.output}"
        )
        for number, task in enumerate(self.tasks[: self.documents]):
            least = tasks.least(task, model, seed=self.seed, number=number)
            if least > self.min_tokens:
                print(f"{task}: its own text has some {least:,} {unit}, so none is shorter")
        return 0


class _Pairs(_Bounded):
    """Write books, or passages of them, each with the names in it.

    Writes prompts and answers as jsonl (keys id, prompt, answer): the text of a book and the names
    that it mentions most often. To try out training and evaluation of summaries without a data set
    of summaries. The bytes depend only on the data set and the options.
    """

    books: Path = option(MISSING, "data set with books", kind=DATA_SET, metavar="DIR")
    passages: int | None = option(
        None,
        "number of passages, from random places in random books",
        low=1,
        otherwise="each book whole",
    )
    min_tokens: int = option(256, "shortest passage", low=1)
    max_tokens: int = option(8192, "longest passage", low=1)
    names: int = option(8, "most names in an answer", low=1)

    def problems(self) -> list[str]:
        unread = [
            f"--{name.replace('_', '-')}: has no effect without --passages; remove it, or give "
            "--passages N"
            for name in ("min_tokens", "max_tokens")
            if self.passages is None and getattr(self, name) != getattr(_Pairs, name)
        ]
        return unread or super().problems()

    def run(self) -> int:
        wanted = name_pairs.Wanted(
            self.passages, self.min_tokens, self.max_tokens, self.names, self.seed
        )
        count, unused = name_pairs.write(self.output, self.books, wanted)
        print(f"{counted(count, 'pair')}: {self.output}")
        if unused:
            why = f"fewer than {self.min_tokens:,} tokens" if self.passages else "no name in it"
            print(f"left out: {counted(unused, 'document')} with {why}")
        return 0


class _Mqar(_Drawn):
    """Write documents of multi-query associative recall.

    Writes prompts and answers as jsonl (keys id, prompt, answer): pairs of a key and a value, then
    every key once more with its value (after Zoology, arXiv 2312.04927). Each is one character, and
    a token of the tokenizer that is written beside the file. The bytes depend only on the options.
    """

    documents: int = option(MISSING, "number of documents", low=1)
    pairs: list[int] = option(
        [4, 8, 16, 32], "numbers of pairs, which alternate", low=1, high=mqar.MOST_PAIRS
    )
    gap: int = option(512, "most tokens between the pairs and the questions", low=0)
    symbols: int = option(
        mqar.MOST_PAIRS,
        "keys, and values, that documents draw from: few are learned faster",
        low=1,
        high=mqar.MOST_PAIRS,
    )
    answers: mqar.Answers = option(
        "values", "what the loss is of: values alone, or the keys too, which nothing predicts"
    )
    workers: int = option(1, "processes", low=1)

    def problems(self) -> list[str]:
        if max(self.pairs) <= self.symbols:
            return []
        return [
            f"--pairs, --symbols: {max(self.pairs)} pairs cannot be drawn from {self.symbols} keys "
            "without repeating any; expected at least as many symbols as pairs"
        ]

    def run(self) -> int:
        model = mqar.tokenizer_beside(self.output)
        wanted = mqar.Wanted(self.pairs, self.gap, self.symbols, self.seed, self.answers)
        line = partial(mqar.line, wanted)
        generate.write(self.output, self.documents, line, self.workers)
        durable.write_bytes(model, mqar.tokenizer_json())
        print(f"{counted(self.documents, 'document')}: {self.output}\ntokenizer: {model}")
        return 0


_PROGRAM = Program(
    "data-prep",
    "Turn text into tokenized, shuffled, checksummed shards for training.",
    {
        "run": _Run,
        "submit": _Submit,
        "tokenizer": _Tokenizer,
        "shards": _Shards,
        "check": _Check,
        "reshard": _Reshard,
        "verify": _Verify,
        "stats": _Stats,
        "report": _Report,
        "recall": _Recall,
        "pairs": _Pairs,
        "mqar": _Mqar,
    },
    {},
    _EXAMPLES,
)


# A signal stops them cleanly; the same command continues or starts over.
_CONTINUE = (_Make, _Reshard, _Drawn)
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. 0: done; 1: a damaged data set, a full disk, a lost worker; 2: a mistake."""
    with ExitStack() as restored:
        code = _run(arguments, restored)
    command.flush()
    return code


def _run(arguments: Sequence[str] | None, restored: ExitStack) -> int:
    """The exit code of a command; `restored` gets callbacks that restore signal handlers."""
    name, remedy = "data-prep", ""
    try:
        name, chosen = command.parse(_PROGRAM, arguments)
        if isinstance(chosen, _CONTINUE):
            remedy = "; when that is fixed, the same command continues"
            for number in _STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup ignores SIGHUP
                    restored.callback(signal.signal, number, signal.signal(number, _stop))
        code = chosen.run()
        sys.stdout.flush()
        return code
    except CommandError as error:
        command.say(error)
        return EXIT_MISTAKE
    except SettingsError as error:
        command.say(command.cannot_run(name, error.problems))
        return EXIT_MISTAKE
    except MistakeError as error:
        return _failed(str(error), EXIT_MISTAKE)
    except DataError as error:
        return _failed(str(error), 1)
    except _StoppedError as stopped:
        code = 128 + stopped.number
        return _failed("stopped; what is done is kept, the same command continues", code)
    except OSError as error:
        if command.is_closed_pipe(error):
            return command.EXIT_CLOSED_PIPE
        return _failed(f"{command.explained(error)}{remedy}", 1)
    except Exception as error:
        # These modules import datatrove, which takes its time, so they are imported where needed.
        from data_prep.pipeline.slurm import SubmitError
        from data_prep.pipeline.workers import WorkerLostError

        if isinstance(error, SubmitError | WorkerLostError):
            return _failed(str(error), 1)
        raise


def _stop(number: int, frame: FrameType | None) -> None:
    # Once: a second one would interrupt the clearing up.
    for each in _STOPPING:
        signal.signal(each, signal.SIG_IGN)
    raise _StoppedError(number)


def _failed(message: str, code: int) -> int:
    command.say(f"data-prep: {message}")
    return code


if __name__ == "__main__":
    sys.exit(main())
