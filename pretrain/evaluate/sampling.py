"""How tokens are sampled; free of torch, so that a mistake is reported at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """At most `max_tokens` tokens: the likeliest ones at temperature 0, else drawn with `seed`."""

    max_tokens: int
    temperature: float
    top_p: float = 1.0
    seed: int = 0

    def problems(self) -> list[str]:
        """Every reason why nothing can be sampled so, by the option of the command line."""
        found = []
        if self.max_tokens < 1:
            found.append(f"--max-tokens: expected at least 1, found {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            found.append(f"--temperature: expected 0 (greedy) or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            found.append(f"--top-p: expected more than 0 and at most 1, found {self.top_p}")
        return found
