"""The records that stages of a round hand to each other, and what a user gets back.

Symbols: `B` rows, `G` draft length, `V` vocabulary, `W` feature width, `S` slots, `H` hidden size.
p is the target's distribution, q the drafter's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FinishReason = Literal["eos", "stop", "length", "context", "cancelled"]
POSITION_BINS = (0, 256, 512, 1024, 2048, 4096, 8192)
LONGEST_COPY = 31
"""Tokens of a proposal that is copied, at most."""


Record = TypeVar("Record", bound="DataclassInstance")


def of_rows(record: Record, rows: slice) -> Record:
    """The same of some rows, in the same memory: the first dimension of every tensor is rows."""
    cut: dict[str, Any] = {}
    for name in (f.name for f in fields(record)):
        value = getattr(record, name)
        if isinstance(value, Tensor):
            cut[name] = value[rows]
        elif isinstance(value, Proposal):
            cut[name] = of_rows(value, rows)
    return replace(record, **cut)


def scatter(part: Tensor, rows: slice | Tensor, count: int) -> Tensor:
    """What is known of some rows [R, ...], as of all [count, ...]; zeros for the others."""
    if len(part) == count and isinstance(rows, slice):
        return part
    whole = part.new_zeros(count, *part.shape[1:])
    whole[rows] = part
    return whole


def scatter_record(record: Record, rows: slice, count: int) -> Record:
    """The same for every tensor of a record."""
    parts = {f.name: getattr(record, f.name) for f in fields(record)}
    tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    return replace(record, **{n: scatter(part, rows, count) for n, part in tensors.items()})


class LogitMask(Protocol):
    """Says which tokens may come in one row's answer: a grammar, for one.

    It belongs to one answer, and is asked once for the first token and once a round. There is
    nothing to take back: what it is asked about next begins with what was really accepted.
    """

    def fill(self, bitmask: Tensor, text: Sequence[int], drafted: Sequence[int]) -> None:
        """Mark what may follow each of some texts.

        Args:
            bitmask: int32 [n + 1, ceil(V / 32)] on the host, all bits set: row j is about the token
                after `text` and n `drafted` tokens' first j. Bit t % 32 of word t // 32 is token t,
                as in xgrammar and llguidance. Behind a drafted token that may not come nothing is
                looked at. A row without a bit lets end tokens come.
            text: The answer so far, of which the last token is pending; the prompt is not in it.
            drafted: n tokens that may follow.
        """
        ...


class TokenLogprobs(NamedTuple):
    """What the target says of one token of an answer."""

    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens in its place and their own, from the likeliest on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Drafted tokens, with the distribution that each was drawn from."""

    tokens: Tensor
    """int64 [B, G]; what lies past a row's count is padding."""
    count: Tensor
    """int64 [B], 0..G: how many of a row's tokens are drafts."""
    q: Tensor | None = None
    """float32 [B, G, V] probabilities the tokens were drawn from; None means one-hot."""
    before: Tensor | None = None
    """[B, W]: the target's features of the token before the pending one, if the drafter sets out
    from them; to replay this proposal needs them."""
    copied: Tensor | None = None
    """bool [B]: rows whose tokens were copied, not drafted; None is no row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The target's reading of [pending, proposal] and the verdict on it."""

    proposal: Proposal
    fed: Tensor
    """int64 [B, G+1]: pending, then the drafted tokens."""
    start: Tensor
    """int64 [B]: position of the pending token, which is the row's committed length before."""
    logits: Tensor
    """[B, G+1, V]: row j predicts the token at position start + j + 1."""
    features: Tensor
    """[B, G+1, W]: the target's hidden states at the taps, concatenated."""
    tokens: Tensor
    """int64 [B, G+1]: the emitted tokens; what lies past a row's `emitted` is padding."""
    accepted: Tensor
    """int64 [B]: drafts kept, those past an end token not counted."""
    emitted: Tensor
    """int64 [B]: tokens that the round commits, up to and including an end token; 0 in rows that
    take no part."""
    ended: Tensor
    """bool [B]: the last emitted token is an end token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayBatch:
    """A blocks a row to draft again, and what the target says about each drafted token."""

    tokens: Tensor
    """int64 [B, A, G+1]: the pending token, then those that followed it: the drafts that the
    target read, or what was committed."""
    start: Tensor
    """int64 [B, A]: position of the pending token."""
    before: Tensor | None
    """[B, A, W], as in `Proposal`."""
    logits: Tensor
    """[B, A, G, V] of the target."""
    mask: Tensor
    """bool [B, A, G]: which drafted tokens teach."""
    fresh: Tensor
    """bool [B, A]: blocks that taught no update yet."""
    count: Tensor
    """int64 [B]: blocks of a row that have something to teach."""

    @classmethod
    def of(cls, tokens: Tensor, start: Tensor, before: Tensor | None, mask: Tensor) -> ReplayBatch:
        """Blocks to draft again, of which the target says nothing here; arguments as its fields."""
        some = mask.any(-1)
        none = mask.new_empty(*start.shape, 0)
        return cls(
            tokens=tokens,
            start=start,
            before=before,
            logits=none,
            mask=mask,
            fresh=some,
            count=some.sum(-1),
        )

    def part(self, begin: int, blocks: int = 1) -> ReplayBatch:
        """Some blocks of every row, from block `begin` on."""
        some = slice(begin, begin + blocks)
        return ReplayBatch(
            tokens=self.tokens[:, some],
            start=self.start[:, some],
            before=None if self.before is None else self.before[:, some],
            logits=self.logits[:, some],
            mask=self.mask[:, some],
            fresh=self.fresh[:, some],
            count=self.count,
        )


class Round(NamedTuple):
    """One row's share of one round, on the host."""

    position: int
    """Generated tokens before the round (in a session, over its turns)."""
    proposed: int
    accepted: int
    emitted: int
    """Tokens kept by the round: what a stop, a limit or an end token cut off is not counted."""
    updates: int = 0
    """Updates of this row's drafter after this round."""
    seconds: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Wall-clock seconds of drafting, verifying and learning, of all rows together."""
    length: int | None = None
    """Drafts that an adaptive policy let the round have; None without one, or in a round in which
    rows copied."""
    copied: bool = False
    """Its drafts were copied from the row's own text, without the drafter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What one request, or one turn, did. The token from the prefill is emitted by no round."""

    seed: int
    prompt_tokens: int
    emitted_tokens: int
    rounds: int
    acceptance_length: float
    """Tokens committed by rounds / rounds, tokens past a stop excluded. 1.0 means no gain."""
    accepted_at: list[float]
    """Share of rounds that accepted at least i + 1 drafted tokens."""
    updates: int
    reverts: int
    seconds: float
    tokens_per_second: float
    seconds_in: dict[str, float]
    by_position: list[dict[str, float]]
    repeated_8grams: float
    """Share of the generated 8-grams that had occurred before."""
    copied_rounds: int = 0
    """Rounds whose drafts were copied from the text so far, without the drafter."""
    copied_tokens: int = 0
    """Tokens of such copies that were kept."""
    plain_rounds: int = 0
    """Rounds in which an adaptive policy let nothing be drafted."""
    draft_lengths: dict[str, int] = field(default_factory=dict)
    """Rounds by the draft length that an adaptive policy chose."""
    thinking: bool | None = None
    """Whether the chat template asked the target to think; None where it has no such switch."""
    reread_tokens: int = 0
    """In a later turn, positions of the conversation that had been read and are read anew: the
    template writes what was said otherwise by now, or a recurrent state was lost."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, under the names of the design page."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One finished answer."""

    text: str
    token_ids: list[int]
    """Generated tokens, the end token included."""
    finish_reason: FinishReason
    stats: Stats
    rounds: list[Round] = field(default_factory=list, repr=False)
    prompt_ids: list[int] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The object that `ttspec generate --json` prints."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stats": self.stats.to_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What a stream yields after each round (and once after the prefill, with no round)."""

    text: str
    """New text that is safe to show: never half a character, never the start of a stop text."""
    token_ids: tuple[int, ...]
    round: Round | None
    result: Result | None = None
    """Set in the last chunk."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of each of the tokens, where the request asks for them."""


