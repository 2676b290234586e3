"""Prompts read as padded pieces, on a GPU where that is captured, on a CPU in two bytes: nothing
else may follow."""

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from random import Random

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from toys import make_kind, toy_engine

from ttspec import load
from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding.captured_prompts import CAPTURE_SIZES, CapturedPrompts, ReadShape
from ttspec.decoding.conversation import Request
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.engine import Engine
from ttspec.decoding.launched import Launched
from ttspec.decoding.prefill import PrefillChunk
from ttspec.decoding.scheduler import Scheduler
from ttspec.drafters.context import ContextState, FeatureState
from ttspec.errors import TargetError
from ttspec.models.capture import Graphs
from ttspec.models.target import Target


class Rounding(Decoder):
    """Pads as a CPU does that computes in bfloat16."""

    def capture(self) -> None:
        super().capture()
        self.prompts._pads = True


class Padding(Decoder):
    """Pads as a GPU would."""

    padded, beside, together = 0, False, 0

    def capture(self) -> None:
        super().capture()
        self.prompts.capture(self, Graphs(torch.device("cpu")), beside=self.beside)
        captured = self.prompts.captured
        assert captured
        read = captured.read_padded

        def counted(shape: ReadShape):
            Padding.padded += 1
            Padding.together += shape.rows > 1
            return read(shape)

        captured.read_padded = counted  # type: ignore[method-assign]


class Busy(CapturedPrompts):
    """Is over some rounds after it was launched, as on a GPU."""

    asked = 0

    @property
    def is_busy(self) -> bool:
        Busy.asked += self.is_launched
        return self.is_launched and Busy.asked % 5 > 0


class Beside(Padding):
    """Reads prompts beside rounds."""

    beside = True

    def capture(self) -> None:
        super().capture()
        assert self.prompts.captured
        self.prompts.captured.__class__ = Busy
        self.works_ahead = False


class Letters:
    """A mask: an answer may have the first 128 tokens."""

    def fill(self, bitmask: Tensor, text: Sequence[int], drafted: Sequence[int]) -> None:
        bitmask[:, 4:] = 0


class Going(Beside):
    """Begins them, and lets rows join and leave, while rounds go on by themselves."""

    _reads_spans = True
    begun = joined = left = two = 0

    def capture(self) -> None:
        self.cache.moves_rows = False  # first: what is read to capture it finds rows otherwise
        super().capture()
        self.works_ahead = True
        begin = self.prompts.begin

        def counted(*args):
            Going.begun += self.launched is not None
            return begin(*args)

        self.prompts.begin = counted  # type: ignore[method-assign]

    def _launch(self, unobserved: int | None = None, after: Launched | None = None) -> Launched:
        changed = set(self.rows.changed)
        launched = super()._launch(unobserved, after)
        if after:
            Going.joined += any(row in launched.plan.active for row in changed)
        assert self.row_sampling.is_current(launched.plan.shape.processors)
        assert not self.rows.changed
        return launched

    def launch_following(self) -> None:
        before = len(self._under_way)
        super().launch_following()
        if len(self._under_way) > before:
            Going.two += 1
            assert not any(one.is_timed for one in self._under_way)

    def leave(self, row: int) -> None:
        takes_part = self.launched is not None and row in self.launched.plan.active
        super().leave(row)
        Going.left += takes_part and self.launched is not None


@pytest.fixture(scope="module")
def target(toy_target_dir):
    return toy_engine(toy_target_dir).target


