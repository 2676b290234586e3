"""Copying beside a drafter: what is copied, when, and that it never changes a text."""

import random
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from test_conformance import FEW, NOW, engine_of, small, small_drafter  # noqa: F401 - a fixture
from toys import VOCABULARY, chi_square, make_kind, plain, prefill, repack_head, toy_engine, twin

from ttspec import load
from ttspec.config import DraftConfig, GenerateConfig, LearnConfig, SamplingConfig
from ttspec.decoding.copy_costs import WIDTHS, CopyCosts
from ttspec.decoding.copying import (
    MAX_MATCH,
    MIN_MATCH,
    Copying,
    SuffixIndex,
)
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.draft_sampler import with_copies
from ttspec.decoding.engine import Engine
from ttspec.decoding.policy import FixedDraftLength
from ttspec.decoding.rows import Processors, RoundPlan, RoundShape, RowStates
from ttspec.decoding.stages import DecoderSpec, round_widths
from ttspec.decoding.timing import NO_STAGES, RoundTime
from ttspec.drafters.ngram import Ngram
from ttspec.models.capture import Graphs
from ttspec.records import LONGEST_COPY, Proposal

# What is copied.


def expected(ids: list[int], followed: int) -> tuple[int, int]:
    """Place and match by their definition: the place followed so far, or else the newest one."""

    def match(place: int) -> int:
        n = 0
        while n < min(place, MAX_MATCH) and ids[place - n - 1] == ids[-n - 1]:
            n += 1
        return n

    if followed and ids[followed] == ids[-1]:
        return followed + 1, match(followed + 1)
    end = ids[-MIN_MATCH:]
    places = [p for p in range(MIN_MATCH, len(ids)) if ids[p - MIN_MATCH : p] == end]
    return (places[-1], match(places[-1])) if places else (0, 0)


@pytest.mark.parametrize("vocabulary", [2, 3, 8])
def test_it_follows_a_place_while_it_is_right_and_else_takes_the_newest(vocabulary: int) -> None:
    rng = random.Random(vocabulary)
    for _ in range(60):
        index, ids, place = SuffixIndex(), [], 0
        for _ in range(80):
            ids.append(rng.randrange(vocabulary))
            index.extend(ids[-1:], count=True)
            # What was followed may have been longer than the match is counted.
            place, match = expected(ids, place)
            assert (index._place, index._match) == (place, match)
            if rng.random() < 0.1:
                keep = rng.randrange(len(ids) + 1)
                del ids[keep:]
                index.crop(keep)
                fresh = SuffixIndex()
                fresh.extend(ids, count=False)
                assert index._newest == fresh._newest
                assert index._older == fresh._older
                place = index._place


def test_a_copy_is_what_followed_and_goes_round_in_a_loop() -> None:
    index = SuffixIndex()
    index.extend([7, 1, 2, 3, 4, 5, 9, 1, 2], count=False)
    assert index.copy(3).tokens == [3, 4, 5]
    assert 0.5 < index.copy(3).expected < 3
    loop = SuffixIndex()
    loop.extend([1, 2, 3] * 40, count=True)
    assert loop.copy(LONGEST_COPY).tokens == ([1, 2, 3] * 11)[:LONGEST_COPY]
    assert loop.copy(LONGEST_COPY).expected > 0.8 * LONGEST_COPY
    assert SuffixIndex().copy(5) == ([], [])


def test_copies_that_were_wrong_lately_promise_less() -> None:
    """The same two tokens, with another one behind them each time."""
    index = SuffixIndex()
    index.extend([t for i in range(100) for t in (1, 2, 10 + i)], count=True)
    index.extend([1, 2], count=True)
    assert index.copy(LONGEST_COPY).expected < 0.2


