"""Rows of different lengths in one cache say what each says alone."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import toy_engine

from ttspec.models.target import Target
from ttspec.rowcache import STEP, RowCache, causal_mask, reach_of


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def target(request, toy_target_dir, toy_qwen_dir) -> Target:
    return toy_engine(toy_target_dir if request.param == "llama" else toy_qwen_dir).target


def text(seed: int, length: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def feed(target: Target, cache: RowCache, tokens: list[list[int]], start: list[int]) -> Tensor:
    logits, _ = target.forward(cache, torch.tensor(tokens), torch.tensor(start), max(start))
    assert logits is not None
    return logits


def by_itself(target: Target, ids: list[int]) -> Tensor:
    """transformers' own forward of one sequence, without a cache."""
    with torch.no_grad():
        return target.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)


def test_rows_rolled_back_to_different_lengths_agree_with_whole_forwards(target):
    cache = target.cache(3, 100)
    rows = [text(n, 40) for n in range(3)]
    feed(target, cache, [r[:30] for r in rows], [0, 0, 0])
    back = [30, 17, 3]  # rollback is only where the next tokens go
    new = [text(10 + n, 6) for n in range(3)]
    logits = feed(target, cache, new, back)
    for n in range(3):
        close(logits[n], by_itself(target, rows[n][: back[n]] + new[n])[back[n] :])
    more = [text(20 + n, 4) for n in range(3)]
    again = [33, 18, 9]
    logits = feed(target, cache, more, again)
    for n in range(3):
        kept = (rows[n][: back[n]] + new[n])[: again[n]]
        close(logits[n], by_itself(target, kept + more[n])[again[n] :])


def test_a_batch_of_different_lengths_says_what_each_says_alone(target):
    lengths = [3, 50, 11, 28]
    cache = target.cache(4, 64)
    rows = [text(n, length) for n, length in enumerate(lengths)]
    padded = [r + [0] * (50 - len(r)) for r in rows]
    feed(target, cache, padded, [0] * 4)
    new = [text(30 + n, 2) for n in range(4)]
    together = feed(target, cache, new, lengths)
    for n, length in enumerate(lengths):
        alone = target.cache(1, 64)
        feed(target, alone, [rows[n]], [0])
        close(together[n], feed(target, alone, [new[n]], [length])[0])
        close(together[n], by_itself(target, rows[n] + new[n])[length:])


def test_rows_fed_as_a_subset_leave_the_others_alone(target):
    cache = target.cache(3, 40)
    rows = [text(n, 12) for n in range(3)]
    feed(target, cache, rows, [0, 0, 0])
    kept = {n: k[1].clone() for n, k in cache.keys.items()}
    new = [text(7, 5), text(8, 5)]
    logits, _ = target.forward(
        cache, torch.tensor(new), torch.tensor([12, 4]), 12, subset=torch.tensor([2, 0])
    )
    close(logits[0], by_itself(target, rows[2] + new[0])[12:])
    close(logits[1], by_itself(target, rows[0][:4] + new[1])[4:])
    assert all(torch.equal(cache.keys[n][1], k) for n, k in kept.items())


def test_tokens_past_the_last_slot_do_not_disturb_those_before(target):
    cache = target.cache(1, 10)
    ids = text(1, 10)
    feed(target, cache, [ids[:8]], [0])
    logits = feed(target, cache, [ids[8:] + text(2, 4)], [8])  # 4 of 6 fall outside
    close(logits[0, :2], by_itself(target, ids)[8:])
    close(feed(target, cache, [ids[9:]], [9])[0], by_itself(target, ids)[9:])


def test_attention_reaches_past_a_bucket(target):
    ids = text(4, STEP + 20)
    cache = target.cache(1, 2 * STEP)
    feed(target, cache, [ids[: STEP - 3]], [0])
    logits = feed(target, cache, [ids[STEP - 3 : STEP + 2]], [STEP - 3])
    close(logits[0], by_itself(target, ids[: STEP + 2])[STEP - 3 :])
    logits = feed(target, cache, [ids[STEP + 2 :]], [STEP + 2])
    close(logits[0], by_itself(target, ids)[STEP + 2 :])


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_are_laid_together_say_what_each_says_alone(target, seed: int):
    draw = random.Random(seed)
    cache, texts = target.cache(5, 64), [list[int]() for _ in range(5)]
    cache.moves_rows = True
    for step in range(25):
        fed = draw.sample(range(5), draw.randint(1, 5))
        if draw.random() < 0.7:
            fed = cache.make_adjacent(fed)
        for row in fed:  # back a little, as after a rejection, or to the beginning
            texts[row] = texts[row][: max(0, len(texts[row]) - draw.choice([0, 0, 2, 60]))]
            texts[row] = texts[row][:50]
        start = torch.tensor([len(texts[row]) for row in fed])
        new = [text(100 * step + row, 4) for row in fed]
        rows = None if fed == list(range(5)) else torch.tensor(fed)
        logits, _ = target.forward(
            cache, torch.tensor(new), start, int(start.max()), subset=rows, counts=None
        )
        for place, row in enumerate(fed):
            texts[row] += new[place]
            close(logits[place], by_itself(target, texts[row])[-4:])


def test_the_cache_counts_its_bytes(target):
    cache = target.cache(2, 10)
    assert cache.nbytes == 0
    feed(target, cache, [[1], [2]], [0, 0])
    assert cache.nbytes == 4 * 2 * 2 * 2 * 11 * 16 * 4  # layers, k and v, rows, heads, slots + 1


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_reach_covers_the_tokens_within_the_slots(length: int, slots: int):
    reach = reach_of(length, slots)
    assert reach <= slots
    assert reach >= min(length, slots)
    assert reach == slots or reach % STEP == 0


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 30),
    st.none() | st.integers(1, 12),
)
def test_a_token_sees_itself_and_what_is_before_within_its_window(start, width, reach, window):
    position = torch.tensor(start)[:, None] + torch.arange(width)
    mask = causal_mask(position, reach, window)
    assert mask.shape == (len(start), 1, width, reach)
    for row, first in enumerate(start):
        for t in range(width):
            at = first + t
            low = 0 if window is None else at - window + 1
            seen = [low <= slot <= at for slot in range(reach)]
            assert mask[row, 0, t].tolist() == seen
