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
from ttspec.decoding.penalties import RowPenalties, penalises
from ttspec.decoding.row_logprobs import RowLogprobs
from ttspec.decoding.row_masks import RowMasks
from ttspec.decoding.rows import Processors
from ttspec.models.target import Target
from ttspec.records import LogitMask
from ttspec.sampling import SamplingTensors, processors_of, values_of

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
        self._met: Counter[Processors] = Counter()
        self._captured: set[Processors] = set()
        self._processors = [self._processors_of(row) for row in range(rows)]

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
            self.heeded[row].fill_(not ignores)  # to assign it would wait for the device
            for name, value in values_of(sampling).items():
                self._tensors[name][row].fill_(value)
            self.penalties.set(row, sampling)
        self._processors[row] = self._processors_of(row)

    def processors(self, rows: Iterable[int]) -> Processors:
        """What is done where some rows take part."""
        asked = {self._processors[row] for row in rows}
        found = asked.pop()
        for other in asked:
            found = Processors(
                found.names | other.names,
                max(found.most_k, other.most_k),
                max(found.most_ngram, other.most_ngram),
            )
        return found._replace(words=self.penalties.words) if "words" in found.names else found

    def captured(self, processors: Processors) -> Processors:
        """The same, or more that has graphs already: so few are captured, and seldom.

        Rows that come and go make ever new combinations; what is more changes no bit. One that is
        met often gets graphs of its own.
        """
        self._met[processors] += 1
        if processors not in self._captured:
            others = filter(self.is_current, self._captured)
            others = [other for other in others if includes(other, processors)]
            if others and self._met[processors] <= PATIENCE:
                return min(others, key=lambda other: (len(other.names), other.most_k))
            self._captured.add(processors)
        return processors

    def serves(self, processors: Processors, rows: Iterable[int]) -> bool:
        """Whether a graph that does so much does all that some rows ask for."""
        return self.is_current(processors) and includes(processors, self.processors(rows))

    def is_masked(self, rows: list[int]) -> bool:
        """Whether the host must look at drafts of some rows before they are verified."""
        return bool(self.masks and self.masks.masked(rows))

    def is_current(self, processors: Processors) -> bool:
        """Whether what these read is where it was: banned words move when they get more room."""
        return processors.words in ((0, 0), self.penalties.words)

    def _processors_of(self, row: int) -> Processors:
        sampling, _ = self._of_row[row]
        names = processors_of(sampling) | self.penalties.names(row)
        if self._default.acceptance == "rejection" and sampling.temperature == 0:
            names |= {"greedy"}
        if self.masks and self.masks.masked([row]):
            names |= {"mask"}
        most_k = sampling.top_k if "top_k" in names else 0
        return Processors(names, rounded(most_k), rounded(sampling.no_repeat_ngram_size))

    def tensors(
        self, processors: Processors, subset: Tensor | slice = slice(None)
    ) -> SamplingTensors:
        """What temperature and filters read; of the rows `subset` int64 [B]."""
        values = {n: t[subset] for n, t in self._tensors.items() if n in processors.names}
        return SamplingTensors(**values, most_k=processors.most_k)

    def change(
        self,
        logits: Tensor,
        end: Tensor,
        longest: int,
        processors: Processors,
        subset: Tensor | slice = slice(None),
    ) -> Tensor:
        """The target's logits [B, T, V] after penalties, bans and masks; see `RowPenalties`."""
        changed = logits
        if penalises(processors):
            changed = self.penalties(logits, end, longest, processors, subset)
        if "mask" in processors.names:
            assert self.masks is not None
            changed = self.masks(logits, changed, subset)
        return changed


def rounded(size: int) -> int:
    """The next power of two: few sizes, few graphs."""
    return size and 1 << (size - 1).bit_length()


def includes(more: Processors, few: Processors) -> bool:
    """Whether all that `few` do is done by `more`."""
    sizes = more.most_k >= few.most_k and more.most_ngram >= few.most_ngram
    return more.names >= few.names and sizes and few.words in (more.words, (0, 0))
