"""An engine's step, and what steps showed, kept as it is until the memory is told of it.

To keep a round takes the device three copies, to tell the memory a hundred small operations. Those
are captured as graphs, so what they read lies where it is for good. Where each row's tokens are
among those that were copied is said when the memory is told, of all rounds at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ttspec.drafters.base import Drafter
from ttspec.learning.memory import feature_width
from ttspec.learning.memory_learner import MemoryLearner

MOST_ROUNDS, MOST_BYTES = 16, 96 << 20
"""Rounds that are kept, and bytes that they may take."""
FEW_ROUNDS = 4
"""Rounds of which the memory has a graph of its own, a quarter as dear as that of all."""
SPREAD = 4
"""Rows lie among so many times as many tokens, at most, where a step is copied in one piece."""
NOWHERE = np.zeros((0, 0), dtype=np.int64)
MOST_VIEWS = 1024
"""Views of what is kept that are not made anew each time."""
PIECES = 128, 512
"""Tokens of a prompt that are read at once: as many as the smallest of these that they fit in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStep:
    """One step of n requests, in the order of the engine's batch."""

    ids: Sequence[str]
    bounds: Sequence[int]
    """[n + 1]: a request's tokens are those from bounds[i] up to bounds[i + 1]."""
    drafts: Sequence[int]
    """How many of a request's tokens, the last ones, are drafts."""
    ends: Sequence[int] | Tensor
    """Upper bounds of the positions behind each request's tokens, on the host."""
    tokens: Tensor
    """Integers [T], what the target read."""
    positions: Tensor
    """Integers [T]."""
    features: Sequence[Tensor]
    """[T, H] of each tap; none where the drafter reads none."""
    emitted: Tensor
    """Integers [n]: how many tokens the engine emits of each request."""


