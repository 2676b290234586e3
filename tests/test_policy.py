"""Never slower than plain decoding: the account on a simulated clock, and its switches for real."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, takewhile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import ALL, NOW, engine_of
from toys import G, fake_round, parrot, plain, take, toy_engine, twin

from ttspec.bench.arms import parse_arms
from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.deferred import DeferredContext
from ttspec.decoding.engine import Engine
from ttspec.decoding.planner import LEFT_OUT
from ttspec.decoding.policy import FIRST_PAUSE, LONGEST_PAUSE, MAX_DEFICIT, MAX_SURPLUS, DraftPolicy
from ttspec.decoding.rows import Processors, RoundPlan, RoundShape, RowOutcome
from ttspec.decoding.timing import RoundTime
from ttspec.errors import OptionError
from ttspec.learning.replay_buffer import ReplayBuffer

# A clock that is told.

Chances = Callable[[int], float]
"""By position: how likely a draft is right, if those before it were."""


def steady(chance: float) -> Chances:
    return lambda position: chance


def decode(
    tokens: int,
    costs: Sequence[float],
    chance: Chances,
    *,
    policy: DraftPolicy | None,
    seed: int = 0,
    noise: float = 0.0,
) -> tuple[float, list[int]]:
    """Seconds of an answer and its rounds' lengths; costs[n] is that of n drafts, costs[0] 1.

    Without a policy all rounds have as many drafts as there are costs for. Which positions are
    drafted right is the same for all lengths and with every policy.
    """
    rng, drawn = random.Random(seed), random.Random(seed)
    right = [drawn.random() for _ in range(tokens + len(costs))]
    spent, position, lengths = 0.0, 0, []
    while position < tokens:
        length = policy.choose() if policy else len(costs) - 1
        kept = 0
        while kept < length and right[position + kept] < chance(position):
            kept += 1
        emitted = min(kept + 1, tokens - position)
        took = costs[length] * (rng.lognormvariate(0, noise) if noise else 1.0)
        if policy:
            policy.observe(length, took, emitted=emitted, accepted=[kept], context=position)
        spent, position = spent + took, position + emitted
        lengths.append(length)
    return spent, lengths


def straight(longest: int, cost: float) -> list[float]:
    """Each draft costs the same, as in a chain."""
    return [1 + (cost - 1) * n / longest for n in range(longest + 1)]


def block(longest: int, cost: float) -> list[float]:
    """All drafts cost one pass."""
    return [1.0] + [cost] * longest


LENGTHS = st.integers(1, 15)
COSTS = st.floats(0.8, 4.0)


@settings(deadline=None, max_examples=40)
@given(
    longest=LENGTHS,
    cost=COSTS,
    chain=st.booleans(),
    chances=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    stretch=st.sampled_from([10, 40, 150]),
    seed=st.integers(0, 10**6),
    noise=st.sampled_from([0.0, 0.05]),
)
def test_no_drafter_makes_decoding_slower(longest, cost, chain, chances, stretch, seed, noise):
    """Beyond the promised shares, a round or two of whatever they cost: that is how one learns."""
    costs = (straight if chain else block)(longest, cost)

    def chance(position: int) -> float:
        return chances[position // stretch % len(chances)]

    for tokens, most in ((200, 1.05), (1000, 1.03), (2000, 1.03)):
        took, _ = decode(tokens, costs, chance, policy=DraftPolicy(longest), seed=seed, noise=noise)
        doubt = noise / 4 if tokens > 200 else noise  # few rounds say less of a noisy clock
        assert took <= most * tokens * (1 + doubt) + cost, tokens


@pytest.mark.parametrize("costs", [straight(5, 3.0), block(7, 1.5), block(12, 1.3)], ids=len)
def test_a_hopeless_drafter_costs_little(costs) -> None:
    for tokens, least in ((200, 0.95), (1000, 0.97), (4000, 0.98)):
        took, _ = decode(tokens, costs, steady(0.02), policy=DraftPolicy(len(costs) - 1))
        assert tokens / took >= least


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(
    ("costs", "chance"),
    [(block(7, 1.4), 0.6), (block(7, 1.4), 0.8), (straight(5, 1.5), 0.7), (block(12, 1.5), 0.7)],
)
def test_a_good_drafter_loses_nearly_nothing(costs, chance, noise) -> None:
    options = {"noise": noise}
    ratios = []
    for seed in range(20):
        free, _ = decode(1000, costs, steady(chance), policy=None, seed=seed, **options)
        kept, _ = decode(
            1000, costs, steady(chance), policy=DraftPolicy(len(costs) - 1), seed=seed, **options
        )
        ratios.append(free / kept)
    assert sum(ratios) / len(ratios) >= (0.97 if noise else 0.98)


def test_a_second_request_knows_what_the_first_found_out() -> None:
    costs, policy = block(7, 1.5), DraftPolicy(7)
    decode(300, costs, steady(0.0), policy=policy)
    took = [decode(60, costs, steady(0.0), policy=policy)[0] for _ in range(10)]
    assert sum(took) <= 600 * 1.01
    assert sorted(took)[-3] == 60, "most pay nothing"
    good = DraftPolicy(7)
    decode(300, costs, steady(0.8), policy=good)
    _, lengths = decode(100, costs, steady(0.8), policy=good)
    assert lengths.count(0) <= 1


def test_a_decay_is_noticed() -> None:
    costs, policy = block(7, 1.5), DraftPolicy(7)
    decode(1000, costs, steady(0.9), policy=policy)
    took, lengths = decode(300, costs, steady(0.0), policy=policy)
    drafting = sum(n > 0 for n in lengths)
    assert drafting <= (MAX_SURPLUS + MAX_DEFICIT) / 0.45 + 4
    assert took <= 300 + MAX_SURPLUS + MAX_DEFICIT + 3


def test_pauses_double_and_end() -> None:
    policy = DraftPolicy(7)
    _, lengths = decode(6000, block(7, 1.3), steady(0.0), policy=policy)
    pauses, run = [], 0
    for length in lengths:
        if length:
            pauses += [run] if run > 3 else []
            run = 0
        else:
            run += 1
    assert pauses[0] >= FIRST_PAUSE
    assert all(b >= 1.9 * a or b >= LONGEST_PAUSE for a, b in pairwise(pauses))
    # It then drafts well: it is found out, and pauses are short again.
    _, lengths = decode(3000, block(7, 1.3), steady(0.8), policy=policy)
    assert lengths[-64:].count(0) <= 1
    _, lengths = decode(60, block(7, 1.3), steady(0.0), policy=policy)
    assert policy._pause <= FIRST_PAUSE


def test_before_a_pause_no_draft_goes_on_ahead() -> None:
    """The last plain round before it is not observed when the next one is launched."""
    policy = DraftPolicy(7)
    while True:
        length = policy.choose()
        policy.observe(length, 1.0 + length, emitted=1.0, accepted=[0])
        if not length and policy.pauses:
            return
        assert length or not policy._plain_before or policy.choose(0) == 0


def test_a_chain_that_is_too_long_is_shortened_and_a_short_one_lengthened() -> None:
    policy, costs = DraftPolicy(8), straight(8, 3.0)
    _, lengths = decode(1000, costs, steady(0.6), policy=policy)
    assert max(lengths[-50:]) < 8
    assert lengths[-20:].count(0) <= 1
    _, lengths = decode(4000, costs, steady(0.97), policy=policy)
    assert lengths[-20:].count(8) >= 19


@pytest.mark.parametrize("slow", [1.6, 2.5])
def test_a_machine_that_slows_down_is_not_the_drafter_s_fault(slow: float) -> None:
    """Whenever a plain round was measured before."""
    for tokens in range(600, 760, 16):
        policy = DraftPolicy(7)
        decode(tokens, block(7, 1.4), steady(0.6), policy=policy)
        _, lengths = decode(600, [slow * c for c in block(7, 1.4)], steady(0.6), policy=policy)
        assert lengths.count(0) <= 10, tokens


def test_a_clock_that_is_often_wrong_does_not_unsettle_rows_that_come_and_go() -> None:
    """Each tenth round takes a third longer; of many numbers of rows one plain round is known."""
    rng, policy, took, plain, rows = random.Random(0), DraftPolicy(7), 0.0, 0.0, 6

    def right(length: int) -> int:
        return sum(1 for _ in takewhile(lambda n: rng.random() < 0.35 * 0.92**n, range(length)))

    for number in range(4000):
        if rng.random() < 0.05:
            rows = rng.randrange(1, 7)
        length, chained, one = policy.choose(), rng.random() > 0.1, 0.5 + rows / 12
        waits = one * (1.0 if chained else 1.25)
        seconds = (waits + one * 0.22 * length) * rng.uniform(0.97, 1.03)
        seconds *= 4 / 3 if rng.random() < 0.1 else 1
        kept = [right(length) for _ in range(rows)]
        emitted = 1 + sum(kept) / rows
        took, plain = took + seconds, plain + emitted * waits * 31 / 30
        told = {"emitted": emitted, "accepted": kept if length else [], "chained": chained}
        policy.observe(length, seconds, context=50 + number % 200, rows=rows, **told)
    assert plain / took > 1.07


def test_rounds_of_few_rows_are_not_compared_with_those_of_many() -> None:
    """A round costs as its rows do: of one row 1, of eight rows 3, with drafts half as much more.

    Against the plain rounds of one row, drafting rounds of eight would seem three times as dear.
    """
    policy, plain = DraftPolicy(7), 0
    rng = random.Random(0)
    for position in range(600):
        rows = 8 if position // 40 % 2 else 1
        length, dear = policy.choose(), 1.0 if rows == 1 else 3.0
        plain += length == 0
        kept = [sum(1 for _ in takewhile(lambda _: rng.random() < 0.6, range(length)))] * rows
        took = dear * (1.5 if length else 1.0)
        emitted = 1 + sum(kept) / rows
        policy.observe(length, took, emitted=emitted, accepted=kept, context=position, rows=rows)
    assert plain < 60


@pytest.mark.parametrize("chance", [0.8, 0.0])
@pytest.mark.parametrize("copied", [6, 16, 64])
def test_rows_that_stop_copying_do_not_stop_the_drafter(chance: float, copied: int) -> None:
    """What a plain round beside copies takes is not known then; a trial comes all the same."""
    policy, rng, lengths = DraftPolicy(4), random.Random(0), list[int]()
    for number in range(4 * LONGEST_PAUSE):
        length = policy.choose()
        copies = length > 0 and number < copied
        kept = 0
        while kept < length and rng.random() < chance:
            kept += 1
        policy.observe(
            length, 1.0 + 0.1 * length, emitted=kept + 1, accepted=[kept], copying=copies, rows=8
        )
        lengths.append(length)
    late = lengths[400:]
    assert sum(n > 0 for n in late) > (0.9 * len(late) if chance else 0)
    assert chance or sum(n > 0 for n in late) < 0.1 * len(late)


@pytest.mark.parametrize("copied", [4, 12])
def test_rounds_in_which_all_rows_copy_are_no_plain_ones(copied: int) -> None:
    """They say nothing of what a plain one costs by now, here a third of what it did."""
    policy, rng, late = DraftPolicy(4), random.Random(0), list[int]()
    for number in range(6000):
        length, plain = policy.choose(), 3.0 if number < 1000 else 1.0
        if number % (copied + 12) < copied:
            policy.observe(0, plain, emitted=1.0, accepted=[], copying=True)
            continue
        kept = 0
        while kept < length and rng.random() < 0.3:
            kept += 1
        policy.observe(length, plain + 0.5 * length, emitted=kept + 1, accepted=[kept])
        if number > 2000:
            late.append(length)
    assert sum(n > 0 for n in late) < 0.1 * len(late)


def test_one_slow_round_stops_nobody() -> None:
    policy = DraftPolicy(7)
    decode(400, block(7, 1.4), steady(0.8), policy=policy)
    policy.observe(7, 500.0, emitted=3.0, accepted=[2], context=400)
    _, lengths = decode(100, block(7, 1.4), steady(0.8), policy=policy)
    assert lengths.count(0) <= 3


@pytest.mark.parametrize("held_up", [(100, 120, 3.0), (100, 130, 2.0), (100, 105, 4.0)])
def test_rounds_that_were_held_up_do_not_speak_against_a_length_for_ever(held_up) -> None:
    """Seen on a GPU: the best length was never drafted again, or nothing was."""
    begin, end, slower = held_up
    costs, policy, rng = {0: 1.0, 1: 1.35, 3: 1.54, 7: 1.95}, DraftPolicy(7), random.Random(0)
    spent, tokens, lengths = 0.0, 0.0, []
    for number in range(4000):
        length = policy.choose()
        kept = [
            sum(1 for _ in takewhile(lambda _: rng.random() < 0.5, range(length))) for _ in range(8)
        ]
        took = costs[length] * (slower if begin <= number < end else 1.0)
        emitted = 1 + sum(kept) / 8
        policy.observe(length, took, emitted=emitted, accepted=kept, context=100, rows=8)
        spent, tokens, lengths = spent + took, tokens + emitted, [*lengths, length]
    assert lengths[-2000:].count(3) >= 1850, "which is 1.22 times as fast as plain decoding"
    assert tokens / spent >= 1.15


@pytest.mark.parametrize(
    ("chance", "share", "read_first"), [(0.58, 0.75, 4.0), (0.2, 0.0, 4.0), (0.2, 0.0, 30.0)]
)
def test_what_a_drafter_missed_in_a_pause_does_not_stop_it_again(
    chance: float, share: float, read_first: float
) -> None:
    """Seen on a busy GPU: the first round of each try paid for all that the drafter had to read.

    So it failed at once, with the longest draft, which was all that a try ever saw. With 32 rows
    that takes up to 36 plain rounds, which tries that fail have to work off like any other loss.
    """
    costs, policy, rng = {0: 1.0, 3: 1.48, 7: 1.95}, DraftPolicy(7, halvings=1), random.Random(0)
    spent, tokens, lengths = 0.0, 0.0, []
    for number in range(12_000):
        length = policy.choose()
        kept = [
            sum(1 for _ in takewhile(lambda _: rng.random() < chance, range(length)))
            for _ in range(8)
        ]
        read = read_first if length and not any(lengths[-32:]) else 0.0
        took = (costs[length] + read) * (3.0 if length and number < 100 else 1.0)
        emitted = 1 + sum(kept) / 8
        policy.observe(length, took, emitted=emitted, accepted=kept, context=100, rows=8)
        spent, tokens, lengths = spent + took, tokens + emitted, [*lengths, length]
    assert lengths.count(3) >= share * len(lengths)
    assert tokens / spent >= (1.3 if share else 0.98)


def test_a_wait_for_the_host_is_no_time_of_the_drafts() -> None:
    """Of 32 rows one ends every few rounds: two rounds wait then, drafting or not.

    A plain round takes 1.4 ms, and 2.1 where it waits: half as much more is no excuse for drafts.
    """
    costs, rows, rng = {0: 1.4, 1: 2.1, 3: 2.8, 7: 3.9}, 32, random.Random(0)

    def serve(policy: DraftPolicy | None) -> float:
        spent, tokens, since, waiting = 0.0, 0.0, 0.0, 0
        while tokens < 6000:
            length, chained = policy.choose() if policy else 0, not waiting
            waiting = max(0, waiting - 1)
            took = costs[length] * rng.lognormvariate(0, 0.03) + (0.0 if chained else 0.7)
            right = [rng.random() for _ in range(rows)]
            kept = [sum(r < 0.45 * 0.4**n for n in range(length)) for r in right]
            emitted = 1 + sum(kept) / rows
            if policy:
                policy.observe(
                    length,
                    took,
                    emitted=emitted,
                    accepted=kept,
                    context=300,
                    rows=rows,
                    chained=chained,
                )
            spent, tokens, since = spent + took, tokens + emitted, since + emitted
            if since > 200 / rows:
                since, waiting = since - 200 / rows, 2
        return spent / tokens

    assert serve(DraftPolicy(7)) < 1.015 * serve(None)


def test_on_a_busy_machine_a_good_drafter_goes_on() -> None:
    """One round in seven is held up, drafting or not: charged whole, that stopped drafters."""

    def serve(policy: DraftPolicy | None, seed: int) -> float:
        rng, spent, tokens = random.Random(seed), 0.0, 0
        while tokens < 400:
            length = policy.choose() if policy else 0
            kept = sum(1 for _ in takewhile(lambda _: rng.random() < 0.6, range(length)))
            took = (1.3 if length else 1.0) * rng.lognormvariate(0, 0.05)
            took *= rng.uniform(2, 5) if rng.random() < 0.15 else 1.0
            if policy:
                policy.observe(length, took, emitted=kept + 1, accepted=[kept], context=100)
            spent, tokens = spent + took, tokens + kept + 1
        return spent

    plain = sum(serve(None, seed) for seed in range(40))
    drafting = sum(serve(DraftPolicy(7), seed) for seed in range(40))
    assert plain / drafting > 1.62  # 1.55 where rounds are charged four times the usual


def test_rounds_that_capture_a_graph_are_not_timed() -> None:
    policy = DraftPolicy(7)
    for _ in range(3):
        assert policy.choose() == 0
        policy.observe(0, 100.0, emitted=1.0, accepted=[0], untimed=True)
    for _ in range(2):
        policy.observe(0, 1.0, emitted=1.0, accepted=[0])
    policy.observe(policy.choose(), 100.0, emitted=1.0, accepted=[0], untimed=True)
    assert policy.choose() == 7


def test_plain_rounds_that_are_due_need_not_be_timed_where_one_was() -> None:
    policy = DraftPolicy(7)
    for _ in range(20):
        length = policy.choose()
        policy.observe(length, 1.0 + (length > 0), emitted=1.0 + length, accepted=[length])
    policy._plain_due = 1
    assert policy.choose() == 0
    policy.observe(0, 9.0, emitted=1.0, accepted=[0], untimed=True)
    assert policy.choose() > 0
    assert policy._plain_seconds == 1.0


@pytest.mark.parametrize(
    ("longest", "lengths"),
    [(1, [1]), (2, [1, 2]), (5, [1, 2, 5]), (7, [1, 3, 7]), (15, [3, 7, 15])],
)
def test_few_lengths(longest: int, lengths: list[int]) -> None:
    assert DraftPolicy(longest).lengths == lengths
    assert DraftPolicy(longest, halvings=0).lengths == [longest]


# The real loop, told to switch all the time.


class Schedule(DraftPolicy):
    """Lengths in turn, whatever rounds take."""

    def __init__(self, lengths: Sequence[int], longest: int) -> None:
        super().__init__(longest)
        self._turn = lengths
        self.told: list[int] = []
        self._next = 0

    @property
    def pauses(self) -> bool:
        return not self._next  # each plain round is one of a pause

    def choose(self, unobserved: int | None = None) -> int:
        at = len(self.told) + (unobserved is not None)
        self._next = min(self._turn[at % len(self._turn)], self.longest)
        return self._next

    def observe(self, length, seconds, **facts) -> None:
        assert seconds > 0
        self.told.append(length)


def scheduled(engine: Engine, lengths: Sequence[int]) -> Engine:
    """The same engine, whose decoders draft so many tokens a round in turn."""

    def make(*args, **options) -> Decoder:
        decoder = Decoder(*args, **options)
        decoder.planner.policy = Schedule(lengths, decoder.gamma)
        return decoder

    engine.make_decoder = make
    return engine


@pytest.fixture(scope="module")
def target(toy_target_dir):
    return toy_engine(toy_target_dir).target


PROMPTS = ["hello there", "count to ten, please", "a"]
WHOLE = DraftConfig(copy=False)
SWITCHING = [9, 9, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 1, 9, 2, 9]
KINDS = [k for k in ALL if k in ("dflash", "eagle3", "pard", "pard2", "causal")]
SAID = {"max_new_tokens": 30, "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def said(target) -> dict[float, list[list[int]]]:
    """What plain decoding says, by temperature."""
    engine = Engine(twin(target), None)
    return {
        t: [r.token_ids for r in engine.generate(PROMPTS, temperature=t, learn=None, **SAID)]
        for t in (0.0, 0.7)
    }


@pytest.mark.parametrize(
    ("which", "rows"),
    [
        *((which, "hindsight") for which in KINDS),
        ("dflash", "block"),
        ("pard", "block"),
        ("eagle3", None),
        ("causal", None),
    ],
)
def test_a_text_is_the_same_however_often_lengths_change(target, said, which: str, rows) -> None:
    learn = rows and replace(NOW, supervision=rows, blocks=4)
    for temperature, wanted in said.items():
        if not temperature and (which, rows) not in (("dflash", "hindsight"), ("eagle3", None)):
            continue  # a drafter does not see how tokens are chosen
        options = {**SAID, "temperature": temperature}
        engine = scheduled(engine_of(target, which), SWITCHING)
        found = engine.generate(PROMPTS, learn=learn, draft=WHOLE, **options)
        assert [r.token_ids for r in found] == wanted
        for result in found:
            assert result.stats.plain_rounds == sum(r.length == 0 for r in result.rounds) > 5
            assert {"0", "1", "2"} < set(result.stats.draft_lengths)
            assert not result.stats.reverts
            drafting = result.stats.rounds - result.stats.plain_rounds
            if learn:
                assert 0 < result.stats.updates <= drafting


@pytest.mark.parametrize("which", ["dflash", "eagle3", "pard"])
def test_rejection_sampling_is_as_reproducible_with_plain_rounds(target, which: str) -> None:
    options = {"max_new_tokens": 24, "seed": 5, "temperature": 0.9, "acceptance": "rejection"}
    runs = [
        scheduled(engine_of(target, which), SWITCHING).generate(PROMPTS, learn=NOW, **options)
        for _ in range(2)
    ]
    assert [r.token_ids for r in runs[0]] == [r.token_ids for r in runs[1]]


class Drafts:
    """What a drafter proposed, with the position each proposal was for."""

    def __init__(self, engine: Engine) -> None:
        self.made: dict[int, list[int]] = {}
        self.second: dict[int, list[int]] = {}
        """Of the second row, if there is one."""
        drafter = engine.drafter
        assert drafter is not None
        propose = drafter.propose

        def watched(state, pending, start, *rest):
            proposal = propose(state, pending, start, *rest)
            for row, made in enumerate((self.made, self.second)[: len(start)]):
                made[int(start[row])] = proposal.tokens[row].tolist()
            return proposal

        drafter.propose = watched  # type: ignore[method-assign]


@pytest.mark.parametrize("draft", [WHOLE, replace(WHOLE, window=9)])
@pytest.mark.parametrize("which", KINDS)
def test_drafts_after_plain_rounds_are_those_of_who_never_went_plain(
    target, which, draft, monkeypatch
) -> None:
    """And so are short drafts after long ones, which leave more unread than they read again."""
    monkeypatch.setattr("ttspec.decoding.deferred.RING", 40)
    options = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 0.0, "learn": None}
    engine = engine_of(target, which)
    drafts = Drafts(engine)
    pattern = [0] * 20 + [9, 1, 9, 0, 2]
    result = scheduled(engine, pattern).generate(PROMPTS[1], draft=draft, **options)[0]
    ids, made = result.prompt_ids + result.token_ids, drafts.made
    assert len(made) > 3
    for start, tokens in made.items():
        again = engine_of(target, which)
        fresh = Drafts(again)
        # The prefill draws the token that was pending.
        one = scheduled(again, [len(tokens)])
        one.generate([ids[:start]], draft=draft, **{**options, "max_new_tokens": len(tokens) + 2})
        budget = len(result.token_ids) - (start - len(result.prompt_ids)) - 1
        assert fresh.made[start][:budget] == tokens[:budget], start


@pytest.mark.parametrize(("which", "waits"), [("dflash", 0), ("eagle3", 0), ("causal", 1)])
def test_drafts_follow_a_plain_round_at_once(target, which, waits) -> None:
    """But for who reads again, with them, what it drafted last."""
    decoder = engine_of(target, which).decoder(
        GenerateConfig(draft=WHOLE, learn=None), 1, 64, sessions=False
    )
    plain, short = RoundShape(64, 0, 0, Processors()), RoundShape(64, 1, 0, Processors())
    decoder.deferred.after_round({0: 2}, short)
    assert decoder.deferred.needs_nothing(plain, short) == (not waits)


@pytest.mark.parametrize("which", ["dflash", "eagle3", "eagle3-layers", "pard2", "mtp"])
def test_what_was_kept_may_be_read_in_pieces_of_one_size(target, which, monkeypatch) -> None:
    """As graphs read it: a row that has less than others is read past its end."""

    class InPieces(DeferredContext):
        def __init__(self, drafter, state, rows, graphs) -> None:
            super().__init__(drafter, state, rows, graphs)
            self._graphs = Called()

    class Called:
        on = True

        def __call__(self, work, *key, **options):
            widths.append(key)
            return work(*key)

    options = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 0.0, "learn": None}
    prompts, found, widths = ["hello there, you", "a"], [], []
    for piece in (None, 7):
        if piece:
            monkeypatch.setattr("ttspec.decoding.deferred.PIECE", piece)
            monkeypatch.setattr("ttspec.decoding.stages.DeferredContext", InPieces)
        engine = engine_of(target, which)
        drafts = Drafts(engine)
        pattern = [0] * 20 + [9, 1, 9, 0, 2]
        scheduled(engine, pattern).generate(prompts, draft=WHOLE, **options)
        found.append((drafts.made, drafts.second))
    assert found[0] == found[1]
    assert widths.count((7,)) >= 3


@pytest.mark.parametrize("which", ["dflash", "eagle3", "causal"])
def test_rows_that_copied_unlike_many_tokens_in_a_pause_are_read_as_any(target, which) -> None:
    options = {"max_new_tokens": 60, "ignore_eos": True, "temperature": 0.0, "learn": None}
    found = []
    for pattern in ([0] * 6 + [9, 9, 0, 9], [9]):
        engine = engine_of(target, which)
        drafts = Drafts(engine)
        draft = replace(WHOLE, copy=len(pattern) > 1)
        results = scheduled(engine, pattern).generate(["abab" * 9, "count"], draft=draft, **options)
        copied = [sum(r.copied for r in result.rounds) for result in results]
        assert copied[0] != copied[1] or not draft.copy
        found.append([drafts.made, drafts.second])
    for paused, never in zip(*found, strict=True):
        both = paused.keys() & never.keys()
        assert len(both) > 2
        for start in both:
            known = min(len(paused[start]), len(never[start]))
            assert paused[start][:known] == never[start][:known], start


@pytest.mark.parametrize("which", ["dflash", "eagle3", "pard", "pard2", "causal"])
def test_turns_of_a_session_after_plain_rounds(target, which: str) -> None:
    """The first turn ends unread: the next one's drafts must know it all the same."""
    options = {"max_new_tokens": 24, "context": 400, "temperature": 0.0, "ignore_eos": True}
    engines = [engine_of(target, which) for _ in range(2)]
    drafts = [Drafts(engine) for engine in engines]
    texts = []
    for engine, lengths in zip(engines, ([0] * 23 + [9] * 60, [9]), strict=True):
        session = scheduled(engine, lengths).session(learn=None, draft=WHOLE, **options)
        texts.append([session.send(text).token_ids for text in ("hello there", "and then?")])
    assert texts[0] == texts[1]
    second = {n: d for n, d in drafts[0].made.items() if n in drafts[1].made}
    assert second
    assert all(drafts[1].made[n] == d for n, d in second.items())


