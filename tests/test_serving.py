"""`ttspec serve`: a real server on a free port, with the toy target."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import CONTEXT, FORM, HELLO, LEARN, chat, complete, events, running, until

from ttspec.cli import main
from ttspec.config import GenerateConfig, LearnConfig
from ttspec.decoding.decoder import Decoder
from ttspec.errors import DataError, OptionError
from ttspec.serving import middleware
from ttspec.serving.keys import add_key, read_keys
from ttspec.serving.logs import JsonLines
from ttspec.serving.options import ServeOptions
from ttspec.serving.server import make_server

PLAIN: dict[str, Any] = {"learn": None, "ignore_eos": True}


def test_an_answer_is_what_generate_writes_alone_or_among_others_streamed_or_not(
    engine, client
) -> None:
    (alone,) = engine.generate([HELLO], max_new_tokens=30, seed=7, **PLAIN)
    whole = chat(client, max_tokens=30, seed=7, return_token_ids=True).json()
    choice = whole["choices"][0]
    assert choice["token_ids"] == alone.token_ids
    assert choice["message"] == {"role": "assistant", "content": alone.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == len(alone.token_ids)
    found: list[Any] = []

    def ask(seed: int) -> None:
        body = {"messages": HELLO, "max_tokens": 30, "seed": seed, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            parts = [event["choices"][0]["delta"] for event in events(response)]
            assert parts[0] == {"role": "assistant", "content": ""}
            found.append("".join(part.get("content", "") for part in parts))

    threads = [threading.Thread(target=ask, args=(7,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone.text] * 4


def test_choices_differ_as_equal_prompts_of_one_call_do(engine, client) -> None:
    ids = engine.tokenizer.encode("hello")
    wanted = engine.generate([ids, ids], max_new_tokens=12, seed=3, **PLAIN)
    found = complete(client, n=2, max_tokens=12, seed=3, return_token_ids=True).json()
    assert [c["token_ids"] for c in found["choices"]] == [r.token_ids for r in wanted]
    assert [c["index"] for c in found["choices"]] == [0, 1]
    assert found["usage"]["prompt_tokens"] == len(ids)
    assert found["metrics"] is None  # as in vLLM, it is of one answer only


def test_prompts_may_be_texts_or_tokens_and_several(engine, client) -> None:
    ids = engine.tokenizer.encode("hello")
    texts = complete(client, prompt=["hello", "bye"], max_tokens=5, return_token_ids=True).json()
    tokens = complete(client, prompt=ids, max_tokens=5, return_token_ids=True).json()
    assert texts["choices"][0]["prompt_token_ids"] == ids
    assert texts["choices"][0]["token_ids"] == tokens["choices"][0]["token_ids"]
    assert len(texts["choices"]) == 2


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(engine, client) -> None:
    (whole,) = engine.generate([HELLO], max_new_tokens=30, **PLAIN)
    stop = whole.text[5:8]
    found = chat(client, max_tokens=30, stop=[stop]).json()["choices"][0]
    assert found["message"]["content"] == whole.text[: whole.text.index(stop)]
    assert found["finish_reason"] == "stop"


def test_usage_and_metrics_come_at_the_end_of_a_stream_that_asks_for_them(client) -> None:
    body = {"messages": HELLO, "max_tokens": 20, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events(response)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 20
    told = last["metrics"]["speculative_decoding"]
    histogram = told["acceptance_histogram"]
    assert len(histogram) == told["num_spec_tokens"] + 1
    assert sum(histogram) == told["num_spec_steps"]
    assert sum(i * n for i, n in enumerate(histogram)) == told["num_accepted_draft_tokens"]
    rows = told["acceptance_histogram_by_draft_length"]
    assert sum(int(k) * sum(row) for k, row in rows.items()) == told["num_draft_tokens"]


def test_models_and_metrics_are_told(client) -> None:
    chat(client, max_tokens=5)
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("toy", CONTEXT)
    assert client.get("/v1/models/toy").json() == model
    unknown = client.get("/v1/models/some/other")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    lines = client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['vllm:generation_tokens_total{model_name="toy"}']) >= 5
    assert float(values['vllm:num_requests_running{model_name="toy"}']) == 0
    first = float(values['vllm:request_prefill_time_seconds_count{model_name="toy"}'])
    assert first == float(values['vllm:request_decode_time_seconds_count{model_name="toy"}']) > 0
    assert float(values["process_resident_memory_bytes"]) > 1 << 20
    assert client.get("/live").json()["rows"] == 2
    assert "<html" in client.get("/").text
    for path in ("/", "/health", "/v1/models"):  # those who only look whether it is there
        assert (client.head(path).status_code, client.head(path).content) == (200, b"")


def test_who_asks_for_what_is_not_here_is_told_what_is(client) -> None:
    error = client.post("/v1/embeddings", json={}).json()["error"]
    paths = client.get("/openapi.json").json()["paths"]
    assert all(path in error["message"] for path in paths)
    assert client.head("/v1/embeddings").status_code == 404
    found = paths["/metrics"]["get"]["responses"]
    assert (list(found), list(found["200"]["content"])) == (["200", "4XX"], ["text/plain"])


REFUSED = [
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"what": 1}, "what"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [300]}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt.1"),
    ({"prompt": [[1], ["a"]]}, "prompt.1.0"),
    ({"prompt": "x" * 290, "max_tokens": 20}, "prompt"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"n": 1000}, "n"),
    ({"n": 20}, "n"),
    ({"stop": [1]}, "stop.0"),
    ({"stop": ""}, "stop"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"260": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"999": 1}, "stream": True}, "logit_bias"),
    ({"max_tokens": 2, "min_tokens": 5}, "min_tokens"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "\ud800"}, "prompt"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=[str(body)[:40] for body, _ in REFUSED])
def test_what_cannot_be_answered_is_refused_by_name(client, body, param) -> None:
    content = json.dumps({"prompt": "hello", **body})
    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param in error["message"]
    assert error["message"].endswith(".")
    value = body.get(param)
    if isinstance(value, str | int | float) and param not in ("echo", "suffix", "what", "prompt"):
        assert json.dumps(value) in error["message"] or repr(value) in error["message"]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [([], "prompt: List should have at least 1 item"), ([-1], "greater than or equal to 0")],
)
def test_of_what_a_field_may_be_the_nearest_is_told(client, prompt, says) -> None:
    response = client.post("/v1/completions", json={"prompt": prompt})
    assert says in response.json()["error"]["message"]


def test_what_a_text_model_cannot_read_is_refused_by_name(client) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://localhost/x.png"}}
    response = chat(client, messages=[{"role": "user", "content": [image]}])
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "messages.0.content.0.type"
    assert "'text'" in error["message"]


def test_a_last_message_of_the_assistant_is_continued_and_nothing_else_said_of_it(
    engine, client
) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "well, "}]
    wanted = engine.tokenizer.apply_chat_template(messages, continue_final_message=True)[
        "input_ids"
    ]
    vllm = {"continue_final_message": True, "add_generation_prompt": False}
    for options in ({}, vllm):
        found = chat(client, messages=messages, max_tokens=2, return_token_ids=True, **options)
        assert found.json()["choices"][0]["prompt_token_ids"] == wanted
    assert chat(client, max_tokens=2, continue_final_message=False).status_code == 200
    for name, value in vllm.items():
        for asked, said in ((messages, not value), (HELLO, value)):
            refused = chat(client, messages=asked, **{name: said})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == name


def test_what_clients_send_besides_is_ignored_or_read_as_openai_does(client) -> None:
    body = {"user": "me", "store": True, "echo": False, "best_of": 1, "logit_bias": None}
    assert complete(client, max_tokens=2, **body).status_code == 200
    function = {"name": "look_up", "arguments": "{}"}
    call = {"id": "1", "index": 0, "type": "function", "function": function}
    said = {"role": "assistant", "content": "hi", "refusal": None, "annotations": []}
    said |= {"tool_calls": [call], "audio": None, "function_call": None}
    system = {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}
    asked = {"messages": [system, *HELLO, said, *HELLO], "max_completion_tokens": 2}
    asked |= {"stream_options": None, "parallel_tool_calls": True, "metadata": {"a": "b"}}
    asked |= {"prediction": {"type": "content", "content": "x"}, "tools": []}
    found = chat(client, max_tokens=9, **asked)
    assert found.status_code == 200, found.text
    assert found.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b'{"prompt": "x"', "application/json", 400),
        (b'{"prompt": "\xff"}', "application/json", 400),
        (b"[" * 5000, "application/json", 400),
        (b'{"prompt": "x", "temperature": NaN}', "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"", "application/json", 400),
        (b'{"prompt": "x"}', "text/plain", 400),
        (b"x" * 200_000, "application/json", 413),
    ],
)
def test_bodies_that_are_no_request_are_refused(client, content, kind, status) -> None:
    headers = {"Content-Type": kind}
    response = client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FIELDS = (
    *("prompt", "messages", "n", "stop", "seed", "temperature", "top_p", "top_k", "min_p"),
    *("max_tokens", "logit_bias", "stream", "stream_options", "tools", "response_format"),
    *("presence_penalty", "model", "return_token_ids", "chat_template_kwargs", "min_tokens"),
)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.sampled_from(["chat/", ""]), st.sampled_from(FIELDS), JSON)
def test_any_value_of_a_field_is_answered_or_refused(client, kind, name, value) -> None:
    body: dict[str, Any] = {"max_tokens": 1, "prompt": "x"}
    if kind:
        body = {"max_tokens": 1, "messages": HELLO}
    content = json.dumps({**body, name: value})
    headers = {"Content-Type": "application/json"}
    response = client.post(f"/v1/{kind}completions", content=content, headers=headers)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert client.get("/health").json() == {"status": "ready"}


def test_a_client_that_goes_away_frees_its_row(engine) -> None:
    with running(engine, rows=1) as (client, server):
        body = {"messages": HELLO, "stream": True, "max_tokens": 200}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
            assert sum(server.worker.load) == 1
        until(lambda: sum(server.worker.load) == 0)
        lines = client.get("/metrics").text.splitlines()
        counted = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        prompt, written = (
            float(counted[f'vllm:{name}_tokens_total{{model_name="toy"}}'])
            for name in ("prompt", "generation")
        )
        assert prompt == len(engine.generate([HELLO], max_new_tokens=1, **PLAIN)[0].prompt_ids)
        assert written >= 1, "both are counted of answers that nobody waited for"
        with pytest.raises(httpx.ReadTimeout):
            client.post(
                "/v1/chat/completions", json={"messages": HELLO, "max_tokens": 200}, timeout=0.05
            )
        until(lambda: sum(server.worker.load) == 0)
        assert "requests_cancelled_total" in client.get("/metrics").text
        assert chat(client, max_tokens=3).status_code == 200


@contextmanager
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Rounds wait for the event."""
    go, real = threading.Event(), Decoder.round

    def slow(decoder: Decoder, **options: Any) -> Any:
        go.wait(30)
        return real(decoder, **options)

    monkeypatch.setattr(Decoder, "round", slow)
    try:
        yield go
    finally:
        go.set()


