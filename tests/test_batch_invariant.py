"""With `deterministic`, drafts change no bit of what the target says, in bfloat16 either."""

import pytest
import torch
from toys import toy_drafter, toy_engine

from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding.decoder import INVARIANT_WIDTH, Decoder
from ttspec.decoding.engine import Engine
from ttspec.models.target import Target

PROMPTS = ["hello there"]  # one row: a token alone is read by other products than several
OPTIONS = {"max_new_tokens": 60, "seed": 5, "ignore_eos": True}
ARMS = {
    "static": {"learn": None},
    "three drafts": {"learn": None, "draft": DraftConfig(length=3)},
    "learning": {"learn": LearnConfig(stride=1, lr=3e-3)},
}


class Listening(Decoder):
    """Keeps the logits that decided about each committed token, by row and position."""

    heard: dict[tuple[int, int], torch.Tensor]

    def round(self, **options):
        start = list(self.rows.lengths)
        outcomes = super().round(**options)
        for row, outcome in outcomes.items():
            for i in range(len(outcome.tokens)):
                self.heard[row, start[row] + i] = self._said[row, i].clone()
        return outcomes

    def _forward(self, fed, longest):
        logits, features = super()._forward(fed, longest)
        self._said = logits
        return logits, features


def listen(engine: Engine, **options) -> tuple[list, dict]:
    heard: dict[tuple[int, int], torch.Tensor] = {}

    def make(*given, **named) -> Decoder:
        decoder = Listening(*given, **named)
        decoder.heard = heard
        return decoder

    engine.make_decoder = make
    engine._spare = None
    return [r.token_ids for r in engine.generate(PROMPTS, **OPTIONS, **options)], heard


@pytest.fixture(scope="module")
def rounded(toy_target_dir) -> Engine:
    return toy_engine(toy_target_dir, toy_drafter(dtype=torch.bfloat16), dtype="bfloat16")


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("arm", ARMS)
def test_what_the_target_says_is_the_same_to_the_last_bit(rounded, arm, temperature):
    plain = {"learn": None, "draft": DraftConfig(length=0)}
    given = {"temperature": temperature, "deterministic": True}
    text, wanted = listen(rounded, **plain, **given)
    other, heard = listen(rounded, **ARMS[arm], **given)
    assert other == text
    assert heard.keys() == wanted.keys()
    assert all(torch.equal(heard[at], wanted[at]) for at in wanted)


def test_a_target_whose_answer_depends_on_the_width_of_a_read_is_read_in_one_width(
    rounded, monkeypatch
):
    """Larger models than a toy do depend on it: a token alone is read by other products."""
    forward = Target.forward

    def depends(self, cache, tokens, *given, **named):
        logits, features = forward(self, cache, tokens, *given, **named)
        return None if logits is None else logits * (1 + tokens.shape[1] / 64), features

    monkeypatch.setattr(Target, "forward", depends)
    for given, same in (({"deterministic": True}, True), ({}, False)):
        _, wanted = listen(rounded, learn=None, draft=DraftConfig(length=0), **given)
        _, heard = listen(rounded, learn=None, **given)
        both = heard.keys() & wanted.keys()
        assert all(torch.equal(heard[at], wanted[at]) for at in both) is same


def test_wide_drafts_make_wider_rounds(toy_target_dir):
    engine = toy_engine(toy_target_dir)
    decoder = engine.decoder(GenerateConfig(deterministic=True), 1, 4, sessions=False)
    assert decoder.width == INVARIANT_WIDTH
