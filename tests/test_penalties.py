"""Penalties, biases and bans inside verified blocks: the right values are transformers' own, token
by token, and for sampling a law that numpy computes."""

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from hybrids import random_hybrid
from test_capture import Tapes
from torch import Tensor
from toys import LEARN, Parrot, chi_square, make_kind, plain, twin
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)

from ttspec import load
from ttspec.bench.store import read_run
from ttspec.cli import WRONG_INPUT, main
from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding import planner, stages
from ttspec.decoding.conversation import Request
from ttspec.decoding.engine import Engine
from ttspec.decoding.penalties import penalises, sampling_of
from ttspec.decoding.scheduler import Scheduler
from ttspec.drafters.base import Drafter
from ttspec.errors import OptionError, TargetError
from ttspec.models import target as targets
from ttspec.models.target import Target, wrap_target
from ttspec.penalties import Rules, penalise

pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
END = 258
KEPT = [*range(97, 107), 32, END]
"""Tokens that the toy target writes: so few that random drafters are right now and then."""
PROMPT = [97, 98, 99, 97, 98, 100, 32, 97]


class Counted(LogitsProcessor):
    """OpenAI's presence and frequency penalties, for transformers' `generate`."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, input_ids, scores):
        for row, tokens in enumerate(input_ids[:, self.prompt :].tolist()):
            for token, times in Counter(tokens).items():
                scores[row, token] -= self.presence + self.frequency * times
        return scores


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    name: (ours, theirs or ours)
    for name, ours, theirs in (
        ("repetition", {"repetition_penalty": 1.3}, None),
        (
            "presence",
            {"presence_penalty": 0.3, "frequency_penalty": 0.02, "logit_bias": {END: -100.0}},
            {
                "presence_penalty": 0.3,
                "frequency_penalty": 0.02,
                "sequence_bias": [[[END], -100.0]],
            },
        ),
        (
            "bias",
            {"logit_bias": {98: 0.5, END: -100.0, 65: 2.0, 97: -0.7}},
            {"sequence_bias": [[[98], 0.5], [[END], -100.0], [[65], 2.0], [[97], -0.7]]},
        ),
        (
            "words",
            {
                "bad_words_ids": [[97, 98], [99], [100, 97, 101], [END], [32, 32, 32, 104]],
                "suppress_tokens": (105,),
                "begin_suppress_tokens": (97, 98, 99, 100, 101),
            },
            None,
        ),
        (
            "length",
            {"min_new_tokens": 25, "logit_bias": {END: 3.0}},
            {"min_new_tokens": 25, "sequence_bias": [[[END], 3.0]]},
        ),
        ("ngrams", {"no_repeat_ngram_size": 3}, None),
        (
            "all",
            {
                "repetition_penalty": 1.1,
                "presence_penalty": -0.2,
                "frequency_penalty": 0.1,
                "logit_bias": {101: -0.5},
                "no_repeat_ngram_size": 4,
                "bad_words_ids": [[97, 97], [98, 99, 100]],
                "min_length": 170,
            },
            {
                "repetition_penalty": 1.1,
                "presence_penalty": -0.2,
                "frequency_penalty": 0.1,
                "sequence_bias": [[[101], -0.5]],
                "no_repeat_ngram_size": 4,
                "bad_words_ids": [[97, 97], [98, 99, 100]],
                "min_length": 170,
            },
        ),
    )
}


def mostly(head: Tensor, kept: list[int]) -> None:
    """Let a head say 0 of all tokens but some."""
    rows = head[kept].clone()
    head.zero_()
    head[kept] = rows


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        made = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
        mostly(made.lm_head.weight, KEPT)
        made.lm_head.weight.mul_(0.5)
        made.lm_head.weight[END] *= 0.2
    return made


@pytest.fixture(scope="module")
def target(model) -> Target:
    return wrap_target(model, byte_tokenizer())


def drafter_of(which: str, model: LlamaForCausalLM) -> Drafter:
    """A drafter that is right now and then; `twin` is the target but for some noise."""
    if which != "twin":
        drafter = make_kind(which)
        if which == "eagle3":
            tokens = torch.arange(len(drafter.weights["d2t"])) + drafter.weights["d2t"]
            known = [i for i, token in enumerate(tokens.tolist()) if token in KEPT]
            mostly(drafter.weights["lm_head.weight"], known)
        return drafter
    shape = {n: SHAPE[n] for n in ("intermediate_size", "num_hidden_layers")}
    drafter = make_kind("causal", **shape)
    weights = dict(model.named_parameters())
    noise = torch.Generator().manual_seed(0)
    drafter.weights = {
        n: weights[n].detach() + 0.005 * torch.randn(weights[n].shape, generator=noise)
        for n in drafter.shapes()
    }
    return drafter


@pytest.fixture(scope="module")
def engines(model, target) -> dict[str, Engine]:
    kinds = ("twin", "dflash", "eagle3")
    return {k: Engine(twin(target), drafter_of(k, model)) for k in kinds}


def theirs(model: Any, ids: list[int], tokens: int, **options: Any) -> list[int]:
    """What transformers' own greedy `generate` says."""
    counted = [options.pop(n, 0.0) for n in ("presence_penalty", "frequency_penalty")]
    own = {n: list(v) if isinstance(v, tuple) else v for n, v in options.items()}
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        generation_config=GenerationConfig(
            max_new_tokens=tokens, eos_token_id=END, pad_token_id=0, **own
        ),
        logits_processor=LogitsProcessorList([Counted(len(ids), *counted)] if any(counted) else []),
    )
    return out[0, len(ids) :].tolist()