def in_background(ask: Callable[[], httpx.Response], found: list[int]) -> threading.Thread:
    thread = threading.Thread(target=lambda: found.append(ask().status_code))
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("flags", "scope"),
    [
        ([], "shared"),
        (["--api-key-file", "keys.txt"], None),
        (["--api-key-file", "keys.txt", "--learn.stride", "4"], "request"),
        (["--api-key-file", "keys.txt", "--learn.scope", "shared"], "shared"),
        (["--learn.scope", "session"], "session"),
        (["--no-learn"], None),
    ],
)
def test_without_keys_all_requests_teach_one_drafter_with_keys_none_unless_asked_for(
    flags: list[str], scope: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def serve(_: object, config: GenerateConfig, *rest: object) -> int:
        found.append(config.learn)
        return 0

    monkeypatch.setattr("ttspec.serving.server.serve", serve)
    assert main(["serve", *flags]) == 0
    (learn,) = found
    assert (learn and learn.scope) == scope


def test_who_comes_first_is_served_first_and_who_is_too_many_told_when_to_come_again(
    engine, monkeypatch
) -> None:
    found: list[int] = []
    with (
        running(engine, rows=1, queue=2) as (client, server),
        held_up(monkeypatch) as go,
    ):
        server.worker.metrics._row_seconds = 3.0
        threads = []
        for tokens in (20, 40, 30):

            def ask(tokens: int = tokens) -> None:
                usage = chat(client, max_tokens=tokens).json()["usage"]
                found.append(usage["completion_tokens"])

            threads.append(threading.Thread(target=ask))
            threads[-1].start()
            until(lambda: sum(server.worker.load) == len(threads))
        response = chat(client, max_tokens=5)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3", "then a row is free, as things go"
        assert response.json()["error"]["code"] == "queue_full"
        go.set()
        for thread in threads:
            thread.join()
    assert found == [20, 40, 30]


def test_a_stream_that_waits_says_nothing_before_its_first_token(engine, monkeypatch) -> None:
    found: list[int] = []
    with running(engine, rows=1) as (client, server), held_up(monkeypatch) as go:
        thread = in_background(lambda: chat(client, max_tokens=5), found)
        until(lambda: sum(server.worker.load) == 1)
        threading.Timer(0.3, go.set).start()
        begin = time.monotonic()
        body = {"messages": HELLO, "max_tokens": 5, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
            assert time.monotonic() - begin > 0.2, "clients take this for the first token"
        thread.join()
    assert found == [200]


def test_an_answer_that_takes_too_long_fails_even_while_it_waits(engine, monkeypatch) -> None:
    found: list[int] = []
    with running(engine, rows=1, deadline=0.2) as (client, _), held_up(monkeypatch) as go:
        threads = [in_background(lambda: chat(client, max_tokens=50), found) for _ in range(2)]
        time.sleep(0.3)
        go.set()
        for thread in threads:
            thread.join()
    assert found == [504, 504]


def test_a_round_that_fails_takes_its_answers_with_it_and_no_others(engine, monkeypatch) -> None:
    broken, real, found = threading.Event(), Decoder.round, list[int]()
    broken.set()

    def fails_once(decoder: Decoder, **options: Any) -> Any:
        if broken.is_set():
            until(lambda: sum(server.worker.load) == 2)
            broken.clear()
            raise RuntimeError("the machine did something")
        return real(decoder, **options)

    monkeypatch.setattr(Decoder, "round", fails_once)
    with running(engine, rows=1) as (client, server):
        first = in_background(lambda: chat(client, max_tokens=5), found)
        until(lambda: sum(server.worker.load) == 1)
        second = in_background(lambda: chat(client, max_tokens=5), found)
        first.join()
        second.join()
        assert found == [500, 200]
        assert client.get("/health").json() == {"status": "ready"}
        assert 'rounds_failed_total{model_name="toy"} 1.0' in client.get("/metrics").text


def test_sigterm_lets_answers_end_refuses_new_ones_and_exits_with_0(engine, monkeypatch) -> None:
    config = GenerateConfig(context=CONTEXT, max_new_tokens=1, learn=LEARN, ignore_eos=True)
    options = ServeOptions(port=0, rows=1, context=CONTEXT, drain=20)
    server = make_server(engine.sibling, config, options, "toy", lambda line: None)
    seen: dict[str, Any] = {}

    def talk() -> None:
        until(lambda: server.address)
        with (
            httpx.Client(base_url=server.address, timeout=30) as client,
            held_up(monkeypatch) as go,
        ):
            until(lambda: client.get("/health").status_code == 200)
            found: list[int] = []
            thread = in_background(lambda: chat(client, max_tokens=5), found)
            until(lambda: sum(server.worker.load) == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: client.get("/health").json()["status"] == "draining")
            seen["refused"] = chat(client, max_tokens=5).status_code
            go.set()
            thread.join()
            seen["found"] = found

    talker = threading.Thread(target=talk)
    talker.start()
    assert server.run_to_the_end() == 0
    talker.join()
    assert seen == {"refused": 503, "found": [200]}


def test_a_second_signal_ends_answers_and_keeps_what_was_learned(
    engine, monkeypatch, tmp_path, caplog
) -> None:
    learn = LearnConfig(scope="shared", keep=str(tmp_path))
    config = GenerateConfig(context=CONTEXT, max_new_tokens=1, learn=learn, ignore_eos=True)
    options = ServeOptions(port=0, rows=1, context=CONTEXT, drain=60)
    said, found = list[str](), list[int]()
    server = make_server(engine.sibling, config, options, "toy", said.append)

    def talk() -> None:
        until(lambda: server.address)
        with (
            httpx.Client(base_url=server.address, timeout=30) as client,
            held_up(monkeypatch) as go,
        ):
            until(lambda: client.get("/health").status_code == 200)
            thread = in_background(lambda: chat(client, max_tokens=200), found)
            until(lambda: sum(server.worker.load) == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: client.get("/health").json()["status"] == "draining")
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: server.worker._stopping or any("Writing" in line for line in said))
            go.set()
            thread.join()

    talker = threading.Thread(target=talk)
    talker.start()
    assert server.run_to_the_end() == 0
    talker.join()
    assert found == [503], "told that the server ends, not that it failed"
    assert f"Writing what was learned to {tmp_path}. Another signal may lose it." in said
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_second_signal_when_all_is_drained_is_no_reason_to_stay(engine) -> None:
    config = GenerateConfig(context=CONTEXT, max_new_tokens=1, learn=None)
    options = ServeOptions(port=0, rows=1, context=CONTEXT)
    server = make_server(engine.sibling, config, options, "toy", lambda line: None)
    server.should_exit = True  # as `_drain` leaves it, before uvicorn looks
    server._signals = 1
    server._end()
    assert server.should_exit


def test_a_body_that_does_not_come_is_not_waited_for(client, monkeypatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.1)

    def slow() -> Iterator[bytes]:
        yield b'{"prompt": '
        time.sleep(0.5)
        yield b'"x"}'

    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/completions", content=slow(), headers=headers)
    assert response.status_code == 408


def test_a_page_elsewhere_cannot_use_a_server_without_keys(client) -> None:
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/v1/models", headers={"Host": "localhost:80"}).status_code == 200
    local = "http://localhost:3000"
    for origin in (local, "https://evil.example", "http://localhost.evil.example", "null"):
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        asks["Access-Control-Request-Headers"] = "content-type, x-stainless-os"
        before = client.options("/v1/chat/completions", headers=asks)
        refused = client.get("/v1/nothing", headers={"Origin": origin})
        for response, status in ((before, 200 if origin == local else 400), (refused, 404)):
            assert response.status_code == status
            allowed = response.headers.get("access-control-allow-origin")
            assert allowed == (local if origin == local else None)


def test_a_request_has_a_name_which_the_log_has_too_but_never_a_text(client, caplog) -> None:
    caplog.set_level("INFO", "ttspec.serving")
    for sent, is_kept in (("mine-1", True), ("a b", False), ("x" * 129, False), ("", False)):
        headers, told = {"X-Request-Id": sent}, []
        asked = {"prompt": "secret", "max_tokens": 2, "stop": ["secret"]}
        for body in (asked, {**asked, "stream": True}, {**asked, "secret": 1}):
            caplog.clear()
            response = client.post("/v1/completions", json=body, headers=headers)
            name = response.headers["x-request-id"]
            assert (name == sent) == is_kept
            until(lambda: caplog.records)
            (line,) = [json.loads(JsonLines().format(record)) for record in caplog.records]
            assert line["request_id"] == name
            assert "secret" not in str(line)
            told.append(line["event"])
        assert told == ["request", "request", "refused"]


def test_only_who_has_a_key_is_answered(engine, tmp_path) -> None:
    path = tmp_path / "keys"
    key = add_key(path, "alice")
    other = add_key(path, "bob")
    assert path.stat().st_mode & 0o777 == 0o600
    assert key not in path.read_text()
    keys = read_keys(path)
    assert (keys.tenant(key), keys.tenant(other), keys.tenant(key[:-1])) == ("alice", "bob", None)
    with running(engine, api_key_file=path) as (client, _):
        for header in ({}, {"Authorization": "Bearer x"}, {"Authorization": key}):
            response = client.post("/v1/completions", json={"prompt": "x"}, headers=header)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            for place in ("/metrics", "/live", "/v1/models", "/openapi.json", "/nothing"):
                assert client.get(place, headers=header).status_code == 401
            body = {"content": b"{nonsense", "headers": {"Content-Type": "application/json"}}
            assert client.post("/v1/completions", **body).status_code == 401
        client.headers["Authorization"] = f"Bearer {key}"
        assert complete(client, max_tokens=2).status_code == 200
        assert client.get("/", headers={"Host": "any.example"}).status_code == 200
        page = client.get("/v1/models", headers={"Origin": "https://page.example"})
        assert page.headers["access-control-allow-origin"] == "*", "a page needs a key, too"
        assert client.get("/health", headers={"Authorization": ""}).status_code == 200


def test_a_server_for_others_needs_keys_and_a_file_of_keys_is_checked(tmp_path) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.4", "example.org"):
        with pytest.raises(OptionError, match="there are no API keys"):
            ServeOptions(host=host).require_keys()
    for host in ("127.0.0.1", "::1", "localhost"):
        ServeOptions(host=host).require_keys()
    path = tmp_path / "keys"
    path.write_text("alice sk-mine\n")
    with pytest.raises(DataError, match="line 1 is no key") as error:
        read_keys(path)
    assert "sk-mine" not in str(error.value)
    with pytest.raises(DataError):
        add_key(path, "bob")
    with pytest.raises(OptionError):
        add_key(tmp_path / "new", "a name")
    with pytest.raises(OptionError, match="but - alone"):  # whose texts are everybody's
        add_key(tmp_path / "new", "-")
    path.write_text("- sha256:" + "0" * 64)
    with pytest.raises(DataError, match="no key"):
        read_keys(path)
    for place in (tmp_path / "nowhere" / "keys", tmp_path):
        with pytest.raises(DataError, match=r"cannot be written: .*\n.*a folder that is there"):
            add_key(place, "alice")


def test_each_request_has_sampling_options_of_its_own(engine, client) -> None:
    asked = [
        {"temperature": 0.8, "top_p": 0.9, "seed": 5},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.05, "seed": 6},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"logit_bias": {"65": 5.0, "66": -100.0}, "repetition_penalty": 1.3},
    ]
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        response = chat(client, max_tokens=16, return_token_ids=True, **asked[number])
        found[number] = response.json()["choices"][0]["token_ids"]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, options in enumerate(asked):
        if biases := options.get("logit_bias"):
            options = {**options, "logit_bias": {int(t): b for t, b in biases.items()}}
        (alone,) = engine.generate([HELLO], max_new_tokens=16, **PLAIN, **options)
        assert found[number] == alone.token_ids, options
    refused = complete(client, logit_bias={"9999": 1.0})
    assert refused.status_code == 400
    assert complete(client, max_tokens=2).status_code == 200