def test_a_row_copies_where_that_promises_more_than_its_drafter() -> None:
    copying = Copying(2, 8)
    loop, new = [1, 2, 3] * 12, list(range(20))
    assert list(copying.choose([0, 1], [loop, new], drafts=True)) == [0]
    text = list(loop)
    for _ in range(200):  # a drafter that gets all of a longer block right
        text.append(loop[len(text) % 3])
        copying.commit(0, text[-1:], accepted=15)
    assert copying.choose([0], [text], drafts=True) == {}
    assert list(copying.choose([0], [text], drafts=False)) == [0]
    copying.clear(0)
    assert copying.choose([0], [new], drafts=False) == {}


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.1, 1.0])
def test_a_row_is_copied_for_as_long_as_a_round_of_all_rows_pays(slope: float) -> None:
    """On a machine where a round of 16 rows takes 1 + slope x width, as a brute force says."""

    def seconds(width: int) -> float:
        return 1 + slope * width

    costs, rows = CopyCosts(), 16
    sure, unsure = [0.97**i for i in range(1, 32)], [0.6**i for i in range(1, 5)]
    drafted = dict.fromkeys(range(rows), 0.0)
    assert costs.worthwhile({0: sure}, drafted, drafts=False) == 0, "no round without was seen"
    costs.observe(rows, False, 0, seconds(0), tokens=rows)
    for chances in ({0: sure}, {0: unsure}, dict.fromkeys(range(12), sure), {0: sure, 5: unsure}):
        for _ in range(40):  # what looks worthwhile is tried, and so measured
            width = costs.worthwhile(chances, drafted, drafts=False)
            kept = sum(sum(c[:width]) for c in chances.values())
            costs.observe(rows, False, width, seconds(width), tokens=rows + kept)
        speeds = {
            width: (rows + sum(sum(c[:width]) for c in chances.values())) / seconds(width)
            for width in (0, *WIDTHS)
        }
        chosen = costs.worthwhile(chances, drafted, drafts=False)
        assert speeds[chosen] > 0.97 * max(speeds.values()), (chosen, speeds)
        assert speeds[chosen] >= speeds[0]


def test_a_width_that_did_not_pay_is_tried_again_much_later() -> None:
    costs, chances, drafted = CopyCosts(), {0: [0.9] * 7}, dict.fromkeys(range(8), 0.0)
    costs.observe(8, False, 0, 1.0, tokens=8)
    tried = []
    for number in range(3000):
        width = costs.worthwhile(chances, drafted, drafts=False)
        slow = 6.0 if number < 2000 else 1.0  # another process has left
        tokens = 8 + 0.9 * width
        costs.observe(8, False, width, slow if width else 1.0, tokens=tokens)
        tried.append(width > 0)
    assert 1 <= sum(tried[:2000]) < 20
    assert sum(tried[2800:]) > 100


@pytest.mark.parametrize("brought", [2.2, 8.0])
def test_a_copy_pays_for_the_rounds_that_wait_for_the_host(brought: float) -> None:
    """Seen on a GPU, 4 rows: a round of 0.84 ms took 1.5 with a copy, and the next one 1.25."""
    costs, chances = CopyCosts(), {0: [brought / 7] * 7}
    accepted, worth, chained = dict.fromkeys(range(4), 0.0), list[int](), True
    for number in range(600):
        most = costs.worthwhile(chances, accepted, drafts=False) if number % 8 == 7 else 0
        worth += [most] * (number % 8 == 7)
        seconds = 1.5 if most else (0.84 if chained else 1.25)
        tokens, after = 4 + most * brought / 7, chained and not most
        costs.observe(4, False, most, seconds, tokens=tokens, chained=after)
        chained = not most  # not the round after a copy
    tried = sum(map(bool, worth)) / len(worth)
    assert tried > 0.9 if brought > 7 else tried < 0.15


