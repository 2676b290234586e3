"""A batch of rows with all that its rounds need: caches, learner, policy. Rows come and go."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ttspec.config import DraftConfig, LearnConfig, SamplingConfig
from ttspec.decoding.copy_costs import CopyCosts
from ttspec.decoding.copying import Copying
from ttspec.decoding.deferred import DeferredContext
from ttspec.decoding.feedback import PolicyFeedback
from ttspec.decoding.policy import DraftPolicy, FixedDraftLength
from ttspec.decoding.prefill import PromptReader
from ttspec.decoding.round import SpeculativeRound
from ttspec.decoding.row_sampling import RowSampling
from ttspec.decoding.rows import RoundShape, RowStates
from ttspec.decoding.timing import RoundTimer
from ttspec.drafters.base import Drafter
from ttspec.drafters.context import ContextState
from ttspec.learning.learner import Learner
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.update_schedule import AFTER, UpdateSchedule
from ttspec.models.capture import Branch, Graphs
from ttspec.models.target import Target
from ttspec.records import LONGEST_COPY
from ttspec.sampling import NoiseCache, position_noise

INVARIANT_WIDTH = 16
"""Tokens, or a multiple of it, that every verification reads where each must be read alike: matrix
products and attention of one size give a token the same result, bit by bit, wherever it stands."""
COPY_WIDTHS = 7, LONGEST_COPY
"""Tokens that copies may have where rounds are captured: as few as a draft has, or all."""


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


class Decoder(SpeculativeRound):
    """Rows that decode side by side, each with its own length, budget and noise."""

    reads_prompts: type[PromptReader] = PromptReader
    tenant: str | None = None
    """Whose requests its rows may have, where they all teach the same weights."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        made_for: DecoderSpec,
        *,
        live_weights: LiveWeights | None = None,
        policy: DraftPolicy | None = None,
        compile: bool = False,
    ) -> None:
        """Allocate caches, and what learns.

        `gamma` is then the number of tokens drafted a round at most.

        Args:
            target: Verifies.
            drafter: Drafts; None is plain decoding.
            made_for: Rows and options.
            live_weights: In scope shared, the weights that learn from all requests.
            policy: What an adaptive policy knows already.
            compile: Compile what rounds do, on a GPU.
        """
        rows, slots, draft, device = made_for.rows, made_for.slots, made_for.draft, target.device
        self.made_for, self.sampling = made_for, made_for.sampling
        self.target, self.drafter = target, drafter
        self.batch_invariant = made_for.batch_invariant
        self.gamma, copies, self.width = widths(drafter, draft, self.batch_invariant)

        # Where the device works. A graph belongs to one: a split target is called, as on a CPU.
        captures = torch.device("cpu") if target.is_split else device
        self.compile, self.graphs = compile, Graphs(captures, compile=compile)
        self.branch, self.timer = Branch(captures), RoundTimer(device)
        self.target_reads_spans = self.graphs.on and target.reads_spans
        # A call works while it is made; and recurrent states of a dropped round would be read anew.
        self.works_ahead = self.graphs.on and not target.recurrent
        on_cpu = device.type == "cpu"
        self.position_noise = NoiseCache() if on_cpu and not self.graphs.on else position_noise

        # What the rows hold.
        self.cache = target.cache(rows, slots, self.width)
        # Batch-invariant, products are of as many rows always; recurrent states stay in place.
        stays = self.graphs.on or target.is_split or self.batch_invariant or target.recurrent
        self.cache.moves_rows = on_cpu and not stays
        self.state = drafter.start(rows, slots, draft) if drafter and self.gamma else None
        self.rows = RowStates(rows, slots, device, copies)
        self.deferred = DeferredContext(drafter, self.state, self.rows)
        self.row_sampling = RowSampling(
            self.sampling, target, rows=rows, slots=slots, width=self.width, ends=made_for.ends
        )
        self.prompts = self.reads_prompts(
            target, self.cache, drafter, self.state, self.row_sampling, self.rows, self.deferred
        )

        # Who learns, and who decides what is drafted and copied.
        self.learner = self.prompts.learner = self._learner(live_weights)
        # With the rejection rule a round has noise of its own: its length would change the text.
        repeats = self.batch_invariant or self.sampling.acceptance == "rejection"
        by_clock = draft.adaptive and not repeats
        self.policy = FixedDraftLength(self.gamma)
        if by_clock and self.state is not None:
            # Where a graph is launched a block that is drafted at once is no cheaper if shorter.
            halvings = 0 if self.graphs.on and drafter and drafter.at_once else 2
            self.policy = policy or DraftPolicy(self.gamma, halvings=halvings)
        copy_costs = None
        if by_clock and rows > 1:  # one row's copy is paid for by all
            copy_costs = self.policy.copy_costs or CopyCosts()
        self.copying = self._copying(copies, copy_costs) if copies else None
        schedule = None
        if draft.adaptive and self.learner:
            schedule = UpdateSchedule(self.learner, clock=by_clock)
        self.feedback = PolicyFeedback(self.learner, schedule, copy_costs)

    def _learner(self, live_weights: LiveWeights | None) -> Learner | None:
        learn, drafter = self.made_for.learn, self.drafter
        if learn is None or drafter is None or self.state is None or not drafter.weights:
            return None
        return Learner(
            learn,
            drafter,
            self.state,
            self.made_for.rows,
            self.gamma,
            live_weights=live_weights,
            run=self.graphs,
            after=AFTER if self.made_for.draft.adaptive else 0,
        )

    def _copying(self, copies: int, costs: CopyCosts | None) -> Copying:
        block_cost = 0.0
        if self.drafter and self.gamma:
            weights = sum(w.numel() for w in self.target.model.parameters())
            block_cost = self.drafter.weights_read(self.gamma) / weights
        # A graph is captured for each width.
        wide = tuple(sorted({min(n, copies) for n in COPY_WIDTHS})) if self.graphs.on else ()
        return Copying(self.made_for.rows, copies, block_cost=block_cost, widths=wide, costs=costs)

    @torch.no_grad()
    def capture(self) -> None:
        """Capture the graphs that rounds of any shape need, before the first answer.

        Rounds in which nobody takes part do it. Where stages must know how far back a row reads,
        there are too many shapes: their graphs are captured when they are met.
        """
        if not (self.graphs.on and self._reads_spans):
            return
        self.rows.upload(0)
        nowhere = self.rows.inputs.start  # a first forward makes the cache
        self.target.forward(self.cache, self.rows.inputs.pending[:, None], nowhere, 0, logits=0)
        slots, one, adaptive = self.rows.slots, self.rows.count == 1, self.policy.adaptive
        processors = self.row_sampling.captured(
            self.row_sampling.processors(range(self.rows.count))
        )
        copied = self.copying.widths if self.copying else ()
        shapes = list[RoundShape]()
        for drafted in {0, *self.policy.lengths}:
            if drafted or adaptive or not self.gamma:
                shapes.append(RoundShape(slots, drafted, 0, processors))
            if not (drafted and one):
                shapes += [RoundShape(slots, drafted, copies, processors) for copies in copied]
        if adaptive:  # while the drafter pauses
            pause = RoundShape(slots, 0, 0, processors, absorbs=False)
            shapes += [pause._replace(copy_length=copies) for copies in (0, *copied)]
        # Drafts first: what is kept of a round is as wide as theirs.
        for shape in sorted(shapes, key=lambda shape: -shape.draft_length):
            self._proposed = self.graphs(self.propose, shape, first=True)
            verification, _ = self.graphs(self.verify_and_accept, shape)
            if self.learner and self._is_kept(shape):
                self.learner.keep(verification, shape)
        if self.learner:
            self.learner.capture_updates(slots)
        # Last: what compiles the target moves its weights, and a graph reads them where they were.
        # With many tokens the host may count which experts are asked.
        called = self.batch_invariant or self.target.recurrent or self.target.is_mixture
        if not called:
            self.prompts.capture(self.graphs)

    def prefill(
        self, rows: list[int], prompts: list[list[int]], keys: list[int], budgets: list[int]
    ) -> list[int]:
        """Read prompts at one go; arguments as in `PromptReader.begin`.

        Returns:
            The first token of each answer; it is pending now.
        """
        reading = self.prompts.begin(rows, prompts, keys, budgets)
        while not reading.is_read:
            self.prompts.read_piece(reading)
        return reading.first_tokens

    def rest(self, row: int) -> None:
        """Let a row take no part until it has another prompt."""
        self.drop(row)
        self.rows.budget[row] = 0

    def crop(self, row: int, length: int, pending: int) -> None:
        """Take back what a row committed past `length`; `pending` is the token that comes next."""
        self.drop(row)
        self.deferred.crop(row, self.rows.lengths[row] - length)
        self.rows.crop(row, length, pending)
        self.prompts.crop(row, length)
        if self.copying:
            self.copying.crop(row, length)
        if self.learner:
            self.learner.forget(row, length)

    def clear(self, row: int) -> None:
        """Empty a row for another request; what its drafter learned goes with it."""
        self.drop(row)
        self.rows.clear(row)
        self.row_sampling.set(row)
        if self.copying:
            self.copying.clear(row)
        self.deferred.clear(row)
        self.prompts.clear(row)
        if self.learner:
            self.learner.reset(row)

    def copy(self, source: int, to: int, length: int) -> None:
        """Empty a row, and let it hold the first `length` tokens of another one, read already.

        What the other's drafter learned stays there. Not where the target is recurrent.
        """
        self.clear(to)
        self.deferred.before_prompt([source])
        self.cache.copy_row(source, to, length)
        if isinstance(self.state, ContextState):
            self.state.copy_row(source, to, length)
        self.rows.copy(source, to, length)
        self.prompts.crop(to, length)

    def restart(self) -> None:
        """Be as new, with the caches and graphs there are."""
        for row in range(self.rows.count):
            self.clear(row)
        self.round_number = 0
        self.timer.restart()
        if self.learner:
            self.learner.restart()


def widths(
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
