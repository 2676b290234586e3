"""One round, straight down, for rows of different lengths. Knows tokens, not text.

The host's lengths are the truth: they move after a round is whole, so a round that is interrupted
leaves the row where it was, and what it wrote past the row's length is dead.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ttspec.acceptance import accept_equal, accept_rejection, cut_at_end
from ttspec.compiled import compiled
from ttspec.config import DraftConfig, LearnConfig, SamplingConfig
from ttspec.decoding.policy import DraftPolicy
from ttspec.drafters.base import Drafter
from ttspec.learning.learner import Learner
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.update_schedule import AFTER, UpdateSchedule
from ttspec.models.capture import Graphs
from ttspec.models.target import Target
from ttspec.records import Proposal, Verification
from ttspec.rowcache import BUCKET, reach_of
from ttspec.sampling import (
    ACCEPT,
    DRAFT,
    RESIDUAL,
    draw,
    exponential,
    fold,
    gumbel,
    process,
    uniform,
)
from ttspec.spans import batch_invariant as fixed_splits

PREFILL = 512
"""Prompt tokens read at once."""
LATE = 32
"""Plain rounds whose tokens a drafter absorbs together: alone, each costs 2 % of its round."""
INVARIANT_WIDTH = 16
"""Tokens that every verification reads where each must be read alike, or a multiple of it: matrix
products and attention of one size give a token the same result, bit by bit, wherever it stands."""
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""For prompts, whose shapes are always new: not cuDNN's, which makes a plan for each shape."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round did to one row, on the host."""

    tokens: list[int]
    proposed: int
    accepted: int
    ended: bool
    updated: bool
    seconds: tuple[float, float, float]
    """Of drafting, verifying and learning; on a GPU of the round before, since reading this one's
    would wait for it."""
    length: int | None = None
    """Drafts that the gate let the round have; None without a gate."""


