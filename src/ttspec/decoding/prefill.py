"""Reading prompts in chunks, and reading again what a recurrent target's states have lost.

Between two chunks other rows may have rounds: a row takes no part until its prompt is whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ttspec.decoding.deferred import DeferredContext
from ttspec.decoding.penalties import penalises
from ttspec.decoding.row_sampling import RowSampling, includes
from ttspec.decoding.rows import Processors, RollbackLimits, RowStates
from ttspec.drafters.base import Drafter, DraftState
from ttspec.drafters.context import FeatureState
from ttspec.learning.learner import Learner
from ttspec.learning.memory_trainer import MemoryTrainer
from ttspec.models.capture import Graphs
from ttspec.models.target import Target
from ttspec.models.weight_checks import not_finite
from ttspec.records import TokenLogprobs
from ttspec.rowcache import RowCache, reach_of
from ttspec.sampling import pick, position_noise

CHUNK_TOKENS = 512
"""Prompt tokens of a row read at once; those with more to come than that teach nothing."""
MAX_BATCHED_TOKENS = 32 * CHUNK_TOKENS
"""The same of all rows: more together are no faster, and every layer's states take memory."""
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""For prompts, whose shapes are always new: not cuDNN's, which makes a plan for each shape."""
CAPTURE_SIZES = (64, 128, 256, CHUNK_TOKENS)
"""Tokens to which a row's chunk is padded where reading it is captured as a graph: called kernel by
kernel it takes as long as many rounds do."""
MAX_CAPTURED_ROWS = 8
"""Rows that are read one after the other then; more at a time are faster together."""
PAD_MULTIPLE = 16
"""A CPU that computes in two bytes reads multiples of it: oneDNN keeps 3 MiB for each length."""


@dataclass(slots=True, kw_only=True)
class PrefillBatch:
    """Prompts of some rows that are being read together."""

    rows: list[int]
    ids: list[list[int]]
    """Tokens to read; in a later turn the row's pending token comes first."""
    budgets: list[int]
    """Tokens that each answer may have, at least 1."""
    position: list[int]
    """Where in its row each one's next chunk begins."""
    last: int
    """Tokens of the last chunk, which ends where every prompt ends."""
    read: int = 0
    """Tokens of the longest one that were read."""
    first_tokens: list[int] = field(default_factory=list)
    """The first token of each answer, once all is read."""
    logprobs: list[tuple[TokenLogprobs, ...]] = field(default_factory=list)
    """Of each first token, where they are asked for."""

    @property
    def is_read(self) -> bool:
        """Whether the rows may decode."""
        return bool(self.first_tokens) or not self.rows

    def drop(self, row: int) -> None:
        """Leave a row out."""
        at = self.rows.index(row)
        for values in (self.rows, self.ids, self.budgets, self.position):
            del values[at]


class PrefillChunk(NamedTuple):
    """The next tokens of some rows' prompts, read together."""

    rows: list[int]
    parts: list[list[int]]
    at: list[int]
    """Where in its row each part begins."""
    left: list[int]
    """Prompt tokens that come behind each part."""