@pytest.mark.parametrize("slow", [3.6, 1.4])
def test_copies_that_do_not_pay_cost_little(slow: float) -> None:
    """Seen on a GPU, 32 rows: a round with a copy took 3.6 times as long and brought 1.5 times the
    tokens; tried five times in 512 rounds, one of each width, that cost 2 % of the speed."""
    rng, costs, rows = random.Random(0), CopyCosts(), 32
    accepted, took, tokens = dict.fromkeys(range(rows), 0.0), 0.0, 0.0
    for _ in range(20_000):
        found = rng.random() < 0.2
        copies = {0: [0.9] * rng.choice(WIDTHS), 1: [0.9] * 9} if found else {}
        width = costs.worthwhile(copies, accepted, drafts=False)
        now = rows * 1.5 if width else rows
        costs.observe(rows, False, width, slow if width else 1.0, tokens=now, chained=not width)
        took, tokens = took + (slow if width else 1.0), tokens + now / rows
    assert tokens / took > (0.993 if slow > 2 else 1.0)


@pytest.mark.parametrize("right", [0.15, 0.9])
def test_many_short_answers_learn_what_copies_are_worth(right: float) -> None:
    """A round with copies takes 2.4 times as long; no answer is long enough to find it out."""
    rng, rows, costs = random.Random(0), 8, CopyCosts()
    copying = Copying(rows, 7, costs=costs, widths=(7,))
    texts = [[rng.randrange(5) for _ in range(30)] for _ in range(rows)]
    spent = tokens = late = 0.0
    for number in range(3000):
        copies = copying.choose(range(rows), texts, drafts=False)
        took, emitted = 2.4 if copies else 1.0, 0
        for row, text in enumerate(texts):
            copied = copies.get(row, [])
            kept = next((i for i, _ in enumerate(copied) if rng.random() > right), len(copied))
            new = [*copied[:kept], rng.randrange(5)]
            text += new
            copying.commit(row, new, None)
            emitted += len(new)
            if rng.random() < 0.02:
                copying.clear(row)
                texts[row] = [rng.randrange(5) for _ in range(30)]
        costs.observe(rows, False, copying.length(copies), took, tokens=emitted)
        if number >= 1000:
            spent, tokens, late = spent + took, tokens + emitted, late + bool(copies)
    assert tokens / rows / spent > 0.985  # plain decoding has 1; 0.975 by what copies promise
    assert late > 300 if right > 0.5 else late < 200


@pytest.mark.parametrize("kept", [0, 7])
def test_rows_whose_copies_were_wrong_copy_again_some_day(kept: int) -> None:
    """Beside a drafter that is often right nothing else would ever show that they are right now."""
    costs = CopyCosts()
    costs.observe(2, True, 0, 1.0, tokens=8)
    copying, text = Copying(2, 7, costs=costs, widths=(7,)), [list(range(20)) * 2] * 2
    for index in copying._rows:
        index._rates = [0.95] * len(index._rates)
    copying._accepted, copying._all_kept = [3.0, 3.0], 20.0
    rounds = [0, 0]
    for number in range(20_000):
        copies = copying.choose([0, 1], text, drafts=True)
        rounds[number >= 2000] += bool(copies)
        for row, copied in copies.items():
            copying._stale = True  # the texts stay as they are
            copying.commit(row, [*copied[:kept], 0], None)
    assert rounds[1] > 17_900 if kept else 20 < rounds[1] < 200


def test_beside_a_drafter_a_copy_must_bring_more_than_the_drafts_that_it_replaces() -> None:
    costs = CopyCosts()
    for width in (0, 1, 3, 7):
        costs.observe(4, True, width, 1.0, tokens=8)
    chances = {0: [0.9, 0.8, 0.7]}
    assert costs.worthwhile(chances, dict.fromkeys(range(4), 3.0), drafts=True) == 0
    assert costs.worthwhile(chances, dict.fromkeys(range(4), 1.0), drafts=True) == 3


