"""Servers with OpenAI's API beside each other: one client program, the same requests, in turns.

    ttspec serve smollm2-135m --rows 32 --context 1024 --port 8001 &
    vllm serve TARGET --max-num-seqs 32 --max-model-len 1024 --port 8002 &
    python benchmarks/serve_beside.py --server ttspec=8001 --server vllm=8002 --out FOLDER

Waits until every server answers, leaves out who does not, and asks each of them the same streamed
requests of one kind (benchmarks/streams.py), one server after the other, in turns. Prints a table
now and then, and at the end: tokens a second, with the slowest and the fastest turn; milliseconds
to the first text; milliseconds for each further token. What each request took is in
FOLDER/requests.jsonl. Needs aiohttp. Ports are of 127.0.0.1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
from common import quantile
from streams import stream

SHOW_EVERY = 30.0
"""Seconds between two tables."""


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, text: str, number: int, a: Any
) -> dict[str, float]:
    """Stream one answer: when its first text came, when it ended, and how many tokens it had."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": a.tokens,
        "temperature": a.temperature,
        "top_p": 1.0,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin, first, tokens = time.perf_counter(), math.nan, 0
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{url}: {response.status} {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            if math.isnan(first):
                choices = json.loads(line[6:]).get("choices")
                if choices and choices[0]["delta"].get("content"):
                    first = time.perf_counter() - begin
            elif b'"usage"' in line and (usage := json.loads(line[6:]).get("usage")):
                tokens = usage["completion_tokens"]
    return {"first": first, "seconds": time.perf_counter() - begin, "tokens": tokens}


async def turn(
    url: str, model: str, texts: list[str], numbers: list[int], clients: int, a: Any
) -> dict[str, Any]:
    """So many clients ask until there are no requests left."""
    waiting: Iterator[int] = iter(numbers)
    answers: list[dict[str, float]] = []
    connections = aiohttp.TCPConnector(limit=clients)
    patience = aiohttp.ClientTimeout(total=a.patience)

    async with aiohttp.ClientSession(connector=connections, timeout=patience) as session:

        async def client() -> None:
            for number in waiting:
                answers.append(await ask(session, url, model, texts[number], number, a))

        begin = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(clients):
                tasks.create_task(client())
        return {"seconds": time.perf_counter() - begin, "answers": answers}


async def models_of(servers: dict[str, str], until: float) -> dict[str, str]:
    """What each server calls its model; those that do not answer in time are left out."""
    found: dict[str, str] = {}

    async def wait(name: str, url: str) -> None:
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < until:
                try:
                    async with session.get(f"{url}/health") as health:
                        ready = health.status == 200
                    if ready:
                        async with session.get(f"{url}/v1/models") as models:
                            found[name] = (await models.json())["data"][0]["id"]
                        return
                except (aiohttp.ClientError, TimeoutError):
                    pass
                await asyncio.sleep(0.5)

    await asyncio.gather(*(wait(name, url) for name, url in servers.items()))
    return found


def show(turns: list[dict[str, Any]]) -> None:
    """A table of all turns so far."""
    print(
        "clients server               turns  tokens/s (least, most)   first ms p50    p99  ms/token"
    )
    for clients in sorted({t["clients"] for t in turns}):
        for name in dict.fromkeys(t["server"] for t in turns):
            own = [t for t in turns if (t["clients"], t["server"]) == (clients, name)]
            if not own:
                continue
            answers = [answer for t in own for answer in t["answers"]]
            speeds = [sum(x["tokens"] for x in t["answers"]) / t["seconds"] for t in own]
            tokens = sum(answer["tokens"] for answer in answers)
            firsts = [1e3 * x["first"] for x in answers if not math.isnan(x["first"])]
            each = [
                1e3 * (x["seconds"] - x["first"]) / (x["tokens"] - 1)
                for x in answers
                if x["tokens"] > 1 and not math.isnan(x["first"])
            ]
            seconds = sum(t["seconds"] for t in own)
            print(
                f"{clients:7d} {name:20s} {len(own):5d} {tokens / seconds:9.0f}"
                f" ({min(speeds):6.0f}, {max(speeds):6.0f})   {quantile(firsts, 0.5):12.1f}"
                f" {quantile(firsts, 0.99):6.1f} {quantile(each, 0.5):9.2f}",
                flush=True,
            )


async def measure(a: argparse.Namespace, turns: list[dict[str, Any]]) -> None:
    """Turn after turn, each put into `turns`, until the time is over."""
    begin = shown = time.monotonic()
    servers = {
        name: f"http://127.0.0.1:{port}" for name, _, port in (s.partition("=") for s in a.server)
    }
    models = await models_of(servers, begin + a.start_seconds)
    for name in servers:
        print(f"{name}: {'ready' if name in models else 'NOT READY'}", flush=True)
    texts, warm = stream(a.kind), stream("science")
    a.out.mkdir(parents=True, exist_ok=True)

    async def warm_up(name: str) -> None:  # what is met first is not measured
        for clients in a.clients * 2:
            began = time.monotonic()
            try:
                await turn(servers[name], models[name], warm, list(range(2 * clients)), clients, a)
            except ExceptionGroup as error:
                print(f"{name}: left out, {error.exceptions[0]!r}", flush=True)
                del models[name]
                return
            print(f"{name}: warm, {clients} clients, {time.monotonic() - began:.1f} s", flush=True)

    if a.warm:
        await asyncio.gather(*map(warm_up, list(models)))
    print(f"warm after {time.monotonic() - begin:.0f} s", flush=True)
    end, number = begin + a.seconds, 0
    with (a.out / "requests.jsonl").open("w") as file:
        for round_ in count():
            if not models:
                return
            for clients in a.clients:
                numbers = [(number + n) % len(texts) for n in range(a.each * clients)]
                number += len(numbers)
                for name in list(models)[:: -1 if round_ % 2 else 1]:
                    if time.monotonic() > end:
                        return
                    try:
                        one = await turn(servers[name], models[name], texts, numbers, clients, a)
                    except ExceptionGroup as error:
                        print(f"{name}: left out, {error.exceptions[0]!r}", flush=True)
                        del models[name]
                        continue
                    turns.append({"server": name, "clients": clients, "turn": round_, **one})
                    file.write(json.dumps(turns[-1]) + "\n")
                    file.flush()
            if time.monotonic() - shown > SHOW_EVERY:
                shown = time.monotonic()
                print(f"after {shown - begin:.0f} s")
                show(turns)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", action="append", required=True, help="NAME=PORT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 1, 32])
    parser.add_argument("--each", type=int, default=3, help="requests of a client, a turn")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer, at most")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--kind", default="code")
    parser.add_argument("--seconds", type=float, default=150.0, help="in all")
    parser.add_argument("--start-seconds", type=float, default=120.0, help="for servers to start")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds for an answer")
    parser.add_argument("--no-warm", dest="warm", action="store_false")
    turns: list[dict[str, Any]] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        asyncio.run(measure(parser.parse_args(), turns))
    finally:
        show(turns)


if __name__ == "__main__":
    main()