def check_setting(engines, model, name: str, which: str, learn: bool, tokens: int) -> float:
    ours, other = SETTINGS[name]
    want = theirs(model, PROMPT, tokens, **other)
    assert want != theirs(model, PROMPT, tokens), "the setting changes nothing here"
    how = LEARN if learn else {"learn": None}
    found = engines[which].generate([PROMPT], max_new_tokens=tokens, **ours, **how)[0]
    assert found.token_ids == want
    assert (found.stats.updates > 0) == (learn and found.stats.rounds > 1)
    return found.stats.acceptance_length


QUICK = [(name, "twin", False) for name in SETTINGS]
QUICK += [("repetition", "eagle3", True), ("all", "dflash", True)]


@pytest.mark.parametrize(("name", "which", "learn"), QUICK)
def test_greedy_tokens_are_those_of_transformers(engines, model, name, which, learn) -> None:
    accepted = check_setting(engines, model, name, which, learn, 40)
    if not learn:
        assert accepted > 2  # blocks were verified, not tokens


@pytest.mark.slow
@pytest.mark.parametrize("learn", [False, True], ids=["static", "learn"])
@pytest.mark.parametrize("which", ["twin", "dflash", "eagle3"])
@pytest.mark.parametrize("name", SETTINGS)
def test_200_greedy_tokens_are_those_of_transformers(engines, model, name, which, learn) -> None:
    check_setting(engines, model, name, which, learn, 200)


# Drafts, batches, turns.


@pytest.fixture(scope="module")
def double(model, target) -> Engine:
    """Its drafter is its target."""
    drafter = drafter_of("twin", model)
    drafter.weights = {n: w.detach() for n, w in model.named_parameters() if n in drafter.weights}
    return Engine(twin(target), drafter)


@pytest.mark.parametrize("acceptance", ["greedy", "invariant", "rejection"])
def test_a_draft_is_penalised_as_the_target_is(double, acceptance: str) -> None:
    """So a drafter that is the target is right always, under both rules."""
    sampled = {"temperature": 0.9, "seed": 3, "acceptance": acceptance}
    options = {**SETTINGS["all"][0], "learn": None, "draft": DraftConfig(copy=False)}
    options |= sampled if acceptance != "greedy" else {}
    found = double.generate([PROMPT], max_new_tokens=41, **options)[0]
    assert [r.accepted for r in found.rounds] == [r.proposed for r in found.rounds] == [4] * 8


def test_rows_that_are_used_again_count_their_own_text_only(engines, model) -> None:
    prompts = [PROMPT[n:] * (1 + n % 2) for n in range(5)]
    ours, other = SETTINGS["all"]
    asked = [[[*prompt]] for prompt in prompts]
    run = engines["twin"].run(asked, rows=2, max_new_tokens=30, stream=False, learn=None, **ours)
    found = {index: chunk.result.token_ids for index, chunk in run if chunk.result}
    assert found == {n: theirs(model, p, 30, **other) for n, p in enumerate(prompts)}