class PromptReader:
    """Feeds rows, to the target and to its drafter.

    Owns how far back recurrent states can go, and the graphs of reading. Prompts under way are the
    scheduler's `PrefillBatch`; lengths and tokens are `RowStates`'.
    """

    captures: ClassVar[bool] = True
    """Whether reading may be captured at all."""
    learner: Learner | None = None
    """Told what the rows read."""
    graphs: Graphs | None = None
    """Of reading a row's chunk, once `capture` was called: few rows are read one after another."""
    _features: Tensor
    """[1, width, W], where the last of these graphs left them."""

    def __init__(
        self,
        target: Target,
        cache: RowCache,
        drafter: Drafter | None,
        state: DraftState | None,
        sampling: RowSampling,
        rows: RowStates,
        deferred: DeferredContext,
    ) -> None:
        self._target, self._cache, self._drafter, self._state = target, cache, drafter, state
        self._sampling, self._rows, self._deferred = sampling, rows, deferred
        self._pads = target.device.type == "cpu" and target.dtype.itemsize == 2
        self.rollback = RollbackLimits(rows, recurrent=target.recurrent)
        self._cropped: set[int] = set()
        """Rows that went back: features may be gone that their drafter sets out from."""
        self._graph_inputs = torch.zeros(3 + CHUNK_TOKENS, dtype=torch.long, device=target.device)
        """What graphs read: a row, where its chunk begins, its tokens' number, and these."""
        self._logits: Tensor
        """[1, 1, V], and from which logits a first token is drawn."""
        self._drawn = Processors()
        """How; where a row asks for more, its draw is not captured."""

    def capture(self, graphs: Graphs) -> None:
        """Capture the reading of one row's chunk, of each padded length; the cache is made."""
        if not self.captures:
            return
        self.graphs = graphs
        self._graph_inputs[1:2] = self._rows.slots  # nothing is kept
        compile = self._rows.count > 1  # a lone row's prompt holds up nobody
        for width in CAPTURE_SIZES:
            logits, self._features = graphs(self._read_padded, width, compile=compile)
            self._logits = logits.clone()
            if self.learner and self.learner.memory_trainer:
                graphs(self._record_padded, width, compile=compile)
        self._drawn = self._sampling.captured(self._sampling.processors(range(self._rows.count)))
        graphs(self._draw_one, self._drawn, compile=False)

    def begin(
        self, rows: list[int], ids: list[list[int]], keys: list[int], budgets: list[int]
    ) -> PrefillBatch:
        """Prepare rows to be fed after what they hold.

        Args:
            rows: Which rows.
            ids: Tokens to read; in a later turn the row's pending token comes first.
            keys: 64-bit noise key of each row's answer.
            budgets: Tokens that each answer may have, at least 1.
        """
        self.restore(rows)
        self._deferred.flush(rows)
        self._restore_features(rows)
        self._deferred.before_prompt(rows)
        noise_key = self._rows.inputs.noise_key
        noise_key[noise_key.new_tensor(rows)] = noise_key.new_tensor(keys)
        self.rollback.invalidate(rows)  # until all is read
        position = [self._rows.lengths[row] for row in rows]
        return PrefillBatch(
            rows=list(rows),
            ids=list(ids),
            budgets=list(budgets),
            position=position,
            last=min(CHUNK_TOKENS, *map(len, ids)),
        )

    @torch.no_grad()
    def read_chunk(self, prompts: PrefillBatch) -> None:
        """Read the next chunk of every row; with the last one draw the first tokens."""
        last = prompts.last  # what longer prompts have more goes before
        if prompts.read < max(map(len, prompts.ids)) - last:
            self._feed(self._next_chunk(prompts))
            prompts.read += CHUNK_TOKENS
            return
        masks = self._sampling.masks
        if masks and (masked := masks.masked(prompts.rows)):  # one that fails changes nothing
            masks.ask(masked, [[]] * len(masked), [[]] * len(masked))
        ends = [ids[-last:] for ids in prompts.ids]
        chunk = PrefillChunk(prompts.rows, ends, prompts.position, [0] * len(ends))
        logits = self._feed(chunk, logits=True)
        assert logits is not None
        prompts.position = [n + last for n in prompts.position]
        if penalises(self._sampling.processors(prompts.rows)):
            ends = zip(prompts.rows, prompts.position, prompts.ids, strict=True)
            before = [self._rows.tokens[row][: end - len(ids)] + ids for row, end, ids in ends]
            self._sampling.penalties.begin(prompts.rows, before)
        first_tokens = self._draw(logits, prompts)
        logprobs_of = self._sampling.logprobs.of
        first = enumerate(zip(prompts.rows, first_tokens, strict=True))
        prompts.logprobs = [logprobs_of(row, logits, at, [token]) for at, (row, token) in first]
        prompts.first_tokens = first_tokens
        given = prompts.rows, prompts.position, prompts.ids, first_tokens, prompts.budgets
        for row, length, ids, token, budget in zip(*given, strict=True):
            self._rows.begin(row, length, ids, token, budget - 1)
            self._deferred.clear(row)
            self.rollback.validate(row)

    def _next_chunk(self, prompts: PrefillBatch) -> PrefillChunk:
        """Up to `CHUNK_TOKENS` tokens of every row that has more than `prompts.last` left."""
        here, last = slice(prompts.read, prompts.read + CHUNK_TOKENS), prompts.last
        chunk = PrefillChunk([], [], [], [])
        for i, ids in enumerate(prompts.ids):
            if part := ids[:-last][here]:
                chunk.rows.append(prompts.rows[i])
                chunk.parts.append(part)
                chunk.at.append(prompts.position[i])
                chunk.left.append(len(ids) - prompts.read - len(part))
                prompts.position[i] += len(part)
        return chunk

    def crop(self, row: int, length: int) -> None:
        """A row goes back to `length`."""
        self._cropped.add(row)
        self.rollback.crop(row, length)

    def clear(self, row: int) -> None:
        """A row is empty."""
        self.rollback.validate(row)
        self._cropped.discard(row)

    def restore(self, rows: list[int]) -> None:
        """Read the texts of rows again whose states are lost; keys, values and features are not."""
        for row in rows:
            if not self.rollback.is_lost(row):
                continue
            text = self._rows.tokens[row][: self._rows.lengths[row]]
            for begin in range(0, len(text), CHUNK_TOKENS):
                self._read_again(row, text[begin : begin + CHUNK_TOKENS], begin)
            self.rollback.validate(row)

    def _restore_features(self, rows: list[int]) -> None:
        """Have the features of the last tokens of rows that went back further than they are kept.

        A drafter sets out from those of the last token, or reads a draft's length of tokens again.
        """
        cropped = [row for row in rows if row in self._cropped]
        self._cropped.difference_update(cropped)
        if not isinstance(self._state, FeatureState) or self._drafter is None:
            return
        for row in cropped:
            length = self._rows.lengths[row]
            begin = max(0, length - self._drafter.length - 1)
            if length and not self._state.holds(row, begin, length):
                self._read_again(row, self._rows.tokens[row][begin:length], begin)

    def _read_again(self, row: int, text: list[int], begin: int) -> None:
        """Let the target read what it has read before; its features are kept."""
        _, start, subset, _, _, features = self._read([row], [text], [begin])
        if isinstance(self._state, FeatureState):
            position = start[:, None] + torch.arange(len(text), device=start.device)
            at = start.new_tensor([row]) if subset is None else subset
            self._state.remember(features[:, : len(text)], position, at)

    def _draw(self, logits: Tensor, prompts: PrefillBatch) -> list[int]:
        """The first token of each answer, from the logits [B, 1, V] of its prompt's last token."""
        processors, graphs = self._sampling.processors(prompts.rows), self.graphs
        if graphs and len(prompts.rows) <= MAX_CAPTURED_ROWS and includes(self._drawn, processors):
            found = []
            for at, given in enumerate(zip(prompts.rows, prompts.position, strict=True)):
                self._graph_inputs[:2].copy_(torch.tensor(given))
                self._logits.copy_(logits[at : at + 1])
                found.append(graphs(self._draw_one, self._drawn, compile=False).clone())
            drawn = torch.cat(found)
        else:
            rows, start = torch.tensor([prompts.rows, prompts.position], device=logits.device)
            drawn = self._draw_of(logits, rows, start, max(prompts.position), processors)
        drawn = drawn.tolist()  # the one wait for the device
        if any(not finite for _, finite in drawn):
            raise not_finite(self._target.name, self._target.dtype)
        return [token for token, _ in drawn]

    def _draw_one(self, processors: Processors) -> Tensor:
        """As `_draw_of`, of the row and the start that stand first in `_graph_inputs`."""
        row, start = self._graph_inputs[:1], self._graph_inputs[1:2]
        return self._draw_of(self._logits, row, start, self._rows.slots, processors)

    def _draw_of(
        self, logits: Tensor, rows: Tensor, start: Tensor, longest: int, processors: Processors
    ) -> Tensor:
        """Tokens of rows int64 [B] at `start` int64 [B], and whether their logits are numbers.

        Returns:
            int64 [B, 2].
        """
        noise, finite = None, logits.amax(-1).isfinite().long()
        logits = self._sampling.change(logits, start, longest, processors, rows)
        sampling = self._sampling.tensors(processors, rows)
        if sampling.temperature is not None:
            key, size = self._rows.inputs.noise_key[rows], int(self._target.config.vocab_size)
            noise = position_noise(key, start, 1, size, sampling.sampled)
        return torch.cat([pick(logits, noise, sampling), finite], dim=1)

    def _feed(self, chunk: PrefillChunk, *, logits: bool = False) -> Tensor | None:
        """Read prompt tokens; the logits [B, 1, V] of the last column, if asked for."""
        if self.graphs and len(chunk.rows) <= MAX_CAPTURED_ROWS:
            read = [self._feed_captured(*of_row) for of_row in zip(*chunk, strict=True)]
        else:
            some = max(1, MAX_BATCHED_TOKENS // max(map(len, chunk.parts)))
            groups = [slice(i, i + some) for i in range(0, len(chunk.rows), some)]
            chunks = [PrefillChunk._make(values[g] for values in chunk) for g in groups]
            read = [self._feed_together(each, logits=logits) for each in chunks]
        return torch.cat([part for part in read if part is not None]) if logits else None

    def _feed_together(self, chunk: PrefillChunk, *, logits: bool) -> Tensor | None:
        """As `_feed`, all at once."""
        rows, parts, at, left = chunk
        tokens, start, subset, counts, out, features = self._read(rows, parts, at, logits=logits)
        if self._drafter and self._state:
            padded = self._pads and self._drafter.takes_padding
            width = None if padded else max(map(len, parts))
            text = tokens[:, :width], features[:, :width], start, subset
            with sdpa_kernel(ATTENTION):
                self._drafter.extend(self._state, *text, *([counts] if padded else []))
        if recorder := self._recorder:
            near = [len(p) * (n <= CHUNK_TOKENS) for p, n in zip(parts, left, strict=True)]
            counts = start.new_tensor(near)
            recorder.rows.write(tokens, features, start, counts, subset=subset)
        return out

    def _feed_captured(self, row: int, part: list[int], at: int, left: int) -> Tensor:
        """As `_feed` of one row, replayed; the logits [1, 1, V] of its last token."""
        assert self.graphs
        width = next(n for n in CAPTURE_SIZES if n >= len(part))
        given = torch.tensor([row, at, len(part), *part])
        self._graph_inputs[: len(given)].copy_(given)
        logits, self._features = self.graphs(self._read_padded, width)
        if self._drafter and self._state and not self._drafter.takes_padding:
            given = self._graph_inputs
            subset, start, tokens = given[:1], given[1:2], given[3:][None]
            read = tokens[:, : len(part)], self._features[:, : len(part)]
            self._drafter.extend(self._state, *read, start, subset)
        if self._recorder and left <= CHUNK_TOKENS:
            self.graphs(self._record_padded, width)
        return logits.clone()

    @property
    def _recorder(self) -> MemoryTrainer | None:
        """What all requests remember, where it is to have the prompts that are read."""
        trainer = self.learner.memory_trainer if self.learner else None
        return trainer if trainer and trainer.records_prompts else None

    def _read_padded(self, width: int) -> tuple[Tensor, Tensor]:
        """Logits [1, 1, V] of a chunk's last token, and features [1, width, W]."""
        subset, start, count = (self._graph_inputs[i : i + 1] for i in range(3))
        tokens = self._graph_inputs[3 : 3 + width][None]
        with sdpa_kernel(ATTENTION):
            logits, features = self._target.forward(
                self._cache,
                tokens,
                start,
                self._rows.slots,
                subset=subset,
                logits=(count - 1).clamp(min=0),
                spans=True,
            )
            if self._drafter and self._state and self._drafter.takes_padding:
                self._drafter.extend(self._state, tokens, features, start, subset, count)
        assert logits is not None
        return logits, features

    def _record_padded(self, width: int) -> None:
        """Let the memory of all requests have a chunk, from `_graph_inputs` and `_features`."""
        assert self.learner
        assert self.learner.memory_trainer
        subset, start, count = (self._graph_inputs[i : i + 1] for i in range(3))
        tokens = self._graph_inputs[3 : 3 + width][None]
        self.learner.memory_trainer.rows.write(tokens, self._features, start, count, subset=subset)

    def _read(
        self, rows: list[int], parts: list[list[int]], at: list[int], *, logits: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
        """Let the target read: tokens, start, rows (None is all), counts, logits, features."""
        device = self._target.device
        longest = max(map(len, parts))
        width = longest
        if self._pads and longest > 1:
            width = reach_of(longest, CHUNK_TOKENS, PAD_MULTIPLE)
        tokens = torch.tensor([p + [0] * (width - len(p)) for p in parts], device=device)
        start = torch.tensor(at, device=device)
        counts = torch.tensor([len(p) for p in parts], device=device)
        # Some rows' keys are copied before they are read; those of all rows are not.
        subset = None if rows == [*range(self._rows.count)] else torch.tensor(rows, device=device)
        with sdpa_kernel(ATTENTION):
            out, features = self._target.forward(
                self._cache,
                tokens,
                start,
                max(at),
                subset=subset,
                counts=counts,
                # Not 1, which means a slice: see findings/torch_linear_of_a_slice.sh.
                logits=start.new_tensor([longest - 1]) if logits else 0,
            )
        return tokens, start, subset, counts, out, features