@pytest.mark.parametrize(
    "which", ["dflash", "eagle3", "eagle3-layers", "causal", "dspark", "mtp", None]
)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pads", [Padding, Rounding, Beside])
def test_a_padded_prompt_is_read_as_any(
    target, which: str | None, shared: bool, pads: type[Decoder]
) -> None:
    """Of one length and many, in one turn and several, beside rows that decode."""
    learn = LearnConfig(scope="shared", stride=2, lr=3e-3) if shared else None
    options = {"max_new_tokens": 12, "seed": 3, "temperature": 0.9, "ignore_eos": True}
    options |= {"learn": learn, "draft": DraftConfig(adaptive=False), "context": 500}
    talks = [["hello"], ["x" * 40, "and then?", "y" * 33], ["z" * 300], ["count to ten", "again"]]

    def said(engine: Engine) -> list[tuple[list[int], list[tuple[int, int]]]]:
        run = engine.run(talks, rows=3, **options)
        found = [(talk, chunk.result) for talk, chunk in run if chunk.result]
        results = [r for _, r in sorted(found, key=lambda pair: pair[0])]
        return [(r.token_ids, [(n.position, n.accepted) for n in r.rounds]) for r in results]

    plain, padded = (Engine(target, make_kind(which) if which else None) for _ in range(2))
    padded.make_decoder, Padding.padded, Busy.asked = pads, 0, 0
    found, expected = said(padded), said(plain)
    if pads is Beside and shared:  # what prompts taught when may differ, the text may not
        found, expected = ([(text, []) for text, _ in each] for each in (found, expected))
    assert found == expected
    assert Padding.padded > 6 or pads is Rounding
    if pads is Beside and which == "eagle3" and not shared:  # else rows may end all at once
        assert Busy.asked


@pytest.mark.parametrize("which", ["dflash", "eagle3", "eagle3-layers", None])
@pytest.mark.parametrize("shared", [False, True])
def test_prompts_of_like_lengths_are_read_together(target, which: str | None, shared: bool) -> None:
    """Those that begin at once, more than are read at a time, and those that come later."""
    learn = LearnConfig(scope="shared", stride=2, lr=3e-3) if shared and which else None
    options = {"temperature": 0.9, "ignore_eos": True, "context": 400, "learn": learn}
    config = GenerateConfig(max_new_tokens=12, draft=DraftConfig(adaptive=False), **options)

    def said(make: type[Decoder]) -> list[list[int]]:
        engine, found = Engine(target, make_kind(which) if which else None), dict[int, list[int]]()
        engine.make_decoder = make
        scheduler = Scheduler(engine.decoder(config, 11, 300, sessions=False), config)
        for size in [30, 7, 90, 12, 44, 80, 100, 77, 2, 61, 5, 33, 8, 19, 64, 65]:
            prompt = [(3 * n + size) % 250 for n in range(size)]
            scheduler.add_request(Request(ids=prompt, seed=size))
        while scheduler.has_unfinished():
            for request, chunk in scheduler.step():
                if chunk.result:
                    found[request] = chunk.result.token_ids
        return [found[request] for request in sorted(found)]

    expected, Padding.together, Busy.asked = said(Decoder), 0, 0
    assert said(Beside) == expected
    assert Padding.together >= 2  # of both widths, of those that begin at once


@pytest.mark.parametrize("which", ["dflash", "eagle3", "eagle3-layers", None])
@pytest.mark.parametrize("shared", [False, True])
def test_prompts_begin_while_a_round_is_under_way(target, which: str | None, shared: bool) -> None:
    """Rows come and go, some with options that the host must look at, and texts stay the same."""
    learn = LearnConfig(scope="shared", stride=2, lr=3e-3) if shared and which else None
    options = {"temperature": 0.9, "ignore_eos": True, "context": 400, "learn": learn}
    config = GenerateConfig(max_new_tokens=40, draft=DraftConfig(adaptive=True), **options)
    random = Random(7)
    asked = [
        Request(
            ids=[random.randrange(250) for _ in range(random.choice((3, 20, 70, 200)))],
            seed=n,
            config=replace(
                config,
                max_new_tokens=random.randrange(2, 40),
                stop=tuple("e3Qz%aHx-") if n % 2 else (),
            ),
            logprobs=1 if n in (5, 17) else None,
            mask=Letters() if n in (6, 21) else None,
            tenant=random.choice((None, "a", "b")) if not shared else None,
        )
        for n in range(30)
    ]

    def said(make: type[Decoder]) -> list[list[int]]:
        engine, found = Engine(target, make_kind(which) if which else None), dict[int, list[int]]()
        engine.make_decoder = make
        scheduler = Scheduler(engine.decoder(config, 5, 300, sessions=False), config, stream=False)
        for request in asked:
            scheduler.add_request(request)
        while scheduler.has_unfinished():
            for request, chunk in scheduler.step():
                assert chunk.result
                found[request] = chunk.result.token_ids
        return [found[request] for request in sorted(found)]

    expected, Busy.asked = said(Decoder), 0
    Going.begun = Going.joined = Going.left = Going.two = 0
    assert said(Going) == expected
    assert Going.begun > 2
    assert Going.joined > 2
    assert Going.left > 0
    assert Going.two > 2


