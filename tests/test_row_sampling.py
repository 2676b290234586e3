"""Rows that ask for different things write what each writes alone; grammars inside blocks."""

from collections.abc import Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_capture import Tapes
from test_penalties import END, KEPT, PROMPT, Counted, drafter_of, mostly
from torch import Tensor
from toys import chi_square, twin
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)

from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding import captured_prompts, planner, stages
from ttspec.decoding.conversation import Request
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.draft_sampler import DraftSampler
from ttspec.decoding.engine import Engine
from ttspec.decoding.penalties import sampling_of
from ttspec.decoding.row_sampling import RowSampling
from ttspec.decoding.scheduler import Scheduler
from ttspec.errors import OptionError
from ttspec.learning.learner import Learner
from ttspec.models import target as targets
from ttspec.models.target import Target, wrap_target
from ttspec.records import LogitMask, Proposal, Result
from ttspec.sampling import NoiseCache, SamplingTensors, position_noise, process

LEARN = LearnConfig(stride=1, lr=3e-3, publish="now", blocks=2)
HOW: dict[str, dict[str, Any]] = {
    "static": {"learn": None, "draft": DraftConfig(copy=False)},
    "copies": {"learn": None},
    "learn": {"learn": LEARN},
}
PLAIN = {"learn": None, "draft": DraftConfig(length=0)}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        made = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
        mostly(made.lm_head.weight, KEPT)
        made.lm_head.weight.mul_(0.5)
    return made


@pytest.fixture(scope="module")
def target(model) -> Target:
    return wrap_target(model, byte_tokenizer())


@pytest.fixture(scope="module")
def engine(model, target) -> Engine:
    """Its drafter is right now and then."""
    return Engine(twin(target), drafter_of("twin", model))


Asked = tuple[list[int], int, dict[str, Any], LogitMask | None]
"""Prompt, seed, options, mask."""


def run(
    engine: Engine,
    asked: Sequence[Asked],
    count: int,
    *,
    late: Sequence[int] = (),
    **how: Any,
) -> list[Result]:
    """Answers of requests in `count` rows; those of `late` come after some steps."""
    config = GenerateConfig(max_new_tokens=14, **how)
    scheduler = Scheduler(engine.decoder(config, count, 40, sessions=False), config)
    found: dict[int, Result] = {}
    place: dict[int, int] = {}

    def add(index: int) -> None:
        ids, seed, options, mask = asked[index]
        own = GenerateConfig(**{"max_new_tokens": 14, **options, **how})
        request = Request(ids=ids, seed=seed, config=own, mask=mask)
        place[scheduler.add_request(request)] = index

    waiting = list(late)
    for index in range(len(asked)):
        if index not in waiting:
            add(index)
    steps = 0
    while scheduler.has_unfinished() or waiting:
        if waiting and (steps % 3 == 2 or not scheduler.has_unfinished()):
            add(waiting.pop(0))
        for request, chunk in scheduler.step():
            if chunk.result:
                found[place[request]] = chunk.result
        steps += 1
    return [found[index] for index in range(len(asked))]


def said(result: Result) -> tuple[str, list[int], str]:
    return result.text, result.token_ids, result.finish_reason


PENALTIES = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "presence_penalty": st.sampled_from([-0.5, 0.7]),
        "frequency_penalty": st.sampled_from([-0.3, 0.2]),
        "logit_bias": st.dictionaries(st.sampled_from(KEPT), st.sampled_from([-100.0, 0.5, 2.0])),
        "no_repeat_ngram_size": st.integers(1, 4),
        "bad_words_ids": st.lists(
            st.lists(st.sampled_from(KEPT[:4]), min_size=1, max_size=3).map(tuple), max_size=5
        ).map(tuple),
        "suppress_tokens": st.lists(st.sampled_from(KEPT[:6]), max_size=3).map(tuple),
        "begin_suppress_tokens": st.lists(st.sampled_from(KEPT), max_size=6).map(tuple),
    },
)
CHOICE = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.0, 0.7, 1.5])},
    optional={
        "top_k": st.sampled_from([1, 3, 7, 300]),
        "top_p": st.sampled_from([0.3, 0.9]),
        "min_p": st.sampled_from([0.02, 0.4]),
    },
)
LIMITS = st.fixed_dictionaries(
    {"ignore_eos": st.booleans()},
    optional={
        "max_new_tokens": st.integers(6, 14),
        "min_new_tokens": st.integers(0, 6),
        "stop": st.lists(st.sampled_from(["a", "fg", "j c"]), max_size=2).map(tuple),
    },
)
OPTIONS = st.builds(lambda a, b, c: {**a, **b, **c}, CHOICE, PENALTIES, LIMITS)
REQUESTS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(KEPT[:-1]), min_size=1, max_size=20),
        st.integers(0, 3),
        OPTIONS,
        st.none(),
    ),
    min_size=2,
    max_size=5,
    unique_by=lambda asked: (tuple(asked[0]), asked[1]),
)


