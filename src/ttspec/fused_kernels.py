"""The kernels of `fused` that attend; for `pdl` see `product_kernels`.

These let the next kernel begin at once, since programs of attention are few and small.
"""

# pyright: basic
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.language.extra import cuda  # pyright: ignore[reportMissingImports]


@triton.jit
def fetch(rows, begin, width: tl.constexpr, length: tl.constexpr):
    """Bring elements from `begin` on of rows [N], given by pointers, into the second-level cache.

    Nothing waits for them.
    """
    # A line has 128 bytes, 64 elements.
    lines: tl.constexpr = (length + 63) // 64
    line = tl.minimum(tl.arange(0, triton.next_power_of_2(lines)), lines - 1)
    at = rows[:, None] + tl.minimum(begin + line * 64, width - 1)[None]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [at],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def cut(begin, slots, window, splits: tl.constexpr, apart: tl.constexpr, least: tl.constexpr):
    """How a context is cut: its filled slots, the first that is seen, and how many a part has.

    `apart`: of `splits` parts the first has the new tokens alone.
    """
    filled = tl.where(begin < slots, begin, 0)
    low = tl.where(window > 0, tl.maximum(filled - window + 1, 0), 0) // least * least
    parts: tl.constexpr = splits - 1 if apart else splits
    each = tl.cdiv(tl.cdiv(tl.maximum(filled - low, 0), parts), least) * least
    return filled, low, tl.maximum(each, least)


@triton.jit
def turned(
    states, real, gain, cosine, sine, position, eps, size: tl.constexpr, normed: tl.constexpr
):
    """Queries or keys [rows, size] at pointers `states` [rows], normalised and rotated.

    cosine and sine have one row [size // 2] a position.
    """
    kind = states.dtype.element_ty
    d = tl.arange(0, size)
    half: tl.constexpr = size // 2
    other = (d + half) % size
    here = tl.load(states[:, None] + d[None], mask=real[:, None], other=0.0)
    there = tl.load(states[:, None] + other[None], mask=real[:, None], other=0.0)
    if normed:
        own = here.to(tl.float32)
        scale = tl.rsqrt(tl.sum(own * own, 1) / size + eps)[:, None]
        here = (own * scale).to(kind) * tl.load(gain + d)[None]
        there = (there.to(tl.float32) * scale).to(kind) * tl.load(gain + other)[None]
    at = position[:, None] * half + (d % half)[None]
    cos = tl.load(cosine + at, mask=real[:, None], other=0.0)
    sin = tl.load(sine + at, mask=real[:, None], other=0.0)
    there = tl.where(d[None] < half, -there, there)
    return here * cos + there * sin


@triton.jit
def seen(query, k, v, sees, scale, best, total, sums):
    """A step of a softmax that is put together piece by piece: keys and values [N, size] more."""
    score = tl.where(sees, tl.dot(query, tl.trans(k)) * scale, float("-inf"))
    now = tl.maximum(best, tl.max(score, 1))
    safe = tl.where(now == float("-inf"), 0.0, now)  # nothing seen so far
    p = tl.exp2(score - safe[:, None])
    shrink = tl.exp2(best - safe)
    sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v)
    return now, total * shrink + tl.sum(p, 1), sums


