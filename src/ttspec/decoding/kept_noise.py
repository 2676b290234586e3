"""Noise that one round draws and the next one needs again: on a CPU it takes a tenth of a round.

A round draws the noise of as many positions as it has drafts, and a row moves on by those that are
kept: the others' noise is drawn again. It is the same, so it may as well be kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttspec.sampling import position_noise


class KeptNoise:
    """`position_noise` that keeps what it made last, by the key of a row's answer."""

    def __init__(self) -> None:
        """Nothing was made."""
        self._kept: dict[int, tuple[int, Tensor]] = {}
        """By key: the first position, and noise [T, V] from there on."""

    def __call__(
        self, key: Tensor, first: Tensor, count: int, vocabulary: int, sampled: Tensor | None = None
    ) -> Tensor:
        """As `position_noise`; the same bits."""
        rows, kept = list[Tensor](), dict[int, tuple[int, Tensor]]()
        for row, (of, begin) in enumerate(zip(key.tolist(), first.tolist(), strict=True)):
            at, noise = self._kept.get(of, (0, key.new_empty(0)))
            skipped = begin - at
            noise = noise[skipped:] if skipped >= 0 else noise[:0]
            if (more := count - len(noise)) > 0:
                here = slice(row, row + 1)
                new = position_noise(key[here], first[here] + len(noise), more, vocabulary)[0]
                noise = torch.cat([noise, new]) if len(noise) else new
            kept[of] = begin, noise
            rows.append(noise[:count])
        self._kept = kept
        noise = torch.stack(rows)
        return noise if sampled is None else noise * sampled