def copy_all(out: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each to its place: one kernel on a GPU if dtypes and layouts are equal."""
    if out:
        torch._foreach_copy_(out, sources)  # pyright: ignore[reportPrivateImportUsage]


class Cut:
    """Some items of a step's tensors: the piece that they lie in, or if it is too long each one."""

    def __init__(self, at: list[int], room: int, device: torch.device) -> None:
        """Items `at`; `room` for at least as many."""
        first, end = min(at, default=0), max(at, default=-1) + 1
        self._piece, self._index, self.count = slice(first, end), None, end - first
        self.places = [item - first for item in at]
        """Where each is in what `of` returns."""
        if self.count > room:
            self._index, self.count = on_device(at, device), len(at)
            self.places = list(range(len(at)))

    def of(self, source: Tensor) -> Tensor:
        """[count, ...] of a tensor."""
        return source[self._piece] if self._index is None else source.index_select(0, self._index)


@dataclass(slots=True, kw_only=True)
class Layout:
    """Where rounds of some rows lie in a step, and in others of the same batch."""

    ids: Sequence[str]
    drafts: Sequence[int]
    rows: dict[int, int]
    """Of each row with drafts, which request it has."""
    logits: Cut
    tokens: Cut
    requests: Cut
    where: np.ndarray
    """int64 [rows, 2 * width + 2]: each row's tokens among the logits and among the tokens that are
    kept, its request, and 1 if it took part."""
    bounds: Sequence[int] = ()
    others: bool = True
    """Whether there are requests that have no row and may get one."""
    repeats: int = 0
    """Steps that may follow in which no request outgrows its row, or begins another part."""

    def reuse(self, step: EngineStep, *, may_begin: bool) -> bool:
        """Whether nothing but tensors is new in a step; uses up one of `repeats` if so.

        `may_begin`: others may get a row.
        """
        if (
            self.repeats <= 0
            or (may_begin and self.others)
            or self.bounds != step.bounds
            or self.drafts != step.drafts
            or self.ids != step.ids
        ):
            return False
        self.repeats -= 1
        return True


class VerifiedRounds:
    """The newest rounds of some rows, on the device."""

    def __init__(self, learner: MemoryLearner, rows: int, width: int) -> None:
        """Room for rounds of `rows` rows, of `width` tokens each, which is one more than drafts."""
        self._learner, drafter = learner, learner.drafter
        like, (vocabulary, hidden) = drafter.embedding, drafter.embedding.shape
        self.rows, self.width, self._vocabulary = rows, width, vocabulary
        self.rounds, self.nbytes = room_for(drafter, rows, width, like.element_size())
        self._sizes = sorted({min(FEW_ROUNDS, self.rounds), self.rounds})
        self._slots = rows * width
        self._room = SPREAD * self._slots
        room = self.rounds, self._room
        self._logits = like.new_zeros(self.rounds, self._slots, vocabulary)
        self._tokens, self._emitted = like.new_zeros(2, *room, dtype=torch.int32)
        self._features = [like.new_zeros(*room, hidden) for _ in drafter.taps]
        self._positions = like.new_zeros(*room, dtype=torch.long)
        """Zero where they follow from the last round's."""
        self._where = like.new_zeros(self.rounds, rows, 2 * width + 2, dtype=torch.long)
        self._figures = torch.zeros(2, dtype=torch.long, device=like.device)
        self._on_host = torch.zeros(2, dtype=torch.long, pin_memory=like.is_cuda)
        """The same, as of when rounds were remembered last."""
        self._layouts: list[Layout] = []
        """Of the rounds that the memory does not know yet."""
        self._views: dict[tuple[int, int, int], tuple[list[Tensor], list[Tensor]]] = {}

    @property
    def kept(self) -> int:
        """Rounds that the memory does not know yet."""
        return len(self._layouts)

    @property
    def of_requests(self) -> int:
        """The same, each counted once for every row that took part."""
        return sum(len(layout.rows) for layout in self._layouts)

    def has(self, row: int) -> bool:
        """Whether the memory does not know some round of a row yet."""
        return any(row in layout.rows for layout in self._layouts)

    def layout(self, ids: Sequence[str], drafts: Sequence[int], rows: dict[int, int]) -> Layout:
        """What is known of a step before its verdict; arguments as in `Layout`."""
        first = list(accumulate((count + 1 for count in drafts), initial=0))
        at = [first[i] + min(j, drafts[i]) for i in rows.values() for j in range(self.width)]
        cut, none = (Cut(some, self._slots, self._where.device) for some in (at, []))
        return Layout(
            ids=list(ids),
            drafts=list(drafts),
            rows=rows,
            logits=cut,
            tokens=none,
            requests=none,
            where=NOWHERE,
        )

    def keep_logits(self, logits: Tensor, layout: Layout) -> None:
        """Begin a round with the target's logits [N, at least V] of a step, request by request."""
        out = self._logits[self.kept, : layout.logits.count]
        out.copy_(layout.logits.of(logits)[:, : self._vocabulary])

    def placed(self, layout: Layout, step: EngineStep, took_part: Collection[int]) -> Layout:
        """The whole layout of a step in which these of its rows took part."""
        width, device, requests = self.width, self._where.device, list(layout.rows.values())
        at: list[int] = []
        for i in requests:
            begin = step.bounds[i + 1] - step.drafts[i] - 1
            at += [begin + min(j, step.drafts[i]) for j in range(width)]
        cut, cut_of_requests = (Cut(some, self._room, device) for some in (at, requests))
        where, rows = np.zeros((self.rows, 2 * width + 2), dtype=np.int64), list(layout.rows)
        where[rows, :width] = np.reshape(layout.logits.places, (-1, width))
        where[rows, width:-2] = np.reshape(cut.places, (-1, width))
        where[rows, -2] = cut_of_requests.places
        where[list(took_part), -1] = 1
        return replace(
            layout,
            rows={row: i for row, i in layout.rows.items() if row in took_part},
            tokens=cut,
            requests=cut_of_requests,
            bounds=list(step.bounds),
            where=where,
        )

    def keep(self, step: EngineStep, layout: Layout) -> bool:
        """End a round; whether there is no room for another one."""
        k, tokens, requests = self.kept, layout.tokens, layout.requests
        numbers, features = self._out(k, tokens.count, requests.count)
        copy_all(numbers, [tokens.of(step.tokens), requests.of(step.emitted)])
        copy_all(features, [tokens.of(feature) for feature in step.features])
        if not k or self._layouts[-1] is not layout:
            self._positions[k, : tokens.count].copy_(tokens.of(step.positions))
        self._layouts.append(layout)
        return self.kept == self.rounds

    def _out(self, k: int, tokens: int, requests: int) -> tuple[list[Tensor], list[Tensor]]:
        """Where a round's tokens and verdicts go, and its features."""
        key = k, tokens, requests
        if key not in self._views:
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            numbers = [self._tokens[k, :tokens], self._emitted[k, :requests]]
            self._views[key] = numbers, [kept[k, :tokens] for kept in self._features]
        return self._views[key]

    def tell(self) -> None:
        """Have all that is kept remembered; a row's rounds follow each other without a gap."""
        if self._layouts:
            size = size_of_graph(self._learner, self.kept, self._sizes)
            nothing = np.zeros_like(self._layouts[0].where)
            where = [layout.where for layout in self._layouts] + [nothing] * (size - self.kept)
            self._where[:size].copy_(on_device(np.stack(where), self._where.device))
            self._learner.run(self._remember, size, compile=False)
            self._on_host.copy_(self._figures, non_blocking=True)
            self._layouts = []

    def run(self) -> None:
        """Capture all sizes, where nothing is told."""
        self._where.zero_()
        for size in self._sizes:
            self._learner.run(self._remember, size, compile=False)

    def _remember(self, rounds: int) -> None:
        width, device = self.width, self._where.device
        where, of_round = self._where[:rounds], torch.arange(rounds, device=device)[:, None, None]
        # [rows, rounds], and the same of each token: [rows, rounds * width].
        logits = (of_round * self._slots + where[..., :width]).transpose(0, 1).flatten(1)
        tokens = (of_round * self._room + where[..., width:-2]).transpose(0, 1).flatten(1)
        request, took_part = where[..., -2], where[..., -1]
        emitted = self._emitted[:rounds].long().gather(1, request).clamp(max=width)
        emitted, took_part = (emitted * took_part).T, took_part.T
        start = self._positions[:rounds].gather(1, where[..., width]).T
        self._figures += torch.stack([emitted.sum(), (emitted > 0).sum()])
        count = emitted.sum(1)
        before = emitted.cumsum(1) - emitted
        first = (start - before).masked_fill(took_part == 0, 0).amax(1)
        self._positions[:rounds].zero_()
        size = rounds * width
        if device.type == "cpu" and not self._learner.run.on:  # else it would have to be waited for
            size = max(1, int(count.max()))
        column = torch.arange(width, device=device)
        inside = column < emitted[..., None]
        place = (before[..., None] + column).masked_fill(~inside, size).flatten(1)
        logits, tokens = (
            at.new_zeros(self.rows, size + 1).scatter_(1, place, at)[:, :size]
            for at in (logits, tokens)
        )
        features = [kept.flatten(0, 1)[tokens] for kept in self._features]
        self._learner.memory_trainer.rows.write(
            self._tokens.flatten()[tokens].long(),
            torch.cat(features, -1) if features else self._logits.new_zeros(*tokens.shape, 0),
            first,
            count,
            self._logits.flatten(0, 1),
            subset=torch.arange(self.rows, device=device),
            logits_at=logits,
        )

    def acceptance(self) -> tuple[int, int]:
        """Tokens that verifications emitted, and how many verifications, of what is remembered."""
        emitted, rounds = self._on_host.tolist()
        return emitted, rounds


class TextPieces:
    """Pieces of texts that no drafts were among, told to the memory one by one."""

    def __init__(self, learner: MemoryLearner) -> None:
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
        rows = self._learner.memory_trainer.rows
        rows.write(tokens, features, self._start, self._count, subset=self._row)


def size_of_graph(learner: MemoryLearner, size: int, sizes: Sequence[int]) -> int:
    """Few graphs: the smallest of their sizes that is enough; uncaptured, what is asked for."""
    return next(n for n in sizes if n >= size) if learner.run.on else size


def on_device(numbers: list[int] | np.ndarray, device: torch.device) -> Tensor:
    """Numbers of the host, int64; the copy waits for nothing."""
    host = torch.as_tensor(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def room_for(drafter: Drafter, rows: int, width: int, element: int) -> tuple[int, int]:
    """Rounds that are kept, at least one, and the bytes that they take in a dtype of `element`."""
    token = 16 + element * feature_width(drafter)
    of_round = rows * width * (element * int(drafter.embedding.shape[0]) + SPREAD * token)
    rounds = min(MOST_ROUNDS, max(1, MOST_BYTES // of_round))
    return rounds, rounds * of_round