def check_mixed(engine: Engine, asked: list[Asked], late: int, how: str) -> None:
    found = run(engine, asked, 3, late=range(len(asked) - late, len(asked)), **HOW[how])
    for one, result in zip(asked, found, strict=True):
        alone = run(engine, [one], 1, **PLAIN)[0]
        assert said(result) == said(alone), one


@pytest.mark.parametrize("how", ["copies", "learn"])
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=REQUESTS, late=st.integers(0, 2))
def test_each_row_of_a_mixed_batch_writes_what_it_writes_alone(engine, how, asked, late) -> None:
    check_mixed(engine, asked, min(late, len(asked)), how)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=REQUESTS, late=st.integers(0, 2))
def test_many_mixed_batches(engine, how, asked, late) -> None:
    check_mixed(engine, asked, min(late, len(asked)), how)


def test_an_end_token_comes_beside_a_row_that_must_not_end_yet(engine) -> None:
    """In a row that had a longer prompt, with penalties, before."""
    longer: Asked = (PROMPT * 4, 1, {"repetition_penalty": 1.2, "max_new_tokens": 2}, None)
    going: Asked = (PROMPT, 1, {"min_new_tokens": 14, "logit_bias": {END: -9.0}}, None)
    ends = 0
    for seed in range(12):
        asked: Asked = (PROMPT, seed, {"temperature": 1.0}, None)
        (alone,) = run(engine, [asked], 1, **PLAIN)
        *_, beside = run(engine, [longer, going, asked], 2, **PLAIN)
        assert said(beside) == said(alone)
        ends += alone.finish_reason == "eos"
    assert ends, "no answer ended"


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=st.lists(OPTIONS, min_size=2, max_size=5), seed=st.integers(0, 999))
def test_what_others_ask_for_changes_no_bit_of_a_rows_scores(target, asked, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    asked = [sampling_of(GenerateConfig(**o, seed=0), target) for o in asked]
    size, count = SHAPE["vocab_size"], len(asked)
    logits = torch.randn(count, 4, size, generator=random)
    text = torch.randint(97, 101, (count, 12), generator=random)
    key = torch.arange(count) + 1000 * seed
    end, answer = torch.full((count,), 12), 7

    def scores(of: Sequence[int]) -> Tensor:
        known = {"slots": 20, "width": 8, "ends": target.ends}
        options = RowSampling(asked[of[0]], target, rows=len(of), **known)
        for row, index in enumerate(of):
            options.set(row, asked[index])
        steps = options.processors(range(len(of)))
        at = list(of)
        if any(asked[i].penalises for i in of):
            options.penalties.begin(list(range(len(of))), text[at, :answer].tolist())
            options.penalties.write(text[at, answer:], torch.full((len(of),), answer))
        changed = options.change(logits[at], end[at], 12, steps)
        tensors = options.tensors(steps)
        found = process(changed, tensors)
        if tensors.sampled is None:
            return found
        return found + position_noise(key[at], end[at], 4, size, tensors.sampled)

    together = scores(range(count))
    for row in range(count):
        assert torch.equal(together[row], scores([row])[0])


@pytest.mark.parametrize("how", ["static", "learn"])
def test_greedy_rows_are_exact_beside_others_under_the_rejection_rule(engine, how) -> None:
    """What a sampled row writes depends on the rounds there; a greedy one's text does not."""
    options = [{"temperature": t, "ignore_eos": True} for t in (0.0, 0.7, 0.0, 1.2)]
    asked: list[Asked] = [(PROMPT[n:], n, o, None) for n, o in enumerate(options)]
    found = run(engine, asked, 3, late=[3], acceptance="rejection", **HOW[how])
    assert found[0].stats.acceptance_length > 1.2
    for one, result in zip(asked, found, strict=True):
        if one[2]["temperature"] == 0:
            assert said(result) == said(run(engine, [one], 1, **PLAIN)[0])


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_under_the_rejection_rule_each_row_of_a_mixed_batch_follows_its_own_law(wrong) -> None:
    """First tokens of many rows, a third of them greedy; a temperature not its own is found."""
    many, size, temperatures = 30_000, 6, (0.0, 0.7, 1.4)
    random = torch.Generator().manual_seed(0)
    p_logits, q_logits = torch.randn(2, size, generator=random)
    tensors = {
        "temperature": torch.tensor([t or 1.0 for t in temperatures]),
        "sampled": torch.tensor([float(t > 0) for t in temperatures]),
        "greedy": torch.tensor([t == 0 for t in temperatures]),
    }
    s = SamplingTensors(**{n: v.repeat(many)[:, None, None] for n, v in tensors.items()})
    count = 3 * many
    zeros = torch.zeros(count, dtype=torch.long)
    inputs = SimpleNamespace(noise_key=torch.arange(count), number=zeros[:1], start=zeros)
    drafter = SimpleNamespace(draft_ids=None)
    tokens, q = DraftSampler(s, drafter, inputs, size, None)(  # type: ignore[arg-type]
        q_logits.expand(count, 1, size), 0
    )
    proposal = Proposal(tokens=tokens, count=torch.ones_like(zeros), q=q)
    decoder = SimpleNamespace(sampling=SimpleNamespace(acceptance="rejection"))
    decoder.rows = SimpleNamespace(inputs=inputs)
    logits = p_logits.expand(count, 2, size)
    _, emitted = Decoder.accept(decoder, logits, proposal, None, s)  # type: ignore[arg-type]
    first = emitted[:, 0].view(many, 3)
    assert (first[:, 0] == p_logits.argmax()).all()
    for column, temperature in list(enumerate(temperatures))[1:]:
        law = (p_logits / (temperature * (1.1 if wrong else 1.0))).softmax(-1)
        found = chi_square(torch.bincount(first[:, column], minlength=size), law)
        assert (found < 1e-6) if wrong else (found > 1e-3)


def test_no_noise_is_shared_between_rows_and_greedy_rows_have_none(engine, monkeypatch) -> None:
    seen: dict[bytes, tuple[int, int]] = {}
    silent = 0

    def recorded(key, first, count, vocabulary, sampled=None, make=position_noise):
        nonlocal silent
        noise = make(key, first, count, vocabulary, sampled)
        assert sampled is not None
        for row in range(len(key)):
            for column in range(count):
                at = int(first[row]) + column
                if not sampled[row]:
                    assert not noise[row, column].any()
                    silent += 1
                elif at < 300:  # not of a row that rests
                    place = int(key[row]), at
                    assert seen.setdefault(noise[row, column].numpy().tobytes(), place) == place
        return noise

    kept = NoiseCache.__call__
    monkeypatch.setattr(
        NoiseCache, "__call__", lambda own, *given: recorded(*given, make=partial(kept, own))
    )
    monkeypatch.setattr(captured_prompts, "position_noise", recorded)
    temperatures = (0.7, 0.0, 0.7, 1.3, 0.9)
    asked: list[Asked] = [
        (PROMPT[:4], seed, {"temperature": t, "ignore_eos": True}, None)
        for seed, t in enumerate(temperatures)
    ]
    run(engine, asked, 3, late=[4], **HOW["copies"])
    assert len({key for key, _ in seen.values()}) == 4
    assert len(seen) >= 4 * 13
    assert silent > 13


def test_a_change_of_values_needs_no_new_graph(engine, monkeypatch) -> None:
    monkeypatch.setattr(planner, "BUCKET", 16)
    monkeypatch.setattr(targets, "has_kernel", lambda dtype: True)
    first = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}
    first |= {"logit_bias": {97: 1.0}, "bad_words_ids": ((98, 99), (97, 97, 97))}
    then = {"temperature": 1.3, "top_k": 7, "top_p": 0.5, "repetition_penalty": 0.9}
    then |= {"logit_bias": {99: -9.0}, "bad_words_ids": ((100, 100, 101),)}
    asked: list[Asked] = [(PROMPT, 1, first, words("ab")), (PROMPT[2:], 1, first, None)]
    others: list[Asked] = [(PROMPT, 2, then, words("cd")), (PROMPT[3:], 2, then, None)]
    want = [said(r) for r in run(engine, [*asked, *others], 2, **HOW["static"])]

    with monkeypatch.context() as patch:
        patch.setattr(stages, "Graphs", Tapes)
        fresh = Engine(twin(engine.target), engine.drafter)
        made, scheduler_made = [], Scheduler._begin_prefill

        def begin(scheduler: Scheduler) -> list[int]:
            made.append(Tapes.made)
            return scheduler_made(scheduler)

        patch.setattr(Scheduler, "_begin_prefill", begin)
        found = [said(r) for r in run(fresh, [*asked, *others], 2, **HOW["static"])]
        made.append(Tapes.made)
    assert found == want
    assert made[1] > made[0]
    assert made[-1] == made[-2], "the second pair was captured anew"