def test_rows_of_a_batch_copy_less_where_wide_rounds_are_slow(target) -> None:
    """Copies take a round sixty times as long: the rows stop, and their text is the same."""
    options = {"max_new_tokens": 96, "ignore_eos": True, "temperature": 0.0, "seed": 1}
    options |= {"draft": DraftConfig(adaptive=True)}
    prompts = [[1, 2, 3] * 6, list(range(3, 17)), [5, 6] * 7, [9, 4, 4, 9, 4, 4, 9]]

    def run(factor: float) -> tuple[list[list[int]], int]:
        engine = Engine(target, Ngram())
        real = CopyCosts.observe

        def observe(costs, rows, drafts, width, seconds, *, tokens, **_) -> None:
            real(costs, rows, drafts, width, factor if width else 1.0, tokens=tokens)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CopyCosts, "observe", observe)
            results = engine.generate(prompts, **options)
        return [r.token_ids for r in results], sum(r.stats.copied_rounds for r in results)

    (free, often), (dear, seldom) = run(1.0), run(60.0)
    without = plain(Engine(target, None), prompts[0], **options).token_ids
    assert free == dear
    assert free[0] == without
    assert seldom < 0.25 * often


def test_rounds_are_as_wide_as_the_longest_copy_or_as_one_of_some_widths() -> None:
    copies = {0: [0] * 9, 1: [0] * 4}
    assert Copying(2, 31).length(copies) == 9
    assert Copying(2, 31, widths=(7, 31)).length(copies) == 31
    assert Copying(2, 31, widths=(7, 31)).length({1: copies[1]}) == 7
    text = [7, 1, 2, 3, 4, 5, 9, 8, 6, 0, 11, 12, 13, 1, 2]
    (short,) = Copying(1, 9).choose([0], [text], drafts=False).values()
    (full,) = Copying(1, 9, widths=(9,)).choose([0], [text], drafts=False).values()
    (cut,) = Copying(1, 9, widths=(4, 9)).choose([0], [text], drafts=False).values()
    assert full == text[3:12]
    assert cut == text[3:7], "what follows two tokens is seldom long"
    assert short == full[: len(short)]
    assert len(short) < len(full)
    assert Copying(2, 31).length({}) == Copying(2, 31, widths=(7, 31)).length({}) == 0


def test_widths_of_rounds() -> None:
    drafter = make_kind("dflash")
    length = drafter.length
    assert round_widths(None, DraftConfig(), batch_invariant=False) == (0, 0, 1)
    assert round_widths(drafter, DraftConfig(length=0), batch_invariant=False) == (0, 0, 1)
    assert round_widths(drafter, DraftConfig(), batch_invariant=False) == (length, 31, 32)
    assert round_widths(drafter, DraftConfig(copy=False), batch_invariant=False)[1:] == (
        0,
        length + 1,
    )
    assert round_widths(drafter, DraftConfig(), batch_invariant=True) == (length, 15, 16)
    assert round_widths(Ngram(), DraftConfig(length=5), batch_invariant=False) == (0, 5, 6)


# The text is the target's.

PROMPTS = [
    "abcabcabc",
    "a",
    "hello there",
    "count to ten, please, and count to ten again, please",
    "the cat and the dog and the cat and the",
    "x = 1\nx = 1\nx = ",
    "zz",
    "one two three one two four",
    "la la la la",
    "to be or not to be",
    "((()))((()",
    "0123456789012345",
    "def f(x):\n    return f(x",
    "never say never say",
    "q",
    "what what in the what what",
]


@pytest.fixture(scope="module")
def target(toy_target_dir):
    """A target that says six letters and little else: what it writes has stood there before."""
    target = toy_engine(toy_target_dir).target
    with torch.no_grad():
        head = target.head
        letters = target.tokenizer.encode("etaoin", add_special_tokens=False)
        few = head[letters].clone()
        head.mul_(0.02)
        head[letters] = 6 * few
    repack_head(target)
    return target