def going(
    target, rows: int, drafter: str | None = None, make: type[Decoder] = Going, **options
) -> Scheduler:
    """A scheduler of rows that come and go beside rounds."""
    engine = Engine(target, make_kind(drafter) if drafter else None)
    engine.make_decoder, Busy.asked = make, 0
    options = {"ignore_eos": True, "context": 400, "learn": None, "temperature": 0.9, **options}
    config = GenerateConfig(draft=DraftConfig(adaptive=False, copy=False), **options)
    return Scheduler(engine.decoder(config, rows, 300, sessions=False), config)


def test_who_must_be_read_between_rounds_waits_for_those_under_way_only(target) -> None:
    """Others wait for a row meanwhile, and the one that decodes has much to say."""
    scheduler = going(target, 2, max_new_tokens=200)
    short = replace(scheduler.config, max_new_tokens=5)
    penalised = replace(scheduler.config, repetition_penalty=1.2)
    scheduler.add_request(Request(ids=[1, 2], seed=1))
    scheduler.add_request(Request(ids=[3, 4], seed=2, config=short))
    between = scheduler.add_request(Request(ids=[5, 6], seed=3, config=penalised))
    scheduler.add_request(Request(ids=[7, 8], seed=4))
    steps = 0
    while not any(request == between for request, _ in scheduler.step()):
        steps += 1
        assert steps < 20


def test_logprobs_are_of_the_round_though_a_row_leaves_it(target) -> None:
    """What a learner does as a row leaves works where on a GPU the round's logits lie."""
    learn = LearnConfig(scope="shared", stride=2, lr=1e-9)

    def said(make: type[Decoder], spoils: bool) -> list[float]:
        scheduler = going(target, 2, "eagle3", make, max_new_tokens=30, learn=learn)
        decoder, found = scheduler.decoder, list[float]()
        forget = decoder.learner.memory_trainer.forget

        def forgets(*given):
            forget(*given)
            if decoder.launched and spoils:
                decoder.launched.verification.logits.fill_(1.0)

        decoder.learner.memory_trainer.forget = forgets
        one = scheduler.add_request(Request(ids=[1, 2], seed=1, logprobs=0))
        other = scheduler.add_request(Request(ids=[3, 4], seed=2))
        for step in itertools.count():
            if step == 6:
                scheduler.abort(other)
            for request, chunk in scheduler.step():
                found += [token.logprob for token in chunk.logprobs if request == one]
            if not scheduler.has_unfinished():
                return found

    assert said(Going, spoils=True) == pytest.approx(said(Decoder, spoils=False))


def test_rounds_are_launched_anew_where_an_interrupt_came_as_one_was(target) -> None:
    """The device has moved on, and the host does not know how far."""

    def said(make: type[Decoder], *, interrupts: bool) -> dict[int, list[int]]:
        scheduler, found = going(target, 2, "eagle3", make, max_new_tokens=30), {}
        decoder, short = scheduler.decoder, replace(scheduler.config, max_new_tokens=6)
        for seed, config in enumerate((None, short, None)):
            scheduler.add_request(Request(ids=[seed, 2], seed=seed, config=config))
        download = decoder.rows.download

        def interrupted(*given):
            raise KeyboardInterrupt

        while scheduler.has_unfinished():
            if interrupts and decoder.launched:
                decoder.rows.download = interrupted
                with suppress(KeyboardInterrupt):
                    decoder.launch_following()
                decoder.rows.download = download
            ended = [(request, chunk.result) for request, chunk in scheduler.step()]
            found |= {request: result.token_ids for request, result in ended if result}
        return found

    assert said(Going, interrupts=True) == said(Decoder, interrupts=False)


def test_no_round_goes_on_with_banned_words_that_have_moved(target) -> None:
    """`Going` looks at what each round reads."""
    scheduler = going(target, 3, max_new_tokens=100)

    def banning(*words: tuple[int, ...]) -> GenerateConfig:
        return replace(scheduler.config, max_new_tokens=100, bad_words_ids=words)

    scheduler.add_request(Request(ids=[1, 2], seed=1, config=banning((7, 8))))
    scheduler.add_request(Request(ids=[3, 4], seed=2, config=banning((7, 8))))
    for _ in range(6):
        scheduler.step()
    more = banning(*((n, n + 1, n + 2) for n in range(9)))
    last = scheduler.add_request(Request(ids=[5, 6], seed=3, config=more))
    scheduler.step()
    scheduler.abort(last)
    for _ in range(6):
        scheduler.step()


