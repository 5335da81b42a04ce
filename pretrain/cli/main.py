"""`pretrain`: plan, train, evaluate, generate, plot; import, export; check and preflight for jobs.

torch is imported by the commands that need it, after the configuration was checked.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from data_prep.dataset import settings
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError, read_manifest
from data_prep.recall.tasks import PASSKEY, TASKS
from pretrain import config as configuration
from pretrain.checkpoint import attempts
from pretrain.checkpoint.attempts import NoProgressError
from pretrain.config import Config, ImportConfig
from pretrain.evaluate import pairs
from pretrain.evaluate.questions import Asked
from pretrain.jobs import job, launch, origin
from pretrain.jobs.launch import Place
from pretrain.jobs.watchdog import Watchdog

_EXIT_CODES = """exit codes, also in exit.json of the run directory:
  0   finished
  1   failed (also 128 + the signal that killed a rank); the same command goes on from the last
      good checkpoint
  2   a mistake in the command, the configuration or the data set; or a newer start of the same run
      has taken over
  75  a signal (SIGTERM, SIGINT, SIGUSR1) stopped it after a checkpoint; the same command goes on
  78  train.max_attempts_without_progress starts in a row committed no checkpoint
"""

# Set by a batch script that itself counts the starts without progress, also those that end before
# there is a rank.
_STARTS_COUNTED = "PRETRAIN_STARTS_COUNTED"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; ends the process with the command's exit code."""
    words = _parser().parse_args(arguments)
    verb = " ".join([words.verb, *([words.kind] if words.verb == "eval" else [])])
    sys.exit(_code(verb, lambda: words.run(words)))


def _code(verb: str, action: Callable[[], int]) -> int:
    """The exit code of a command's action; what stopped it is told on stderr."""
    try:
        return action()
    except Exception as error:
        with contextlib.suppress(OSError):  # the disk of the log may be full
            print(_told(verb, error), file=sys.stderr)
        return launch.exit_code(error)


def _told(verb: str, error: Exception) -> str:
    if isinstance(error, SettingsError):
        return f"pretrain {verb}: this configuration cannot work:\n{error}"
    # Ours are written for the user; any other is a bug and shows its traceback.
    module = type(error).__module__.partition(".")[0]
    if isinstance(error, ValueError) and module in ("data_prep", "pretrain"):
        rank = os.environ.get("RANK")
        return f"pretrain {verb}: {f'rank {rank}: ' if rank else ''}{error}"
    return "".join(traceback.format_exception(error)).rstrip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrain", description="Train, evaluate and sample Infini-Transformers."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    _add_plan(verbs)
    _add_train(verbs)
    _add_eval(verbs)
    _add_generate(verbs)
    _add_import(verbs)
    _add_export(verbs)
    _add_plot(verbs)
    _add_check(verbs)
    _add_preflight(verbs)
    return parser


def _add_plan(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "plan",
        help="memory, time and what will not fit, before any GPU is asked for",
        description="Count a run's memory, FLOPs and bytes sent, and compute its time from data "
        "sheets and assumed shares. Needs no GPU. Exit code 1 where it does not fit.",
    )
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings that go before the file's"
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="ranks a node (default 8)")
    parser.add_argument("--gpu", default="h100", help="a100, h100, h200 or b200 (default h100)")
    parser.add_argument(
        "--peak-share",
        type=float,
        default=0.4,
        help="share of the dense bf16 peak that is assumed, with what is computed again as work "
        "(default 0.4; published: 0.33 to 0.46 for 1B to 8B on H100, without such work)",
    )
    parser.add_argument(
        "--vocab-size", type=int, help="pieces of the tokenizer, where the data set is not here"
    )
    parser.add_argument(
        "--simulate-ranks",
        action="store_true",
        help="also run the real ZeRO-3 of one of the ranks, on tensors without storage (minutes)",
    )
    parser.set_defaults(run=_plan)


def _add_train(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    keys = "\n".join(f"  {line}" for line in configuration.describe())
    train = verbs.add_parser(
        "train",
        help="train a model, or go on with a run",
        description="Train from a configuration; on a run directory that has checkpoints, resume.",
        epilog=f"settings and their defaults:\n{keys}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", type=Path, help="YAML file with what differs from the defaults")
    train.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings that go before the file's"
    )
    train.set_defaults(run=_train)


