"""Which drafts are kept, and what comes after them. Pure, vectorised over rows.

Two rules. `accept_equal` keeps a draft iff it is the token that the target itself draws, so the
text cannot depend on the drafter. `accept_rejection` is speculative sampling (Leviathan et al.
2023; Chen et al. 2023): keep a draft y iff u q(y) < p(y), else draw from max(p - q, 0).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.compiled import compiled, compiled_for_any
from ttspec.records import Proposal
from ttspec.sampling import SamplingTensors, argmax, draw, process

BROKEN = 2
"""Added to `Verdict.table`'s `ended` where the target's logits are no numbers."""


class Verdict(NamedTuple):
    """What becomes of each row in a round."""

    emitted: Tensor
    """int64 [B]: tokens that the round commits; 0 in rows that take no part."""
    accepted: Tensor
    """int64 [B]: drafts kept, those past an end token not counted."""
    ended: Tensor
    """bool [B]: the last emitted token is an end token."""
    table: Tensor
    """int64 [B, 4 + G+1], for the host: emitted, accepted and proposed tokens, `ended` (`BROKEN`
    more if logits of an emitted token are not finite), and the tokens."""


def _prefix(kept: Tensor) -> Tensor:
    """Length of the leading run of True, int64 [B]."""
    count = kept.shape[-1]
    place = torch.arange(count + 1, device=kept.device)
    return place.masked_fill(F.pad(kept, (0, 1)), count).amin(-1)


def accept_equal(chosen: Tensor, proposal: Proposal) -> tuple[Tensor, Tensor]:
    """Keep drafts as long as they equal the target's own tokens.

    Args:
        chosen: int64 [B, G+1], the target's token after each of [pending, drafts].
        proposal: G drafts a row.

    Returns:
        accepted int64 [B], and tokens int64 [B, G+1], of which accepted + 1 are emitted.
    """
    return _equal(chosen, proposal.tokens, proposal.count), chosen


def _equal(chosen: Tensor, drafts: Tensor, count: Tensor) -> Tensor:
    length = drafts.shape[1]
    within = torch.arange(length, device=chosen.device) < count[:, None]
    return _prefix((drafts == chosen[:, :length]) & within)


@compiled
def draw_and_accept(
    logits: Tensor, noise: Tensor | None, drafts: Tensor, count: Tensor, sampling: SamplingTensors
) -> tuple[Tensor, Tensor]:
    """Let the target draw its own tokens, and `accept_equal`.

    Args:
        logits: [B, G+1, V], the target's.
        noise: As in `pick`.
        drafts: int64 [B, G].
        count: int64 [B], how many of a row's tokens are drafts.
        sampling: Of each row.

    Returns:
        accepted int64 [B], and tokens int64 [B, G+1], of which accepted + 1 are emitted.
    """
    chosen = draw(process(logits, sampling), noise)
    return _equal(chosen, drafts, count), chosen


@compiled
def accept_rejection(
    p: Tensor, proposal: Proposal, u: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Speculative sampling, exact for any q that the drafts were really drawn from.

    Args:
        p: float32 [B, G+1, V], the target's processed probabilities.
        proposal: G drafts a row with their q; a q of None is a point mass.
        u: float32 [B, G], fresh uniforms in [0, 1).
        noise: float32 [B, V], fresh standard exponentials for the last token.

    Returns:
        accepted int64 [B], and tokens int64 [B, G+1], of which accepted + 1 are emitted.
    """
    rows, length = proposal.tokens.shape
    drafts = proposal.tokens.unsqueeze(-1)
    p_draft = p[:, :length].gather(-1, drafts).squeeze(-1)
    q_draft = 1.0 if proposal.q is None else proposal.q.gather(-1, drafts).squeeze(-1)
    within = torch.arange(length, device=p.device) < proposal.count[:, None]
    accepted = _prefix((u * q_draft < p_draft) & within)

    row = torch.arange(rows, device=p.device)
    last = p[row, accepted]
    rejected = accepted < proposal.count
    if length:
        at = accepted.clamp(max=length - 1)
        if proposal.q is None:
            rest = last.scatter(-1, proposal.tokens[row, at].unsqueeze(-1), 0.0)
        else:
            rest = (last - proposal.q[row, at]).clamp(min=0)
        # Rounding can empty a residual; p is then the same distribution.
        use = rejected & (rest.sum(-1) > 0)
        last = torch.where(use[:, None], rest, last)
    final = argmax(-noise / last)  # exponential race: token i wins with share last_i
    tokens = torch.cat([proposal.tokens, final[:, None]], dim=1)
    return accepted, tokens.scatter(1, accepted[:, None], final[:, None])


def cut_at_end(
    tokens: Tensor, emitted: Tensor, ends: Tensor, heeded: Tensor
) -> tuple[Tensor, Tensor]:
    """End a row's emission with its first end token.

    Args:
        tokens: int64 [B, G+1], of which `emitted` are emitted.
        emitted: int64 [B].
        ends: int64 [E], the end tokens; may be empty.
        heeded: bool [B], rows that an end token ends.

    Returns:
        emitted int64 [B], and ended bool [B].
    """
    within = torch.arange(tokens.shape[1], device=tokens.device) < emitted[:, None]
    is_end = (tokens[..., None] == ends).any(-1) & within & heeded[:, None]
    before = _prefix(~is_end)
    ended = is_end.any(-1)
    return torch.where(ended, before + 1, emitted), ended


@compiled_for_any(tokens=1, logits=1)
def apply_end_tokens(
    accepted: Tensor,
    tokens: Tensor,
    proposed: Tensor,
    logits: Tensor,
    resting: Tensor,
    ends: Tensor,
    heeded: Tensor,
) -> Verdict:
    """End rows at their end tokens, and say what the host must know.

    Args:
        accepted: int64 [B], drafts kept.
        tokens: int64 [B, G+1], of which accepted + 1 come next.
        proposed: int64 [B], drafts that there were.
        logits: [B, G+1, V], the target's own.
        resting: bool [B], rows that take no part.
        ends: As in `cut_at_end`.
        heeded: The same.
    """
    emitted, ended = cut_at_end(tokens, accepted + 1, ends, heeded)
    accepted = accepted.minimum(emitted).masked_fill(resting, 0)
    emitted = emitted.masked_fill(resting, 0)
    # Tokens picked from logits that are not finite have one: a NaN is the largest of all.
    picked = logits.gather(-1, tokens[..., None])[..., 0]
    given = torch.arange(tokens.shape[1], device=tokens.device) < emitted[:, None]
    broken = (given & ~picked.isfinite()).any(1)
    counts = emitted, accepted, proposed, ended.long() + BROKEN * broken
    table = torch.cat([torch.stack(counts, 1), tokens], dim=1)
    return Verdict(emitted, accepted, ended, table)
