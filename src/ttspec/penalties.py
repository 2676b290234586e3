"""Penalties, biases and bans: logits changed by the text that is there already. Pure.

Meaning and order are those of transformers' `generate`, whose greedy tokens are the tests' right
values: bias, repetition penalty, then bans, and temperature and filters (`sampling.process`) after
all of them. Presence and frequency penalties, which it lacks, follow the repetition penalty and
count generated tokens only, as in OpenAI's API and in vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ttspec.compiled import compiled
from ttspec.config import SamplingConfig

ANY, _NONE = -1, -2
"""In place of a token: one that equals all, and one that equals no token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What rows ask for beyond temperature and filters, on the device.

    B is the rows, or 1 for all alike. A rule that no row has is None; a row without it has the
    value that changes none of its bits.
    """

    repetition: Tensor | None = None
    """float32 [B, 1, 1]."""
    presence: Tensor | None = None
    """float32 [B, 1, 1]; there if `frequency` is."""
    frequency: Tensor | None = None
    """float32 [B, 1, 1]."""
    ngram: Tensor | None = None
    """int64 [B, 1, 1]; 0 lets all come."""
    most_ngram: int = 0
    """No row's `ngram` is larger."""
    least_new: Tensor | None = None
    """int64 [B, 1, 1], tokens of an answer before an end token may come; there if `least` is."""
    least: Tensor | None = None
    """int64 [B, 1, 1], the same, prompt included."""
    bias: Tensor | None = None
    """float32 [B, 1, V]."""
    ends: Tensor
    """bool [V], the end tokens."""
    never: Tensor | None = None
    """bool [B, 1, V], tokens that are never drawn."""
    not_first: Tensor | None = None
    """bool [B, 1, V], tokens that no answer begins with."""
    words: Tensor | None = None
    """int64 [B, N, L], of banned words of several tokens all but the last one, padded in front."""
    word_ends: Tensor | None = None
    """int64 [B, N], their last tokens; V is no word."""

    @classmethod
    def of(
        cls, sampling: SamplingConfig, ends: Collection[int], vocabulary: int, device: torch.device
    ) -> Self | None:
        """The rules of one request, where the end tokens are `ends`; None if there are none."""
        if not sampling.penalises:
            return None
        # As in transformers: an end token alone is no word.
        words = [w for w in dict.fromkeys(sampling.bad_words_ids) if w not in {(e,) for e in ends}]
        never = {*sampling.suppress_tokens, *(w[0] for w in words if len(w) == 1)}
        longer = [w for w in words if len(w) > 1]
        size = max(map(len, longer), default=1) - 1
        padded = [[ANY] * (size + 1 - len(w)) + list(w[:-1]) for w in longer]

        def number(value: float) -> Tensor:
            return torch.tensor([[[value]]], device=device)

        def marked(tokens: Collection[int]) -> Tensor:
            mask = torch.zeros(1, 1, vocabulary, dtype=torch.bool)
            mask[..., [t for t in tokens if t < vocabulary]] = True
            return mask.to(device)

        s, given = sampling, dict[str, Tensor]()
        if s.repetition_penalty != 1:
            given["repetition"] = number(float(s.repetition_penalty))
        if s.presence_penalty or s.frequency_penalty:
            given["presence"] = number(float(s.presence_penalty))
            given["frequency"] = number(float(s.frequency_penalty))
        if s.no_repeat_ngram_size:
            given["ngram"] = number(s.no_repeat_ngram_size)
        if s.min_new_tokens or s.min_length:
            given["least_new"] = number(s.min_new_tokens)
            given["least"] = number(0 if s.min_new_tokens else s.min_length)
        if s.logit_bias:
            bias = torch.zeros(1, 1, vocabulary)
            for token, value in s.logit_bias:
                bias[..., token] = value
            given["bias"] = bias.to(device)
        if never:
            given["never"] = marked(never)
        if s.begin_suppress_tokens:
            given["not_first"] = marked(s.begin_suppress_tokens)
        if longer:
            given["words"] = torch.tensor([padded], device=device)
            given["word_ends"] = torch.tensor([[w[-1] for w in longer]], device=device)
        return cls(**given, most_ngram=s.no_repeat_ngram_size, ends=marked(ends)[0, 0])


@compiled
def penalise(logits: Tensor, text: Tensor, end: Tensor, answer: Tensor, rules: Rules) -> Tensor:
    """Logits as the rules change them.

    Args:
        logits: [B, T, V], of T tokens in a row: column j is about position end + j.
        text: int64 [B, S], tokens by position. Column j knows those before end + j; what lies
            behind is not looked at.
        end: int64 [B].
        answer: int64 [B], position of the answer's first token: what is before it is prompt.
        rules: What to do.

    Returns:
        float32 [B, T, V], -inf for tokens that must not come.
    """
    x, size = logits.float(), logits.shape[-1]
    column = torch.arange(logits.shape[1], device=end.device)
    at = end[:, None] + column  # [B, T]
    if rules.bias is not None:
        x = x + rules.bias
    if rules.repetition is not None:
        seen = _seen(text, at, size)
        x = torch.where(seen, torch.where(x < 0, x * rules.repetition, x / rules.repetition), x)
    if rules.presence is not None and rules.frequency is not None:
        counts = _counts(text, at, answer, size)
        x = x - rules.frequency * counts - rules.presence * (counts > 0)
    for ban in _bans(text, at, answer, rules, size):
        x = x.masked_fill(ban, -math.inf)
    return x


