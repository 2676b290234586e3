"""DFlash: what test_conformance.py does not ask of every kind."""

import pytest
import torch
from toys import (
    VOCABULARY,
    Watch,
    bound_drafter,
    context,
    greedy,
    prefill,
    replay_batch,
    toy_engine,
)

from ttspec.config import DraftConfig


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_proposal_has_the_length_asked_for_and_tokens_of_the_vocabulary(length: int):
    drafter = bound_drafter()
    state = context(drafter, [7, 12])
    proposal = drafter.propose(
        state,
        torch.tensor([1, 2]),
        torch.tensor([7, 12]),
        torch.tensor([length, 0]),
        length,
        12,
        greedy,
    )
    assert proposal.tokens.shape == (2, length)
    assert proposal.tokens.dtype == torch.int64
    assert ((proposal.tokens >= 0) & (proposal.tokens < VOCABULARY)).all()
    assert proposal.count.tolist() == [length, 0]


def test_the_length_of_an_engine_is_never_above_the_block(toy_target_dir):
    engine = toy_engine(toy_target_dir)
    for asked, most in ((99, 4), (2, 2)):
        draft = DraftConfig(length=asked)
        (result,) = engine.generate("hi", max_new_tokens=12, ignore_eos=True, draft=draft)
        assert max(r.proposed for r in result.rounds) == most


def test_a_shorter_proposal_sees_fewer_masks_and_nothing_else_changes():
    """A causal block must not notice; a bidirectional one may."""
    drafter = bound_drafter(layer_types=["sliding_attention"] * 2, sliding_window=64)
    state = context(drafter, [9])
    watch, short = Watch(drafter), Watch(drafter)
    args = torch.tensor([3]), torch.tensor([9]), torch.tensor([4])
    drafter.propose(state, *args, 4, 9, watch)
    drafter.propose(state, *args, 2, 9, short)
    torch.testing.assert_close(watch.logits[:, :2], short.logits)


def test_a_round_of_the_engine_replays_to_the_same_logits(toy_target_dir):
    """The real loop: drafted greedily, so the drafts are the replayed rows' most likely tokens."""
    engine = toy_engine(toy_target_dir)
    decoder = engine.decoder(
        engine.session(max_new_tokens=30, learn=None).config, 1, 8, sessions=False
    )
    prefill(decoder, [0], [[10, 20, 30, 40]], [1], [30])
    drafted = []
    absorb = decoder.drafter.absorb
    decoder.drafter.absorb = lambda state, v: (drafted.append(v), absorb(state, v))
    for _ in range(4):
        decoder.round()
    starts = torch.tensor([[int(v.start[0]) for v in drafted]])
    tokens = torch.stack([v.fed for v in drafted], dim=1)
    taught = replay_batch(tokens, starts)
    logits = decoder.drafter.replay(decoder.state, taught, 4, int(starts.max()))
    assert logits.argmax(-1)[0].tolist() == [v.proposal.tokens[0].tolist() for v in drafted]
