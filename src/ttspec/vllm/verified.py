"""An engine's step, and what steps showed, kept as it is until the memory is told of it.

To keep a round takes the device a copy of each tensor, to tell the memory a hundred small
operations. Those are captured as graphs, so what they read lies where it is for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ttspec.drafters.base import Drafter
from ttspec.learning.memory import feature_width
from ttspec.learning.memory_learner import MemoryLearner

MOST_ROUNDS, MOST_BYTES = 16, 64 << 20
"""Rounds that are kept, and bytes that the target's logits of them may take."""
FEW_ROUNDS = 4
"""Rounds of which the memory has a graph of its own, a quarter as dear as that of all."""
PIECES = 128, 512
"""Tokens of a prompt that are read at once: as many as the smallest of these that they fit in."""


def take(out: Tensor, source: Tensor, at: Tensor) -> None:
    """Copy rows `at` int64 [N] of `source` to `out` [N, ...]: one kernel if dtypes are equal."""
    if out.dtype == source.dtype and out.shape[1:] == source.shape[1:]:
        torch.index_select(source, 0, at, out=out)
    else:
        out.copy_(source.index_select(0, at))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStep:
    """One step of n requests, in the order of the engine's batch."""

    ids: Sequence[str]
    bounds: Sequence[int]
    """[n + 1]: a request's tokens are those from bounds[i] up to bounds[i + 1]."""
    drafts: Sequence[int]
    """How many of a request's tokens, the last ones, are drafts."""
    ends: Sequence[int]
    """Upper bounds of the positions behind each request's tokens."""
    tokens: Tensor
    """Integers [T], what the target read."""
    positions: Tensor
    """Integers [T]."""
    features: Sequence[Tensor]
    """[T, H] of each tap; none where the drafter reads none."""
    emitted: Tensor
    """Integers [n]: how many tokens the engine emits of each request."""


class VerifiedRounds:
    """The newest rounds of some rows, on the device."""

    def __init__(self, learner: MemoryLearner, rows: int, width: int) -> None:
        """Room for rounds of `rows` rows, of `width` tokens each, which is one more than drafts."""
        self._learner, drafter = learner, learner.drafter
        like, (vocabulary, hidden) = drafter.embedding, drafter.embedding.shape
        self.rounds, self.rows, self.width = rounds_for(drafter, rows, width), rows, width
        self.nbytes = bytes_for(drafter, rows, width, like.element_size())
        self._sizes = sorted({min(FEW_ROUNDS, self.rounds), self.rounds})
        tokens = self.rounds, rows * width
        self._tokens = like.new_zeros(tokens, dtype=torch.int32)
        self._features = [like.new_zeros(*tokens, hidden) for _ in drafter.taps]
        self._logits = like.new_zeros(*tokens, vocabulary)
        self._start = like.new_zeros(self.rounds, rows, dtype=torch.long)
        self._emitted = like.new_zeros(self.rounds, rows, dtype=torch.int32)
        self._took_part = torch.zeros_like(self._emitted)
        self._figures = torch.zeros(2, dtype=torch.long, device=like.device)
        self._told = torch.zeros(2, dtype=torch.long, pin_memory=like.is_cuda)
        self._parts: list[list[int]] = []
        """By round that the memory does not know yet: 1 for rows that took part."""
        self._places, self._places_of_logits = Sent(like.device), Sent(like.device)

    @property
    def kept(self) -> int:
        """Rounds that the memory does not know yet."""
        return len(self._parts)

    @property
    def of_requests(self) -> int:
        """The same, each counted once for every row that took part."""
        return sum(map(sum, self._parts))

    def has(self, row: int) -> bool:
        """Whether the memory does not know some round of a row yet."""
        return any(part[row] for part in self._parts)

    def keep_logits(self, logits: Tensor, at: list[int]) -> None:
        """Begin a round: places `at` [B * width] in the target's logits [N, V], all rows."""
        take(self._logits[self.kept], logits, self._places_of_logits(at))

    def keep(self, step: EngineStep, at: list[int], took_part: list[int]) -> bool:
        """End a round; whether there is no room for another one.

        Args:
            step: Had it verified.
            at: [B * width + B]: each row's tokens, as places in the step's, and which request it
                is.
            took_part: For each row 1 if it did.
        """
        k = self.kept
        flat, request = self._places(at).split([len(at) - self.rows, self.rows])
        take(self._tokens[k], step.tokens, flat)
        take(self._start[k], step.positions, flat[:: self.width])
        take(self._emitted[k], step.emitted, request)
        for kept, feature in zip(self._features, step.features, strict=True):
            take(kept[k], feature, flat)
        self._parts.append(took_part)
        return self.kept == self.rounds

    def tell(self) -> None:
        """Have all that is kept remembered; a row's rounds follow each other without a gap."""
        if self._parts:
            size = size_of_graph(self._learner, self.kept, self._sizes)
            parts = self._parts + [[0] * self.rows] * (size - self.kept)
            self._took_part[:size].copy_(on_device(parts, self._start.device))
            self._learner.run(self._remember, size, compile=False)
            self._told.copy_(self._figures, non_blocking=True)
            self._parts = []

    def run(self) -> None:
        """Capture all sizes, where nothing is told."""
        self._took_part.zero_()
        for size in self._sizes:
            self._learner.run(self._remember, size, compile=False)

    def _remember(self, rounds: int) -> None:
        width, device = self.width, self._start.device
        took_part, start = self._took_part[:rounds], self._start[:rounds]
        emitted = (self._emitted[:rounds].clamp(max=width) * took_part).long().T  # [rows, rounds]
        self._figures += torch.stack([emitted.sum(), (emitted > 0).sum()])
        count = emitted.sum(1)
        before = emitted.cumsum(1) - emitted
        first = (start.T - before).masked_fill(emitted == 0, 0).amax(1)
        size = rounds * width
        if device.type == "cpu" and not self._learner.run.on:  # else it would have to be waited for
            size = max(1, int(count.max()))
        column = torch.arange(width, device=device)
        inside = column < emitted[..., None]
        place = (before[..., None] + column).masked_fill(~inside, size).flatten(1)
        source = torch.arange(rounds * self.rows * width, device=device)
        source = source.view(rounds, self.rows, width).transpose(0, 1).flatten(1)
        at = torch.zeros(self.rows, size + 1, dtype=torch.long, device=device)
        at = at.scatter_(1, place, source)[:, :size]
        rows = torch.arange(self.rows, device=device)
        features = [kept.flatten(0, 1)[at] for kept in self._features]
        self._learner.read(
            self._tokens.flatten()[at].long(),
            torch.cat(features, -1) if features else self._logits.new_zeros(*at.shape, 0),
            first,
            count,
            self._logits.flatten(0, 1)[at],
            rows,
        )

    def acceptance(self) -> tuple[int, int]:
        """Tokens that verifications emitted, and how many verifications, when last told of."""
        emitted, rounds = self._told.tolist()
        return emitted, rounds