@pytest.mark.parametrize(
    ("which", "temperature"),
    [("dflash", 0.0), ("eagle3", 0.0), ("pard", 0.0), ("eagle3", 0.7), ("ngram", 0.7)],
)
def test_sixteen_prompts_are_answered_as_plainly(target, which: str, temperature: float) -> None:
    options = {"max_new_tokens": 28, "seed": 3, "ignore_eos": True, "temperature": temperature}
    wanted = Engine(twin(target), None).generate(PROMPTS, learn=None, **options)
    engine = engine_of(target, which)
    hindsight = replace(NOW, supervision="hindsight")
    ways = {"dflash": (None, NOW, hindsight), "ngram": (None,)}  # what never learns, once
    for learn in ways.get(which, (NOW, hindsight)):
        found = engine.generate(PROMPTS, learn=learn, **options)
        assert [r.token_ids for r in found] == [r.token_ids for r in wanted]
        copied = sum(r.stats.copied_tokens for r in found)
        rounds = sum(r.stats.copied_rounds for r in found)
        assert copied > 20
        assert 0 < rounds < sum(r.stats.rounds for r in found)
        if learn and which != "ngram":
            assert sum(r.stats.updates for r in found) > 16


class WrongCopies(Decoder):
    """Copies tokens that the target never says there."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        copying = self.planner.copying
        assert copying is not None
        choose = copying.choose
        self.planted = 0

        def planted(active, tokens, *, drafts):
            chosen = choose(active, tokens, drafts=drafts)
            self.planted += len(chosen)
            return {row: [(t + 1) % VOCABULARY for t in copy] for row, copy in chosen.items()}

        copying.choose = planted  # type: ignore[method-assign]


@pytest.mark.parametrize("which", ["dflash", "eagle3", "ngram"])
def test_planted_wrong_copies_are_rejected(target, which: str) -> None:
    options = {"max_new_tokens": 28, "seed": 3, "ignore_eos": True, "temperature": 0.0}
    wanted = Engine(twin(target), None).generate(PROMPTS, learn=None, **options)
    engine, made = engine_of(target, which), []
    engine.make_decoder = lambda *args, **kw: made.append(WrongCopies(*args, **kw)) or made[-1]
    found = engine.generate(PROMPTS, learn=None, **options)
    assert [r.token_ids for r in found] == [r.token_ids for r in wanted]
    assert made[0].planted > 10


def test_rows_choose_for_themselves(target) -> None:
    """Rounds in which some rows copy and others draft, of drafts shorter than the copies."""
    decoder = decoder_of(target, "eagle3", rows=3)
    shapes, propose = [], decoder.propose

    def watched(shape):
        shapes.append((shape.draft_length, shape.copy_length))
        return propose(shape)

    decoder.propose = watched  # type: ignore[method-assign]
    while any(decoder.rows.budget):
        decoder.round()
    both = [s for s in shapes if all(s)]
    assert any(copied > drafted for drafted, copied in both)
    assert any(drafted and not copied for drafted, copied in shapes)


def decoder_of(target, which: str, rows: int, **options) -> Decoder:
    engine = engine_of(target, which)
    config = GenerateConfig(
        max_new_tokens=60, temperature=0.0, learn=None, ignore_eos=True, **options
    )
    decoder = engine.decoder(config, rows, 60, sessions=False)
    prompts = [engine.tokenizer.encode(text) for text in ("abcabcabcabcabcabc", "q", "hello")]
    prefill(decoder, list(range(rows)), prompts[:rows], list(range(rows)), [60] * rows)
    return decoder


@pytest.mark.parametrize(
    "which",
    [
        *("dflash", "eagle3", "pard", "pard2", "causal", "dspark", "dflash2"),
        *(
            pytest.param(which, marks=pytest.mark.slow)
            for which in ("jetspec", "domino", "peagle", "mtp", "mtp-gated")
        ),
    ],
)
def test_drafts_after_copies_are_those_of_who_never_copied(target, which: str) -> None:
    """A drafter whose rows copied has read what they copied when it drafts again."""
    options = {"max_new_tokens": 60, "temperature": 0.0, "ignore_eos": True, "learn": None}
    engine, made = engine_of(target, which), {}
    propose = engine.drafter.propose

    def watched(state, pending, start, *rest):
        proposal = propose(state, pending, start, *rest)
        made[int(start[0])] = proposal.tokens[0].tolist()
        return proposal

    engine.drafter.propose = watched
    result = engine.generate("abcabcab", **options)[0]
    copied = [r.copied for r in result.rounds]
    assert any(a and not b for a, b in pairwise(copied)), "no draft comes after a copy"
    ids, drafts = result.prompt_ids + result.token_ids, dict(made)
    assert len(drafts) > 4
    for start, tokens in list(drafts.items())[-3:]:
        made.clear()
        engine.generate([ids[:start]], draft=DraftConfig(copy=False), **options)
        budget = len(result.token_ids) - (start - len(result.prompt_ids)) - 1
        assert made[start][:budget] == tokens[:budget], start


def test_a_session_copies_from_its_earlier_turns_and_not_past_a_stop(target) -> None:
    options = {"temperature": 0.0, "max_new_tokens": 30, "ignore_eos": True, "raw": True}
    engines = engine_of(target, "ngram"), Engine(twin(target), None)
    text = plain(engines[0], "tattoo", **options).text
    stop = next(text[i : i + 3] for i in range(12, 27) if text.find(text[i : i + 3]) == i)
    said = []
    for engine in engines:
        session = engine.session(context=400, stop=(stop,), **options)
        said.append([session.send(t).text for t in ("tattoo", "to to", "eat")])
    assert said[0] == said[1]
    assert said[0][0] == text[: text.index(stop)]


def test_an_adaptive_policy_goes_on_beside_copies(target) -> None:
    """Its plain rounds are plain, and a round with copies says nothing of the drafter's costs."""
    options = {"max_new_tokens": 120, "temperature": 0.0, "ignore_eos": True, "learn": None}
    engine = engine_of(target, "eagle3")
    wanted = Engine(twin(target), None).generate(PROMPTS[0], **options)[0]
    found = engine.generate(PROMPTS[0], draft=DraftConfig(adaptive=True), **options)[0]
    assert found.token_ids == wanted.token_ids
    assert found.stats.copied_rounds > 3
    assert all(r.length is None for r in found.rounds if r.copied)
    assert found.stats.plain_rounds == sum(r.length == 0 for r in found.rounds) > 0
    assert all(r.proposed == 0 for r in found.rounds if r.length == 0)


