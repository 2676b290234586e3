"""Rounds that all write a text that is known, so that arms can be compared on one text.

Rounding in bfloat16 lets arms write different texts, and some texts are easier to draft for than
others. A round does all that it does otherwise, acceptance included; what it emits is then taken
from the text. Untimed, the target has read the text before (`RecordedTarget`): a verification is
looked up. The text is a function of target and noise, whatever drafts, so what is accepted is
exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ttspec.acceptance import accept_equal
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.engine import Engine
from ttspec.decoding.prefill import PrefillBatch, PromptReader
from ttspec.decoding.stages import RoundStages
from ttspec.errors import DataError
from ttspec.models.capture import Graphs
from ttspec.models.target import Target
from ttspec.records import Proposal
from ttspec.rowcache import RowCache, unwritten
from ttspec.sampling import SamplingTensors


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """An answer that was written before."""

    tokens: list[int]
    cut: bool
    """A limit ended it: its length is its budget."""


class KnownTextPrompts(PromptReader):
    """Finds the known answers of prompts, and begins them as they were."""

    answers: Mapping[int, KnownAnswer]
    """By noise key, which tells seed, first prompt and turn."""
    text: Tensor
    """int64 [rows, slots + 1]: the answer's tokens, each at its position in the conversation."""
    is_known: Tensor
    """bool [rows]."""

    def begin(
        self, rows: list[int], ids: list[list[int]], keys: list[int], budgets: list[int]
    ) -> PrefillBatch:
        """As `PromptReader.begin`; the noise keys say which answers these are.

        Raises:
            DataError: The target's reading was recorded, and not that of one of them.
        """
        if isinstance(self._cache, RecordedRows):
            for row, key in zip(rows, keys, strict=True):
                self._cache.load(row, key)
        self._found = {row: self.answers.get(key) for row, key in zip(rows, keys, strict=True)}
        budgets = list(budgets)
        for at, (row, part) in enumerate(zip(rows, ids, strict=True)):
            answer = self._found[row]
            self.is_known[row] = answer is not None
            if answer is None:
                continue
            here = self.text[row, self._rows.lengths[row] + len(part) :][: len(answer.tokens)]
            here.copy_(torch.tensor(answer.tokens[: len(here)]))
            if answer.cut:
                budgets[at] = len(answer.tokens)
        return super().begin(rows, ids, keys, budgets)

    def capture(self, stages: RoundStages, graphs: Graphs, *, beside: bool) -> None:
        """As `PromptReader.capture`; what was recorded is looked up on the host."""
        if not isinstance(self._cache, RecordedRows):
            super().capture(stages, graphs, beside=beside)

    def _first_tokens(self, prompts: PrefillBatch, drawn: list[int]) -> list[int]:
        found = [self._found[row] for row in prompts.rows]
        return [a.tokens[0] if a else token for a, token in zip(found, drawn, strict=True)]


class KnownTextDecoder(Decoder):
    """Keeps the drafts that are the known tokens; rows of no known answer are as always."""

    reads_prompts = KnownTextPrompts
    prompts: KnownTextPrompts

    def __init__(self, *args: Any, answers: Mapping[int, KnownAnswer], **options: Any) -> None:
        """Args and options are a `Decoder`'s; `answers` by noise key."""
        super().__init__(*args, **options)
        # Made here and never replaced: a captured graph reads them where they are.
        shape, device = (self.rows.count, self.rows.slots + 1), self.target.device
        self.prompts.text = torch.zeros(shape, dtype=torch.long, device=device)
        self.prompts.is_known = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self.prompts.answers = answers

    def accept(
        self, logits: Tensor, proposal: Proposal, noise: Tensor | None, sampling: SamplingTensors
    ) -> tuple[Tensor, Tensor]:
        """Those that equal the known tokens."""
        kept, tokens = super().accept(logits, proposal, noise, sampling)
        text, is_known = self.prompts.text, self.prompts.is_known
        after = torch.arange(1, proposal.tokens.shape[1] + 2, device=text.device)
        place = (self.rows.inputs.start[:, None] + after).clamp(max=text.shape[1] - 1)
        found, known = accept_equal(text.gather(1, place), proposal)
        return torch.where(is_known, found, kept), torch.where(is_known[:, None], known, tokens)


# Untimed: the target reads the text once.


@dataclass(frozen=True, slots=True)
class Recording:
    """What the target said of P tokens, conversation after conversation; kept on the host.

    Behind a rejected draft the target would have read another text: nothing may look there.
    """

    hidden: Tensor
    """[P, H], what the head reads."""
    states: dict[int, Tensor]
    """[P, H] of each tapped hidden state."""
    places: dict[int, tuple[int, int]]
    """By an answer's noise key: first and last place of its conversation."""

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return max((last - first + 1 for first, last in self.places.values()), default=1)


class RecordedRows(RowCache):
    """What the target said of each row's conversation: what a replay has instead of keys."""

    def __init__(
        self, rows: int, slots: int, recording: Recording, taps: Sequence[int], device: torch.device
    ) -> None:
        super().__init__(rows, slots)
        # Made here and never replaced: a captured graph reads them where they are.
        self.last = torch.zeros(rows, dtype=torch.long, device=device)
        like = recording.hidden.new_empty(0, device=device)
        shape = rows, min(slots + 1, recording.longest), recording.hidden.shape[1]
        self.hidden = unwritten(shape, like)
        self.states = [unwritten(shape, like) for _ in taps]
        whole = recording.hidden, *(recording.states[tap] for tap in taps)
        self._places = recording.places
        self._tables = list(zip((self.hidden, *self.states), whole, strict=True))
        self._held: list[int | None] = [None] * rows

    def load(self, row: int, key: int) -> None:
        """Let a row have the conversation of the answer that has this noise key.

        Raises:
            DataError: It was not recorded.
        """
        if key not in self._places:
            raise DataError(
                "A replay was asked for an answer that was not recorded.\n"
                "Ask what the run was asked, under its seeds."
            )
        first, last = self._places[key]
        if self._held[row] == first:
            return
        part = slice(first, min(last + 1, first + self.hidden.shape[1]))
        size = part.stop - part.start
        for table, whole in self._tables:
            table[row, :size] = whole[part].to(table)
        self.last[row], self._held[row] = size - 1, first

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
        each = (1 + len(self.taps)) * hidden.shape[1] * hidden.element_size()
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


def use_recording(engine: Engine, recording: Recording, answers: Mapping[int, KnownAnswer]) -> None:
    """Let an engine answer what was recorded, and nothing else."""
    known = {f.name: getattr(engine.target, f.name) for f in fields(engine.target)}
    engine.target = RecordedTarget(**known, recording=recording)
    engine.make_decoder = partial(KnownTextDecoder, answers=answers)
