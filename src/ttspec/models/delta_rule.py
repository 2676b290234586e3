"""The gated delta rule over a few tokens: states go on by some, and are read by others."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HAS_KERNEL = find_spec("triton") is not None
"""Whether Triton is there, which torch brings where it can use a GPU."""
BLOCK = 32
"""Columns of a state that one program of a GPU works on."""


def advance(
    state: Tensor, keys: Tensor, deltas: Tensor, decay: Tensor, count: Tensor | None = None
) -> None:
    """Let states go on by some tokens.

    Args:
        state: float32 [B, Hv, Dk, Dv], changed in place.
        keys: float32 [B, Hk, T, Dk].
        deltas: float32 [B, Hv, T, Dv], of `read_block`.
        decay: float32 [B, Hv, T], likewise.
        count: int64 [B], how many of the tokens; None is all.
    """
    decays = decay.cumsum(2)
    if count is None:
        last, left = decays[..., -1:], decays
    else:
        last = F.pad(decays, (1, 0)).gather(2, like(count, decays).expand(-1, decays.shape[1], 1))
        later = torch.arange(decays.shape[2], device=count.device) >= like(count, decays)
        left = decays.masked_fill(later, torch.inf)
    written = _for_values(keys, deltas) * (last - left).exp()[..., None]
    state.mul_(last.exp()[..., None])
    state.flatten(0, 1).baddbmm_(written.transpose(2, 3).flatten(0, 1), deltas.flatten(0, 1))


def read_block(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule over a few tokens, the state left as it is.

    Token t makes of S: S' = exp(decay_t) S; S = S' + key_t delta_t, with delta_t = beta_t (value_t
    - S' key_t), and reads S query_t. With what the state holds for the keys known, the deltas are
    the solution of one triangular system.

    Args:
        state: float32 [B, Hv, Dk, Dv].
        query: float32 [B, Hk, T, Dk].
        key: float32 [B, Hk, T, Dk].
        value: float32 [B, Hv, T, Dv].
        decay: float32 [B, Hv, T].
        beta: float32 [B, Hv, T].

    Returns:
        What is read and the deltas, [B, Hv, T, Dv].
    """
    query, key = _for_values(query, value), _for_values(key, value)
    decays = decay.cumsum(2)
    since = decays[..., :, None] - decays[..., None, :]
    later = torch.ones(since.shape[-2:], dtype=torch.bool, device=since.device).triu(1)
    since = since.masked_fill(later, -torch.inf).exp()
    left, beta = decays.exp()[..., None], beta[..., None]
    # The solver takes the diagonal for ones.
    system = beta * since * (key @ key.transpose(2, 3))
    right_side = beta * (value - left * (key @ state))
    deltas = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    out = left * (query @ state) + (since * (query @ key.transpose(2, 3))) @ deltas
    return out, deltas


def _for_values(keys: Tensor, values: Tensor) -> Tensor:
    """Keys [B, Hk, T, D] for every head of values: heads side by side share a key head."""
    group = values.shape[1] // keys.shape[1]
    return keys if group == 1 else keys.repeat_interleave(group, 1)


def like(count: Tensor, decays: Tensor) -> Tensor:
    """Numbers [B] as [B, 1, ...], of as many dimensions as the other's."""
    return count.view(-1, *[1] * (decays.dim() - 1))


@torch.library.custom_op("ttspec::advance_and_read", mutates_args=("state", "deltas"))
def advance_and_read(
    state: Tensor,
    deltas: Tensor,
    kept: list[Tensor],
    rows: list[Tensor],
    tokens: list[Tensor],
) -> Tensor:
    """`advance`, then `read_block`, in one pass over the states of all rows, on a GPU.

    Args:
        state: float32 [rows, Hv, Dk, Dv]; becomes that after as many kept tokens as are said.
        deltas: float32 [rows, Hv, width, Dv], of the kept tokens; become those of these tokens.
        kept: Keys and decay of the kept tokens, as `advance` takes them.
        rows: Of each row, how many of the kept tokens stayed, int64; where these tokens begin,
            int64, at 0 its state is taken for zero; whether it rests, bool: it keeps its deltas.
        tokens: Query, key, value, decay and beta, as `read_block` takes them, but [rows, T, ...].

    Returns:
        What is read, float32 [rows, T, Hv, Dv].
    """
    tokens = [part.contiguous() for part in tokens]
    key, value = tokens[1:3]
    count, heads, size, wide = state.shape
    block = min(BLOCK, 1 << (wide - 1).bit_length())
    out = torch.empty_like(value)
    with torch.cuda.device_of(value):  # Triton launches on the current one
        _kernels().advance_and_read[-(-wide // block), heads, count](
            state,
            deltas,
            *kept,
            *rows,
            *tokens,
            out,
            value.shape[1],
            deltas.shape[2],
            heads=heads,
            key_heads=key.shape[2],
            size=size,
            wide=wide,
            deep=1 << (size - 1).bit_length(),
            block=block,
            num_warps=4,
        )
    return out


@advance_and_read.register_fake
def _(
    state: Tensor,  # noqa: ARG001
    deltas: Tensor,  # noqa: ARG001
    kept: list[Tensor],  # noqa: ARG001
    rows: list[Tensor],  # noqa: ARG001
    tokens: list[Tensor],
) -> Tensor:
    return tokens[2].new_empty(tokens[2].shape)


@cache
def _kernels() -> Any:
    from ttspec.models import recurrent_kernels

    return recurrent_kernels
