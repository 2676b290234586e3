"""Losses that teach a drafter. Pure functions; rows weigh by position, as in the paper."""

from typing import Any, cast

import torch
from torch import Tensor

from ttspec.compiled import compiled, compiled_once, is_compiling

LOGITS_AT_ONCE, LOGITS_AT_ONCE_ON_A_CPU = 1 << 25, 1 << 18
"""Logits worked on together: wide intermediate results stay small, and on a CPU in its cache."""


def position_weights(length: int, decay: float, device: torch.device | str = "cpu") -> Tensor:
    """w_j = exp(-(j - 1) / decay) for j = 1..length, float32; all 1 when `decay` is 0.

    DFlash trains with decay 7 for blocks of 16 and 4 for blocks of 8.
    """
    j = torch.arange(length, device=device, dtype=torch.float32)
    return torch.ones_like(j) if decay == 0 else torch.exp(-j / decay)


def forward_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) per row; its gradient q - p is made on the way, so one V-wide tensor is kept.

    Of logits [..., V], the target's without a gradient. Float32 [...], not negative but for
    rounding.
    """
    return cast(Tensor, _ForwardKL.apply(p_logits, q_logits))


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p_logits: Tensor, q_logits: Tensor) -> Tensor:
        shape, size = q_logits.shape[:-1], q_logits.shape[-1]
        # A part of what has a way back would make the compiler ask for its gradient, and warn.
        p_logits, q_logits = (x.detach().reshape(-1, size) for x in (p_logits, q_logits))
        loss = q_logits.new_empty(len(q_logits), dtype=torch.float32)
        gradient = torch.empty_like(q_logits)
        rows = rows_at_once(q_logits)
        for i in range(0, len(q_logits), rows):
            part = slice(i, i + rows)
            loss[part], gradient[part] = _kl_and_gradient(p_logits[part], q_logits[part])
        ctx.save_for_backward(gradient.view(*shape, size))
        return loss.view(shape)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * outer[0][..., None].to(gradient.dtype)


@compiled
def _kl_and_gradient(p_logits: Tensor, q_logits: Tensor) -> tuple[Tensor, Tensor]:
    # 0 times -inf, where a head masks tokens, would be NaN.
    log_p = p_logits.float().log_softmax(-1).clamp(min=-1e4)
    log_q = q_logits.float().log_softmax(-1)
    p = log_p.exp()
    return torch.linalg.vecdot(p, log_p - log_q), (log_q.exp() - p).to(q_logits.dtype)


def likely_kl(likely: Tensor, p: Tensor, rest: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) per row of which p's likeliest tokens are known, and the others all together.

    Args:
        likely: int64 [..., K], places of those in q's vocabulary.
        p: [..., K] their probabilities.
        rest: [...] that of all others.
        q_logits: [..., V] the drafter's.

    Returns:
        float32 [...].
    """
    return cast(Tensor, _LikelyKL.apply(likely, p, rest, q_logits))


def log_likely(likely: Tensor, q_logits: Tensor) -> Tensor:
    """Log q, float32 [..., K], of some tokens int64 [..., K] by logits [..., V]."""
    flat = q_logits.flatten(0, -2)
    mass = [_log_mass(part) for part in flat.split(rows_at_once(flat))]
    mass = torch.cat(mass).view(*likely.shape[:-1], 1)
    return q_logits.gather(-1, likely).float() - mass


class _LikelyKL(torch.autograd.Function):
    """Keeps nothing V wide but the logits; their gradient is made in one pass."""

    @staticmethod
    def forward(ctx: Any, likely: Tensor, p: Tensor, rest: Tensor, q_logits: Tensor) -> Tensor:
        log_q = log_likely(likely, q_logits)
        ctx.save_for_backward(likely, p, rest, q_logits, log_q)
        return _likely_loss(p, rest, log_q)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, None, None, Tensor]:
        likely, p, rest, q_logits, log_q = ctx.saved_tensors
        first = q_logits.gather(-1, likely[..., :1])
        mass, whole, less = _likely_slopes(p, rest, log_q, first, outer[0])
        flat, mass, whole = q_logits.flatten(0, -2), mass.flatten(), whole.flatten()
        parts = (x.split(rows_at_once(flat)) for x in (flat, mass, whole))
        made = [_weighted_softmax(*part) for part in zip(*parts, strict=True)]
        gradient = made[0] if len(made) == 1 else torch.cat(made)
        gradient.scatter_add_(-1, likely.flatten(0, -2), less.flatten(0, -2))
        return None, None, None, gradient.view_as(q_logits)