@pytest.mark.parametrize("shared", [False, True])
def test_who_is_read_beside_rounds_may_be_aborted(target, shared: bool) -> None:
    learn = LearnConfig(scope="shared", stride=2) if shared else None
    options = {"temperature": 0.9, "ignore_eos": True, "context": 400, "learn": learn}
    config = GenerateConfig(max_new_tokens=20, draft=DraftConfig(adaptive=False), **options)

    def said(make: type[Decoder], aborted: int | None) -> dict[int, list[int]]:
        engine, found = Engine(target, make_kind("eagle3")), dict[int, list[int]]()
        engine.make_decoder = make
        scheduler = Scheduler(engine.decoder(config, 3, 300, sessions=False), config)
        for size in (30, 7, 90, 12, 44, 5):
            prompt = [(3 * n) % 250 for n in range(size)]
            scheduler.add_request(Request(ids=prompt, seed=size))
        while scheduler.has_unfinished():
            prompts = scheduler.decoder.prompts
            if aborted is not None and prompts.is_launched and scheduler._prefilling:
                scheduler.abort(scheduler._prefilling[0].id)
                aborted = None
            for request, chunk in scheduler.step():
                if chunk.result:
                    found[request] = chunk.result.token_ids
        return found

    Busy.asked = 0
    whole, cut = said(Decoder, None), said(Beside, 1)
    assert Busy.asked
    assert len(cut) == len(whole) - 1
    assert all(whole[request] == tokens for request, tokens in cut.items())


def test_prompts_are_read_on_where_who_kept_them_from_being_read_beside_rounds_leaves(
    target,
) -> None:
    engine = Engine(target, None)
    options = {"ignore_eos": True, "context": 400, "learn": None, "temperature": 0.9}
    config = GenerateConfig(max_new_tokens=20, draft=DraftConfig(adaptive=False), **options)

    def said(make: type[Decoder]) -> list[int]:
        engine.make_decoder = make
        scheduler = Scheduler(engine.decoder(config, 2, 300, sessions=False), config)
        request = scheduler.add_request(Request(ids=[(3 * n) % 250 for n in range(70)], seed=1))
        other = scheduler.add_request(Request(ids=[1, 2], seed=2, logprobs=1))
        assert not scheduler.step()  # all but the last two tokens are read
        scheduler.abort(other)
        while True:
            for number, chunk in scheduler.step():
                if chunk.result:
                    assert number == request
                    return chunk.result.token_ids

    assert said(Beside) == said(Decoder)


@pytest.mark.parametrize("error", [TargetError, KeyboardInterrupt])
def test_a_prompt_whose_logits_are_no_numbers_is_read_again_after_the_error(
    target, monkeypatch, error: type[BaseException]
) -> None:
    """Or if an interrupt came when its reading was over."""
    engine = Engine(target, make_kind("eagle3"))
    engine.make_decoder = Beside
    options = {"ignore_eos": True, "context": 400, "learn": None, "temperature": 0.9}
    config = GenerateConfig(max_new_tokens=20, draft=DraftConfig(adaptive=False), **options)
    scheduler = Scheduler(engine.decoder(config, 3, 300, sessions=False), config)
    for size in (30, 7, 90, 12, 44, 5):
        scheduler.add_request(Request(ids=[(3 * n) % 250 for n in range(size)], seed=size))
    finish, failed, ended = CapturedPrompts.finish, [], []

    def finished(self, rows):
        found = finish(self, rows)
        if not failed:
            failed.append(rows)
            if error is KeyboardInterrupt:
                raise KeyboardInterrupt
            return [[token, 0] for token, _ in found]
        return found

    monkeypatch.setattr(CapturedPrompts, "finish", finished)
    while scheduler.has_unfinished():
        try:
            ended += [chunk.result for _, chunk in scheduler.step() if chunk.result]
        except error:
            assert failed
    assert failed
    assert len(ended) == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_reads_few_lengths_where_each_costs_memory(
    toy_target_dir, monkeypatch, dtype
) -> None:
    """oneDNN keeps what it compiled for each; a row's last slots and one token alone are as any."""
    engine = toy_engine(toy_target_dir, dtype=dtype)
    read, forward = set[int](), Target.forward

    def counted(self: Target, cache, tokens, *rest, **options):
        read.add(tokens.shape[1])
        return forward(self, cache, tokens, *rest, **options)

    monkeypatch.setattr(Target, "forward", counted)
    lengths = [1, *range(20, 100)]  # padded, the longest have no room in a row
    config = GenerateConfig(max_new_tokens=1, ignore_eos=True, context=100)
    scheduler = Scheduler(engine.decoder(config, 1, 1, sessions=True), config)
    for length in lengths:
        scheduler.add_request(Request(ids=[n % 200 for n in range(length)], seed=1))
    while scheduler.has_unfinished():
        scheduler.step()
    few = {1, 32, 48, 64, 80, 96, 112}
    assert read == (few if dtype == "bfloat16" else set(lengths))


