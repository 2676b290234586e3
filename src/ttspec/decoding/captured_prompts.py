"""Reading short prompts with captured graphs, a few rows at a time; beside rounds, too.

Called kernel by kernel, a prompt of a small target takes as long as many rounds do. Captured, it
still takes longer than a round, and the rows that decode need not wait for it: its graphs have
memory and a stream of their own, and a row that takes no part in rounds is not written by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

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
PROMPT_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""For prompts, whose shapes are always new: not cuDNN's, which makes a plan for each shape."""
CAPTURE_SIZES = (64, 128, 256, CHUNK_TOKENS)
"""Tokens to which a row's chunk is padded."""
GROUP = 4
"""Rows whose short chunks one graph reads together: weights are read once for all of them."""
MAX_CAPTURED_ROWS = 8
"""Rows whose prompts are read at a time: those that wait longer do so while the first decode."""


class ReadShape(NamedTuple):
    """What a graph reads: one row's chunk, or those of `GROUP` rows, padded to `width` tokens."""

    rows: int
    width: int


READ_SHAPES = (
    *(ReadShape(1, width) for width in CAPTURE_SIZES),
    *(ReadShape(GROUP, width) for width in CAPTURE_SIZES if GROUP * width <= CHUNK_TOKENS),
)
"""Of which graphs are made."""


class LaunchedRead(NamedTuple):
    """A graph's reading that was launched."""

    shape: ReadShape
    here: slice
    """Where its rows stand in what was given and found."""
    features: Tensor | None
    """A copy for the learner; the graph's own are overwritten by the next reading."""


