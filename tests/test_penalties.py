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
from ttspec.config import GenerateConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.penalties import sampling_of
from ttspec.decoding.scheduler import Request, Scheduler
from ttspec.drafters.base import Drafter
from ttspec.errors import OptionError, TargetError
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
            {"min_new_tokens": 50, "logit_bias": {END: 3.0}},
            {"min_new_tokens": 50, "sequence_bias": [[[END], 3.0]]},
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
QUICK += [("repetition", "eagle3", True), ("all", "dflash", True), ("words", "twin", True)]


@pytest.mark.parametrize(("name", "which", "learn"), QUICK)
def test_greedy_tokens_are_those_of_transformers(engines, model, name, which, learn) -> None:
    accepted = check_setting(engines, model, name, which, learn, 60)
    if not learn:
        assert accepted > 2  # blocks were verified, not tokens


@pytest.mark.slow
@pytest.mark.parametrize("learn", [False, True], ids=["static", "learn"])
@pytest.mark.parametrize("which", ["twin", "dflash", "eagle3"])
@pytest.mark.parametrize("name", SETTINGS)
def test_200_greedy_tokens_are_those_of_transformers(engines, model, name, which, learn) -> None:
    accepted = check_setting(engines, model, name, which, learn, 200)
    print(f"{name} {which} {learn}: {accepted:.2f}")


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
    options = {**SETTINGS["all"][0], "learn": None} | (sampled if acceptance != "greedy" else {})
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
    before: list[int] = []
    for turn in ("ab cab", "abc", "a"):
        found = session.send(turn)
        ids = [*before[:-1], *found.prompt_ids]
        assert found.token_ids == theirs(model, ids, 14, **other), turn
        before = ids + found.token_ids


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
