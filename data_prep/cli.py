"""The command line of data-prep."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from data_prep import config as configuration
from data_prep.config import Config
from data_prep.dataset import shards
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError
from data_prep.pipeline import reshard
from data_prep.pipeline.workspace import WorkspaceError
from data_prep.recall import generate, name_pairs, tasks
from data_prep.report import statistics
from data_prep.sources.inputs import InputChangedError
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import TokenizerError

_EXAMPLES = """examples:
  data-prep run configs/data/stdlib.yaml output=data/stdlib
  data-prep run configs/data/novels_train.yaml root=corpus output=data/novels workers=8
  data-prep reshard data/novels --shards 64 --output data/novels_64
  data-prep submit configs/data/novels_train.yaml output=data/novels slurm.partition=cpu
  data-prep verify data/novels
  data-prep run configs/data/novels_train.yaml root=corpus --dry-run
  data-prep stats data/novels --json
  data-prep report data/novels

A run that was stopped or killed continues when the same command is given again.
"""
_SIGNAL_EXIT = 128


class _StoppedError(Exception):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. 0: done; 1: a damaged data set, a full disk, a lost worker; 2: a mistake."""
    parsed = _parsed(arguments)
    act: Callable[[argparse.Namespace], int] = parsed.act
    try:
        return act(parsed)
    except (SettingsError, TokenizerError, WorkspaceError, InputChangedError) as error:
        return _tell(_one_message(error), 2)
    except DataError as error:
        return _tell(str(error), 1)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    # argparse takes no positional words after an option, but settings may stand there.
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(parsed, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def _one_message(error: ValueError) -> str:
    return (
        f"the configuration cannot work\n{error}"
        if isinstance(error, SettingsError)
        else str(error)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="data-prep",
        description="Turn text into tokenized, shuffled, checksummed shards for training.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    keys = "configuration keys:\n  " + "\n  ".join(configuration.describe())
    for name, text in (
        ("run", "make a data set, or continue making it"),
        ("submit", "the same, as arrays of Slurm jobs"),
        ("tokenizer", "train or copy the tokenizer alone"),
        ("shards", "make the rest, with the tokenizer that is there"),
    ):
        verb = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"{keys}\n\n{_EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
        verb.add_argument(
            "overrides", nargs="*", metavar="key=value", help="settings on top of the file"
        )
        verb.add_argument(
            "--limit", type=int, metavar="N", help="the same as limit=N: a trial on some records"
        )
        verb.set_defaults(act=_make)
        if name == "run":
            verb.add_argument(
                "--dry-run",
                action="store_true",
                help="tell the plan and an estimate, write nothing",
            )
    check = verbs.add_parser(
        "check",
        help="tell every mistake in a configuration",
        description="Check a configuration as `run` would, and print the data set's directory.",
    )
    check.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    check.add_argument("overrides", nargs="*", metavar="key=value")
    check.add_argument(
        "--made-before",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a data set that will be there: its tokenizer may be named already; may be repeated",
    )
    check.set_defaults(act=_check)
    cut = verbs.add_parser(
        "reshard",
        help="cut a data set into another number of shards",
        description="The same documents in the same order, in other shards: to the byte what "
        "`run` makes with that shards.count, without tokenizing again.",
    )
    cut.add_argument("directory", type=_data_set, metavar="DIR")
    cut.add_argument("--shards", type=int, required=True, metavar="N", help="number of shards")
    cut.add_argument(
        "--output", type=Path, required=True, metavar="DIR2", help="directory of the new data set"
    )
    cut.set_defaults(act=lambda parsed: _stoppable(lambda: _reshard(parsed)))
    verify = verbs.add_parser("verify", help="read a data set and list every problem")
    verify.add_argument("directory", type=_data_set, metavar="DIR")
    verify.set_defaults(act=_verify)
    stats = verbs.add_parser("stats", help="count what a data set holds")
    stats.add_argument("directory", type=_data_set, metavar="DIR")
    stats.add_argument("--json", action="store_true", help="as one JSON object")
    stats.set_defaults(act=_stats)
    page = verbs.add_parser("report", help="write what a data set holds as one HTML page")
    page.add_argument("directory", type=_data_set, metavar="DIR")
    page.add_argument(
        "--output", type=Path, metavar="FILE.html", help="default: DIR/report.html"
    )
    page.set_defaults(act=_report)
    _add_recall(verbs)
    _add_pairs(verbs)
    return parser


def _add_recall(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "recall",
        help="write documents that ask for what stands far back in them",
        description="Write prompts and answers as jsonl (keys id, prompt, answer): passkeys, or "
        "tasks after RULER and BABILong among the sentences of books. The bytes depend on what is "
        "asked for and the seed alone.",
    )
    parser.add_argument("output", type=Path, metavar="FILE.jsonl[.gz]")
    parser.add_argument(
        "--tasks",
        type=lambda word: word.split(","),
        default=[tasks.PASSKEY],
        metavar="T,T",
        help=f"in turn, some of {', '.join(tasks.TASKS)} (default {tasks.PASSKEY})",
    )
    parser.add_argument("--documents", type=int, required=True, metavar="N")
    parser.add_argument("--min-tokens", type=int, default=128, help="of a prompt (default 128)")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a prompt (default 8192)")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    measured = parser.add_mutually_exclusive_group()
    measured.add_argument(
        "--filler",
        type=_data_set,
        metavar="DIR",
        help="data set of books to hide things in, by whose tokenizer prompts are measured",
    )
    measured.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="what prompts are measured by; the filler is the passkey's. Where neither is given a "
        "byte counts as a token: for texts to train a first tokenizer on",
    )
    parser.set_defaults(act=lambda parsed: _stoppable(lambda: _recall(parsed)))


def _recall(parsed: argparse.Namespace) -> int:
    wanted = generate.Wanted(
        parsed.tasks, parsed.documents, parsed.min_tokens, parsed.max_tokens, parsed.seed
    )
    problems = wanted.problems()
    if parsed.workers < 1:
        problems.append(f"--workers: expected at least 1, found {parsed.workers}")
    if problems:
        raise SettingsError(problems)
    model = None if parsed.tokenizer is None else tokenizer.load(parsed.tokenizer)
    if parsed.filler is None:
        haystack = tasks.Haystack.repeated()
    else:
        haystack = tasks.Haystack.of_books(parsed.filler)
        model = tokenizer.load(tokenizer.find(parsed.filler))
    generate.write(parsed.output, wanted, haystack, model, parsed.workers)
    unit = "bytes" if model is None else "tokens"
    print(
        f"{parsed.documents:,} documents, prompts of {parsed.min_tokens:,} to "
        f"{parsed.max_tokens:,} {unit}: {parsed.output}"
    )
    return 0


def _add_pairs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "pairs",
        help="write books, or passages of them, each with the names in it",
        description="Write prompts and answers as jsonl (keys id, prompt, answer): the text of a "
        "book and the names that it writes most often. To try out training and evaluation of "
        "summaries where no summaries are at hand. The bytes depend on the data set and on what is "
        "asked for alone.",
    )
    parser.add_argument("output", type=Path, metavar="FILE.jsonl[.gz]")
    parser.add_argument(
        "--books", type=_data_set, required=True, metavar="DIR", help="data set with books"
    )
    parser.add_argument(
        "--passages",
        type=int,
        metavar="N",
        help="so many passages, of books and from places that are drawn (default: each book whole)",
    )
    parser.add_argument("--min-tokens", type=int, default=256, help="of a passage (default 256)")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a passage (default 8192)")
    parser.add_argument("--names", type=int, default=8, help="of an answer at most (default 8)")
    parser.add_argument("--seed", type=int, default=1, help="of the passages (default 1)")
    parser.set_defaults(act=lambda parsed: _stoppable(lambda: _pairs(parsed)))