def test_no_graph_that_reads_where_banned_words_were_serves_a_row(target) -> None:
    """What they had is free memory once a row's words need more room."""
    rules = {"ignore_eos": True, "repetition_penalty": 1.3}
    options = RowSampling(
        sampling_of(GenerateConfig(**rules), target), target, rows=2, slots=20, width=8, ends=()
    )
    for words in (((98, 99),), ((98, 99), (97, 97, 97))):
        asked = sampling_of(GenerateConfig(**rules, bad_words_ids=words, top_k=5), target)
        options.set(0, asked)
        before = options.captured(options.processors([0]))
        assert options.is_current(before)
    more = sampling_of(
        GenerateConfig(**rules, bad_words_ids=tuple((98, n) for n in range(9))), target
    )
    options.set(1, more)
    assert not options.is_current(before)
    assert options.is_current(options.captured(options.processors([1])))
    few = sampling_of(GenerateConfig(**rules, top_k=5), target)
    options.set(0, few)
    assert options.is_current(options.captured(options.processors([0])))


# Grammars.


class Words:
    """An automaton: words of letters of one of two halves in turn, and a space; some words."""

    def __init__(self, halves: tuple[str, str], count: int) -> None:
        self.halves, self.count = halves, count

    def allowed(self, text: Sequence[int]) -> list[int] | None:
        """What may follow; nothing after the last word; None where the text itself may not be."""
        done = place = 0
        for token in text:
            if done == self.count:
                return None
            if token == 32 and place:
                done, place = done + 1, 0
            elif chr(token) in self.halves[place % 2]:
                place += 1
            else:
                return None
        if done == self.count:
            return []
        return [*map(ord, self.halves[place % 2]), *([32] if place else [])]