def test_a_later_turn_is_a_request_with_the_whole_conversation(engines, model) -> None:
    ours, other = SETTINGS["presence"]
    ours = ours | {"repetition_penalty": 1.2, "no_repeat_ngram_size": 5, "min_new_tokens": 4}
    other = other | {"repetition_penalty": 1.2, "no_repeat_ngram_size": 5, "min_new_tokens": 4}
    session = engines["twin"].session(max_new_tokens=14, context=300, **ours, **LEARN)
    for turn in ("ab cab", "abc", "a"):
        found = session.send(turn)
        assert session.conversation is not None
        text = session.conversation.decoder.rows.tokens[0]
        ids = text[: len(text) - len(found.token_ids)]
        assert text[len(ids) :] == found.token_ids
        assert found.token_ids == theirs(model, ids, 14, **other), turn


def test_what_is_taken_back_counts_no_more(engines, model, target) -> None:
    """By a stop text in the middle of a block, and by a stream that is dropped."""
    ours, other = SETTINGS["all"]
    whole = plain(engines["twin"], PROMPT, max_new_tokens=40, **ours)
    script = whole.prompt_ids + whole.token_ids
    knows = Engine(twin(target), Parrot(script, 5))  # five drafts a round, all of them right
    stop = target.tokenizer.decode(whole.token_ids[8:10])
    session = knows.session(max_new_tokens=40, context=300, stop=(stop,), raw=True, **ours)
    first = session.send(PROMPT)
    assert first.finish_reason == "stop"
    kept = first.prompt_ids + first.token_ids
    assert kept == script[: len(kept)]
    stream = session.stream("ab")
    shown = [token for _ in range(2) for token in next(stream).token_ids]
    stream.close()
    kept = [*kept, *target.tokenizer.encode("ab"), *shown]
    last = session.send("c")
    ids = [*kept[:-1], *last.prompt_ids]
    want = theirs(model, ids, len(last.token_ids), **other)
    assert last.token_ids == want


def test_an_interrupted_round_counts_nothing(engines, model, monkeypatch) -> None:
    ours, other = SETTINGS["all"]
    session = engines["twin"].session(max_new_tokens=30, context=200, raw=True, **ours, learn=None)
    stream = session.stream("abcab")
    next(stream)
    real, left = Target.forward, [3]

    def interrupted(self, *args, **options):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(self, *args, **options)

    monkeypatch.setattr(Target, "forward", interrupted)
    *_, last = stream
    assert last.result.finish_reason == "cancelled"
    found = session.send("a")
    ids = [*last.result.prompt_ids, *last.result.token_ids[:-1], *found.prompt_ids]
    assert found.token_ids == theirs(model, ids, 30, **other)


def test_a_hybrid_target_is_penalised_alike() -> None:
    model = random_hybrid("qwen3_5")
    options = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2}
    script = theirs(model, PROMPT, 24, **options)
    engine = Engine(wrap_target(model, byte_tokenizer()), Parrot(PROMPT + script, 4, wrong=3))
    found = engine.generate([PROMPT], max_new_tokens=24, learn=None, **options)[0]
    assert found.token_ids == script
    assert found.stats.acceptance_length > 1.2


def test_one_seed_is_one_text_with_every_drafter(engines) -> None:
    options = {**SETTINGS["all"][0], "temperature": 0.9, "top_p": 0.9, "seed": 5}
    options |= {"max_new_tokens": 40}
    want = plain(engines["twin"], PROMPT, **options).token_ids
    for which, how in (("twin", LEARN), ("eagle3", LEARN), ("dflash", {"learn": None})):
        found = engines[which].generate([PROMPT], **options, **how)[0]
        assert found.token_ids == want, which


# Sampled: a law that knows nothing of ours.

FEW = [97, 98, 99, 100]
TAUGHT = LearnConfig(stride=1, lr=3e-3, scope="shared")
LAW = {
    "repetition_penalty": 1.4,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.8,
    "logit_bias": {98: 0.6},
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[97, 98, 99], [100, 100]],
    "suppress_tokens": tuple(t for t in range(260) if t not in FEW),
    "begin_suppress_tokens": (100,),
    "temperature": 0.8,
}
ASKED = [97, 98, 100, 97, 98]


