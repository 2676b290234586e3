"""The kernel of `delta_rule`: a state goes on by what stayed, then drafts are read from it.

In a module of its own, since Triton is only there where torch can use a GPU.
"""

# pyright: basic
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def advance_and_read(
    state,
    deltas,
    kept_keys,
    kept_decays,
    counts,
    start,
    rests,
    query,
    key,
    value,
    decay,
    beta,
    out,
    tokens,
    width,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    size: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
    block: tl.constexpr,
):
    """Columns of one head's state [size, wide], which are in registers from first to last."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, deep)
    c = tl.program_id(0) * block + tl.arange(0, block)
    real, inside = d < size, c < wide
    of_head = row * heads + head
    of_key = row * key_heads + head // (heads // key_heads)
    place = state + (of_head * size + d[:, None]) * wide + c[None]
    both = real[:, None] & inside[None]
    count = tl.load(counts + row)
    begin = tl.load(start + row)
    s = tl.where(begin == 0, 0.0, tl.load(place, mask=both, other=0.0))
    for t in range(count):
        k = tl.load(kept_keys + (of_key * width + t) * size + d, mask=real, other=0.0)
        u = tl.load(deltas + (of_head * width + t) * wide + c, mask=inside, other=0.0)
        s = s * tl.exp(tl.load(kept_decays + of_head * width + t))
        # Rounded as below, so that a state does not depend on where rounds began.
        s = tl.fma(k[:, None], u[None], s)
    tl.store(place, s, mask=both)
    tl.debug_barrier()  # all have read the deltas that are written below
    rest = tl.load(rests + row).to(tl.int32)
    for t in range(tokens):
        new = (row * tokens + t) * heads + head
        new_key = (row * tokens + t) * key_heads + head // (heads // key_heads)
        k = tl.load(key + new_key * size + d, mask=real, other=0.0)
        q = tl.load(query + new_key * size + d, mask=real, other=0.0)
        v = tl.load(value + new * wide + c, mask=inside, other=0.0)
        s = s * tl.exp(tl.load(decay + new))
        u = tl.load(beta + new) * (v - tl.sum(s * k[:, None], 0))
        s = tl.fma(k[:, None], u[None], s)
        tl.store(deltas + (of_head * width + t) * wide + c, u, mask=inside & (rest == 0))
        tl.store(out + new * wide + c, tl.sum(s * q[:, None], 0), mask=inside)