def _add_eval(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "eval",
        help="what a model can do, measured",
        description="Evaluate a run or one checkpoint of it; each kind has a --help of its own.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_perplexity(kinds)
    _add_harness(kinds)
    _add_passkey(kinds)
    _add_needles(kinds)
    _add_summaries(kinds)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="run directory, or one checkpoint of it")


def _add_perplexity(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "perplexity",
        help="bits a byte by position, with memory and with its read masked",
        description="Stream whole documents through a model and report how well it predicts them.",
    )
    _add_model(parser)
    parser.add_argument("--data", type=Path, required=True, help="data set directory of data-prep")
    parser.add_argument("--documents", type=int, help="evaluate the first so many (default: all)")
    parser.add_argument("--batch", type=int, default=8, help="documents side by side (default 8)")
    parser.add_argument(
        "--window-segments", type=int, help="segments a window (default: the run's)"
    )
    parser.set_defaults(run=_perplexity)


def _add_harness(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "harness",
        help="tasks of EleutherAI's lm-evaluation-harness, from local files",
        description="Run the harness's tasks in a directory, offline; needs the extra `harness`. "
        "A task file may name Python functions, which are run.",
    )
    _add_model(parser)
    parser.add_argument(
        "--tasks-directory", type=Path, required=True, help="directory of task files (YAML)"
    )
    parser.add_argument("--tasks", nargs="*", default=[], help="their names (default: all there)")
    parser.add_argument(
        "--shots", type=int, help="examples before a question (default: the task's)"
    )
    parser.add_argument("--limit", type=int, help="the first so many documents of each task")
    parser.set_defaults(run=_harness)


def _add_passkey(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "passkey",
        help="a key that stands far back in the prompt, by length and depth",
        description="Hide a five-digit key at several depths of a long prompt and ask for it. All "
        "prompts of a length are streamed side by side; what they share is read once.",
    )
    _add_model(parser)
    _add_lengths(parser, "4k,32k,128k")
    parser.add_argument(
        "--depths",
        type=_fractions,
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="D,D",
        help="places of the key, 0 the prompt's start, 1 its end (default 0,0.25,0.5,0.75,1)",
    )
    parser.set_defaults(run=_passkey)


def _add_needles(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "needles",
        help="facts in books: several needles, chains, common words, stories",
        description="Tasks after RULER and BABILong among the sentences of books. The places of "
        "the facts are drawn.",
    )
    _add_model(parser)
    parser.add_argument(
        "--filler", type=Path, required=True, help="data set directory of data-prep with books"
    )
    parser.add_argument(
        "--tasks",
        type=lambda word: word.split(","),
        default=[task for task in TASKS if task != PASSKEY],
        metavar="T,T",
        help="some of single, multikey, multivalue, multiquery (needles), variables, words, and "
        "qa1, qa2, qa3 (stories); default: all",
    )
    _add_lengths(parser, "4k,16k,64k,128k")
    parser.set_defaults(run=_needles)


def _add_summaries(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "summaries",
        help="answers about whole documents, scored by Rouge",
        description="Stream each document, draw its answer, and compare it with the reference of "
        "the pair. Defaults of the drawing are the paper's.",
    )
    _add_model(parser)
    parser.add_argument(
        "pairs", type=Path, nargs="+", metavar="PAIRS.jsonl[.gz]", help="a pair a line"
    )
    parser.add_argument("--name", help="of the report (default: the first file's name)")
    parser.add_argument("--documents", type=int, help="evaluate the first so many (default: all)")
    parser.add_argument(
        "--shares",
        type=_fractions,
        default=[1.0],
        metavar="S,S",
        help="of each document, from its start: several give a plot, e.g. 0.1,0.25,0.5,1 "
        "(default 1)",
    )
    for option, what in (
        ("--prompt-field", "key of a line's document"),
        ("--answer-field", "key of its reference"),
        ("--question", "text between the document and the answer"),
    ):
        parser.add_argument(
            option, help=f"{what} (default: as in the pairs that the run was trained on)"
        )
    parser.add_argument(
        "--max-tokens", type=int, default=1024, help="of an answer, at most (default 1024)"
    )
    parser.add_argument("--temperature", type=float, default=0.5, help="0: greedy (default 0.5)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus mass (default 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same answers (default 0)")
    parser.set_defaults(run=_summaries)


