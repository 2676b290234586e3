"""The time that rounds take, by stage; and how fast this device copies and multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import torch
from roofline_target import experts_read
from roofline_work import Work

from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.engine import Engine
from ttspec.errors import ResourceError
from ttspec.models.capture import Graphs
from ttspec.records import Verification

WARM_UP = 3
"""Rounds that are not counted: allocations, and on a GPU the capture of a graph."""
UPDATES = 5
"""Updates to measure at least."""
CALLED = 8
"""Rounds of a mixture that run as calls, to see which experts they read."""
RUNS = 5
"""Of which the median counts, where a rate is measured."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of one round."""

    wall: float
    draft: float
    verify: float
    learn: float
    updated: bool

    @property
    def outside(self) -> float:
        """Wall-clock time that is in no stage."""
        return self.wall - self.draft - self.verify - self.learn


@dataclass(frozen=True, slots=True)
class Rounds:
    """Rounds that were timed, and what they were timed on."""

    timed: list[Timed]
    filled: float
    """Slots that a row had filled, on average."""
    kept: float
    """Tokens that a round wrote in a row."""
    decoder: Decoder


@dataclass(frozen=True, slots=True)
class Plan:
    """How many rounds to run."""

    warm_up: int
    count: int
    tokens: int
    """That they may write, in a row."""
    stride: int
    """Rounds for an update."""

    @classmethod
    def of(cls, rounds: int, length: int, learn: LearnConfig | None) -> Plan:
        """At least `rounds`, and whole strides that hold some updates.

        Hindsight has nothing to teach until a block's tokens are committed, `length` rounds later.
        """
        warm_up, count, stride = WARM_UP, rounds, 1
        if learn:
            stride = learn.stride or 1
            warm_up = -(-(WARM_UP + length + 1) // stride) * stride
            count = max(-(-rounds // stride), UPDATES) * stride
        rounds = warm_up + count + 2 + CALLED
        return cls(warm_up, count, rounds * (length + 1) + 1, stride)


def timed(
    engine: Engine,
    draft: DraftConfig,
    learn: LearnConfig | None,
    plan: Plan,
    *,
    rows: int,
    context: int,
    temperature: float = 0.0,
) -> Rounds:
    """Run the plan behind a full context."""
    config = GenerateConfig(
        max_new_tokens=plan.tokens,
        temperature=temperature,
        ignore_eos=True,
        # The text is random: copies would hide the stages, and a policy would draft less.
        draft=replace(draft, copy=False, adaptive=False),
        learn=learn,
    )
    try:
        decoder = engine.decoder(config, rows, context, sessions=False)
        fill(decoder, context, plan.tokens)
        time_rounds(decoder, plan.warm_up)
        before = fmean(decoder.rows.lengths)
        found = time_rounds(decoder, plan.count)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"{rows} rows of {context} tokens do not fit into memory.\n"
            "Use fewer --rows, a smaller --context, or --no-learn."
        ) from error
    after = fmean(decoder.rows.lengths)
    kept = (after - before) / (len(found) + late(decoder))
    return Rounds(found, (before + after) / 2, kept, decoder)


def experts_a_layer(decoder: Decoder) -> float | None:
    """Distinct experts that a forward of these rounds reads in a layer; None of a dense target.

    Their mean over layers and some more rounds, which run as calls: graphs tell nothing.
    """
    graphs, captures = decoder.graphs, decoder.graphs.on
    with experts_read(decoder.target) as seen:
        graphs.on = False
        for _ in range(CALLED):
            decoder.round()
        graphs.on = captures
    return fmean(count for _, count in seen) if seen else None


@torch.no_grad()
def models_alone(decoder: Decoder) -> float:
    """Seconds that a round's models take, run as a round does, with next to nothing between them.

    What they write lies past every row's length, where it is dead.
    """
    drafter, state, target = decoder.drafter, decoder.state, decoder.target
    assert drafter is not None
    assert state is not None
    device, slots = target.device, decoder.rows.slots
    pending = torch.zeros(decoder.rows.count, dtype=torch.long, device=device)
    start = torch.tensor(decoder.rows.lengths, device=device)

    def choose(logits: torch.Tensor, first: int) -> tuple[torch.Tensor, None]:  # noqa: ARG001
        return logits[..., :8].argmax(-1), None

    def models(longest: int) -> torch.Tensor:
        proposal = drafter.propose(state, pending, start, pending, decoder.gamma, longest, choose)
        fed = torch.cat([pending[:, None], proposal.tokens], dim=1)
        spans = decoder.target_reads_spans
        logits, features = target.forward(decoder.cache, fed, start, longest, spans=spans)
        assert logits is not None
        nothing = torch.zeros_like(pending)
        drafter.absorb(
            state,
            Verification(
                proposal=proposal,
                fed=fed,
                start=start,
                logits=logits,
                features=features,
                tokens=fed,
                accepted=nothing,
                emitted=nothing + 1,
                ended=nothing.bool(),
            ),
        )
        return logits

    run = Graphs(torch.device("cpu") if target.is_split else device, compile=decoder.compile)
    longest = slots if decoder.target_reads_spans and state.spans else max(decoder.rows.lengths)
    run(models, longest)
    return seconds_of(device, lambda: run(models, longest))


def fill(decoder: Decoder, context: int, budget: int) -> None:
    """Read random tokens into every row: what they say does not change what a stage moves."""
    random = torch.Generator().manual_seed(0)
    size, count = int(decoder.target.config.vocab_size), decoder.rows.count
    prompts = torch.randint(size, (count, context), generator=random).tolist()
    rows = list(range(count))
    reading = decoder.prompts.begin(rows, prompts, rows, [budget] * count)
    while not reading.is_read:
        decoder.prompts.read_chunk(reading)


def time_rounds(decoder: Decoder, count: int) -> list[Timed]:
    """Run rounds; on a GPU one more, since each returns the stage times of the one before."""
    delay = late(decoder)
    walls, outcomes = [], []
    for _ in range(count + delay):
        begin = time.perf_counter()
        rows = decoder.round()
        walls.append(time.perf_counter() - begin)
        outcomes.append(list(rows.values()))
    return [
        Timed(wall, *timed[0].seconds, updated=any(o.updated for o in own))
        for wall, own, timed in zip(walls, outcomes, outcomes[delay:], strict=False)
    ]


def late(decoder: Decoder) -> int:
    """By how many rounds stage times are behind."""
    return int(decoder.target.device.type == "cuda")


# The rates of this device, measured on the spot.

BUDGET = 0.8
"""Seconds for measuring one of the two rates; a step that was begun is finished."""
COPIED = {"cuda": (1 << 28, 1 << 30), "cpu": (1 << 26, 1 << 28)}
"""Bytes of the tensors copied: more than caches hold."""
MULTIPLIED = {"cuda": (4096, 8192), "cpu": (512, 1024, 2048)}
"""Sides of the square matrices multiplied."""


@dataclass(frozen=True, slots=True)
class Rates:
    """The best this device was measured at."""

    copy: float
    """Bytes a second, read and written, of a large copy."""
    matrix: float
    """Operations a second of a large matrix product in the run's dtype."""

    def limit(self, work: Work) -> float:
        """Seconds that the work takes at these rates, moving and computing at once."""
        return max(work.moved / self.copy, work.operations / self.matrix)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of a few large copies and matrix products, each a median."""
    copy, matrix = 0.0, 0.0
    for size in within(BUDGET, COPIED[device.type]):
        source = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
        to = torch.empty_like(source)
        copy = max(copy, 2 * size / seconds_of(device, lambda: to.copy_(source)))
    for side in within(BUDGET, MULTIPLIED[device.type]):
        # Random: a GPU multiplies ones with less power, so at a higher clock.
        a = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(a)
        took = seconds_of(device, lambda: torch.mm(a, a, out=out))
        matrix = max(matrix, 2 * side**3 / took)
    return Rates(copy, matrix)


def within(budget: float, sizes: tuple[int, ...]) -> Iterator[int]:
    """Sizes in turn, until the time is used up."""
    begin = time.perf_counter()
    for size in sizes:
        yield size
        if time.perf_counter() - begin > budget / 4:  # the next size takes several times as long
            return


def seconds_of(device: torch.device, run: Callable[[], Any]) -> float:
    """Median of some runs, after one that is not counted; device time on a GPU."""
    run()
    took = []
    for _ in range(RUNS):
        if device.type == "cuda":
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            run()
            marks[1].record()
            marks[1].synchronize()
            took.append(marks[0].elapsed_time(marks[1]) / 1000)
        else:
            begin = time.perf_counter()
            run()
            took.append(time.perf_counter() - begin)
    return median(took)
