"""A coverage-guided fuzzer of one parser: fuzz_one.py TARGET [libFuzzer's options] CORPUS.

atheris follows the branches of our parsers; libFuzzer bounds the memory of an input, and leaves the
first that breaks the target in `-artifact_prefix`. The time of an input is bounded in CPU seconds,
since other work on the machine takes its share of the clock, by which libFuzzer ends what hangs.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The modules beside this file are found by their package, and never stand before others' names.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import atheris  # noqa: E402

with atheris.instrument_imports(include=["data_prep", "pretrain"], enable_loader_override=False):
    from tools.promises import fuzz_targets

    # What a target imports when it is called is followed, too.
    for name in sys.argv[1:2]:
        for seed in fuzz_targets.seeds(name):
            fuzz_targets.TARGETS[name](seed)


def main() -> None:
    """Fuzz until libFuzzer's options say that it is enough; it never returns."""
    name, *options = sys.argv[1:]
    atheris.Setup([sys.argv[0], *options], fuzz_targets.bounded(fuzz_targets.TARGETS[name]))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
