"""Reading short prompts with captured graphs, one row after another; beside rounds, too.

Called kernel by kernel, a prompt of a small target takes as long as many rounds do. Captured, it
still takes longer than a round, and the rows that decode need not wait for it: its graphs have
memory and a stream of their own, and a row that takes no part in rounds is not written by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ttspec.decoding.row_sampling import RowSampling, includes
from ttspec.decoding.rows import Processors, RowStates
from ttspec.models.capture import Graphs, Streams
from ttspec.sampling import pick, position_noise

if TYPE_CHECKING:
    from ttspec.decoding.stages import RoundStages
    from ttspec.learning.learner import Learner

CHUNK_TOKENS = 512
"""Prompt tokens of a row read at once; those with more to come than that teach nothing."""
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""For prompts, whose shapes are always new: not cuDNN's, which makes a plan for each shape."""
CAPTURE_SIZES = (64, 128, 256, CHUNK_TOKENS)
"""Tokens to which a row's chunk is padded."""
MAX_CAPTURED_ROWS = 8
"""Rows that are read one after the other; more at a time are faster together."""


class CapturedPrompts:
    """Graphs that read a chunk of one row, and draw its answer's first token."""

    def __init__(
        self, stages: RoundStages, learner: Learner | None, graphs: Graphs, *, beside: bool
    ) -> None:
        """Capture what any chunk needs; the cache is made.

        Args:
            stages: Whose rows are read, by target and drafter.
            learner: May be told of prompts.
            graphs: Of nothing else, if they are to run beside rounds.
            beside: Whether `launch` may be called.
        """
        self._target, self._cache, self._learner = stages.target, stages.cache, learner
        self._drafter, self._state, self._graphs = stages.drafter, stages.state, graphs
        self._rows, self._sampling = rows, sampling = stages.rows, stages.row_sampling
        device, size = self._target.device, 3 + CHUNK_TOKENS
        self._inputs = torch.zeros(size, dtype=torch.long, device=device)
        """What graphs read: a row, where its chunk begins, its tokens' number, and these."""
        self._inputs[1:2] = rows.slots  # nothing is kept
        self._logits: Tensor
        """[1, 1, V], from which a first token is drawn."""
        # What is read beside rounds; off a GPU it is read at once.
        self._may_launch, self._launched = beside, list[int]()
        """Whether `launch` may be called, and the rows that it was given."""
        on_gpu = device.type == "cuda"
        self._stream = Streams.lend(device, self) if beside and on_gpu else None
        self._over = torch.cuda.Event() if self._stream else None
        self._given = torch.zeros(MAX_CAPTURED_ROWS, size, dtype=torch.long, pin_memory=on_gpu)
        """As `_inputs`, of each of them."""
        self._found = torch.zeros(MAX_CAPTURED_ROWS, 2, dtype=torch.long, pin_memory=on_gpu)
        self._features_of: list[tuple[Tensor, Tensor]] = []
        """Where graphs left features, and a copy for the learner."""

        compile = rows.count > 1  # a lone row's prompt holds up nobody
        for width in CAPTURE_SIZES:
            logits, self._features = graphs(self.read_padded, width, compile=compile)
            self._logits = logits.clone()
            if learner and learner.memory_trainer:
                graphs(self.record_padded, width, compile=compile)
        self._drawn = sampling.captured(sampling.processors(range(rows.count)))
        graphs(self.draw_one, self._drawn, compile=False)

    def takes(self, processors: Processors) -> bool:
        """Whether first tokens can be drawn by the graph that there is."""
        return includes(self._drawn, processors)

    def read(self, row: int, tokens: Sequence[int], at: int, *, record: bool) -> Tensor:
        """Read a row's chunk from position `at` on; the logits [1, 1, V] of its last token.

        Args:
            row: Which row.
            tokens: At most `CHUNK_TOKENS`.
            at: See above.
            record: Whether the memory of all requests is to have them.
        """
        logits, _ = self._replay(torch.tensor([row, at, len(tokens), *tokens]))
        if record:
            self._graphs(self.record_padded, _width(len(tokens)))
        return logits.clone()

    def draw(self, row: int, position: int, logits: Tensor) -> Tensor:
        """A row's token, from logits [1, 1, V], and whether these are numbers: int64 [1, 2]."""
        self._inputs[:3].copy_(torch.tensor([row, position, 0]))
        self._logits.copy_(logits)
        return self._graphs(self.draw_one, self._drawn, compile=False).clone()

    @property
    def can_launch(self) -> bool:
        """Whether rows may be read beside rounds, and none are."""
        distinct = self._stream is None or Streams.are_distinct(self._stream.device)
        return self._may_launch and distinct and not self._launched

    @property
    def is_launched(self) -> bool:
        """Whether rows were launched and are not finished."""
        return bool(self._launched)

    @property
    def is_busy(self) -> bool:
        """Whether the device reads beside rounds at this moment."""
        return self.is_launched and self._over is not None and not self._over.query()

    def launch(
        self,
        rows: Sequence[int],
        parts: Sequence[Sequence[int]],
        at: Sequence[int],
        *,
        record: bool,
    ) -> None:
        """Begin to read whole prompts and to draw first tokens, beside what is launched later.

        Args:
            rows: At most `MAX_CAPTURED_ROWS`; none takes part in a round before `finish`.
            parts: Their tokens, at most `CHUNK_TOKENS` each.
            at: Where they begin.
            record: Whether `finish` is to tell the memory of all requests.
        """
        self._launched = list(rows)
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for index, (row, tokens, begin) in enumerate(zip(rows, parts, at, strict=True)):
                given = self._given[index, : 3 + len(tokens)]
                given.copy_(torch.tensor([row, begin, len(tokens), *tokens]))
                logits, features = self._replay(given)
                self._logits.copy_(logits)
                drawn = self._graphs(self.draw_one, self._drawn, compile=False)
                self._found[index].copy_(drawn[0], non_blocking=True)
                if record:
                    self._features_of.append((features, features.clone()))
            if self._over:
                self._over.record()

    def finish(self, rows: Sequence[int]) -> list[list[int]]:
        """Wait for what was launched.

        Args:
            rows: Those of them that are still wanted.

        Returns:
            Of each, its token and whether its logits are numbers.
        """
        self.wait()
        indices = [self._launched.index(row) for row in rows]
        for index in indices if self._features_of else ():
            (features, kept), count = self._features_of[index], int(self._given[index, 2])
            features.copy_(kept)
            self._inputs[: 3 + count].copy_(self._given[index, : 3 + count])
            self._features = features
            self._graphs(self.record_padded, _width(count))
        self.drop()
        return [self._found[index].tolist() for index in indices]

    def wait(self) -> None:
        """Wait for what was launched."""
        if self._stream and self.is_launched:
            self._stream.synchronize()

    def drop(self) -> None:
        """Nobody wants what was launched any more."""
        self.wait()
        self._launched, self._features_of = [], []

    def __del__(self) -> None:
        """Wait: what is written beside rounds must outlive it."""
        self.drop()

    def _replay(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [1, 1, V] and features [1, width, W], as `read_padded` leaves them.

        Args:
            given: int64 [3 + tokens], as `_inputs`; from pinned memory nothing waits for it.
        """
        self._inputs[: len(given)].copy_(given, non_blocking=given.is_pinned())
        count = len(given) - 3
        logits, self._features = self._graphs(self.read_padded, _width(count))
        if self._drafter and self._state and not self._drafter.takes_padding:
            subset, start, tokens = self._inputs[:1], self._inputs[1:2], self._inputs[3:][None]
            read = tokens[:, :count], self._features[:, :count]
            self._drafter.extend(self._state, *read, start, subset)
        return logits, self._features

    # What is captured, by its name.

    def read_padded(self, width: int) -> tuple[Tensor, Tensor]:
        """Logits [1, 1, V] of a chunk's last token, and features [1, width, W]."""
        subset, start, count = (self._inputs[i : i + 1] for i in range(3))
        tokens = self._inputs[3 : 3 + width][None]
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

    def record_padded(self, width: int) -> None:
        """Let the memory of all requests have a chunk."""
        assert self._learner
        assert self._learner.memory_trainer
        subset, start, count = (self._inputs[i : i + 1] for i in range(3))
        tokens = self._inputs[3 : 3 + width][None]
        self._learner.memory_trainer.rows.write(tokens, self._features, start, count, subset=subset)

    def draw_one(self, processors: Processors) -> Tensor:
        """As `draw`, of the row that stands first, behind its chunk."""
        row, start = self._inputs[:1], self._inputs[1:2] + self._inputs[2:3]
        given = self._rows, self._sampling, self._logits, row, start
        return draw_first(*given, self._rows.slots, processors)


def draw_first(
    states: RowStates,
    options: RowSampling,
    logits: Tensor,
    rows: Tensor,
    start: Tensor,
    longest: int,
    processors: Processors,
) -> Tensor:
    """Draw the first tokens of answers.

    Args:
        states: Of all rows.
        options: Of all rows.
        logits: [B, 1, V], of the prompts' last tokens.
        rows: int64 [B], whose they are.
        start: int64 [B], where the answers begin.
        longest: An upper bound of `start`.
        processors: What is done to logits.

    Returns:
        int64 [B, 2]: tokens, and whether the logits are numbers.
    """
    noise, finite = None, logits.amax(-1).isfinite().long()
    logits = options.change(logits, start, longest, processors, rows)
    sampling = options.tensors(processors, rows)
    if sampling.temperature is not None:
        key, size = states.inputs.noise_key[rows], logits.shape[-1]
        noise = position_noise(key, start, 1, size, sampling.sampled)
    return torch.cat([pick(logits, noise, sampling), finite], dim=1)


def _width(tokens: int) -> int:
    """Tokens to which a chunk of so many is padded."""
    return next(n for n in CAPTURE_SIZES if n >= tokens)
