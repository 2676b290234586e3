"""A context made anew is what the live weights make of the whole text."""

import torch
from toys import toy_engine

from ttspec.config import DraftConfig, LearnConfig
from ttspec.decoding.round import Decoder


def test_a_context_made_anew_is_what_the_weights_of_now_make_of_the_text(toy_target_dir):
    engine = toy_engine(toy_target_dir)
    made: list[Decoder] = []

    def make(*given, **named) -> Decoder:
        made.append(Decoder(*given, **named))
        return made[-1]

    engine.make_decoder = make
    learn = LearnConfig(stride=1, lr=1e-2, guard=0, rebuild=1)
    prompts = ["hello there", "count to ten, please"]
    engine.generate(prompts, max_new_tokens=20, ignore_eos=True, learn=learn)

    (decoder,) = made
    kept, state, drafter = decoder._history, decoder.state, engine.drafter
    assert kept is not None
    assert state is not None
    row, length = 0, kept.made[0]
    part = kept._tokens[row : row + 1, :length], kept._features[row : row + 1, :length]
    contexts = {}
    for weights in (state.weights, {**state.weights, **drafter.weights}):
        fresh = drafter.start(2, decoder.slots, DraftConfig())
        fresh.weights = weights
        drafter.extend(fresh, *part, torch.tensor([0]), torch.tensor([row]))
        contexts[id(weights)] = fresh.keys[:, row, :, :length]
    now, anchor = contexts.values()
    torch.testing.assert_close(state.keys[:, row, :, :length], now)
    assert not torch.allclose(now, anchor, atol=1e-3)
