"""The two kernels of `spans`: attention over one part of every span, and putting parts together.

In a module of its own, since Triton is only there where torch can use a GPU.
"""

# pyright: basic
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def attend(
    query,
    keys,
    values,
    seen,
    parts,
    weights,
    scale,
    width,
    queries,
    tiles,
    part,
    query_row,
    query_head,
    query_token,
    key_row,
    key_head,
    key_slot,
    value_row,
    value_head,
    value_slot,
    heads: tl.constexpr,
    splits: tl.constexpr,
    size: tl.constexpr,
    wide: tl.constexpr,
    rows: tl.constexpr,
    count: tl.constexpr,
):
    """Part `split` of what `rows` queries of one key head see, softmax not yet normalised.

    Query m of a key head is query head m // width, token m % width. A `part` of 0 makes all parts
    equally long over what is seen; else part n begins at slot n x part.
    """
    split, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    kv_head, tile = tl.program_id(1) // tiles, tl.program_id(1) % tiles
    m = tile * rows + tl.arange(0, rows)
    real = m < queries
    token = m % width
    head = kv_head * (queries // width) + m // width
    d = tl.arange(0, wide)
    inside = d < size
    at = seen + (batch * width + token) * 2
    first = tl.load(at, mask=real, other=1 << 30).to(tl.int32)
    last = tl.load(at + 1, mask=real, other=-1).to(tl.int32)
    # All parts are equally long, in whole steps, over what any of these queries sees.
    low = tl.min(tl.where(last >= 0, first, 1 << 30), 0) // count * count
    high = tl.max(last, 0) + 1
    each = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), count), splits) * count
    begin = tl.where(part > 0, tl.maximum(split * part, low), low + split * each)
    end = tl.minimum(tl.where(part > 0, (split + 1) * part, begin + each), high)
    q = tl.load(
        query
        + batch * query_row
        + head[:, None] * query_head
        + token[:, None] * query_token
        + d[None],
        mask=real[:, None] & inside[None],
        other=0.0,
    )
    best = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    sums = tl.zeros([rows, wide], tl.float32)
    key_at = keys + batch * key_row + kv_head * key_head
    value_at = values + batch * value_row + kv_head * value_head
    for n in range(begin, end, count):
        slot = n + tl.arange(0, count)
        there = (slot < end)[:, None] & inside[None]
        k = tl.load(key_at + slot[:, None] * key_slot + d[None], mask=there, other=0.0)
        v = tl.load(value_at + slot[:, None] * value_slot + d[None], mask=there, other=0.0)
        score = tl.dot(q, tl.trans(k)) * scale
        sees = (slot[None] >= first[:, None]) & (slot[None] <= last[:, None])
        score = tl.where(sees & (slot < end)[None], score, float("-inf"))
        now = tl.maximum(best, tl.max(score, 1))
        safe = tl.where(now == float("-inf"), 0.0, now)  # nothing seen so far
        p = tl.exp2(score - safe[:, None])
        shrink = tl.exp2(best - safe)
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        best = now
    out = ((batch * heads + head) * width + token) * splits + split
    tl.store(weights + out * 2, best, mask=real)
    tl.store(weights + out * 2 + 1, total, mask=real)
    tl.store(parts + out[:, None] * size + d[None], sums, mask=real[:, None] & inside[None])


@triton.jit
def combine(
    parts,
    weights,
    out,
    heads: tl.constexpr,
    splits: tl.constexpr,
    size: tl.constexpr,
    wide: tl.constexpr,
):
    """One query's parts as one vector; zeros for a query that sees nothing."""
    token, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    width = tl.num_programs(0)
    at = ((batch * heads + head) * width + token) * splits
    split = tl.arange(0, splits)
    d = tl.arange(0, wide)
    inside = d < size
    best = tl.load(weights + (at + split) * 2)
    total = tl.load(weights + (at + split) * 2 + 1)
    top = tl.max(best, 0)
    share = tl.exp2(best - tl.where(top == float("-inf"), 0.0, top))
    part = tl.load(parts + (at + split)[:, None] * size + d[None], mask=inside[None], other=0.0)
    sums = tl.sum(part * share[:, None], 0)
    whole = tl.sum(total * share, 0)
    result = sums / tl.where(whole > 0, whole, 1.0)
    place = out + ((batch * width + token) * heads + head) * size + d
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)
