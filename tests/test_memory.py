"""What all requests taught: pages of texts, and updates from them."""

import random

import pytest
import torch
from torch import Tensor
from toys import make_kind, random_features, toy_engine

from ttspec import load
from ttspec.config import DraftConfig, LearnConfig
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.engine import Engine
from ttspec.decoding.policy import FixedDraftLength
from ttspec.drafters import teacher_forced_chain
from ttspec.learning import memory_trainer
from ttspec.learning.learner import Learner
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.memory import HELD_OUT_EVERY, PAGE, MemoryRows, TextMemory
from ttspec.learning.memory_trainer import BLOCKS, TextTrainer
from ttspec.losses import forward_kl, likely_kl
from ttspec.models.capture import Graphs
from ttspec.records import ReplayBatch

VOCABULARY = 260
KINDS = ["dflash", "eagle3", "eagle3-layers", "causal", "pard", "mtp"]


@pytest.fixture(scope="module")
def engine(toy_target_dir):
    return toy_engine(toy_target_dir)


def bound(engine, which: str):
    drafter = make_kind(which)
    target = engine.target
    layers = int(target.config.num_hidden_layers)
    drafter.bind(target.embedding, target.head, layers, target.tokenizer)
    return drafter


@pytest.mark.parametrize("seed", [0, 1])
def test_every_page_holds_what_a_row_wrote(engine, seed: int) -> None:
    """Rows that come, go, rest and take each other's oldest pages, in pieces of any size."""
    drafter, rng = bound(engine, "dflash"), random.Random(seed)
    torch.manual_seed(seed)
    memory, rows = TextMemory(drafter, pages=24), 3
    writer, width = MemoryRows(memory, rows), memory.features.shape[-1]
    texts: list[dict] = [{"ids": [], "logits": {}} for _ in range(rows)]
    over: list[dict] = []
    for _ in range(120):
        size = rng.choice([1, 4, 9, PAGE + 7, 3 * PAGE])
        for row in range(rows):
            if rng.random() < 0.05:
                writer.forget(row)
                over.append(texts[row])
                texts[row] = {"ids": [], "logits": {}}
        subset = torch.tensor(rng.sample(range(rows), rng.choice([1, rows])))
        ids = torch.randint(0, VOCABULARY, (len(subset), size))
        features = ids[..., None].float() + torch.arange(width) / width
        logits = torch.randn(*ids.shape, VOCABULARY) if rng.random() < 0.7 else None
        count = torch.tensor([rng.randint(0, size) for _ in subset])
        start = torch.tensor([7 * int(r) + len(texts[r]["ids"]) for r in subset])
        writer.write(ids, features, start, count, logits, subset)
        for i, row in enumerate(subset.tolist()):
            text = texts[row]
            if logits is not None:
                at = len(text["ids"])
                text["logits"] |= {at + j: logits[i, j] for j in range(count[i])}
            text["ids"] += ids[i, : count[i]].tolist()
    over += texts
    used = memory.text[:-1].nonzero()[:, 0]
    seen = 0
    for page in used.tolist():
        found = memory.read(torch.tensor([page]), 3)
        known = found.judged[0].nonzero()[:, 0].tolist()
        if not known:
            continue
        end = known[-1] + 1
        ids = found.tokens[0, :end].tolist()
        hits = [
            (text, k)
            for text in over
            for k in range(0, len(text["ids"]), PAGE)
            if text["ids"][k : k + end] == ids
        ]
        assert hits, page
        text, k = hits[0]
        assert known == [at for at in range(end) if k + at in text["logits"]]
        p = torch.stack([text["logits"][k + at] for at in known]).softmax(-1)
        likely = found.likely[0, known]
        assert torch.equal(likely.sort(-1)[0], p.topk(likely.shape[-1])[1].sort(-1)[0])
        torch.testing.assert_close(
            found.p[0, known].float(), p.gather(-1, likely), atol=1e-3, rtol=0
        )
        others = 1 - p.gather(-1, likely).sum(-1)
        torch.testing.assert_close(found.rest[0, known].float(), others, atol=1e-3, rtol=0)
        wanted = found.tokens[0, :end, None].float() + torch.arange(width) / width
        assert torch.equal(found.features[0, :end], wanted)
        seen += 1
    assert seen > 8


