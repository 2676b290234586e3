"""Spans: what a query sees from slot to slot, as a mask and, on a GPU, without one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttspec.spans import span_attention, span_mask, spans


def reference(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Attention in float64, one query at a time; zeros where nothing is seen."""
    batch, heads, width, size = query.shape
    out = torch.zeros(batch, width, heads, size, dtype=torch.float64)
    group = heads // keys.shape[1]
    for b in range(batch):
        for t in range(width):
            first, last = seen[b, 0, t].tolist()
            for h in range(heads if last >= first else 0):
                k = keys[b, h // group, first : last + 1].double()
                v = values[b, h // group, first : last + 1].double()
                scores = k @ query[b, h, t].double() * size**-0.5
                out[b, t, h] = scores.softmax(0) @ v
    return out


def example(rows: int, heads: tuple[int, int], width: int, slots: int, window: int | None):
    """Queries at the ends of rows of different lengths; the last row is at rest."""
    torch.manual_seed(0)
    query = torch.randn(rows, width, heads[0], 32).transpose(1, 2)
    keys, values = torch.randn(2, rows, heads[1], slots + 1, 32)
    start = torch.arange(rows) * 7 % (slots - width)
    start[-1] = slots
    position = start[:, None] + torch.arange(width)
    first = position * 0 if window is None else position - window + 1
    return query, keys, values, spans(first, position.clamp(max=slots - 1), start >= slots)


CASES = [
    (2, (4, 2), 3, 40, None),
    (3, (6, 2), 1, 70, 9),
    (3, (8, 1), 16, 300, 64),
    (2, (3, 3), 8, 200, None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_sees_each_query_s_span_and_nothing_else(case):
    query, keys, values, seen = example(*case)
    out = span_attention(query, keys, values, seen)
    assert torch.isfinite(out).all()
    wanted = reference(query, keys, values, seen)[:-1]
    torch.testing.assert_close(out[:-1].double(), wanted, atol=1e-5, rtol=1e-5)
    unseen = ~span_mask(seen, keys.shape[2]).any(2)[:, :, :, None]
    changed = torch.where(unseen, 1e4, keys), torch.where(unseen, 1e4, values)
    assert torch.equal(span_attention(query, *changed, seen)[:-1], out[:-1])


@settings(deadline=None, max_examples=50)
@given(first=st.integers(-5, 12), last=st.integers(0, 11), rest=st.booleans())
def test_a_mask_holds_the_slots_from_first_to_last(first: int, last: int, rest: bool):
    seen = spans(torch.tensor([[first]]), torch.tensor([[last]]), torch.tensor([rest]))
    wanted = [not rest and max(first, 0) <= slot <= last for slot in range(12)]
    assert span_mask(seen, 12)[0, 0, 0].tolist() == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, (20, (9, 3), 8, 4096, None), (1, (32, 8), 16, 8192, 512)])
def test_the_kernels_say_what_the_reference_says(case, dtype):
    query, keys, values, seen = (x.cuda() for x in example(*case))
    if case[0] == 1:
        seen = torch.tensor([8000, 8190], device="cuda").expand_as(seen)
    query, keys, values = query.to(dtype), keys.to(dtype), values.to(dtype)
    out = span_attention(query, keys, values, seen)
    assert torch.isfinite(out).all()
    wanted = reference(*(x.cpu() for x in (query, keys, values, seen))).cuda()
    assert (out - wanted).norm() < 1e-2 * wanted.norm()
