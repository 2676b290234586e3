"""Copying beside a drafter: what followed the place where the last tokens stood before.

Known as prompt lookup or suffix decoding. A copy costs no forward of the drafter, is up to 31
tokens long, and is verified as any draft is. A row copies where that promises more than a draft,
by how often copies after a match of such a length were right lately; the row's own text says it
for every token that is committed, copied or not. Of several rows, which all read as much as the
longest copy has, none copies where that does not pay (`copy_costs.py`). Runs on the host, between
two rounds. One row decides by counts alone, no clock, so that its run repeats. Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ttspec.decoding.copy_costs import WIDTHS, CopyCosts
from ttspec.records import LONGEST_COPY

MIN_MATCH = 2
"""Last tokens that must have stood at an earlier place; the newest such place is copied. To look
for the longest match among older ones gained nothing (docs/experiments.md)."""
BUCKETS = (2, 3, 4, 5, 6, 8, 11, 16, 24)
"""The least length of match of each bucket whose copies are counted together."""
MAX_MATCH = BUCKETS[-1]
_BUCKET = [sum(n >= least for least in BUCKETS) - 1 for n in range(MAX_MATCH + 1)]
_BUCKETS_OF_COPY = [
    [_BUCKET[min(match + i, MAX_MATCH)] for i in range(LONGEST_COPY)]
    for match in range(MAX_MATCH + 1)
]
"""Of each token of a copy, by the length of the match."""
PRIOR_CHANCES = (0.49, 0.59, 0.64, 0.68, 0.72, 0.77, 0.81, 0.86, 0.92)
"""How often the next token of a copy was right, by bucket, on other text (docs/experiments.md):
what is believed before a row has said otherwise."""
PRIOR_WEIGHT = 8.0
"""Tokens for which that belief counts."""
MEMORY = 64.0
"""Tokens of a bucket that are remembered."""
MIN_CHANCE, MIN_FREE_CHANCE = 0.15, 0.01
"""A copy ends where the chance that a token is kept falls below this: the second where rounds in
which rows copy are all as wide, and only the host's time is spared."""
WIDTH_COST = 0.15
"""What the next width of a round is taken to cost more where no clock may decide."""
TRUST_MEMORY = 256.0
"""Tokens promised by copies of several rows that are remembered, with what was kept of them."""
TRUST_LIFETIME = 1024
"""Looks for copies after which that is forgotten if no row copied since: who is not trusted never
copies, and would not be trusted for ever."""
PRIOR_ACCEPTED, ROUNDS_REMEMBERED = 1.0, 16.0
"""Drafts that a drafter is thought to get accepted before it was seen, and rounds remembered."""


class Copy(NamedTuple):
    """Tokens that stood behind an earlier place."""

    tokens: list[int]
    chances: list[float]
    """How likely each is kept."""

    @property
    def expected(self) -> float:
        """How many of them are expected to be kept."""
        return sum(self.chances)

    def first(self, most: int) -> Copy:
        """The same, cut to its first tokens."""
        return Copy(self.tokens[:most], self.chances[:most])