def test_a_full_memory_takes_no_more_and_keeps_the_newest(engine) -> None:
    drafter = bound(engine, "dflash")
    memory = TextMemory(drafter, pages=8)
    rows, nbytes = MemoryRows(memory, 1), memory.nbytes
    width = memory.features.shape[-1]
    for begin in range(0, 20 * PAGE, 32):
        ids = torch.full((1, 32), begin // PAGE)
        logits = torch.zeros(1, 32, VOCABULARY)
        features = torch.zeros(1, 32, width)
        rows.write(ids, features, torch.tensor([begin]), torch.tensor([32]), logits)
    assert memory.nbytes == nbytes
    assert nbytes == pytest.approx(TextMemory.bytes_for(drafter, 8), rel=0.01)
    assert set(memory.tokens[:-1].flatten().tolist()) == set(range(12, 20))
    assert len(memory.held_out_pages(99)) == sum(n % HELD_OUT_EVERY == 1 for n in range(12, 20))


@pytest.mark.parametrize("which", KINDS)
def test_a_remembered_text_is_drafted_as_its_row_would(engine, which: str) -> None:
    drafter = bound(engine, which)
    memory, size = TextMemory(drafter), 40
    width, rows = memory.features.shape[-1], MemoryRows(memory, 2)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY - 4, (2, size), generator=generator)
    features = random_features(2, size, width)
    logits = 4 * torch.randn(2, size, VOCABULARY, generator=generator)
    zero, all_of_it = torch.zeros(2, dtype=torch.long), torch.full((2,), size)
    rows.write(ids, features, zero, all_of_it, logits)
    options, length = drafter.with_context(DraftConfig()), 3
    trainer = TextTrainer(drafter, options, length)
    texts = memory.read(torch.tensor([0, 1]), 1)
    chance = torch.rand(2, PAGE, generator=generator)
    batch = trainer.blocks(texts, texts.judged, chance, 5)
    assert batch.mask.any(-1).all()

    state = drafter.start(2, 64, options)
    drafter.extend(state, ids, features, zero)
    at = batch.start[..., None] + torch.arange(length)
    row = torch.arange(2)[:, None]
    before = features[row, batch.start - 1] if width else None
    own = ReplayBatch(
        tokens=torch.cat([ids, ids], 1)[row[..., None], torch.cat([at, at[..., -1:] + 1], -1)],
        start=batch.start,
        before=before,
        logits=logits[row[..., None], at.clamp(max=size - 1)],
        mask=at < size,
        fresh=batch.fresh,
        count=batch.count,
    )
    assert torch.equal(own.mask, batch.mask)
    learner = Learner(LearnConfig(stride=1), drafter, state, 2, length)
    q_logits = drafter.replay(state, own, length, size)
    p = learner._distillation._target(own.logits)
    q = q_logits.float().softmax(-1)
    agreement = torch.minimum(p, q).sum(-1)
    found = trainer.expected_drafts(drafter.weights, texts, batch)
    drafts = [trainer._draft(drafter.weights, texts, batch)]
    with torch.no_grad():
        drafts.append(trainer._draft(drafter.weights, texts, batch))
    torch.testing.assert_close(*drafts, atol=1e-4, rtol=1e-4)
    wanted = (agreement * own.mask).cumprod(-1).sum(-1)
    # 64 of 260 tokens are known: what the others would add is not counted.
    assert ((wanted - found) > -1e-3).all()
    torch.testing.assert_close(found, wanted, atol=0.06, rtol=0)


