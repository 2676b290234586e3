"""Load on `ttspec serve`: many clients, some go away, some talk nonsense.

    ttspec serve --rows 8 --queue 64 --port 8000 & python benchmarks/serve_load.py

Waits until the server is ready, shows each minute how much memory it holds, by its own word
(`process_resident_memory_bytes` of /metrics), and prints one JSON object. Exits with 1 when an
answer was none of those that are meant: whole, cut off by its client, 429, 504, and 400 for
nonsense. Needs httpx. `--only-good` leaves out what goes wrong on purpose, to measure tokens per
second; `--max-wait SECONDS` also fails where the 99th percentile of the first token is later, and
`--nonsense N` adds clients that send nothing else, as fast as they can.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import httpx

MEMORY = "process_resident_memory_bytes"
TOPICS = ("rivers", "bread", "prime numbers", "the moon", "bees", "trains", "salt", "chess")
MALFORMED = (
    b'{"messages": [',
    b'{"messages": "\xff\xfe"}',
    b'{"messages": [{"role": "king", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": "warm"}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 10000000}',
    b'{"messages": [{"role": "user", "content": "x"}], "echo": true}',
    b'{"messages": ' + b"[" * 20_000,
)
INTENDED = {
    *("good: 200", "good: 429", "good: deadline"),
    *("cancelled: 200", "cancelled: 429", "cancelled: deadline", "cancelled: by the client"),
    *("malformed: 400", "cut off at the end"),
}
LAST_SECONDS = 30
"""In which answers may end that were begun in time."""


class Tally:
    """What happened."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.first: list[float] = []
        self.gaps: list[float] = []
        self.tokens = 0
        self.memory: list[int] = []
        """MiB that the server holds, every five seconds."""


async def one(
    client: httpx.AsyncClient, rng: random.Random, tally: Tally, *, good: bool, most: int
) -> None:
    """One request of a random kind."""
    kind = "good" if good else rng.choices(["good", "cancelled", "malformed"], [8, 1, 1])[0]
    if kind == "malformed":
        await nonsense(client, rng, tally)
        return
    words = " ".join(rng.choice(TOPICS) for _ in range(rng.randint(1, 60)))
    asked = {
        "messages": [{"role": "user", "content": f"Write about {words}."}],
        "max_tokens": rng.randint(1, most),
        "seed": rng.randrange(1000),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if not good and rng.random() < 0.5:
        asked |= {"temperature": 0.8, "top_p": 0.95}
    begin, before, leave = time.monotonic(), None, rng.randint(1, 4)
    async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        if response.status_code != 200:
            tally.outcomes[f"{kind}: {response.status_code}"] += 1
            await response.aread()
            if response.status_code == 429:
                await asyncio.sleep(float(response.headers["retry-after"]) * rng.random())
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                tally.outcomes[f"{kind}: {event['error']['code']}"] += 1
                return
            if usage := event.get("usage"):
                tally.tokens += usage["completion_tokens"]
            elif event["choices"][0]["delta"].get("content"):
                now = time.monotonic()
                (tally.first if before is None else tally.gaps).append(now - (before or begin))
                before, leave = now, leave - 1
                if kind == "cancelled" and not leave:
                    tally.outcomes["cancelled: by the client"] += 1
                    return
    tally.outcomes[f"{kind}: 200"] += 1


async def nonsense(client: httpx.AsyncClient, rng: random.Random, tally: Tally) -> None:
    """A request that cannot be answered."""
    body, headers = rng.choice(MALFORMED), {"Content-Type": "application/json"}
    response = await client.post("/v1/chat/completions", content=body, headers=headers)
    tally.outcomes[f"malformed: {response.status_code}"] += 1


async def watch(client: httpx.AsyncClient, tally: Tally) -> None:
    """Note the server's memory; show it each minute."""
    while True:
        lines = (await client.get("/metrics")).text.splitlines()
        held = [line.split()[1] for line in lines if line.startswith(f"{MEMORY} ")]
        if not held:
            sys.exit(f"{client.base_url}metrics has no {MEMORY}: the server is not on Linux")
        tally.memory.append(int(float(held[0])) >> 20)
        if len(tally.memory) % 12 == 1:
            minute, answers = len(tally.memory) // 12, sum(tally.outcomes.values())
            print(f"minute {minute}: {tally.memory[-1]} MiB, {answers} answers", file=sys.stderr)
        await asyncio.sleep(5)


def wait_until_ready(url: str) -> None:
    """Return once the server can answer; two minutes are long enough to load."""
    for _ in range(240):
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.5)
    sys.exit(f"{url} does not get ready")


async def main() -> int:
    """Run the clients, and print what happened; 1 if it was not meant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-good", action="store_true")
    parser.add_argument("--max-wait", type=float)
    parser.add_argument("--nonsense", type=int, default=0)
    given = parser.parse_args()
    wait_until_ready(given.url)
    tally, begin = Tally(), time.monotonic()

    async def client(number: int) -> None:
        rng = random.Random(given.seed * 1000 + number)
        limits = httpx.Timeout(600)
        async with httpx.AsyncClient(base_url=given.url, timeout=limits) as client:
            while time.monotonic() - begin < 60 * given.minutes:
                if number >= given.clients:
                    await nonsense(client, rng, tally)
                    continue
                await one(client, rng, tally, good=given.only_good, most=given.max_tokens)

    async with httpx.AsyncClient(base_url=given.url, timeout=600) as own:
        watching = asyncio.ensure_future(watch(own, tally))
        clients = [asyncio.ensure_future(client(n)) for n in range(given.clients + given.nonsense)]
        done, late = await asyncio.wait(clients, timeout=60 * given.minutes + LAST_SECONDS)
        for one_of_them in late:
            one_of_them.cancel()
        tally.outcomes["cut off at the end"] = len(late)
        for one_of_them in done:
            one_of_them.result()
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching  # what went wrong there
    seconds = time.monotonic() - begin
    print(json.dumps(report(tally, seconds) | {"clients": given.clients}, indent=1))
    late = given.max_wait is not None and quantile(tally.first, 0.99) > given.max_wait
    return int(late or not INTENDED.issuperset(tally.outcomes))


def report(tally: Tally, seconds: float) -> dict[str, Any]:
    """Figures of a run."""
    return {
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(tally.outcomes.items())),
        "tokens_per_second": round(tally.tokens / seconds, 2),
        "first_token_seconds": spread(tally.first),
        "between_chunks_seconds": spread(tally.gaps),
        "memory_mib": {"by_minute": tally.memory[::12], "most": max(tally.memory)},
    }


def quantile(values: list[float], share: float) -> float:
    """The value that this share of them does not pass; nan of none."""
    return sorted(values)[int(share * (len(values) - 1))] if values else math.nan


def spread(values: list[float]) -> dict[str, float] | None:
    """Median, 99th percentile and the largest."""
    at = {"p50": 0.5, "p99": 0.99, "most": 1.0}
    return {name: round(quantile(values, q), 3) for name, q in at.items()} if values else None


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