def test_an_answer_keeps_to_a_schema_greedy_and_sampled_whatever_is_drafted(engine, client) -> None:
    for temperature in (0.0, 1.0):
        asked = {"max_tokens": 120, "temperature": temperature, "seed": 3, "ignore_eos": False}
        found = chat(client, response_format=FORM, n=2, **asked).json()
        for choice in found["choices"]:
            assert choice["finish_reason"] == "stop"
            said = json.loads(choice["message"]["content"])
            assert set(said) == {"on", "n"}
            assert isinstance(said["on"], bool)
            assert isinstance(said["n"], int)


def test_behind_a_whole_answer_of_a_schema_there_are_end_tokens_only(engine, client) -> None:
    """Where a request ignores them, the answer goes on: as vLLM has it."""
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    ends = engine.target.ends
    for response_format in (FORM, form):
        asked = {"response_format": response_format, "seed": 3, "return_token_ids": True}
        asked |= {"max_tokens": 120, "temperature": 1.0}
        (short,) = chat(client, ignore_eos=False, **asked).json()["choices"]
        answer = chat(client, ignore_eos=True, **asked)
        assert answer.status_code == 200, answer.text
        (long,) = answer.json()["choices"]
        assert (short["finish_reason"], long["finish_reason"]) == ("stop", "length")
        whole = len(short["token_ids"])
        assert long["token_ids"][:whole] == short["token_ids"]
        assert set(long["token_ids"][whole:]) <= set(ends)
        assert long["message"]["content"] == short["message"]["content"]


