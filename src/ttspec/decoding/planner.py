"""What the next round drafts and copies, and what follows from how the last one went.

Plans are made on the host before a round is launched. Knows no tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttspec.decoding.copy_costs import CopyCosts
from ttspec.decoding.copying import Copying
from ttspec.decoding.policy import DraftPolicy, FixedDraftLength
from ttspec.decoding.rows import Processors, RoundPlan, RoundShape, RowOutcome
from ttspec.decoding.timing import RoundTime
from ttspec.learning.update_schedule import UpdateSchedule
from ttspec.records import LONGEST_COPY
from ttspec.rowcache import BUCKET, reach_of

if TYPE_CHECKING:
    from ttspec.decoding.stages import RoundStages
    from ttspec.learning.learner import Learner

COPY_WIDTHS = 7, LONGEST_COPY
"""Tokens that copies may have where rounds are captured: as few as a draft has, or all."""
LEFT_OUT = 64
"""Rounds in a row whose time does not count since prompts were read beside them, or beside the one
before; what follows counts: where requests are short, prompts are read beside all rounds alike."""


class RoundPlanner:
    """Plans the rounds of a decoder's rows.

    Owns who decides: the draft policy, the copies of the rows' own texts with what they cost, and
    the schedule by which updates come seldom where they do not pay. `observe` tells them all.
    """

    def __init__(
        self, stages: RoundStages, learner: Learner | None, known: DraftPolicy | None = None
    ) -> None:
        """Decide as the decoder's spec says; a policy of an earlier decoder may know costs."""
        self._rows, self._sampling, self._width = stages.rows, stages.row_sampling, stages.width
        self._captured, self._learner, draft = stages.graphs.on, learner, stages.spec.draft
        # With the rejection rule a round has noise of its own: its length would change the text.
        repeats = stages.batch_invariant or stages.sampling.acceptance == "rejection"
        by_clock = draft.adaptive and not repeats
        self.policy: DraftPolicy | FixedDraftLength = FixedDraftLength(stages.gamma)
        if by_clock and stages.state is not None:
            # Where a graph is launched a block that is drafted at once is no cheaper if shorter.
            at_once = stages.drafter is not None and stages.drafter.at_once
            halvings = 0 if self._captured and at_once else 2
            self.policy = known or DraftPolicy(stages.gamma, halvings=halvings)
        self.copy_costs: CopyCosts | None = None
        """By the clock; one row decides without it."""
        if by_clock and self._rows.count > 1:  # one row's copy is paid for by all
            self.copy_costs = self.policy.copy_costs or CopyCosts()
        self.copying = self._copying(stages) if stages.copies else None
        self.schedule: UpdateSchedule | None = None
        if draft.adaptive and learner:
            # Who gives a stride wants to learn, though it may not pay.
            copies = bool(stages.copies) and not (stages.spec.learn and stages.spec.learn.stride)
            self.schedule = UpdateSchedule(learner, clock=by_clock, copies=copies)
        self._beside, self._left_out = False, 0
        """Whether prompts were read beside the last round, and rounds since one that no prompt held
        up."""

    def _copying(self, stages: RoundStages) -> Copying:
        block_cost, most = 0.0, stages.copies
        if stages.drafter and stages.gamma:
            weights = sum(w.numel() for w in stages.target.model.parameters())
            block_cost = stages.drafter.weights_read(stages.gamma) / weights
        # A graph is captured for each width.
        widths = tuple(sorted({min(n, most) for n in COPY_WIDTHS})) if self._captured else ()
        costs = self.copy_costs
        return Copying(self._rows.count, most, block_cost=block_cost, widths=widths, costs=costs)

    def plan(self, unobserved: int | None = None, *, reads_spans: bool) -> RoundPlan:
        """The next round, of all rows that are active.

        Args:
            unobserved: Draft length of the last round, where `observe` is told of it only later.
            reads_spans: Whether no stage needs to know how far back a row reads.
        """
        rows = self._rows
        active, copies = rows.active(), dict[int, list[int]]()
        draft_length, copy_length = self.policy.choose(unobserved), 0
        if self.copying:
            copies = self.copying.choose(active, rows.tokens, drafts=draft_length > 0)
            copy_length = self.copying.length(copies)
        if len(copies) == len(active):  # nobody needs the drafter
            draft_length = 0
        longest, processors = self._longest(active), self._sampling.processors(active)
        if self._captured:
            processors = self._sampling.captured(processors)
        reach = rows.slots if reads_spans else longest
        shape = RoundShape(reach, draft_length, copy_length, processors, not self.policy.pauses)
        return RoundPlan(active, shape, longest, copies)

    def plan_after(self, last: RoundPlan) -> RoundPlan:
        """The round after one that is under way, where nothing is copied."""
        active, length = self._rows.active(), self.policy.choose(last.shape.draft_length)
        shape = last.shape._replace(draft_length=length, absorbs=not self.policy.pauses)
        return RoundPlan(active, shape, self._longest(active), {})

    def may_copy_after(self, last: RoundPlan) -> bool:
        """Whether rows may copy in the round after one that is not read yet."""
        drafts = last.shape.draft_length > 0
        return bool(
            self.copying
            and self.copying.expects(self._rows.active(), self._rows.tokens, drafts=drafts)
        )

    def shapes(self, processors: Processors) -> list[RoundShape]:
        """Shapes that rounds may have where no stage needs to know how far back a row reads."""
        slots, one, adaptive = self._rows.slots, self._rows.count == 1, self.policy.adaptive
        copied = self.copying.widths if self.copying else ()
        shapes = list[RoundShape]()
        for drafted in {0, *self.policy.lengths}:
            if drafted or adaptive or not self.policy.lengths[-1]:
                shapes.append(RoundShape(slots, drafted, 0, processors))
            if not (drafted and one):
                shapes += [RoundShape(slots, drafted, copies, processors) for copies in copied]
        if adaptive:  # while the drafter pauses
            pause = RoundShape(slots, 0, 0, processors, absorbs=False)
            shapes += [pause._replace(copy_length=copies) for copies in (0, *copied)]
        # Drafts first: what is kept of a round is as wide as theirs.
        return sorted(shapes, key=lambda shape: -shape.draft_length)

    def observe(
        self,
        plan: RoundPlan,
        time: RoundTime,
        outcomes: dict[int, RowOutcome],
        rows: int,
        *,
        chained: bool = False,
        beside: bool = False,
    ) -> None:
        """Take note of a round that is over.

        Args:
            plan: What it was to do.
            time: What it took.
            outcomes: What it did to the rows that took part.
            rows: Rows that cost something.
            chained: Whether the device went on by itself.
            beside: Whether prompts were read meanwhile, or the host had other work, so that its
                time says little.
        """
        policy, learner = self.policy, self._learner
        held_up, self._beside = beside or self._beside, beside  # their rows begin in the next round
        self._left_out = self._left_out + 1 if held_up else 0
        untimed = time.captured or 0 < self._left_out <= LEFT_OUT
        draft_length, copy_length = plan.shape.draft_length, plan.shape.copy_length
        updated = any(outcome.updated for outcome in outcomes.values())
        if learner and learner.memory_trainer:  # it learns whether or not the drafter drafts
            untimed = untimed or updated or learner.is_updating
        emitted = sum(len(outcome.tokens) for outcome in outcomes.values())
        if self.copy_costs and not untimed:
            # Where all rows copy, the drafter drafts for none of them, as it else would.
            drafts = not policy.pauses and policy.lengths[-1] > 0 if copy_length else False
            self.copy_costs.observe(
                len(outcomes),
                drafts or draft_length > 0,
                copy_length,
                time.seconds,
                tokens=emitted,
                chained=chained,
            )
        if not (policy.adaptive or self.schedule):
            return
        without, accepted = 0, []
        for outcome in outcomes.values():
            without += len(outcome.tokens) if outcome.copied else 1
            if not outcome.copied:
                accepted.append(outcome.accepted)
        policy.observe(
            draft_length,
            time.seconds,
            emitted=emitted / without,
            accepted=accepted,
            context=plan.longest,
            copying=len(accepted) < len(outcomes),
            rows=rows,
            chained=chained,
            untimed=untimed,
        )
        if learner and self.schedule and not time.captured:
            mean = sum(accepted) / len(accepted) if accepted and draft_length else None
            if mean is not None or learner.memory_trainer:
                gain = policy.gain
                self.schedule.observe(time.seconds, updated, mean, gain=gain, beside=held_up)

    def _longest(self, active: list[int]) -> int:
        """The longest row's length; with graphs, the largest that reads as many slots."""
        longest, slots = max(self._rows.lengths[row] for row in active), self._rows.slots
        if not self._captured:
            return longest
        reach = reach_of(longest + self._width, slots, BUCKET)
        return slots if reach == slots else reach - self._width
