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

from collections.abc import Callable
from typing import NamedTuple

import torch

from ttspec.acceptance import BROKEN
from ttspec.decoding.copying import Copying
from ttspec.decoding.feedback import PolicyFeedback
from ttspec.decoding.policy import DraftPolicy, FixedDraftLength
from ttspec.decoding.prefill import PromptReader
from ttspec.decoding.rows import RoundShape, RowOutcome, RowVerdict
from ttspec.decoding.stages import RoundStages
from ttspec.decoding.timing import Marks, RoundTimer
from ttspec.learning.learner import Learner
from ttspec.models.capture import Graphs
from ttspec.models.weights import not_finite
from ttspec.records import Verification
from ttspec.rowcache import BUCKET, reach_of


class Launched(NamedTuple):
    """A round that the device works on."""

    active: list[int]
    """Rows that take part."""
    shape: RoundShape
    longest: int
    copies: dict[int, list[int]]
    """These two as `_plan` says."""
    verification: Verification
    read: Callable[[], list[list[int]]]
    """Waits for the verdict's table, and gives its rows."""
    heard: bool
    """Whether the learner is told what the target said."""
    chained: bool
    """It began where the device left the round before, of which the host knew nothing yet."""
    marks: Marks


class SpeculativeRound(RoundStages):
    """Target, drafter and rows; `round` is one round of all rows that take part."""

    policy: DraftPolicy | FixedDraftLength
    copying: Copying | None
    """None where no row ever copies."""
    learner: Learner | None
    prompts: PromptReader
    timer: RoundTimer
    feedback: PolicyFeedback
    graphs: Graphs
    round_number: int = 0
    """Rounds so far."""
    launched: Launched | None = None
    """The next round, where it was launched ahead."""

    @torch.no_grad()
    def round(self, *, ahead: bool = False) -> dict[int, RowOutcome]:
        """Propose, verify, accept, commit, hand on: one round of all rows that take part.

        Args:
            ahead: Launch the next round before the host does what is left to do for this one; not
                where a row has ended, or the host must see drafts.

        Returns:
            What it did to each of them, by row.
        """
        launched, self.launched = self.launched or self._launch(), None
        following = None
        if ahead and self._is_chainable(launched):
            following = self._launch(after=launched)
        active, shape, longest, copies, verification = launched[:5]
        verdict = launched.read()  # the round's one wait for the device
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
        updated = self._teach(launched, emitted, following)
        took, some, left = self.timer.finish(launched.marks), self._target_rows, self.rows.active()
        if following:  # the device knows as well which rows have ended
            self.launched = following._replace(active=left) if left else None
        elif ahead and left == active and not self._is_masked(active):
            self.launched = self._launch(unobserved=shape.draft_length)

        reported = None if copies else self.policy.reported(shape.draft_length)
        outcomes = {
            row: RowOutcome(*of_row, updated[row], took.stages, reported, row in copies, told[row])
            for row, of_row in verdicts.items()
        }
        cost = self.rows.count if some is None else len(some)
        self.feedback.observe(
            self.policy, took, shape, longest, outcomes, cost, chained=launched.chained
        )
        return outcomes

    def _teach(
        self, launched: Launched, emitted: dict[int, int], following: Launched | None
    ) -> list[bool]:
        """Let the learner take note of a round; of each row, whether what it learned is published.

        Args:
            launched: See above.
            emitted: Tokens that each row committed.
            following: The round after it, if it is under way.
        """
        learner, shape = self.learner, launched.shape
        if not learner:
            return [False] * self.rows.count
        if learner.study:
            learner.study.listens = launched.heard
        counts = shape.absorbs and (shape.proposed > 0 or learner.study is not None)
        if not (launched.heard or counts):
            return [False] * self.rows.count
        return learner.absorb(
            launched.longest,
            launched.active,
            drafted=shape.draft_length > 0,
            emitted=emitted,
            told=launched.heard,
            ahead=1 + max(self.policy.lengths) if following else 0,
        )

    def _launch(self, unobserved: int | None = None, after: Launched | None = None) -> Launched:
        """Let the device propose, verify and accept.

        Args:
            unobserved: Draft length of a round of which the policy was not told yet.
            after: A round that was not read yet, where the device goes on from.
        """
        marks, chained = self.timer.start(), after is not None
        if after:
            active, copies = after.active, dict[int, list[int]]()
            shape, longest = self._next_shape(after), after.longest
            self.timer.lap(after.marks)  # nothing is learned from it
        else:
            active = self.rows.active()
            shape, longest, copies = self._plan(active, unobserved)
            self.deferred.before_round(active, shape)
            self.prompts.restore(active)
            self.prompts.rollback.invalidate(active)  # until they are committed
            self.rows.upload(self.round_number, copies)
            self._choose_rows(active)
        self._proposed = self.graphs(self.propose, shape, first=True)
        shape = self._trim_by_confidence(active, shape)
        self.timer.lap(marks)
        self._ask_masks(active, shape)
        changes = [self.rows.uploaded]  # which a warm-up moves on, too
        verification, table = self.graphs(self.verify_and_accept, shape, changes=changes)
        read = self.rows.download(table)
        self.timer.lap(marks)
        heard = self._is_heard(shape, ahead=int(chained))
        if heard and self.learner:  # now: the next round may overwrite it before it is read
            self.learner.keep(verification, shape, drafted=shape.draft_length > 0)
        return Launched(active, shape, longest, copies, verification, read, heard, chained, marks)

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

    def _is_heard(self, shape: RoundShape, ahead: int = 0) -> bool:
        """Whether the learner is told what the target said in a round of this shape.

        Args:
            shape: See above.
            ahead: Rounds that were launched before it and are not committed.
        """
        learner, number = self.learner, self.round_number + 1 + ahead
        if learner is None:
            return False
        if learner.study is None:
            return shape.proposed > 0 and shape.absorbs and learner.needs(ahead)
        return learner.study.hears(number, max(learner.strides, 1 + (not shape.absorbs)))

    def _is_chainable(self, last: Launched) -> bool:
        """Whether the round after one that is under way can begin where the device leaves it.

        What a round returns is overwritten by the one after, and by the graphs that a learner runs
        in between: so the host may not look at either. What a row learns for itself from one round
        drafts the next.
        """
        shape, active, rows = last.shape, last.active, self.rows
        for_itself = self.learner is not None and self.learner.study is None
        if not (self.works_ahead and self._reads_spans) or last.copies:
            return False
        after, drafts = self._next_shape(last), shape.draft_length > 0
        return (
            after.absorbs == shape.absorbs
            and not (for_itself and (last.heard or self._is_heard(after, ahead=1)))
            and any(rows.budget[row] > shape.proposed + 1 for row in active)
            and self.deferred.needs_nothing(shape, after)
            and not self._is_masked(active)
            and not self.row_sampling.logprobs.asked(active)
            and not (self.copying and self.copying.expects(active, rows.tokens, drafts=drafts))
        )

    def _next_shape(self, last: Launched) -> RoundShape:
        """That of the round after one that is under way, where nothing is copied."""
        length = self.policy.choose(last.shape.draft_length)
        return last.shape._replace(draft_length=length, absorbs=not self.policy.pauses)

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
