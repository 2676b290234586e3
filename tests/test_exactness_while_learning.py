"""Learning must not bend the output's law: many short texts over a small vocabulary.

The drafter learns grossly from every verdict, rejected drafts included. Drafting and accepting are
the decoder's own code; tables stand in for the two models. Noise that is used twice (holes B and C
of exactness.md) is planted, and the same measure must find it.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from toys import chi_square, total_variation

from ttspec.acceptance import accept_rejection
from ttspec.config import SamplingConfig
from ttspec.decoding.conversation import noise_key
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.draft_sampler import DraftSampler
from ttspec.decoding.rows import RoundInputs
from ttspec.records import Proposal
from ttspec.sampling import (
    ACCEPT,
    DRAFT,
    RESIDUAL,
    SamplingTensors,
    draw,
    exponential,
    fold,
    gumbel,
    position_noise,
    uniform,
)

TEXTS = 200_000
V, LONG, G = 3, 3, 2
LESSON = 2.5
"""How far a lesson pushes a draft logit: far more than any real one."""


class Loop:
    """`TEXTS` texts at once: p is a table by position and last token, q by position and text.

    `DraftSampler` and `accept` are the decoder's own.
    """

    def __init__(
        self, keys: Tensor, *, acceptance: str = "rejection", coupled: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logp = (1.2 * torch.randn(LONG, V, V, generator=generator)).log_softmax(-1)
        first = 0.8 * torch.randn(LONG, V, generator=generator)
        self.q = first.expand(len(keys), LONG, V).clone()
        zeros = torch.zeros(len(keys), dtype=torch.long)
        self.inputs = RoundInputs(
            pending=zeros,
            start=zeros,
            budget=zeros,
            number=zeros[:1].clone(),
            noise_key=keys,
            copies=zeros[:, None],
            copied=zeros,
        )
        # What the decoder's `accept` looks at.
        self.count = len(keys)
        self.rows = SimpleNamespace(inputs=self.inputs, count=self.count)
        self._drafter_rows = slice(None)
        self.sampling = SamplingConfig(temperature=1.0, acceptance=acceptance)
        self.coupled = coupled
        ones = torch.ones(len(keys), 1, 1)
        self.asked = SamplingTensors(temperature=ones, sampled=ones)
        self.draft_ids = None

    def widen(self, values: Tensor, other: float) -> Tensor:
        return values

    def draft(self, start: Tensor, count: Tensor, noise: Tensor | None) -> Proposal:
        if not self.coupled:  # q's most likely tokens, as copies are: a point mass
            return Proposal(tokens=self.drafted(start).argmax(-1), count=count)
        choose = DraftSampler(self.asked, self, self.inputs, V, noise)  # type: ignore[arg-type]
        tokens, q = choose(self.drafted(start), 0)
        return Proposal(tokens=tokens, count=count, q=q)

    def drafted(self, start: Tensor) -> Tensor:
        """Draft logits at the positions after `start`."""
        at = (start[:, None] + torch.arange(G)).clamp(max=LONG - 1)
        return self.q[torch.arange(self.count)[:, None], at]

    def accept(self, logits: Tensor, proposal: Proposal, start: Tensor, noise: Tensor | None):
        return Decoder.accept(self, logits, proposal, noise, self.asked)  # type: ignore[arg-type]

    def learn(self, start: Tensor, proposal: Proposal, live: Tensor) -> None:
        """Push q at each drafted position towards the token that was drafted there."""
        at = (start[:, None] + torch.arange(G)).clamp(max=LONG - 1)
        drafted = live[:, None] & (torch.arange(G) < proposal.count[:, None])
        push = self.lesson(proposal) * drafted[..., None]
        self.q.scatter_add_(1, at[..., None].expand(-1, -1, V), push)

    def lesson(self, proposal: Proposal) -> Tensor:
        return LESSON * torch.nn.functional.one_hot(proposal.tokens, V)

    def write(self) -> Tensor:
        """All texts, int64 [TEXTS, LONG]."""
        row = torch.arange(self.count)[:, None]
        text = torch.zeros(self.count, LONG + G + 2, dtype=torch.long)  # text[:, 0] comes before
        start = torch.zeros(self.count, dtype=torch.long)
        while (start < LONG).any():
            live = start < LONG
            budget = LONG - start
            count = (budget - 1).clamp(min=0, max=G)
            noise = None
            if self.sampling.acceptance == "invariant":
                noise = position_noise(self.inputs.noise_key, start + 1, G + 1, V)
            proposal = self.draft(start, count, noise)
            fed = torch.cat([text.gather(1, start[:, None]), proposal.tokens], dim=1)
            at = (start[:, None] + torch.arange(G + 1)).clamp(max=LONG - 1)
            accepted, tokens = self.accept(self.logp[at, fed], proposal, start, noise)
            emitted = torch.where(live, accepted + 1, 0)
            column = torch.arange(G + 1)
            slot = torch.where(column < emitted[:, None], start[:, None] + 1 + column, LONG + G + 1)
            text[row, slot] = tokens
            self.learn(start, proposal, live)
            start = start + emitted
            self.inputs.number.add_(1)
        return text[:, 1 : LONG + 1]


def law(loop: Loop) -> Tensor:
    """Exact probability of every text, in the order of `census`."""
    share = []
    for text in itertools.product(range(V), repeat=LONG):
        before = (0, *text)
        share.append(sum(loop.logp[i, before[i], text[i]] for i in range(LONG)))
    return torch.stack(share).double().exp()


def census(texts: Tensor) -> Tensor:
    """How often every text occurred."""
    index = (texts * V ** torch.arange(LONG - 1, -1, -1)).sum(-1)
    return torch.bincount(index, minlength=V**LONG)


def fresh_keys(seed: int = 0) -> Tensor:
    return fold(torch.tensor(seed), torch.arange(TEXTS))


def assert_exact(texts: Tensor, loop: Loop) -> None:
    assert chi_square(census(texts), law(loop)) > 1e-3
    assert total_variation(census(texts), law(loop)) < 0.01


def assert_found(texts: Tensor, loop: Loop) -> None:
    assert chi_square(census(texts), law(loop)) < 1e-12
    assert total_variation(census(texts), law(loop)) > 0.012


def test_rejection_sampling_keeps_the_law_while_the_drafter_learns_from_rejected_drafts():
    loop = Loop(fresh_keys())
    assert_exact(loop.write(), loop)


@pytest.mark.parametrize("coupled", [True, False])
def test_invariant_sampling_keeps_the_law_while_the_drafter_learns(coupled: bool):
    loop = Loop(fresh_keys(), acceptance="invariant", coupled=coupled)
    assert_exact(loop.write(), loop)


def test_invariant_texts_do_not_depend_on_what_was_learned():
    class Static(Loop):
        def learn(self, *_) -> None:
            pass

    keys = fresh_keys()
    learned = Loop(keys, acceptance="invariant").write()
    assert torch.equal(learned, Static(keys, acceptance="invariant").write())


# Noise keyed by position.


class DraftNoiseByPosition(Loop):
    """Wrong: a position drafted again gets the noise that drafted it before."""

    def draft(self, start: Tensor, count: Tensor, noise: Tensor | None) -> Proposal:
        key = fold(self.inputs.noise_key[:, None], DRAFT, start[:, None] + torch.arange(G))
        logits = self.drafted(start)
        tokens = draw(logits, gumbel(key, V))
        return Proposal(tokens=tokens, count=count, q=logits.softmax(-1))


class VerdictLearner(Loop):
    """Learns from the verdict on every row, those after the first rejection included."""

    def u_keys(self, start: Tensor) -> Tensor:
        return fold(
            fold(self.inputs.noise_key[:, None], ACCEPT, self.inputs.number), torch.arange(G)
        )

    def accept(self, logits: Tensor, proposal: Proposal, start: Tensor, noise: Tensor | None):
        fresh = exponential(fold(self.inputs.noise_key, RESIDUAL, self.inputs.number), V)
        p, u = logits.softmax(-1), uniform(self.u_keys(start))
        drafts = proposal.tokens[..., None]
        self.kept = u * proposal.q.gather(-1, drafts)[..., 0] < p[:, :G].gather(-1, drafts)[..., 0]
        return accept_rejection(p, proposal, u, fresh)

    def lesson(self, proposal: Proposal) -> Tensor:
        return super().lesson(proposal) * (2.0 * self.kept[..., None] - 1)


class UniformsByPosition(VerdictLearner):
    """Wrong: accept uniforms belong to a position."""

    def u_keys(self, start: Tensor) -> Tensor:
        return fold(self.inputs.noise_key[:, None], ACCEPT, start[:, None] + torch.arange(G))


def test_fresh_noise_is_exact_even_when_every_verdict_is_a_lesson():
    loop = VerdictLearner(fresh_keys(3))
    assert_exact(loop.write(), loop)


@pytest.mark.parametrize("way", [DraftNoiseByPosition, UniformsByPosition])
def test_noise_used_twice_is_found(way: type[Loop]):
    loop = way(fresh_keys(3))
    assert_found(loop.write(), loop)


# A second turn, a drafter that learned in the first.


def second_turn(key_of_turn: Callable[[int, int], int]) -> tuple[Tensor, Loop]:
    def keys(turn: int) -> Tensor:
        return torch.tensor([key_of_turn(text, turn) for text in range(TEXTS)])

    loop = Loop(keys(0))
    loop.write()
    loop.inputs.number.zero_()  # as after a resume; within one decoder rounds go on counting
    loop.inputs.noise_key.copy_(keys(1))
    return loop.write(), loop


def test_a_second_turn_is_exact_with_the_keys_of_turns():
    texts, loop = second_turn(lambda n, turn: noise_key(n, [1, 2], turn=turn))
    assert_exact(texts, loop)


def test_a_second_turn_seeded_as_the_first_is_found():
    texts, loop = second_turn(lambda n, _: noise_key(n, [1, 2]))
    assert_found(texts, loop)
