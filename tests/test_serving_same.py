"""One seed, one text: alone, among others, streamed, before and after learning, under a grammar."""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from servers import FORM, HELLO, SCHEMA, chat, events, running
from toys import plain
from transformers import LogitsProcessor, LogitsProcessorList

from ttspec.config import LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.serving.grammar import WHITE_SPACE

FREE = {"max_tokens": 16, "ignore_eos": True}
ASKED: list[dict[str, Any]] = [
    {**FREE, "seed": 1},
    {**FREE, "seed": 2, "temperature": 0.9},
    {**FREE, "seed": 3, "temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.7},
    {"max_tokens": 60, "seed": 4, "response_format": FORM, "ignore_eos": False},
    {"max_tokens": 60, "seed": 5, "temperature": 1.0, "response_format": FORM, "ignore_eos": False},
]


class Grammar(LogitsProcessor):
    """What llguidance allows, for transformers' own `generate`."""

    def __init__(self, engine: Engine) -> None:
        size = engine.target.config.vocab_size
        ends = sorted(engine.target.ends)
        tokenizer: Any = engine.tokenizer
        reader = from_tokenizer(tokenizer, n_vocab=size, eos_token=ends)
        options: Any = {"whitespace_pattern": WHITE_SPACE}
        grammar = LLMatcher.grammar_from_json_schema(SCHEMA, overrides=options)
        self.matcher = LLMatcher(reader, grammar)
        self.read: int | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.read is not None:
            for token in input_ids[0, self.read :].tolist():
                assert self.matcher.consume_token(token)
        self.read = input_ids.shape[1]
        allowed = numpy.frombuffer(self.matcher.compute_bitmask(), dtype=numpy.uint8)
        allowed = numpy.unpackbits(allowed, bitorder="little")[: scores.shape[-1]].astype(bool)
        return scores.masked_fill(~torch.from_numpy(allowed), -torch.inf)


def by_transformers(engine: Engine, prompt: list[int]) -> list[int]:
    """Its greedy answer under the grammar."""
    model: Any = engine.target.model
    out = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=60,
        eos_token_id=sorted(engine.target.ends),
        pad_token_id=0,
        logits_processor=LogitsProcessorList([Grammar(engine)]),
    )
    return out[0, len(prompt) :].tolist()


def ids_of(client: httpx.Client, asked: dict[str, Any], *, stream: bool = False) -> list[int]:
    if not stream:
        response = chat(client, return_token_ids=True, **asked)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["token_ids"]
    body = {"messages": HELLO, "return_token_ids": True, "stream": True, **asked}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        choices = [event["choices"][0] for event in events(response)]
    return [token for choice in choices for token in choice.get("token_ids", [])]


def test_a_text_hangs_on_its_request_alone(engine: Engine) -> None:
    learn = LearnConfig(scope="shared", stride=1, lr=3e-3, blocks=4, publish="now")
    with running(engine, learn, rows=8, queue=64) as (client, _):
        prompt = chat(client, max_tokens=1, return_token_ids=True).json()
        prompt = prompt["choices"][0]["prompt_token_ids"]
        alone = [ids_of(client, asked) for asked in ASKED]
        for asked, found in zip(ASKED[:3], alone[:3], strict=True):
            options = {k: v for k, v in asked.items() if k not in ("max_tokens", "ignore_eos")}
            wanted = plain(engine, prompt, max_new_tokens=16, ignore_eos=True, **options)
            assert found == wanted.token_ids
        assert alone[3] == by_transformers(engine, prompt)
        rng = random.Random(0)
        others = [
            {"max_tokens": rng.randint(1, 16), "seed": n, "temperature": rng.choice([0.0, 1.0])}
            for n in range(20 - len(ASKED))
        ]
        together = [*others[:8], *ASKED, *others[8:]]
        with ThreadPoolExecutor(20) as threads:
            for stream in (False, True):  # the drafter has learned from all before
                answers = threads.map(lambda one, s=stream: ids_of(client, one, stream=s), together)
                assert list(answers)[8 : 8 + len(ASKED)] == alone
        assert [ids_of(client, asked) for asked in ASKED] == alone
        metrics = client.get("/metrics").text
    (updates,) = [x for x in metrics.splitlines() if x.startswith("ttspec:learn_updates_total")]
    assert float(updates.rsplit(" ", 1)[1]) > 0, "it has learned meanwhile"