def _seen(text: Tensor, at: Tensor, size: int) -> Tensor:
    """Which tokens stand before each position `at` [B, T]: bool [B, T, V]."""
    first, later = _before(text, at, at.new_zeros(len(at)), size)
    seen = torch.zeros(len(at), size + 1, dtype=torch.bool, device=at.device)
    seen = seen.scatter_(1, first, True)[:, None].repeat(1, at.shape[1], 1)
    return seen.scatter_(2, later, True)[..., :size]


def _counts(text: Tensor, at: Tensor, answer: Tensor, size: int) -> Tensor:
    """How often each token stands between `answer` [B] and `at` [B, T]: float32 [B, T, V]."""
    first, later = _before(text, at, answer, size)
    counts = torch.zeros(len(at), size + 1, device=at.device)
    counts = counts.scatter_add_(1, first, torch.ones_like(first, dtype=counts.dtype))
    counts = counts[:, None].repeat(1, at.shape[1], 1)
    return counts.scatter_add_(2, later, torch.ones_like(later, dtype=counts.dtype))[..., :size]


def _before(text: Tensor, at: Tensor, begin: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Tokens from `begin` [B] on that come before `at` [B, T]; `size` in place of all others.

    Returns:
        int64 [B, S], those before the first column's position, and [B, T, T], what others add.
    """
    slot, width = torch.arange(text.shape[1], device=text.device), at.shape[1]
    known = text.clamp(max=size)  # a few models read tokens that they cannot write
    own = known.gather(1, at.clamp(max=text.shape[1] - 1))
    outside = (slot >= at[:, :1]) | (slot < begin[:, None])
    column = torch.arange(width, device=text.device)
    behind = column >= column[:, None]  # row j knows the tokens of the columns before it
    later = own[:, None].expand(-1, width, -1).masked_fill(behind, size)
    return known.masked_fill(outside, size), later


def _bans(text: Tensor, at: Tensor, answer: Tensor, rules: Rules, size: int) -> list[Tensor]:
    """Masks that broadcast to [B, T, V], True for tokens that must not come."""
    bans = [] if rules.never is None else [rules.never]
    position = at[..., None]
    if rules.not_first is not None:
        bans.append(rules.not_first & (position == answer[:, None, None]))
    if rules.least_new is not None and rules.least is not None:
        early = (position < answer[:, None, None] + rules.least_new) & (rules.least_new > 0)
        early |= position < rules.least  # where an answer of a row without rules began is not known
        bans.append(rules.ends & early)
    ended: list[Tensor] = []
    if rules.ngram is not None:
        ended.append(_repeating(text, at, rules.ngram, rules.most_ngram, size))
    if rules.words is not None and rules.word_ends is not None:
        ended.append(_ending_words(text, at, rules.words, rules.word_ends, size))
    if ended:
        ban = torch.zeros(*at.shape, size + 1, dtype=torch.bool, device=at.device)
        bans.append(ban.scatter_(2, torch.cat(ended, dim=-1), True)[..., :size])
    return bans


def _repeating(text: Tensor, at: Tensor, n: Tensor, most: int, size: int) -> Tensor:
    """Tokens int64 [B, T, S] that would end an n-gram which was there; `size` is none.

    `n` int64 [B, 1, 1] is at most `most`, and 0 in rows where all may come.
    """
    slots = text.shape[1]
    last = torch.arange(slots, device=text.device)  # an earlier n-gram's last token
    same = (last < at[..., None]) & (last >= n - 1) & (n > 0)
    for back in range(1, min(most, slots)):
        ours = text.gather(1, (at - back).clamp(min=0, max=slots - 1))
        is_same = text.roll(back, 1)[:, None] == ours[..., None]
        same = same & (is_same | (n <= back))
    return text[:, None].clamp(max=size).expand_as(same).masked_fill(~same, size)


def _ending_words(text: Tensor, at: Tensor, words: Tensor, ends: Tensor, size: int) -> Tensor:
    """Last tokens int64 [B, T, N] of the words of which all else is there; `size` is none."""
    place = at[..., None] + torch.arange(-words.shape[2], 0, device=text.device)  # [B, T, L]
    tail = text.gather(1, place.flatten(1).clamp(min=0, max=text.shape[1] - 1)).view_as(place)
    tail = tail.masked_fill(place < 0, _NONE)
    same = ((words[:, None] == tail[:, :, None]) | (words[:, None] == ANY)).all(-1)
    return ends[:, None].expand_as(same).masked_fill(~same, size)
