"""Chances of drafts, from a drafter's confidence head: calibrated on what was accepted lately.

A confidence head was trained on other text than this, for one temperature, and the drafter may have
learned since. So a confidence is not taken for a chance, but for a sign of it: least squares over
the last rounds say how much likelier a draft is kept where the confidence was higher.
"""

from __future__ import annotations

from collections.abc import Sequence

DECAY = 1 / 128
"""Share of what is known that a row's draft replaces."""
PRIOR_CHANCE = 0.7
"""Chance of a draft, and its confidence, as long as nothing is known."""
PRIOR_VARIANCE = 0.25
"""Of the confidence: so much weighs the belief that a confidence is a chance."""


class ConfidenceCalibration:
    """Chances of drafts, from the confidence in them."""

    def __init__(self, longest: int) -> None:
        """Of rounds of at most `longest` drafts."""
        self._confidence: Sequence[Sequence[float]] = ()
        """Of the round that is under way."""
        self._sums = [(0.0,) * 5 for _ in range(longest)]
        """Of the i-th draft, where those before it were kept: how often that was, and sums of the
        confidence, of whether it was kept, of the square of the one and of the product of both."""

    def tokens(self, confidence: Sequence[Sequence[float]]) -> list[float]:
        """Tokens a row that the round commits on average, by the number of drafts that are read.

        Args:
            confidence: By row and draft, how likely it is kept, if those before it are.
        """
        self._confidence = confidence
        slope, alive, tokens = self._slope(), [1.0] * len(confidence), [1.0]
        by_draft = zip(*confidence, strict=True)
        for (n, stated, kept, *_), row in zip(self._sums, by_draft, strict=False):
            usual, right = (stated + PRIOR_CHANCE) / (n + 1), (kept + PRIOR_CHANCE) / (n + 1)
            chances = [min(1.0, max(0.0, right + slope * (x - usual))) for x in row]
            alive = [a * chance for a, chance in zip(alive, chances, strict=True)]
            tokens.append(tokens[-1] + sum(alive) / len(alive))
        return tokens

    def _slope(self) -> float:
        """By how much a draft is likelier to be kept, by confidence.

        1 as long as nothing is known, 0 where the confidence means nothing.
        """
        common = spread = PRIOR_VARIANCE
        for n, stated, kept, squares, products in self._sums:
            if n:
                common += products - stated * kept / n
                spread += squares - stated * stated / n
        return max(0.0, common / spread)

    def observe(self, length: int, accepted: Sequence[int]) -> None:
        """Take note of that round: drafts read, and how many each row kept."""
        for row, kept in zip(self._confidence, accepted, strict=False):
            for i in range(min(kept + 1, length)):
                stated, right = row[i], float(kept > i)
                new = 1.0, stated, right, stated * stated, stated * right
                old = self._sums[i]
                self._sums[i] = tuple(x + a - a * DECAY for a, x in zip(old, new, strict=True))
        self._confidence = ()