def _add_lengths(parser: argparse.ArgumentParser, lengths: str) -> None:
    parser.add_argument(
        "--lengths",
        type=_counts,
        default=_counts(lengths),
        metavar="N,N",
        help=f"tokens of the prompts, k for 1,024 and m for 1,048,576 (default {lengths})",
    )
    parser.add_argument("--samples", type=int, default=4, help="prompts a cell (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same prompts (default 0)")


def _counts(word: str) -> list[int]:
    sizes = {"k": 2**10, "m": 2**20}
    try:
        return [
            int(part[:-1]) * sizes[part[-1]] if part[-1:] in sizes else int(part)
            for part in word.lower().split(",")
        ]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r}: expected numbers as 4096,32k,1m") from None


def _fractions(word: str) -> list[float]:
    try:
        return [float(part) for part in word.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r}: expected numbers as 0,0.5,1") from None


def _add_generate(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "generate",
        help="continue a text",
        description="Continue a prompt of any length in constant space, as text on stdout.",
    )
    _add_model(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt-file", help="file with the prompt; - is stdin")
    prompt.add_argument("--prompt", default="", help="the prompt (default: the document's start)")
    parser.add_argument("--max-tokens", type=int, default=256, help="at most so many (default 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus mass (default 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    parser.set_defaults(run=_generate)


def _add_import(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    keys = "\n".join(f"  {line}" for line in settings.describe(ImportConfig))
    parser = verbs.add_parser(
        "import",
        help="take in a Hugging Face model of the Llama family",
        description="Turn a directory with config.json, safetensors and a tokenizer into a "
        "checkpoint that train.start_from, eval, generate and export read.",
        epilog=f"settings and their defaults:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="the model's directory")
    parser.add_argument("out", type=Path, help="directory to be made")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.model or tokenizer.json (default: the one there)"
    )
    parser.set_defaults(run=_import)


def _add_export(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "export",
        help="write a model that Hugging Face's transformers load",
        description="Write safetensors, config.json, the tokenizer and the code of the model: "
        "AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True) loads it. A model "
        "without memory becomes a plain Llama, which is the same for texts of one segment.",
    )
    _add_model(parser)
    parser.add_argument("out", type=Path, help="directory to be made")
    parser.add_argument(
        "--dtype",
        choices=["stored", "float32", "bf16"],
        default="stored",
        help="of the weights written (default: as they are stored, exact)",
    )
    parser.set_defaults(run=_export)


def _add_plot(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "plot",
        help="draw a run's curves",
        description="Write PNGs of a run's loss, bits a byte by position, gates and speed.",
    )
    parser.add_argument("path", type=Path, help="run directory")
    parser.set_defaults(run=_plot)


def _add_check(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "check",
        help="tell every mistake that a training job would end with",
        description="Check a configuration for a job of several nodes, before it is submitted; "
        "print what the job needs to know.",
    )
    parser.add_argument("config", type=Path, help="YAML file with what differs from the defaults")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--nodes", default="1", metavar="N[-M]", help="nodes (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="GPUs of a node (default 0)")
    parser.add_argument(
        "--made-before",
        action="append",
        default=[],
        metavar="DIR",
        help="a data set that an earlier job makes, so that it need not be there; may be repeated",
    )
    parser.set_defaults(run=_check)


def _add_preflight(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "preflight",
        help="check the nodes of a job and name the bad ones",
        description="Check this machine's devices and the run directory, and with --nodes the "
        "nodes of a job against each other; to be started once on each of them.",
        epilog="exit codes: 0 all nodes are good; 1 some are not, or it could not be found out",
    )
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of a node (default 1)")
    parser.add_argument("--nodes", default="", help="all nodes, n1,n2,...; the first one compares")
    parser.add_argument("--node", default="", help="this node's name among them")
    parser.add_argument("--address", default="", help="the first node's (default: its name)")
    parser.add_argument("--port", type=int, default=29400, help="free port of the first node")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds for a node to answer (default 60)"
    )
    parser.add_argument(
        "--slow-factor",
        type=float,
        default=3.0,
        help="a node so many times slower than the median is bad (default 3)",
    )
    parser.set_defaults(run=_preflight)


def _plan(words: argparse.Namespace) -> int:
    config = configuration.load(words.config, words.settings)
    vocab_size = words.vocab_size or _vocab_size(config)
    from pretrain.planning import plan

    asked = plan.cluster(words.gpu, words.nodes, words.gpus_per_node, words.peak_share)
    return plan.run(config, vocab_size, asked, words.simulate_ranks)


def _vocab_size(config: Config) -> int:
    """Of the data set's tokenizer. Raises SettingsError where there is no data set yet."""
    key, source = next(iter(config.data.sources.items()))
    try:
        return read_manifest(Path(source.data)).tokenizer.vocab_size
    except DataError as error:
        raise SettingsError(
            [f"{key}: {error}; or give --vocab-size, e.g. 128256 for Llama 3's"]
        ) from None


def _train(words: argparse.Namespace) -> int:
    config = configuration.load(words.config, words.settings)
    place = launch.place_in(os.environ)
    if place is None:
        ranks = config.launch.ranks or launch.default_ranks(config)
        _check_start(config, ranks)
        command = [sys.executable, "-m", "pretrain.cli", "train", str(words.config)]
        return launch.start_ranks([*command, *words.settings], ranks)
    launch.leave(_code(words.verb, lambda: _train_rank(config, place)))


def _train_rank(config: Config, place: Place) -> int:
    """Train as one of the ranks; rank 0 numbers the attempt and records how it ends."""
    directory = Path(config.run.directory)
    limits = config.watchdog
    watchdog = Watchdog(
        directory, place.rank, {"start": limits.start, "step": limits.step, "save": limits.save}
    )
    if place.rank != 0:
        return _train_watched(config, place, watchdog, 0)
    counted = _STARTS_COUNTED in os.environ
    patience = None if counted else config.train.max_attempts_without_progress
    attempt = attempts.claim(directory, place.size, config.train.steps, patience)
    watchdog.beat("start", attempt=attempt.number)
    with attempts.failures_recorded(attempt, launch.exit_code):
        if attempt.futile:
            raise NoProgressError(attempt.futile)
        code = _train_watched(config, place, watchdog, attempt.number)
    attempt.end(code, "finished" if code == 0 else "stopped by a signal after a checkpoint")
    return code


def _train_watched(config: Config, place: Place, watchdog: Watchdog, attempt: int) -> int:
    _check_start(config, place.size)
    from pretrain.training import trainer

    return trainer.train(config, place, watchdog, attempt)


def _check_start(config: Config, ranks: int) -> None:
    """Everything that can be known before a rank starts. Raises SettingsError with all of it."""
    problems = config.rank_problems(ranks)
    if config.model.local_attention == "flash" and importlib.util.find_spec("flash_attn") is None:
        problems.append(
            "model.local_attention: flash-attn is not installed; install the extra `gpu` (README), "
            "or set it to auto or sdpa"
        )
    problems += _data_problems(config, []) + origin.problems(config)
    if problems:
        raise SettingsError(problems)


def _check(words: argparse.Namespace) -> int:
    config = configuration.load(words.config, words.settings)
    problems = _data_problems(config, words.made_before) + origin.problems(config)
    try:
        planned = job.plan(config, words.nodes, words.gpus_per_node)
    except SettingsError as error:
        problems = [*error.problems, *problems]
    if problems:
        raise SettingsError(problems)
    print(f"directory={planned.directory}")
    print(f"ranks={planned.ranks}")
    print(f"patience={config.train.max_attempts_without_progress}")
    print(f"lanes={config.data.lanes}")
    print(f"cpu={int(config.launch.device == 'cpu')}")
    print(f"validation={config.data.validation}")
    return 0


def _preflight(words: argparse.Namespace) -> int:
    config = configuration.load(words.config, words.settings)
    # A node that does not answer is told by its name; torch would add its C++ stacks.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from pretrain.jobs import preflight

    names = words.nodes.split(",") if words.nodes else ["localhost"]
    node = words.node or names[0]
    if node not in names:
        raise SettingsError([f"--node: {node} is none of --nodes {words.nodes}"])
    meeting = preflight.Meeting(names, node, words.address or names[0], words.port, words.timeout)
    return preflight.run(config, words.ranks, meeting, words.slow_factor)


def _data_problems(config: Config, made_before: Sequence[str]) -> list[str]:
    """Why the data sets cannot be read, or not together, but for those that are made before."""
    directories = {key: source.data for key, source in config.data.sources.items()}
    for key, directory in (
        ("data.preface", config.data.preface),
        ("data.validation", config.data.validation),
    ):
        if directory:
            directories[key] = directory
    later = {Path(directory).absolute() for directory in made_before}
    directories = {key: d for key, d in directories.items() if Path(d).absolute() not in later}
    problems, manifests = [], {}
    for key, directory in directories.items():
        try:
            manifest = manifests[key] = read_manifest(Path(directory))
        except DataError as error:
            problems.append(f"{key}: {error}")
            continue
        if len(manifest.shards) < config.data.lanes:
            problems.append(
                f"{key}: {directory} has {len(manifest.shards)} shards for "
                f"data.lanes={config.data.lanes}, and a lane needs one of its own; cut it into "
                "more (data-prep reshard), or lower data.lanes"
            )
    first = next(iter(manifests), "")
    for key, manifest in manifests.items():
        if manifest.tokenizer.sha256 != manifests[first].tokenizer.sha256:
            problems.append(
                f"{key}: its tokenizer is another than {first}'s; prepare it with "
                f"tokenizer.path={directories[first]}/{manifests[first].tokenizer.file}"
            )
    return problems


def _perplexity(words: argparse.Namespace) -> int:
    from pretrain.evaluate import perplexity

    return perplexity.run(
        words.path,
        words.data,
        window_segments=words.window_segments,
        max_documents=words.documents,
        batch=words.batch,
    )


def _harness(words: argparse.Namespace) -> int:
    if importlib.util.find_spec("lm_eval") is None:
        raise SettingsError(["lm-eval is not installed; install the extra `harness` (README)"])
    from pretrain.evaluate import harness

    return harness.run(
        words.path,
        words.tasks_directory,
        tasks=words.tasks,
        shots=words.shots,
        limit=words.limit,
    )


def _passkey(words: argparse.Namespace) -> int:
    return _recall(words, [PASSKEY], words.depths, None)


def _needles(words: argparse.Namespace) -> int:
    return _recall(words, words.tasks, [None], words.filler)


def _recall(
    words: argparse.Namespace,
    tasks: Sequence[str],
    depths: Sequence[float | None],
    filler: Path | None,
) -> int:
    asked = Asked(tasks, words.lengths, depths, words.samples, words.seed)
    problems = asked.problems()
    if filler is not None:
        try:
            read_manifest(filler)
        except DataError as error:
            problems.append(f"--filler: {error}")
    if problems:
        raise SettingsError(problems)
    from pretrain.evaluate import recall

    return recall.run(words.path, words.kind, asked, filler)


def _summaries(words: argparse.Namespace) -> int:
    asked = pairs.Asked(words.shares, words.max_tokens, words.temperature, words.top_p, words.seed)
    problems = asked.problems()
    if words.documents is not None and words.documents < 1:
        problems.append(f"--documents: expected at least 1, found {words.documents}")
    fields, unknown = pairs.fields(
        words.path, words.prompt_field, words.answer_field, words.question
    )
    read, wrong = pairs.read(words.pairs, fields)
    if problems := [*problems, *unknown, *wrong]:
        raise SettingsError(problems)
    from pretrain.evaluate import summaries

    name = words.name or words.pairs[0].name.removesuffix(".gz").removesuffix(".jsonl")
    return summaries.run(words.path, name, read[: words.documents], fields.question, asked)


def _generate(words: argparse.Namespace) -> int:
    from pretrain.evaluate import generate

    return generate.run(
        words.path,
        prompt=words.prompt,
        prompt_file=words.prompt_file,
        max_tokens=words.max_tokens,
        temperature=words.temperature,
        top_p=words.top_p,
        seed=words.seed,
    )


def _import(words: argparse.Namespace) -> int:
    from pretrain.convert import llama

    return llama.run(words.source, words.out, words.settings, words.tokenizer)


def _export(words: argparse.Namespace) -> int:
    from pretrain.convert import export

    return export.run(words.path, words.out, words.dtype)


def _plot(words: argparse.Namespace) -> int:
    from pretrain import plot

    for path in plot.plot(words.path):
        print(path)
    return 0
