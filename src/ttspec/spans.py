"""Attention in which every query sees one span of slots, and only what is seen is read.

A verified token sees all slots up to its own, or a window of them; a drafted block sees the context
and itself. On a GPU the spans are read on the device, so that one captured graph serves a row of
any length, and long spans are split over the device's processors and put together afterwards (as
Flash-Decoding does: https://pytorch.org/blog/flash-decoding). Elsewhere the spans become a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.rowcache import reach_of

QUERIES = 64
"""Query rows of one key head that are worked on together, at most."""
KEYS = 64
"""Slots that are read together."""
_batch_invariant = False


def has_kernel(dtype: torch.dtype) -> bool:
    """Whether a GPU reads only what is seen; in float32 its matrix units have no part in it."""
    return dtype in (torch.bfloat16, torch.float16)


def reach_to_see(length: int, keys: Tensor) -> int | None:
    """How many slots `span_attention` must be given for `length` tokens; None is all."""
    if keys.is_cuda and has_kernel(keys.dtype):
        return None
    return reach_of(length, keys.shape[-2] - 1)


def spans(first: Tensor, last: Tensor, rest: Tensor) -> Tensor:
    """What tokens see, from slot to slot: int64 [B, 1, T, 2].

    From `first` to `last` int64 [B, T]; below 0 is 0. Rows at `rest` bool [B] see nothing.
    """
    last = last.masked_fill(rest[:, None], -1)
    return torch.stack([first.clamp(min=0).expand_as(last), last], dim=-1)[:, None]


def span_mask(seen: Tensor, reach: int) -> Tensor:
    """Spans as a mask: bool [B, 1, T, reach]."""
    slot = torch.arange(reach, device=seen.device)
    return (slot >= seen[..., :1]) & (slot <= seen[..., 1:])


def span_attention(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention; query heads that share a key head read it once.

    Of query [B, heads, T, D], and keys and values [B, kv heads, S, D], as far as `seen` int64 [B,
    1, T, 2], from `spans`, says. The factor of the scores is by default D ** -0.5. Returns [B, T,
    heads, D]; what a query sees nothing for is arbitrary, but finite.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.is_cuda and has_kernel(query.dtype):
        return _on_gpu(query, keys, values, seen, scale)
    batch, heads, width, size = query.shape
    group = heads // keys.shape[1]
    folded = query.reshape(batch, keys.shape[1], group * width, size)
    mask = span_mask(seen, keys.shape[2]).repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, width, size).transpose(1, 2).nan_to_num()


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Within, spans are read in parts that do not depend on them.

    What a query gets then does not hang on the tokens that are read with it, to the last bit.
    """
    global _batch_invariant
    before, _batch_invariant = _batch_invariant, True
    try:
        yield
    finally:
        _batch_invariant = before


def is_batch_invariant() -> bool:
    """Whether `batch_invariant` is in force."""
    return _batch_invariant


@torch.library.custom_op("ttspec::span_attention", mutates_args=(), device_types="cuda")
def _on_gpu(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
    kernels = _kernels()
    seen = seen.contiguous()  # the kernel counts on it
    batch, heads, width, size = query.shape
    group = heads // keys.shape[1]
    rows = min(QUERIES, max(16, _power_of_two(group * width)))
    tiles = -(-group * width // rows)
    splits = _splits(batch * keys.shape[1] * tiles, keys.shape[2], query.device)
    part = -(-keys.shape[2] // (splits * KEYS)) * KEYS if _batch_invariant else 0
    parts = query.new_empty(batch, heads, width, splits, size, dtype=torch.float32)
    weights = query.new_empty(batch, heads, width, splits, 2, dtype=torch.float32)
    wide = _power_of_two(size)
    kernels.attend[splits, keys.shape[1] * tiles, batch](
        query,
        keys,
        values,
        seen,
        parts,
        weights,
        scale * 1.4426950408889634,  # exp2 is what the device has
        width,
        group * width,
        tiles,
        part,
        *query.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        heads=heads,
        splits=splits,
        size=size,
        wide=wide,
        rows=rows,
        count=KEYS,
        num_warps=4,
        num_stages=3,
    )
    out = query.new_empty(batch, width, heads, size)
    kernels.combine[width, heads, batch](
        parts, weights, out, heads=heads, splits=splits, size=size, wide=wide, num_warps=1
    )
    return out


@_on_gpu.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:  # noqa: ARG001
    batch, heads, width, size = query.shape
    return query.new_empty(batch, width, heads, size)


def _splits(programs: int, slots: int, device: torch.device) -> int:
    """In how many parts a span is read: enough to give each processor two, no more than help."""
    wanted = 2 * _processors(device) // programs
    most = min(wanted, slots // (2 * KEYS), 64)
    return 1 << max(most.bit_length() - 1, 0) if most > 0 else 1


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _kernels() -> Any:
    from ttspec import span_kernels  # Triton is there only where torch can use a GPU

    return span_kernels
