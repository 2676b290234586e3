"""One round of speculative decoding, straight down. Knows tokens, not text.

propose   the drafter drafts tokens
verify    the target reads the pending token and the drafts in one forward
accept    which drafts are kept, and which token comes after them
commit    each row's length moves on the host; no key or value is copied
hand on   the learner gets the verification, the policy what the round took and brought; the
          drafter has made it context already, on the device, right after the verdict

A round is computed for all rows at once; what it says of rows that take no part is dead. Weights
change in `learner.absorb` and nowhere else: what drafted a round is what it is judged by.

What happens between rounds is a neighbour's job: `prefill.py` reads prompts, `deferred.py` what
a drafter has not read yet, `policy.py` says how much is drafted, `decoder.py` puts it together.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.acceptance import accept_equal, accept_rejection, cut_at_end
from ttspec.config import SamplingConfig
from ttspec.decoding.choice import DraftChoice
from ttspec.decoding.deferred import DeferredContext
from ttspec.decoding.penalties import RowPenalties
from ttspec.decoding.policy import DraftPolicy, FixedDraftLength, PolicyFeedback
from ttspec.decoding.prefill import PromptReader
from ttspec.decoding.rows import RowOutcome, RowStates, RowVerdict
from ttspec.decoding.timing import RoundTimer
from ttspec.drafters.base import Drafter, DraftState
from ttspec.learning.learner import Learner
from ttspec.models.capture import Graphs
from ttspec.models.target import Target
from ttspec.records import Proposal, Verification
from ttspec.rowcache import BUCKET, RowCache, reach_of
from ttspec.sampling import pick, position_noise, process, rejection_noise
from ttspec.spans import batch_invariant


class RoundShape(NamedTuple):
    """What a round's tensors depend on; one captured graph of each stage serves a shape."""

    longest: int
    """An upper bound of the rows' lengths. Stages read as many slots: few bounds, few graphs."""
    draft_length: int


