"""Ratios of sums over requests, with bootstrap intervals. Knows no models and no records.

All intervals draw the same requests, so that arms are compared in pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

Sums = NDArray[np.float64]
"""Something summed per request, float64 [requests]."""
DRAWS = 2000
QUANTILES = (0.025, 0.975)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % bootstrap interval, which is nan where one request is all there is."""

    value: float
    low: float = float("nan")
    high: float = float("nan")

    @property
    def has_interval(self) -> bool:
        """More than one request was there to draw from."""
        return self.low == self.low


@dataclass(frozen=True, slots=True)
class Pair:
    """One arm against another on the same requests."""

    ratio: Estimate
    difference: Estimate


@cache
def resamples(count: int) -> Sums:
    """How often each of `count` requests is drawn, float64 [DRAWS, count]; always the same."""
    # torch's generator made the intervals that are committed: the same requests are drawn again.
    picks = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(0))
    counts = np.apply_along_axis(np.bincount, 1, picks.numpy(), minlength=count)
    return counts.astype(np.float64)


def share(top: Sums, bottom: Sums) -> Estimate | None:
    """sum(top) / sum(bottom); None where there is nothing to divide by."""
    if not bottom.sum() > 0:
        return None
    value = float(top.sum() / bottom.sum())
    if np.count_nonzero(bottom > 0) < 2:
        return Estimate(value)
    return _estimate(value, _drawn(top, bottom))


def paired(top: Sums, bottom: Sums, other_top: Sums, other_bottom: Sums) -> Pair | None:
    """Ratio and difference of two arms' ratios; None where one of the sums is 0."""
    if not all(part.sum() > 0 for part in (top, bottom, other_top, other_bottom)):
        return None
    x = float(top.sum() / bottom.sum())
    y = float(other_top.sum() / other_bottom.sum())
    if len(top) < 2:
        return Pair(Estimate(x / y), Estimate(x - y))
    xs, ys = _drawn(top, bottom), _drawn(other_top, other_bottom)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Pair(_estimate(x / y, xs / ys), _estimate(x - y, xs - ys))


def _drawn(top: Sums, bottom: Sums) -> Sums:
    """The ratio in each draw, float64 [DRAWS]; not finite where nothing was drawn to divide by."""
    draws = resamples(len(top))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (draws @ top) / (draws @ bottom)


def _estimate(value: float, drawn: Sums) -> Estimate:
    drawn = drawn[np.isfinite(drawn)]
    return (
        Estimate(value, *map(float, np.quantile(drawn, QUANTILES)))
        if len(drawn)
        else Estimate(value)
    )
