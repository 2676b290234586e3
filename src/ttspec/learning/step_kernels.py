"""The kernel of `adam`: gradients are read once, and all that a step changes is written once.

In a module of its own, since Triton is only there where torch can use a GPU.
"""

# pyright: basic
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def adam(
    gradient,
    master,
    first,
    second,
    mean,
    published,
    numbers,
    size,
    beta1,
    beta2,
    epsilon,
    has_first: tl.constexpr,
    has_mean: tl.constexpr,
    publishes: tl.constexpr,
    block: tl.constexpr,
):
    """Some weights of a copy; of each copy `numbers` has what `FusedAdam.step` says."""
    copy = tl.program_id(1)
    of_copy = numbers + copy * 5
    if tl.load(of_copy) != 0:
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = at < size
        at += copy.to(tl.int64) * size
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * tl.load(of_copy + 1)
        w = tl.load(master + at, mask=inside, other=0.0)
        v = tl.load(second + at, mask=inside, other=0.0)
        v = v * beta2 + g * g * (1 - beta2)
        tl.store(second + at, v, mask=inside)
        m = g
        if has_first:
            m = tl.load(first + at, mask=inside, other=0.0) * beta1 + g * (1 - beta1)
            tl.store(first + at, m, mask=inside)
        w -= tl.load(of_copy + 2) * m / (tl.sqrt(v) * tl.load(of_copy + 3) + epsilon)
        tl.store(master + at, w, mask=inside)
        if has_mean:
            old = tl.load(mean + at, mask=inside, other=0.0)
            tl.store(mean + at, old + (w - old) * tl.load(of_copy + 4), mask=inside)
        if publishes:
            tl.store(published + at, w.to(published.dtype.element_ty), mask=inside)