@pytest.mark.parametrize("which", ["eagle3", "eagle3-layers", "peagle"])
def test_a_text_that_is_read_with_gradients_is_drafted_as_one_without(engine, which: str) -> None:
    drafter = bound(engine, which)
    memory, size = TextMemory(drafter), 40
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY - 4, (2, size), generator=generator)
    features = random_features(2, size, memory.features.shape[-1])
    logits = torch.randn(2, size, VOCABULARY, generator=generator)
    zero = torch.zeros(2, dtype=torch.long)
    MemoryRows(memory, 2).write(ids, features, zero, zero + size, logits)
    trainer = TextTrainer(drafter, DraftConfig(window=7), 3)
    texts = memory.read(torch.tensor([0, 1]), 1)
    batch = trainer.blocks(texts, texts.judged, torch.rand(2, PAGE, generator=generator), 5)
    names = drafter.learnable("full")
    leaves = {n: drafter.weights[n].clone().requires_grad_() for n in names}
    found = trainer._draft({**drafter.weights, **leaves}, texts, batch)
    with torch.no_grad():
        wanted = trainer._draft(drafter.weights, texts, batch)
    torch.testing.assert_close(found.detach(), wanted, atol=5e-5, rtol=1e-4)
    for name, gradient in zip(
        names, torch.autograd.grad(found.square().mean(), list(leaves.values())), strict=True
    ):
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("normed", [False, True])
def test_gradients_made_by_hand_are_those_of_autograd(engine, normed, window, monkeypatch) -> None:
    drafter, target = make_kind("eagle3", norm_before_residual=normed), engine.target
    drafter.bind(target.embedding, target.head, int(target.config.num_hidden_layers))
    memory, size = TextMemory(drafter), 40
    ids = torch.randint(0, VOCABULARY - 4, (2, size))
    features = torch.randn(2, size, memory.features.shape[-1])
    logits = 3 * torch.randn(2, size, VOCABULARY)
    zero = torch.zeros(2, dtype=torch.long)
    MemoryRows(memory, 2).write(ids, features, zero, zero + size, logits)
    trainer = TextTrainer(drafter, DraftConfig(window=window), 3)
    texts = memory.read(torch.tensor([0, 1]), 1)
    batch = trainer.blocks(texts, texts.judged, torch.rand(2, PAGE), 5)
    live = LiveWeights(LearnConfig(scope="shared"), drafter, 1)

    def made() -> tuple[Tensor, dict[str, Tensor]]:
        loss = trainer.backward(live, texts, batch)
        return loss, {name: gradient.clone() for name, gradient in live.gradient.items()}

    loss, wanted = made()
    assert teacher_forced_chain.is_supported(drafter, drafter.start(1, 8, DraftConfig()))
    monkeypatch.setattr(teacher_forced_chain, "fits", lambda *_: torch.is_grad_enabled())
    by_hand, found = made()
    torch.testing.assert_close(by_hand, loss)
    assert len(found) == len(drafter.learnable("full"))
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_the_gradient_of_likely_tokens_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    q_logits = torch.randn(2, 3, 50, dtype=torch.float64, requires_grad=True)
    p, likely = torch.randn(2, 3, 50).softmax(-1).topk(10)
    rest, outer = 1 - p.sum(-1), torch.randn(2, 3)
    log_q = q_logits.log_softmax(-1).gather(-1, likely)
    others = (1 - log_q.exp().sum(-1)).clamp(min=1e-4)
    loss = (p * (p.log() - log_q)).sum(-1) + rest * (rest.log() - others.log())
    (wanted,) = torch.autograd.grad((loss * outer).sum(), q_logits)
    found = likely_kl(likely, p, rest, q_logits)
    torch.testing.assert_close(found, loss.float(), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad((found * outer).sum(), q_logits)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)


def test_the_loss_is_kl_where_all_tokens_are_known() -> None:
    torch.manual_seed(0)
    p_logits, q_logits = torch.randn(4, 50), torch.randn(4, 50, requires_grad=True)
    p = p_logits.softmax(-1)
    values, likely = p.topk(50)
    wanted = forward_kl(p_logits, q_logits)
    found = likely_kl(likely, values, torch.zeros(4), q_logits)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    gradient = torch.autograd.grad(found.sum(), q_logits)[0]
    torch.testing.assert_close(gradient, (q_logits.softmax(-1) - p).detach(), atol=1e-3, rtol=1e-2)
    values, likely = p.topk(10)
    found = likely_kl(likely, values, 1 - values.sum(-1), q_logits)
    assert (found <= wanted + 1e-5).all(), "tokens that are told together are told apart no more"
    assert (found > 0).all()


@pytest.mark.parametrize("which", ["dflash", "eagle3", "causal"])
def test_a_shared_drafter_learns_its_requests_by_heart(engine, which: str) -> None:
    """The mean of the weights drafts better than the anchor on the texts it was taught."""
    own = Engine(engine.target, make_kind(which))
    learn = LearnConfig(scope="shared", stride=1, lr=3e-3, guard=0)
    asked = {"max_new_tokens": 60, "seed": 5, "temperature": 0.8, "ignore_eos": True}
    prompts = ["hello there", "count to ten, please"]
    static = own.generate(prompts, learn=None, **asked)
    taught = own.generate(prompts, learn=learn, **asked)
    again = own.generate(prompts, learn=learn, **asked)
    assert [r.token_ids for r in again] == [r.token_ids for r in static]
    assert [r.token_ids for r in taught] == [r.token_ids for r in static]
    assert sum(len(r.rounds) for r in again) < 0.9 * sum(len(r.rounds) for r in static)
    assert_remembered(own, [r.token_ids for r in static])


