"""Learning within one conversation without replays: only what lies behind the drafter's last norm.

    ttspec bench run --suite session --session-tokens 1200 --temperature 0.7 --arms plain --out RUN
    python benchmarks/head_lessons.py RUN --target TARGET --drafter DRAFTER

What the head reads of a block does not depend on the head, as long as all drafts before were kept.
So the target reads a recorded text once, the drafter drafts a block from every place of it, and
each learner then goes over the rounds: copies as they are by default, seven drafts else, and the
noise that wrote the text. Without a learner the rounds are those of `ttspec bench replay`.

A lesson is a state h_i that the head read, and p - q there, the 32 largest of each: of a round's
drafts up to the first that was rejected. Logits of a draft with state h change by

    scale * rate * sum over lessons i of k(h, h_i) (p_i - q_i)

which for k(h, h_i) = h h_i / |h_i|^2 is stochastic gradient descent on the head, its step normed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import exp
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from cyclopts import App
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

import ttspec
from ttspec.bench.replay import RecordedText, conversations, noise_keys, open_source
from ttspec.config import DraftConfig
from ttspec.decoding.copying import Copying
from ttspec.decoding.engine import Engine
from ttspec.decoding.prefill import ATTENTION
from ttspec.drafters.features import FeatureDrafter
from ttspec.records import LONGEST_COPY, ReplayBatch
from ttspec.sampling import position_noise

MOST = 32
"""Tokens of p and of q that a lesson has."""
PAST = (0, 512, 1024)
"""Generated tokens."""
AT_ONCE = 64
"""Blocks that are drafted together."""
app = App(help=__doc__)


@dataclass(kw_only=True)
class Learner:
    """Lessons, and the change of logits that follows from them."""

    name: str
    rate: float
    kernel: Literal["none", "one", "linear", "exp"]
    width: float = 4.0
    """Of the kernel exp(width (cos(h, h_i) - 1))."""
    centred: bool = False
    """Whether the mean of the states so far is taken from them."""
    hedge: float = 0.0
    """How fast the scale follows whether more of the change would have helped."""
    every: int = 1
    """Drafting rounds for one that teaches."""
    states: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    scale: float = 1.0
    rounds: int = 0
    seen: int = 0
    mean: Tensor | None = None
    change: Tensor | None = None

    def changed(self, h: Tensor, logits: Tensor) -> Tensor:
        """Logits [G, V] of drafts with states h [G, H]."""
        self.change = None
        if not self.states:
            return logits
        x, states = self._read(h), torch.cat(self.states)
        k = x @ states.T if self.kernel == "linear" else x.new_ones(len(x), len(states))
        if self.kernel == "exp":
            k = ((F.normalize(x, dim=-1) @ states.T - 1) * self.width).exp()
        parts = self.scale * self.rate * k[:, :, None] * torch.cat(self.errors)
        at = torch.cat(self.tokens).flatten().expand(len(x), -1)
        self.change = torch.zeros_like(logits).scatter_add_(1, at, parts.flatten(1))
        return logits + self.change

    def teach(self, h: Tensor, q: Tensor, p: Tensor, ids: Tensor) -> None:
        """Of some drafts: states [n, H], q [n, V], the largest p [n, MOST] and of which tokens."""
        if self.kernel == "none":
            return
        if self.change is not None and self.hedge:
            change = self.change[: len(h)]
            gain = (p * change.gather(1, ids)).sum(1) - (q * change).sum(1)
            grown = self.scale * exp(self.hedge * float(gain.clamp(-1, 1).mean()))
            self.scale = min(8.0, max(0.05, grown))
        self.rounds += 1
        if self.rounds % self.every:
            return
        for state in h.float() if self.centred else []:
            self.seen += 1
            mean = state * 0 if self.mean is None else self.mean
            self.mean = mean + (state - mean) / min(self.seen + 1, 200)
        x, (q_most, q_ids) = self._read(h), q.topk(MOST)
        linear = self.kernel == "linear"
        self.states.append(x / x.square().sum(-1, keepdim=True) if linear else F.normalize(x))
        self.tokens.append(torch.cat([ids, q_ids], 1))
        self.errors.append(torch.cat([p, -q_most], 1))

    def _read(self, h: Tensor) -> Tensor:
        return h.float() if self.mean is None else h.float() - self.mean


def learners() -> list[Learner]:
    """What is compared; rates were chosen on the first half of the sessions."""
    return [
        Learner(name="static", rate=0.0, kernel="none"),
        Learner(name="a bias of each token", rate=0.03, kernel="one"),
        Learner(name="linear", rate=1.0, kernel="linear"),
        Learner(name="linear, centred", rate=2.0, kernel="linear", centred=True),
        Learner(name="kernel", rate=4.0, kernel="exp", centred=True, hedge=0.1),
        Learner(name="kernel, every 4", rate=12.0, kernel="exp", centred=True, hedge=0.1, every=4),
    ]


class Answer(NamedTuple):
    """Where an answer begins and ends in a text, and its noise key."""

    begin: int
    end: int
    key: int


class Round(NamedTuple):
    """Generated tokens before it, tokens it committed, and drafts that it kept if it drafted."""

    position: int
    emitted: int
    kept: int | None


@dataclass(frozen=True, slots=True)
class Drafted:
    """A text, and a block drafted from each place on from `first`."""

    ids: list[int]
    answers: list[Answer]
    first: int
    states: Tensor
    """[places, G, H]."""
    p: Tensor
    ids_of_p: Tensor
    """The largest of p after each token, and their places in the draft vocabulary."""


@torch.no_grad()
def draft_everywhere(engine: Engine, text: RecordedText, answers: list[Answer]) -> Drafted:
    """Let the target read a text and the drafter draft from every place behind the first prompt."""
    target, drafter, ids = engine.target, engine.drafter, text.ids
    assert isinstance(drafter, FeatureDrafter)
    tokens, length, count = torch.tensor([ids]), drafter.length, len(ids)
    with sdpa_kernel(ATTENTION):
        features, hidden = replace(target, taps=drafter.taps).read(tokens)
    state = drafter.start(1, count + 2 * length + 2, drafter.with_context(DraftConfig()))
    for at in range(0, count, 512):
        part = slice(at, at + 512)
        drafter.extend(state, tokens[:, part], features[:, part], torch.tensor([at]))
    first = min(text.begins.values())
    padded = F.pad(tokens[0], (0, length + 1))
    states, p, ids_of_p = list[Tensor](), list[Tensor](), list[Tensor]()
    for at in range(first, count, AT_ONCE):
        start = torch.arange(at, min(at + AT_ONCE, count))
        batch = ReplayBatch(
            tokens=padded[start[:, None] + torch.arange(length + 1)][None],
            start=start[None],
            before=features[0, start - 1][None],
            logits=torch.empty(1, len(start), length, 1),
            mask=torch.ones(1, len(start), length, dtype=torch.bool),
            fresh=torch.ones(1, len(start), dtype=torch.bool),
            count=torch.tensor([len(start)]),
        )
        scores, drafter.logits = drafter.logits, lambda h: h  # type: ignore[method-assign]
        states.append(drafter.replay(state, batch, length, int(start.max()))[0].clone())
        drafter.logits = scores  # type: ignore[method-assign]
        logits = target.compute_logits(hidden[:, start])[0].float()
        total = logits.logsumexp(-1, keepdim=True)
        known = logits if drafter.draft_ids is None else logits[:, drafter.draft_ids]
        most, which = known.topk(MOST)
        p.append((most - total).exp())
        ids_of_p.append(which)
    return Drafted(ids, answers, first, torch.cat(states), torch.cat(p), torch.cat(ids_of_p))


def accepted(text: Sequence[int], proposed: Sequence[int]) -> int:
    """How many proposed tokens are those of the text."""
    same = [a == b for a, b in zip(text, proposed, strict=False)]
    return [*same, False].index(False)


@torch.no_grad()
def rounds_of(
    learner: Learner, drafted: Sequence[Drafted], engine: Engine, temperature: float
) -> list[Round]:
    """The rounds of one conversation."""
    drafter, size = engine.drafter, int(engine.target.config.vocab_size)
    assert isinstance(drafter, FeatureDrafter)
    weights = sum(w.numel() for w in engine.target.model.parameters())
    block_cost, known, length = drafter.weights_read(drafter.length) / weights, 0, drafter.length
    copying, rounds = Copying(1, LONGEST_COPY, block_cost=block_cost), list[Round]()
    for text in drafted:
        ids, first = text.ids, text.first
        for begin, end, key in text.answers:
            noise = position_noise(
                torch.tensor([key]), torch.tensor([begin + 1]), end - begin + length, size
            )[0]
            noise = noise if drafter.draft_ids is None else noise[:, drafter.draft_ids]
            at = begin
            while at < end - 1:
                copy = copying.choose([0], [ids[: at + 1]], drafts=True).get(0)
                if copy:
                    kept = accepted(ids[at + 1 : end - 1], copy)
                else:
                    place = at - first
                    h = text.states[place]
                    logits = learner.changed(h, drafter.logits(h).float())
                    scores = logits / temperature + noise[at - begin : at - begin + length]
                    chosen = scores.argmax(-1)
                    ours = chosen if drafter.draft_ids is None else drafter.draft_ids[chosen]
                    kept = accepted(ids[at + 1 : end - 1], ours.tolist())
                    n = min(kept + 1, length)
                    p, ids_of_p = text.p[place : place + n], text.ids_of_p[place : place + n]
                    learner.teach(h[:n], logits[:n].softmax(-1), p, ids_of_p)
                emitted = kept + 1
                rounds.append(Round(known + at - begin + 1, emitted, None if copy else kept))
                copying.commit(0, ids[at + 1 : at + 1 + emitted], None if copy else kept)
                at += emitted
            known += end - begin
    return rounds


def shown(found: dict[str, list[Round]]) -> str:
    """Tokens a round, whole and later, and drafts kept a drafting round; times `static`."""

    def mean(rounds: list[Round], least: int) -> float:
        some = [r.emitted for r in rounds if r.position >= least]
        return sum(some) / max(1, len(some))

    def kept(rounds: list[Round]) -> float:
        some = [r.kept for r in rounds if r.kept is not None]
        return sum(some) / max(1, len(some))

    lines, static = list[str](), found["static"]
    for name, rounds in found.items():
        cells = [f"{mean(rounds, n):.3f} ({mean(rounds, n) / mean(static, n):.3f})" for n in PAST]
        lines.append(" | ".join([f"{name:22}", *cells, f"{kept(rounds):.3f}"]))
    return "\n".join(lines)


@app.default
def main(run: Path, *, target: str, drafter: str, only: list[int] | None = None) -> None:
    """Go over a run's conversations with each learner; `only` are requests."""
    torch.set_num_threads(1)
    engine = ttspec.load(target, drafter, device="cpu", dtype="bfloat16")
    source = open_source(run, "plain")
    texts_of, _ = conversations(source, engine.target.tokenizer)
    found: dict[str, list[Round]] = {learner.name: [] for learner in learners()}
    for (request, seed), texts in texts_of.items():
        if only and request not in only:
            continue
        keys = noise_keys(seed, texts)
        turns = {turn.turn: turn.result.token_ids for turn in source.units[request, seed]}
        drafted = [
            draft_everywhere(
                engine,
                text,
                [Answer(b, b + len(turns[n]), keys[n]) for n, b in text.begins.items()],
            )
            for text in texts
        ]
        for learner in learners():
            temperature = source.manifest["temperature"]
            found[learner.name] += rounds_of(learner, drafted, engine, temperature)
    print("tokens a round: all | past 512 | past 1,024 tokens | drafts kept a drafting round")
    print(shown(found))


if __name__ == "__main__":
    app()
