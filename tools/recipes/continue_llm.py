"""A public language model with Infini-attention, continued until it finds passkeys far back.

    python tools/recipes/continue_llm.py OUT --model SmolLM2-135M-Instruct.Q4_1.gguf

Imports the model, makes passkey documents of 256 to 8,192 of its tokens and a preface of filler,
continues the model in two stages, without and with the preface (docs/recall.md), and asks it for
passkeys at up to 1,048,576 tokens: the paper's Table 3 on a public model. It first prints its
tokens, and its time at an assumed 30 % of an H100's peak. After an interruption the same command
continues.
`--prepare` ends before the training, for a machine that has no network; `--minutes` shortens the
stages so that they take so long at the assumed rate, `--steps` to so many steps in all. `--tiny`
takes a small random model through everything on a CPU, which only tests the recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import commands
import evidence
from commands import CONFIGS

from data_prep.dataset import durable, shards
from data_prep.recall.passkey import FILLER
from data_prep.recall.tasks import Haystack
from data_prep.tokenizer.tokenizer import load as load_tokenizer
from pretrain.checkpoint.manifest import CHECKPOINTS, read_manifest, step_name, steps_in
from pretrain.config.root import Config
from pretrain.jobs import origin
from pretrain.model import flops

CONFIG = CONFIGS / "continue_llm.yaml"
LENGTHS = tuple(2**power for power in (13, 15, 17, 18, 19, 20))
PEAK, SHARE = 989e12, 0.3
_TINY = (
    *("train.start_from=", "model.d_model=32", "model.n_layers=2", "model.n_heads=2"),
    *("model.n_kv_heads=1", "model.d_head=16", "model.d_ff=64", "model.segment=32"),
    *("data.lanes=2", "train.micro_batch=2", "train.precision=float32"),
    *("launch.device=cpu", "checkpoint.every=2", "train.window_segments=2"),
)


@dataclass(frozen=True)
class Stage:
    """A run of `pretrain train` from the weights before it."""

    name: str
    steps: int
    preface: bool
    lr: float


STAGES = (Stage("1_near", 460, False, 3e-4), Stage("2_far", 300, True, 1e-4))
ALL = sum(stage.steps for stage in STAGES)


@dataclass(frozen=True)
class Sizes:
    """What is made: documents, their longest prompt, and the preface's tokens of a lane."""

    documents: int
    longest: int
    preface: int
    lengths: tuple[int, ...]


WHOLE = Sizes(4000, 8192, 3 * 2**19, LENGTHS)
SMALL = Sizes(40, 400, 1000, (128, 256))


