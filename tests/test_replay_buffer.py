"""Batches: which rows teach, when, and with which labels."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toys import NOW, G, bound_drafter, fake_round, make_learner, take, update_on, verification

from ttspec.config import LearnConfig
from ttspec.learning.learner import Learner
from ttspec.learning.replay_buffer import ReplayBuffer
from ttspec.losses import position_weights, weighted_mean
from ttspec.records import ReplayBatch


def test_block_batches_are_all_rows_of_the_round():
    buffer = ReplayBuffer(NOW, 2, G, fake_round(0, 2))
    v = fake_round(0, 2, count=[4, 2])
    buffer.absorb(v)
    batch = take(buffer)
    assert batch.mask.tolist() == [[[True] * 4], [[True, True, False, False]]]
    assert torch.equal(batch.logits[:, 0], v.logits[:, :G])
    assert torch.equal(batch.tokens[:, 0], v.fed)
    assert batch.before is None
    assert batch.start.tolist() == [[8], [8]]
    assert batch.count.tolist() == [1, 1]


@pytest.mark.parametrize("accepted", range(5))
def test_accepted_batches_end_with_the_first_rejection(accepted: int):
    config = LearnConfig(stride=1, blocks=1, supervision="accepted")
    buffer = ReplayBuffer(config, 1, G, fake_round(0, 1))
    v = fake_round(0, 1)
    fed = v.fed
    buffer.absorb(verification([8], fed, v.logits, v.features, fed, [accepted]))
    wanted = [j <= accepted for j in range(G)]
    assert take(buffer).mask[0, 0].tolist() == wanted


@pytest.mark.parametrize("rows", ["block", "accepted"])
def test_rows_past_an_end_token_teach_nothing_and_the_row_that_predicts_it_does(rows: str):
    config = LearnConfig(stride=1, blocks=1, supervision=rows)
    buffer = ReplayBuffer(config, 1, G, fake_round(0, 1))
    v = fake_round(0, 1)
    buffer.absorb(
        verification([8], v.fed, v.logits, v.features, v.fed, [2], emitted=[2], ended=[True])
    )
    assert take(buffer).mask[0, 0].tolist() == [True, True, False, False]


def test_a_batch_is_taken_once():
    buffer = ReplayBuffer(NOW, 2, G, fake_round(0, 2))
    buffer.absorb(fake_round(0, 2))
    assert take(buffer).count.tolist() == [1, 1]
    buffer.absorb(fake_round(1, 2, emitted=[1, 0]))
    assert take(buffer).count.tolist() == [1, 0]
    assert take(buffer).count.tolist() == [0, 0]


def test_a_hindsight_block_waits_until_all_of_it_is_committed():
    config = LearnConfig(stride=1, blocks=1, supervision="hindsight")
    buffer = ReplayBuffer(config, 1, G, fake_round(0, 1))
    rounds = [fake_round(n, 1) for n in range(6)]
    ready = []
    for v in rounds:
        buffer.absorb(v)
        ready.append(take(buffer))
    assert [int(batch.count) for batch in ready] == [0, 0, 0, 1, 1, 1]
    for n, batch in enumerate(ready[3:]):
        assert batch.start.tolist() == [[8 + n]]
        for j in range(G):  # row j is what the target said when that position was committed
            assert torch.equal(batch.logits[0, 0, j], rounds[n + j].logits[0, 0])


def test_a_masked_row_stays_in_the_denominator():
    values, weights = torch.ones(1, G), position_weights(G, 2.0)
    mask = torch.tensor([[True, True, False, False]])
    values[0, 3] = math.nan  # what is masked is not looked at
    wanted = weights[:2].sum() / weights.sum()
    torch.testing.assert_close(weighted_mean(values, weights, mask), wanted[None])


def test_a_partial_block_pulls_with_the_rows_it_has(monkeypatch):
    """Half a block gives half the gradient, not the mean of half a block."""
    monkeypatch.setattr("ttspec.learning.live_weights.MAX_NORM", 1e9)

    def gradient(mask: list[bool]) -> Tensor:
        drafter = bound_drafter()
        learner, _, _ = make_learner(1, LearnConfig(stride=1), drafter)
        v = fake_round(0, 1)
        v.logits[:] = v.logits[:, :1]
        batch = ReplayBatch(
            tokens=v.fed[:, None],
            start=v.start[:, None],
            before=None,
            logits=v.logits[:, None, :G],
            mask=torch.tensor([[mask]]),
            fresh=torch.tensor([[True]]),
            count=torch.tensor([1]),
        )
        update_on(learner, batch, 8)
        return torch.cat([g.flatten() for g in learner.weights.gradient.values()])

    first, second = gradient([True, True, False, False]), gradient([False, False, True, True])
    torch.testing.assert_close(first + second, gradient([True] * 4), atol=1e-5, rtol=1e-3)


def listen(learner: Learner, taught: list[ReplayBatch]) -> None:
    """Note the batches that a learner is given."""
    distil = learner._distil

    def noted(longest: int, held_out: torch.Tensor | None = None) -> torch.Tensor | None:
        batch = learner._batch
        if held_out is not None:
            batch = replace(batch, mask=batch.mask & ~held_out[..., None])
        taught.append(batch)
        return distil(longest, held_out)

    learner._distil = noted


@pytest.mark.parametrize("stride", [1, 3])
def test_hindsight_labels_are_the_targets_rows_for_the_committed_answers(engine, stride: int):
    session = engine.session(
        max_new_tokens=60,
        seed=5,  # the first answer of this one ends by itself
        raw=True,
        temperature=0.9,
        context=400,
        learn=LearnConfig(stride=stride, blocks=8, supervision="hindsight", scope="session"),
    )
    taught: list[ReplayBatch] = []
    text: list[int] = []
    drawn: set[int] = set()  # positions of tokens that a round committed
    ends: set[int] = set()
    for turn in range(3):
        stream = session.stream(f"hello {turn}")
        next(stream)
        if not turn:
            listen(session._scheduler.decoder.learner, taught)
        *_, chunk = stream
        result = chunk.result
        text += (result.prompt_ids[1:] if turn else result.prompt_ids) + result.token_ids
        drawn |= set(range(len(text) - len(result.token_ids) + 1, len(text)))
        if result.finish_reason == "eos":
            ends.add(len(text) - 1)
    assert ends & drawn, "no answer ended: the test would prove too little"

    target = engine.target
    cache = target.cache(1, len(text))
    zero = torch.zeros(1, dtype=torch.long)
    full, _ = target.forward(cache, torch.tensor([text]), zero, 0)
    labels: set[int] = set()
    for batch in taught:
        assert batch.mask.shape == (1, 8, G)
        for block in range(8):
            start = int(batch.start[0, block])
            for j in range(G):
                if batch.mask[0, block, j]:
                    assert int(batch.tokens[0, block, 0]) == text[start]
                    assert int(batch.tokens[0, block, j + 1]) == text[start + j + 1]
                    wanted = full[0, start + j]
                    torch.testing.assert_close(batch.logits[0, block, j], wanted, atol=2e-3, rtol=0)
                    labels.add(start + j + 1)
    assert labels <= drawn  # never a user's token, nor the template's
    if stride == 1:
        last = max(drawn)
        assert ends - {last} <= labels  # the row that predicts an end token stays
        assert {n for n in drawn if n < last - 2 * G} - labels == set()


def test_what_a_stop_text_cut_off_is_no_label(engine):
    answer = engine.generate("hello", max_new_tokens=40, seed=3, ignore_eos=True, learn=None)[0]
    middle = answer.text[12:14]
    learn = LearnConfig(stride=1, supervision="hindsight", scope="session")
    session = engine.session(
        max_new_tokens=40, seed=3, ignore_eos=True, stop=(middle,), learn=learn, context=300
    )
    assert session.send("hello").finish_reason == "stop"
    decoder = session._scheduler.decoder
    buffer = decoder.learner._buffer
    assert int(buffer._ring_positions.max()) <= decoder.rows.lengths[0]
    assert int(buffer._starts.max()) < decoder.rows.lengths[0]
