"""How many prompt tokens a step may have beside decoding sequences. Plain numbers.

A step's time is about what its decoding rows take alone, plus a cost for each prompt token. Both
are learned from the steps as they come, so the same setting fits a machine that computes prompts
ten times as fast as another.
"""

from __future__ import annotations

__all__ = ["PrefillBudget"]

# What is known before the first steps, and how much of a new time is taken over.
_FIRST_TOKENS = 64
_FEWEST_TOKENS = 8
_SHARE = 0.2


class PrefillBudget:
    """Learns step times; says how many prompt tokens keep a step within its limit.

    Args:
        max_slowdown: how many times as long a step with prompts may take as one without.
    """

    def __init__(self, max_slowdown: float) -> None:
        self._max_slowdown = max_slowdown
        self._alone: dict[int, float] = {}
        """Seconds of a step without prompts, by its number of decoding sequences."""
        self._per_token: float | None = None
        """Seconds that a prompt token adds."""

    def observe(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """A step was computed."""
        if not (decodes or prompt_tokens):
            return  # memory was moved, nothing computed
        if not prompt_tokens:
            known = self._alone.get(decodes, seconds)
            self._alone[decodes] = known + _SHARE * (seconds - known)
            return
        alone = self._seconds_alone(decodes)
        if alone is None:
            return
        cost = max(0.0, seconds - alone) / prompt_tokens
        known = cost if self._per_token is None else self._per_token
        self._per_token = known + _SHARE * (cost - known)

    def tokens(self, decodes: int) -> int:
        """Prompt tokens beside ``decodes`` sequences that each get their token; at least a few, so
        that prompts always go on."""
        alone = self._seconds_alone(decodes)
        if not alone or not self._per_token:
            return _FIRST_TOKENS
        return max(_FEWEST_TOKENS, int((self._max_slowdown - 1) * alone / self._per_token))

    def _seconds_alone(self, decodes: int) -> float | None:
        """Of the nearest number of sequences that is known; 0 for none."""
        if decodes == 0:
            return 0.0
        if not self._alone:
            return None
        if decodes in self._alone:
            return self._alone[decodes]
        return self._alone[min(self._alone, key=lambda known: abs(known - decodes))]
