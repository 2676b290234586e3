"""A bounded memory of texts: their tokens, what the target saw in them, and what it said of them.

Texts of all rows and requests lie in pages of one table; a row that needs a page takes the oldest.
Nothing is asked of the device, and no text leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttspec.compiled import compiled_for_any
from ttspec.drafters.base import Drafter
from ttspec.losses import rows_at_once

PAGES = 512
"""Pages of a memory, the newest: half of that taught as well (docs/experiments.md)."""
PAGE = 64
"""Tokens of a page."""
LIKELY = 64
"""Tokens of the target's distribution that are kept."""
HELD_OUT_EVERY = 16
"""One page of so many, of each text, teaches nothing."""
FIRST, STEP = 1, 5
"""Which page of the first text, and how many later in the next one: of short answers some do."""


@dataclass(frozen=True, slots=True)
class Texts:
    """N pieces of texts, each of L tokens at most, from its first slot on."""

    tokens: Tensor
    """int64 [N, L]."""
    features: Tensor
    """[N, L, W] of the same tokens."""
    judged: Tensor
    """bool [N, L]: whether it is known what the target said after the token."""
    held_out: Tensor
    """bool [N, L]: which of those shall not teach."""
    last: Tensor
    """bool [N, L]: which of those are of the page that was asked for."""
    likely: Tensor
    """int64 [N, L, K]: the likeliest tokens after it, as places in the draft vocabulary."""
    p: Tensor
    """float [N, L, K]: their probabilities."""
    rest: Tensor
    """float [N, L]: the probability of all others that can be drafted."""


