"""Layers for few tokens as few Triton kernels, for targets and drafters (Hopper GPUs).

At few tokens a small model's time goes into launching kernels and waiting for the last of them.
Here and in `products` each does more, and begins while the one before it still runs. Sums are
float32 and are rounded where the model's own code rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

MANY = 512
"""Tokens of all rows that the kernels are quicker for, up to a hidden size of `WIDEST`."""
LONGEST = 128
"""Tokens of one row whose own keys `attention` holds at once."""
WIDEST = 1024
"""Hidden size from which on the device's own products of many tokens gain more from compiling."""
MANY_WIDE = 96
"""The same past that size; for more, compiled code measured faster."""
KEYS = 64
"""Slots that are read together."""
PROCESSORS = 132
"""Of the devices that the kernels are for."""
SMALL = 16
"""Queries of a key head that are worked on together, at least."""
LEAST = 64
"""Slots of a part of a row's context, at least."""
APART = 16
"""Parts from which on one has the new tokens alone: with fewer that measured slower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Attention of a layer."""

    count: int
    kv_count: int
    size: int
    scale: float
    eps: float
    query_gain: Tensor | None = None
    """[size] of an RMSNorm of each query, and of each key; None where there is none."""
    key_gain: Tensor | None = None


def fits(
    like: Tensor, *, hidden: int, head_size: int, widths: Sequence[int], activation: str
) -> bool:
    """Whether the kernels are for layers of these sizes, on the device and in the dtype of `like`.

    Args:
        like: Any weight.
        hidden: Size of the states between layers.
        head_size: Of one query.
        widths: What products read besides `hidden`.
        activation: Of the MLP.
    """
    if like.device.type != "cuda" or like.dtype != torch.bfloat16 or activation != "silu":
        return False
    even = not any(width % 64 for width in (hidden, *widths))
    hopper = torch.cuda.get_device_capability(like.device) >= (9, 0)
    return head_size in (64, 128) and even and hopper


def attention(
    made: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    angles: tuple[Tensor, Tensor],
    heads: Heads,
    *,
    subset: Tensor | None = None,
    ahead: int = 0,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Rotate queries and keys, write keys and values where they belong, and attend.

    Args:
        made: [B * T, (heads + 2 kv heads) * size], what a product made: queries, keys, values.
        keys: [rows, kv heads, slots + 1, size], written in place.
        values: As keys.
        start: int64 [B], where each row's first token stands, less `ahead`; a row that would begin
            past all slots rests.
        angles: Cosines and sines, each [slots, size / 2].
        heads: How many, and their norms.
        subset: int64 [B], the rows of keys and values that are meant; None is all.
        ahead: Added to `start`.
        window: A token sees so many, itself included; None is all.
        causal: If not, new tokens see each other, and all of them what the first one sees.

    Returns:
        [B * T, heads * size].
    """
    count, rows, slots = made.shape[0], start.shape[0], keys.shape[2] - 1
    width = count // rows
    queries = heads.count // heads.kv_count * width
    tile = min(64, max(SMALL, 1 << (queries - 1).bit_length()))
    tiles = -(-queries // tile)
    splits = splits_of(rows * heads.kv_count * tiles, slots, held=2 if tile == SMALL else 1)
    apart = splits >= APART
    parts = made.new_empty(count, heads.count, splits, heads.size, dtype=torch.float32)
    weights = made.new_empty(count, heads.count, splits, 2, dtype=torch.float32)
    out = made.new_empty(count, heads.count * heads.size)
    normed, kernels = heads.query_gain is not None, _kernels()
    kernels.attend[(splits, heads.kv_count * tiles, rows)](
        made,
        keys,
        values,
        start,
        start if subset is None else subset,
        *angles,
        heads.query_gain if normed else made,
        heads.key_gain if normed else made,
        parts,
        weights,
        heads.scale * 1.4426950408889634,  # exp2 is what the device has
        heads.eps,
        slots,
        ahead,
        window or 0,
        width,
        tiles,
        keys.stride(0),
        keys.stride(1),
        heads=heads.count,
        kv_heads=heads.kv_count,
        size=heads.size,
        normed=normed,
        some=subset is not None,
        causal=causal,
        splits=splits,
        apart=apart,
        rows=tile,
        block=max(16, 1 << (width - 1).bit_length()),
        count=KEYS,
        least=LEAST,
        stages=4 if slots // splits >= 4 * KEYS else 2,
        num_warps=4,
        **launch(made),
    )
    kernels.combine[(count, heads.count)](
        parts,
        weights,
        start,
        out,
        slots,
        ahead,
        window or 0,
        width,
        heads=heads.count,
        size=heads.size,
        splits=splits,
        apart=apart,
        least=LEAST,
        num_warps=1,
        **launch(made),
    )
    return out


def joined(
    tokens: Tensor,
    table: Tensor,
    states: Tensor,
    table_gain: Tensor,
    states_gain: Tensor,
    eps: float,
) -> Tensor:
    """Embeddings of tokens and states, each RMS-normalised, side by side.

    Args:
        tokens: int64 [B].
        table: [V, H]; tokens past it are its last.
        states: [B, H].
        table_gain: [H].
        states_gain: [H].
        eps: Of both norms.

    Returns:
        [B, 2 * H].
    """
    count, width = states.shape
    out = states.new_empty(count, 2 * width)
    _row_kernels().joined[(count,)](
        tokens,
        table,
        states,
        table_gain,
        states_gain,
        out,
        eps,
        table.shape[0] - 1,
        states.stride(0),
        width=width,
        wide=1 << (width - 1).bit_length(),
        num_warps=4,
        **launch(states),
    )
    return out


def normed(
    x: Tensor, gain: Tensor, eps: float, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """States, and the same RMS-normalised and scaled.

    Args:
        x: [tokens, H].
        gain: [H].
        eps: Of the norm.
        more: [tokens, H], is added first.

    Returns:
        The sum, and what the norm makes of it, [tokens, H] each.
    """
    total, out = x if more is None else torch.empty_like(x), torch.empty_like(x)
    width = x.shape[1]
    _row_kernels().normed[(len(x),)](
        x,
        x if more is None else more,
        gain,
        total,
        out,
        eps,
        width=width,
        wide=1 << (width - 1).bit_length(),
        added=more is not None,
        num_warps=4,
        **launch(x),
    )
    return total, out


def gated(made: Tensor) -> Tensor:
    """The SiLU of the first half of each token's states [tokens, 2 x width], times the second."""
    count, width = made.shape[0], made.shape[1] // 2
    out = made.new_empty(count, width)
    grid = count, -(-width // 1024)
    _row_kernels().gated[grid](made, out, width=width, block=1024, num_warps=4, **launch(made))
    return out


def splits_of(programs: int, slots: int, held: int = 1) -> int:
    """In how many parts a context is read: `held` for each processor, no more than help."""
    most = min(held * PROCESSORS // programs, slots // LEAST, 64)
    return 1 << max(most.bit_length() - 1, 0) if most > 0 else 1


def launch(x: Tensor) -> dict[str, bool]:
    """On a GPU a kernel begins before the one before it has ended; the interpreter cannot."""
    return {"pdl": True, "launch_pdl": True} if x.is_cuda else {"pdl": False}


@cache
def _kernels() -> Any:
    from ttspec import fused_kernels  # Triton is there only where torch can use a GPU

    return fused_kernels


@cache
def _row_kernels() -> Any:
    from ttspec import row_kernels

    return row_kernels
