"""What a server costs beside `Engine.run` of the same requests, in CPU seconds, pairs interleaved.

    python benchmarks/serve_speed.py --clients 1 4 8 --pairs 3

Both run in this process with the same pair of models; the clients are a process of their own,
whose time is not counted. CPU time is what a busy machine leaves comparable. Prints one JSON line
for each number of clients; a ratio of 1 means that the server costs nothing. Needs httpx.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

import ttspec
from ttspec.config import GenerateConfig, LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.serving.options import ServeOptions
from ttspec.serving.server import Server, make_server

CONTEXT = 1024
TOPICS = ("rivers", "bread", "prime numbers", "the moon", "bees", "trains", "salt", "chess")


def bodies(count: int, tokens: int) -> list[dict[str, Any]]:
    """Requests, each another one."""
    return [
        {
            "messages": [{"role": "user", "content": f"Write {n + 2} lines about {topic}."}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "seed": n,
        }
        for n, topic in zip(range(count), TOPICS * count, strict=False)
    ]


def ask_all(url: str, clients: int, count: int, tokens: int) -> None:
    """What the process of the clients does: stream all answers, so many at a time."""

    def ask(body: dict[str, Any]) -> int:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=600
        ) as response:
            return sum(1 for line in response.iter_lines() if line)

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(ask, bodies(count, tokens)))


def started(engine: Engine, config: GenerateConfig, rows: int) -> Server:
    """A server that is ready."""
    options = ServeOptions(port=0, rows=rows, context=CONTEXT)
    server = make_server(engine.sibling, config, options, "smollm2-135m", lambda _: None)
    threading.Thread(target=server.run_to_the_end, daemon=True).start()
    while server.worker.state != "ready":
        time.sleep(0.1)
    return server


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--requests", type=int, help="each time; default twice the clients")
    parser.add_argument("--ask", help="what the clients' own process is told")
    given = parser.parse_args()
    if given.ask:
        ask_all(given.ask, given.clients[0], given.requests, given.tokens)
        return
    engine = ttspec.load("smollm2-135m", device="cpu", dtype="float32")
    config = GenerateConfig(context=CONTEXT, max_new_tokens=1, learn=LearnConfig())
    for clients in given.clients:
        count = given.requests or 2 * clients
        server, alone = started(engine, config, clients), engine.sibling()
        command = [sys.executable, __file__, "--ask", server.address]
        command += ["--clients", str(clients), "--requests", str(count)]
        command += ["--tokens", str(given.tokens)]
        dialogues = [[body["messages"]] for body in bodies(count, given.tokens)]
        seconds: dict[str, list[float]] = {"run": [], "server": []}
        for pair in range(given.pairs + 1):  # the first one warms up
            begin = time.process_time()
            for _ in alone.run(
                dialogues,
                rows=clients,
                context=CONTEXT,
                max_new_tokens=given.tokens,
                ignore_eos=True,
                seeds=list(range(count)),
                learn=LearnConfig(),
            ):
                pass
            middle = time.process_time()
            subprocess.run(command, check=True)
            if pair:
                seconds["run"].append(round(middle - begin, 2))
                seconds["server"].append(round(time.process_time() - middle, 2))
        server.should_exit = True
        ratio = sum(seconds["run"]) / sum(seconds["server"])
        print(json.dumps({"clients": clients, "ratio": round(ratio, 3), **seconds}), flush=True)


if __name__ == "__main__":
    main()