def test_a_schema_that_cannot_be_kept_to_is_refused(client) -> None:
    for schema in (
        {"not": {"type": "string"}},
        {"type": "king"},
        {"$ref": "http://x/y"},
        {"$ref": "#"},
    ):
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        response = chat(client, max_tokens=5, response_format=form)
        assert response.status_code == 400, schema
        assert response.json()["error"]["param"] == "response_format"
    assert chat(client, response_format={"type": "json_schema"}).status_code == 400


def test_a_conversation_that_comes_back_is_read_from_where_it_changed_by_its_tenant_only(
    engine, tmp_path
) -> None:
    path = tmp_path / "keys"
    keys = {name: add_key(path, name) for name in ("alice", "bob")}
    with running(engine, api_key_file=path) as (client, _):

        def ask(name: str, messages: list[Any]) -> Any:
            client.headers["Authorization"] = f"Bearer {keys[name]}"
            return chat(client, messages=messages, max_tokens=12, return_token_ids=True).json()

        first = ask("alice", HELLO)
        said = first["choices"][0]["message"]
        later = [*HELLO, {"role": "assistant", "content": said["content"]}, *HELLO]
        held = {}
        for name in ("bob", "alice"):
            answer = ask(name, later)
            held[name] = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            (alone,) = engine.generate([later], max_new_tokens=12, **PLAIN)
            assert answer["choices"][0]["token_ids"] == alone.token_ids
        assert held["bob"] == 0
        assert held["alice"] >= first["usage"]["prompt_tokens"]


def test_a_clock_that_is_set_back_leaves_the_page_s_last_seconds(client, monkeypatch) -> None:
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert complete(client, max_tokens=4).status_code == 200
    monkeypatch.undo()
    live = client.get("/live").json()
    assert 0 <= live["now"] - live["seconds"][-1]["second"] < 100


def test_a_grammar_that_fails_takes_only_its_own_answer(engine, client, monkeypatch) -> None:
    monkeypatch.setattr("ttspec.serving.grammar.GrammarMask._take", lambda mask, _: mask._fail())
    found: list[int] = []
    other = in_background(lambda: chat(client, max_tokens=60), found)
    assert chat(client, max_tokens=60, response_format=FORM).status_code == 500
    other.join()
    assert found == [200]
