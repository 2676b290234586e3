"""How each row's tokens are chosen: its request's options on the device, and its grammar.

Rows of one round may ask for different things. A round does what some row asks for, for all rows
at once; what a row did not ask for changes none of its bits. The values lie in tensors that stay
where they are, so a captured round serves any of them; what it does is part of its shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from ttspec.config import SamplingConfig
from ttspec.decoding.logprobs import RowLogprobs
from ttspec.decoding.masks import RowMasks
from ttspec.decoding.penalties import RowPenalties, penalises
from ttspec.decoding.rows import SamplingSteps
from ttspec.models.target import Target
from ttspec.records import LogitMask
from ttspec.sampling import SamplingTensors, steps_of, values_of

PATIENCE = 64
"""Rounds that do more than their rows ask for, before what they ask for is captured."""


class RowSampling:
    """The sampling options of `rows` rows."""

    def __init__(
        self,
        default: SamplingConfig,
        target: Target,
        *,
        rows: int,
        slots: int,
        width: int,
        ends: Collection[int],
    ) -> None:
        """All rows have the default.

        Args:
            default: Also says what all rows have in common: the rule of acceptance.
            target: Whose tokens are chosen.
            rows: How many there are.
            slots: Tokens that each may have.
            width: Tokens that a round reads at most.
            ends: End tokens; none where rows go on past them unless told otherwise.
        """
        self._target, self._default, self._rows, self._width = target, default, rows, width
        self._heeds_ends = bool(ends)
        device = target.device
        self.ends = torch.tensor(sorted({*ends, *target.ends}), dtype=torch.long, device=device)
        self.heeded = torch.full((rows,), self._heeds_ends, device=device)
        """bool [B], rows that an end token ends."""
        self._of_row: list[tuple[SamplingConfig, bool]] = [(default, not ends)] * rows
        self._tensors = {
            name: torch.tensor([value] * rows, device=device)[:, None, None]
            for name, value in values_of(default).items()
        }
        self.penalties = RowPenalties(target, rows, slots)
        if default.penalises:
            for row in range(rows):
                self.penalties.set(row, default)
        self.logprobs = RowLogprobs(rows)
        self.masks: RowMasks | None = None
        """None where no row ever had one."""
        self._met: Counter[SamplingSteps] = Counter()
        self._captured: set[SamplingSteps] = set()
        self._steps = [self._steps_of(row) for row in range(rows)]

    def set(
        self,
        row: int,
        sampling: SamplingConfig | None = None,
        *,
        ignore_eos: bool | None = None,
        mask: LogitMask | None = None,
        logprobs: int | None = None,
    ) -> None:
        """Let a row have a request's options.

        Args:
            row: Which row; it takes no part in a round.
            sampling: How its tokens are chosen; None is the default.
            ignore_eos: Whether it goes on past end tokens; None is the default.
            mask: What its answer may be.
            logprobs: See `RowLogprobs.set`.
        """
        self.logprobs.set(row, logprobs)
        sampling = sampling or self._default
        ignores = not self._heeds_ends if ignore_eos is None else ignore_eos
        if mask is not None and self.masks is None:
            size = int(self._target.config.vocab_size)
            self.masks = RowMasks(
                self._rows, self._width, size, self._target.ends, self._target.device
            )
        if self.masks:
            self.masks.set(row, mask)
        if self._of_row[row] != (sampling, ignores):
            self._of_row[row] = sampling, ignores
            self.heeded[row] = not ignores
            for name, value in values_of(sampling).items():
                self._tensors[name][row] = value
            self.penalties.set(row, sampling)
        self._steps[row] = self._steps_of(row)

    def steps(self, rows: Iterable[int]) -> SamplingSteps:
        """What is done where some rows take part."""
        asked = {self._steps[row] for row in rows}
        steps = asked.pop()
        for other in asked:
            steps = SamplingSteps(
                steps.names | other.names,
                max(steps.most_k, other.most_k),
                max(steps.most_ngram, other.most_ngram),
            )
        return steps._replace(words=self.penalties.words) if "words" in steps.names else steps

    def captured(self, steps: SamplingSteps) -> SamplingSteps:
        """The same, or more that has graphs already: so few are captured, and seldom.

        Rows that come and go make ever new combinations; what is more changes no bit. One that is
        met often gets graphs of its own.
        """
        self._met[steps] += 1
        if steps not in self._captured:
            others = [other for other in self._captured if includes(other, steps)]
            if others and self._met[steps] <= PATIENCE:
                return min(others, key=lambda other: (len(other.names), other.most_k))
            self._captured.add(steps)
        return steps

    def _steps_of(self, row: int) -> SamplingSteps:
        """What a row asks for."""
        sampling, _ = self._of_row[row]
        names = steps_of(sampling) | self.penalties.names(row)
        if self._default.acceptance == "rejection" and sampling.temperature == 0:
            names |= {"greedy"}
        if self.masks and self.masks.masked([row]):
            names |= {"mask"}
        most_k = sampling.top_k if "top_k" in names else 0
        return SamplingSteps(names, rounded(most_k), rounded(sampling.no_repeat_ngram_size))

    def tensors(
        self, steps: SamplingSteps, subset: Tensor | slice | None = None
    ) -> SamplingTensors:
        """What temperature and filters read; of the rows `subset` int64 [B], or of all."""
        values = {n: tensor for n, tensor in self._tensors.items() if n in steps.names}
        if subset is not None:
            values = {n: tensor[subset] for n, tensor in values.items()}
        return SamplingTensors(**values, most_k=steps.most_k)

    def change(
        self,
        logits: Tensor,
        end: Tensor,
        longest: int,
        steps: SamplingSteps,
        subset: Tensor | None = None,
    ) -> Tensor:
        """The target's logits as penalties, bans and masks change them; see `RowPenalties`."""
        changed = logits
        if penalises(steps):
            changed = self.penalties(logits, end, longest, steps, subset)
        if "mask" in steps.names:
            assert self.masks is not None
            changed = self.masks(logits, changed, subset)
        return changed


def rounded(size: int) -> int:
    """The next power of two: few sizes, few graphs."""
    return size and 1 << (size - 1).bit_length()


def includes(more: SamplingSteps, steps: SamplingSteps) -> bool:
    """Whether all that `steps` does is done."""
    sizes = more.most_k >= steps.most_k and more.most_ngram >= steps.most_ngram
    return more.names >= steps.names and sizes and steps.words in (more.words, (0, 0))