class WordsMask:
    """The same for ttspec, which remembers what it was asked."""

    def __init__(self, words: Words) -> None:
        self.words, self.asked = words, list[tuple[list[int], list[int]]]()

    def fill(self, bitmask: Tensor, text: Sequence[int], drafted: Sequence[int]) -> None:
        assert len(bitmask) == len(drafted) + 1
        self.asked.append((list(text), list(drafted)))
        for row in range(len(bitmask)):
            allowed = self.words.allowed([*text, *drafted[:row]])
            if allowed is None:
                return
            bits = [0] * bitmask.shape[1]
            for token in allowed:
                bits[token // 32] |= 1 << token % 32
            signed = [b - (1 << 32) if b >= 1 << 31 else b for b in bits]
            bitmask[row] = torch.tensor(signed, dtype=torch.int32)


class WordsProcessor(LogitsProcessor):
    """The same for transformers' `generate`."""

    def __init__(self, words: Words, prompt: int) -> None:
        self.words, self.prompt = words, prompt

    def __call__(self, input_ids, scores):
        allowed = self.words.allowed(input_ids[0, self.prompt :].tolist())
        assert allowed is not None
        mask = torch.ones_like(scores, dtype=torch.bool)
        mask[0, allowed or [END]] = False
        return scores.masked_fill(mask, -torch.inf)


def words(halves: str = "ab", count: int = 3) -> WordsMask:
    other = {"ab": ("abcde", "fghij"), "cd": ("acegi", "bdfhj")}
    return WordsMask(Words(other[halves], count))


@cache
def masked_by_transformers(model: LlamaForCausalLM, halves: str, tokens: int, penalised: bool):
    counted = [Counted(len(PROMPT), 0.4, 0.1)] if penalised else []
    out = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        generation_config=GenerationConfig(
            max_new_tokens=tokens,
            eos_token_id=END,
            pad_token_id=0,
            repetition_penalty=1.2 if penalised else 1.0,
        ),
        logits_processor=LogitsProcessorList(
            [*counted, WordsProcessor(words(halves).words, len(PROMPT))]
        ),
    )
    return out[0, len(PROMPT) :].tolist()