def law_of(model, tokens: int) -> np.ndarray:
    """Probability of every answer of so many tokens of `FEW`, [4, 4, ...], by hand."""
    answers = list(product(FEW, repeat=tokens))
    ids = torch.tensor([[*ASKED, *answer] for answer in answers])
    with torch.no_grad():
        logits = model(ids).logits.double().numpy()
    law = np.ones(len(answers))
    for row, answer in enumerate(answers):
        for at, token in enumerate(answer):
            text, said = [*ASKED, *answer[:at]], answer[:at]
            scores = {t: logits[row, len(text) - 1, t] for t in FEW}
            scores[98] += 0.6
            for t in FEW:
                if t in text:
                    scores[t] *= 1.4 if scores[t] < 0 else 1 / 1.4
                scores[t] -= 0.5 * (t in said) - 0.8 * said.count(t)
                triples = [tuple(text[i : i + 3]) for i in range(len(text) - 2)]
                if (
                    (*text[-2:], t) in triples
                    or (*text[-2:], t) == (97, 98, 99)
                    or (text[-1], t) == (100, 100)
                    or (not said and t == 100)
                ):
                    scores[t] = -np.inf
            weights = {t: np.exp(scores[t] / 0.8) for t in FEW}
            law[row] *= weights[token] / sum(weights.values())
    assert abs(law.sum() - 1) < 1e-9
    return law.reshape([len(FEW)] * tokens)


@pytest.mark.parametrize(
    ("acceptance", "learn"),
    [("invariant", None), ("rejection", None), ("rejection", TAUGHT)],
)
def test_sampled_answers_follow_the_law(engines, model, acceptance: str, learn) -> None:
    times, tokens = 1000, 3
    found = engines["twin"].generate(
        [ASKED] * times,
        max_new_tokens=tokens,
        seed=11,
        acceptance=acceptance,
        **LAW,
        learn=learn,
    )
    counts = np.zeros([len(FEW)] * tokens)
    for result in found:
        counts[tuple(FEW.index(token) for token in result.token_ids)] += 1
    accepted = sum(r.accepted for result in found for r in result.rounds)
    proposed = sum(r.proposed for result in found for r in result.rounds)
    assert 0.3 < accepted / proposed < 1  # both ways through the rule
    assert chi_square(torch.tensor(counts), torch.tensor(law_of(model, tokens))) > 0.01


# One by one.


def in_turn(sampling: Any, logits: Tensor, text: list[int], answer: int) -> Tensor:
    """What transformers' `generate` makes of logits [1, V] after a text."""
    own = GenerationConfig(
        repetition_penalty=float(sampling["repetition_penalty"]),
        no_repeat_ngram_size=sampling["no_repeat_ngram_size"],
        bad_words_ids=[list(w) for w in sampling["bad_words_ids"]],
        min_length=sampling["min_length"] or None,
        begin_suppress_tokens=list(sampling["begin_suppress_tokens"]),
        sequence_bias=[[[t], b] for t, b in sampling["logit_bias"].items()],
    )
    own._eos_token_tensor = torch.tensor([END % logits.shape[-1]])
    stub = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 1}))
    processors = stub._get_logits_processor(own, input_ids_seq_length=answer)
    return processors(torch.tensor([text]), logits)


def test_every_column_of_a_block_is_what_transformers_makes_of_its_own_text() -> None:
    random = np.random.default_rng(0)
    size, slots, columns, rows = 30, 24, 5, 4
    for trial in range(12):
        options = {
            "repetition_penalty": [1.0, 1.3, 0.7][trial % 3],
            "no_repeat_ngram_size": [0, 1, 2, 3, 24][trial % 5],
            "bad_words_ids": tuple(
                tuple(random.integers(0, 4, random.integers(1, 4)).tolist()) for _ in range(5)
            ),
            "min_length": int(random.integers(0, 12)),
            "begin_suppress_tokens": tuple(random.integers(0, size, 3).tolist()),
            "logit_bias": {int(t): 1.5 for t in random.integers(0, size, 3)},
        }
        sampling = GenerateConfig(**options).sampling({})
        rules = Rules.of(sampling, [END % size], size, torch.device("cpu"))
        text = torch.tensor(random.integers(0, 4, (rows, slots)))  # tokens 0 to 3: much repeats
        answer = torch.tensor(random.integers(1, 5, rows))
        end = answer + torch.tensor([0, 1, 3, 8])
        logits = torch.tensor(random.normal(size=(rows, columns, size)), dtype=torch.float32)
        found = penalise(logits, text, end, answer, rules)
        for row, column in product(range(rows), range(columns)):
            before = text[row, : end[row] + column].tolist()
            want = in_turn(options, logits[row, column][None], before, int(answer[row]))
            assert torch.equal(found[row, column], want[0]), (trial, row, column)
        # What lies behind, and rows that rest, change nothing.
        text.scatter_(1, end[:, None] + columns - 1, 5)
        assert torch.equal(penalise(logits, text, end, answer, rules), found)
        resting = end.clone()
        resting[1] = slots + 1
        again = penalise(logits, text, resting, answer, rules)
        assert torch.equal(again[[0, 2, 3]], found[[0, 2, 3]])