@pytest.mark.parametrize("which", ["dflash", "eagle3"])
def test_deterministic_rounds_have_one_width(target, which: str) -> None:
    engine = engine_of(target, which)
    config = {"max_new_tokens": 60, "temperature": 0.0, "ignore_eos": True, "deterministic": True}
    runs = [engine.generate("abcabcabc", **config)[0] for _ in range(2)]
    rounds = [[(r.copied, r.proposed, r.accepted) for r in run.rounds] for run in runs]
    assert rounds[0] == rounds[1]
    assert max(r.proposed for r in runs[0].rounds) <= 15


# Both rules of acceptance.


def test_a_copy_is_one_hot_and_leaves_other_rows_their_q() -> None:
    rows = decoder_rows(copied=[2, 0, 3])
    q = torch.rand(3, 2, 5).softmax(-1)
    drafts = Proposal(tokens=torch.tensor([[1, 2], [3, 4], [0, 1]]), count=torch.tensor([2, 1, 2]))
    most = torch.tensor([9, 9, 2])
    made = with_copies(replace(drafts, q=q), rows, 3, most)
    assert made.tokens.tolist() == [[4, 3, 0], [3, 4, 0], [1, 2, 3]]
    assert made.count.tolist() == [2, 1, 2]
    assert made.q is not None
    assert torch.equal(made.q[1, :2], q[1])
    for row in (0, 2):
        hot = torch.nn.functional.one_hot(made.tokens[row], 5).float()
        assert torch.equal(made.q[row], hot)
    none = Proposal(tokens=torch.empty(3, 0, dtype=torch.long), count=torch.zeros(3).long())
    alone = with_copies(none, rows, 3, most)
    assert alone.q is None
    assert alone.count.tolist() == [2, 0, 2]