@pytest.mark.parametrize("which", ["pard", "eagle3"])
def test_rows_at_rest_are_left_alone_when_others_catch_up(target, which: str) -> None:
    """A row that ended, and one that begins late, beside rows that were plain for long."""
    engine = scheduled(engine_of(target, which), [0] * 12 + [9] * 4)
    prompts = [[p] for p in ("a", "the quick brown fox jumps over the dog", "hello", "one more")]
    options = {"temperature": 0.0, "ignore_eos": True, "learn": None}
    found = {}
    for index, chunk in engine.run(prompts, rows=2, max_new_tokens=30, **options):
        found[index] = chunk.result or found.get(index)
    for index, result in found.items():
        alone = plain(engine_of(target, "pard"), prompts[index][0], max_new_tokens=30, **options)
        assert result.token_ids == alone.token_ids


# The real policy in the real loop.


def on(engine: Engine, **options):
    options = {"temperature": 0.0, "learn": None, "ignore_eos": True, "seed": 1, **options}
    draft = DraftConfig(adaptive=True, copy=False)
    return engine.generate("hello there", draft=draft, **options)[0]


def ticking(engine: Engine, costs: Sequence[float], monkeypatch) -> Engine:
    """The engine with a clock on which a round takes costs[its length]."""

    class Told(DraftPolicy):
        def observe(self, length, seconds, **facts) -> None:
            super().observe(length, costs[min(length, len(costs) - 1)], **facts)

    monkeypatch.setattr("ttspec.decoding.planner.DraftPolicy", Told)
    return engine