class Decoder:
    """`rows` slots that decode side by side, each with its own length, budget and noise."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        *,
        rows: int,
        slots: int,
        sampling: SamplingConfig,
        draft: DraftConfig,
        learn: LearnConfig | None,
        ends: Sequence[int],
        live_weights: LiveWeights | None = None,
        policy: DraftPolicy | None = None,
        batch_invariant: bool = False,
        compile: bool = False,
    ) -> None:
        """Allocate caches for `rows` rows of `slots` tokens; `ends` are the end tokens.

        With `batch_invariant`, verifications are all of one width, plain rounds among them.
        """
        self.shape = {
            "rows": rows,
            "slots": slots,
            "sampling": sampling,
            "draft": draft,
            "learn": learn,
            "ends": ends,
            "batch_invariant": batch_invariant,
        }
        """What it was made for: another request of the same shape may have it after `restart`."""
        self.target, self.drafter, self.sampling = target, drafter, sampling
        self.gamma = 0 if drafter is None else drafter.length
        if drafter is not None and draft.length is not None:
            self.gamma = min(draft.length, self.gamma)
        self.width = self.gamma + 1
        """Tokens that a verification reads at most, or always if it is batch_invariant."""
        self.batch_invariant = batch_invariant
        if batch_invariant:
            self.width = -(-self.width // INVARIANT_WIDTH) * INVARIANT_WIDTH
        self.rows, self.slots = rows, slots
        self.cache = target.cache(rows, slots, self.width)
        self.state = drafter.start(rows, slots, draft) if drafter and self.gamma else None
        device = target.device
        # A graph belongs to one device: what a split target does is called, as on a CPU.
        captures = torch.device("cpu") if target.is_split else device
        self.compile, self._run = compile, Graphs(captures, compile=compile)
        self.told_spans = self._run.on and target.reads_spans
        """Whether what is seen is told on the device, so that one graph serves any length."""
        self.learner = None
        if learn and drafter and self.state is not None and drafter.weights:
            after = AFTER if draft.adaptive else 0
            self.learner = Learner(
                learn,
                drafter,
                self.state,
                rows,
                self.gamma,
                live_weights=live_weights,
                run=self._run,
                after=after,
            )
        self.policy, self._schedule = None, UpdateSchedule()
        if draft.adaptive and self.state is not None:
            # Another length would be compiled anew, for longer than most answers take.
            self.policy = policy or DraftPolicy(self.gamma, few=compile and self._run.on)
        self._unread = [0] * rows
        """Committed tokens of each row, the last ones, that the drafter may not have read."""
        self._late: list[tuple[Tensor, Tensor, Tensor]] = []
        """Tokens, features and starts of the last plain rounds, not absorbed yet."""
        self.ends = frozenset(ends)
        self._ends = torch.tensor(sorted(ends), dtype=torch.long, device=device)
        self.lengths = [0] * rows
        """Committed tokens of each row that are in the cache: all but the pending one."""
        self.pending = [0] * rows
        self._texts: list[list[int]] = [[] for _ in range(rows)]
        """Each row's committed tokens and its pending one."""
        self._states = [0] * rows
        """The least length to which a row can be cut back, where the target has recurrent layers;
        -1 for one whose states are lost."""
        self.budget = [0] * rows
        """Tokens that a row may still emit; 0 for a row that takes no part."""
        self._vocabulary = int(target.config.vocab_size)
        self._key = torch.zeros(rows, dtype=torch.long, device=device)
        self._facts = torch.zeros(4, rows, dtype=torch.long, device=device)
        """Pending tokens, lengths, budgets and the round's number, as the device sees them."""
        self._number = self._facts[3, :1]
        self._drafted: tuple[Proposal, Tensor | None]
        self._said: Verification
        self._round = 0
        self._clock: Stopwatch | None = None

    @torch.no_grad()
    def prefill(
        self, rows: list[int], prompts: list[list[int]], keys: list[int], budgets: list[int]
    ) -> list[int]:
        """Feed prompts after what the rows hold, and draw each row's first token.

        Args:
            rows: Which rows.
            prompts: Tokens to feed; in a later turn the row's pending token comes first.
            keys: 64-bit noise key of each row's answer.
            budgets: Tokens that each answer may have, at least 1.

        Returns:
            The first token of each answer; it is pending now.
        """
        device = self.target.device
        self._absorb_late()
        self._recover(rows)
        again = self.drafter.length if self.drafter and self.state else self.slots
        if any(self._unread[row] > again for row in rows):
            self._catch_up(rows)  # reading on goes back by no more than that
        subset = torch.tensor(rows, device=device)
        self._key[subset] = torch.tensor(keys, dtype=torch.long, device=device)
        at = [self.lengths[row] for row in rows]
        self._lose(rows)  # until all is read
        # The last forward ends where every prompt ends; what longer ones have more goes before.
        last = min(PREFILL, *map(len, prompts))
        for begin in range(0, max(map(len, prompts)) - last, PREFILL):
            parts = [ids[:-last][begin : begin + PREFILL] for ids in prompts]
            live = [i for i, part in enumerate(parts) if part]
            self._feed([rows[i] for i in live], [parts[i] for i in live], [at[i] for i in live])
            at = [n + len(part) for n, part in zip(at, parts, strict=True)]
        logits = self._feed(rows, [ids[-last:] for ids in prompts], at, logits=True)
        at = [n + last for n in at]
        assert logits is not None
        noise = None
        if self.sampling.temperature > 0:
            start = torch.tensor(at, device=device)
            noise = position_noise(self._key[subset], start, 1, self._vocabulary)
        first = draw(process(logits, self.sampling), noise)[:, 0].tolist()
        for row, n, token, budget in zip(rows, at, first, budgets, strict=True):
            self.lengths[row], self.pending[row], self.budget[row] = n, token, budget - 1
            self._unread[row] = 0
        for row, ids, token in zip(rows, prompts, first, strict=True):
            text, n = self._texts[row], self.lengths[row]
            self._texts[row] = [*text[: n - len(ids)], *ids, token]
            self._states[row] = n
        return first

    @torch.no_grad()
    def round(self) -> dict[int, Outcome]:
        """Propose, verify, accept, absorb, learn: one round of all rows that take part."""
        began, captured = time.perf_counter(), Graphs.captured
        clock = Stopwatch(self.target.device)
        length = self.policy.choose() if self.policy else self.gamma
        active = [row for row, budget in enumerate(self.budget) if budget > 0]
        longest = self._bound(max(self.lengths[row] for row in active))
        numbers = [self._round] * self.rows
        self._facts.copy_(torch.tensor([self.pending, self.lengths, self.budget, numbers]))
        if length or len(self._late) == LATE:
            self._absorb_late()
        if length and any(self._unread[row] > length for row in active):
            self._catch_up(active)
        self._recover(active)
        self._lose(active)  # until the round is whole

        # A graph of a verification reads the drafts of one graph of a draft: they go together.
        spans = self.told_spans and (self.state is None or self.state.spans)
        key = (self.slots if spans else longest) * (self.gamma + 1) + length
        self._drafted = self._run(self._draft, key)
        clock.lap()
        verification, told = self._run(self._verify, key)
        told = told.tolist()  # the round's one wait for the device
        clock.lap()
        self._round += 1
        for row in active:
            emitted = told[row][0]
            self._states[row] = self.lengths[row]
            self._texts[row] += told[row][4 : 4 + emitted]
            self.lengths[row] += emitted
            self.pending[row] = told[row][3 + emitted]
            self.budget[row] -= emitted
            self._unread[row] = length or self._unread[row] + emitted
        if self.state and not length:  # what a graph returns is overwritten by its next replay
            v = verification
            self._late.append((v.fed.clone(), v.features.clone(), v.start.clone()))
            self._said = verification
        updated = [False] * self.rows
        if self.learner and length:
            updated = self.learner.absorb(verification, longest, key, active)
        clock.lap()
        seconds, self._clock = self._stage_seconds(clock), clock
        if self.policy:
            accepted = [told[row][1] for row in active]
            took, first = time.perf_counter() - began, Graphs.captured > captured
            self.policy.observe(
                length,
                took,
                emitted=sum(told[row][0] for row in active) / len(active),
                accepted=accepted,
                context=longest,
                first=first,
            )
            if self.learner and length and not first:
                drafts = sum(accepted) / len(accepted)
                self._schedule.observe(took, any(updated), drafts, self.learner)
        return {
            row: Outcome(
                tokens=told[row][4 : 4 + told[row][0]],
                proposed=told[row][2],
                accepted=told[row][1],
                ended=bool(told[row][3]),
                updated=updated[row],
                seconds=seconds,
                length=length if self.policy else None,
            )
            for row in active
        }

    def _absorb_late(self) -> None:
        """Make what plain rounds committed context.

        A row that came to rest meanwhile gets what lies past its length, where it is dead.
        """
        if not self._late:
            return
        assert self.drafter is not None
        assert self.state is not None
        fed, features, starts = zip(*self._late, strict=True)
        self._late.clear()
        whole = replace(
            self._said, fed=torch.cat(fed, 1), features=torch.cat(features, 1), start=starts[0]
        )
        self.drafter.absorb(self.state, whole)

    def _catch_up(self, rows: list[int]) -> None:
        """Let the drafter read what it has not read of some rows, which are then all it reads."""
        assert self.drafter is not None
        assert self.state is not None
        start = torch.full((self.rows,), self.slots)
        start[rows] = torch.tensor([self.lengths[row] for row in rows])
        count = max(self._unread[row] for row in rows)
        self.drafter.catch_up(self.state, start.to(self.target.device), count)
        for row in rows:
            self._unread[row] = 0

    def _bound(self, longest: int) -> int:
        """The largest length that reads as many slots: one graph serves all up to it."""
        if not self._run.on:
            return longest
        reach = reach_of(longest + self.width, self.slots, BUCKET)
        return self.slots if reach == self.slots else reach - self.width

    def _stage_seconds(self, clock: Stopwatch) -> tuple[float, float, float]:
        if not clock.cuda:
            return clock.seconds()
        return self._clock.seconds() if self._clock else (0.0, 0.0, 0.0)

    def rest(self, row: int) -> None:
        """Let a row take no part until it is prefilled again."""
        self.budget[row] = 0

    def crop(self, row: int, length: int, pending: int) -> None:
        """Take back what a row committed past `length`; `pending` is the token that comes next."""
        self.lengths[row], self.pending[row] = length, pending
        self._texts[row] = [*self._texts[row][:length], pending]
        if length < self._states[row]:
            self._lose([row])
        if self.learner:
            self.learner.forget(row, length)

    def restart(self) -> None:
        """Be as new, with the caches and graphs there are."""
        for row in range(self.rows):
            self.clear(row)
        self._round, self._clock = 0, None
        self._late.clear()
        if self.learner:
            self.learner.restart()

    def clear(self, row: int) -> None:
        """Empty a row for another request; what its drafter learned goes with it."""
        self.lengths[row] = self.budget[row] = self._unread[row] = self._states[row] = 0
        self._texts[row] = []
        if self.learner:
            self.learner.reset(row)

    def _lose(self, rows: list[int]) -> None:
        """Say that the target's recurrent states of some rows may be of another text."""
        if self.target.recurrent:
            for row in rows:
                self._states[row] = -1

    def _recover(self, rows: list[int]) -> None:
        """Read the texts of rows again whose states are lost; keys, values and features are not."""
        for row in rows:
            if self._states[row] >= 0:
                continue
            text = self._texts[row][: self.lengths[row]]
            for begin in range(0, len(text), PREFILL):
                self._read([row], [text[begin : begin + PREFILL]], [begin])
            self._states[row] = self.lengths[row]

    def _feed(
        self, rows: list[int], parts: list[list[int]], at: list[int], *, logits: bool = False
    ) -> Tensor | None:
        """Read prompt tokens; returns the logits [B, 1, V] of the last column, if asked for."""
        tokens, start, subset, out, features = self._read(rows, parts, at, logits=logits)
        if self.drafter and self.state:
            with sdpa_kernel(ATTENTION):
                self.drafter.extend(self.state, tokens, features, start, subset)
        return out

    def _read(
        self, rows: list[int], parts: list[list[int]], at: list[int], *, logits: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
        """Let the target read: tokens, starts, which rows (None is all), logits and features."""
        device = self.target.device
        width = max(map(len, parts))
        tokens = torch.tensor([p + [0] * (width - len(p)) for p in parts], device=device)
        start = torch.tensor(at, device=device)
        counts = torch.tensor([len(p) for p in parts], device=device)
        # Some rows' keys are copied before they are read; those of all rows are not.
        every = rows == list(range(self.rows))
        subset = None if every else torch.tensor(rows, device=device)
        with sdpa_kernel(ATTENTION):
            out, features = self.target.forward(
                self.cache,
                tokens,
                start,
                max(at),
                subset=subset,
                counts=counts,
                logits=1 if logits else 0,
            )
        return tokens, start, subset, out, features

    def _start(self) -> Tensor:
        """Where each row's round begins; rows at rest write where nothing is read."""
        _, lengths, budget, _ = self._facts
        return lengths.masked_fill(budget <= 0, self.slots)

    def _draft(self, key: int) -> tuple[Proposal, Tensor | None]:
        """Drafts, and the noise of the positions they are for; `key` is as in `round`."""
        longest, length = divmod(key, self.gamma + 1)
        pending, _, budget, _ = self._facts
        start, noise = self._start(), None
        if self.sampling.acceptance == "invariant" and self.sampling.temperature > 0:
            noise = position_noise(self._key, start + 1, length + 1, self._vocabulary)
        count = (budget - 1).clamp(min=0, max=length)
        return self._propose(pending, start, count, length, longest, noise), noise

    def _verify(self, key: int) -> tuple[Verification, Tensor]:
        """What the target says of the drafts, made context; and what the host must know of it."""
        longest, length = divmod(key, self.gamma + 1)
        proposal, noise = self._drafted
        pending, _, budget, _ = self._facts
        start = self._start()
        fed = torch.cat([pending[:, None], proposal.tokens], dim=1)
        logits, features = self._read_block(fed, start, longest)
        accepted, tokens = self._accept(logits, proposal, start, noise)
        emitted, ended = cut_at_end(tokens, accepted + 1, self._ends)
        verification = Verification(
            proposal=proposal,
            fed=fed,
            start=start,
            logits=logits,
            features=features,
            tokens=tokens,
            accepted=accepted.minimum(emitted).masked_fill(budget <= 0, 0),
            emitted=emitted.masked_fill(budget <= 0, 0),
            ended=ended,
        )
        if self.drafter and self.state and length:
            self.drafter.absorb(self.state, verification)
        facts = (verification.emitted, verification.accepted, proposal.count, ended.long())
        return verification, torch.cat([torch.stack(facts, 1), tokens], dim=1)

    def _read_block(self, fed: Tensor, start: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Logits and features of tokens [B, T]; batch-invariant, among others that are dead."""
        width, spans = fed.shape[1], self.told_spans
        if self.batch_invariant:
            fed = F.pad(fed, (0, self.width - width))
        with fixed_splits() if self.batch_invariant else nullcontext():
            logits, features = self.target.forward(self.cache, fed, start, longest, spans=spans)
        assert logits is not None
        return logits[:, :width], features[:, :width]

    def _propose(
        self,
        pending: Tensor,
        start: Tensor,
        count: Tensor,
        length: int,
        longest: int,
        noise: Tensor | None,
    ) -> Proposal:
        if self.drafter is None or self.state is None or not length:
            return Proposal(tokens=pending.new_empty(self.rows, 0), count=count)

        drafter, ids = self.drafter, self.drafter.draft_ids

        def choose(logits: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
            if self.sampling.draft == "greedy" or self.sampling.temperature == 0:
                return named(pick(logits, None, self.sampling)), None
            width = logits.shape[1]
            if noise is not None:
                own = noise[:, first : first + width]
                own = own if ids is None else own[..., ids]
                return named(pick(logits, own, self.sampling)), None
            processed = process(logits, self.sampling)
            key = fold(self._key[:, None], DRAFT, self._number)
            key = fold(key, torch.arange(first, first + width, device=key.device))
            fresh = gumbel(key, self._vocabulary)
            fresh = fresh if ids is None else fresh[..., ids]
            return named(draw(processed, fresh)), drafter.widen(processed.softmax(-1), 0.0)

        def named(tokens: Tensor) -> Tensor:
            return tokens if ids is None else ids[tokens]

        return drafter.propose(self.state, pending, start, count, length, longest, choose)

    def _accept(
        self, logits: Tensor, proposal: Proposal, start: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.sampling.acceptance == "invariant" or self.sampling.temperature == 0:
            return accept_equal(pick(logits, noise, self.sampling), proposal)
        processed = process(logits, self.sampling)
        column = torch.arange(proposal.tokens.shape[1], device=start.device)
        u = uniform(fold(fold(self._key[:, None], ACCEPT, self._number), column))
        fresh = exponential(fold(self._key, RESIDUAL, self._number), logits.shape[-1])
        return accept_rejection(processed.softmax(-1), proposal, u, fresh)


@compiled
def position_noise(key: Tensor, first: Tensor, count: int, vocabulary: int) -> Tensor:
    """Drafter-invariant noise: Gumbels [B, count, V] for the positions first..first + count - 1."""
    position = first[:, None] + torch.arange(count, device=first.device)
    return gumbel(fold(key[:, None], 0, position), vocabulary)


@compiled
def pick(logits: Tensor, noise: Tensor | None, sampling: SamplingConfig) -> Tensor:
    """Tokens int64 [B, T] drawn from logits [B, T, V] with noise of the same shape, or the best."""
    return draw(process(logits, sampling), noise)


class Stopwatch:
    """Splits a round into stages: host time on a CPU, device time on a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Start the first stage."""
        self.cuda = device.type == "cuda"
        self._marks: list = []
        self.lap()

    def lap(self) -> None:
        """End a stage."""
        if self.cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> tuple[float, float, float]:
        """Length of each of the three stages, which must be over on the device."""
        pairs = pairwise(self._marks)
        if self.cuda:
            a, b, c = (x.elapsed_time(y) / 1000 for x, y in pairs)
        else:
            a, b, c = (y - x for x, y in pairs)
        return a, b, c