class SuffixIndex:
    """One row's tokens, and where its last ones stood before."""

    def __init__(self) -> None:
        self._forget()
        self._hits = [PRIOR_WEIGHT * chance for chance in PRIOR_CHANCES]
        self._tries = [PRIOR_WEIGHT] * len(PRIOR_CHANCES)
        self._rates = list(PRIOR_CHANCES)
        """How often copies were right lately, by bucket."""

    def _forget(self) -> None:
        """Hold no token; `follow` takes all anew."""
        self._tokens: list[int] = []
        self._newest: dict[tuple[int, ...], int] = {}
        """By `MIN_MATCH` tokens: where the token after their newest place stands."""
        self._older: list[int] = []
        """By place: the one before it with the same tokens in front, or 0."""
        self._place = self._match = 0
        """Where the next token stood before, and how many tokens before both places agree; 0 and 0
        if nowhere."""
        self._changes = False
        """Within a change; still so after an interrupt in the middle of one."""

    def extend(self, tokens: Sequence[int], *, count: bool) -> None:
        """Append tokens; `count` whether copies of them would have been right."""
        ours, newest, older = self._tokens, self._newest, self._older
        self._changes = True
        for token in tokens:
            place, match = self._place, self._match
            is_next = place > 0 and ours[place] == token
            if count and place:
                bucket = _BUCKET[match]
                if self._tries[bucket] >= MEMORY:
                    self._tries[bucket] *= 1 - 1 / MEMORY
                    self._hits[bucket] *= 1 - 1 / MEMORY
                self._tries[bucket] += 1
                self._hits[bucket] += is_next
                self._rates[bucket] = self._hits[bucket] / self._tries[bucket]
            ours.append(token)
            end = len(ours)
            gram = tuple(ours[-MIN_MATCH:])
            before = newest.get(gram, 0)
            older.append(before)
            if end >= MIN_MATCH:
                newest[gram] = end
            if is_next:
                self._place, self._match = place + 1, min(match + 1, MAX_MATCH)
            else:
                self._find(before)
        self._changes = False

    def follow(self, text: Sequence[int]) -> None:
        """Take what a row holds: a prompt more, whose first token may replace the last one here."""
        ours = self._tokens
        if ours and (len(text) < len(ours) or text[len(ours) - 1] != ours[-1]):
            self.crop(min(len(text), len(ours) - 1))
        self.extend(text[len(ours) :], count=False)

    def crop(self, length: int) -> None:
        """Take back the tokens from `length` on; all, if a change before was interrupted."""
        if self._changes:
            self._forget()
        if length >= len(self._tokens):
            return
        self._changes = True
        for end in range(len(self._tokens), max(length, MIN_MATCH - 1), -1):
            gram = tuple(self._tokens[end - MIN_MATCH : end])
            before = self._older[end - 1]
            if before:
                self._newest[gram] = before
            else:
                del self._newest[gram]
        del self._tokens[length:], self._older[length:]
        self._find(self._older[-1] if length else 0)
        self._changes = False

    def copy(self, most: int, least: float = MIN_CHANCE) -> Copy:
        """Up to `most` tokens that may come next, each kept with a chance of `least` or more."""
        place, ours, chance, chances = self._place, self._tokens, 1.0, list[float]()
        if not place:
            return Copy([], chances)
        rates = self._rates
        for bucket in _BUCKETS_OF_COPY[self._match][:most]:
            chance *= rates[bucket]
            if chance < least:
                break
            chances.append(chance)
        copied = ours[place : place + len(chances)]
        while copied and len(copied) < len(chances):  # past the end: what was copied goes on
            copied += copied[: len(chances) - len(copied)]
        return Copy(copied, chances)

    @property
    def has_match(self) -> bool:
        """Whether the last tokens stood before."""
        return self._place > 0

    def _find(self, place: int) -> None:
        """Take an earlier place, if there is one, and count the tokens that agree before it."""
        self._place, self._match = place, 0
        if not place:
            return
        ours, end = self._tokens, len(self._tokens)
        match, most = MIN_MATCH, min(place, MAX_MATCH)
        while match < most and ours[place - match - 1] == ours[end - match - 1]:
            match += 1
        self._match = match


