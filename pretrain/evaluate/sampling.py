"""How tokens may be drawn; free of torch, so that a mistake is told at once."""

from __future__ import annotations


def problems(max_tokens: int, temperature: float, top_p: float) -> list[str]:
    """Every reason why nothing can be drawn in this way, by the option of the command line."""
    found = []
    if max_tokens < 1:
        found.append(f"--max-tokens: expected at least 1, found {max_tokens}")
    if not 0 <= temperature < float("inf"):
        found.append(f"--temperature: expected 0 (greedy) or more, found {temperature}")
    if not 0 < top_p <= 1:
        found.append(f"--top-p: expected more than 0 and at most 1, found {top_p}")
    return found
