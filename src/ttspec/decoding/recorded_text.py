"""Rounds over a text that is known, whose target has read it before: exact acceptance, cheaply.

The text is a function of target and noise, whatever drafts. So what the head reads and the tapped
features of every token lie in tables on the host; those of a row's conversation are brought to the
device when it begins, and a round looks up what its verification would compute.
Behind a rejected draft the target would have read another text: nothing may look there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ttspec.acceptance import accept_equal
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.engine import Engine
from ttspec.decoding.prefill import PromptReader, Prompts
from ttspec.errors import DataError
from ttspec.models.target import Target
from ttspec.records import Proposal
from ttspec.rowcache import RowCache, unwritten
from ttspec.sampling import SamplingTensors


@dataclass(frozen=True, slots=True)
class Answer:
    """A recorded answer: its tokens, and the places of its conversation in the tables."""

    first: int
    last: int
    tokens: list[int]
    cut: bool
    """A limit ended it: its length is its budget."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What the target said of P tokens, conversation after conversation; kept on the host."""

    tokens: Tensor
    """int64 [P]."""
    hidden: Tensor
    """[P, H], what the head reads."""
    states: dict[int, Tensor]
    """[P, H] of each tapped hidden state."""
    answers: dict[int, Answer]
    """By noise key, which tells seed, first prompt and turn."""

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return max((a.last - a.first + 1 for a in self.answers.values()), default=1)


class RecordedRows(RowCache):
    """What the target said of each row's conversation: what a replay has instead of keys."""

    def __init__(
        self, rows: int, slots: int, recording: Recording, taps: Sequence[int], device: torch.device
    ) -> None:
        super().__init__(rows, slots)
        self._recording, size = recording, min(slots + 1, recording.longest)
        # Made here and never replaced: a captured graph reads them where they are.
        self.last = torch.zeros(rows, dtype=torch.long, device=device)
        self.tokens = torch.zeros(rows, size, dtype=torch.long, device=device)
        like = recording.hidden.new_empty(0, device=device)
        shape = rows, size, recording.hidden.shape[1]
        self.hidden = unwritten(shape, like)
        self.states = [unwritten(shape, like) for _ in taps]
        self._tables = [recording.states[tap] for tap in taps]
        self._held: list[int | None] = [None] * rows

    def load(self, row: int, answer: Answer) -> None:
        """Let a row have the conversation of an answer."""
        if self._held[row] == answer.first:
            return
        part = slice(answer.first, min(answer.last + 1, answer.first + self.tokens.shape[1]))
        size = part.stop - part.start
        self.tokens[row, :size] = self._recording.tokens[part].to(self.tokens)
        pairs = zip(
            (self.hidden, *self.states), (self._recording.hidden, *self._tables), strict=True
        )
        for table, whole in pairs:
            table[row, :size] = whole[part].to(table)
        self.last[row], self._held[row] = size - 1, answer.first

    def at(self, start: Tensor, width: int, subset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Where tables have the positions from `start` int64 [B] on: rows [B, 1] and [B, width].

        Past a conversation's end it is the last one.
        """
        last = self.last if subset is None else self.last[subset]
        row = torch.arange(self.rows, device=start.device) if subset is None else subset
        column = start[:, None] + torch.arange(width, device=start.device)
        return row[:, None], column.minimum(last[:, None])


@dataclass(slots=True, kw_only=True)
class RecordedTarget(Target):
    """A target that looks up what it has read before."""

    recording: Recording

    @property
    def reads_spans(self) -> bool:
        """Nothing it does depends on what is seen."""
        return True

    def cache(self, rows: int, slots: int, width: int = 1) -> RowCache:  # noqa: ARG002
        """What was said of so many rows."""
        return RecordedRows(rows, slots, self.recording, self.taps, self.device)

    def cache_bytes(self, rows: int, slots: int) -> int:
        """Bytes of `cache`."""
        hidden = self.recording.hidden
        each = (1 + len(self.taps)) * hidden.shape[1] * hidden.element_size() + 8
        return rows * min(slots + 1, self.recording.longest) * each

    @torch.no_grad()
    def forward(
        self,
        cache: RowCache,
        tokens: Tensor,
        start: Tensor,
        longest: int,  # noqa: ARG002
        *,
        subset: Tensor | None = None,
        counts: Tensor | None = None,  # noqa: ARG002
        logits: int | Tensor | None = None,
        spans: bool = False,  # noqa: ARG002
    ) -> tuple[Tensor | None, Tensor]:
        """What `Target.forward` says, as long as `tokens` are the recorded ones."""
        assert isinstance(cache, RecordedRows)
        row, at = cache.at(start, tokens.shape[1], subset)
        none = cache.hidden.new_empty(*at.shape, 0)
        features = torch.cat([none, *(table[row, at] for table in cache.states)], dim=-1)
        if isinstance(logits, Tensor):
            at = at[:, logits]
        elif logits == 0:
            return None, features
        else:
            at = at[:, -(logits or 0) :]
        hidden = cache.hidden[row, at]
        return self.compute_logits(hidden), features


class RecordedPrompts(PromptReader):
    """Finds the recorded answers of prompts, and begins them as they were."""

    captures = False
    _target: RecordedTarget
    _cache: RecordedRows

    def begin(
        self, rows: list[int], ids: list[list[int]], keys: list[int], budgets: list[int]
    ) -> Prompts:
        """As `PromptReader.begin`; the noise keys say which answers these are.

        Raises:
            DataError: One of them was not recorded.
        """
        answers = self._target.recording.answers
        found = [answer for key in keys if (answer := answers.get(key))]
        if len(found) < len(keys):
            raise DataError(
                "A replay was asked for an answer that was not recorded.\n"
                "Ask what the run was asked, under its seeds."
            )
        for row, answer in zip(rows, found, strict=True):
            self._cache.load(row, answer)
        # Where rounding decides, the text is the recorded one all the same.
        pairs = zip(found, budgets, strict=True)
        budgets = [len(answer.tokens) if answer.cut else n for answer, n in pairs]
        self._recorded = dict(zip(rows, found, strict=True))
        return super().begin(rows, ids, keys, budgets)

    def _draw(self, logits: Tensor, prompts: Prompts) -> list[int]:  # noqa: ARG002
        return [self._recorded[row].tokens[0] for row in prompts.rows]


class ReplayDecoder(Decoder):
    """Keeps the drafts that are the recorded tokens."""

    reads_prompts = RecordedPrompts

    def accept(
        self,
        logits: Tensor,  # noqa: ARG002
        proposal: Proposal,
        noise: Tensor | None,  # noqa: ARG002
        sampling: SamplingTensors,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Those that equal the recorded tokens."""
        cache = self.cache
        assert isinstance(cache, RecordedRows)
        row, at = cache.at(self.rows.inputs.start + 1, proposal.tokens.shape[1] + 1)
        return accept_equal(cache.tokens[row, at], proposal)


def use_recording(engine: Engine, recording: Recording) -> None:
    """Let an engine answer what was recorded, and nothing else."""
    known = {f.name: getattr(engine.target, f.name) for f in fields(engine.target)}
    engine.target = RecordedTarget(**known, recording=recording)
    engine.make_decoder = ReplayDecoder
