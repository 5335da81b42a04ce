"""What is decided about a job of several nodes before it is submitted, without torch."""

from __future__ import annotations

import math
import re

from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import counted
from pretrain.config.root import Config


def ranks_per_node(config: Config, nodes: str, gpus: int) -> int:
    """The ranks on each node, for a run on `nodes` (N, or N-M) nodes with `gpus` GPUs each.

    `launch.ranks` where that is set, else one per GPU, or one on a CPU. Raises SettingsError with
    every reason why the run cannot have any of these numbers of nodes.
    """
    problems = _directory_problems(config)
    ranks = config.launch.ranks or (gpus if config.launch.device != "cpu" else 0) or 1
    if config.launch.device == "cuda" and not gpus:
        problems.append(
            "launch.device: cuda, but the nodes have no GPUs; give their number per node"
        )
    elif config.launch.device != "cpu" and 0 < gpus < ranks:
        problems.append(
            f"launch.ranks: {ranks} ranks per node, but a node has {counted(gpus, 'GPU')}; "
            "set it to at most that"
        )
    counts = _counts(nodes)
    if counts is None:
        problems.append(f"nodes: {nodes!r} is not a number N or a range N-M of 1 or more nodes")
        counts = range(0)
    problems += _rank_problems(config, counts, ranks)
    if problems:
        raise SettingsError(problems)
    return ranks


def _counts(nodes: str) -> range | None:
    match = re.fullmatch(r"([1-9]\d{0,5})(?:-([1-9]\d{0,5}))?", nodes, re.ASCII)
    if match is None:
        return None
    least, most = int(match[1]), int(match[2] or match[1])
    return range(least, most + 1) if least <= most else None


def _directory_problems(config: Config) -> list[str]:
    if re.search(r"[\\%\x00-\x1f\x7f]", config.run.directory):
        return [
            f"run.directory: {config.run.directory!r} goes into the names of Slurm's logs, where "
            "% and \\ are replaced, and control characters break lines; choose another name"
        ]
    return []


def _rank_problems(config: Config, counts: range, ranks: int) -> list[str]:
    """Why some number of nodes that the scheduler may give cannot share lanes and windows."""
    wrong = [count for count in counts if config.rank_problems(count * ranks)]
    if not wrong:
        return []
    sequence = config.parallel.sequence
    fits = {n // ranks for n in config.fitting_ranks() if n % ranks == 0}
    choices = [f"{', '.join(map(str, sorted(fits))) or 'no'} {'node' if fits == {1} else 'nodes'}"]
    if all(count * ranks % sequence == 0 for count in counts):
        groups = math.lcm(*(count * ranks // sequence for count in counts))
        choices.append(f"data.lanes a multiple of {groups * max(config.train.micro_batch, 1)}")
    micro = f" in micro-batches of {config.train.micro_batch}" if config.train.micro_batch else ""
    grouped = f" in groups of {sequence} (parallel.sequence)" if sequence > 1 else ""
    return [
        f"nodes: {counted(config.data.lanes, 'lane')} (data.lanes) cannot be shared evenly by "
        f"{' or '.join(map(str, wrong))} {'node' if wrong == [1] else 'nodes'} of "
        f"{counted(ranks, 'rank')}{grouped}{micro}; choose {', or '.join(choices)}"
    ]