@pytest.mark.parametrize("which", ["dflash", "eagle3", "causal", "pard", "mtp"])
def test_no_product_is_of_a_slice(toy_target_dir, monkeypatch, which: str) -> None:
    """On a CPU in bfloat16 it would take 25 times as long."""
    engine = Engine(toy_engine(toy_target_dir, dtype="bfloat16").target, make_kind(which))
    products, linear = list[tuple[int, ...]](), functional.linear

    def spied(x: Tensor, *rest, **options) -> Tensor:
        products.append(tuple(x.shape))
        assert x.dim() < 3 or x.stride() == torch.empty(x.shape, device="meta").stride(), x.shape
        return linear(x, *rest, **options)

    monkeypatch.setattr(functional, "linear", spied)
    options = {"max_new_tokens": 12, "seed": 1, "ignore_eos": True}
    draft = DraftConfig(adaptive=False, copy=False)
    engine.generate(["hello", "and more of it"], learn=None, draft=draft, **options)
    assert products


def test_reading_is_captured_after_what_moves_the_weights(toy_target_dir) -> None:
    """To compile a target lays its weights elsewhere: an older graph would read freed memory."""
    engine = toy_engine(toy_target_dir, dtype="bfloat16")
    decoder = engine.decoder(GenerateConfig(), 2, 50, sessions=False)
    called: list[str] = []

    class Recording(Graphs):
        on = True

        def __init__(self) -> None:
            pass

        def __call__(self, work, *key, **_):
            called.append(work.__name__)
            return work(*key)

    decoder.graphs, decoder.target_reads_spans = Recording(), True
    decoder.capture()
    assert called[-len(CAPTURE_SIZES) - 1 :] == ["read_padded"] * len(CAPTURE_SIZES) + ["draw_some"]
    assert "verify_and_accept" in called