def test_a_drafter_that_knows_the_text_drafts_and_one_that_errs_rests(engine, monkeypatch) -> None:
    said = plain(engine, "hello there", max_new_tokens=200, temperature=0.0, ignore_eos=True)
    costs = [1.0] + [1.4] * 5
    good = on(ticking(parrot(engine, said), costs, monkeypatch), max_new_tokens=200)
    assert good.token_ids == said.token_ids
    assert good.stats.plain_rounds <= 3
    bad = on(ticking(parrot(engine, said, wrong=1), costs, monkeypatch), max_new_tokens=200)
    assert bad.token_ids == said.token_ids
    assert bad.stats.plain_rounds > 180
    assert sum(bad.stats.draft_lengths.values()) == bad.stats.rounds


def test_what_was_found_out_lasts_for_requests_of_other_sizes(engine, monkeypatch) -> None:
    said = plain(engine, "hello there", max_new_tokens=300, temperature=0.0, ignore_eos=True)
    bad = ticking(parrot(engine, said, wrong=1), [1.0] + [1.4] * 5, monkeypatch)
    assert on(bad, max_new_tokens=40).stats.plain_rounds < 38
    again = on(bad, max_new_tokens=300)
    assert again.rounds[0].length == 0 == again.rounds[8].length
    assert bad.sibling()._policies == {}


