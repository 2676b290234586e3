"""Which drafts are kept, and what comes after them. Pure, vectorised over rows.

Two rules. `accept_equal` keeps a draft iff it is the token that the target itself draws, so the
text cannot depend on the drafter. `accept_rejection` is speculative sampling (Leviathan et al.
2023; Chen et al. 2023): keep a draft y iff u q(y) < p(y), else draw from max(p - q, 0).
"""

import torch
from torch import Tensor

from ttspec.records import Proposal


def _prefix(kept: Tensor) -> Tensor:
    """Length of the leading run of True, int64 [B]."""
    return kept.long().cumprod(-1).sum(-1)


def accept_equal(chosen: Tensor, proposal: Proposal) -> tuple[Tensor, Tensor]:
    """Keep drafts as long as they equal the target's own tokens.

    Args:
        chosen: int64 [B, G+1], the target's token after each of [pending, drafts].
        proposal: G drafts a row.

    Returns:
        accepted int64 [B], and tokens int64 [B, G+1], of which accepted + 1 are emitted.
    """
    length = proposal.tokens.shape[1]
    within = torch.arange(length, device=chosen.device) < proposal.count[:, None]
    return _prefix((proposal.tokens == chosen[:, :length]) & within), chosen


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
    final = (noise / last).argmin(-1)  # exponential race: token i wins with share last_i
    tokens = torch.cat([proposal.tokens, final[:, None]], dim=1)
    return accepted, tokens.scatter(1, accepted[:, None], final[:, None])


def cut_at_end(
    tokens: Tensor, emitted: Tensor, ends: Tensor, heeded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """End a row's emission with its first end token.

    Args:
        tokens: int64 [B, G+1], of which `emitted` are emitted.
        emitted: int64 [B].
        ends: int64 [E], the end tokens; may be empty.
        heeded: bool [B], rows that an end token ends; None is all.

    Returns:
        emitted int64 [B], and ended bool [B].
    """
    within = torch.arange(tokens.shape[1], device=tokens.device) < emitted[:, None]
    if heeded is not None:
        within = within & heeded[:, None]
    is_end = torch.isin(tokens, ends) & within
    before = _prefix(~is_end)
    ended = is_end.any(-1)
    return torch.where(ended, before + 1, emitted), ended