class TextPieces:
    """Pieces of texts that no drafts were among, told to the memory one by one."""

    def __init__(self, learner: MemoryLearner) -> None:
        """Room for one."""
        self._learner, like = learner, learner.drafter.embedding
        self._tokens = like.new_zeros(1, PIECES[-1], dtype=torch.long)
        self._features = like.new_zeros(1, PIECES[-1], feature_width(learner.drafter))
        self._start, self._count, self._row = like.new_zeros(3, 1, dtype=torch.long)

    def tell(self, step: EngineStep, begin: int, end: int, row: int) -> None:
        """Have tokens of a step, at most the last of `PIECES`, remembered as a row's next ones."""
        size, taps = end - begin, len(step.features)
        self._tokens[0, :size].copy_(step.tokens[begin:end])
        parts = self._features[0].chunk(taps, dim=-1) if taps else ()
        for part, feature in zip(parts, step.features, strict=True):
            part[:size].copy_(feature[begin:end])
        self._start.copy_(step.positions[begin : begin + 1])
        self._count.fill_(size)
        self._row.fill_(row)
        size = size_of_graph(self._learner, size, PIECES)
        self._learner.run(self._remember_piece, size, compile=False)

    def run(self) -> None:
        """Capture all sizes, where nothing is told."""
        self._count.zero_()
        for size in PIECES:
            self._learner.run(self._remember_piece, size, compile=False)

    def _remember_piece(self, size: int) -> None:
        tokens, features = self._tokens[:, :size], self._features[:, :size]
        self._learner.read(tokens, features, self._start, self._count, None, self._row)


def size_of_graph(learner: MemoryLearner, size: int, sizes: Sequence[int]) -> int:
    """Few graphs: the smallest of their sizes that is enough; uncaptured, what is asked for."""
    return next(n for n in sizes if n >= size) if learner.run.on else size


class Sent:
    """Numbers of the host on the device: those of the last step are seldom others."""

    def __init__(self, device: torch.device) -> None:
        """None yet."""
        self._device, self._numbers = device, list[int]()
        self._sent = torch.zeros(0, dtype=torch.long, device=device)

    def __call__(self, numbers: list[int]) -> Tensor:
        """They, int64; sent if they are others."""
        if numbers != self._numbers:
            self._numbers, self._sent = numbers, on_device(numbers, self._device)
        return self._sent


def on_device(numbers: list[int] | list[list[int]], device: torch.device) -> Tensor:
    """Numbers of the host, int64; the copy waits for nothing."""
    if device.type != "cuda":
        return torch.tensor(numbers, device=device)
    return torch.tensor(numbers, pin_memory=True).to(device, non_blocking=True)


def rounds_for(drafter: Drafter, rows: int, width: int) -> int:
    """Rounds that are kept, at least one."""
    vocabulary = int(drafter.embedding.shape[0])
    of_round = rows * width * vocabulary * drafter.embedding.element_size()
    return min(MOST_ROUNDS, max(1, MOST_BYTES // of_round))


def bytes_for(drafter: Drafter, rows: int, width: int, element: int) -> int:
    """Bytes that they take, in a dtype of `element` bytes."""
    slots = rows * rounds_for(drafter, rows, width) * width
    numbers = int(drafter.embedding.shape[0]) + feature_width(drafter)
    return slots * (4 + element * numbers)