def test_without_it_every_round_drafts(engine) -> None:
    draft = DraftConfig(adaptive=False)
    result = engine.generate("hello there", max_new_tokens=20, learn=None, draft=draft)[0]
    assert result.stats.draft_lengths == {}
    assert result.stats.plain_rounds == 0
    assert all(r.length is None for r in result.rounds)


def test_deterministic_leaves_no_choice_to_a_clock(engine) -> None:
    config = GenerateConfig(deterministic=True, draft=DraftConfig(adaptive=True, window=9))
    resolve_learn_config = config.resolved()
    assert resolve_learn_config.draft == DraftConfig(adaptive=True, window=9)
    assert resolve_learn_config.learn is not None
    assert resolve_learn_config.learn.publish == "stride"
    assert GenerateConfig(learn=None, deterministic=True).resolved().learn is None
    now = GenerateConfig(learn=LearnConfig(publish="now"), deterministic=True).resolved()
    assert now.learn == LearnConfig(publish="now")
    assert GenerateConfig().resolved() == GenerateConfig()
    assert on(engine, max_new_tokens=8, deterministic=True).stats.draft_lengths == {}


def test_arms_name_the_policy() -> None:
    (arm,) = parse_arms("static[adaptive=true,window=64]")
    assert arm.draft == DraftConfig(adaptive=True, window=64, copy=False, context="whole")
    assert parse_arms("learn")[0].draft == DraftConfig(adaptive=False, copy=False, context="whole")
    assert DraftConfig.__dataclass_fields__["adaptive"].default is True
    with pytest.raises(OptionError, match="true, false"):
        parse_arms("static[adaptive=yes]")


