"""Rounds over a text that is known, whose target has read it before: exact acceptance, cheaply.

The text is a function of target and noise, whatever drafts. So what the head reads and the tapped
features of every token lie in tables, and a round looks up what its verification would compute.
Behind a rejected draft the target would have read another text: nothing may look there.
"""

from __future__ import annotations

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
from ttspec.rowcache import RowCache


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
    """What the target said of P tokens, conversation after conversation."""

    tokens: Tensor
    """int64 [P]."""
    hidden: Tensor
    """[P, H], what the head reads."""
    states: dict[int, Tensor]
    """[P, H] of each tapped hidden state."""
    answers: dict[int, Answer]
    """By noise key, which tells seed, first prompt and turn."""


class Places(RowCache):
    """Where each row's conversation lies in the tables: what a replay has instead of keys."""

    def __init__(self, rows: int, slots: int, device: torch.device) -> None:
        """No row has one yet."""
        super().__init__(rows, slots)
        # Made here and never replaced: a captured graph reads them where they are.
        self.first = torch.zeros(rows, dtype=torch.long, device=device)
        self.last = torch.zeros_like(self.first)

    def of(self, start: Tensor, width: int, subset: Tensor | None = None) -> Tensor:
        """Places int64 [B, width] from position `start` int64 [B] on; past its end the last one."""
        first, last = self.first, self.last
        if subset is not None:
            first, last = first[subset], last[subset]
        column = torch.arange(width, device=start.device)
        return ((first + start)[:, None] + column).minimum(last[:, None])


@dataclass(slots=True, kw_only=True)
class RecordedTarget(Target):
    """A target that looks up what it has read before."""

    recording: Recording

    @property
    def reads_spans(self) -> bool:
        """Nothing it does depends on what is seen."""
        return True

    def cache(self, rows: int, slots: int, width: int = 1) -> RowCache:  # noqa: ARG002
        """Places for so many rows."""
        return Places(rows, slots, self.device)

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
        logits: int | None = None,
        spans: bool = False,  # noqa: ARG002
    ) -> tuple[Tensor | None, Tensor]:
        """What `Target.forward` says, as long as `tokens` are the recorded ones."""
        assert isinstance(cache, Places)
        at = cache.of(start, tokens.shape[1], subset)
        read = self.recording
        none = read.hidden.new_empty(*at.shape, 0)
        features = torch.cat([none, *(read.states[tap][at] for tap in self.taps)], dim=-1)
        if logits == 0:
            return None, features
        hidden = read.hidden[at[:, -(logits or 0) :]]
        return self.judge(hidden), features


class RecordedPrompts(PromptReader):
    """Finds the recorded answers of prompts, and begins them as they were."""

    _target: RecordedTarget
    _cache: Places

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
        subset = torch.tensor(rows, device=self._target.device)
        self._cache.first[subset] = subset.new_tensor([answer.first for answer in found])
        self._cache.last[subset] = subset.new_tensor([answer.last for answer in found])
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
    ) -> tuple[Tensor, Tensor]:
        """Those that equal the recorded tokens."""
        target, cache = self.target, self.cache
        assert isinstance(target, RecordedTarget)
        assert isinstance(cache, Places)
        at = cache.of(self.rows.inputs.start + 1, proposal.tokens.shape[1] + 1)
        return accept_equal(target.recording.tokens[at], proposal)


def use_recording(engine: Engine, recording: Recording) -> None:
    """Let an engine answer what was recorded, and nothing else."""
    known = {f.name: getattr(engine.target, f.name) for f in fields(engine.target)}
    engine.target = RecordedTarget(**known, recording=recording)
    engine.make_decoder = ReplayDecoder
