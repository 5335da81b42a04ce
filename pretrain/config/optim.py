"""Settings of `optim`: the optimizers and their schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from data_prep.dataset.settings import group, setting
from pretrain.config.choices import without_effect


class OptimizerTraits(NamedTuple):
    """What sets an optimizer apart before torch is imported."""

    settings: tuple[str, ...]
    """The settings and groups of `optim` that this optimizer alone, or with some others, reads."""
    lr: float
    """Its peak learning rate where none is set."""
    moments: tuple[int, int]
    """Float32 numbers that it keeps of each element of a matrix: in the blocks, and elsewhere."""


_ADAM = ("beta1", "beta2", "eps")

OPTIMIZERS = {
    "adamw": OptimizerTraits(_ADAM, lr=1e-3, moments=(2, 2)),
    "adafactor": OptimizerTraits(("adafactor",), lr=0.01, moments=(0, 0)),
    "muon": OptimizerTraits((*_ADAM, "muon"), lr=1e-3, moments=(1, 2)),
}


@dataclass(frozen=True)
class AdafactorConfig:
    """Adafactor, by its publication's names and values."""

    clip: float = setting(1.0, "d: root mean square that an update is clipped to", low=1e-6)
    decay: float = setting(0.8, "the second moments' decay at step t is 1 - t^-decay", low=0.0)
    # 0 would divide 0 by 0 where a row's gradients are 0; less is not a normal float32.
    eps1: float = setting(1e-30, "added to squared gradients", low=1e-37)
    eps2: float = setting(1e-3, "least size of a parameter, by which its rate is scaled", low=0.0)


@dataclass(frozen=True)
class MuonConfig:
    """Muon, for the blocks' matrices; the rest is AdamW's, by its settings."""

    momentum: float = setting(0.95, "decay of the momentum (Nesterov's)", low=0.0, high=1.0)
    rms: float = setting(
        0.2,
        "root mean square of a matrix's update, in units of the learning rate; 0.2 is about that "
        "of AdamW, so that both take the same rate and decay",
        low=0.0,
    )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule; rates are per optimizer step."""

    name: Literal["adamw", "adafactor", "muon"] = setting(
        "adamw",
        "adamw; adafactor: row and column means in place of second moments; muon: orthogonalised "
        "momentum for the blocks' matrices, AdamW for the rest",
    )
    lr: float | None = setting(
        None, "peak learning rate; none: 0.001, adafactor 0.01 (of a parameter's size)", low=0.0
    )
    gate_lr: float = setting(0.01, "peak learning rate of the gates, which have no decay", low=0.0)
    beta1: float = setting(0.9, "AdamW: decay of the first moment", low=0.0, high=1.0)
    beta2: float = setting(0.95, "AdamW: decay of the second moment", low=0.0, high=1.0)
    eps: float = setting(1e-8, "AdamW: epsilon", low=0.0)
    adafactor: AdafactorConfig = group(AdafactorConfig)
    muon: MuonConfig = group(MuonConfig)
    weight_decay: float = setting(0.1, "decoupled decay of the matrices", low=0.0)
    schedule: Literal["cosine", "wsd"] = setting(
        "cosine", "after warm-up: cosine, or stable and then linear decay (wsd)"
    )
    warmup_steps: int = setting(100, "steps of linear warm-up", low=0)
    decay_steps: int = setting(200, "last steps over which wsd decays", low=0)
    final_fraction: float = setting(0.1, "last rate as a fraction of the peak", low=0.0, high=1.0)
    ema_decay: float = setting(
        0.0,
        "decay a step of an exponential moving average of the weights, kept in float32 beside the "
        "optimizer's states, e.g. 0.999; 0: none",
        low=0.0,
        high=1.0,
    )

    @property
    def peak(self) -> float:
        """The peak learning rate: `lr`, or the optimizer's own."""
        return OPTIMIZERS[self.name].lr if self.lr is None else self.lr

    def problems(self) -> list[str]:
        """Settings of another optimizer, without effect, and values that cannot train."""
        read_by = {name: traits.settings for name, traits in OPTIMIZERS.items()}
        found = without_effect(vars(self), vars(OptimConfig()), "optim.name", read_by)
        scheduled = {"cosine": (), "wsd": ("decay_steps",)}
        found += without_effect(vars(self), vars(OptimConfig()), "optim.schedule", scheduled)
        if "beta1" in read_by[self.name]:
            found += [
                f"{name}: 1 never takes a gradient in; lower it, e.g. to {usual}"
                for name, usual in (("beta1", 0.9), ("beta2", 0.95))
                if getattr(self, name) == 1
            ]
            if self.eps == 0:
                found.append("eps: 0 divides 0 by 0 where a gradient is 0; raise it, e.g. to 1e-8")
        if self.name == "muon" and self.muon.momentum == 1:
            found.append("muon.momentum: 1 never takes a gradient in; lower it, e.g. to 0.95")
        if self.ema_decay == 1:
            found.append("ema_decay: 1 averages nothing; lower it, e.g. to 0.999")
        return found

    def problems_of_new(self) -> list[str]:
        """As `problems`, of a run that begins: the last rate where there is no decay to it."""
        decays = self.schedule == "cosine" or self.decay_steps > 0
        if decays or self.final_fraction == OptimConfig.final_fraction:
            return []
        return ["final_fraction: has no effect with decay_steps=0; remove it, or raise decay_steps"]
