"""What a drafter's confidence head says of its drafts, believed as far as it was right.

A confidence head was trained on other text than this, for one temperature, and the drafter may have
learned since. So what it says is not taken for a chance, but for a sign of it: least squares over
the last rounds tell how much likelier a draft is kept where more was said.
"""

from __future__ import annotations

from collections.abc import Sequence

MEMORY = 1 / 128
"""Share of what is known that a row's draft replaces."""
HOPE = 0.7
"""Chance of a draft, and what is said of it, as long as nothing is known."""
TRUST = 0.25
"""It is believed like so much variance of what it said before."""


class ConfidenceCalibration:
    """Chances of drafts, from the confidence in them."""

    def __init__(self, longest: int) -> None:
        """Of rounds of at most `longest` drafts."""
        self._confidence: Sequence[Sequence[float]] = ()
        """Of the round that is under way."""
        self._sums = [(0.0,) * 5 for _ in range(longest)]
        """Of the i-th draft, where those before it were kept: how often that was, and sums of what
        was said, of whether it was kept, of the square of the one and of the product of both."""

    def tokens(self, confidence: Sequence[Sequence[float]]) -> list[float]:
        """Tokens a row that the round commits on average, by the number of drafts that are read.

        Args:
            confidence: By row and draft, how likely it is kept, if those before it are.
        """
        self._confidence = confidence
        slope, alive, tokens = self._slope(), [1.0] * len(confidence), [1.0]
        by_draft = zip(*confidence, strict=True)
        for (n, said, kept, *_), row in zip(self._sums, by_draft, strict=False):
            usual, right = (said + HOPE) / (n + 1), (kept + HOPE) / (n + 1)
            chances = [min(1.0, max(0.0, right + slope * (x - usual))) for x in row]
            alive = [a * chance for a, chance in zip(alive, chances, strict=True)]
            tokens.append(tokens[-1] + sum(alive) / len(alive))
        return tokens

    def _slope(self) -> float:
        """By how much a draft is likelier to be kept where the drafter said so.

        1 as long as nothing is known, 0 where what it says means nothing.
        """
        common = spread = TRUST
        for n, said, kept, squares, products in self._sums:
            if n:
                common += products - said * kept / n
                spread += squares - said * said / n
        return max(0.0, common / spread)

    def observe(self, length: int, accepted: Sequence[int]) -> None:
        """Take note of that round: drafts read, and how many each row kept."""
        for row, kept in zip(self._confidence, accepted, strict=False):
            for i in range(min(kept + 1, length)):
                said, right = row[i], float(kept > i)
                new = 1.0, said, right, said * said, said * right
                old = self._sums[i]
                self._sums[i] = tuple(x + a - a * MEMORY for a, x in zip(old, new, strict=True))
        self._confidence = ()