def assert_remembered(engine: Engine, answers: list[list[int]]) -> None:
    """The first pages hold the beginnings of two answers."""
    (live,) = engine._shared_weights._live.values()
    texts = live.memory.read(torch.arange(2, device=live.memory.tokens.device), 1)
    found = [
        t[: int(j.nonzero().max()) + 1].tolist()
        for t, j in zip(texts.tokens, texts.judged, strict=True)
    ]
    for row, answer in enumerate(answers):
        assert any(answer[:20] == f[k : k + 20] for f in found for k in range(len(f))), row


def test_where_what_was_learned_drafts_worse_the_anchor_does_until_it_is_better_again(
    engine, monkeypatch
) -> None:
    """It is not lost, and it goes on learning: the next texts may be of the kind that taught it."""
    own = Engine(engine.target, make_kind("eagle3"))
    learn = LearnConfig(scope="shared", stride=1, lr=3e-3)
    asked = {"max_new_tokens": 60, "seed": 5, "temperature": 0.8, "ignore_eos": True}
    prompts, drafts = ["hello there", "count to ten, please"], list[bool]()
    draft = DraftConfig(copy=False, adaptive=False)
    publish = LiveWeights.publish

    def noted(self, *, anchor: bool = False) -> None:
        drafts.append(not anchor)
        publish(self, anchor=anchor)

    monkeypatch.setattr(LiveWeights, "publish", noted)
    for _ in range(2):
        own.generate(prompts, learn=learn, draft=draft, **asked)
    (live,) = own._shared_weights._live.values()
    assert all(drafts[-20:])
    learned = live._mean.clone()

    def plant(weights: Tensor) -> None:
        live._master.copy_(weights)
        live._mean.copy_(weights)
        drafts.clear()

    plant(live._anchor - (learned - live._anchor))
    live.rate = 1e-6
    own.generate(prompts, learn=learn, draft=draft, **asked)
    assert not all(drafts[:12]), "the guard was too late"
    assert not any(drafts[20:])
    assert torch.equal(live._published[0], live._anchor.to(live._published.dtype))
    assert own._spare.learner.reverts == [0, 0]
    plant(learned)
    own.generate(prompts, learn=learn, draft=draft, **asked)
    assert any(drafts[:12])
    assert all(drafts[20:])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("which", "compile"),
    [*((w, False) for w in ("dflash", "eagle3", "causal", "pard", "mtp")), ("eagle3", True)],
)
def test_on_a_gpu_it_remembers_what_was_said(toy_target_dir, which: str, compile: bool) -> None:
    options = {"device": "cuda", "dtype": "bfloat16", "compile": compile}
    own = load(str(toy_target_dir), make_kind(which), **options)
    learn = LearnConfig(scope="shared", stride=4)
    asked = {"max_new_tokens": 60, "seed": 5, "temperature": 0.8, "ignore_eos": True}
    results = own.generate(["hello there", "count to ten, please"], learn=learn, **asked)
    assert_remembered(own, [r.token_ids for r in results])
    assert max(r.stats.updates for r in results) >= 1


@pytest.mark.parametrize("apart", [True, False])
def test_texts_are_captured_before_what_would_work_where_they_lie(engine, apart) -> None:
    """All graphs of updates share memory: a later one's output may lie in an older one's."""
    own, called = Engine(engine.target, make_kind("eagle3")), list[str]()

    class Recording(Graphs):
        on = True

        def __init__(self) -> None:
            self._made = {} if apart else {"a round's": {}}

        def __call__(self, work, *key, **_):
            self._made[key] = {}
            called.append(work.__name__)
            return work(*key)

    own.generate(["hello there"], learn=LearnConfig(scope="shared"), max_new_tokens=30)
    assert own._spare
    learner = own._spare.learner
    assert learner
    learner._run_update = Recording()
    if not apart:  # as where updates are published at once
        learner._run = learner._run_update
    learner.capture_updates(600)
    read = [name for name in called if not name.startswith("write_")]  # those are rounds' graphs
    assert read[:3] == ["read_texts", "read_newest", "train_on_texts"]
    assert called.count("compare_newest") == 1