def acceptance_length(rounds: Sequence[Round]) -> float:
    """Mean tokens emitted a round, as a ratio of sums; 0.0 with no round."""
    return sum([r.emitted for r in rounds]) / len(rounds) if rounds else 0.0


def repeated_8grams(tokens: Sequence[int]) -> float:
    """Share of a text's 8-grams that it had before; 0.0 for a text of fewer tokens."""
    grams = list(zip(*(tokens[i:] for i in range(8)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def by_position(rounds: Sequence[Round]) -> list[dict[str, float]]:
    """Acceptance length per bin of generated position; a round counts where it starts."""
    bins: list[dict[str, float]] = []
    positions = [r.position for r in rounds]  # they ascend
    for low, high in pairwise([*POSITION_BINS, 1 << 62]):
        inside = rounds[bisect_left(positions, low) : bisect_left(positions, high)]
        if inside:
            last = inside[-1].position + inside[-1].emitted
            bins.append(
                {
                    "from": low,
                    "to": min(high, last),
                    "rounds": len(inside),
                    "acceptance_length": acceptance_length(inside),
                }
            )
    return bins


def summarise(
    rounds: Sequence[Round],
    *,
    token_ids: Sequence[int],
    prompt_tokens: int,
    seed: int,
    seconds: float,
    reverts: int = 0,
    thinking: bool | None = None,
    reread_tokens: int = 0,
) -> Stats:
    """The statistics of one answer from its rounds."""
    # Lists: the device waits meanwhile, where a row's next request is to begin.
    longest = max([r.proposed for r in rounds], default=0)
    accepted = Counter([r.accepted for r in rounds])
    stages = [sum(each) for each in zip(*[r.seconds for r in rounds], strict=True)] or [0.0] * 3
    lengths = Counter([r.length for r in rounds if r.length is not None])
    copied = [r.accepted for r in rounds if r.copied]
    return Stats(
        seed=seed,
        prompt_tokens=prompt_tokens,
        emitted_tokens=len(token_ids),
        rounds=len(rounds),
        acceptance_length=acceptance_length(rounds),
        accepted_at=[
            sum(count for n, count in accepted.items() if n >= i) / len(rounds)
            for i in range(1, longest + 1)
        ],
        updates=sum([r.updates for r in rounds]),
        reverts=reverts,
        seconds=seconds,
        tokens_per_second=len(token_ids) / seconds if seconds > 0 else 0.0,
        seconds_in=dict(zip(("draft", "verify", "learn"), stages, strict=True)),
        by_position=by_position(rounds),
        repeated_8grams=repeated_8grams(token_ids),
        copied_rounds=len(copied),
        copied_tokens=sum(copied),
        plain_rounds=lengths[0],
        draft_lengths={str(n): lengths[n] for n in sorted(lengths)},
        thinking=thinking,
        reread_tokens=reread_tokens,
    )