def test_the_compiler_can_follow_it() -> None:
    sampling = GenerateConfig(**LAW).sampling({})
    rules = Rules.of(sampling, [END], 260, torch.device("cpu"))
    text = torch.tensor([ASKED * 4, ASKED * 4])
    end, answer = torch.tensor([9, 6]), torch.tensor([5, 5])
    logits = torch.randn(2, 4, 260)
    torch._dynamo.reset()
    try:
        fast = torch.compile(penalise, backend="eager", fullgraph=True, dynamic=False)
        found = fast(logits, text, end, answer, rules)
    finally:
        torch._dynamo.reset()
    assert torch.equal(found, penalise(logits, text, end, answer, rules))


@pytest.mark.parametrize("which", ["twin", "dflash"])
@pytest.mark.parametrize("spans", [False, True])
def test_captured_rounds_do_what_the_rounds_do(engines, monkeypatch, which, spans) -> None:
    """Nothing waits for the device, and nothing is read from the host again."""
    monkeypatch.setattr(planner, "BUCKET", 16)
    monkeypatch.setattr(targets, "has_kernel", lambda dtype: spans)
    options = {**LAW, "no_repeat_ngram_size": 9, "suppress_tokens": (1,), "learn": None, "seed": 2}
    options |= {"max_new_tokens": 16, "min_length": 12, "acceptance": "rejection"}

    def say() -> list[list[int]]:
        fresh = Engine(twin(engines[which].target), engines[which].drafter)
        return [r.token_ids for r in fresh.generate([PROMPT, ASKED], **options)]

    want, replayed = say(), Tapes.replayed
    monkeypatch.setattr(stages, "Graphs", Tapes)
    assert say() == want
    assert Tapes.replayed > replayed + 4


# What may be asked, and where it comes from.


