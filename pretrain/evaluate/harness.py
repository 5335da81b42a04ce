"""EleutherAI's lm-evaluation-harness on our models, over tasks from files of this machine.

Each request is one document, streamed: contexts of any length in constant space. Task files of the
harness may name functions of their own, which run as code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from pretrain.evaluate import results
from pretrain.evaluate.generate import extended, generate
from pretrain.evaluate.questions import EvaluationError, Sampling
from pretrain.trained import Trained

_MEASURED = ("results", "versions", "n-shot", "n-samples", "higher_is_better")


def run(
    path: Path,
    tasks_directory: Path,
    *,
    tasks: Sequence[str],
    shots: int | None,
    limit: int | None,
) -> int:
    """Evaluate a run or checkpoint on the harness's tasks in a directory, all where none is named.

    Prints the harness's table, and writes its results to `harness-STEP.json` in the run; returns
    the exit code, 0. Nothing is downloaded. Raises EvaluationError and what `open_model` raises.
    """
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[variable] = "1"
    # Imported now, since `datasets` looks at the variables as it is imported.
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    manager, names = _tasks(tasks_directory, tasks)
    trained = results.open_model(path)
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
    if unknown := sorted(set(asked) - set(there)):
        raise EvaluationError(f"{directory}: has no task {', '.join(unknown)}; it has {there}")
    if not there:
        raise EvaluationError(
            f"{directory}: no task file in it; expected task files (YAML) of the harness"
        )
    return manager, sorted(asked) or there


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

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return [self._score(context, following) for _, context, following in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """The log-likelihood of whole texts, nats."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        return [self._score([self.prefix_token_id], text)[0] for text in texts]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """What follows each context, up to the first of the request's `until`."""
        return [self._continuation(*request.args) for request in requests]

    def _score(self, context: Sequence[int], following: Sequence[int]) -> tuple[float, bool]:
        """Nats of `following` after `context`, and whether each token of it is the likeliest."""
        tokens = np.array([*context, *following], np.int64)
        stream = self._trained.model.open_stream(1, self._trained.device)
        total, greedy, done = 0.0, True, 0
        for logits, _ in extended(self._trained, tokens[:-1], stream):
            first = max(len(context) - 1 - done, 0)
            done += len(logits)
            if first >= len(logits):
                continue
            scores = logits[first:].float().log_softmax(dim=1).cpu()
            targets = torch.from_numpy(tokens[done - len(scores) + 1 : done + 1])
            total += float(scores.gather(1, targets[:, None]).double().sum())
            greedy = greedy and bool((scores.argmax(dim=1) == targets).all())
        return total, greedy

    def _continuation(self, context: str, options: Mapping[str, Any]) -> str:
        asked = normalize_gen_kwargs(dict(options))
        ends = [end for end in asked["until"] if end]
        sampling = Sampling(
            asked["max_gen_toks"],
            asked.get("temperature", 1.0 if asked.get("do_sample") else 0.0),
            asked.get("top_p", 1.0),
        )
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


def _plain(value: Any) -> Any:
    """As JSON holds it; what a metric could not compute is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and value != value:
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