def main() -> None:
    """Make what is missing, train, and ask; exit code 2 without a model."""
    parsed = _parser().parse_intermixed_args()
    sizes = SMALL if parsed.tiny else replace(WHOLE, longest=parsed.longest)
    lengths = parsed.lengths or sizes.lengths
    out: Path = parsed.out
    source = out / "model"
    if not parsed.tiny:
        _import(parsed.model, source)
    evidence.begin(out, {"tiny": parsed.tiny, "longest": sizes.longest})
    tokenizer = _documents(out, sizes)
    config = _config(parsed, STAGES[0], None)
    vocabulary = load_tokenizer(tokenizer).vocab_size
    steps = 4 if parsed.tiny else parsed.steps
    stages = shortened(config, vocabulary, steps, parsed.minutes)
    print("\n".join(announced(config, vocabulary, stages)), flush=True)
    if not parsed.prepare:
        run = source if source.exists() else None
        for stage in stages:
            run = _trained(parsed, stage, run)
        assert run is not None
        _asked(out, run, lengths, parsed.samples)


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser(__doc__, ("out", "directory of everything"), of="both stages")
    parser.add_argument("--model", type=Path, help="the model to import: GGUF file or directory")
    parser.add_argument("--prepare", action="store_true", help="end before the training")
    parser.add_argument(
        "--minutes", type=commands.positive, help="that the training may take, as assumed"
    )
    parser.add_argument(
        "--steps", type=commands.number(1), default=ALL, help=f"of both stages (default {ALL})"
    )
    parser.add_argument(
        "--longest",
        type=commands.number(1),
        default=WHOLE.longest,
        help=f"tokens of the longest document to learn from (default {WHOLE.longest}); only its "
        "answer is a target, so take a step's tokens at most",
    )
    parser.add_argument(
        "--lengths",
        type=commands.numbers(1),
        help="tokens to ask at (default: 8192 to 1048576)",
    )
    parser.add_argument(
        "--samples", type=commands.number(1), default=1, help="questions per depth (default 1)"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small random model on a CPU")
    return parser


def _import(model: Path | None, source: Path) -> None:
    """Import the model, once; exit code 2 without one, or where another one is there already."""
    if not source.exists():
        if model is None:
            sys.exit(_mistake(f"{source}: missing; give --model, a GGUF file or a directory"))
        commands.run("pretrain", "import", model, source)
    elif model is not None:
        found, _ = read_manifest(source / CHECKPOINTS / step_name(0))
        there = found.trainer["imported"]["path"]
        if there != str(model.resolve()):
            sys.exit(
                _mistake(f"--model: {source} is {there}; leave --model out, or choose another OUT")
            )


def _mistake(text: str) -> int:
    print(f"continue_llm.py: {text}", file=sys.stderr)
    return 2


def shortened(config: Config, vocabulary: int, steps: int, minutes: float | None) -> list[Stage]:
    """The stages with so many steps in all, fewer if the minutes allow fewer at the assumed rate.

    Each stage keeps its share of the steps, and two of them at least.
    """
    share = steps / ALL
    if minutes is not None:
        share = min(share, 60 * minutes / sum(_seconds(config, vocabulary, one) for one in STAGES))
    return [
        Stage(one.name, max(2, round(share * one.steps)), one.preface, one.lr) for one in STAGES
    ]


def _seconds(config: Config, vocabulary: int, stage: Stage) -> float:
    """Of a stage on an H100; a preface is a forward without logits more."""
    tokens = stage.steps * config.data.lanes * config.window
    useful = flops.training_flops_per_token(config.model, vocabulary, config.window)
    more = flops.reading_flops_per_token(config.model, config.window) if stage.preface else 0.0
    return tokens * (useful + more) / (SHARE * PEAK)


def announced(config: Config, vocabulary: int, stages: list[Stage]) -> list[str]:
    """What the recipe will read and how long that takes, as assumed, and what it prints then."""
    weights = flops.parameters(config.model, vocabulary)
    lines = [
        f"{weights:,} parameters, memory {config.model.memory.kind}, segments of "
        f"{config.model.segment:,}, {config.data.lanes} lanes of {config.window:,} tokens"
    ]
    for stage in stages:
        tokens = stage.steps * config.data.lanes * config.window
        lines.append(
            f"stage {stage.name}: {stage.steps} steps, {tokens / 1e6:.1f} million tokens, "
            f"{'as many of the preface, ' if stage.preface else ''}"
            f"{_seconds(config, vocabulary, stage):.0f} s at {SHARE:.0%} (assumed) of "
            f"{PEAK / 1e12:.0f} TFLOP/s"
        )
    return [*lines, "then: a table of passkeys found, by length and depth, in passkey.md"]


def _config(parsed: argparse.Namespace, stage: Stage, run: Path | None) -> Config:
    return origin.load(CONFIG, _words(parsed, stage, run))


def _words(parsed: argparse.Namespace, stage: Stage, run: Path | None) -> list[str]:
    """The settings of a stage's run; those of the command line come last."""
    out: Path = parsed.out
    start, warmup = run or out / "model", min(20, stage.steps // 2)
    return [
        f"run.directory={out / 'runs' / stage.name}",
        f"data.train={out / 'data' / 'passkey'}",
        *([f"data.preface={out / 'data' / 'preface'}"] if stage.preface else []),
        f"train.steps={stage.steps}",
        f"optim.lr={stage.lr}",
        f"optim.warmup_steps={warmup}",
        f"optim.decay_steps={min(round(0.3 * stage.steps), stage.steps - warmup)}",
        f"launch.device={parsed.device}",
        *(_TINY if parsed.tiny else ()),
        *([] if parsed.tiny and run is None else [f"train.start_from={start}"]),
        *parsed.settings,
    ]


def _documents(out: Path, sizes: Sizes) -> Path:
    """Make the passkey documents and the preface in the model's tokens; returns its tokenizer."""
    data, texts = out / "data", out / "documents"
    tokenizer = _tokenizer(out)
    known = [] if tokenizer is None else [f"tokenizer.path={tokenizer}"]
    if not (data / "passkey" / shards.MANIFEST).exists():
        counted_in = ("--tokenizer", tokenizer) if tokenizer else ()
        commands.run(
            *("data-prep", "recall", texts / "passkey" / "passkey.jsonl.gz"),
            *("--documents", str(sizes.documents), "--min-tokens", str(min(256, sizes.longest))),
            *("--max-tokens", str(sizes.longest), *counted_in),
        )
        commands.prepare("passkey_cpu", texts / "passkey", data / "passkey", *known)
    made = tokenizer or next((data / "passkey").glob("tokenizer.*"))
    if not (data / "preface" / shards.MANIFEST).exists():
        pieces = FILLER.split()
        each = len(load_tokenizer(made).encode(f" {FILLER}"))
        text = " ".join(islice(cycle(pieces), sizes.preface * len(pieces) // each))
        lines = [json.dumps({"id": number, "text": text}) + "\n" for number in range(16)]
        path = texts / "preface" / "preface.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(path, "".join(lines).encode())
        own = f"tokenizer.path={made}"
        commands.prepare("my_texts", path.parent, data / "preface", "shards.count=16", own)
    return made


def _tokenizer(out: Path) -> Path | None:
    """The imported model's tokenizer; None if there is none."""
    return next(iter(sorted((out / "model").glob("tokenizer.*"))), None)


def _trained(parsed: argparse.Namespace, stage: Stage, run: Path | None) -> Path:
    """The run of a stage that has all of its steps."""
    directory: Path = parsed.out / "runs" / stage.name
    if stage.steps not in steps_in(directory / CHECKPOINTS):
        commands.run("pretrain", "train", CONFIG, *_words(parsed, stage, run))
    return directory


def _asked(out: Path, run: Path, lengths: tuple[int, ...], samples: int) -> None:
    """Ask for passkeys, from the shortest length on, and write the table after each."""
    import passkey

    from pretrain.trained import default_device, load

    trained, rows = load(run, default_device()), []
    for asked in passkey.passkeys(lengths, samples):
        rows += passkey.answered(trained, Haystack.repeated(), asked)["rows"]
        commands.conclude(
            out / "passkey", passkey.table(trained.model.config.memory.kind, rows), rows
        )


if __name__ == "__main__":
    main()
