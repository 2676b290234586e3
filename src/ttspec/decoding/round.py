"""One round of speculative decoding, straight down. Knows tokens, not text.

propose   the drafter drafts tokens; a row whose own text promises more copies them from there
verify    the target reads the pending token and the drafts in one forward
accept    which drafts are kept, and which token comes after them
commit    each row's length moves on the host; no key or value is copied
hand on   the learner gets the verification, the policy what the round took and brought; the
          drafter has made it context already, on the device, right after the verdict

A round is computed for all rows at once; what it says of rows that take no part is dead. On a CPU,
where each row costs, the target reads those that take part, and the drafter drafts for the rows
from the first of them to the last. Weights change in `learner.absorb` and nowhere else: what
drafted a round is what it is judged by.

What happens between rounds is a neighbour's job: `prefill.py` reads prompts, `deferred.py` what
a drafter has not read yet, `policy.py` says how much is drafted, `copying.py` which rows copy,
`decoder.py` puts it together.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.acceptance import BROKEN, accept_rejection, apply_end_tokens, draw_and_accept
from ttspec.config import SamplingConfig
from ttspec.decoding.choice import DraftChoice, with_copies
from ttspec.decoding.copying import Copying
from ttspec.decoding.deferred import DeferredContext
from ttspec.decoding.feedback import PolicyFeedback
from ttspec.decoding.penalties import penalises
from ttspec.decoding.policy import DraftPolicy, FixedDraftLength
from ttspec.decoding.prefill import PromptReader
from ttspec.decoding.row_sampling import RowSampling
from ttspec.decoding.rows import RoundShape, RowOutcome, RowStates, RowVerdict
from ttspec.decoding.timing import RoundTimer
from ttspec.drafters.base import Drafter, DraftState
from ttspec.learning.learner import Learner
from ttspec.models.capture import Graphs
from ttspec.models.target import Target
from ttspec.models.weights import not_finite
from ttspec.records import Proposal, Verification, of_rows, spread
from ttspec.rowcache import BUCKET, RowCache, reach_of
from ttspec.sampling import SamplingTensors, distribution, position_noise, rejection_noise
from ttspec.spans import batch_invariant


class Launched(NamedTuple):
    """A round that the device works on."""

    active: list[int]
    """Rows that take part."""
    shape: RoundShape
    longest: int
    copies: dict[int, list[int]]
    """These two as `_plan` says."""
    verification: Verification
    table: Tensor


class SpeculativeRound:
    """Target, drafter and rows; `round` is one round of all rows that take part."""

    target: Target
    cache: RowCache
    drafter: Drafter | None
    state: DraftState | None
    """The drafter's context; None where nothing is ever drafted."""
    sampling: SamplingConfig
    """Of a row without its own; how drafts are made and accepted is the same in all rows."""
    row_sampling: RowSampling
    """How each row's tokens are chosen."""
    rows: RowStates
    policy: DraftPolicy | FixedDraftLength
    copying: Copying | None
    """None where no row ever copies."""
    learner: Learner | None
    deferred: DeferredContext
    prompts: PromptReader
    timer: RoundTimer
    feedback: PolicyFeedback
    graphs: Graphs
    works_ahead: bool
    """Whether the next round may be launched before the last one is told of."""
    width: int
    """Tokens that a verification reads at most; where `batch_invariant` is set, padded to it."""
    batch_invariant: bool
    target_reads_spans: bool
    """Whether the device knows how far each row reads, so that one graph serves any length."""
    round_number: int = 0
    """Rounds so far."""
    launched: Launched | None = None
    """The next round, where it was launched ahead."""
    _proposed: tuple[Proposal, Tensor | None]
    """What `propose` gave: a stage that may be captured as a graph is given its shape alone."""
    _target_rows: Tensor | None = None
    """int64, the rows that the target reads in this round, as they lie; None is all."""
    _drafter_rows: slice | None = None
    """The rows that the drafter drafts for; None is all."""

    @torch.no_grad()
    def round(self, *, ahead: bool = False) -> dict[int, RowOutcome]:
        """Propose, verify, accept, commit, hand on: one round of all rows that take part.

        Args:
            ahead: Launch the next round once this one is committed, so that the device works while
                the host does the rest; not where a row has ended, or the host must see drafts.

        Returns:
            What it did to each of them, by row.
        """
        launched, self.launched = self.launched or self._launch(), None
        active, shape, longest, copies, verification, table = launched
        verdict = table.tolist()  # the round's one wait for the device
        self.timer.lap()
        if any(verdict[row][3] >= BROKEN for row in active):
            raise not_finite(self.target.name, self.target.dtype)

        self.round_number += 1
        verdicts = {row: RowVerdict.of(verdict[row]) for row in active}
        tell = self.row_sampling.logprobs.of
        told = {row: tell(row, verification.logits, row, v.tokens) for row, v in verdicts.items()}
        for row, of_row in verdicts.items():
            self.prompts.rollback.validate(row)  # to where the round began
            self.rows.commit(row, of_row.tokens)
            if of_row.ended:
                self.rows.budget[row] = 0
            if self.copying:
                drafted = shape.draft_length > 0 and row not in copies
                self.copying.commit(row, of_row.tokens, of_row.accepted if drafted else None)
        emitted = {row: len(verdict.tokens) for row, verdict in verdicts.items()}
        self.deferred.after_round(verification, emitted, shape)
        updated = [False] * self.rows.count
        if self.learner and self.teaches(shape):
            updated = self.learner.absorb(
                verification,
                longest,
                shape,
                active,
                drafted=shape.draft_length > 0,
                emitted=emitted,
                number=self.round_number,
            )
        took, some = self.timer.finish(), self._target_rows
        if ahead and self.rows.active() == active and not self._is_masked(active):
            self.launched = self._launch(unobserved=shape.draft_length)

        reported = None if copies else self.policy.reported(shape.draft_length)
        outcomes = {
            row: RowOutcome(*of_row, updated[row], took.stages, reported, row in copies, told[row])
            for row, of_row in verdicts.items()
        }
        cost = self.rows.count if some is None else len(some)
        self.feedback.observe(self.policy, took, shape, longest, outcomes, cost)
        return outcomes

    def _launch(self, unobserved: int | None = None) -> Launched:
        """Let the device propose, verify and accept.

        Args:
            unobserved: Draft length of a round of which the policy was not told yet.
        """
        self.timer.start()
        active = self.rows.active()
        shape, longest, copies = self._plan(active, unobserved)
        self.deferred.before_round(active, shape)
        self.prompts.restore(active)
        self.prompts.rollback.invalidate(active)  # until they are committed
        self.rows.upload(self.round_number, copies)
        self._choose_rows(active)
        self._proposed = self.graphs(self.propose, shape, first=True)
        shape = self._trim_by_confidence(active, shape)
        self.timer.lap()
        self._ask_masks(active, shape)
        verification, table = self.graphs(self.verify_and_accept, shape)
        return Launched(active, shape, longest, copies, verification, table)

    def drop(self, row: int) -> None:
        """Forget a round that was launched ahead, if the row takes part: what it wrote is dead."""
        if self.launched and row in self.launched.active:
            self.launched = None

    def _is_masked(self, rows: list[int]) -> bool:
        """Whether the host must look at drafts of some rows before they are verified."""
        return bool((masks := self.row_sampling.masks) and masks.masked(rows))

    def _plan(
        self, active: list[int], unobserved: int | None
    ) -> tuple[RoundShape, int, dict[int, list[int]]]:
        """The next round's shape, an upper bound of its rows' lengths, and what rows copy."""
        draft_length, copies = self.policy.choose(unobserved), dict[int, list[int]]()
        if self.copying:
            drafts = draft_length > 0
            copies = self.copying.choose(active, self.rows.tokens, drafts=drafts)
        copy_length = self.copying.length(copies) if self.copying else 0
        if len(copies) == len(active):  # nobody needs the drafter
            draft_length = 0
        longest = self._longest(active)
        reach = self.rows.slots if self._reads_spans else longest
        processors = self.row_sampling.processors(active)
        if self.graphs.on:
            processors = self.row_sampling.captured(processors)
        absorbs = not self.policy.pauses
        return RoundShape(reach, draft_length, copy_length, processors, absorbs), longest, copies

    def _trim_by_confidence(self, active: list[int], shape: RoundShape) -> RoundShape:
        """The shape of a round whose target reads no more drafts than pay, by the drafter's word.

        Not where graphs are captured: they are of one width.
        """
        (proposal, noise), policy = self._proposed, self.policy
        confidence = proposal.confidence
        if confidence is None or shape.copy_length or self.graphs.on or not policy.adaptive:
            return shape
        length = policy.drafts_to_verify(confidence[active].tolist())
        self._proposed = proposal.first(length), None if noise is None else noise[:, : length + 1]
        return shape._replace(draft_length=length)

    def teaches(self, shape: RoundShape) -> bool:
        """Whether the learner is told of a round of this shape."""
        assert self.learner
        if self.learner.study is None:
            return shape.proposed > 0 and shape.absorbs
        return shape.absorbs or self.learner.study.hears(self.round_number)

    def _ask_masks(self, active: list[int], shape: RoundShape) -> None:
        """Ask the rows' masks, if any, about the drafts: only then the device is waited for."""
        masks = self.row_sampling.masks
        if masks is None or not (rows := masks.masked(active)):
            return
        drafts: list[list[int]] = [[] for _ in rows]
        if shape.proposed:
            proposal, _ = self._proposed
            drafted = torch.cat([proposal.count[:, None], proposal.tokens], dim=1).tolist()
            drafts = [drafted[row][1 : 1 + drafted[row][0]] for row in rows]
        masks.ask(rows, [self.rows.answer(row) for row in rows], drafts)

    def propose(self, shape: RoundShape) -> tuple[Proposal, Tensor | None]:
        """Drafts of every row, and the target's noise at their positions and the one after."""
        rows, length, noise = self.rows.inputs, shape.draft_length, None
        sampling = self.row_sampling.tensors(shape.processors)
        if self.sampling.acceptance == "invariant" and sampling.temperature is not None:
            noise = self._noise(shape.proposed + 1, sampling)
        most = (rows.budget - 1).clamp(min=0)
        if self.drafter is None or self.state is None or not length:
            none = rows.pending.new_empty(self.rows.count, 0)
            proposal = Proposal(tokens=none, count=most.clamp(max=0))
        else:
            proposal = self._draft(shape, noise, most.clamp(max=length))
        if shape.copy_length:
            proposal = with_copies(proposal, rows, shape.copy_length, most)
        return proposal, noise

    def _noise(self, width: int, sampling: SamplingTensors) -> Tensor:
        """The target's noise [B, width, V] from each row's next position on."""
        key, start, sampled = self.rows.inputs.noise_key, self.rows.inputs.start, sampling.sampled
        some, size = self._drafter_rows or slice(None), int(self.target.config.vocab_size)
        of_some = sampled if sampled is None else sampled[some]
        noise = position_noise(key[some], start[some] + 1, width, size, of_some)
        return spread(noise, some, self.rows.count)

    def _draft(self, shape: RoundShape, noise: Tensor | None, count: Tensor) -> Proposal:
        """What the drafter drafts, of which `count` int64 [B] will be used."""
        assert self.drafter
        penalties = self.row_sampling.penalties if penalises(shape.processors) else None
        some = None if penalties else self._drafter_rows  # they know their rows by number
        rows, sampling = self.rows.inputs, self.row_sampling.tensors(shape.processors, some)
        if penalties:
            penalties.write(rows.pending[:, None], rows.start)
        if some:
            rows, count = replace(of_rows(rows, some), number=rows.number), count[some]
            noise = noise if noise is None else noise[some]
        vocabulary, processors = int(self.target.config.vocab_size), shape.processors
        if noise is not None and not penalties and (ids := self.drafter.draft_ids) is not None:
            noise = noise[:, : shape.draft_length, ids]
        known = self.drafter, rows, vocabulary, noise, penalties, processors, shape.longest
        choose = DraftChoice(sampling, *known)
        asked = rows.pending, rows.start, count, shape.draft_length, shape.longest, choose
        proposal = choose.over_all(self.drafter.propose(self._state_of(some), *asked))
        if some is None:
            return proposal
        parts = {f.name: getattr(proposal, f.name) for f in fields(proposal)}
        given = {name: part for name, part in parts.items() if part is not None}
        whole = {name: spread(part, some, self.rows.count) for name, part in given.items()}
        return replace(proposal, **whole)

    def _state_of(self, rows: slice | None) -> DraftState:
        """The drafter's context, or what of it belongs to some rows."""
        assert self.state is not None
        assert self.drafter is not None
        if rows is None:
            return self.state
        return self.state.of_rows(rows, self.drafter.weights_of(self.state.weights, rows))

    def verify_and_accept(self, shape: RoundShape) -> tuple[Verification, Tensor]:
        """Let the target read the drafts, keep what it agrees with; the drafter absorbs it.

        Returns:
            The verification, and the table of its `Verdict` for the host.
        """
        rows, (proposal, noise) = self.rows.inputs, self._proposed
        fed = torch.cat([rows.pending[:, None], proposal.tokens], dim=1)
        logits, features = self._forward(fed, shape.longest)
        options = self.row_sampling
        if penalises(shape.processors):
            options.penalties.write(fed, rows.start)
        # For the verdict; the learner is told the target's own.
        changed = options.change(logits, rows.start + 1, shape.longest + 1, shape.processors)
        accepted, tokens = self.accept(changed, proposal, noise, options.tensors(shape.processors))
        judged = accepted, tokens, proposal.count, logits, rows.budget <= 0
        verdict = apply_end_tokens(*judged, options.ends, options.heeded)
        verification = Verification(
            proposal=proposal,
            fed=fed,
            start=rows.start.clone(),
            logits=logits,
            features=features,
            tokens=tokens,
            accepted=verdict.accepted,
            emitted=verdict.emitted,
            ended=verdict.ended,
        )
        if self.drafter and self.state:
            if shape.absorbs:
                state, some = self._state_of(self._drafter_rows), self._drafter_rows
                self.drafter.absorb(state, of_rows(verification, some) if some else verification)
            else:
                self.deferred.keep(verification)
        return verification, verdict.table

    def accept(
        self, logits: Tensor, proposal: Proposal, noise: Tensor | None, sampling: SamplingTensors
    ) -> tuple[Tensor, Tensor]:
        """Kept drafts, int64 [B], and int64 [B, G+1] whose first tokens, one more, come next."""
        if self.sampling.acceptance == "invariant" or sampling.temperature is None:
            some, count = self._drafter_rows or slice(None), self.rows.count
            noise = noise if noise is None else noise[some]
            sampling = of_rows(sampling, some) if self._drafter_rows else sampling
            given = logits[some], noise, proposal.tokens[some], proposal.count[some], sampling
            accepted, tokens = draw_and_accept(*given)
            return spread(accepted, some, count), spread(tokens, some, count)
        rows, drafts = self.rows.inputs, proposal.tokens.shape[1]
        u, fresh = rejection_noise(rows.noise_key, rows.number, drafts, logits.shape[-1])
        p = distribution(logits, sampling)
        return accept_rejection(p, proposal, u, fresh)

    def _forward(self, fed: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Logits and features of tokens [B, T]; batch-invariant, they are padded to one width."""
        width, spans, some = fed.shape[1], self.target_reads_spans, self._target_rows
        start = self.rows.inputs.start
        if some is not None:
            fed, start = fed[some], start[some]
        if self.batch_invariant:
            fed = F.pad(fed, (0, self.width - width))
        with batch_invariant() if self.batch_invariant else nullcontext():
            logits, features = self.target.forward(
                self.cache, fed, start, longest, subset=some, spans=spans
            )
        assert logits is not None
        if some is not None:
            logits = spread(logits, some, self.rows.count)
            features = spread(features, some, self.rows.count)
        return logits[:, :width], features[:, :width]

    def _choose_rows(self, active: list[int]) -> None:
        """Leave out rows that take no part, where they would cost something: not on a GPU."""
        if not self.cache.moves_rows:
            return
        rows, count = self.cache.lay_together(active), self.rows.count
        self._target_rows = None if rows == list(range(count)) else torch.tensor(rows)
        self._drafter_rows = slice(active[0], active[-1] + 1) if len(active) < count else None

    @property
    def _reads_spans(self) -> bool:
        """Whether no stage needs to know on the host how far back a row reads."""
        return self.target_reads_spans and (self.state is None or self.state.spans)

    def _longest(self, active: list[int]) -> int:
        """The longest row's length; with graphs, the largest that reads as many slots."""
        longest, slots = max(self.rows.lengths[row] for row in active), self.rows.slots
        if not self.graphs.on:
            return longest
        reach = reach_of(longest + self.width, slots, BUCKET)
        return slots if reach == slots else reach - self.width