PENALISED = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.1}


QUICK = [("plain", "invariant"), ("learn", "invariant"), ("copies", "rejection")]
OTHERS = [(h, a) for h in ("plain", *HOW) for a in ("invariant", "rejection")]
SLOW = [pytest.param(*o, marks=pytest.mark.slow) for o in OTHERS if o not in QUICK]


@pytest.mark.parametrize(("how", "acceptance"), [*QUICK, *SLOW])
def test_greedy_text_under_a_grammar_is_that_of_transformers(engine, model, how, acceptance):
    options = {"temperature": 0.0, "max_new_tokens": 30}
    free = {"temperature": 0.8, "max_new_tokens": 30, "ignore_eos": True}
    asked: list[Asked] = [
        (PROMPT, 1, options, words("ab")),
        (PROMPT, 1, {**options, **PENALISED}, words("cd")),
        (PROMPT, 1, options, None),
        (PROMPT, 1, free, None),
        (PROMPT, 1, {**options, **PENALISED}, words("ab")),
    ]
    found = run(engine, asked, 3, late=[4], acceptance=acceptance, **({**HOW, "plain": PLAIN}[how]))
    assert found[0].token_ids == masked_by_transformers(model, "ab", 30, False)
    assert found[1].token_ids == masked_by_transformers(model, "cd", 30, True)
    assert found[4].token_ids == masked_by_transformers(model, "ab", 30, True)
    alone = [run(engine, [one], 1, **PLAIN)[0] for one in asked[2:4]]
    assert said(found[2]) == said(alone[0])
    if acceptance == "invariant":
        assert said(found[3]) == said(alone[1])
    masked = [found[0], found[1], found[4]]
    if how != "plain":
        assert sum(r.accepted for f in masked for r in f.rounds) > 5
        assert sum(r.proposed - r.accepted for f in masked for r in f.rounds) > 5
    if how == "learn":
        assert all(f.stats.updates for f in masked)


@pytest.mark.parametrize(
    "how", ["learn", *(pytest.param(how, marks=pytest.mark.slow) for how in ("static", "copies"))]
)
def test_sampled_text_under_a_grammar_is_in_its_language_and_what_is_written_alone(engine, how):
    asked: list[Asked] = [
        (PROMPT[n:], n, {"temperature": t, "max_new_tokens": 24, "top_p": 0.95}, words(halves))
        for n, (t, halves) in enumerate([(0.7, "ab"), (1.4, "cd"), (1.0, "ab")])
    ]
    found = run(engine, asked, 2, **HOW[how])
    for one, result in zip(asked, found, strict=True):
        ids, seed, options, mask = one
        assert isinstance(mask, WordsMask)
        text = [t for t in result.token_ids if t != END]
        assert mask.words.allowed(text) is not None
        assert (result.finish_reason == "eos") == (mask.words.allowed(text) == [])
        # What it is asked about begins with what was accepted, nothing else.
        assert all(result.token_ids[: len(before)] == before for before, _ in mask.asked)
        alone = run(engine, [(ids, seed, options, WordsMask(mask.words))], 1, **PLAIN)[0]
        assert said(result) == said(alone)


def test_rows_without_a_grammar_pay_nothing_for_it(engine) -> None:
    config = GenerateConfig(max_new_tokens=6, **HOW["static"])
    decoder = engine.decoder(config, 2, 20, sessions=False)
    decoder.row_sampling.set(0, mask=words())
    assert "mask" not in decoder.row_sampling.processors([1]).names
    assert "mask" in decoder.row_sampling.processors([0, 1]).names
    decoder.clear(0)
    assert "mask" not in decoder.row_sampling.processors([0, 1]).names
    assert decoder.row_sampling.masks is not None
    assert (decoder.row_sampling.masks._bits == -1).all()


