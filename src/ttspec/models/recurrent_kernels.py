"""The kernel of `recurrent`: a state goes on by what stayed, then drafts are read from it.

In a module of its own, since Triton is only there where torch can use a GPU.
"""

# pyright: basic
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def advance_and_read(
    state,
    kept_keys,
    kept_deltas,
    kept_decays,
    counts,
    fresh,
    query,
    key,
    value,
    decay,
    beta,
    out,
    deltas,
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
    new = tl.load(fresh + row)
    s = tl.where(new == 0, tl.load(place, mask=both, other=0.0), 0.0)
    for t in range(count):
        k = tl.load(kept_keys + (of_key * width + t) * size + d, mask=real, other=0.0)
        u = tl.load(kept_deltas + (of_head * width + t) * wide + c, mask=inside, other=0.0)
        s = s * tl.exp(tl.load(kept_decays + of_head * width + t))
        # Rounded as below, so that a state does not depend on where rounds began.
        s = tl.fma(k[:, None], u[None], s)
    tl.store(place, s, mask=both)
    for t in range(tokens):
        k = tl.load(key + (of_key * tokens + t) * size + d, mask=real, other=0.0)
        q = tl.load(query + (of_key * tokens + t) * size + d, mask=real, other=0.0)
        at = (of_head * tokens + t) * wide + c
        v = tl.load(value + at, mask=inside, other=0.0)
        s = s * tl.exp(tl.load(decay + of_head * tokens + t))
        u = tl.load(beta + of_head * tokens + t) * (v - tl.sum(s * k[:, None], 0))
        s = tl.fma(k[:, None], u[None], s)
        tl.store(deltas + at, u, mask=inside)
        tl.store(out + at, tl.sum(s * q[:, None], 0), mask=inside)
