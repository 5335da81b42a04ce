"""`pretrain`: plan, memories, train, evaluate, generate, plot, report, import, export, check, ...

Commands that need torch import it after the configuration was checked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from data_prep.dataset import command
from data_prep.dataset.command import CommandError, Program
from data_prep.dataset.settings import EXIT_MISTAKE
from pretrain.cli import convert, evaluate, jobs, memories, once, outcome, train

_PROGRAM = Program(
    "pretrain",
    "Train, evaluate and sample Infini-Transformers.",
    {
        "plan": jobs.Plan,
        "memories": memories.Memories,
        "train": train.Train,
        "eval perplexity": evaluate.Perplexity,
        "eval harness": evaluate.Harness,
        "eval passkey": evaluate.Passkey,
        "eval needles": evaluate.Needles,
        "eval mqar": evaluate.Mqar,
        "eval summaries": evaluate.Summaries,
        "generate": evaluate.Generate,
        "import": convert.Import,
        "export": convert.Export,
        "plot": convert.Plot,
        "report": convert.Report,
        "check": jobs.Check,
        "preflight": jobs.Preflight,
    },
    {
        "eval": "Evaluate a model.\n\n"
        "Evaluates a run or one of its checkpoints; each kind has its own --help."
    },
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; ends the process with the command's exit code."""
    try:
        name, chosen = command.parse(_PROGRAM, arguments)
    except CommandError as error:
        once.say(error)
        sys.exit(EXIT_MISTAKE)

    def flushed() -> int:
        code = chosen.run()
        sys.stdout.flush()
        return code

    code = outcome.code(name, flushed)
    command.flush()
    sys.exit(code)
