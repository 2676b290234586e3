"""The kernels of `fused` that work on each token's states alone: norms, sums and gates.

For `pdl` see `product_kernels`.
"""

# pyright: basic
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.language.extra import cuda  # pyright: ignore[reportMissingImports]


@triton.jit
def joined(
    tokens,
    table,
    states,
    table_gain,
    states_gain,
    out,
    eps,
    last,
    states_stride,
    width: tl.constexpr,
    wide: tl.constexpr,
    pdl: tl.constexpr,
):
    """One token's embedding and state, each RMS-normalised and scaled, side by side [2 x width]."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, wide)
    inside = d < width
    if pdl:
        cuda.gdc_launch_dependents()
    gain = tl.load(table_gain + d, mask=inside, other=0.0)
    other = tl.load(states_gain + d, mask=inside, other=0.0)
    if pdl:
        cuda.gdc_wait()
    token = tl.minimum(tl.load(tokens + row), last)
    one = tl.load(table + token * width + d, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(states + row * states_stride + d, mask=inside, other=0.0).to(tl.float32)
    one = (one * tl.rsqrt(tl.sum(one * one, 0) / width + eps)).to(gain.dtype) * gain
    two = (two * tl.rsqrt(tl.sum(two * two, 0) / width + eps)).to(gain.dtype) * other
    tl.store(out + row * 2 * width + d, one, mask=inside)
    tl.store(out + (row * 2 + 1) * width + d, two, mask=inside)


@triton.jit
def normed(
    x,
    more,
    gain,
    total,
    out,
    eps,
    width: tl.constexpr,
    wide: tl.constexpr,
    added: tl.constexpr,
    pdl: tl.constexpr,
):
    """States [tokens, width], RMS-normalised and scaled; `added`: first `more` is added."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, wide)
    inside = d < width
    if pdl:
        cuda.gdc_launch_dependents()
    factor = tl.load(gain + d, mask=inside, other=0.0)
    if pdl:
        cuda.gdc_wait()
    states = tl.load(x + row * width + d, mask=inside, other=0.0)
    if added:
        states += tl.load(more + row * width + d, mask=inside, other=0.0)
        tl.store(total + row * width + d, states, mask=inside)
    long = states.to(tl.float32)
    scale = tl.rsqrt(tl.sum(long * long, 0) / width + eps)
    tl.store(out + row * width + d, (long * scale).to(factor.dtype) * factor, mask=inside)


@triton.jit
def gated(made, out, width: tl.constexpr, block: tl.constexpr, pdl: tl.constexpr):
    """The SiLU of the first half of each token's [2 x width], times the second."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * block + tl.arange(0, block)
    inside = d < width
    if pdl:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    gate = tl.load(made + row * 2 * width + d, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(made + (row * 2 + 1) * width + d, mask=inside, other=0.0)
    tl.store(out + row * width + d, (gate / (1 + tl.exp(-gate))).to(up.dtype) * up, mask=inside)
