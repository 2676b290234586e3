"""A batch of rows that decode: draft, verify, accept, commit, learn. Start at `Decoder.round`.

A round is computed for all rows at once; what it says of rows that take no part is dead. What the
device computes is in `stages.py`, what a round is to do is said by `planner.py`. Weights change in
`learner.absorb` and nowhere else: what drafted a round is what it is judged by.
"""

from __future__ import annotations

import torch

from ttspec.acceptance import BROKEN
from ttspec.decoding.launched import Launched, narrowed_to
from ttspec.decoding.planner import RoundPlanner
from ttspec.decoding.policy import DraftPolicy
from ttspec.decoding.prefill import PromptReader
from ttspec.decoding.rows import RoundPlan, RoundShape, RowOutcome, RowVerdict
from ttspec.decoding.stages import DecoderSpec, RoundStages
from ttspec.decoding.timing import RoundTimer
from ttspec.drafters.base import Drafter
from ttspec.drafters.context import ContextState
from ttspec.learning.learner import Learner
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.shared_learner import SharedLearner
from ttspec.learning.update_schedule import AFTER
from ttspec.models.capture import Graphs
from ttspec.models.target import Target
from ttspec.models.weight_checks import not_finite


class Decoder(RoundStages):
    """Rows that decode side by side, each with its own length, budget and noise.

    Owns what happens on the host: the order of a round's stages, the rounds under way, prompts,
    planner and learner. Caches, rows and what the device computes are `RoundStages`'.
    """

    reads_prompts: type[PromptReader] = PromptReader
    tenant: str | None = None
    """Whose requests its rows may have, where they all teach the same weights."""

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
        self._under_way: tuple[Launched, ...] = ()
        """The next round and perhaps the one after it, if they were launched ahead."""
        self.learner = self._learner(live_weights)
        self.prompts = self.reads_prompts(self, self.learner)
        self.planner = RoundPlanner(self, self.learner, policy)

    def _learner(self, live_weights: LiveWeights | None) -> Learner | None:
        learn, drafter = self.spec.learn, self.drafter
        if learn is None or drafter is None or self.state is None or not drafter.weights:
            return None
        kind = SharedLearner if learn.scope == "shared" else Learner
        return kind(
            learn,
            drafter,
            self.state,
            self.spec.rows,
            self.gamma,
            live_weights=live_weights,
            run=self.graphs,
            after=AFTER if self.spec.draft.adaptive else 0,
        )

    @torch.no_grad()
    def round(self, *, ahead: bool = False) -> dict[int, RowOutcome]:
        """One round of all rows that take part: draft, verify, accept, commit, learn.

        Args:
            ahead: Launch the next round before the host does what is left to do for this one; not
                where the host must see drafts, or a row has ended and none may join meanwhile.

        Returns:
            What it did to each of them, by row.
        """
        under_way = self._under_way or (self._launch(),)  # draft, verify, accept
        self._under_way = ()
        if ahead and len(under_way) == 1 and self._is_chainable(under_way[0]):
            under_way += (self._launch(after=under_way[0]),)
        launched, following = under_way[0], under_way[1] if len(under_way) > 1 else None
        verdicts = self._read_verdicts(launched)  # the round's one wait for the device
        logits, logprobs_of = launched.verification.logits, self.row_sampling.logprobs.of
        logprobs = {row: logprobs_of(row, logits, row, v.tokens) for row, v in verdicts.items()}

        self._commit(launched, verdicts)
        updated = self._learn(launched, verdicts, following)
        time, target_rows = self.timer.finish(launched.marks), self._target_rows
        cost = self.rows.count if target_rows is None else len(target_rows)
        if ahead or following:
            self._launch_ahead(launched.plan, following)

        shape, copies = launched.plan.shape, launched.plan.copies
        length = None if copies else self.planner.policy.reported(shape.draft_length)
        outcomes = {
            row: RowOutcome(*v, updated[row], time.stages, length, row in copies, logprobs[row])
            for row, v in verdicts.items()
        }
        self.planner.observe(
            launched.plan,
            time,
            outcomes,
            cost,
            chained=launched.chained,
            beside=self.prompts.is_launched or not launched.is_timed,
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
            plan = self.planner.plan_after(after.plan)
            self.rows.upload_changed()
            self.timer.lap(after.marks)  # it teaches nothing
        else:
            plan = self.planner.plan(unobserved, reads_spans=self._reads_spans)
            self._prepare(plan)
        if plan.shape.proposed:  # else one graph does all
            self._proposed = self.graphs(self.propose, plan.shape, first=True)
        self.timer.lap(marks)
        self._ask_masks(plan)
        changes = [self.rows.uploaded]  # which a warm-up moves on, too
        verification, table = self.graphs(
            self.verify_and_accept, plan.shape, changes=changes, first=not plan.shape.proposed
        )
        read_verdicts, drafted = self.rows.download(table), plan.shape.draft_length > 0
        self.timer.lap(marks)
        kept = self._is_kept(plan.shape, ahead=int(after is not None))
        if kept and self.learner:  # now: the next round may overwrite it before it is read
            self.learner.keep(verification, plan.shape, drafted=drafted)
        return Launched(plan, verification, read_verdicts, kept, after is not None, marks)

    def _prepare(self, plan: RoundPlan) -> None:
        """Bring rows, caches and the device's inputs to where the round begins."""
        self.deferred.before_round(plan.active, plan.shape)
        self.prompts.restore(plan.active)
        self.prompts.rollback.invalidate(plan.active)  # until they are committed
        self.rows.upload(self.round_number, plan.copies)
        self._choose_rows(plan.active, plan.shape.processors)

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

    def _is_kept(self, shape: RoundShape, ahead: int = 0) -> bool:
        """Whether the learner keeps a round of this shape; `ahead` before it are not committed."""
        number = self.round_number + 1 + ahead
        return self.learner is not None and self.learner.keeps(
            number, ahead, drafted=shape.proposed > 0, absorbs=shape.absorbs
        )

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
            if self.planner.copying:
                drafted = shape.draft_length > 0 and row not in copies
                self.planner.copying.commit(
                    row, verdict.tokens, verdict.accepted if drafted else None
                )
        self.deferred.after_round(_emitted(verdicts), shape)

    def _learn(
        self, launched: Launched, verdicts: dict[int, RowVerdict], following: Launched | None
    ) -> list[bool]:
        """Let the learner take note of a round; of each row, whether an update was published.

        `following` is the round after it, if that is under way.
        """
        learner, plan = self.learner, launched.plan
        if learner and learner.memory_trainer:
            learner.memory_trainer.records_prompts = launched.kept
        trains = plan.shape.proposed > 0 or bool(learner and learner.memory_trainer)
        if learner is None or not (launched.kept or (plan.shape.absorbs and trains)):
            return [False] * self.rows.count
        return learner.absorb(
            plan.longest,
            _emitted(verdicts),
            drafted=plan.shape.draft_length > 0,
            kept=launched.kept,
            ahead=1 + max(self.planner.policy.lengths) if following else 0,
        )

    def _is_chainable(self, launched: Launched) -> bool:
        """Whether the round after one that is under way can begin where the device leaves it.

        What a row learns for itself from one round drafts the next.
        """
        last, budget, asked = launched.plan, self.rows.budget, self.row_sampling
        if not (self.works_ahead and self._reads_spans) or last.copies:
            return False
        (active, after, _, _), shape = self.planner.plan_after(last), last.shape
        learns_for_itself = self.learner is not None and self.learner.memory_trainer is None
        return (
            after.absorbs == shape.absorbs
            and not (learns_for_itself and (launched.kept or self._is_kept(after, ahead=1)))
            and (active != last.active or any(budget[row] > shape.proposed + 1 for row in active))
            and asked.serves(shape.processors, active)
            and not (asked.is_masked(active) or asked.logprobs.asked(active))
            and self.deferred.needs_nothing(shape, after)
            and not self.planner.may_copy_after(last)
        )

    def _launch_ahead(self, last: RoundPlan, following: Launched | None) -> None:
        """Launch the next round, unless it is under way or the host must see it first."""
        active = self.rows.active()
        may = active and (active == last.active or self.begins_beside)
        if following:  # the device knows as well which rows have ended
            self._under_way = narrowed_to(active, following)
        elif may and not self.row_sampling.is_masked(active):
            self._under_way = (self._launch(unobserved=last.shape.draft_length),)

    @property
    def launched(self) -> Launched | None:
        """The next round, where it was launched ahead."""
        return self._under_way[0] if self._under_way else None

    @torch.no_grad()
    def launch_following(self) -> None:
        """Launch the round after the one under way, if the device can go on to it by itself.

        Where rows come and go the host has more to do than a round takes.
        """
        if len(self._under_way) == 1 and self._is_chainable(self._under_way[0]):
            (launched,), self._under_way = self._under_way, ()  # an interrupt forgets both
            both = launched, self._launch(after=launched)
            self._under_way = tuple(one._replace(is_timed=False) for one in both)

    @property
    def begins_beside(self) -> bool:
        """Whether prompts may begin and rows join while a round is under way."""
        captured, active = self.prompts.captured, self.rows.active()
        return bool(captured and captured.can_launch and self._is_read_from_table(active))

    def _is_read_from_table(self, rows: list[int]) -> bool:
        """Whether all that the host wants of a round of some rows is on its way to it.

        What else a round returns is overwritten by the next one, and by the graphs of a learner,
        which is told of rows that end. Not where rows learn for themselves: it was kept for them.
        """
        shares = self.learner is None or self.learner.shared
        return shares and not self.row_sampling.logprobs.asked(rows)

    # Rows come and go.

    def leave(self, row: int) -> None:
        """Take a row out of the rounds under way: what they write of it is dead.

        They are forgotten as a whole where the others need more of them than is on its way.
        """
        if not any(row in one.plan.active for one in self._under_way):
            return
        others = {*range(self.rows.count)} - {row}
        left, self._under_way = narrowed_to(others, *self._under_way), ()
        self.rows.changed.add(row)
        if left and self._is_read_from_table(left[-1].plan.active):
            self._under_way = left

    def rest(self, row: int) -> None:
        """Let a row take no part until it has another prompt."""
        self.leave(row)
        self.rows.budget[row] = 0

    def crop(self, row: int, length: int, pending: int) -> None:
        """Take back what a row committed past `length`; `pending` is the token that comes next."""
        self.leave(row)
        self.deferred.crop(row, self.rows.lengths[row] - length)
        self.rows.crop(row, length, pending)
        self.prompts.crop(row, length)
        if self.planner.copying:
            self.planner.copying.crop(row, length)
        if self.learner:
            self.learner.forget(row, length)

    def clear(self, row: int) -> None:
        """Empty a row for another request; what its drafter learned goes with it."""
        self.leave(row)
        self.rows.clear(row)
        self.row_sampling.set(row)
        if self.planner.copying:
            self.planner.copying.clear(row)
        self.deferred.clear(row)
        self.prompts.clear(row)
        if self.learner:
            self.learner.reset(row)

    def copy(self, source: int, to: int, length: int) -> None:
        """Empty a row, and let it hold the first `length` tokens of another one, read already.

        What the other's drafter learned stays there. Not where the target is recurrent.
        """
        self.clear(to)
        self.prompts.wait()
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
        asked = self.row_sampling.processors(range(self.rows.count))
        for shape in self.planner.shapes(self.row_sampling.captured(asked)):
            if shape.proposed:
                self._proposed = self.graphs(self.propose, shape, first=True)
            verification, _ = self.graphs(self.verify_and_accept, shape, first=not shape.proposed)
            if self.learner and self._is_kept(shape):
                self.learner.keep(verification, shape)
        self.deferred.capture()
        if self.learner:
            self.learner.capture_updates(self.rows.slots)
        # With many tokens the host may count which experts are asked.
        if self.batch_invariant or self.target.recurrent or self.target.is_mixture:
            return
        # Last: what compiles the target moves its weights, and a graph reads them where they were.
        # Of several rows some may decode meanwhile: then nothing that graphs use is in common.
        captured = self.state is None or (self.drafter and self.drafter.takes_padding)
        beside = bool(captured) and self.works_ahead and self.rows.count > 1
        graphs = Graphs(self.target.device, compile=self.compile) if beside else self.graphs
        self.prompts.capture(self, graphs, beside=beside)


def _emitted(verdicts: dict[int, RowVerdict]) -> dict[int, int]:
    """Tokens that each row committed."""
    return {row: len(verdict.tokens) for row, verdict in verdicts.items()}