def _pairs(parsed: argparse.Namespace) -> int:
    wanted = name_pairs.Wanted(
        parsed.passages, parsed.min_tokens, parsed.max_tokens, parsed.names, parsed.seed
    )
    count = name_pairs.write(parsed.output, parsed.books, wanted)
    print(f"{count:,} pairs: {parsed.output}")
    return 0


def _make(parsed: argparse.Namespace) -> int:
    limit = [] if parsed.limit is None else [f"limit={parsed.limit}"]
    wanted = configuration.load(parsed.config, [*parsed.overrides, *limit])
    if getattr(parsed, "dry_run", False):
        return _stoppable(lambda: _plan(wanted))
    return _stoppable(lambda: _run(parsed.verb, wanted))


def _plan(wanted: Config) -> int:
    from data_prep.pipeline import estimate

    print("\n".join(estimate.lines(estimate.estimate(wanted))))
    return 0


def _stoppable(action: Callable[[], int]) -> int:
    """The exit code of an action that a signal may end, and the same command continues."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        return action()
    except _StoppedError as stopped:
        code = _SIGNAL_EXIT + stopped.number
        return _tell("stopped; what is done is kept, the same command continues", code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        remedy = "when that is mended, the same command continues"
        return _tell(f"{where}{error.strerror or error}; {remedy}", 1)


def _run(verb: str, wanted: Config) -> int:
    # datatrove takes its time to import: mistakes in the configuration are told before.
    from data_prep.pipeline.workers import WorkerLostError

    try:
        return _made(verb, wanted)
    except WorkerLostError as error:
        return _tell(str(error), 1)


def _made(verb: str, wanted: Config) -> int:
    from data_prep.pipeline import pipeline

    if verb == "tokenizer":
        path = pipeline.run_tokenizer(wanted)
        print(f"tokenizer: {path}")
        print("next: data-prep shards with the same configuration")
        return 0
    if verb == "submit":
        return _submit(wanted)
    outcome = pipeline.run(wanted, "shards" if verb == "shards" else "all")
    output = Path(wanted.output).expanduser()
    if outcome.already:
        print(f"{output} is finished already, from the same configuration: nothing to do")
    print("\n".join(statistics.closing(output, outcome.manifest, outcome.seconds)))
    return 0


def _check(parsed: argparse.Namespace) -> int:
    from data_prep.pipeline import pipeline

    wanted = configuration.load(parsed.config, parsed.overrides)
    model = Path(wanted.tokenizer.path).expanduser().absolute()
    checked = wanted
    if any(directory.absolute() in model.parents for directory in parsed.made_before):
        checked = dataclasses.replace(
            wanted, tokenizer=dataclasses.replace(wanted.tokenizer, path="")
        )
    pipeline.open_work(checked)
    print(f"output={Path(wanted.output).expanduser().absolute()}")
    return 0


def _reshard(parsed: argparse.Namespace) -> int:
    if not reshard.run(parsed.directory, parsed.output, parsed.shards):
        print(f"{parsed.output} is finished already, from the same data set: nothing to do")
    manifest = shards.read_manifest(parsed.output)
    print(
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens in "
        f"{len(manifest.shards):,} shards, in the order of {parsed.directory}"
    )
    print(f"data set: {parsed.output}")
    return 0


def _submit(wanted: Config) -> int:
    from data_prep.pipeline import slurm

    output = Path(wanted.output).expanduser()
    try:
        jobs = slurm.submit(wanted)
    except slurm.SubmitError as error:
        return _tell(str(error), 1)
    if not jobs:
        print(f"{output} is finished already, from the same configuration: nothing to do")
        return 0
    for stage, job in jobs.items():
        print(f"{stage:<10} job {job}, logs in {slurm.logs(output, stage)}")
    print(f"watch:  squeue --jobs={','.join(jobs.values())}")
    print(f"cancel: scancel {' '.join(jobs.values())}")
    print(f"at the end: data-prep verify {output}; after a failure the same command continues")
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    problems = shards.verify(parsed.directory)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        return _tell("\n".join([f"{parsed.directory}: {count}", *problems]), 1)
    manifest = shards.read_manifest(parsed.directory)
    print(
        f"{parsed.directory}: whole: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{len(manifest.shards):,} shards, every checksum right"
    )
    return 0


def _stats(parsed: argparse.Namespace) -> int:
    found = statistics.stats(parsed.directory)
    if parsed.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        print("\n".join(statistics.lines(found)))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    from data_prep.report import page

    output = parsed.output or parsed.directory / page.PAGE
    try:
        page.write(parsed.directory, output)
    except OSError as error:
        return _tell(f"{output}: cannot be written ({error.strerror})", 2)
    print(f"report: {output}")
    return 0


def _data_set(word: str) -> Path:
    path = Path(word)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a directory")
    return path


def _stop(number: int, frame: FrameType | None) -> None:
    # Once: a second one would interrupt the clearing up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise _StoppedError(number)


def _tell(message: str, code: int) -> int:
    print(f"data-prep: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
