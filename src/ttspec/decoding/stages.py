"""The stages of a round that the device computes: propose, verify, accept, absorb.

Each may be captured as a graph: it is given the round's shape alone, reads what lies at fixed
places, and waits for nothing. `decoder.py` launches them.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.acceptance import accept_rejection, apply_end_tokens, draw_and_accept
from ttspec.config import DraftConfig, LearnConfig, SamplingConfig
from ttspec.decoding.deferred import DeferredContext
from ttspec.decoding.draft_sampler import DraftSampler, with_copies
from ttspec.decoding.penalties import penalises
from ttspec.decoding.row_sampling import RowSampling
from ttspec.decoding.rows import Processors, RoundShape, RowStates
from ttspec.drafters.base import Drafter, DraftState
from ttspec.models.capture import Branch, Graphs
from ttspec.models.target import Target
from ttspec.records import (
    LONGEST_COPY,
    Proposal,
    Verification,
    of_rows,
    scatter,
    scatter_record,
)
from ttspec.sampling import (
    NoiseCache,
    SamplingTensors,
    distribution,
    position_noise,
    rejection_noise,
)
from ttspec.spans import batch_invariant

INVARIANT_WIDTH = 16
"""Tokens, or a multiple of it, that every verification reads where each must be read alike: matrix
products and attention of one size give a token the same result, bit by bit, wherever it stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """What a decoder is made for; after `restart`, another request for the same may have it."""

    rows: int
    """Side by side."""
    slots: int
    """Tokens that each may have."""
    sampling: SamplingConfig
    """How tokens are chosen, in rows without options of their own (`row_sampling`)."""
    draft: DraftConfig
    """How the drafter is run."""
    learn: LearnConfig | None
    """How it learns; None is a static drafter."""
    ends: tuple[int, ...] = ()
    """End tokens; none where rows go on past them, unless one has options of its own."""
    batch_invariant: bool = False
    """Every verification reads the same number of tokens."""