class SpeculativeRound:
    """Target, drafter and rows; `round` is one round of all rows that take part."""

    target: Target
    cache: RowCache
    drafter: Drafter | None
    state: DraftState | None
    """The drafter's context; None where nothing is ever drafted."""
    sampling: SamplingConfig
    penalties: RowPenalties | None
    """What the text so far makes of logits; None where nothing is penalised."""
    rows: RowStates
    policy: DraftPolicy | FixedDraftLength
    learner: Learner | None
    deferred: DeferredContext
    prompts: PromptReader
    timer: RoundTimer
    feedback: PolicyFeedback
    graphs: Graphs
    end_tokens: Tensor
    width: int
    """Tokens that a verification reads at most; where `batch_invariant` is set, padded to it."""
    batch_invariant: bool
    target_reads_spans: bool
    """Whether the device knows how far each row reads, so that one graph serves any length."""
    round_number: int = 0
    """Rounds so far."""
    _proposed: tuple[Proposal, Tensor | None]
    """What `propose` gave: a stage that may be captured as a graph is given its shape alone."""

    @torch.no_grad()
    def round(self) -> dict[int, RowOutcome]:
        """Propose, verify, accept, commit, hand on: one round of all rows that take part.

        Returns:
            What it did to each of them, by row.
        """
        self.timer.start()
        active, draft_length = self.rows.active(), self.policy.choose()
        longest = self._longest(active)
        shape = RoundShape(self.rows.slots if self._reads_spans else longest, draft_length)
        self.deferred.before_round(active, draft_length)
        self.prompts.restore(active)
        self.prompts.invalidate(active)  # until they are committed
        self.rows.upload(self.round_number)

        self._proposed = self.graphs(self.propose, shape)
        self.timer.lap()
        verification, verdict = self.graphs(self.verify_and_accept, shape)
        verdict = verdict.tolist()  # the round's one wait for the device
        self.timer.lap()

        self.round_number += 1
        verdicts = {row: RowVerdict.of(verdict[row]) for row in active}
        for row, of_row in verdicts.items():
            self.prompts.validate(row)
            self.rows.commit(row, of_row.tokens)
        self.deferred.after_round(verification, active, draft_length)
        updated = [False] * self.rows.count
        if self.learner and draft_length:
            updated = self.learner.absorb(verification, longest, shape, active)
        seconds = self.timer.finish()

        outcomes = {
            row: RowOutcome(*of_row, updated[row], seconds, self.policy.reported(draft_length))
            for row, of_row in verdicts.items()
        }
        self.feedback.observe(self.policy, self.timer, draft_length, longest, outcomes)
        return outcomes

    def propose(self, shape: RoundShape) -> tuple[Proposal, Tensor | None]:
        """Drafts of every row, and the target's noise at their positions and the one after."""
        rows, length, noise = self.rows.inputs, shape.draft_length, None
        vocabulary = int(self.target.config.vocab_size)
        if self.sampling.acceptance == "invariant" and self.sampling.temperature > 0:
            noise = position_noise(rows.noise_key, rows.start + 1, length + 1, vocabulary)
        count = (rows.budget - 1).clamp(min=0, max=length)
        if self.drafter is None or self.state is None or not length:
            return Proposal(tokens=rows.pending.new_empty(self.rows.count, 0), count=count), noise
        if self.penalties:
            self.penalties.write(rows.pending[:, None], rows.start)
        known = self.drafter, rows, vocabulary, noise, self.penalties, shape.longest
        choose = DraftChoice(self.sampling, *known)
        asked = rows.pending, rows.start, count, length, shape.longest, choose
        return self.drafter.propose(self.state, *asked), noise

    def verify_and_accept(self, shape: RoundShape) -> tuple[Verification, Tensor]:
        """Let the target read the drafts, keep what it agrees with; the drafter absorbs it.

        Returns:
            The verification; and for the host int64 [B, 4 + G+1]: emitted, accepted and proposed
            tokens, whether an end token is the last one, and the tokens.
        """
        rows, (proposal, noise) = self.rows.inputs, self._proposed
        fed = torch.cat([rows.pending[:, None], proposal.tokens], dim=1)
        logits, features = self._forward(fed, shape.longest)
        penalised = logits  # for the verdict; the learner is told the target's own
        if self.penalties:
            self.penalties.write(fed, rows.start)
            penalised = self.penalties(logits, rows.start + 1, shape.longest + 1)
        accepted, tokens = self.accept(penalised, proposal, noise)
        emitted, ended = cut_at_end(tokens, accepted + 1, self.end_tokens)
        resting = rows.budget <= 0
        verification = Verification(
            proposal=proposal,
            fed=fed,
            start=rows.start.clone(),
            logits=logits,
            features=features,
            tokens=tokens,
            accepted=accepted.minimum(emitted).masked_fill(resting, 0),
            emitted=emitted.masked_fill(resting, 0),
            ended=ended,
        )
        if self.drafter and self.state and shape.draft_length:
            self.drafter.absorb(self.state, verification)
        counts = (verification.emitted, verification.accepted, proposal.count, ended.long())
        return verification, torch.cat([torch.stack(counts, 1), tokens], dim=1)

    def accept(
        self, logits: Tensor, proposal: Proposal, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Kept drafts, int64 [B], and int64 [B, G+1] whose first tokens, one more, come next."""
        if self.sampling.acceptance == "invariant" or self.sampling.temperature == 0:
            return accept_equal(pick(logits, noise, self.sampling), proposal)
        rows, drafts = self.rows.inputs, proposal.tokens.shape[1]
        u, fresh = rejection_noise(rows.noise_key, rows.number, drafts, logits.shape[-1])
        p = process(logits, self.sampling).softmax(-1)
        return accept_rejection(p, proposal, u, fresh)

    def _forward(self, fed: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Logits and features of tokens [B, T]; batch-invariant, they are padded to one width."""
        width, spans = fed.shape[1], self.target_reads_spans
        if self.batch_invariant:
            fed = F.pad(fed, (0, self.width - width))
        with batch_invariant() if self.batch_invariant else nullcontext():
            logits, features = self.target.forward(
                self.cache, fed, self.rows.inputs.start, longest, spans=spans
            )
        assert logits is not None
        return logits[:, :width], features[:, :width]

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
