"""Learning from remembered texts: their blocks are drafted again, over context made anew.

Keys and values of the context come from the texts' features and the weights as they are now, and
gradients reach what makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ttspec.compiled import compiled
from ttspec.config import DraftConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.context import context_of_texts
from ttspec.drafters.layers import Weights
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.memory import PAGE, MemoryRows, TextMemory, Texts
from ttspec.learning.replay_buffer import CHAIN, ReplayBuffer
from ttspec.learning.update_report import UpdateReport
from ttspec.losses import expected_length, likely_kl, log_likely, position_weights
from ttspec.models.capture import Graphs
from ttspec.records import LONGEST_COPY, ReplayBatch

TEXTS, BLOCKS, WINDOW = 16, 32, 8
"""Of an update: texts, blocks of each, and pages that a text has at most."""
FEW_TEXTS, FEW_BLOCKS = 2, 16
"""The same off a GPU, where an update has far less time; not measured."""
NEWEST, FEW_NEWEST = (8, 4), (2, 8)
"""Pages, the newest, by which what was learned is compared with the anchor, and blocks of each; off
a GPU a comparison would cost more than an update else."""
ENOUGH = 8
"""Blocks without which nothing can be said."""
HELD_OUT_BLOCKS = 24
"""Of a held-out page."""
RECORDED_ROUNDS = 128
RECORDED_PART = {1: 1, 2: 4, 16: 16}
"""The memory of all requests records so many rounds, then leaves out others: one part in so many is
recorded, by the strides between updates at least, since recording takes 0.08 ms of a round of eight
rows on an H200, and more if it is not compiled. While the drafter pauses it is no more than one in
four."""
RECORDED_ROWS = 8
"""Rows for which that is so; of more rows fewer rounds say as much. Of 32, one recorded round in
four took 0.26 ms more, 9 % of all time (docs/experiments.md)."""
DECAY = 1.5
"""The first drafts of a block weigh most: the others count only where those were right."""


class TextTrainer:
    """Drafts again what a drafter of these options would draft."""

    def __init__(self, drafter: Drafter, options: DraftConfig, length: int) -> None:
        """Blocks of `length` drafts."""
        self.drafter, self.options, self.length = drafter, options, length

    def backward(self, live: LiveWeights, texts: Texts, batch: ReplayBatch) -> Tensor:
        """Set the gradients of a batch's loss in `live`: its mean over the drafts that teach.

        Args:
            live: Whose masters the gradients are of.
            texts: N texts.
            batch: A blocks of each, as from `blocks`.

        Returns:
            The loss.
        """
        leaves = {n: w.detach().requires_grad_() for n, w in live.candidate().items()}
        with torch.enable_grad():
            q_logits = self._draft({**self.drafter.weights, **leaves}, texts, batch)
            loss = likely_kl(*self._target(texts, batch), q_logits)
            weight = position_weights(self.length, DECAY, loss.device) * batch.mask
            total = (loss * weight).sum() / weight.sum().clamp(min=1e-6)
            gradients = torch.autograd.grad(total, list(leaves.values()))
        live.set_gradients(list(gradients), add=False)
        return total.detach()

    @torch.no_grad()
    def expected_drafts(self, weights: Weights, texts: Texts, batch: ReplayBatch) -> Tensor:
        """Drafts of each block that `weights` would get accepted, on average, float32 [N, A]."""
        likely, p, _ = self._target(texts, batch)
        q = log_likely(likely, self._draft(weights, texts, batch)).exp()
        return expected_length(q.minimum(p.float()).sum(-1), batch.mask)

    @torch.no_grad()
    def blocks(self, texts: Texts, may: Tensor, chance: Tensor, count: int) -> ReplayBatch:
        """Some blocks of each text, at random.

        Args:
            texts: N texts.
            may: bool [N, L], which drafts may be looked at, by the token before.
            chance: float32 [N, L], random.
            count: How many of each text.
        """
        row, start, at, mask = places(may, chance, count, self.length)
        before = texts.features[row, start - 1] if texts.features.shape[-1] else None
        return ReplayBatch.of(texts.tokens[row[..., None], at], start, before, mask)

    def _draft(self, weights: Weights, texts: Texts, batch: ReplayBatch) -> Tensor:
        """Logits [N, A, G, V_draft] of a batch's blocks."""
        state = context_of_texts(
            self.drafter, weights, texts.tokens, texts.features, self.options, self.length
        )
        return self.drafter.replay(state, batch, self.length, texts.tokens.shape[1])

    def _target(self, texts: Texts, batch: ReplayBatch) -> tuple[Tensor, Tensor, Tensor]:
        """What the target said of drafts: likely tokens and their p [N, A, G, K], the others' p."""
        size = texts.tokens.shape[1]
        at = batch.start[..., None] + torch.arange(self.length, device=batch.start.device)
        row = torch.arange(len(at), device=at.device)[:, None, None]
        at = at.clamp(max=size - 1)
        return texts.likely[row, at], texts.p[row, at], texts.rest[row, at]