class Pausing(FixedDraftLength):
    """Drafts in a few rounds, and then in none."""

    left = 4

    def choose(self, unobserved: int | None = None) -> int:
        self.left -= 1
        return 0 if self.pauses else self.length

    @property
    def pauses(self) -> bool:  # type: ignore[override]
        return self.left < 0


@pytest.mark.parametrize("copies", [False, True])
def test_it_goes_on_learning_while_the_drafter_pauses(engine, copies: bool) -> None:
    own = Engine(engine.target, make_kind("dflash"))
    asked = {"max_new_tokens": 60, "seed": 5, "temperature": 0.8, "ignore_eos": True}
    prompts = ["hello there", "count to ten, please"]
    draft = DraftConfig(copy=copies, adaptive=False)
    static = own.generate(prompts, learn=None, draft=draft, **asked)

    def pausing(*args, **options) -> Decoder:
        decoder = Decoder(*args, **options)
        decoder.planner.policy = Pausing(decoder.gamma)
        return decoder

    learn = LearnConfig(scope="shared", stride=1, lr=3e-3, guard=0)
    own.make_decoder, own._spare = pausing, None
    taught = own.generate(prompts, learn=learn, draft=draft, **asked)
    assert [r.token_ids for r in taught] == [r.token_ids for r in static]
    assert max(r.stats.updates for r in taught) > 20
    (live,) = own._shared_weights._live.values()
    judged = int(live.memory.judged.sum())
    assert judged >= sum(len(r.token_ids) - 2 for r in taught), "plain rounds teach too"
    own.make_decoder, own._spare = Decoder, None
    again = own.generate(prompts, learn=learn, draft=draft, **asked)
    assert [r.token_ids for r in again] == [r.token_ids for r in static]
    assert sum(len(r.rounds) for r in again) < 0.9 * sum(len(r.rounds) for r in static)


def test_a_memory_is_told_of_few_rounds_where_updates_are_rare(engine, monkeypatch) -> None:
    """And those updates come as often as they would."""
    monkeypatch.setattr(memory_trainer, "RECORDED_ROUNDS", 4)
    asked = {"max_new_tokens": 70, "seed": 5, "ignore_eos": True}
    learn = LearnConfig(scope="shared", stride=1, guard=0)
    keep, calls, done = Learner.keep, list[int](), list[tuple[int, int, int]]()
    for strides in (1, 2):

        def counted(self, *given, strides: int = strides, **drafted) -> None:
            calls.append(1)
            self.strides = strides
            keep(self, *given, **drafted)

        monkeypatch.setattr(Learner, "keep", counted)
        calls.clear()
        own, draft = Engine(engine.target, make_kind("dflash")), DraftConfig(adaptive=False)
        (result,) = own.generate(["hello there"], learn=learn, draft=draft, **asked)
        done.append((len(calls), len(result.rounds), result.stats.updates))
    (all_told, rounds, updates), (few_told, of, fewer) = done
    assert all_told == rounds
    assert few_told < 0.45 * of
    assert fewer > 0.4 * updates


def test_an_update_leaves_alone_what_is_held_out(engine) -> None:
    drafter = bound(engine, "dflash")
    memory = TextMemory(drafter)
    rows, width = MemoryRows(memory, 1), memory.features.shape[-1]
    length = 20 * PAGE
    ids = torch.randint(0, VOCABULARY, (1, length))
    logits = torch.randn(1, length, VOCABULARY)
    where = torch.tensor([0]), torch.tensor([length])
    rows.write(ids, random_features(1, length, width), *where, logits)
    pages = memory.held_out_pages(9)
    assert memory.number[pages].tolist() == [17, 1]
    trainer = TextTrainer(drafter, DraftConfig(), 4)
    texts = memory.read(pages[:1], 8)
    assert texts.held_out.sum() == PAGE
    teach = texts.judged & ~texts.held_out
    chance = torch.rand(teach.shape)
    batch = trainer.blocks(texts, teach, chance, BLOCKS)
    at = (batch.start[..., None] + torch.arange(4))[batch.mask]
    assert not texts.held_out[0, at].any()
    held = trainer.blocks(texts, texts.held_out, chance, 8)
    at = (held.start[..., None] + torch.arange(4))[held.mask]
    assert texts.held_out[0, at].all()