# Batches of shortened and of left out rounds.


def short(number: int, length: int):
    """Round `number` with only `length` drafts."""
    v = fake_round(number, 1)
    tokens = v.proposal.tokens[:, :length]
    return replace(
        v,
        proposal=replace(v.proposal, tokens=tokens, count=torch.tensor([length])),
        fed=v.fed[:, : length + 1],
        logits=v.logits[:, : length + 1],
        features=v.features[:, : length + 1],
        tokens=v.tokens[:, : length + 1],
    )


def test_a_short_round_s_batch_has_only_what_was_drafted() -> None:
    store = ReplayBuffer(LearnConfig(supervision="block", blocks=3), 1, G, fake_round(0, 1))
    rounds = [fake_round(0, 1), short(1, 2), fake_round(2, 1)]
    for v in rounds:
        store.absorb(v)
    batch = take(store)
    assert batch.mask[0].tolist() == [[True] * G, [True] * 2 + [False] * (G - 2), [True] * G]
    for block_of, v in zip((2, 1, 0), rounds, strict=True):
        width = v.proposal.tokens.shape[1]
        assert batch.logits[0, block_of, :width].equal(v.logits[0, :width])
        assert batch.tokens[0, block_of, : width + 1].equal(v.fed[0])


def test_what_plain_rounds_said_teaches_nobody() -> None:
    """Hindsight rows of positions that no batch recorded are masked."""
    store = ReplayBuffer(LearnConfig(supervision="hindsight", blocks=4), 1, G, fake_round(0, 1))
    for number in (0, 1, *range(4, 9)):  # rounds 2 and 3 were plain
        store.absorb(fake_round(number, 1))
    batch = store.newest()
    assert batch.start[0].tolist() == [13, 12, 9, 8]
    position = batch.start[0, :, None] + 1 + torch.arange(G)
    assert batch.mask[0].equal((position != 11) & (position != 12))


