"""Losses that teach a drafter. Pure; rows weigh by position, as in the paper (paper.md 2)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def position_weights(length: int, decay: float, device: torch.device | str = "cpu") -> Tensor:
    """w_j = exp(-(j - 1) / decay) for j = 1..length, float32; all 1 when `decay` is 0.

    DFlash trains with decay 7 for blocks of 16 and 4 for blocks of 8 (drafters.md 2d).
    """
    j = torch.arange(length, device=device, dtype=torch.float32)
    return torch.ones_like(j) if decay == 0 else torch.exp(-j / decay)


def forward_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) per row.

    Args:
        p_logits: [..., V] the target's logits, no gradient.
        q_logits: [..., V] the drafter's.

    Returns:
        float32 [...], not negative but for rounding.
    """
    with torch.no_grad():
        log_p = p_logits.float().log_softmax(-1)
        p = log_p.exp()
        log_p.clamp_(min=-1e4)  # 0 times -inf, where a head masks tokens, would be NaN
        negative_entropy = torch.linalg.vecdot(p, log_p)
    # Two dot products instead of an elementwise form: fewer passes over a whole vocabulary.
    return negative_entropy - torch.linalg.vecdot(p, q_logits.float().log_softmax(-1))


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """1 - sum of min(p, q) per row: the share of drafts that rejection sampling would refuse.

    Args:
        p: [..., V] probabilities; below 1 in sum where only some tokens can be drafted.
        q: [..., V].

    Returns:
        float32 [...].
    """
    return 1 - p.minimum(q).sum(-1)


def survival_weights(q_of_token: Tensor, floor: float = 0.5) -> Tensor:
    """D-PACE: how much of a block's expected length each row decides (arXiv 2605.18810).

    With s_j = (1 - floor) q_j(y_j) + floor, row k weighs the sum over i >= k of s_1 ... s_i.

    Args:
        q_of_token: [..., G], the drafter's probability of the right token in each row.
        floor: Keeps late rows in play while early ones are wrong.

    Returns:
        float32 [..., G], no gradient.
    """
    kept = ((1 - floor) * q_of_token.detach().float() + floor).cumprod(-1)
    return kept.flip(-1).cumsum(-1).flip(-1)


def expected_length(agreement: Tensor, mask: Tensor) -> Tensor:
    """Drafts of a block that would be kept, if row j's draft is with probability `agreement`.

    Args:
        agreement: [..., G].
        mask: bool [..., G]; the first row that is out ends the block.

    Returns:
        float32 [...].
    """
    return (agreement.float() * mask).cumprod(-1).sum(-1)


def cross_entropy(labels: Tensor, q_logits: Tensor) -> Tensor:
    """-log q(label) per row: labels int64 [...], logits [..., V], result float32 [...]."""
    flat = F.cross_entropy(q_logits.float().flatten(0, -2), labels.flatten(), reduction="none")
    return flat.view(labels.shape)


def weighted_mean(values: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension; masked values count as 0 but stay in the denominator.

    Args:
        values: [..., G].
        weights: [G] or [..., G].
        mask: bool [..., G].

    Returns:
        [...]: sum of weights * values where mask holds, over the sum of all weights.
    """
    return (values.masked_fill(~mask, 0.0) * weights).sum(-1) / weights.sum(-1)