@compiled
def _likely_loss(p: Tensor, rest: Tensor, log_q: Tensor) -> Tensor:
    others = (1 - log_q.exp().sum(-1)).clamp(min=1e-4)
    p, rest = p.float(), rest.float()
    known = (p * (p.clamp(min=1e-8).log() - log_q)).sum(-1)
    return known + rest * (rest.clamp(min=1e-8).log() - others.log())


@compiled
def _likely_slopes(
    p: Tensor, rest: Tensor, log_q: Tensor, first: Tensor, outer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of all logits, q times the second is the gradient; of likely tokens' the third more.

    Args:
        p: [..., K], and so on as in `likely_kl`.
        rest: [...].
        log_q: float32 [..., K].
        first: [..., 1], the logit of the first likely token.
        outer: float32 [...], gradient of the loss.

    Returns:
        Logarithm of what all exponentials add up to, and the slopes.
    """
    p, q = p.float(), log_q.exp()
    others = 1 - q.sum(-1)
    share = rest.float() / others.clamp(min=1e-4) * (others > 1e-4)
    whole = outer * (p.sum(-1) - share * q.sum(-1))
    less = (share[..., None] * q - p) * outer[..., None]
    return (first.float() - log_q[..., :1])[..., 0], whole, less.to(first.dtype)


def rows_at_once(logits: Tensor) -> int:
    """Rows of logits [R, V] to work on together; compiled code makes no wide results between."""
    if is_compiling():
        return max(1, len(logits))
    most = LOGITS_AT_ONCE if logits.is_cuda else LOGITS_AT_ONCE_ON_A_CPU
    return max(1, most // logits.shape[-1])


@compiled
def _log_mass(logits: Tensor) -> Tensor:
    return logits.float().logsumexp(-1)


@compiled
def _weighted_softmax(logits: Tensor, mass: Tensor, weight: Tensor) -> Tensor:
    """Softmax of logits [R, V] whose logarithms add up to `mass` [R], times `weight` [R]."""
    return ((logits.float() - mass[:, None]).exp() * weight[:, None]).to(logits.dtype)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """1 - sum of min(p, q) per row: the share of drafts that rejection sampling would refuse.

    Of probabilities [..., V]; those of p are below 1 in sum where only some tokens can be drafted.
    """
    return 1 - p.minimum(q).sum(-1)


def agreement(p_logits: Tensor, q_logits: Tensor, ids: Tensor | None = None) -> Tensor:
    """Share of drafts of q that rejection sampling keeps, per row; of a part of them at a time.

    Of the target's logits [..., V] and the drafter's [..., V_draft], which are of the tokens `ids`
    int64 [V_draft]; None is all. Float32 [...], without a gradient.
    """
    p, q = p_logits.flatten(0, -2), q_logits.flatten(0, -2)
    some = rows_at_once(p)
    with torch.no_grad():
        parts = zip(p.split(some), q.split(some), strict=True)
        found = [_agreement(*part, ids) for part in parts]
    return torch.cat(found).view(q_logits.shape[:-1])


@compiled_once
def _agreement(p_logits: Tensor, q_logits: Tensor, ids: Tensor | None) -> Tensor:
    p = p_logits.float().softmax(-1)
    return 1 - total_variation(p if ids is None else p[..., ids], q_logits.float().softmax(-1))


def expected_length(agreement: Tensor, mask: Tensor) -> Tensor:
    """Expected number of accepted drafts of a block, float32 [...].

    `agreement` [..., G] is the probability that row j's draft is accepted if those before it are;
    the first row that `mask` bool [..., G] leaves out ends the block.
    """
    return (agreement.float() * mask).cumprod(-1).sum(-1)


def weighted_mean(values: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension; masked values count as 0 but stay in the denominator.

    That is, of [..., G], the sum of weights * values where the mask holds, over the sum of all
    weights.
    """
    return (values.masked_fill(~mask, 0.0) * weights).sum(-1) / weights.sum(-1)
