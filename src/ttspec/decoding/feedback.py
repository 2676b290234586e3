"""What a round took and brought, for those who decide about the next ones."""

from __future__ import annotations

from ttspec.decoding.copy_costs import CopyCosts
from ttspec.decoding.policy import DraftPolicy, FixedDraftLength
from ttspec.decoding.rows import RoundPlan, RowOutcome
from ttspec.decoding.timing import RoundTime
from ttspec.learning.learner import Learner
from ttspec.learning.update_schedule import UpdateSchedule


class PolicyFeedback:
    """Tells an adaptive policy, the schedule of updates, and who knows what copies cost."""

    def __init__(
        self, learner: Learner | None, schedule: UpdateSchedule | None, copy_costs: CopyCosts | None
    ) -> None:
        """By `schedule` the learner learns seldom where that does not pay."""
        self._learner, self._schedule, self._copy_costs = learner, schedule, copy_costs

    def observe(
        self,
        policy: DraftPolicy | FixedDraftLength,
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
            policy: Chose its draft length.
            plan: What it was to do.
            time: What it took.
            outcomes: What it did to the rows that took part.
            rows: Rows that cost something.
            chained: Whether the device went on by itself.
            beside: Whether prompts were read meanwhile, so that its time says nothing.
        """
        draft_length, copy_length = plan.shape.draft_length, plan.shape.copy_length
        updated = any(outcome.updated for outcome in outcomes.values())
        learner, first = self._learner, time.captured or beside
        if learner and learner.memory_trainer:  # it learns whether or not the drafter drafts
            first = first or updated or learner.is_updating
        emitted = sum(len(outcome.tokens) for outcome in outcomes.values())
        if self._copy_costs and not first:
            # Where all rows copy, the drafter drafts for none of them, as it else would.
            drafts = not policy.pauses and policy.lengths[-1] > 0 if copy_length else False
            self._copy_costs.observe(
                len(outcomes),
                drafts or draft_length > 0,
                copy_length,
                time.seconds,
                tokens=emitted,
                chained=chained,
            )
        if not (policy.adaptive or self._schedule):
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
            first=first,
        )
        if learner and self._schedule and not time.captured:
            mean = sum(accepted) / len(accepted) if accepted and draft_length else None
            if mean is not None or learner.memory_trainer:
                self._schedule.observe(time.seconds, updated, mean, pauses=policy.pauses)
