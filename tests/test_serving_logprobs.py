"""Log-probabilities that a server tells are the target's own, whatever is drafted and chosen."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from servers import HELLO, chat, complete, events

from ttspec.decoding.engine import Engine

CHOSEN: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 4},
    {"temperature": 0.7, "top_k": 5, "seed": 3, "presence_penalty": 1.0, "logit_bias": {"65": 4.0}},
]


def by_transformers(engine: Engine, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[T, V]: transformers' own forward over prompt and answer, as log-probabilities."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = engine.target.model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("options", CHOSEN, ids=["greedy", "sampled", "penalised"])
def test_a_chat_is_told_the_target_s_own(engine, client, options) -> None:
    asked = {"max_tokens": 24, "logprobs": True, "top_logprobs": 3, "return_token_ids": True}
    choice = chat(client, **asked, **options).json()["choices"][0]
    ids, told = choice["token_ids"], choice["logprobs"]["content"]
    wanted = by_transformers(engine, choice["prompt_token_ids"], ids)
    assert len(told) == len(ids) == 24
    for token, entry, own in zip(ids, told, wanted, strict=True):
        assert entry["logprob"] == pytest.approx(float(own[token]), abs=1e-4)
        best = own.topk(3)
        found = [likely["logprob"] for likely in entry["top_logprobs"]]
        assert found == pytest.approx(best.values.tolist(), abs=1e-4)
        texts = [engine.tokenizer.decode([t]) for t in best.indices.tolist()]
        for likely, text in zip(entry["top_logprobs"], texts, strict=True):
            if likely["bytes"]:  # llguidance leaves out a byte that no text has, 0xff
                assert bytes(likely["bytes"]).decode(errors="replace") == text
    pairs, special = zip(ids, told, strict=True), engine.tokenizer.all_special_ids
    text = b"".join(bytes(e["bytes"]) for t, e in pairs if t not in special)
    assert text.decode(errors="replace") == choice["message"]["content"]


def test_a_completion_is_told_the_same_with_where_each_token_begins(engine, client) -> None:
    asked = {"max_tokens": 16, "temperature": 1.0, "seed": 9, "return_token_ids": True}
    found = complete(client, logprobs=2, n=2, **asked).json()
    for choice in found["choices"]:
        ids, told = choice["token_ids"], choice["logprobs"]
        wanted = by_transformers(engine, choice["prompt_token_ids"], ids)
        own = [float(row[token]) for token, row in zip(ids, wanted, strict=True)]
        assert told["token_logprobs"] == pytest.approx(own, abs=1e-4)
        for text, value, likely, row in zip(
            told["tokens"], told["token_logprobs"], told["top_logprobs"], wanted, strict=True
        ):
            assert likely[text] == value
            assert max(likely.values()) == pytest.approx(float(row.max()), abs=1e-4)
            assert len(likely) in (2, 3)
        begun = zip(told["text_offset"], told["tokens"], strict=True)
        ends = [at + len(text) for at, text in begun]
        assert told["text_offset"] == [0, *ends[:-1]]
    assert complete(client, logprobs=0, **asked).json()["choices"][0]["logprobs"]["tokens"]
    assert complete(client, **asked).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("kind", ["chat/completions", "completions"])
def test_a_stream_tells_the_same(client, kind: str) -> None:
    asked: dict[str, Any] = {"max_tokens": 20, "temperature": 0.8, "seed": 2, "stop": ["zzz"]}
    asked |= {"messages": HELLO, "logprobs": True} if "chat" in kind else {"prompt": "hello"}
    asked |= {"top_logprobs": 2} if "chat" in kind else {"logprobs": 2}
    whole = client.post(f"/v1/{kind}", json=asked).json()["choices"][0]["logprobs"]
    parts: dict[str, list[Any]] = {}
    with client.stream("POST", f"/v1/{kind}", json={**asked, "stream": True}) as response:
        for event in events(response):
            for name, values in (event["choices"][0]["logprobs"] or {}).items():
                parts.setdefault(name, []).extend(values or [])
    for name, values in parts.items():
        if name != "refusal":
            assert len(values) == 20
            assert list(numbers(values)) == pytest.approx(list(numbers(whole[name])), abs=1e-5)


def numbers(told: Any) -> Iterator[float]:
    """All numbers in it; texts by their characters."""
    if isinstance(told, dict):
        told = list(told.values())
    if isinstance(told, list):
        for part in told:
            yield from numbers(part)
    elif isinstance(told, str):
        yield from map(ord, told)
    else:
        yield told


def test_what_cannot_be_told_is_refused(client) -> None:
    for kind, options in (
        ("chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 21}),
        ("chat/completions", {"messages": HELLO, "top_logprobs": 2}),
        ("chat/completions", {"messages": HELLO, "logprobs": 2}),
        ("completions", {"prompt": "x", "logprobs": 21}),
        ("completions", {"prompt": "x", "logprobs": True}),
    ):
        response = client.post(f"/v1/{kind}", json={"max_tokens": 2, **options})
        assert response.status_code == 400, options
        assert "logprobs" in response.json()["error"]["param"]
