"""What the host knows of each row, and what a round's stages read of it on the device.

The host's lengths are the truth. They move when a round is whole, so a round that is interrupted
leaves a row where it was, and what it wrote past the row's length is dead. Knows no models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ttspec.compiled import compiled_once
from ttspec.records import TokenLogprobs

COPIES = 5
"""Numbers of a row that are uploaded besides the tokens it copies."""
LOST = -1


class Processors(NamedTuple):
    """What is done to logits before a token is taken: what some row asks for, and no more."""

    names: frozenset[str] = frozenset()
    """Fields of `SamplingTensors` and `Rules` that some row needs; "mask" where one has a mask."""
    most_k: int = 0
    most_ngram: int = 0
    words: tuple[int, int] = (0, 0)
    """Banned words of several tokens that a row may have, and their tokens but the last."""


class RoundShape(NamedTuple):
    """What a round's tensors depend on; one captured graph of each stage serves a shape."""

    longest: int
    """An upper bound of the rows' lengths. Stages read as many slots: few bounds, few graphs."""
    draft_length: int
    """Tokens that the drafter drafts; at 0 it is not run."""
    copy_length: int = 0
    """Tokens that rows copy at most; at 0 no row copies."""
    processors: Processors = Processors()
    """How tokens are chosen. The values are in tensors that graphs read."""
    absorbs: bool = True
    """Whether the drafter makes context of what is committed, or does so some rounds later."""

    @property
    def proposed(self) -> int:
        """Tokens of a proposal."""
        return max(self.draft_length, self.copy_length)


class RoundPlan(NamedTuple):
    """What the host decides about a round before it is launched."""

    active: list[int]
    """Rows that take part."""
    shape: RoundShape
    longest: int
    """An upper bound of the rows' lengths."""
    copies: dict[int, list[int]]
    """By row, the tokens of its own text that it proposes instead of drafts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundInputs:
    """Rows as the device sees them. The tensors stay where they are: captured graphs read them."""

    pending: Tensor
    """int64 [B]: each row's last committed token, which the target has not read."""
    start: Tensor
    """int64 [B]: its position. Of a row that takes no part a position past all slots, where
    nothing is kept."""
    budget: Tensor
    """int64 [B]: tokens that the row may still emit; 0 for one that takes no part."""
    number: Tensor
    """int64 [1]: the round's number."""
    noise_key: Tensor
    """int64 [B]: key of all noise of the row's answer."""
    copies: Tensor
    """int64 [B, C]: tokens to verify instead of a draft, in rows that copy."""
    copied: Tensor
    """int64 [B]: how many of them; 0 in a row that does not copy."""


class RowVerdict(NamedTuple):
    """What a verification says of one row, on the host."""

    tokens: list[int]
    """The tokens it emits."""
    proposed: int
    accepted: int
    ended: bool
    """The last one is an end token."""

    @classmethod
    def of(cls, values: list[int]) -> Self:
        """From emitted, accepted and proposed, whether it ended, and all tokens."""
        emitted, accepted, proposed, ended, *tokens = values
        return cls(tokens[:emitted], proposed, accepted, bool(ended))


class RowOutcome(NamedTuple):
    """What a round did to one row, on the host."""

    tokens: list[int]
    """The tokens it emitted."""
    proposed: int
    accepted: int
    ended: bool
    """The last token is an end token."""
    updated: bool
    """The row's drafter was updated after the round."""
    seconds: tuple[float, float, float]
    """Of drafting, verifying and learning; on a GPU of the round before, since reading this one's
    would wait for it."""
    length: int | None = None
    """Drafts that an adaptive policy let the round have; None without one."""
    copied: bool = False
    """Its drafts were copied from the row's own text."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of each of the tokens, where they are asked for."""


