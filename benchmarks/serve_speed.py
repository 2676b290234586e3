"""What a server costs beside `Engine.run` of the same requests, in CPU seconds, pairs interleaved.

    OMP_NUM_THREADS=1 python benchmarks/serve_speed.py --clients 1 4 8 --pairs 3
    python benchmarks/serve_speed.py --clients 1 8 32 --device cuda --dtype bfloat16 --compile

The engine has as many rows as there are clients; so has the server, unless `--rows` says more.
Both run in this process with the same pair of models; the clients are a process of their own,
whose time is not counted. CPU time is what a busy machine leaves comparable, and nothing goes by
the clock: a policy that does drafts otherwise in each arm. Prints a JSON line after each pair, of
all pairs so far:

    ratio              CPU seconds of `Engine.run` over the server's
    speed              the same by the clock, from the first step to the last; needs a quiet machine
    tokens_per_second  of each, by the clock
    outside            share of the server's CPU seconds that is not spent in steps of the scheduler
    steps              of the scheduler. A server has more: prompts that come one after the other
                       are read one after the other
Needs httpx.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx

import ttspec
from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.scheduler import Scheduler
from ttspec.records import Chunk
from ttspec.serving.options import ServeOptions
from ttspec.serving.server import Server, make_server

CONTEXT = 1024
TOPICS = ("rivers", "bread", "prime numbers", "the moon", "bees", "trains", "salt", "chess")


class Cost(NamedTuple):
    """What some answers cost."""

    cpu: float
    """Seconds, of all threads."""
    in_steps: float
    """Those of them in steps of schedulers."""
    steps: int
    seconds: float
    """By the clock, from the first step to the last."""


class Stepping:
    """Watches the steps of all schedulers."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float, float]] = []
        """Of each step: its CPU seconds, and when it began and ended."""
        step = Scheduler.step

        def watched(scheduler: Scheduler) -> list[tuple[int, Chunk]]:
            begin, cpu = time.monotonic(), time.thread_time()
            try:
                return step(scheduler)
            finally:
                self._spans.append((time.thread_time() - cpu, begin, time.monotonic()))

        Scheduler.step = watched

    def cost(self, work: Callable[[], object]) -> Cost:
        """What a piece of work costs."""
        self._spans.clear()
        begin = time.process_time()
        work()
        cpu = time.process_time() - begin
        seconds = self._spans[-1][2] - self._spans[0][1]
        return Cost(cpu, sum(span[0] for span in self._spans), len(self._spans), seconds)


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


def started(engine: Engine, config: GenerateConfig, rows: int) -> tuple[Server, threading.Thread]:
    """A server that is ready, and its thread."""
    options = ServeOptions(port=0, rows=rows, context=CONTEXT, queue=256)
    server = make_server(engine.sibling, config, options, "smollm2-135m", lambda _: None)
    thread = threading.Thread(target=server.run_to_the_end)
    thread.start()
    while server.worker.state != "ready":
        time.sleep(0.1)
    return server, thread


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--requests", type=int, default=2, help="of each client, each time")
    parser.add_argument("--rows", type=int, help="of the server; default as many as clients")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-learn", action="store_true")
    parser.add_argument("--adaptive", action="store_true", help="as by default; unlike work")
    parser.add_argument("--ask", help="what the clients' own process is told")
    given = parser.parse_args()
    if given.ask:
        clients = given.clients[0]
        ask_all(given.ask, clients, given.requests * clients, given.tokens)
        return
    place: Any = {"device": given.device, "dtype": given.dtype, "compile": given.compile}
    engine = ttspec.load("smollm2-135m", given.drafter, **place)
    how: dict[str, Any] = {"context": CONTEXT, "learn": None if given.no_learn else LearnConfig()}
    how["draft"] = DraftConfig(adaptive=given.adaptive)
    stepping = Stepping()
    for clients in given.clients:
        count = given.requests * clients
        rows = given.rows or clients
        server, thread = started(engine, GenerateConfig(**how, max_new_tokens=1), rows)
        alone = engine.sibling()
        command = [sys.executable, __file__, "--ask", server.address]
        command += ["--clients", str(clients), "--requests", str(given.requests)]
        command += ["--tokens", str(given.tokens)]
        asked: dict[str, Any] = {
            "dialogues": [[body["messages"]] for body in bodies(count, given.tokens)],
            "seeds": list(range(count)),
            "rows": clients,
            "max_new_tokens": given.tokens,
            "ignore_eos": True,
        }
        runs: list[Cost] = []
        served: list[Cost] = []
        for pair in range(given.pairs + 1):  # the first one warms up
            run = stepping.cost(lambda a=alone, w=asked: list(a.run(**w, **how)))
            serve = stepping.cost(lambda c=command: subprocess.run(c, check=True))
            if pair:
                runs.append(run)
                served.append(serve)
                told = {"clients": clients, "rows": server.worker.rows}
                told |= report(runs, served, count * given.tokens)
                print(json.dumps(told), flush=True)
        server.should_exit = True
        thread.join()


def report(runs: list[Cost], served: list[Cost], tokens: int) -> dict[str, Any]:
    """Figures of the pairs so far, of so many tokens each."""
    cpu, seconds = ([sum(cost[n] for cost in arm) for arm in (runs, served)] for n in (0, 3))
    return {
        "pairs": len(runs),
        "ratio": round(cpu[0] / cpu[1], 3),
        "speed": round(seconds[0] / seconds[1], 3),
        "tokens_per_second": {
            "run": round(tokens * len(runs) / seconds[0], 1),
            "server": round(tokens * len(served) / seconds[1], 1),
        },
        "outside": round(1 - sum(cost.in_steps for cost in served) / cpu[1], 4),
        "steps": {"run": [r.steps for r in runs], "server": [s.steps for s in served]},
        "cpu_seconds": {"run": round(cpu[0], 2), "server": round(cpu[1], 2)},
    }


if __name__ == "__main__":
    main()
