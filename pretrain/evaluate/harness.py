"""EleutherAI's lm-evaluation-harness on our models, over tasks from files of this machine.

Each request is one document, streamed: contexts of any length in constant space. Task files of the
harness may name functions of their own, which run as code.
"""

from __future__ import annotations

import hashlib
import os
import re
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

# First: these are read where the harness, or the data sets that it uses, are imported.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs

from data_prep.dataset import durable
from pretrain.config.run import Weights
from pretrain.evaluate import results
from pretrain.evaluate.generate import extended, finite, generate, read
from pretrain.evaluate.progress import TokenProgress
from pretrain.evaluate.questions import EvaluationError, Sampling
from pretrain.trained import Trained

# Options of a task's generation, and values of others that change nothing.
_UNDERSTOOD = (
    *("until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"),
    *("do_sample", "temperature", "top_p"),
)
_WITHOUT_EFFECT = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "top_k": (0, -1),
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "early_stopping": (False,),
    "use_cache": (True,),
}
# What tells a file of a task or a group from one that such files include, and where none are.
_NAMED = re.compile(r"^(task|group):[ \t]*(.*?)[ \t]*(?:[ \t]#.*)?$", re.MULTILINE)
_NO_TASKS = {"__pycache__", ".ipynb_checkpoints"}
_MEASURED = ("results", "versions", "n-shot", "n-samples", "higher_is_better")


