"""The stages of a round that the device computes: propose, verify, accept, absorb.

Each may be captured as a graph: it is given the round's shape alone, reads what lies at fixed
places, and waits for nothing. `round.py` launches them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.acceptance import accept_rejection, apply_end_tokens, draw_and_accept
from ttspec.config import SamplingConfig
from ttspec.decoding.choice import DraftChoice, with_copies
from ttspec.decoding.deferred import DeferredContext
from ttspec.decoding.penalties import penalises
from ttspec.decoding.row_sampling import RowSampling
from ttspec.decoding.rows import RoundShape, RowStates
from ttspec.drafters.base import Drafter, DraftState
from ttspec.models.capture import Branch
from ttspec.models.target import Target
from ttspec.records import Proposal, Verification, of_rows, spread, spread_record
from ttspec.rowcache import RowCache
from ttspec.sampling import SamplingTensors, distribution, rejection_noise
from ttspec.spans import batch_invariant


class RoundStages:
    """What a round needs on the device, and what it computes there, for all rows at once."""

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
    width: int
    """Tokens that a verification reads at most; where `batch_invariant` is set, padded to it."""
    batch_invariant: bool
    target_reads_spans: bool
    """Whether the device knows how far each row reads, so that one graph serves any length."""
    branch: Branch
    """Beside which the rest of a stage is launched."""
    deferred: DeferredContext
    position_noise: Callable[[Tensor, Tensor, int, int, Tensor | None], Tensor]
    """As `sampling.position_noise`."""
    works_ahead: bool
    """Whether the next round may be launched before the host is done with the last one."""
    _proposed: tuple[Proposal, Tensor | None]
    """What `propose` gave."""
    _target_rows: Tensor | None = None
    """int64, the rows that the target reads in this round, as they lie; None is all."""
    _drafter_rows: slice | None = None
    """The rows that the drafter drafts for; None is all."""

    def propose(self, shape: RoundShape) -> tuple[Proposal, Tensor | None]:
        """Drafts of every row, and the target's noise at their positions and the one after."""
        rows, length, noise = self.rows.inputs, shape.draft_length, None
        sampling = self.row_sampling.tensors(shape.processors)
        self.branch.fork()
        if self.sampling.acceptance == "invariant" and sampling.temperature is not None:
            with self.branch.aside():  # the first draft is chosen some kernels later
                noise = self._noise(shape.proposed + 1, sampling)
        most = (rows.budget - 1).clamp(min=0)
        if self.drafter is None or self.state is None or not length:
            none = rows.pending.new_empty(self.rows.count, 0)
            proposal = Proposal(tokens=none, count=most.clamp(max=0))
        else:
            proposal = self._draft(shape, noise, most.clamp(max=length))
        if shape.copy_length:
            proposal = with_copies(proposal, rows, shape.copy_length, most)
        self.branch.join()
        return proposal, noise

    def _noise(self, width: int, sampling: SamplingTensors) -> Tensor:
        """The target's noise [B, width, V] from each row's next position on."""
        key, start, sampled = self.rows.inputs.noise_key, self.rows.inputs.start, sampling.sampled
        some, size = self._drafter_rows or slice(None), int(self.target.config.vocab_size)
        of_some = sampled if sampled is None else sampled[some]
        noise = self.position_noise(key[some], start[some] + 1, width, size, of_some)
        return spread(noise, some, self.rows.count)

    def _draft(self, shape: RoundShape, noise: Tensor | None, count: Tensor) -> Proposal:
        """What the drafter drafts, of which `count` int64 [B] will be used."""
        assert self.drafter
        rows, processors = self.rows.inputs, shape.processors
        penalties = self.row_sampling.penalties if penalises(processors) else None
        some = None if penalties else self._drafter_rows  # penalties know their rows by number
        if penalties:
            penalties.write(rows.pending[:, None], rows.start)
        if some:
            rows, count = replace(of_rows(rows, some), number=rows.number), count[some]
            noise = None if noise is None else noise[some]
        if noise is not None and not penalties and (ids := self.drafter.draft_ids) is not None:
            with self.branch.aside():
                noise = noise[:, : shape.draft_length, ids]
        choose = DraftChoice(
            sampling=self.row_sampling.tensors(processors, some),
            drafter=self.drafter,
            rows=rows,
            vocabulary=int(self.target.config.vocab_size),
            noise=noise,
            penalties=penalties,
            processors=processors,
            longest=shape.longest,
            ready=self.branch.join,
        )
        state, length = self._state_of(some), shape.draft_length
        proposal = choose.over_all(
            self.drafter.propose(
                state, rows.pending, rows.start, count, length, shape.longest, choose
            )
        )
        return proposal if some is None else spread_record(proposal, some, self.rows.count)

    def _state_of(self, rows: slice | None) -> DraftState:
        """The drafter's context, or what of it belongs to some rows."""
        assert self.state
        assert self.drafter
        if rows is None:
            return self.state
        return self.state.of_rows(rows, self.drafter.weights_of(self.state.weights, rows))

    def verify_and_accept(self, shape: RoundShape) -> tuple[Verification, Tensor]:
        """Let the target read the drafts, keep what it agrees with; the drafter absorbs it.

        The rows' inputs are moved on, for the next round to go on from there without the host.

        Returns:
            The verification, and the table of its `Verdict` for the host.
        """
        rows, options, (proposal, noise) = self.rows.inputs, self.row_sampling, self._proposed
        start, processors = rows.start.clone(), shape.processors
        fed = torch.cat([rows.pending[:, None], proposal.tokens], dim=1)
        logits, features = self._forward(fed, shape.longest)
        self.branch.fork()
        if penalises(processors):
            options.penalties.write(fed, rows.start)
        # For the verdict alone: the learner gets the target's own logits.
        processed = options.change(logits, rows.start + 1, shape.longest + 1, processors)
        accepted, tokens = self.accept(processed, proposal, noise, options.tensors(processors))
        rests = rows.budget <= 0
        verdict = apply_end_tokens(
            accepted, tokens, proposal.count, logits, rests, options.ends, options.heeded
        )
        verification = Verification(
            proposal=proposal,
            fed=fed,
            start=start,
            logits=logits,
            features=features,
            tokens=tokens,
            accepted=verdict.accepted,
            emitted=verdict.emitted,
            ended=verdict.ended,
        )
        if self.drafter and self.state and shape.absorbs:
            some = self._drafter_rows
            read = of_rows(verification, some) if some else verification
            state = self._state_of(some)
            with self.branch.aside():  # whatever is accepted, all that was fed becomes context
                self.drafter.absorb(state, read)
        elif self.drafter and self.state:
            self.deferred.keep(verification)
        if self.works_ahead:
            self.rows.advance(verdict.table)
        self.branch.join()
        return verification, verdict.table

    def accept(
        self, logits: Tensor, proposal: Proposal, noise: Tensor | None, sampling: SamplingTensors
    ) -> tuple[Tensor, Tensor]:
        """Kept drafts, int64 [B], and int64 [B, G+1] whose first tokens, one more, come next."""
        if self.sampling.acceptance == "invariant" or sampling.temperature is None:
            some, count = self._drafter_rows or slice(None), self.rows.count
            noise = None if noise is None else noise[some]
            sampling = of_rows(sampling, some) if self._drafter_rows else sampling
            accepted, tokens = draw_and_accept(
                logits[some], noise, proposal.tokens[some], proposal.count[some], sampling
            )
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