class TextMemory:
    """Pages of texts."""

    def __init__(self, drafter: Drafter, pages: int = PAGES) -> None:
        like, self.pages, self.draft_ids = drafter.embedding, pages, drafter.draft_ids
        here, device = (pages + 1, PAGE), like.device  # the last page takes what is kept nowhere
        self.tokens = torch.zeros(here, dtype=torch.long, device=device)
        self.features = like.new_zeros(*here, feature_width(drafter))
        self.judged = torch.zeros(here, dtype=torch.bool, device=device)
        self.likely = torch.zeros(*here, likely_tokens(drafter), dtype=torch.int32, device=device)
        self.p = torch.zeros(self.likely.shape, dtype=torch.float16, device=device)
        self.rest = torch.zeros(here, dtype=torch.float16, device=device)
        # By page: which text it is of, which page of that text, and the page before.
        self.text = torch.zeros(here[:1], dtype=torch.long, device=device)
        self.number, self.before = torch.zeros_like(self.text), torch.zeros_like(self.text)
        self.crops = device.type == "cpu"
        """Whether texts are read no longer than the longest is; elsewhere one would wait for it."""
        self._next_page = torch.zeros((), dtype=torch.long, device=device)
        self._texts = torch.zeros((), dtype=torch.long, device=device)
        self._generator = torch.Generator(device).manual_seed(0)

    @staticmethod
    def bytes_for(drafter: Drafter, pages: int = PAGES) -> int:
        """Bytes that a memory takes."""
        token = 8 + 1 + 2 + 6 * likely_tokens(drafter)
        token += feature_width(drafter) * drafter.embedding.element_size()
        return (pages + 1) * (PAGE * token + 3 * 8)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tables = (self.tokens, self.features, self.judged, self.likely, self.p, self.rest)
        return sum(table.nbytes for table in (*tables, self.text, self.number, self.before))

    @torch.no_grad()
    def sample(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Pages int64 [count], by how much of them the target judged; and chances [count, L].

        Args:
            count: How many.
            length: Pages of the texts that will be read up to them.
        """
        weight = self.judged.sum(1).float() + 1e-9  # an empty memory gives what teaches nothing
        pages = torch.multinomial(weight, count, replacement=True, generator=self._generator)
        device, shape = weight.device, (count, length * PAGE)
        return pages, torch.rand(shape, generator=self._generator, device=device)

    @torch.no_grad()
    def held_out_pages(self, most: int) -> Tensor:
        """The newest held-out pages, int64 [at most `most`]; waits for the device."""
        held_out = self.is_held_out() & self.judged.any(1)
        age = self._next_page - 1 - torch.arange(self.pages + 1, device=held_out.device)
        pages = held_out[:-1].nonzero()[:, 0]
        return pages[(age[pages] % self.pages).argsort()[:most]]

    @torch.no_grad()
    def newest_pages(self, most: int) -> Tensor:
        """The newest pages that are a quarter judged, int64 [`most`]; else the last one of all."""
        judged = self.judged.sum(1) >= PAGE // 4
        age = self._next_page - 1 - torch.arange(self.pages + 1, device=judged.device)
        age = (age % self.pages).masked_fill(~judged, self.pages)[:-1]
        ages, pages = age.topk(most, largest=False)
        return pages.masked_fill(ages == self.pages, self.pages)

    def is_held_out(self) -> Tensor:
        """Which pages shall not teach, bool [pages + 1]."""
        return (self.number - FIRST - STEP * (self.text - 1)) % HELD_OUT_EVERY == 0

    @torch.no_grad()
    def read(self, pages: Tensor, length: int) -> Texts:
        """The texts up to some pages, int64 [N], of `length` pages at most.

        On a CPU of no more than the longest has.
        """
        page = pages_up_to(pages, length, self.before, self.number, self.text)
        if self.crops and len(page):
            page = page[:, : max(1, int((page != self.pages).sum(1).max()))]
        judged = self.judged[page]
        return Texts(
            tokens=self.tokens[page].flatten(1, 2),
            features=self.features[page].flatten(1, 2),
            judged=judged.flatten(1, 2),
            held_out=(judged & self.is_held_out()[page][..., None]).flatten(1, 2),
            last=(judged & (page == pages[:, None])[..., None]).flatten(1, 2),
            likely=self.likely[page].flatten(1, 2).long(),
            p=self.p[page].flatten(1, 2),
            rest=self.rest[page].flatten(1, 2),
        )

    def take(
        self, text: Tensor, taken: Tensor, last: Tensor, own: Tensor, most: int
    ) -> tuple[Tensor, Tensor]:
        """Give rows pages, oldest first, one row after the other.

        Args:
            text: int64 [B], each row's text.
            taken: int64 [B], how many pages each takes.
            last: int64 [B], the number of its page before them.
            own: int64 [B], that page.
            most: The most that any takes.

        Returns:
            Their first ones, int64 [B], and all of them, int64 [B, most].
        """
        first, i = self._next_page + taken.cumsum(0) - taken, torch.arange(most, device=text.device)
        page = ((first[:, None] + i) % self.pages).masked_fill(i >= taken[:, None], self.pages)
        self.text[page] = text[:, None].expand_as(page)
        self.number[page] = last[:, None] + 1 + i
        # Not page[:, :-1]: of two pages that is one, and code of its own.
        self.before[page] = torch.cat([own[:, None], page], 1)[:, :-1]
        self._next_page.copy_((self._next_page + taken.sum()) % self.pages)
        return first, page

    def put(
        self,
        at: tuple[Tensor, Tensor],
        tokens: Tensor,
        features: Tensor,
        logits: Tensor | None,
        logits_at: Tensor | None = None,
    ) -> None:
        """Write tokens int64 [B, T], their features and logits to pages and slots [B, T].

        Logits are [B, T, V]; or [N, V], and int64 [B, T] says which one is whose.
        """
        self.tokens[at], self.features[at] = tokens, features
        # What is kept nowhere is read where a text has no page, and must weigh nothing.
        self.judged[at] = (at[0] != self.pages) & (logits is not None)
        if logits is None:
            return
        logits, size = logits.flatten(0, -2), (*tokens.shape, self.p.shape[-1])
        some = rows_at_once(logits)
        if logits_at is None:
            parts = [self.summary(part) for part in logits.split(some)]
        else:
            parts = [self.summary(logits, part) for part in logits_at.flatten().split(some)]
        likely, p, rest = (torch.cat(found) for found in zip(*parts, strict=True))
        self.likely[at], self.p[at] = likely.view(size), p.view(size)
        self.rest[at] = rest.view(tokens.shape)

    @compiled_for_any(at=0)
    def summary(self, logits: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest tokens, their p and that of the others [R, ...].

        Args:
            logits: [N, V].
            at: int64 [R], those that are meant; None is all.
        """
        logits = logits if at is None else logits[at]
        mass, covered, known = logits.float().logsumexp(-1), logits, 1.0
        if self.draft_ids is not None:
            covered = logits[..., self.draft_ids]
            known = (covered.float().logsumexp(-1) - mass).exp()
        values, ids = covered.topk(self.likely.shape[-1], sorted=False)
        p = (values.float() - mass[:, None]).exp()
        others = known - p.sum(-1)
        return ids.int(), p.half(), others.clamp(min=0).half()


@compiled_for_any(pages=0)
def pages_up_to(pages: Tensor, length: int, before: Tensor, number: Tensor, text: Tensor) -> Tensor:
    """Pages of texts up to some pages int64 [N], in order: int64 [N, length].

    Of every page it is known which one was written `before`, which `number` of its text it is, and
    of which `text`. Where a text has fewer, the others are the last page of all.
    """
    nowhere = len(text) - 1
    follows = (number > 0) & (number[before] == number - 1) & (text[before] == text)
    follows = follows & (torch.arange(len(text), device=text.device) < nowhere)
    before = before.masked_fill(~follows, nowhere)
    chain = [pages]
    for _ in range(1, length):
        chain.append(before[chain[-1]])
    count = (torch.stack(chain) != nowhere).sum(0)[:, None]
    slot = torch.arange(length, device=pages.device)
    page = torch.stack(chain, 1).gather(1, (count - 1 - slot).clamp(min=0))
    return page.masked_fill(slot >= count, nowhere)


class MemoryRows:
    """Where the texts of some rows go on."""

    def __init__(self, memory: TextMemory, rows: int) -> None:
        self.memory, device = memory, memory.tokens.device
        self._text = torch.zeros(rows, dtype=torch.long, device=device)
        self._begin, self.end = torch.zeros_like(self._text), torch.full_like(self._text, -1)
        """`end` is the position of what comes next; -1 is another text."""
        self._page = torch.full_like(self._text, memory.pages)
        self._last = torch.full_like(self._text, -1)
        """A row's last page, and its number."""

    def forget(self, row: int) -> None:
        """A row's next tokens are another text."""
        self.end[row].fill_(-1)

    @torch.no_grad()
    def write(
        self,
        tokens: Tensor,
        features: Tensor,
        start: Tensor,
        count: Tensor,
        logits: Tensor | None = None,
        subset: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> None:
        """Remember tokens of some rows; a text begins where they do not go on from the last ones.

        Args:
            tokens: int64 [B, T].
            features: [B, T, W].
            start: int64 [B], position of each row's first token.
            count: int64 [B], how many of them are meant.
            logits: [B, T, V] of the target after each token; None where that is not known.
            subset: int64 [B], the rows meant; None is all.
            logits_at: int64 [B, T], where the logits of each are in some [N, V]; None is in order.
        """
        row = torch.arange(len(tokens), device=tokens.device) if subset is None else subset
        column = torch.arange(tokens.shape[1], device=tokens.device)
        page, slot, taken = self._find_places(column, start, count, row)
        self.memory.judged.index_fill_(0, taken, False)  # a number would come from the host
        self.memory.put((page, slot), tokens, features, logits, logits_at)

    @compiled_for_any(column=0)
    def _find_places(
        self, column: Tensor, start: Tensor, count: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pages and slots int64 [B, T] of tokens, and the pages that were taken for them.

        `column` is int64 [T], from 0; the rest is as in `write`.
        """
        memory, width = self.memory, len(column)
        some, end, page = count > 0, start + count, self._page[row]
        # Nobody else took it meanwhile.
        mine = (memory.text[page] == self._text[row]) & (page != memory.pages)
        new = some & ~((start == self.end[row]) & mine)
        text = torch.where(new, memory._texts + new.cumsum(0), self._text[row])
        begin = torch.where(new, start, self._begin[row])
        last = self._last[row].masked_fill(new, -1)
        own = page.masked_fill(new, memory.pages)
        upto = torch.where(some, (end - 1 - begin) // PAGE, last)
        first, taken = memory.take(text, upto - last, last, own, (width + PAGE - 1) // PAGE + 1)
        offset = start[:, None] + column - begin[:, None]
        number = offset // PAGE
        page = (first[:, None] + number - last[:, None] - 1) % memory.pages
        page = torch.where(number == last[:, None], own[:, None], page)
        page = page.masked_fill(column >= count[:, None], memory.pages)
        memory._texts.add_(new.sum())
        self._text[row], self._begin[row], self._last[row] = text, begin, upto
        newest = (first + upto - last - 1) % memory.pages
        self._page[row] = torch.where(upto > last, newest, own)
        self.end[row] = torch.where(some, end, self.end[row])
        return page, offset % PAGE, taken.flatten()


def feature_width(drafter: Drafter) -> int:
    """Features of a token."""
    return len(drafter.taps) * int(drafter.embedding.shape[1])


def likely_tokens(drafter: Drafter) -> int:
    """Tokens of the target's distribution that are kept."""
    ids = drafter.draft_ids
    return min(LIKELY, int(drafter.embedding.shape[0]) if ids is None else len(ids))
