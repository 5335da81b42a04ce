"""Every kind of memory at one shape, beside its public implementation.

    python tools/bench/memories.py --json out.json

For each kind of `model.memory.kind`, processes take turns of one step (forward and backward of a
window of one document in each lane, float32) while the others wait: the plain matrix products of
the step's linear maps, `memory.kind=none`, the kind, which carries its memory from step to step as
training does, and where PyPI has an implementation of it, the kind with an empty memory before the
window, and that implementation, which begins in the same way. A ratio is the median over pairs of
steps next to each other in time. The first steps are warm-up, and fill the memory that is carried.

The public implementations train as their authors train them, unmodified, with their faults (the
table's notes name them). They are installed at exact versions into a directory under .cache, and
use torch from this environment, to which nothing is added.
`--small --without-peers` runs the same code in seconds, to test it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import machine
import training
from training import Contestant

from pretrain.config.memory import MEMORY_KINDS

SMALL = {"d_model": 32, "n_layers": 4, "n_heads": 2, "n_kv_heads": 2, "d_head": 16,
         "d_ff": 85, "segment": 16}  # fmt: skip
PACKAGES = (
    "compressive-transformer-pytorch==0.4.0",
    "memorizing-transformers-pytorch==0.4.1",
    "recurrent-memory-transformer-pytorch==0.7.0",
    "infini-transformer-pytorch==0.2.1",
    # What these import, apart from torch, numpy, joblib and filelock, which are here.
    *("einops==0.8.2", "einops-exts==0.0.4", "faiss-cpu==1.15.1", "hyper-connections==0.1.9"),
    *("mogrifier==0.0.5", "rotary-embedding-torch==0.8.6"),
)
_HOME = machine.ROOT / ".cache/bench-memories"
_WARM_UP = 3  # steps


@dataclass(frozen=True)
class Peer:
    """A public implementation of a kind."""

    package: str
    settings: dict[str, int]
    """The kind's, under the names of ours."""
    note: str
    """How it differs from the kind at this shape, and which faults were left in."""


