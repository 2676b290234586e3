"""300 bad requests, some of them half: each is refused, and who asks well is answered as ever."""

import json
import random
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.exceptions import RequestValidationError
from servers import CONTEXT, HELLO, events, running
from toys import plain, toy_engine

from ttspec.serving.app import _validation_error

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WRONG: dict[str, list[Any]] = {
    "temperature": ["warm", -1, 2.5, [], {}, True],
    "top_p": [-0.1, 1.1, "1", [0.5]],
    "top_k": [-2, 1.5, "5"],
    "min_p": [2, "0"],
    "max_tokens": [0, -1, 1.5, "9", 10**30, True, CONTEXT],
    "n": [0, 65, 1.5, "2"],
    "seed": [2**80, "1", 0.5],
    "stop": [[""], [1], {}, ["a"] * 17],
    "stream": ["yes", 1],
    "logit_bias": [[1], {"a": 1}, {"1": "x"}, {"1": 101}, {"999999": 1}],
    "presence_penalty": [-3, "0"],
    "frequency_penalty": [3, []],
    "repetition_penalty": [0, -1, 11],
    "stream_options": [{"include_usage": True}, {"x": 1}, True],
    "ignore_eos": ["no", 1],
    "min_tokens": [-1, 10**6],
    "return_token_ids": [1, "true"],
    "model": [5, "other", {}],
    "echo": [True],
    "best_of": [3],
    "no_such_field": [1, {"deep": [[]]}],
}
WRONG_CHAT: dict[str, list[Any]] = {
    "messages": [
        [],
        [{}],
        "hello",
        [{"role": "king", "content": "x"}],
        [1],
        [{"role": "user"}] * 3000,
    ],
    "tools": ["x", [{}], [{"type": "function", "function": {"name": ""}}]],
    "tool_choice": ["required", {"type": "function"}],
    "response_format": [
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 5}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}},
    ],
    "top_logprobs": [1, 21, "2"],
    "logprobs": [3, "yes"],
    "chat_template_kwargs": [{"enable_thinking": "maybe"}, {"file": "/etc/passwd"}],
}
WRONG_TEXT: dict[str, list[Any]] = {
    "prompt": [[], [[]], 5, [-1], [10**9], [["a"]], {"file": "x"}, "x" * 2 * CONTEXT, ["a"] * 65],
    "logprobs": [-1, 21, True],
}


def bad_request(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body that cannot be answered."""
    path = rng.choice([CHAT, TEXT])
    good = {"messages": HELLO} if path == CHAT else {"prompt": "hello"}
    kind = rng.choice(["field", "field", "field", "field", "cut", "bytes", "nested", "huge"])
    wrong = {**WRONG, **(WRONG_CHAT if path == CHAT else WRONG_TEXT)}
    name = rng.choice(sorted(wrong))
    body = {"max_tokens": 2, **good}
    if kind == "field":
        return path, json.dumps({**body, name: rng.choice(wrong[name])}).encode()
    said = json.dumps(body).encode()
    if kind == "cut":
        return path, said[: rng.randrange(len(said) - 1)]
    if kind == "bytes":
        at = said.index(b"hello") + rng.randrange(5)
        return path, said[:at] + rng.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80"]) + said[at:]
    if kind == "nested":
        return path, b'{"prompt": ' + rng.choice([b"[", b'{"a":']) * rng.randint(100, 20_000)
    return path, said[:-1] + b', "user": "' + b"x" * 200_000 + b'"}'


def half(url: str, rng: random.Random) -> socket.socket:
    """A client that stops in the middle of its request, and stays."""
    place = urlsplit(url)
    client = socket.create_connection((place.hostname, place.port), timeout=30)
    said = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    said += 'Content-Length: 500\r\n\r\n{"messages": ['
    client.sendall(said[: rng.randint(1, len(said))].encode())
    return client


@pytest.mark.slow
def test_each_is_refused_and_nobody_else_is_disturbed(toy_target_dir: Path, monkeypatch) -> None:
    engine, rng, told = toy_engine(toy_target_dir), random.Random(0), list[int]()
    found: list[list[int]] = []
    with running(engine) as (client, server):
        jobs, submit = list[int](), server.worker.submit
        monkeypatch.setattr(server.worker, "submit", lambda new: (jobs.append(1), submit(new)))

        def ask_well() -> None:
            body = {"prompt": "hello", "max_tokens": 100, "seed": 1, "temperature": 0.7}
            body |= {"stream": True, "return_token_ids": True}
            with httpx.Client(base_url=server.address, timeout=60) as own:
                while len(told) < 300:
                    with own.stream("POST", TEXT, json=body) as response:
                        parts = [event["choices"][0] for event in events(response)]
                    found.append([token for part in parts for token in part["token_ids"]])

        thread = threading.Thread(target=ask_well)
        thread.start()
        stopped = [half(server.address, rng) for _ in range(8)]
        headers = {"Content-Type": "application/json"}
        for _ in range(300):
            path, body = bad_request(rng)
            response = client.post(path, content=body, headers=headers)
            assert 400 <= response.status_code < 500, (body[:200], response.text)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            told.append(response.status_code)
        thread.join()
        for one in stopped:
            one.close()
        assert client.get("/health").json() == {"status": "ready"}
        assert sum(server.worker.load) == 0
    ids = engine.tokenizer.encode("hello")
    wanted = plain(engine, ids, max_new_tokens=100, seed=1, temperature=0.7, ignore_eos=True)
    assert len(found) == len(jobs) > 0, "the thread that decodes never hears of the others"
    assert all(tokens == wanted.token_ids for tokens in found)
    assert set(told) == {400, 404, 413}


def test_a_field_with_a_typing_mistake_is_told_with_the_one_that_is_near() -> None:
    def told(name: str) -> str:
        wrong = {"type": "extra_forbidden", "loc": ("body", name), "msg": "", "input": 1}
        return str(_validation_error(RequestValidationError([wrong])))

    assert told("max_token") == "max_token: there is no such field; is max_tokens meant?"
    assert told("best_of") == "best_of: there is no such field; leave it out."


@pytest.mark.parametrize("body", [b'{"prompt": "\xff"}', b"[" * 50_000, b"1" * 5_000])
def test_json_that_cannot_be_read_is_told_with_what_may_be_wrong(client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    for path in (CHAT, TEXT):
        response = client.post(path, content=body, headers=headers)
        assert response.status_code == 400
        told = response.json()["error"]["message"]
        assert told.startswith("The body is no JSON object: it is not UTF-8, or ")
