"""One round of speculative decoding: draft, verify, accept, commit, learn. Start at `round`.

A round is computed for all rows at once; what it says of rows that take no part is dead. What the
device computes is in `stages.py`. Weights change in `learner.absorb` and nowhere else: what drafted
a round is what it is judged by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ttspec.acceptance import BROKEN
from ttspec.decoding.copy_costs import CopyCosts
from ttspec.decoding.copying import Copying
from ttspec.decoding.feedback import PolicyFeedback
from ttspec.decoding.policy import DraftPolicy, FixedDraftLength
from ttspec.decoding.prefill import PromptReader
from ttspec.decoding.rows import RoundPlan, RoundShape, RowOutcome, RowVerdict
from ttspec.decoding.stages import DecoderSpec, RoundStages
from ttspec.decoding.timing import RoundTimer, StageMarks
from ttspec.drafters.base import Drafter
from ttspec.learning.learner import Learner
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.update_schedule import AFTER, UpdateSchedule
from ttspec.models.target import Target
from ttspec.models.weight_checks import not_finite
from ttspec.records import LONGEST_COPY, Verification
from ttspec.rowcache import BUCKET, reach_of

COPY_WIDTHS = 7, LONGEST_COPY
"""Tokens that copies may have where rounds are captured: as few as a draft has, or all."""


class Launched(NamedTuple):
    """A round that the device works on."""

    plan: RoundPlan
    verification: Verification
    read_verdicts: Callable[[], list[list[int]]]
    """Waits for the device; gives the verdict of each row, as `RowVerdict.of` takes it."""
    kept: bool
    """Whether the learner keeps the verification to train on it."""
    chained: bool
    """It began where the device left the round before, which the host had not read yet."""
    marks: StageMarks


class SpeculativeRound(RoundStages):
    """Target, drafter and rows; `round` is one round of all rows that take part."""

    reads_prompts: type[PromptReader] = PromptReader

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        spec: DecoderSpec,
        *,
        live_weights: LiveWeights | None = None,
        policy: DraftPolicy | None = None,
        compile: bool = False,
    ) -> None:
        """Allocate caches, and what learns.

        Args:
            target: Verifies.
            drafter: Drafts; None is plain decoding.
            spec: Rows and options.
            live_weights: In scope shared, the weights that learn from all requests.
            policy: What an adaptive policy knows already.
            compile: Compile what rounds do, on a GPU.
        """
        super().__init__(target, drafter, spec, compile=compile)
        self.timer, self.round_number = RoundTimer(target.device), 0
        self.launched: Launched | None = None
        """The next round, where it was launched ahead."""
        self.prompts = self.reads_prompts(
            target, self.cache, drafter, self.state, self.row_sampling, self.rows, self.deferred
        )
        self.learner = self.prompts.learner = self._learner(live_weights)

        # Who decides what is drafted and copied.
        # With the rejection rule a round has noise of its own: its length would change the text.
        repeats = self.batch_invariant or self.sampling.acceptance == "rejection"
        by_clock = spec.draft.adaptive and not repeats
        self.policy: DraftPolicy | FixedDraftLength = FixedDraftLength(self.gamma)
        if by_clock and self.state is not None:
            # Where a graph is launched a block that is drafted at once is no cheaper if shorter.
            halvings = 0 if self.graphs.on and drafter and drafter.at_once else 2
            self.policy = policy or DraftPolicy(self.gamma, halvings=halvings)
        copy_costs = None
        if by_clock and spec.rows > 1:  # one row's copy is paid for by all
            copy_costs = self.policy.copy_costs or CopyCosts()
        self.copying = self._copying(copy_costs) if self.copies else None
        schedule = None
        if spec.draft.adaptive and self.learner:
            # Who gives a stride wants to learn, though it may not pay.
            copies = bool(self.copies) and spec.learn is not None and not spec.learn.stride
            schedule = UpdateSchedule(self.learner, clock=by_clock, copies=copies)
        self.feedback = PolicyFeedback(self.learner, schedule, copy_costs)

    def _learner(self, live_weights: LiveWeights | None) -> Learner | None:
        learn, drafter = self.spec.learn, self.drafter
        if learn is None or drafter is None or self.state is None or not drafter.weights:
            return None
        return Learner(
            learn,
            drafter,
            self.state,
            self.spec.rows,
            self.gamma,
            live_weights=live_weights,
            run=self.graphs,
            after=AFTER if self.spec.draft.adaptive else 0,
        )

    def _copying(self, costs: CopyCosts | None) -> Copying:
        block_cost, copies = 0.0, self.copies
        if self.drafter and self.gamma:
            weights = sum(w.numel() for w in self.target.model.parameters())
            block_cost = self.drafter.weights_read(self.gamma) / weights
        # A graph is captured for each width.
        wide = tuple(sorted({min(n, copies) for n in COPY_WIDTHS})) if self.graphs.on else ()
        return Copying(self.spec.rows, copies, block_cost=block_cost, widths=wide, costs=costs)

    @torch.no_grad()
    def round(self, *, ahead: bool = False) -> dict[int, RowOutcome]:
        """Draft, verify, accept, commit, learn: one round of all rows that take part.

        Args:
            ahead: Launch the next round before the host does what is left to do for this one; not
                where a row has ended, or the host must see drafts.

        Returns:
            What it did to each of them, by row.
        """
        launched, self.launched = self.launched or self._launch(), None  # draft, verify, accept
        following = None
        if ahead and self._is_chainable(launched):
            following = self._launch(after=launched)
        verdicts = self._read_verdicts(launched)  # the round's one wait for the device
        logits, logprobs_of = launched.verification.logits, self.row_sampling.logprobs.of
        logprobs = {row: logprobs_of(row, logits, row, v.tokens) for row, v in verdicts.items()}

        self._commit(launched, verdicts)
        updated = self._learn(launched, verdicts, following)
        time, cost = self.timer.finish(launched.marks), self.rows.count
        if self._target_rows is not None:
            cost = len(self._target_rows)
        if ahead:
            self._launch_ahead(launched.plan, following)

        shape, copies = launched.plan.shape, launched.plan.copies
        length = None if copies else self.policy.reported(shape.draft_length)
        outcomes = {
            row: RowOutcome(*v, updated[row], time.stages, length, row in copies, logprobs[row])
            for row, v in verdicts.items()
        }
        self.feedback.observe(
            self.policy, launched.plan, time, outcomes, cost, chained=launched.chained
        )
        return outcomes

    def _launch(self, unobserved: int | None = None, after: Launched | None = None) -> Launched:
        """Let the device draft, verify and accept.

        Args:
            unobserved: Draft length of a round that the policy has not observed yet.
            after: A round that was not read yet, where the device goes on from.
        """
        marks = self.timer.start()
        if after:
            plan = self._plan_after(after.plan)
            self.timer.lap(after.marks)  # it teaches nothing
        else:
            plan = self._plan(unobserved)
            self._prepare(plan)
        self._proposed = self.graphs(self.propose, plan.shape, first=True)
        self.timer.lap(marks)
        self._ask_masks(plan)
        changes = [self.rows.uploaded]  # which a warm-up moves on, too
        verification, table = self.graphs(self.verify_and_accept, plan.shape, changes=changes)
        read_verdicts, drafted = self.rows.download(table), plan.shape.draft_length > 0
        self.timer.lap(marks)
        kept = self._is_kept(plan.shape, ahead=int(after is not None))
        if kept and self.learner:  # now: the next round may overwrite it before it is read
            self.learner.keep(verification, plan.shape, drafted=drafted)
        return Launched(plan, verification, read_verdicts, kept, after is not None, marks)

    def _read_verdicts(self, launched: Launched) -> dict[int, RowVerdict]:
        """What the target decided about each row that takes part; waits for the device.

        Raises:
            TargetError: Its logits are not finite.
        """
        table = launched.read_verdicts()
        if any(table[row][3] >= BROKEN for row in launched.plan.active):
            raise not_finite(self.target.name, self.target.dtype)
        self.round_number += 1
        return {row: RowVerdict.of(table[row]) for row in launched.plan.active}

    def _commit(self, launched: Launched, verdicts: dict[int, RowVerdict]) -> None:
        """Move each row's length on the host; no key or value is copied."""
        shape, copies = launched.plan.shape, launched.plan.copies
        for row, verdict in verdicts.items():
            self.prompts.rollback.validate(row)  # to where the round began
            self.rows.commit(row, verdict.tokens)
            if verdict.ended:
                self.rows.budget[row] = 0
            if self.copying:
                drafted = shape.draft_length > 0 and row not in copies
                self.copying.commit(row, verdict.tokens, verdict.accepted if drafted else None)
        self.deferred.after_round(launched.verification, _emitted(verdicts), shape)

    def _learn(
        self, launched: Launched, verdicts: dict[int, RowVerdict], following: Launched | None
    ) -> list[bool]:
        """Let the learner take note of a round; of each row, whether an update was published.

        `following` is the round after it, if that is under way.
        """
        learner, (active, shape, longest, _) = self.learner, launched.plan
        if learner and learner.memory_trainer:
            learner.memory_trainer.records_prompts = launched.kept
        trains = shape.absorbs and (shape.proposed > 0 or bool(learner and learner.memory_trainer))
        if learner is None or not (launched.kept or trains):
            return [False] * self.rows.count
        return learner.absorb(
            longest,
            active,
            drafted=shape.draft_length > 0,
            emitted=_emitted(verdicts),
            kept=launched.kept,
            ahead=1 + max(self.policy.lengths) if following else 0,
        )

    def _launch_ahead(self, last: RoundPlan, following: Launched | None) -> None:
        """Launch the next round, unless it is under way or the host must see it first."""
        active = self.rows.active()
        if following:  # the device knows as well which rows have ended
            plan = following.plan._replace(active=active)
            self.launched = following._replace(plan=plan) if active else None
        elif active == last.active and not self._is_masked(active):
            self.launched = self._launch(unobserved=last.shape.draft_length)

    def drop(self, row: int) -> None:
        """Forget a round that was launched ahead, if the row takes part: what it wrote is dead."""
        if self.launched and row in self.launched.plan.active:
            self.launched = None

    def _is_masked(self, rows: list[int]) -> bool:
        """Whether the host must look at drafts of some rows before they are verified."""
        return bool((masks := self.row_sampling.masks) and masks.masked(rows))

    def _plan(self, unobserved: int | None) -> RoundPlan:
        """The next round, of all rows that are active."""
        active, copies = self.rows.active(), dict[int, list[int]]()
        draft_length, copy_length = self.policy.choose(unobserved), 0
        if self.copying:
            drafts = draft_length > 0
            copies = self.copying.choose(active, self.rows.tokens, drafts=drafts)
            copy_length = self.copying.length(copies)
        if len(copies) == len(active):  # nobody needs the drafter
            draft_length = 0
        longest = self._longest(active)
        processors = self.row_sampling.processors(active)
        if self.graphs.on:
            processors = self.row_sampling.captured(processors)
        reach = self.rows.slots if self._reads_spans else longest
        absorbs = not self.policy.pauses
        shape = RoundShape(reach, draft_length, copy_length, processors, absorbs)
        return RoundPlan(active, shape, longest, copies)

    def _plan_after(self, last: RoundPlan) -> RoundPlan:
        """The round after one that is under way, where nothing is copied."""
        length = self.policy.choose(last.shape.draft_length)
        shape = last.shape._replace(draft_length=length, absorbs=not self.policy.pauses)
        return last._replace(shape=shape, copies={})

    def _prepare(self, plan: RoundPlan) -> None:
        """Bring rows, caches and the device's inputs to where the round begins."""
        self.deferred.before_round(plan.active, plan.shape)
        self.prompts.restore(plan.active)
        self.prompts.rollback.invalidate(plan.active)  # until they are committed
        self.rows.upload(self.round_number, plan.copies)
        self._choose_rows(plan.active)

    def _is_kept(self, shape: RoundShape, ahead: int = 0) -> bool:
        """Whether the learner keeps a round of this shape.

        Args:
            shape: See above.
            ahead: Rounds that were launched before it and are not committed.
        """
        learner = self.learner
        if learner is None:
            return False
        if learner.memory_trainer is None:
            return shape.proposed > 0 and shape.absorbs and learner.needs(ahead)
        number = self.round_number + 1 + ahead
        return learner.memory_trainer.records(number, max(learner.strides, 1 + (not shape.absorbs)))

    def _is_chainable(self, launched: Launched) -> bool:
        """Whether the round after one that is under way can begin where the device leaves it.

        What a round returns is overwritten by the one after, and by the graphs that a learner runs
        in between: so the host may not look at either. What a row learns for itself from one round
        drafts the next.
        """
        last, rows = launched.plan, self.rows
        if not (self.works_ahead and self._reads_spans) or last.copies:
            return False
        active, shape, after = last.active, last.shape, self._plan_after(last).shape
        learns_for_itself = self.learner is not None and self.learner.memory_trainer is None
        drafts = shape.draft_length > 0
        return (
            after.absorbs == shape.absorbs
            and not (learns_for_itself and (launched.kept or self._is_kept(after, ahead=1)))
            and any(rows.budget[row] > shape.proposed + 1 for row in active)
            and self.deferred.needs_nothing(shape, after)
            and not self._is_masked(active)
            and not self.row_sampling.logprobs.asked(active)
            and not (self.copying and self.copying.expects(active, rows.tokens, drafts=drafts))
        )

    def _ask_masks(self, plan: RoundPlan) -> None:
        """Ask the rows' masks, if any, about the drafts: only then the device is waited for."""
        masks = self.row_sampling.masks
        if masks is None or not (rows := masks.masked(plan.active)):
            return
        drafts: list[list[int]] = [[] for _ in rows]
        if plan.shape.proposed:
            proposal, _ = self._proposed
            drafted = torch.cat([proposal.count[:, None], proposal.tokens], dim=1).tolist()
            drafts = [drafted[row][1 : 1 + drafted[row][0]] for row in rows]
        masks.ask(rows, [self.rows.answer(row) for row in rows], drafts)

    def _choose_rows(self, active: list[int]) -> None:
        """Leave out rows that take no part, where they would cost something: not on a GPU."""
        if not self.cache.moves_rows:
            return
        rows, count = self.cache.make_adjacent(active), self.rows.count
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


def _emitted(verdicts: dict[int, RowVerdict]) -> dict[int, int]:
    """Tokens that each row committed."""
    return {row: len(verdict.tokens) for row, verdict in verdicts.items()}
