"""The kernels of `losses`: rows as wide as a vocabulary, of which each is read in several parts.

In a module of its own, since Triton is only there where torch can use a GPU.
"""

# pyright: basic
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def masses(p_logits, q_logits, parts, size, share: tl.constexpr, block: tl.constexpr):
    """Of a part of a row [5]: the largest logit and the exponentials' sum, of p and of q.

    And for p the exponentials times how much larger its logits are than q's.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, block)
    most, sum_, lead = (
        tl.full([block], -1e30, tl.float32),
        tl.zeros([block], tl.float32),
        lane * 0.0,
    )
    q_most, q_sum = most, sum_
    for begin in range(0, share, block):
        at = part * share + begin + lane
        inside = at < size
        # As good as masked: minus infinity would be multiplied by zero.
        x = tl.load(p_logits + row * size + at, mask=inside, other=-1e30).to(tl.float32)
        y = tl.load(q_logits + row * size + at, mask=inside, other=-1e30).to(tl.float32)
        x, y = tl.maximum(x, -1e30), tl.maximum(y, -1e30)
        new = tl.maximum(most, x)
        fade, weight = tl.exp(most - new), tl.exp(x - new)
        sum_, lead, most = sum_ * fade + weight, lead * fade + weight * (x - y), new
        new = tl.maximum(q_most, y)
        q_sum, q_most = q_sum * tl.exp(q_most - new) + tl.exp(y - new), new
    top, q_top = tl.max(most, 0), tl.max(q_most, 0)
    fade = tl.exp(most - top)
    to = parts + (row * tl.num_programs(1) + part) * 5
    tl.store(to, top)
    tl.store(to + 1, tl.sum(sum_ * fade, 0))
    tl.store(to + 2, tl.sum(lead * fade, 0))
    tl.store(to + 3, q_top)
    tl.store(to + 4, tl.sum(q_sum * tl.exp(q_most - q_top), 0))


@triton.jit
def whole(parts, loss, logs, count, wide: tl.constexpr):
    """Of a row: KL(p || q), and the logarithms of what p's and q's exponentials add up to."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, wide)
    at, inside = parts + (row * count + part) * 5, part < count
    most = tl.load(at, mask=inside, other=-1e30)
    q_most = tl.load(at + 3, mask=inside, other=-1e30)
    top, q_top = tl.max(most, 0), tl.max(q_most, 0)
    fade = tl.exp(most - top)
    sum_ = tl.sum(tl.load(at + 1, mask=inside, other=0.0) * fade, 0)
    lead = tl.sum(tl.load(at + 2, mask=inside, other=0.0) * fade, 0)
    q_sum = tl.load(at + 4, mask=inside, other=0.0) * tl.exp(q_most - q_top)
    log_p, log_q = top + tl.log(sum_), q_top + tl.log(tl.sum(q_sum, 0))
    tl.store(loss + row, lead / sum_ - log_p + log_q)
    tl.store(logs + 2 * row, log_p)
    tl.store(logs + 2 * row + 1, log_q)


@triton.jit
def slopes(p_logits, q_logits, logs, outer, out, size, block: tl.constexpr):
    """Gradient of q's logits: (q - p) times that of the row's loss."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside, weight = at < size, tl.load(outer + row)
    more = tl.zeros([block], tl.float32)
    if weight != 0:  # else nothing is read
        x = tl.load(p_logits + row * size + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(q_logits + row * size + at, mask=inside, other=0.0).to(tl.float32)
        p = tl.exp(x - tl.load(logs + 2 * row))
        more = (tl.exp(y - tl.load(logs + 2 * row + 1)) - p) * weight
    tl.store(out + row * size + at, more.to(out.dtype.element_ty), mask=inside)