class CapturedPrompts:
    """Graphs that read a chunk of a row, or of some, and draw their answers' first tokens."""

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
        self._inputs = torch.zeros(GROUP, size, dtype=torch.long, device=device)
        """What graphs read of each row: which it is, where its chunk begins, its tokens' number,
        and these."""
        self._inputs[:, 1] = rows.slots  # nothing is kept
        self._logits: Tensor
        """[GROUP, 1, V], from which first tokens are drawn."""
        self._features: dict[ReadShape, Tensor] = {}
        """[rows, width, W], as each graph leaves them."""
        # What is read beside rounds; off a GPU it is read at once.
        self._may_launch, self._launched = beside, list[LaunchedRead]()
        """Whether `launch` may be called, and what was."""
        self._rows_launched: list[int] = []
        """In the order in which they were given."""
        on_gpu = device.type == "cuda"
        self._stream = Streams.lend(device, self) if beside and on_gpu else None
        self._over = torch.cuda.Event() if self._stream else None
        self._given = torch.zeros(MAX_CAPTURED_ROWS, size, dtype=torch.long, pin_memory=on_gpu)
        """As `_inputs`, of each of them."""
        self._found = torch.zeros(MAX_CAPTURED_ROWS, 2, dtype=torch.long, pin_memory=on_gpu)

        compile = rows.count > 1  # a lone row's prompt holds up nobody
        shapes = [s for s in READ_SHAPES if s.rows == 1 or (beside and s.rows <= rows.count)]
        for shape in shapes:
            logits, self._features[shape] = graphs(self.read_padded, shape, compile=compile)
            if shape.rows == 1:
                self._logits = logits.expand(GROUP, -1, -1).clone()
            if learner and learner.memory_trainer:
                graphs(self.record_padded, shape, compile=compile)
        self._drawn = sampling.captured(sampling.processors(range(rows.count)))
        for some in sorted({shape.rows for shape in shapes}):
            graphs(self.draw_some, some, self._drawn, compile=False)

    def takes(self, processors: Processors) -> bool:
        """Whether first tokens can be drawn by the graph that there is."""
        return self._sampling.is_current(self._drawn) and includes(self._drawn, processors)

    def read(self, row: int, tokens: Sequence[int], at: int, *, record: bool) -> Tensor:
        """Read a row's chunk from position `at` on; the logits [1, 1, V] of its last token.

        Args:
            row: Which row.
            tokens: At most `CHUNK_TOKENS`.
            at: See above.
            record: Whether the memory of all requests is to have them.
        """
        shape = ReadShape(1, _width(len(tokens)))
        given = torch.tensor([[row, at, len(tokens), *tokens]])
        logits = self._replay(shape, given)
        if record:
            self._graphs(self.record_padded, shape)
        return logits.clone()

    def draw(self, row: int, position: int, logits: Tensor) -> Tensor:
        """A row's token, from logits [1, 1, V], and whether these are numbers: int64 [1, 2]."""
        self._inputs[0, :3].copy_(torch.tensor([row, position, 0]))
        return self._draw(logits).clone()

    @property
    def can_launch(self) -> bool:
        """Whether rows may be read beside rounds, some after others."""
        distinct = self._stream is None or Streams.are_distinct(self._stream.device)
        return self._may_launch and distinct

    @property
    def is_launched(self) -> bool:
        """Whether rows were launched and are not finished."""
        return bool(self._rows_launched)

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
        groups = list(self._groups([len(tokens) for tokens in parts]))
        order = [index for _, indices in groups for index in indices]
        self._rows_launched, first = [rows[index] for index in order], 0
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for place, index in enumerate(order):
                given = torch.tensor([rows[index], at[index], len(parts[index]), *parts[index]])
                self._given[place, : len(given)] = given
            for shape, _ in groups:
                here = slice(first, first + shape.rows)
                drawn = self._draw(self._replay(shape, self._given[here]))
                self._found[here].copy_(drawn, non_blocking=True)
                kept = self._features[shape].clone() if record else None
                self._launched.append(LaunchedRead(shape, here, kept))
                first = here.stop
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
        for shape, here, features in self._launched:
            if features is None:
                continue
            given, wanted = self._given[here], [row in rows for row in self._rows_launched[here]]
            given[:, 2] *= torch.tensor(wanted)  # no tokens of the others
            self._inputs[: shape.rows].copy_(given)
            self._features[shape].copy_(features)
            self._graphs(self.record_padded, shape)
        found = dict(zip(self._rows_launched, self._found.tolist(), strict=False))
        self.drop()
        return [found[row] for row in rows]

    def wait(self) -> None:
        """Wait for what was launched."""
        if self._stream and self.is_launched:
            self._stream.synchronize()

    def drop(self) -> None:
        """Nobody wants what was launched any more."""
        self.wait()
        self._launched, self._rows_launched = [], []

    def __del__(self) -> None:
        """Wait: what is written beside rounds must outlive it."""
        self.drop()

    def _replay(self, shape: ReadShape, given: Tensor) -> Tensor:
        """Logits [rows, 1, V], as `read_padded` leaves them.

        Args:
            shape: What is read.
            given: int64 [rows, 3 + tokens], as `_inputs`; from pinned memory nothing waits for it.
        """
        inputs = self._inputs[: shape.rows, : given.shape[1]]
        inputs.copy_(given, non_blocking=given.is_pinned())
        logits, features = self._graphs(self.read_padded, shape)
        self._features[shape] = features
        if self._drafter and self._state and not self._drafter.takes_padding:
            count = given.shape[1] - 3
            subset, start, tokens = inputs[:, 0], inputs[:, 1], inputs[:, 3:]
            self._drafter.extend(self._state, tokens, features[:, :count], start, subset)
        return logits

    def _draw(self, logits: Tensor) -> Tensor:
        """First tokens from logits [rows, 1, V], and whether they are numbers: int64 [rows, 2].

        Of the rows that stand first in `_inputs`, behind their chunks; the next call overwrites it.
        """
        self._logits[: len(logits)].copy_(logits)
        return self._graphs(self.draw_some, len(logits), self._drawn, compile=False)

    # What is captured, by its name.

    def read_padded(self, shape: ReadShape) -> tuple[Tensor, Tensor]:
        """Logits [rows, 1, V] of chunks' last tokens, and features [rows, width, W]."""
        subset, start, count, tokens = self._chunks(shape)
        with sdpa_kernel(PROMPT_ATTENTION):
            logits, features = self._target.forward(
                self._cache,
                tokens,
                start,
                self._rows.slots,
                subset=subset,
                logits=(count - 1).clamp(min=0),  # of all rows in each of these columns
                spans=True,
            )
            if self._drafter and self._state and self._drafter.takes_padding:
                self._drafter.extend(self._state, tokens, features, start, subset, count)
        assert logits is not None
        own = torch.arange(shape.rows, device=logits.device)
        return logits[own, own][:, None], features

    def record_padded(self, shape: ReadShape) -> None:
        """Let the memory of all requests have chunks."""
        assert self._learner
        assert self._learner.memory_trainer
        subset, start, count, tokens = self._chunks(shape)
        features = self._features[shape]
        self._learner.memory_trainer.rows.write(tokens, features, start, count, subset=subset)

    def draw_some(self, rows: int, processors: Processors) -> Tensor:
        """As `_draw`."""
        subset, start, count, _ = self._chunks(ReadShape(rows, 0))
        logits, longest = self._logits[:rows], self._rows.slots
        return draw_first(
            self._rows, self._sampling, logits, subset, start + count, longest, processors
        )

    def _chunks(self, shape: ReadShape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, where their chunks begin, how many tokens these have, int64 [rows], and them."""
        inputs = self._inputs[: shape.rows, : 3 + shape.width]
        # As kernels read them; a copy of one row too, or code would be compiled for its stride.
        ordered = inputs[:, :3].T.clone(memory_format=torch.contiguous_format)
        subset, start, count = ordered.unbind()
        return subset, start, count, inputs[:, 3:]

    def _groups(self, counts: Sequence[int]) -> Iterator[tuple[ReadShape, list[int]]]:
        """Which of some chunks, of so many tokens, are read together."""
        for width in CAPTURE_SIZES:
            alike = [index for index, count in enumerate(counts) if _width(count) == width]
            while alike:
                group = ReadShape(GROUP, width)
                fits = group in self._features and len(alike) >= GROUP
                shape = group if fits else ReadShape(1, width)
                yield shape, alike[: shape.rows]
                del alike[: shape.rows]


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