def run(
    path: Path,
    tasks_directory: Path,
    *,
    tasks: Sequence[str],
    shots: int | None,
    limit: int | None,
    weights: Weights = "last",
) -> int:
    """Evaluate a run or checkpoint on the harness's tasks in a directory, all where none is named.

    Prints the harness's table, and writes its results to `harness-STEP.json` in the run; returns
    the exit code, 0. Nothing is downloaded. Raises EvaluationError and what `open_model` raises.
    """
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    with _its_errors_as_ours(tasks_directory):
        manager, names = _tasks(tasks_directory, tasks)
        loaded = manager.load(names)
    _check_asked(tasks_directory, loaded["tasks"], shots)
    trained = results.open_model(path, weights)
    manager.load = lambda _: loaded  # else it would read every data set again
    with _its_errors_as_ours(tasks_directory):
        found = simple_evaluate(
            Streamed(trained),
            tasks=names,
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
    report = {
        **results.of_model(trained),
        "tasks": names,
        "tasks_directory": tasks_directory.resolve().name,
        "tasks_sha256": _sha256(tasks_directory, loaded["tasks"]),
        "shots": shots,
        "limit": limit,
        **{key: _plain(found[key]) for key in _MEASURED if key in found},
    }
    results.publish(
        trained.run_directory,
        f"harness-{trained.step}",
        report,
        measured=_MEASURED,
        table=make_table(found),
    )
    return 0


def _tasks(directory: Path, asked: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's manager of the tasks in a directory, and the names of those asked for."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(directory), include_defaults=False)
    there = sorted(manager.all_tasks)
    if left_out := _left_out(directory, there):
        raise EvaluationError("; ".join(left_out))
    if unknown := sorted(set(asked) - set(there)):
        raise EvaluationError(f"{directory}: has no task {', '.join(unknown)}; it has {there}")
    if not there:
        raise EvaluationError(
            f"{directory}: no task file in it; expected task files (YAML) of the harness"
        )
    return manager, sorted(asked) or _each_once(manager)


def _left_out(directory: Path, there: Sequence[str]) -> list[str]:
    """Why files of tasks are left out by the harness, which says nothing of it; a sentence each."""
    problems = []
    first: dict[str, Path] = {}
    for path in sorted(directory.rglob("*.y*ml"), key=Path.as_posix):
        if not path.is_file() or _NO_TASKS & set(path.parts):
            continue
        named = dict(_NAMED.findall(path.read_text(encoding="utf-8", errors="replace")))
        if not named:
            continue
        name = str(named.get("group") or named.get("task")).strip("'\"")
        if path.suffix != ".yaml":
            problems.append(f"{path}: is not read by the harness; call it {path.stem}.yaml")
        elif name not in there:
            problems.append(f"{path}: is not YAML of a task or a group that the harness can read")
        elif first.setdefault(name, path) is not path:
            problems.append(f"{path}: is not read by the harness, as {first[name]} is {name}, too")
    return problems


def _each_once(manager: Any) -> list[str]:
    """The names of all groups, and of all tasks that are in none of them."""
    contents = {name: manager.load([name]) for name in manager.all_groups}
    inside = {
        name
        for group, held in contents.items()
        for name in (*held["tasks"], *held["groups"])
        if name != group
    }
    return sorted({*manager.all_groups, *manager.all_subtasks} - inside)


@contextmanager
def _its_errors_as_ours(directory: Path) -> Iterator[None]:
    """A block in which the harness runs: what it raises is one sentence that names the task.

    Raises EvaluationError. What our model raises for the harness stays as it is.
    """
    try:
        yield
    except EvaluationError:
        raise
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        own = f"{Streamed.__qualname__}."
        if any(frame.f_code.co_qualname.startswith(own) for frame in frames):
            raise
        tasks = [one for frame in frames if isinstance(one := frame.f_locals.get("self"), Task)]
        running = [task for task in tasks if task.config is not None]
        if running and (empty := _without_questions(running[-1], error)):
            raise EvaluationError(f"{directory}: {empty}") from error
        name = f"task {running[-1].config.task}" if running else "a task file"
        said = str(error).strip().partition("\n")[0]
        if said in ("", "None"):
            said = "see what the harness printed before"
        raise EvaluationError(
            f"{directory}: {name} cannot be run by the harness: {type(error).__name__}: {said}"
        ) from error


def _without_questions(task: Any, error: Exception) -> str:
    """Says so where a task that raised `error` has no questions; empty: it has, or may have."""
    empty = [f"{path} is empty" for path in _data_files(task) if _is_blank(path)]
    if not empty and "corresponds to no data" in str(error):
        empty = ["its files hold no document"]
    with suppress(Exception):  # of data sets that could not be read
        if not empty and not len(task.eval_docs):
            empty = ["of its documents none is left to ask"]
    return f"task {task.config.task} has no questions: {', '.join(empty)}" if empty else ""


def _is_blank(path: Path) -> bool:
    """Whether a file has nothing but white space."""
    with path.open("rb") as file:
        return all(not line.strip() for line in file)


def _check_asked(directory: Path, tasks: Mapping[str, Any], shots: int | None) -> None:
    """Raise EvaluationError with all that is asked and would be left out without a word."""
    problems = []
    for name, task in sorted(tasks.items()):
        if task.get_config("output_type") == "generate_until":
            options = task.get_config("generation_kwargs") or {}
            problems += [f"task {name}: {problem}" for problem in _generation_problems(options)]
        if shots and task.get_config("num_fewshot") == 0:
            problems.append(
                f"task {name}: its file sets num_fewshot: 0, which --shots {shots} does not "
                "change; leave --shots out, or edit the file"
            )
        problems += [
            f"task {name}: {key} is set, and the model reads text alone"
            for key in ("doc_to_image", "doc_to_audio")
            if task.get_config(key)
        ]
    if problems:
        raise EvaluationError("; ".join([f"{directory}: {problems[0]}", *problems[1:]]))


def _generation_problems(options: Mapping[str, Any]) -> list[str]:
    """Which options of a task's generation cannot be followed."""
    unknown = sorted(
        f"{key}: {value!r}"
        for key, value in options.items()
        if key not in _UNDERSTOOD
        and value is not None
        and value not in _WITHOUT_EFFECT.get(key, ())
    )
    if unknown:
        return [
            f"generation_kwargs {{{', '.join(unknown)}}} cannot be followed; expected some of "
            f"{', '.join(_UNDERSTOOD)}"
        ]
    try:
        _asked(options)
    except (TypeError, ValueError) as error:
        return [f"generation_kwargs {dict(options)} cannot be followed: {error}"]
    return []


def _asked(options: Mapping[str, Any]) -> tuple[list[str], Sampling]:
    """Where a continuation ends, and how it is sampled. Raises TypeError and ValueError."""
    asked = normalize_gen_kwargs(dict(options))
    ends = [end for end in asked["until"] if end]
    if wrong := [end for end in ends if not isinstance(end, str)]:
        raise TypeError(f"until: expected texts, found {wrong}")
    temperature = asked.get("temperature", 1.0 if asked.get("do_sample") else 0.0)
    top_p = 1.0 if asked.get("top_p") is None else asked["top_p"]
    return ends, Sampling(asked["max_gen_toks"], temperature, top_p)


def _sha256(directory: Path, tasks: Mapping[str, Any]) -> str:
    """Of the names and bytes of the task files in a directory, of the code beside them, and of the
    bytes of this machine's files that the tasks read their questions from."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.suffix in (".yaml", ".yml", ".py") and path.is_file():
            digest.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    for path in sorted({path for task in tasks.values() for path in _data_files(task)}):
        digest.update(f"{durable.sha256_of(path)}\0".encode())
    return digest.hexdigest()


def _data_files(task: Any) -> list[Path]:
    """The files of this machine that a task names as those of its questions."""
    given = (task.get_config("dataset_kwargs") or {}).get("data_files") or []
    listed = given.values() if isinstance(given, Mapping) else [given]
    places = [Path(p) for each in listed for p in ([each] if isinstance(each, str) else each)]
    return [
        path
        for place in places
        for path in Path(place.anchor).glob(str(place.relative_to(place.anchor)))
        if path.is_file()
    ]


class Streamed(TemplateLM):
    """A trained model as the harness asks for one."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self._trained = trained
        self._tokenizer = trained.tokenizer

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self._known(self._tokenizer.eos_id, "EOS")

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text without a context: BOS, or EOS where there is none."""
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a document's beginning, BOS first where there is one."""
        bos = self._tokenizer.bos_id
        head = [] if bos is None or add_special_tokens is False else [bos]
        return [*head, *self._tokenizer.encode(string).tolist()]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both, divided as the harness does, after as many as the context has alone.

        Where that leaves none for the continuation, since a token reaches into it from the context,
        that token is the continuation's. For a context without tokens stands `prefix_token_id`.
        """
        before, following = super()._encode_pair(context, continuation)
        if continuation and not following:
            alone, whole = (self.tok_encode(text) for text in (context, context + continuation))
            shared = takewhile(lambda pair: pair[0] == pair[1], zip(alone, whole, strict=False))
            before = [token for token, _ in shared]
            following = whole[len(before) :]
        return before or [self.prefix_token_id], following

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return [self._score(context, following) for _, context, following in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """The log-likelihood of whole texts, nats."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        return [self._score([self.prefix_token_id], text)[0] for text in texts]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """What follows each context, up to the first of the request's `until`.

        What is sampled depends on the context and on how often it was asked before (`repeats` of a
        task), not on other requests.
        """
        asked: Counter[str] = Counter()
        found = []
        for request in requests:
            context, options = request.args
            seed = _seed(context, asked[context])
            found.append(self._continuation(context, options, seed))
            asked[context] += 1
        return found

    def _score(self, context: Sequence[int], following: Sequence[int]) -> tuple[float, bool]:
        """Nats of `following` after `context`, and whether each token of it is the likeliest.

        Raises ResultError where a logit is not finite.
        """
        if not following:  # an empty text is certain
            return 0.0, True
        tokens = np.array([*context, *following], np.int64)
        stream = self._trained.model.open_stream(1, self._trained.device)
        # Whole spans of the context that are followed by more of it need no logits.
        span = self._trained.config.model.span
        total, greedy, done = 0.0, True, (len(context) - 1) // span * span
        if done:
            unseen = TokenProgress("context", done, lambda line: None)
            _, stream = read(self._trained, tokens[:done], stream, unseen)
        for logits, _ in extended(self._trained, tokens[done:-1], stream):
            first = max(len(context) - 1 - done, 0)
            done += len(logits)
            if first >= len(logits):
                continue
            scores = finite(logits[first:]).float().log_softmax(dim=1).cpu()
            targets = torch.from_numpy(tokens[done - len(scores) + 1 : done + 1])
            total += float(scores.gather(1, targets[:, None]).double().sum())
            greedy = greedy and bool((scores.argmax(dim=1) == targets).all())
        return total, greedy

    def _continuation(self, context: str, options: Mapping[str, Any], seed: int) -> str:
        ends, sampling = _asked(options)
        sampling = replace(sampling, seed=seed)
        ids, text = self._tokenizer.encode(context), ""
        for piece in generate(self._trained, ids, sampling, lambda line: None):
            text += piece
            if found := [text.index(end) for end in ends if end in text]:
                return text[: min(found)]
        return text

    def _known(self, id: int | None, name: str) -> int:
        if id is None:
            raise EvaluationError(f"{self._tokenizer.path}: has no {name}, which the harness needs")
        return id


def _seed(context: str, number: int) -> int:
    """The seed of the sample of this number after a context."""
    digest = hashlib.sha256(f"{number}\0{context}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _plain(value: Any) -> Any:
    """As JSON holds it; what a metric could not compute is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and value != value:
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
