"""The kernels of `products`, which leave norms to their neighbours.

An RMSNorm is a gain an element and a factor a token. Whoever makes states multiplies them by the
gain of the norm to come and adds up their squares; whoever reads them multiplies its sums by the
factor. So no product reads all states before its first sum.

With `pdl` a kernel begins while the one before it still runs, fetches weights, which nobody writes,
and waits before it reads anything else. It lets the next one begin after that wait, not before:
else six of them lie on the device at once, and their programs are put where there is room, many on
one processor.
"""

# pyright: basic
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.language.extra import cuda  # pyright: ignore[reportMissingImports]

from ttspec.fused_kernels import fetch


@triton.jit
def scaled(x, gain, out, squares, width: tl.constexpr, full: tl.constexpr, pdl: tl.constexpr):
    """States [tokens, width] times a gain, and the sum of each token's squares."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, full)
    inside = d < width
    factor = tl.load(gain + d, mask=inside, other=0.0)
    if pdl:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    states = tl.load(x + row * width + d, mask=inside, other=0.0)
    tl.store(out + row * width + d, states * factor, mask=inside)
    long = states.to(tl.float32)
    tl.store(squares + row, tl.sum(long * long, 0))


@triton.jit
def narrowed(
    x,
    first,
    second,
    out,
    tokens,
    rank,
    tables: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    rows: tl.constexpr,
    share: tl.constexpr,
    steps: tl.constexpr,
    pdl: tl.constexpr,
):
    """A part of states [tokens, width] times one or two tables [rank, width], [rows, wide].

    Each table has as many of the rows, those past its rank are 0.
    """
    part = tl.program_id(0)
    each: tl.constexpr = rows // tables
    r, m, k = tl.arange(0, rows), tl.arange(0, wide), tl.arange(0, share)
    begin = part * (steps * share)
    table = first + tl.minimum(r % each, rank - 1) * width
    if tables > 1:
        table = tl.where(r < each, table, second + tl.minimum(r % each, rank - 1) * width)
    known = (r % each < rank)[:, None]
    if pdl:
        cuda.gdc_launch_dependents()  # its programs are few and small
        fetch(table, begin, width, steps * share)
        cuda.gdc_wait()
    sums = tl.zeros([rows, wide], tl.float32)
    for step in tl.static_range(steps):
        at = (begin + step * share + k)[None]
        w = tl.load(table[:, None] + at, mask=known & (at < width), other=0.0)
        real = (m < tokens)[:, None] & (at < width)
        z = tl.load(x + m[:, None] * width + at, mask=real, other=0.0)
        sums = tl.dot(w, tl.trans(z), sums)
    tl.store(out + (part * rows + r[:, None]) * wide + m[None], sums)


@triton.jit
def finish(
    sums,
    scale,
    offset,
    before,
    factor,
    out,
    scaled_out,
    squares_out,
    n,
    tokens,
    outputs,
    normed: tl.constexpr,
    gated: tl.constexpr,
    biased: tl.constexpr,
    added: tl.constexpr,
    wide: tl.constexpr,
):
    """What becomes of whole sums [rows, wide], rounded where the model's own code rounds."""
    kind = out.dtype.element_ty
    m = tl.arange(0, wide)
    real = (n < outputs)[:, None] & (m < tokens)[None]
    at = m[None] * outputs + n[:, None]
    if normed:
        sums *= scale[None]
    if biased:
        sums += offset[:, None]
    if gated:
        halves = tl.reshape(sums, [2, sums.shape[0] // 2, wide])
        gate, up = tl.split(tl.permute(halves, (1, 2, 0)))
        gate = gate.to(kind).to(tl.float32)
        result = (gate / (1 + tl.exp(-gate))).to(kind) * up.to(kind)
    else:
        result = sums.to(kind)
    if added:
        result = before + result
        long = tl.where(real, result, 0.0).to(tl.float32)
        tl.store(squares_out + m, tl.sum(long * long, 0))
        tl.store(scaled_out + at, result * factor[:, None], mask=real)
    tl.store(out + at, result, mask=real)


@triton.jit(do_not_specialize=["tokens", "pieces", "rank"])
def product(
    x,
    weight,
    second,
    third,
    bias,
    squares,
    residual,
    gain,
    out,
    scaled_out,
    squares_out,
    scratch,
    ended,
    inner,
    up,
    second_up,
    eps,
    rank,
    tokens,
    outputs,
    first_end,
    second_end,
    residual_stride,
    pieces,
    tables: tl.constexpr,
    width: tl.constexpr,
    normed: tl.constexpr,
    gated: tl.constexpr,
    biased: tl.constexpr,
    added: tl.constexpr,
    changes: tl.constexpr,
    ranks: tl.constexpr,
    inner_parts: tl.constexpr,
    most_pieces: tl.constexpr,
    wide: tl.constexpr,
    rows: tl.constexpr,
    splits: tl.constexpr,
    share: tl.constexpr,
    parts: tl.constexpr,
    stages: tl.constexpr,
    ahead: tl.constexpr,
    pdl: tl.constexpr,
):
    """States [tokens, width] times `rows` of a table [outputs, width], or a part of that.

    `tables`: of so many the outputs lie side by side; those of the first end at `first_end`, of the
    second at `second_end`, after whole blocks. `normed`: x is scaled, and `squares` [pieces, wide]
    add up to its squares. `gated`: half of the rows are of `second`, whose outputs are multiplied
    with the SiLU of `weight`'s. `added`: `residual` is added, and the sum is scaled by `gain`, too.
    `changes`: to the first table belongs `up` [outputs, rank] times what `narrowed` made, parts
    [ranks, wide]; of two, to the second `second_up`.
    K is split among `parts` programs, of which the last to end adds what they have, always in one
    order (`ended` [blocks] is 0 before and after), and within a program among `splits` warps.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    each: tl.constexpr = rows // 2 if gated else rows
    chunk: tl.constexpr = splits * share
    steps: tl.constexpr = (width + chunk * parts - 1) // (chunk * parts)
    first = block * each
    base = first * 0  # the first output of the table that this block is of
    if tables > 1:  # noqa: SIM102 - decided when it is compiled; what is below, when it runs
        if first >= first_end:
            weight = second
            base += first_end
    if tables > 2:  # noqa: SIM102
        if first >= second_end:
            weight = third
            base += second_end - first_end
    n = first + tl.arange(0, each)
    r = tl.arange(0, rows)
    row = tl.minimum(first - base + r % each, outputs - base - 1).to(tl.int64)
    table = weight + row * width
    if gated:
        table = tl.where(r < each, table, second + row * width)
    m = tl.arange(0, wide)
    begin = part * (steps * chunk)
    if splits == 1:
        k = tl.arange(0, chunk)[None]
        down = k
        weights, states = table[:, None] + k, x + m[:, None] * width + k
        real = (m < tokens)[:, None]
        sums = tl.zeros([rows, wide], tl.float32)
    else:
        s = tl.arange(0, splits)[:, None, None] * share
        k = s + tl.arange(0, share)[None, None, :]
        down = s + tl.arange(0, share)[None, :, None]
        weights, states = table[None, :, None] + k, x + m[None, None, :] * width + down
        real = (m < tokens)[None, None, :]
        sums = tl.zeros([splits, rows, wide], tl.float32)
    # Weights may be read at once, what other kernels write only after the wait.
    if steps == 1:
        w = tl.load(weights + begin, mask=begin + k < width, other=0.0)
    elif pdl and ahead > 0:
        fetch(table, begin, width, min(steps * chunk, ahead))
    offset = tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32) if biased else 0.0
    factor = tl.load(gain + n, mask=n < outputs, other=0.0) if added else 0.0
    if pdl:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    # All reads before the first sum: what is read after it is waited for once more.
    square, before = 0.0, 0.0
    if normed:
        square = tl.zeros([16, wide], tl.float32)
        for some in tl.static_range(0, most_pieces, 16):  # 16 of them a warp adds up by itself
            piece = some + tl.arange(0, 16)[:, None]
            known = (piece < pieces) & (m < tokens)[None]
            square += tl.load(squares + piece * wide + m[None], mask=known, other=0.0)
    if added:
        there = (n < outputs)[:, None] & (m < tokens)[None]
        before = tl.load(residual + m[None] * residual_stride + n[:, None], mask=there, other=0.0)
    if changes > 0:
        j = tl.arange(0, ranks)
        low = tl.zeros([ranks, wide], tl.float32)
        for piece in tl.static_range(inner_parts):
            low += tl.load(inner + (piece * ranks + j[:, None]) * wide + m[None])
    if steps == 1:
        z = tl.load(states + begin, mask=real & (begin + down < width), other=0.0)
        sums = tl.dot(w, tl.trans(z) if splits == 1 else z, sums)
    else:
        for step in tl.range(0, steps, num_stages=stages):
            place = begin + step * chunk
            w = tl.load(weights + place, mask=place + k < width, other=0.0)
            z = tl.load(states + place, mask=real & (place + down < width), other=0.0)
            sums = tl.dot(w, tl.trans(z) if splits == 1 else z, sums)
    whole = sums if splits == 1 else tl.sum(sums, 0)
    scale = 0.0
    if normed:
        scale = tl.rsqrt(tl.sum(square, 0) / width + eps)
    last = True
    if parts > 1:
        cell = scratch + block * (parts * rows * wide) + r[:, None] * wide + m[None]
        tl.store(cell + part * (rows * wide), whole)
        tl.debug_barrier()
        last = tl.atomic_add(ended + block, 1, sem="acq_rel", scope="gpu") == parts - 1
        if last:
            tl.store(ended + block, 0)
            whole = tl.zeros([rows, wide], tl.float32)
            for one in tl.static_range(parts):
                whole += tl.load(cell + one * (rows * wide), cache_modifier=".cg")
    if last:
        if changes > 0:
            own: tl.constexpr = ranks // changes
            of = first + r % each  # the output that a row is of
            high = up + of[:, None] * rank + j[None]
            has = (of < tl.minimum(first_end, outputs))[:, None] & (j < rank)[None]
            if changes > 1:
                ours = (r < each)[:, None] == (j < own)[None]  # of the row's own table
                high = tl.where(
                    (r < each)[:, None], high, second_up + of[:, None] * rank + j[None] - own
                )
                has = (of < outputs)[:, None] & ours & (j % own < rank)[None]
            u = tl.load(high, mask=has, other=0.0)
            whole = tl.dot(u, low.to(u.dtype), whole)
        squares_out += block * wide
        finish(
            whole,
            scale,
            offset,
            before,
            factor,
            out,
            scaled_out,
            squares_out,
            n,
            tokens,
            outputs,
            normed,
            gated,
            biased,
            added,
            wide,
        )