class RoundStages:
    """What a round computes on the device, for all rows at once.

    Owns what lies there: caches, the drafter's context, the rows with their options, the graphs.
    """

    def __init__(
        self, target: Target, drafter: Drafter | None, spec: DecoderSpec, *, compile: bool
    ) -> None:
        """Allocate the caches and all that is known of rows.

        Args:
            target: Verifies.
            drafter: Drafts; None is plain decoding.
            spec: Rows and options.
            compile: Compile what rounds do, on a GPU.
        """
        rows, slots, draft, device = spec.rows, spec.slots, spec.draft, target.device
        self.spec, self.sampling = spec, spec.sampling
        self.target, self.drafter = target, drafter
        self.batch_invariant = spec.batch_invariant
        self.gamma, self.copies, self.width = round_widths(drafter, draft, self.batch_invariant)
        """Tokens that a round drafts, copies and verifies at most."""

        # Where the device works. A target that no graph holds is called from Python, as on a CPU.
        captures = device if target.can_capture else torch.device("cpu")
        self.compile, self.graphs = compile, Graphs(captures, compile=compile)
        self.branch = Branch(captures)
        """On a GPU a second stream: noise and the drafter's context are made beside the rest."""
        self.target_reads_spans = self.graphs.on and target.reads_spans
        """Whether the device knows how far each row reads, so that one graph serves any length."""
        # Not without graphs: a call from Python takes the host as long as its round. Nor with
        # recurrent states: those of a round that is dropped would have to be read anew.
        self.works_ahead = self.graphs.on and not target.recurrent
        """Whether the next round may be launched before the host is done with the last one."""
        on_cpu = device.type == "cpu"
        self.position_noise = NoiseCache() if on_cpu and not self.graphs.on else position_noise

        # What the rows hold.
        self.cache = target.cache(rows, slots, self.width)
        # Batch-invariant products are always of all rows; recurrent states are not moved.
        stays = self.graphs.on or target.is_split or self.batch_invariant or target.recurrent
        self.cache.moves_rows = on_cpu and not stays
        self.state = drafter.start(rows, slots, draft) if drafter and self.gamma else None
        """The drafter's context; None where nothing is ever drafted."""
        self.rows = RowStates(rows, slots, device, self.copies)
        self.deferred = DeferredContext(drafter, self.state, self.rows, self.graphs)
        self.row_sampling = RowSampling(
            self.sampling, target, rows=rows, slots=slots, width=self.width, ends=spec.ends
        )
        self._target_rows: Tensor | None = None
        """int64, the rows that the target reads in this round, as they lie; None is all."""
        self._drafter_rows = slice(None)
        """The rows that are drafted for, and for which tokens are drawn."""
        self._proposed: tuple[Proposal, Tensor | None]
        """What `propose` gave."""

    @property
    def _reads_spans(self) -> bool:
        """Whether no stage needs to know on the host how far back a row reads."""
        return self.target_reads_spans and (self.state is None or self.state.spans)

    def _choose_rows(self, active: list[int], processors: Processors) -> None:
        """Leave out rows that take no part, where they would cost something: not on a GPU."""
        if not self.cache.moves_rows:
            return
        rows, count = self.cache.make_adjacent(active), self.rows.count
        self._target_rows = None if rows == list(range(count)) else torch.tensor(rows)
        leaves_out = len(active) < count and not penalises(processors)  # which know rows by number
        self._drafter_rows = slice(active[0], active[-1] + 1) if leaves_out else slice(None)

    def propose(self, shape: RoundShape) -> tuple[Proposal, Tensor | None]:
        """Drafts of every row, and the target's noise [R, G+1, V] for these and one token more.

        Noise is of the R rows that are drafted for, None where tokens are not chosen by it. Where
        nothing is proposed, it is there once the branch is joined.
        """
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
        if shape.proposed:
            self.branch.join()
        return proposal, noise

    def _noise(self, width: int, sampling: SamplingTensors) -> Tensor:
        """The target's noise [R, width, V] from each row's next position on."""
        rows, some = self.rows.inputs, self._drafter_rows
        size, sampled = int(self.target.config.vocab_size), of_rows(sampling, some).sampled
        return self.position_noise(rows.noise_key[some], rows.start[some] + 1, width, size, sampled)

    def _draft(self, shape: RoundShape, noise: Tensor | None, count: Tensor) -> Proposal:
        """What the drafter drafts, of which `count` int64 [B] will be used."""
        assert self.drafter
        processors, some = shape.processors, self._drafter_rows
        rows = replace(of_rows(self.rows.inputs, some), number=self.rows.inputs.number)
        penalties = self.row_sampling.penalties if penalises(processors) else None
        if penalties:
            penalties.write(rows.pending[:, None], rows.start)
        if noise is not None and not penalties and (ids := self.drafter.draft_ids) is not None:
            with self.branch.aside():
                noise = noise[:, : shape.draft_length, ids]
        choose = DraftSampler(
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
        proposal = self.drafter.propose(
            self._state_of(some),
            rows.pending,
            rows.start,
            count[some],
            shape.draft_length,
            shape.longest,
            choose,
        )
        return scatter_record(choose.over_all(proposal), some, self.rows.count)

    def _state_of(self, rows: slice) -> DraftState:
        """The drafter's context, or what of it belongs to some rows."""
        assert self.state
        assert self.drafter
        if rows == slice(None):
            return self.state
        return self.state.of_rows(rows, self.drafter.weights_of(self.state.weights, rows))

    def verify_and_accept(self, shape: RoundShape) -> tuple[Verification, Tensor]:
        """Let the target read the drafts, keep what it agrees with; the drafter absorbs it.

        The rows' inputs are moved on, for the next round to go on from there without the host.

        Returns:
            The verification, and the table of its `Verdict` for the host.
        """
        if not shape.proposed:
            self._proposed = self.propose(shape)
        rows, options, (proposal, noise) = self.rows.inputs, self.row_sampling, self._proposed
        start, processors = rows.start.clone(), shape.processors
        fed = torch.cat([rows.pending[:, None], proposal.tokens], dim=1)
        logits, features = self._forward(fed, shape.longest)
        if not shape.proposed:
            self.branch.join()  # the noise was made beside
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
        if self.drafter and self.state:
            some = self._drafter_rows
            with self.branch.aside():  # whatever is accepted, all that was fed becomes context
                if shape.absorbs:
                    self.drafter.absorb(self._state_of(some), of_rows(verification, some))
                else:
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
            some, count = self._drafter_rows, self.rows.count
            accepted, tokens = draw_and_accept(
                logits[some],
                noise,
                proposal.tokens[some],
                proposal.count[some],
                of_rows(sampling, some),
            )
            return scatter(accepted, some, count), scatter(tokens, some, count)
        rows, drafts = self.rows.inputs, proposal.tokens.shape[1]
        u, fresh = rejection_noise(rows.noise_key, rows.number, drafts, logits.shape[-1])
        p = distribution(logits, sampling)
        return accept_rejection(p, proposal, u, fresh)

    def _forward(self, fed: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Logits and features of tokens [B, T]; batch-invariant, they are padded to one width."""
        width, spans, subset = fed.shape[1], self.target_reads_spans, self._target_rows
        some, count = slice(None) if subset is None else subset, self.rows.count
        if self.batch_invariant:
            fed = F.pad(fed, (0, self.width - width))
        with batch_invariant() if self.batch_invariant else nullcontext():
            logits, features = self.target.forward(
                self.cache,
                fed[some],
                self.rows.inputs.start[some],
                longest,
                subset=subset,
                spans=spans,
            )
        assert logits is not None
        return scatter(logits[:, :width], some, count), scatter(features[:, :width], some, count)


def round_widths(
    drafter: Drafter | None, draft: DraftConfig, batch_invariant: bool
) -> tuple[int, int, int]:
    """Tokens that are drafted, copied and verified a round at most; plain decoding: 0, 0 and 1."""
    if drafter is None or draft.length == 0:
        drafted = copied = 0
    elif not drafter.drafts:  # copies are all that it does
        drafted, copied = 0, min(LONGEST_COPY, draft.length or LONGEST_COPY)
    else:
        drafted = min(drafter.length, draft.length or drafter.length)
        copied = LONGEST_COPY if draft.copy else 0
    if not batch_invariant:
        return drafted, copied, max(drafted, copied) + 1
    # A wide round is slower: beside a drafter copies take what room there is.
    width = -(-((drafted or copied) + 1) // INVARIANT_WIDTH) * INVARIANT_WIDTH
    return drafted, min(copied, width - 1), width