class Copying:
    """The copies of all rows, and which rows copy instead of drafting."""

    def __init__(
        self,
        rows: int,
        most: int,
        *,
        block_cost: float = 0.0,
        widths: Sequence[int] = (),
        costs: CopyCosts | None = None,
    ) -> None:
        """No row has tokens.

        Args:
            rows: How many there are.
            most: Tokens copied in a round at most.
            block_cost: What a drafter's block costs, in rounds without one: a copy may bring so
                much less. From the weights that it reads, not from a clock.
            widths: Rounds in which rows copy are as wide as one of these, ascending; of none, as
                the longest copy.
            costs: What wide rounds take, by the clock: rows copy where the round pays, and look
                for copies where looking does. Without it each row copies where that promises more
                than a draft.
        """
        self.most, self._block_cost, self.widths = most, block_cost, widths
        self._least = MIN_FREE_CHANCE if widths else MIN_CHANCE
        self._costs = costs
        self._rows = [SuffixIndex() for _ in range(rows)]
        self._accepted = [PRIOR_ACCEPTED] * rows
        """Drafts of the drafter that were accepted a round, on average."""
        self._stale = False
        """Whether rows have tokens that were not looked at."""
        self._promised: dict[int, float] = {}
        """By row that copies in the round under way, tokens that are expected to be kept."""
        self._all_promised = self._all_kept = TRUST_MEMORY / 4
        self._looks = 0
        """For copies, since a row copied."""

    @property
    def _trust(self) -> float:
        """What copies kept of what they promised lately, by all rows.

        Those that promise most are chosen, and promise too much; a short answer never finds out
        what its own copies are worth. One row alone decides without it.
        """
        return min(1.0, self._all_kept / self._all_promised) if self._costs else 1.0

    def choose(
        self, active: Sequence[int], tokens: Sequence[Sequence[int]], *, drafts: bool
    ) -> dict[int, list[int]]:
        """Copies of the rows that copy in the next round.

        Args:
            active: Rows that take part.
            tokens: Each row's committed tokens and its pending one.
            drafts: Whether there is a drafter, which drafts for the others.
        """
        self._promised = {}
        if self._costs and not self._costs.search.is_on:
            self._stale = True
            return {}
        self._looks += 1
        if self._looks % TRUST_LIFETIME == 0:
            self._all_promised = self._all_kept = TRUST_MEMORY / 4
        copies, self._stale, trust = dict[int, Copy](), False, self._trust
        for row in active:
            index = self._rows[row]
            index.follow(tokens[row])
            if (copy := index.copy(self.most, self._least)).tokens:
                copies[row] = copy
        if not copies:
            return {}
        accepted = {row: self._accepted[row] if drafts else 0.0 for row in active}
        most = self.most
        if self._costs:
            chances = {row: [trust * c for c in copy.chances] for row, copy in copies.items()}
            widths = self.widths or WIDTHS
            most = self._costs.worthwhile(chances, accepted, drafts=drafts, widths=widths)
        if not most:
            return {}
        block_cost = self._block_cost if drafts else 0.0
        least = {row: (1 + accepted[row]) / (1 + block_cost) - 1 for row in copies}
        if not self._costs:
            copies = {row: self._cut(copy) for row, copy in copies.items()}
        cut = {row: copy.first(most) for row, copy in copies.items()}
        chosen = {row: copy for row, copy in cut.items() if trust * copy.expected > least[row]}
        self._promised = {row: copy.expected for row, copy in chosen.items()}
        return {row: copy.tokens for row, copy in chosen.items()}

    def expects(
        self, active: Sequence[int], tokens: Sequence[Sequence[int]], *, drafts: bool
    ) -> bool:
        """Whether rows may copy in the round after one that is not read yet; asked as `choose` is.

        One row's copies bring most, and begin where its last tokens stood before: it waits there.
        Several rows go on unless a copy would pay by now: they may begin to copy a round later.
        """
        if len(active) > 1 or (self._costs and not self._costs.search.is_on):
            under_way = self._promised
            found = bool(self.choose(active, tokens, drafts=drafts))
            self._promised = under_way
            return found
        index = self._rows[active[0]]
        index.follow(tokens[active[0]])
        return index.has_match

    def length(self, copies: dict[int, list[int]]) -> int:
        """Width of a round's copies."""
        longest = max(map(len, copies.values()), default=0)
        return next(n for n in (0, *self.widths) if n >= longest) if self.widths else longest

    def _cut(self, copy: Copy) -> Copy:
        """The copy, cut to the width that promises most tokens a time, where no clock says it."""
        best, speed = self.most, 0.0
        for step, width in enumerate(self.widths):
            promised = (1 + sum(copy.chances[:width])) / (1 + WIDTH_COST * step)
            if promised > speed:
                best, speed = width, promised
        return copy.first(best)

    def commit(self, row: int, tokens: Sequence[int], accepted: int | None) -> None:
        """Take note of what a round emitted.

        Args:
            row: Which row.
            tokens: What it emitted.
            accepted: Drafts that it kept of the drafter's; None where the drafter drafted none.
        """
        if not self._stale:  # else the next search takes them
            self._rows[row].extend(tokens, count=True)
        if promised := self._promised.pop(row, 0.0):
            self._looks = 0
            left = max(0.0, 1 - promised / TRUST_MEMORY)
            self._all_promised = left * self._all_promised + promised
            self._all_kept = left * self._all_kept + len(tokens) - 1
        if accepted is not None:
            self._accepted[row] += (accepted - self._accepted[row]) / ROUNDS_REMEMBERED

    def crop(self, row: int, length: int) -> None:
        """A row goes back to `length` tokens."""
        self._rows[row].crop(length)

    def clear(self, row: int) -> None:
        """Another request has the row."""
        self._rows[row], self._accepted[row] = SuffixIndex(), PRIOR_ACCEPTED