def decoder_rows(copied: list[int]):
    rows = RowStates(len(copied), 20, torch.device("cpu"), copies=4)
    tokens = {0: [4, 3], 1: [], 2: [1, 2, 3]}
    rows.upload(0, {row: tokens[row] for row, n in enumerate(copied) if n})
    return rows.inputs


@pytest.mark.parametrize("acceptance", ["rejection", "invariant"])
@pytest.mark.parametrize("which", ["eagle3", "ngram"])
def test_sampled_texts_with_copies_follow_the_targets_law(
    small,  # noqa: F811
    which: str,
    acceptance: str,
) -> None:
    """Texts of three tokens in many rows, some of which copy: against the target's own softmax."""
    rows, prompt = (
        2000,
        [0, 0, 1, 0, 2, 0, 3, 0, 4, 1, 1, 2, 1, 3, 1, 4, 2, 2, 3, 2, 4, 3, 3, 4, 4, 0],
    )
    assert len(set(pairwise(prompt))) == FEW * FEW  # whatever comes next has stood there
    drafter = Ngram() if which == "ngram" else small_drafter(which)
    engine = Engine(twin(small.target), drafter)
    target, drafter = engine.target, engine.drafter
    spec = DecoderSpec(
        rows=rows,
        slots=40,
        sampling=SamplingConfig(temperature=1.0, acceptance=acceptance),
        draft=DraftConfig(),
        learn=LearnConfig(stride=1, lr=0.05) if which != "ngram" else None,
    )
    decoder = Decoder(target, drafter, spec)
    prefill(decoder, list(range(rows)), [prompt] * rows, list(range(rows)), [3] * rows)
    copied = 0
    while any(decoder.rows.budget):
        copied += sum(outcome.copied for outcome in decoder.round().values())
    assert copied > rows / 4
    texts = torch.tensor([decoder.rows.tokens[row][len(prompt) :] for row in range(rows)])
    law = torch.zeros(FEW, FEW, FEW)
    for a in range(FEW):
        for b in range(FEW):
            ids = torch.tensor([[*prompt, a, b]])
            logits = target.model(ids).logits[0, -3:].float().softmax(-1)
            law[a, b] = logits[0, a] * logits[1, b] * logits[2]
    counts = torch.bincount(texts @ torch.tensor([FEW * FEW, FEW, 1]), minlength=FEW**3)
    assert chi_square(counts, law.flatten()) > 1e-3


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("which", ["dflash", "eagle3", "pard", "ngram"])
def test_nothing_is_captured_within_an_answer(toy_target_dir, which: str, rows: int) -> None:
    """Whatever rounds come: drafts, copies, both, updates with comparisons and without."""
    drafter = Ngram() if which == "ngram" else make_kind(which)
    engine = load(str(toy_target_dir), drafter, device="cuda", dtype="bfloat16")
    assert engine.target.reads_spans
    captured: list[int] = []

    class Counting(Decoder):
        def capture(self) -> None:
            super().capture()
            captured.append(Graphs.captured)

    engine.make_decoder = Counting
    # Rows' own full weights of a draft model read masks, whose graphs are captured when met.
    weights = "lora" if which == "pard" and rows > 1 else "auto"
    learn = None if which == "ngram" else LearnConfig(stride=2, blocks=4, weights=weights)
    draft = DraftConfig(adaptive=True)
    options = {"max_new_tokens": 400, "ignore_eos": True, "temperature": 0.0, "draft": draft}
    found = engine.generate(PROMPTS[:rows], learn=learn, **options)
    assert len(captured) == 1
    assert captured[0] == Graphs.captured > 0
    assert sum(r.stats.copied_rounds for r in found) > 0