@pytest.mark.parametrize(
    "supervision", ["hindsight", pytest.param("block", marks=pytest.mark.slow)]
)
def test_a_grammar_teaches_the_targets_own_distribution(engine, monkeypatch, supervision) -> None:
    """What a mask forbids here may be right elsewhere; and a law with zeros has logits of -inf."""
    keep, told = Learner.keep, list[Tensor]()

    def recorded(learner, verification, *args, **options):
        told.append(verification.logits[verification.emitted > 0].clone())
        keep(learner, verification, *args, **options)

    monkeypatch.setattr(Learner, "keep", recorded)
    learn = LearnConfig(stride=1, lr=3e-3, publish="now", supervision=supervision, guard=0)
    options = {"temperature": 0.9, "max_new_tokens": 30}
    config = GenerateConfig(learn=learn, **options)
    decoder = engine.decoder(config, 1, 40, sessions=False)
    scheduler = Scheduler(decoder, config)
    scheduler.add_request(Request(ids=PROMPT, seed=1, mask=words("ab", 9)))
    while scheduler.has_unfinished():
        scheduler.step()
        assert decoder.state is not None
    assert told
    assert all(logits.isfinite().all() for logits in told)
    assert decoder.learner is not None
    assert decoder.learner.updates[0] > 3
    assert decoder.learner.reverts[0] == 0
    learned = [w for w in decoder.state.weights.values() if w.is_floating_point()]
    assert all(w.isfinite().all() for w in learned)


def test_where_bans_leave_nothing_the_grammar_rules(engine) -> None:
    options = {"temperature": 0.0, "max_new_tokens": 30, "min_new_tokens": 30}
    options |= {"suppress_tokens": tuple(map(ord, "abcde"))}
    for how in (PLAIN, HOW["copies"]):
        mask = words("ab", 2)
        result = run(engine, [(PROMPT, 1, options, mask)], 1, **how)[0]
        text = [t for t in result.token_ids if t != END]
        assert mask.words.allowed(text) == []
        assert result.finish_reason == "eos"


class Failing(WordsMask):
    """Fails when it is asked for the nth time."""

    def __init__(self, words: Words, at: int) -> None:
        super().__init__(words)
        self.at = at

    def fill(self, bitmask: Tensor, text: Sequence[int], drafted: Sequence[int]) -> None:
        if len(self.asked) == self.at:
            raise ValueError("a grammar that fails")
        super().fill(bitmask, text, drafted)


@pytest.mark.parametrize("at", [0, 2], ids=["first token", "round"])
def test_a_mask_that_fails_leaves_the_others_as_they_were(engine, at) -> None:
    config = GenerateConfig(max_new_tokens=14, temperature=0.9, **HOW["copies"])
    scheduler = Scheduler(engine.decoder(config, 2, 40, sessions=False), config)
    other = scheduler.add_request(Request(ids=PROMPT, seed=1))
    failing = Failing(words().words, at)
    broken = scheduler.add_request(Request(ids=PROMPT[1:], seed=1, mask=failing))
    found: dict[int, Result] = {}
    failures = 0
    while scheduler.has_unfinished():
        try:
            events = scheduler.step()
        except ValueError:
            failures += 1
            scheduler.abort(broken)
        else:
            found |= {request: chunk.result for request, chunk in events if chunk.result}
    assert failures == 1
    options = {"temperature": 0.9}
    assert said(found[other]) == said(run(engine, [(PROMPT, 1, options, None)], 1, **PLAIN)[0])


def test_a_request_that_names_no_token_of_the_target_is_refused(engine) -> None:
    config = GenerateConfig(max_new_tokens=12, **HOW["copies"])
    scheduler = Scheduler(engine.decoder(config, 2, 100, sessions=True), config)
    wrong = GenerateConfig(suppress_tokens=(999,), **HOW["copies"])
    with pytest.raises(OptionError, match="names the token 999"):
        scheduler.add_request(Request(ids=PROMPT, seed=1, config=wrong))