class RowStates:
    """Lengths, pending tokens, budgets and tokens of `count` rows of `slots` tokens each."""

    def __init__(self, count: int, slots: int, device: torch.device, copies: int = 0) -> None:
        """All rows are empty; each may copy up to `copies` tokens a round."""
        self.count, self.slots = count, slots
        self.lengths = [0] * count
        """Committed tokens of each row that are in the cache: all but the pending one."""
        self.pending = [0] * count
        self.budget = [0] * count
        """Tokens that a row may still emit; 0 for a row that takes no part."""
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        """Each row's committed tokens and its pending one."""
        self._answers = [0] * count
        """Where each row's answer begins."""
        self.changed = set[int]()
        """Rows that the device is to be told of, unlike the others, before it goes on by itself."""
        uploaded = torch.zeros(COPIES + copies, count, dtype=torch.long, device=device)
        self.uploaded, pin = uploaded, uploaded.is_cuda
        """int64 [5 + C, B], all that `inputs` shows, but for the keys of noise."""
        self._staged = [torch.zeros_like(uploaded, device="cpu", pin_memory=pin) for _ in range(2)]
        self._downloads: dict[torch.Size, list[tuple[Tensor, torch.cuda.Event]]] = {}
        self.inputs = RoundInputs(
            pending=uploaded[0],
            start=uploaded[1],
            budget=uploaded[2],
            number=uploaded[3, :1],
            noise_key=torch.zeros(count, dtype=torch.long, device=device),
            copies=uploaded[COPIES:].T,
            copied=uploaded[COPIES - 1],
        )

    def active(self) -> list[int]:
        """Rows that take part in a round."""
        return [row for row, budget in enumerate(self.budget) if budget > 0]

    def upload(self, number: int, copies: Mapping[int, list[int]] | None = None) -> None:
        """Bring what a round reads to the device, in one copy.

        From pinned memory, so that nothing waits for it. Two places do: the host waits for a
        round's verdict before it brings what the one after the next reads.

        Args:
            number: The round's.
            copies: What some rows copy; the others do not copy. None where no row does.
        """
        self._staged.reverse()
        self.changed.clear()
        staged, most = self._staged[0], COPIES
        table = staged.numpy()
        table[0], table[2], table[3] = self.pending, self.budget, number
        table[1] = [self._start(row) for row in range(self.count)]
        if copies:
            most, table[COPIES - 1] = len(table), 0
            for row, tokens in copies.items():
                end = COPIES + len(tokens)
                table[COPIES - 1, row], table[COPIES:end, row] = len(tokens), tokens
        self.uploaded[:most].copy_(staged[:most], non_blocking=True)

    def upload_changed(self) -> None:
        """Bring the rows that changed to the device, which has moved on the others by itself."""
        if not self.changed:
            return
        rows = sorted(self.changed)
        self.changed.clear()
        columns = [(row, self.pending[row], self._start(row), self.budget[row]) for row in rows]
        # Of pageable memory so few bytes are taken at once, and nothing waits.
        table = torch.tensor(columns).to(self.uploaded.device, non_blocking=True)
        self.uploaded[:3].index_copy_(1, table[:, 0], table[:, 1:].T)

    def download(self, table: Tensor) -> Callable[[], list[list[int]]]:
        """Begin to bring a verdict's table, int64 [B, 4 + G+1], to the host.

        Two rounds may be under way, so there are two places.

        Returns:
            What waits for it, and gives its rows.
        """
        if not table.is_cuda:
            values: list[list[int]] = table.tolist()
            return lambda: values
        if table.shape not in self._downloads:
            pinned = [torch.empty_like(table, device="cpu", pin_memory=True) for _ in range(2)]
            self._downloads[table.shape] = [(to, torch.cuda.Event()) for to in pinned]
        self._downloads[table.shape].reverse()
        host, over = self._downloads[table.shape][0]
        host.copy_(table, non_blocking=True)
        over.record()

        def read() -> list[list[int]]:
            over.synchronize()
            return host.tolist()

        return read

    def advance(self, table: Tensor) -> None:
        """Bring what the device reads to where a round leaves it, as `commit` and `upload` would.

        Args:
            table: int64 [B, 4 + G+1], of the round's `Verdict`.
        """
        inputs = self.uploaded[: COPIES - 1]
        inputs.copy_(_advanced(table, inputs, self.slots))

    def _start(self, row: int) -> int:
        """Where the device has a row's pending token."""
        return self.lengths[row] if self.budget[row] > 0 else self.slots

    def begin(self, row: int, length: int, ids: list[int], first: int, budget: int) -> None:
        """Let a row decode: `ids` now end at `length`, and `first` is pending."""
        self.lengths[row], self.pending[row], self.budget[row] = length, first, budget
        self.tokens[row] = [*self.tokens[row][: length - len(ids)], *ids, first]
        self._answers[row] = length
        self.changed.add(row)

    def commit(self, row: int, emitted: list[int]) -> None:
        """Move a row on by the tokens that a round emitted; the last one is pending."""
        self.tokens[row] += emitted
        self.lengths[row] += len(emitted)
        self.pending[row] = emitted[-1]
        self.budget[row] -= len(emitted)

    def answer(self, row: int) -> list[int]:
        """Tokens of a row's answer so far."""
        return self.tokens[row][self._answers[row] :]

    def crop(self, row: int, length: int, pending: int) -> None:
        """Take back what was committed past `length`; `pending` is the token that comes next."""
        self.lengths[row], self.pending[row] = length, pending
        self.tokens[row] = [*self.tokens[row][:length], pending]

    def copy(self, source: int, to: int, length: int) -> None:
        """Let a row hold the first `length` tokens of another."""
        self.lengths[to], self.pending[to] = length, self.tokens[source][length]
        self.tokens[to] = self.tokens[source][: length + 1]
        self._answers[to] = length

    def extends_prompt(self, row: int, length: int) -> bool:
        """Whether a text that is alike up to `length` goes on from the row's last prompt."""
        return 0 < self._answers[row] <= length

    def clear(self, row: int) -> None:
        """Empty a row."""
        self.lengths[row] = self.budget[row] = 0
        self.tokens[row] = []


class RollbackLimits:
    """How far back the target's recurrent states of each row can go.

    Keys and values go back any distance; a row whose states are lost is read again.
    """

    def __init__(self, rows: RowStates, *, recurrent: bool) -> None:
        self._rows, self._recurrent = rows, recurrent
        self._least = [0] * rows.count
        """A row's length, or `LOST`: then all that it holds is read again before it goes on."""

    def invalidate(self, rows: list[int]) -> None:
        """Say that the states of some rows may be of another text."""
        for row in rows if self._recurrent else ():
            self._least[row] = LOST

    def validate(self, row: int) -> None:
        """The states of this row go back to where it is now, no further."""
        self._least[row] = self._rows.lengths[row]

    def is_lost(self, row: int) -> bool:
        """Whether the states are of another text."""
        return self._least[row] == LOST

    def crop(self, row: int, length: int) -> None:
        """A row goes back to `length`, further perhaps than its states do."""
        if length < self._least[row]:
            self.invalidate([row])


@compiled_once
def _advanced(table: Tensor, inputs: Tensor, slots: int) -> Tensor:
    """Pending tokens, their places, budgets and the round's number, int64 [4, B], a round later."""
    pending, start, budget, number = inputs.unbind()
    emitted, ended = table[:, 0], table[:, 3] > 0
    last = table.gather(1, (emitted + 3).clamp(min=4)[:, None])[:, 0]
    left = (budget - emitted).masked_fill(ended, 0)
    goes_on = left > 0
    places = (start + emitted).masked_fill(~goes_on, slots)
    return torch.stack([torch.where(goes_on, last, pending), places, left, number + 1])