def test_without_penalties_there_is_nothing_of_them(engines) -> None:
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "logit_bias": {}}
    config = GenerateConfig(**neutral, bad_words_ids=(), min_new_tokens=0, no_repeat_ngram_size=0)
    decoder = engines["twin"].decoder(config, 1, 4, sessions=False)
    assert not penalises(decoder.row_sampling.processors([0]))
    assert decoder.sampling == sampling_of(GenerateConfig(seed=0), engines["twin"].target)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; allowed is a number above 0"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; allowed is from -2 to 2"),
        ({"frequency_penalty": -3.0}, "frequency_penalty is -3.0; allowed is from -2 to 2"),
        ({"logit_bias": {5: 101.0}}, "logit_bias of token 5 is 101.0; allowed is from -100 to"),
        ({"logit_bias": 5}, "logit_bias is 5; allowed is as in {198: -5.0"),
        ({"logit_bias": {300: 1.0}}, "logit_bias names the token 300; the target has 260"),
        (
            {"no_repeat_ngram_size": -1},
            "no_repeat_ngram_size is -1; allowed is a whole number from 0",
        ),
        ({"bad_words": "word"}, "bad_words is 'word'; allowed is a list of texts"),
        ({"bad_words": ("",)}, "bad_words is "),
        ({"bad_words_ids": [[]]}, "bad_words_ids is "),
        ({"bad_words_ids": [[1, 260]]}, "bad_words_ids names the token 260; the target has 260"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "allowed is 0 to max_new_tokens, which is 8"),
        ({"suppress_tokens": (-1,)}, "suppress_tokens is -1; allowed is tokens from 0 up"),
        ({"begin_suppress_tokens": (999,)}, "begin_suppress_tokens names the token 999"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(engines, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as told:
        engines["twin"].generate([PROMPT], **options)
    assert said in str(told.value)
    assert len(str(told.value).splitlines()) <= 2


def test_rows_of_a_scheduler_have_penalties_of_their_own(engines, model) -> None:
    config = GenerateConfig(max_new_tokens=30, learn=None)
    scheduler = Scheduler(engines["twin"].decoder(config, 3, len(PROMPT), sessions=False), config)
    want = {}
    for name, (ours, other) in SETTINGS.items():  # more than rows: some come when others leave
        own = GenerateConfig(max_new_tokens=30, learn=None, **ours)
        request = scheduler.add_request(Request(ids=PROMPT, seed=1, config=own))
        want[request] = name, theirs(model, PROMPT, 30, **other)
    while scheduler.has_unfinished():
        for request, chunk in scheduler.step():
            if chunk.result:
                name, tokens = want.pop(request)
                assert chunk.result.token_ids == tokens, name
    assert not want


def test_a_bad_word_is_banned_as_it_stands_and_after_a_space(engines, target) -> None:
    sampling = sampling_of(GenerateConfig(bad_words=("bad", " day")), target)
    encode = target.tokenizer.encode
    want = [encode("bad"), encode(" bad"), encode("day"), encode(" day")]
    assert sampling.bad_words_ids == tuple(map(tuple, want))
    bias = dict.fromkeys(encode("abcdefghij "), 9.0)
    free = plain(engines["twin"], PROMPT, max_new_tokens=30, logit_bias=bias).text
    bad = free[2:4]
    assert bad.isascii()
    options = {"max_new_tokens": 30, "logit_bias": bias, "bad_words": (bad,)}
    assert bad not in plain(engines["twin"], PROMPT, **options).text


# Of the model's own folder.

OWN = {
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[97, 98]],
    "min_new_tokens": 30,
    "suppress_tokens": [99],
    "begin_suppress_tokens": [100, 101],
}


def with_own(model: LlamaForCausalLM, folder, **entries: Any) -> str:
    """A folder of the model with a generation_config.json."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    GenerationConfig(eos_token_id=END, pad_token_id=0, **entries).save_pretrained(folder)
    return str(folder)


def test_a_folders_own_penalties_hold_until_an_option_says_otherwise(model, tmp_path) -> None:
    """As in the folders of Qwen2.5-Instruct, whose repetition_penalty is 1.05."""
    engine = load(with_own(model, tmp_path, **OWN), None, device="cpu", dtype="float32")
    options = {"max_new_tokens": 40, "learn": None}
    assert engine.generate([PROMPT], **options)[0].token_ids == theirs(model, PROMPT, 40, **OWN)
    off = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": ()}
    off |= {"min_new_tokens": 0, "suppress_tokens": (), "begin_suppress_tokens": ()}
    found = engine.generate([PROMPT], **off, **options)[0]
    assert found.token_ids == theirs(model, PROMPT, 40)
    some = {"repetition_penalty": 1.5, "suppress_tokens": ()}
    want = theirs(model, PROMPT, 40, **OWN | some | {"suppress_tokens": None})
    assert engine.generate([PROMPT], **some, **options)[0].token_ids == want


def test_a_run_tells_its_penalties_and_replays_have_them(
    model, tmp_path, capsys, monkeypatch
) -> None:
    own = OWN | {"min_new_tokens": 8}
    target = with_own(model, tmp_path / "target", **own)
    suite, out = tmp_path / "suite.jsonl", tmp_path / "out"
    suite.write_text('{"prompt": "abc"}\n')
    pair = ["--target", target, "--dtype", "float32", "--device", "cpu"]
    flags = ["--suite", str(suite), *pair, "--drafter", "none", "--max-new-tokens", "24"]
    command = ["bench", "run", *flags, "--arms", "plain,ngram", "--out", str(out)]
    assert main(command) == 0
    manifest, arms = read_run(out)
    assert own.items() <= manifest["sampling"].items()
    texts = [[t.result.token_ids for turns in arm.units.values() for t in turns] for arm in arms]
    assert texts[0] == texts[1]
    again = ["bench", "replay", str(out), *pair, "--drafter", "none", "--arms", "ngram"]
    assert main([*again, "--out", str(tmp_path / "replay")]) == 0
    assert read_run(tmp_path / "replay")[0]["notes"] == [
        "24 of 24 recorded tokens are what the target draws on this reading."
    ]
    capsys.readouterr()
    with_own(model, tmp_path / "target", **own | {"repetition_penalty": 1.3})
    assert main(command) == WRONG_INPUT  # not the same run any more
    assert "another repetition_penalty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "entry",
    [
        {"repetition_penalty": -1.0},
        {"repetition_penalty": "high"},
        {"bad_words_ids": [[97, 999]]},
        {"bad_words_ids": 5},
        {"suppress_tokens": [-1]},
        {"no_repeat_ngram_size": "3"},
    ],
    ids=str,
)
def test_a_folder_whose_entry_cannot_be_followed_is_refused_by_name(model, entry) -> None:
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        for name, value in entry.items():
            setattr(model.generation_config, name, value)
        with pytest.raises(TargetError) as told:
            wrap_target(model, byte_tokenizer())
    finally:
        model.generation_config = before
    assert "generation_config.json" in str(told.value)
    assert next(iter(entry)) in str(told.value)
    assert len(str(told.value).splitlines()) == 2