def copied_rounds(brought: int, *, chains: bool, rounds: int = 6000) -> tuple[float, float]:
    """Of 8 rows, where a look takes a tenth of a plain round; copies bring so many tokens.

    Returns:
        Tokens a second over those without looks, and the share of rounds that looked.
    """
    costs, rng = CopyCosts(), random.Random(0)
    tokens, seconds, plain, looked = 0, 0.0, 0.0, 0
    for _ in range(rounds):
        looks = costs.search.is_on
        copies = looks and rng.random() < 0.12
        held_up = rng.uniform(0.95, 1.05) * (20 if rng.random() < 0.002 else 1)
        took = (1 + 0.1 * looks + 0.6 * copies) * held_up
        emitted, chained = 8 + brought * copies, chains and not copies
        costs.observe(8, False, 7 * copies, took, tokens=emitted, chained=chained)
        tokens, seconds, plain = tokens + emitted, seconds + took, plain + held_up
        looked += looks
    return tokens / seconds * plain / (8 * rounds), looked / rounds


@pytest.mark.parametrize(("brought", "pays"), [(3, False), (30, True)])
def test_several_rows_look_for_copies_where_that_pays(brought: float, pays: bool) -> None:
    """Seen on a GPU: with copies that were worth their rounds plain decoding ran at 0.95."""
    speed, looked = copied_rounds(brought, chains=True)
    assert looked > 0.8 if pays else looked < 0.2
    assert speed > (1.1 if pays else 0.98)
    assert copied_rounds(brought, chains=False, rounds=500)[1] == 1.0


def test_a_round_in_which_all_rows_copy_counts_for_a_drafter_that_drafts_else(target) -> None:
    config = GenerateConfig(learn=None, draft=DraftConfig(adaptive=False))
    planner = engine_of(target, "ngram").decoder(config, 2, 9, sessions=False).planner
    planner.policy, planner.copy_costs = FixedDraftLength(7), (costs := CopyCosts())
    kinds = list[tuple[int, bool]]()
    costs.search.observe = lambda rows, drafts, *_: kinds.append((rows, drafts))  # type: ignore[method-assign]
    for draft_length, copy_length in ((7, 0), (0, 7), (0, 0)):
        shape = RoundShape(0, draft_length, copy_length, Processors(), absorbs=True)
        outcome = SimpleNamespace(tokens=[1, 2], copied=copy_length > 0, updated=False, accepted=1)
        plan, time = RoundPlan([0], shape, 8, {}), RoundTime(1.0, NO_STAGES, captured=False)
        planner.observe(plan, time, {0: outcome}, 1, chained=True)  # type: ignore[dict-item]
    assert kinds == [(1, True), (1, True), (1, False)]


def test_what_was_not_looked_at_is_caught_up_with() -> None:
    costs = CopyCosts()
    costs.observe(2, False, 0, 1.0, tokens=2)
    copying, tokens = Copying(2, 8, costs=costs), [[1, 2, 3], [4, 5, 6]]
    costs.search.is_on = False
    for new in range(10, 40):
        assert not copying.expects([0, 1], tokens, drafts=False)
        assert not copying.expects([0], [[7, 8] * 9], drafts=False)
        for row in (0, 1):
            tokens[row].append(100 * row + new)
            copying.commit(row, tokens[row][-1:], None)
    for row in (0, 1):
        tokens[row] += tokens[row][-6:] * 3
    costs.search.is_on = True
    assert copying.choose([0, 1], tokens, drafts=False)[1][:3] == tokens[1][-6:-3]
    assert copying._rows[0]._tokens == tokens[0]
