"""`pretrain plan`, `check` and `preflight`: a run before it is started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from data_prep.dataset.command import option
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError
from pretrain.cli.train import OnConfig, OnRun
from pretrain.data.files import manifest_of
from pretrain.jobs import job, origin, resumable
from pretrain.jobs.start_checks import (
    directory_problems,
    new_run_problems,
    refuse,
    tracking_problems,
)


class Plan(OnConfig):
    """Estimate memory and time of a run, and report what does not fit.

    Counts a run's memory, FLOPs and bytes sent, and computes its time from data sheets and an
    assumed share of the peak. Needs no GPU. Exit code 1 where it does not fit.
    """

    nodes: int = option(1, "nodes", low=1)
    gpus_per_node: int | None = option(
        None, "ranks per node", otherwise="launch.ranks where that is set, else 8", low=1
    )
    gpu: Literal["a100", "h100", "h200", "b200"] = option("h100", "of the nodes")
    peak_share: float = option(
        0.4,
        "assumed share of the dense bf16 peak, recomputation counted as work; published: "
        "0.33 to 0.46 for 1B to 8B on H100, without recomputation",
        above=0,
        high=1,
    )
    vocab_size: int | None = option(
        None, "vocabulary size, where the data set is not on this machine", low=1
    )
    simulate_ranks: bool = option(
        False, "also run ZeRO-3 of one rank on tensors without storage, which takes minutes"
    )

    roofline: bool = option(
        False,
        "also print operations and bytes of each part of a step, and the least time they can take",
    )
    products: float | None = option(
        None,
        "TFLOP/s of large bf16 products, for --roofline",
        otherwise="measured: 790 on an h100 and an h200",
        above=0,
    )
    copies: float | None = option(
        None,
        "TB/s of a GPU's memory, for --roofline",
        otherwise="measured: 3.0 on an h100, 4.3 on an h200",
        above=0,
    )

    def problems(self) -> list[str]:
        if found := super().problems() or origin.unknown_shape(self.wanted):
            return found
        return [*self._vocabulary_problems(), *self._roofline_problems()]

    def _roofline_problems(self) -> list[str]:
        given = {"--products": self.products, "--copies": self.copies}
        if not self.roofline:
            return [
                f"{name}: only --roofline uses it; add that, or leave it out"
                for name, value in given.items()
                if value is not None
            ]
        found = [
            f"{name}: no rate is known of --gpu {self.gpu}; give it for --roofline"
            for name, value in given.items()
            if value is None and self.gpu not in ("h100", "h200")
        ]
        if self.wanted.train.precision != "bf16":
            found.append(
                f"train.precision: --roofline has ceilings for bf16, found "
                f"{self.wanted.train.precision}; set bf16"
            )
        return found

    def _vocabulary_problems(self) -> list[str]:
        if self.vocab_size is None:
            key, source = next(iter(self.wanted.data.sources.items()))
            try:
                manifest_of(source.data)
            except DataError as error:
                return [f"{key}: {error}; or give --vocab-size, e.g. 128256 for Llama 3's"]
        return []

    def run(self) -> int:
        from pretrain.planning import plan, roofline

        source = next(iter(self.wanted.data.sources.values()))
        vocab_size = self.vocab_size or manifest_of(source.data).tokenizer.vocab_size
        ranks = self.gpus_per_node or self.wanted.launch.ranks or 8
        asked = plan.cluster(self.gpu, self.nodes, ranks, self.peak_share)
        made = plan.make(self.wanted, vocab_size, asked, self.simulate_ranks)
        shown = plan.lines(made)
        if self.roofline:
            ceilings = roofline.ceilings(self.gpu, self.products, self.copies)
            shown += ["", *roofline.lines(roofline.make(made, ceilings))]
        print("\n".join(shown))
        return int(made.needed > made.cluster.gpu.memory)


class Check(OnRun):
    """Report every mistake that would end a training job.

    Checks a configuration for a job on several nodes before it is submitted, and prints what the
    batch script needs.
    """

    nodes: str = option("1", "nodes", metavar="N[-M]")
    gpus_per_node: int = option(0, "GPUs per node", low=0)
    made_before: list[Path] = option(
        [],
        "a data set that an earlier job makes and that need not exist yet; may be repeated",
        many="again",
        metavar="DIR",
    )

    def run(self) -> int:
        config = self.wanted
        problems = new_run_problems(config) + tracking_problems(config)
        problems += directory_problems(config, self.made_before)
        problems += origin.problems(config) + resumable.problems(config, self.made_before)
        try:
            ranks = job.ranks_per_node(config, self.nodes, self.gpus_per_node)
        except SettingsError as error:
            problems = [*error.problems, *problems]
        refuse(problems, config, self.made_before)
        print(f"directory={Path(config.run.directory).absolute()}")
        print(f"ranks={ranks}")
        print(f"patience={config.train.max_attempts_without_progress}")
        print(f"lanes={config.data.lanes}")
        print(f"cpu={int(config.launch.device == 'cpu')}")
        print(f"validation={config.data.validation}")
        return 0


class Preflight(OnConfig):
    """Check the nodes of a job and name the bad ones.

    Checks this machine's devices and the run directory, and with --nodes compares the nodes of a
    job with each other; run it once on each of them.
    """

    ranks: int = option(1, "ranks per node", low=1)
    nodes: str = option("", "all nodes, n1,n2,...; the first one collects the results")
    node: str = option("", "this node's name among them")
    address: str = option("", "the first node's", otherwise="its name")
    port: int = option(29400, "free port of the first node", low=1, high=65535)
    timeout: float = option(60.0, "seconds for a node to answer", above=0)
    slow_factor: float = option(
        3.0, "a node this many times slower than the median is bad", above=0
    )

    @classmethod
    def epilog(cls) -> str:
        return "exit codes: 0 all nodes are good; 1 some are not, or could not be checked"

    @property
    def names(self) -> list[str]:
        """Of all nodes."""
        return self.nodes.split(",") if self.nodes else ["localhost"]

    def problems(self) -> list[str]:
        unknown = self.node and self.node not in self.names
        own = (
            [f"--node: expected one of --nodes {self.nodes}, found {self.node}"] if unknown else []
        )
        return [*super().problems(), *own]

    def run(self) -> int:
        # A node that does not answer is reported by its name; torch would add its C++ stacks.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        from pretrain.jobs import preflight

        first = self.names[0]
        meeting = preflight.Meeting(
            self.names, self.node or first, self.address or first, self.port, self.timeout
        )
        return preflight.run(self.wanted, self.ranks, meeting, self.slow_factor)
