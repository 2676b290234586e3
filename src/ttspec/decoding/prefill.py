"""Reading prompts in chunks, and reading again what a recurrent target's states have lost.

Between two chunks other rows may have rounds: a row takes no part until its prompt is whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from ttspec.decoding.captured_prompts import (
    CHUNK_TOKENS,
    MAX_CAPTURED_ROWS,
    PROMPT_ATTENTION,
    CapturedPrompts,
    draw_first,
)
from ttspec.decoding.penalties import penalises
from ttspec.decoding.rows import RollbackLimits
from ttspec.drafters.context import FeatureState
from ttspec.models.weight_checks import not_finite
from ttspec.records import TokenLogprobs
from ttspec.rowcache import reach_of

if TYPE_CHECKING:
    from ttspec.decoding.stages import RoundStages
    from ttspec.learning.learner import Learner
    from ttspec.learning.memory_trainer import MemoryTrainer
    from ttspec.models.capture import Graphs

MAX_BATCHED_TOKENS = 32 * CHUNK_TOKENS
"""The same of all rows: more together are no faster, and every layer's states take memory."""
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
    is_launched: bool = False
    """Whether all of it is being read beside rounds."""
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

    Owns how far back recurrent states can go, and what reads with graphs. Prompts under way are the
    scheduler's `PrefillBatch`; lengths and tokens are `RowStates`'.
    """

    captured: CapturedPrompts | None = None
    """Reads few rows one after another, once `capture` was called."""

    def __init__(self, stages: RoundStages, learner: Learner | None) -> None:
        """Feed a decoder's rows; `learner` is told what they read."""
        # Not the stages themselves: they have this, and memory is freed once nobody has them.
        target, self._cache, self._deferred = stages.target, stages.cache, stages.deferred
        self._target, self._drafter, self._state = target, stages.drafter, stages.state
        self._sampling, self._rows, self._learner = stages.row_sampling, stages.rows, learner
        self._pads = target.device.type == "cpu" and target.dtype.itemsize == 2
        self.rollback = RollbackLimits(self._rows, recurrent=target.recurrent)
        self._cropped: set[int] = set()
        """Rows that went back: features may be gone that their drafter sets out from."""

    def capture(self, stages: RoundStages, graphs: Graphs, *, beside: bool) -> None:
        """Capture the reading of one row's chunk; arguments as in `CapturedPrompts`."""
        self.captured = CapturedPrompts(stages, self._learner, graphs, beside=beside)

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
        for row, key in zip(rows, keys, strict=True):
            self._rows.inputs.noise_key[row].fill_(key)  # to assign it would wait for the device
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
    def launch(self, prompts: PrefillBatch) -> bool:
        """Begin to read prompts beside rounds, and to draw first tokens; whether that can be.

        Not prompts of several chunks, nor rows whose first tokens the host must know more of; and
        not where such were among them, and have left since their first chunk was read.
        """
        rows, sampling, captured = prompts.rows, self._sampling, self.captured
        begun = prompts.position != [self._rows.lengths[row] for row in rows]
        if begun or self.is_launched:
            return False
        takes = not (self._drafter and self._state) or self._drafter.takes_padding
        if not (captured and captured.can_launch and takes and len(rows) <= MAX_CAPTURED_ROWS):
            return False
        processors = sampling.processors(rows)
        if max(map(len, prompts.ids)) > CHUNK_TOKENS or sampling.logprobs.asked(rows):
            return False
        if "mask" in processors.names or penalises(processors) or not captured.takes(processors):
            return False
        captured.launch(rows, prompts.ids, prompts.position, record=self._recorder is not None)
        prompts.is_launched = True
        return True

    @property
    def most_rows(self) -> int:
        """Rows whose prompts are read at a time: together, where nothing is captured."""
        return MAX_CAPTURED_ROWS if self.captured else self._rows.count

    @property
    def is_launched(self) -> bool:
        """Whether prompts were launched and are not finished."""
        return self.captured is not None and self.captured.is_launched

    @property
    def is_busy(self) -> bool:
        """Whether prompts are being read beside rounds at this moment."""
        return self.captured is not None and self.captured.is_busy

    def wait(self) -> None:
        """Wait for what is read beside rounds: it writes what rows hold."""
        if self.captured:
            self.captured.wait()

    def drop(self) -> None:
        """Nobody wants what was launched any more."""
        if self.captured:
            self.captured.drop()

    @torch.no_grad()
    def finish(self, prompts: PrefillBatch) -> None:
        """Wait for what was launched; the rows may decode."""
        assert self.captured
        prompts.is_launched = False  # after an error or an interrupt they are read again
        drawn = self.captured.finish(prompts.rows)
        pairs = zip(prompts.position, prompts.ids, strict=True)
        self._begin_rows(prompts, [at + len(ids) for at, ids in pairs], drawn)

    @torch.no_grad()
    def read_chunk(self, prompts: PrefillBatch) -> None:
        """Read the next chunk of every row; with the last one draw the first tokens."""
        self.drop()
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
        self._begin_rows(prompts, prompts.position, self._draw(logits, prompts), logits)

    def _begin_rows(
        self,
        prompts: PrefillBatch,
        lengths: list[int],
        drawn: list[list[int]],
        logits: Tensor | None = None,
    ) -> None:
        """Let rows decode whose prompts were read.

        Args:
            prompts: Theirs.
            lengths: Tokens that each row holds.
            drawn: Of each, its first token, and whether its logits are numbers.
            logits: [B, 1, V]; needed where log-probabilities are asked for.
        """
        if any(not finite for _, finite in drawn):
            raise not_finite(self._target.name, self._target.dtype)
        first_tokens = self._first_tokens(prompts, [token for token, _ in drawn])
        prompts.logprobs = [()] * len(first_tokens)
        if logits is not None:
            logprobs_of = self._sampling.logprobs.of
            first = enumerate(zip(prompts.rows, first_tokens, strict=True))
            prompts.logprobs = [logprobs_of(row, logits, at, [token]) for at, (row, token) in first]
        prompts.first_tokens = first_tokens
        given = prompts.rows, lengths, prompts.ids, first_tokens, prompts.budgets
        for row, length, ids, token, budget in zip(*given, strict=True):
            self._rows.begin(row, length, ids, token, budget - 1)
            self._deferred.clear(row)
            self.rollback.validate(row)

    def _first_tokens(self, prompts: PrefillBatch, drawn: list[int]) -> list[int]:  # noqa: ARG002
        """What the answers begin with."""
        return drawn

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

    def _draw(self, logits: Tensor, prompts: PrefillBatch) -> list[list[int]]:
        """As `draw_first`, from the logits [B, 1, V] of the prompts' last tokens; waits for it."""
        processors, captured = self._sampling.processors(prompts.rows), self.captured
        given = prompts.rows, prompts.position
        if captured and len(prompts.rows) <= MAX_CAPTURED_ROWS and captured.takes(processors):
            each = zip(*given, logits.split(1), strict=True)
            drawn = torch.cat([captured.draw(*of_row) for of_row in each])
        else:
            rows, start = torch.tensor(given, device=logits.device)
            longest = max(prompts.position)
            drawn = draw_first(self._rows, self._sampling, logits, rows, start, longest, processors)
        return drawn.tolist()

    def _feed(self, chunk: PrefillChunk, *, logits: bool = False) -> Tensor | None:
        """Read prompt tokens; the logits [B, 1, V] of the last column, if asked for."""
        if self.captured and len(chunk.rows) <= MAX_CAPTURED_ROWS:
            records = self._recorder is not None
            read = [
                self.captured.read(row, part, at, record=records and left <= CHUNK_TOKENS)
                for row, part, at, left in zip(*chunk, strict=True)
            ]
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
            text, states = tokens[:, :width], features[:, :width]
            with sdpa_kernel(PROMPT_ATTENTION):
                self._drafter.extend(
                    self._state, text, states, start, subset, counts if padded else None
                )
        if recorder := self._recorder:
            near = [len(p) * (n <= CHUNK_TOKENS) for p, n in zip(parts, left, strict=True)]
            counts = start.new_tensor(near)
            recorder.rows.write(tokens, features, start, counts, subset=subset)
        return out

    @property
    def _recorder(self) -> MemoryTrainer | None:
        """What all requests remember, where it is to have the prompts that are read."""
        trainer = self._learner.memory_trainer if self._learner else None
        return trainer if trainer and trainer.records_prompts else None

    def _read(
        self, rows: list[int], parts: list[list[int]], at: list[int], *, logits: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
        """Let the target read parts of rows, each from its place `at` on, padded to one width T.

        Returns:
            Tokens int64 [B, T]; start, rows (None is all) and counts int64 [B]; the logits
            [B, 1, V] of the last column, if asked for; features [B, T, W].
        """
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
        with sdpa_kernel(PROMPT_ATTENTION):
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
