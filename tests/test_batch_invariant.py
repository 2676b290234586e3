"""With `deterministic`, drafts change no bit of what the target says, in bfloat16 either."""

import pytest
import torch
from toys import toy_drafter, toy_engine

from ttspec import load
from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.engine import Engine
from ttspec.decoding.stages import INVARIANT_WIDTH
from ttspec.models.target import Target
from ttspec.spans import batch_invariant

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


@pytest.mark.parametrize("before", [30, 300, 420])
def test_neither_more_masked_slots_nor_another_place_in_the_round_change_a_bit(rounded, before):
    """On some CPUs a sum over more slots is another one, though what is masked adds nothing."""
    target, width = rounded.target, INVARIANT_WIDTH
    text = torch.randint(
        0, 200, (1, before + 2 * width), generator=torch.Generator().manual_seed(3)
    )
    cache = target.cache(1, 2048)
    target.forward(cache, text[:, :before], torch.tensor([0]), 0, logits=0)

    def read(begin: int, longest: int) -> torch.Tensor:
        given = text[:, begin : begin + width], torch.tensor([begin]), longest
        with batch_invariant():
            return target.forward(cache, *given)[0][0]  # type: ignore[index]

    wanted = read(before, before)
    for longest in (before + 100, before + 600, 2000):
        assert torch.equal(read(before, longest), wanted)
    for later in (1, 5, 9):
        assert torch.equal(read(before + later, before + later)[:-later], wanted[later:])


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("drafter", ["smollm2-135m-dflash", "smollm2-135m-eagle3"])
def test_the_built_in_target_writes_one_text_in_two_bytes(smollm2_dir, drafter):
    """Past 1,000 tokens of a session, where attention reads several blocks of slots."""
    engine = load("smollm2-135m", drafter, device="cpu", dtype="bfloat16")
    turns = ["Tell me a long story about a lighthouse.", "Go on.", "And then?", "Go on."]
    texts = []
    for arm in ({"draft": DraftConfig(length=0)}, {}, {"draft": DraftConfig(length=3)}):
        options = {"learn": None, "max_new_tokens": 300, "ignore_eos": True, **arm}
        session = engine.session(deterministic=True, temperature=0.7, seed=2, **options)
        texts.append([list(session.stream(turn))[-1].result.token_ids for turn in turns])
    assert sum(map(len, texts[0])) == 1200
    assert texts[1] == texts[0]
    assert texts[2] == texts[0]


def test_room_for_a_session_is_a_whole_number_of_blocks(toy_target_dir):
    """Or the last one would depend on how long the longest prompt is."""
    engine = toy_engine(toy_target_dir)
    config = GenerateConfig(deterministic=True, max_new_tokens=100)
    decoders = [engine.decoder(config, 1, longest, sessions=False) for longest in (4, 250)]
    slots = [decoder.rows.slots for decoder in decoders]
    assert slots == [512, 512]


def test_wide_drafts_make_wider_rounds(toy_target_dir):
    engine = toy_engine(toy_target_dir)
    decoder = engine.decoder(GenerateConfig(deterministic=True), 1, 4, sessions=False)
    assert decoder.width == INVARIANT_WIDTH