@pytest.mark.gpu
def test_graphs_of_prompts_read_weights_that_are_there(toy_target_dir) -> None:
    options = {"device": "cuda", "dtype": "bfloat16", "compile": True}
    engine = load(str(toy_target_dir), make_kind("dflash"), **options)
    asked = {"max_new_tokens": 8, "seed": 1, "ignore_eos": True, "rows": 2}
    talks = [["hello"], ["count"], ["to ten, please"]]

    def said() -> list[list[int]]:
        return [c.result.token_ids for _, c in engine.run(talks, **asked) if c.result]

    before = said()
    free = torch.full((1 << 28,), float("nan"), device="cuda")  # takes what was freed
    assert said() == before
    del free


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["dflash", "eagle3", "eagle3-layers", "causal", "mtp"])
def test_what_is_captured_reads_as_what_is_called(toy_target_dir, which: str) -> None:
    engine = load(str(toy_target_dir), make_kind(which), device="cuda", dtype="bfloat16")
    config = GenerateConfig(max_new_tokens=20, learn=LearnConfig(scope="shared"))
    decoder = engine.decoder(config, 3, 100, sessions=False)
    prompts, found = decoder.prompts, []
    assert prompts.captured
    for captured in (prompts.captured, None, prompts.captured):
        prompts.captured = captured
        for row, size in ((1, 40), (2, 7), (1, 90)):
            decoder.clear(row)
            ids = [(7 * n) % 250 for n in range(size)]
            begun = prompts.begin([row], [ids], [5], [20])
            logits = prompts._feed(PrefillChunk([row], [ids], [0], [0]), logits=True)
            assert begun.rows == [row]
            state, last = decoder.state, size - 1  # EAGLE-3 makes the last one's with the next
            held = [logits, state.keys[:, row, :, :last], state.values[:, row, :, :last]]
            if isinstance(state, FeatureState):
                held.append(state.features[row, :size])
                assert state.held[row, :size].tolist() == list(range(size))
            found.append([t.float().clone() for t in held if t is not None])
    for other in (3, 6):
        for at in range(3):
            for a, b in zip(found[at], found[at + other], strict=True):
                assert (a - b).norm() <= 0.02 * b.norm()  # products of other sizes round otherwise


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["dflash", "eagle3", "eagle3-layers"])
def test_prompts_that_are_read_together_are_read_as_any(toy_target_dir, which: str) -> None:
    """Keys of the target and of the drafter, and features; pads and other rows stay as they are."""
    engine = load(str(toy_target_dir), make_kind(which), device="cuda", dtype="bfloat16")
    decoder = engine.decoder(GenerateConfig(max_new_tokens=20), 6, 300, sessions=False)
    state, cache, captured = decoder.state, decoder.cache, decoder.prompts.captured
    assert isinstance(state, ContextState)
    assert captured
    kept = [state.features] if isinstance(state, FeatureState) else []
    rows, found = [4, 1, 5, 2], []
    prompts = [[(7 * n + row) % 250 for n in range(9 * row)] for row in rows]
    for together in (True, False):
        for keys in (*cache.keys.values(), state.keys, *kept):
            keys.zero_()
        for part in [slice(0, 4)] if together else [slice(i, i + 1) for i in range(4)]:
            given = rows[part], prompts[part], [0] * len(rows[part])
            captured.launch(*given, record=False)
            assert len(captured._launched) == 1
            assert all(finite for _, finite in captured.finish(rows[part]))
        found.append([])
        for row, ids in zip(rows, prompts, strict=True):
            found[-1] += [keys[row, :, : len(ids)].clone() for keys in cache.keys.values()]
            found[-1] += [state.keys[:, row, :, : len(ids) - 1].clone()]
            found[-1] += [features[row, : len(ids)].clone() for features in kept]
        for row in (0, 3):
            assert not any(keys[row, :, : cache.slots].any() for keys in cache.keys.values())
    for a, b in zip(*found, strict=True):
        assert b.norm()
        assert (a - b).norm() <= 0.02 * b.norm()  # products of other sizes round otherwise


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["dflash", "eagle3", None])
@pytest.mark.parametrize("shared", [False, True])
def test_texts_are_those_of_prompts_read_between_rounds(
    toy_target_dir, which: str | None, shared: bool
) -> None:
    """All rounds are of one shape: no row's text hangs on the others, in bfloat16 either."""
    learn = LearnConfig(scope="shared", stride=2) if shared and which else None
    drafter = make_kind(which) if which else "none"
    engine = load(str(toy_target_dir), drafter, device="cuda", dtype="bfloat16")
    options = {"temperature": 0.9, "ignore_eos": True, "context": 500, "learn": learn}
    config = GenerateConfig(
        max_new_tokens=24, draft=DraftConfig(adaptive=False, copy=False), **options
    )
    decoder = engine.decoder(config, 3, 400, sessions=False)
    captured, launched = decoder.prompts.captured, []
    assert captured
    launch = captured.launch

    def counted(rows, *rest, **more) -> None:
        launched.append(len(rows))
        launch(rows, *rest, **more)

    captured.launch = counted  # type: ignore[method-assign]

    def said() -> list[list[int]]:
        decoder.restart()
        scheduler, found = Scheduler(decoder, config, stream=False), dict[int, list[int]]()
        for size in [30, 7, 90, 400, 12, 130, 5, 44, 63, 64, 65, 2] * 3:
            scheduler.add_request(Request(ids=[(3 * n) % 250 for n in range(size)], seed=size))
        while scheduler.has_unfinished():
            for request, chunk in scheduler.step():
                if chunk.result:
                    found[request] = chunk.result.token_ids
        return [found[request] for request in sorted(found)]

    beside = said()
    assert sum(launched) > 20
    captured._may_launch = False
    assert said() == beside
