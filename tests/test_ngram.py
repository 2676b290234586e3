"""N-gram drafting: what it copies, and that copying never changes the text."""

import random

import torch
from toys import toy_engine

from ttspec.config import DraftConfig
from ttspec.decoding.engine import Engine
from ttspec.drafters.ngram import LONGEST, Ngram


def expected(ids: list[int], length: int) -> list[int]:
    """What followed the last earlier place where the longest end of `ids` stood."""
    last = len(ids) - 1
    for n in range(LONGEST, 0, -1):
        places = [i for i in range(n - 1, last) if ids[i - n + 1 : i + 1] == ids[last - n + 1 :]]
        if places and last - n + 1 >= 0:
            return ids[places[-1] + 1 : places[-1] + 1 + length]
    return []


def test_it_copies_what_followed_the_latest_longest_match():
    rng = random.Random(0)
    drafter, length = Ngram(4), 4
    for _ in range(300):
        texts = [[rng.randrange(3) for _ in range(rng.randrange(1, 14))] for _ in range(3)]
        state = drafter.start(3, 20, DraftConfig())
        for row, ids in enumerate(texts):
            if ids[:-1]:
                fed, place = torch.tensor([ids[:-1]]), torch.tensor([0])
                drafter.extend(state, fed, torch.empty(0), place, torch.tensor([row]))
        pending = torch.tensor([ids[-1] for ids in texts])
        start = torch.tensor([len(ids) - 1 for ids in texts])
        count = torch.full((3,), length)
        made = drafter.propose(state, pending, start, count, length, int(start.max()), None)  # type: ignore[arg-type]
        for row, ids in enumerate(texts):
            assert made.tokens[row, : made.count[row]].tolist() == expected(ids, length)


def test_copying_never_changes_the_text(toy_target_dir):
    target = toy_engine(toy_target_dir).target
    options = {"max_new_tokens": 120, "temperature": 0.0, "ignore_eos": True, "learn": None}
    plain = Engine(target, None).generate(["abcabc", "x"], **options)
    copied = Engine(target, Ngram()).generate(["abcabc", "x"], **options)
    assert [r.token_ids for r in copied] == [r.token_ids for r in plain]
    assert all(r.stats.updates == 0 for r in copied)