@dataclass(frozen=True)
class Shape:
    """What all contestants share."""

    sizes: dict[str, int]
    window: int
    lanes: int
    vocab_size: int
    threads: int

    def settings_of(self, kind: str) -> dict[str, int]:
        """The settings in which a kind differs from its defaults, by name."""
        segment, layers = self.sizes["segment"], self.sizes["n_layers"]
        return {
            "full": {"segments": self.window // segment},
            "compressive": {"cache": segment, "compressed": segment, "rate": 2},
            "memorizing": {
                **{"capacity": self.window, "neighbours": 32, "cache": segment},
                "layer": -(-layers * 3 // 4),
            },
            "rmt": {"vectors": 10},
            # 50 for segments of 1,024 to 2,048 tokens, as published, would be nearly a segment.
            "autocompressor": {"vectors": 4, "capacity": 16},
        }.get(kind, {})

    def peer_of(self, kind: str) -> Peer | None:
        """The public implementation of a kind; None if there is none."""
        infini = "gates start at 10, so that the memory is hardly read"
        notes = {
            "compressive": (
                "compressive-transformer-pytorch",
                "each segment is back-propagated alone; its weights of keys and values are "
                "detached in place and do not train (left in); learned positions",
            ),
            "memorizing": (
                "memorizing-transformers-pytorch",
                "each segment is back-propagated alone; neighbours are approximate, and one "
                "softmax takes the place of the gate (left in); one key/value head",
            ),
            "rmt": (
                "recurrent-memory-transformer-pytorch",
                "embeddings have a tenth of their gradient (its default)",
            ),
            "linear": ("infini-transformer-pytorch", infini),
            "delta": ("infini-transformer-pytorch", infini),
        }
        if kind not in notes:
            return None
        package, note = notes[kind]
        return Peer(package, self.settings_of(kind), note)

    def contestant(self, name: str, who: str, **more: Any) -> Contestant:
        """A contestant that takes steps without an optimizer."""
        settings = {"who": who, "shape": self.sizes, "vocab_size": self.vocab_size}
        settings |= {"window": self.window, "lanes": self.lanes, "threads": self.threads}
        settings |= {"optimizer": False}
        return Contestant(name, {**settings, **more}, _HOME if who.endswith("pytorch") else None)


@dataclass
class Group:
    """The contestants that take turns for one kind."""

    kind: str
    products: Contestant
    none: Contestant
    ours: Contestant
    fresh: Contestant | None
    """Ours with an empty memory before each window, to compare with the peer."""
    peer: Contestant | None
    note: str

    @classmethod
    def of(cls, kind: str, shape: Shape, with_peers: bool) -> Group:
        """The group of a kind."""
        group = "memory." + next(iter(MEMORY_KINDS[kind].settings), "")
        words = [f"{group}.{name}={value}" for name, value in shape.settings_of(kind).items()]
        found = shape.peer_of(kind) if with_peers else None
        fresh = peer = None
        if found is not None:
            fresh = shape.contestant(f"{kind}, fresh", "ours", memory=kind, settings=words)
            peer = shape.contestant(
                found.package, found.package, memory=kind, of_peer=found.settings,
                keep_freed_memory=False,
            )  # fmt: skip
        return cls(
            kind,
            shape.contestant("plain products", "products"),
            shape.contestant("none", "ours", memory="none"),
            shape.contestant(kind, "ours", memory=kind, settings=words, carry=True),
            fresh,
            peer,
            "" if found is None else found.note,
        )

    @property
    def contestants(self) -> list[Contestant]:
        """In the order of their turns."""
        wanted = [self.products, self.none, self.ours, self.fresh, self.peer]
        return [contestant for contestant in wanted if contestant is not None]

    def measure(self, rounds: int, warm_up: int) -> None:
        """Let all of them take `rounds` steps in turn."""
        try:
            for contestant in self.contestants:
                contestant.start(warm_up)
            for number in range(rounds):
                for contestant in self.contestants:
                    contestant.measure()
                    print(f"{number + 1}: {self.kind}: {contestant.name}: "
                          f"{contestant.seconds[-1]:.2f} s", file=sys.stderr)  # fmt: skip
        finally:
            for contestant in self.contestants:
                contestant.stop()

    def row(self) -> dict[str, Any]:
        """What was measured, and the ratios."""
        ours, none, products = self.ours, self.none, self.products
        tokens, flops = _tokens(ours.settings), ours.found["flops"]
        row = {
            "kind": self.kind,
            "note": self.note,
            **{one.name: _figures(one) for one in self.contestants},
            "flops_per_token": flops / tokens,
            "times_none": _ratio(ours.seconds, none.seconds),
            "of_products": flops / products.found["flops"] * _ratio(products.seconds, ours.seconds),
        }
        if self.peer is not None and self.fresh is not None:
            row |= {
                "peer": self.peer.name,
                "fresh": self.fresh.name,
                "times_peer": _ratio(self.peer.seconds, self.fresh.seconds),
            }
        return row


def _figures(contestant: Contestant) -> dict[str, Any]:
    return {
        **contestant.found,
        "settings": contestant.settings,
        "seconds": contestant.seconds,
        "tokens_per_second": _tokens(contestant.settings) / statistics.median(contestant.seconds),
        "peak_bytes": max(contestant.peaks),
        "state_bytes": contestant.state,
    }


def _ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """Of seconds, round by round."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def main() -> None:
    """Measure, print a table, write the JSON."""
    parsed = _parser().parse_args()
    shape = Shape(training.SMALL, 4096, parsed.lanes, 8192, parsed.threads)
    if parsed.small:
        shape = Shape(SMALL, 64, parsed.lanes, 64, parsed.threads)
    if unknown := set(parsed.kinds) - set(MEMORY_KINDS):
        sys.exit(f"--kinds: unknown: {', '.join(unknown)}; known: {', '.join(MEMORY_KINDS)}")
    groups = [Group.of(kind, shape, not parsed.without_peers) for kind in parsed.kinds]
    if any(group.peer for group in groups):
        _install()
    for group in groups:
        group.measure(parsed.rounds, 1 if parsed.small else _WARM_UP)
    found = {"machine": machine.described(), "shape": shape.sizes, "window": shape.window,
             "lanes": shape.lanes,
             "vocab_size": shape.vocab_size, "rows": [group.row() for group in groups]}  # fmt: skip
    machine.report(found, _table(found), parsed.json)


def _parser() -> argparse.ArgumentParser:
    parser = machine.parser(__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(MEMORY_KINDS), metavar="KIND")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lanes", type=int, default=1, help="windows in a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a tiny shape, to test the benchmark")
    parser.add_argument(
        "--without-peers", action="store_true", help="do not install and run the peers"
    )
    return parser


def _install() -> None:
    """Install the peers into a directory of their own, once."""
    done = _HOME / "installed"
    if done.exists() and done.read_text() == " ".join(PACKAGES):
        return
    shutil.rmtree(_HOME, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # With their dependencies they would bring another torch; those they need are in the list.
    subprocess.run([*pip, "--no-deps", "--target", _HOME, *PACKAGES], check=True)
    done.write_text(" ".join(PACKAGES))


def _table(found: dict[str, Any]) -> list[str]:
    return [
        "shape: " + ", ".join(f"{name} {size}" for name, size in found["shape"].items())
        + f"; window {found['window']:,}, lanes {found['lanes']}, "
        f"vocabulary {found['vocab_size']:,}",
        "| kind | tokens/s | times the time of none | of the products' rate | MFLOPs a token "
        "| state, kB | peak, MiB | public implementation | its tokens/s | ours from an empty "
        "memory | times | its state, kB | its peak, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in found["rows"]),
        "tokens/s are medians (least to most). Notes on the public implementations:",
        *_notes(found["rows"]),
    ]  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    cells = [
        row["kind"],
        _speed(row[row["kind"]]),
        f"{row['times_none']:.2f}",
        f"{row['of_products']:.0%}",
        f"{row['flops_per_token'] / 1e6:.1f}",
        *_bytes(row[row["kind"]]),
    ]
    theirs = [""] * 6
    if "peer" in row:
        peer = row[row["peer"]]
        theirs = [f"{row['peer']} {peer['version']}", _speed(peer)]
        theirs += [_speed(row[row["fresh"]]), f"{row['times_peer']:.2f}", *_bytes(peer)]
    return f"| {' | '.join([*cells, *theirs])} |"


def _tokens(settings: dict[str, Any]) -> int:
    """Of a step."""
    tokens: int = settings["window"] * settings["lanes"]
    return tokens


def _speed(figures: dict[str, Any]) -> str:
    rates = [_tokens(figures["settings"]) / seconds for seconds in figures["seconds"]]
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def _bytes(figures: dict[str, Any]) -> tuple[str, str]:
    return f"{figures['state_bytes'] / 1e3:,.0f}", f"{figures['peak_bytes'] / 2**20:,.0f}"


def _notes(rows: Iterable[dict[str, Any]]) -> list[str]:
    notes = {row["peer"]: row["note"] for row in rows if "peer" in row}
    return [f"- {package}: {note}" for package, note in notes.items()]


if __name__ == "__main__":
    main()
