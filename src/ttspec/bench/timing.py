"""The time that rounds take, by stage."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from ttspec.bench.rates import seconds_of
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
        return cls(warm_up, count, (warm_up + count + 2) * (length + 1) + 1, stride)


def timed(
    engine: Engine,
    draft: DraftConfig,
    learn: LearnConfig | None,
    plan: Plan,
    *,
    rows: int,
    context: int,
    temperature: float = 0.0,
) -> tuple[list[Timed], float, Decoder]:
    """Run the plan behind a full context; its rounds and the mean number of filled slots."""
    config = GenerateConfig(
        max_new_tokens=plan.tokens,
        temperature=temperature,
        ignore_eos=True,
        draft=replace(draft, copy=False),  # the text is random, and a copy would hide the stages
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
    return found, (before + fmean(decoder.rows.lengths)) / 2, decoder


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
    decoder.prefill(rows, prompts, rows, [budget] * count)


def rewind(decoder: Decoder, context: int) -> None:
    """Let every row go on behind the same `context` tokens, as if nothing came after them."""
    for row in range(decoder.rows.count):
        decoder.rows.lengths[row], decoder.rows.budget[row] = context, 1 << 30
        if decoder.learner:
            decoder.learner.forget(row, context)


def time_rounds(decoder: Decoder, count: int) -> list[Timed]:
    """Run rounds; on a GPU one more, since each returns the stage times of the one before."""
    delay = int(decoder.target.device.type == "cuda")
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