@compiled
def places(
    may: Tensor, chance: Tensor, count: int, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where some blocks of texts stand; arguments as in `TextTrainer.blocks`.

    Returns:
        Rows int64 [N, 1], starts [N, A], places [N, A, G + 1] and bool [N, A, G], which drafts may
        be looked at.
    """
    # A block's token has one before it, of which something may be read.
    first = torch.arange(may.shape[1], device=may.device) == 0
    found, start = chance.masked_fill(~may | first, -1.0).topk(count, dim=1)
    at = start[..., None] + torch.arange(length + 1, device=start.device)
    inside, at = at < may.shape[1], at.clamp(max=may.shape[1] - 1)
    row = torch.arange(len(may), device=start.device)[:, None]
    mask = (may[row[..., None], at] & inside)[..., :-1].long().cumprod(-1).bool()
    return row, start, at, mask & (found > 0)[..., None]


class MemoryTrainer(TextTrainer):
    """What the rows of a learner remember, and its updates from the memory of all."""

    texts: Texts
    """Those of the update that begins."""
    newest: Texts
    """Those that judge what was learned before."""

    _buffer: ReplayBuffer
    """What rows have committed."""

    def __init__(
        self,
        memory: TextMemory,
        drafter: Drafter,
        rows: int,
        options: DraftConfig,
        length: int,
        run: Graphs,
    ) -> None:
        """Of `rows` rows, whose rounds `run` captures; the rest as in `TextTrainer`."""
        on_gpu = memory.tokens.is_cuda
        if drafter.first_alone and not on_gpu:  # the others weigh little, and cost as much
            length = min(length, CHAIN)
        super().__init__(drafter, options, length)
        self._run = run
        self._new = [0] * rows
        """Tokens of each row that the memory was not told of."""
        self.memory, self.rows = memory, MemoryRows(memory, rows)
        device = memory.tokens.device
        texts, self.count = (TEXTS, BLOCKS) if on_gpu else (FEW_TEXTS, FEW_BLOCKS)
        self._newest = NEWEST if on_gpu else FEW_NEWEST
        order = torch.Generator(device).manual_seed(0)  # the same blocks for all
        self._order = torch.rand(1, WINDOW * PAGE, generator=order, device=device)
        self._row = torch.zeros(1, dtype=torch.long, device=device)
        """The row whose text is over, where a graph reads it."""
        self._pages = torch.zeros(texts, dtype=torch.long, device=device)
        self._chances = torch.zeros(texts, WINDOW * PAGE, device=device)
        self.records_prompts = True
        """Whether the last round was recorded: prompts are only then."""

    def records(self, number: int, strides: int) -> bool:
        """Whether the memory records a round, with so many strides between updates."""
        one_in = RECORDED_PART[max(n for n in RECORDED_PART if n <= strides)]
        one_in *= max(1, len(self.rows.end) // RECORDED_ROWS)
        return number // RECORDED_ROUNDS % one_in == 0

    def note(self, buffer: ReplayBuffer, emitted: Mapping[int, int], due: bool, ahead: int) -> None:
        """Take note of a round, and `remember` if it is due or another might overwrite something.

        Args:
            buffer: Has it.
            emitted: Tokens of each row.
            due: See above.
            ahead: Tokens of a row, at most, of a round that is under way already: the buffer has
                those too, and may have those of one more before the next note.
        """
        for row, tokens in emitted.items():
            self._new[row] += tokens
        if due or max(self._new) + (2 * ahead or LONGEST_COPY + 1) > buffer.ring:
            self.remember(buffer, ahead=ahead)

    def remember(self, buffer: ReplayBuffer | None, row: int | None = None, ahead: int = 0) -> None:
        """Note what a row, or all of them, have committed since the memory was last told.

        Where a round is under way, so many of its tokens may be among the newest.
        """
        if buffer is None:
            return
        if row is None:
            work, most = self.write_newest, max(self._new) + ahead
            self._new = [0] * len(self._new)
        else:
            work, most, self._new[row] = self.write_newest_of_row, self._new[row], 0
            self._row.fill_(row)
        if most:
            self._buffer = buffer
            width = next(n for n in self.widths(buffer) if n >= min(most, buffer.ring))
            self._run(work, width)

    def capture(self, buffer: ReplayBuffer) -> None:
        """Capture what notes texts, where nothing is new."""
        self._buffer = buffer
        for width in self.widths(buffer):
            self._run(self.write_newest, width)
            self._run(self.write_newest_of_row, width)

    @staticmethod
    def widths(buffer: ReplayBuffer) -> list[int]:
        """Tokens of a row that are noted together; few, since each is captured."""
        return [*(n for n in (8, 16, 32) if n < buffer.ring), buffer.ring]

    def write_newest(self, width: int) -> None:
        """Write the last tokens of all rows, where they are new; twice is as once."""
        end = self.rows.end
        rows = torch.arange(len(end), device=end.device)
        for some in rows.split(self._buffer.rows_at_once(width)):
            self.rows.write(**self._buffer.newest_text(end[some], some, width))

    def write_newest_of_row(self, width: int) -> None:
        """The same of the row that `_row` says."""
        end = self.rows.end[self._row]
        self.rows.write(**self._buffer.newest_text(end, self._row, width))

    def forget(self, row: int, buffer: ReplayBuffer | None) -> None:
        """A row's text is over; it stays in the memory."""
        self.remember(buffer, row)
        self.rows.forget(row)

    def choose(self, run: Graphs, *, compare: bool) -> None:
        """Choose and copy what the next update learns from, and that by which it is judged.

        Captured before the update: what a graph returns must not lie where an older one works.
        """
        pages, chances = self.memory.sample(len(self._pages), WINDOW)
        self._pages.copy_(pages)
        self._chances.copy_(chances)
        self.texts = run(self.read_texts)
        if compare:
            self.newest = run(self.read_newest)

    def update(
        self, run: Graphs, live: LiveWeights, report: UpdateReport, *, compare: bool
    ) -> None:
        """Step on what was chosen, and `compare` what was learned with the anchor.

        Args:
            run: Captures the parts by their names.
            live: The weights.
            report: Is written.
            compare: See above.
        """

        def train_on_texts() -> None:
            self.compute_gradients(live, report)

        def step_weights() -> None:
            with torch.no_grad():
                live.step(report)

        def compare_newest() -> None:
            self.compare_newest(live, report)

        run(train_on_texts)
        run(step_weights, compile=False, warm=False)
        if compare:
            run(compare_newest)

    # What may be captured as a graph.

    def read_texts(self) -> Texts:
        """What was chosen, out of reach of rows that write on."""
        return self.memory.read(self._pages, WINDOW)

    def read_newest(self) -> Texts:
        """Texts up to the newest pages, which hardly taught; where there are fewer, nothing."""
        return self.memory.read(self.memory.newest_pages(self._newest[0]), WINDOW)

    def compute_gradients(self, live: LiveWeights, report: UpdateReport) -> None:
        """Set the gradients of what `texts` teach in `live`, and report as of the first row."""
        teach = self.texts.judged & ~self.texts.held_out
        chances = self._chances[:, : teach.shape[1]]
        batch = self.blocks(self.texts, teach, chances, self.count)
        report.table.zero_()
        report.loss[:1].copy_(self.backward(live, self.texts, batch))
        report.blocks[:1].copy_(batch.count.sum())
        report.norm[:1].copy_(live.gradient_norms())

    def compare_newest(self, live: LiveWeights, report: UpdateReport) -> None:
        """Compare what was learned with the anchor on the last pages of `newest`.

        Reported as of the first row; too few blocks say nothing.
        """
        last, count = self.newest.last, self._newest[1]
        chances = self._order[:, : last.shape[1]].expand_as(last)
        batch = self.blocks(self.newest, last, chances, count)
        found = self._judged(self.newest, batch, [live.averaged(), {}])
        found = found * (found[:1] >= ENOUGH)
        for column, value in zip((report.judged, report.live, report.anchor), found, strict=True):
            column[:1].copy_(value)

    @torch.no_grad()
    def evaluate(self, sets: dict[str, Weights], most: int) -> tuple[int, dict[str, float]]:
        """How well sets of weights draft what is held out, the newest; waits for the device.

        Args:
            sets: What each changes of the drafter's weights, by name.
            most: Held-out pages at most.

        Returns:
            Blocks, and by name the drafts of one that would be accepted, on average.
        """
        device = self._pages.device
        pages, found = self.memory.held_out_pages(most), [0.0] * (1 + len(sets))
        for part in pages.split(len(self._pages)) if len(pages) else ():
            texts = self.memory.read(part, WINDOW)
            order = torch.Generator(device).manual_seed(0)  # the same blocks for all
            chances = torch.rand(texts.judged.shape, generator=order, device=device)
            batch = self.blocks(texts, texts.held_out, chances, HELD_OUT_BLOCKS)
            judged = self._judged(texts, batch, list(sets.values())).tolist()
            found = [one + more for one, more in zip(found, judged, strict=True)]
        count, *totals = found
        means = [total / max(count, 1) for total in totals]
        return int(count), dict(zip(sets, means, strict=True))

    @torch.no_grad()
    def _judged(self, texts: Texts, batch: ReplayBatch, sets: Sequence[Weights]) -> Tensor:
        """How many blocks are whole, and drafts of them that each set gets accepted: [1 + sets]."""
        whole = batch.mask.all(-1)
        found = [whole.sum().float()]
        for changed in sets:
            weights = {**self.drafter.weights, **changed}
            found.append((self.expected_drafts(weights, texts, batch) * whole).sum())
        return torch.stack(found)
