"""A real `ttspec serve` in a thread, and clients of it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from ttspec.config import GenerateConfig, LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.serving.options import ServeOptions
from ttspec.serving.server import Server, make_server

CONTEXT = 300
LEARN = LearnConfig(stride=1, lr=3e-3, publish="now")
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "n": {"type": "integer", "maximum": 99}},
    "required": ["on", "n"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}


@contextmanager
def running(
    engine: Engine,
    learn: LearnConfig | None = LEARN,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Iterator[tuple[httpx.Client, Server]]:
    """A server in a thread, and a client of it."""
    config = GenerateConfig(context=CONTEXT, max_new_tokens=1, learn=learn, ignore_eos=True)
    given = {"port": 0, "rows": 2, "queue": 4, "context": CONTEXT, "drain": 5.0, **options}
    server = make_server(engine.sibling, config, ServeOptions(**given), "toy", say)
    thread = threading.Thread(target=server.run_to_the_end)
    thread.start()
    try:
        until(lambda: server.address)
        with httpx.Client(base_url=server.address, timeout=60) as client:
            until(lambda: client.get("/health").status_code == 200)
            yield client, server
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def until(what: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def chat(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": HELLO, **body})


def complete(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": "hello", **body})


def events(response: httpx.Response) -> list[Any]:
    """What a stream sent; the last line must say that it is over."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