@pytest.mark.parametrize("which", ["eagle3", "pard"])
def test_a_learner_learns_from_drafting_rounds_alone(target, which: str) -> None:
    engine = scheduled(engine_of(target, which), [2, 0, 0, 9])
    options = {"max_new_tokens": 40, "temperature": 0.0, "ignore_eos": True}
    learn = LearnConfig(stride=2, lr=1e-3, blocks=4)
    result = engine.generate("hello there", learn=learn, **options)[0]
    for r in result.rounds:
        assert not (r.updates and r.length == 0)
    assert result.stats.updates > 2


def test_rounds_beside_prompts_hardly_count_but_where_there_are_no_others(target) -> None:
    decoder = engine_of(target, "pard").decoder(GenerateConfig(), 2, 40, sessions=False)
    planner, counted = decoder.planner, []

    class Told(DraftPolicy):
        def observe(self, length, seconds, *, untimed=False, **facts) -> None:
            counted.append(not untimed)

    planner.policy = Told(decoder.gamma)
    shape = RoundShape(64, 0, 0, Processors())
    outcome = RowOutcome([1], 0, 0, False, False, (0.0, 0.0, 0.0))
    for beside in [False] * 3 + [True, False, False] * 2 + [True] * 70 + [False] * 2:
        plan, time = RoundPlan([0], shape, 20, {}), RoundTime(0.01, (0.0, 0.0, 0.0), False)
        planner.observe(plan, time, {0: outcome}, 1, beside=beside)
    # The rows that were read begin in the round after that.
    assert counted[:9] == [True] * 3 + [False, False, True] * 2
    assert counted[9:] == [False] * LEFT_OUT + [True] * 6 + [True] * 2


@pytest.mark.parametrize(("chance", "least"), [(0.3, 1.0), (0.4, 1.08), (0.75, 1.5)])
def test_a_plain_round_that_was_held_up_is_not_believed_for_long(chance, least) -> None:
    """Seen on a GPU: other processes began beside a server, then were ready; the plain rounds of
    then made 7 drafts look free for 500 rounds, at two thirds of plain decoding's speed."""
    rng, policy, took, tokens, rows = random.Random(0), DraftPolicy(7), 0.0, 0.0, range(16)
    for number in range(1300):
        length = policy.choose()
        seconds = (1 + 0.22 * length) * (2.5 if number < 300 else 1) * rng.uniform(0.97, 1.05)
        right = (takewhile(lambda n: rng.random() < chance * 0.92**n, range(length)) for _ in rows)
        kept = [len(list(drafts)) for drafts in right]
        emitted = 1 + sum(kept) / len(rows)
        if number >= 300:
            took, tokens = took + seconds, tokens + emitted
        told = {"emitted": emitted, "accepted": kept if length else []}
        policy.observe(length, seconds, context=50 + number % 200, rows=16, chained=True, **told)
    assert tokens / took > least