@triton.jit(do_not_specialize=["ahead", "window"])
def attend(
    states,
    keys,
    values,
    start,
    which,
    cosine,
    sine,
    query_gain,
    key_gain,
    parts,
    weights,
    scale,
    eps,
    slots,
    ahead,
    window,
    width,
    tiles,
    row_stride,
    head_stride,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    size: tl.constexpr,
    normed: tl.constexpr,
    some: tl.constexpr,
    causal: tl.constexpr,
    splits: tl.constexpr,
    apart: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    count: tl.constexpr,
    least: tl.constexpr,
    stages: tl.constexpr,
    pdl: tl.constexpr,
):
    """One part of what `rows` queries of a key head see, softmax not yet normalised.

    states: what the layer's first product made, [B x width, (heads + 2 kv heads) x size]. The first
    part has the new tokens' own keys and values, and writes them to the cache; `apart`: it has
    nothing else, so no part takes two turns. `causal`: they see those before them, else each other,
    and a window counts from the first. A row that starts at or past `slots` leaves the cache
    as it is. A row's first token stands `ahead` of its start. `some`: the rows lie in the cache as
    `which` says. Query m of a key head is query head m // width, token m % width.
    """
    group: tl.constexpr = heads // kv_heads
    whole: tl.constexpr = (heads + 2 * kv_heads) * size
    split, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head, tile = tl.program_id(1) // tiles, tl.program_id(1) % tiles
    d = tl.arange(0, size)
    # What is in the cache already was written by an earlier forward.
    begin = tl.load(start + batch).to(tl.int32) + ahead
    filled, low, each = cut(begin, slots, window, splits, apart, least)
    from_slot = low + split * each
    if apart:
        from_slot = tl.where(split == 0, filled, from_slot - each)
    to_slot = tl.minimum(from_slot + each, filled)
    lies = tl.load(which + batch) if some else batch
    place = lies * row_stride + head * head_stride
    if pdl:
        cuda.gdc_launch_dependents()
        if from_slot < filled:
            soon = place + tl.minimum(from_slot + tl.arange(0, least), slots - 1) * size
            fetch(keys + soon, 0, size, size)
            fetch(values + soon, 0, size, size)
    # What earlier forwards wrote may be read before the wait.
    near = from_slot + tl.arange(0, count)
    near_at = place + near[:, None] * size + d[None]
    near_k = tl.load(keys + near_at, mask=(near < to_slot)[:, None], other=0.0)
    near_v = tl.load(values + near_at, mask=(near < to_slot)[:, None], other=0.0)
    if pdl:
        cuda.gdc_wait()
    if (from_slot < filled) | (split == 0):
        m = tile * rows + tl.arange(0, rows)
        real = m < group * width
        token = m % width
        position = tl.minimum(begin + token, slots - 1)
        query_head = head * group + m // width
        at = states + (batch * width + token) * whole + query_head * size
        query = turned(at, real, query_gain, cosine, sine, position, eps, size, normed)
        best = tl.full([rows], float("-inf"), tl.float32)
        total = tl.zeros([rows], tl.float32)
        sums = tl.zeros([rows, size], tl.float32)
        earliest = tl.where(window > 0, begin + (token if causal else 0) - window + 1, 0)
        # Not where the new tokens are a part of their own; else a loop within an "if" is slow.
        if not apart or split > 0:
            sees_near = (near < to_slot)[None] & (near[None] >= earliest[:, None])
            best, total, sums = seen(query, near_k, near_v, sees_near, scale, best, total, sums)
            for n in tl.range(from_slot + count, to_slot, count, num_stages=stages):
                slot = n + tl.arange(0, count)
                there = (slot < to_slot)[:, None]
                k = tl.load(keys + place + slot[:, None] * size + d[None], mask=there, other=0.0)
                v = tl.load(values + place + slot[:, None] * size + d[None], mask=there, other=0.0)
                sees = (slot < to_slot)[None] & (slot[None] >= earliest[:, None])
                best, total, sums = seen(query, k, v, sees, scale, best, total, sums)
        if split == 0:
            t = tl.arange(0, block)
            new = t < width
            own = states + (batch * width + t) * whole + (heads + head) * size
            slot = begin + t
            k = turned(
                own, new, key_gain, cosine, sine, tl.minimum(slot, slots - 1), eps, size, normed
            )
            v = tl.load(own[:, None] + kv_heads * size + d[None], mask=new[:, None], other=0.0)
            if tile == 0:
                kept = (new & (slot < slots))[:, None]
                tl.store(keys + place + slot[:, None] * size + d[None], k, mask=kept)
                tl.store(values + place + slot[:, None] * size + d[None], v, mask=kept)
            sees = new[None] & (slot[None] >= earliest[:, None])
            if causal:
                sees = sees & (t[None] <= token[:, None])
            best, total, sums = seen(query, k, v, sees, scale, best, total, sums)
        out = ((batch * width + token) * heads + query_head) * splits + split
        tl.store(weights + out * 2, best, mask=real)
        tl.store(weights + out * 2 + 1, total, mask=real)
        tl.store(parts + out[:, None] * size + d[None], sums, mask=real[:, None])


@triton.jit(do_not_specialize=["ahead", "window"])
def combine(
    parts,
    weights,
    start,
    out,
    slots,
    ahead,
    window,
    width,
    heads: tl.constexpr,
    size: tl.constexpr,
    splits: tl.constexpr,
    apart: tl.constexpr,
    least: tl.constexpr,
    pdl: tl.constexpr,
):
    """The parts of one query as one vector [size]."""
    token, head = tl.program_id(0), tl.program_id(1)
    if pdl:
        cuda.gdc_launch_dependents()
    # As in `attend`: nobody writes where a row begins while a forward runs.
    begin = tl.load(start + token // width).to(tl.int32) + ahead
    filled, low, each = cut(begin, slots, window, splits, apart, least)
    if pdl:
        cuda.gdc_wait()
    split = tl.arange(0, splits)
    used = (low + (split - 1 if apart else split) * each < filled) | (split == 0)
    at = (token * heads + head) * splits + split
    d = tl.arange(0, size)
    best = tl.load(weights + at * 2, mask=used, other=float("-inf"))
    total = tl.load(weights + at * 2 + 1, mask=used, other=0.0)
    part = tl.load(parts + at[:, None] * size + d[None], mask=used[:, None], other=0.0)
    share = tl.exp2(best - tl.max(best, 0))
    result = tl.sum(part * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(out + (token * heads + head) * size + d, result.to(out.dtype.element_ty))
