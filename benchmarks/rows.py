"""Tokens a second of arms with several numbers of rows, all on one device, in turns.

    python benchmarks/streams.py FOLDER
    python benchmarks/rows.py run FOLDER/code-long.jsonl --out rows.jsonl --row-counts 4,16,32
    python benchmarks/rows.py show rows.jsonl

Every arm of every number of rows is a process, so all get ready side by side; then they take turns
in random order, each the next requests of the stream. An arm that ends in `@FOLDER` is that of
another checkout. Those that are not ready in time are left out, and said.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import common
import traffic
from cyclopts import App

from ttspec.bench.arms import parse_arms
from ttspec.heap import freeze_heap

ARMS = f"plain;static;static-copy[adaptive=true];{traffic.SHARED}"
LEAST, EACH = 24, 4
"""Requests of a turn: at least so many, and so many times the rows."""
app = App(help=__doc__)


@app.command
def run(
    suite: str,
    *,
    out: Path,
    row_counts: str = "4,16,32",
    arms: str = ARMS,
    setup: traffic.Setup = traffic.Setup(),
    requests: int = 2990,
    ready: float = 300,
    seconds: float = 100,
) -> None:
    """Measure, for so many seconds after those in which arms may get ready; arms between `;`."""
    began, serving = time.monotonic(), dict[tuple[int, str], subprocess.Popen[str]]()
    command = [sys.executable, __file__, "serve", suite, f"--requests={requests}"]
    options = ["--compile" if setup.compile else "--no-compile"]
    for name in ("target", "drafter", "max_new_tokens", "temperature", "dtype"):
        options.append(f"--{name.replace('_', '-')}={getattr(setup, name)}")
    for many in map(int, row_counts.split(",")):
        for arm in arms.split(";"):
            name, _, tree = arm.partition("@")
            own = {"PYTHONPATH": f"{tree}/src{os.pathsep}{tree}/benchmarks"} if tree else {}
            serving[many, arm] = subprocess.Popen(
                [*command, *options, f"--rows={many}", f"--arm={name}"],
                env=os.environ | own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
    waits = {key: Thread(target=one.stdout.readline) for key, one in serving.items() if one.stdout}
    for wait in waits.values():
        wait.daemon = True
        wait.start()
    for wait in waits.values():
        wait.join(max(0.0, began + ready - time.monotonic()))
    late = [key for key, wait in waits.items() if wait.is_alive() or serving[key].poll()]
    for key in late:
        serving.pop(key).kill()
        print(f"not ready: {key[1]} with {key[0]} rows")
    try:
        with out.open("w", encoding="utf-8") as file:
            for turn in take_turns(serving, requests, time.monotonic() + seconds):
                file.write(json.dumps(turn) + "\n")
    finally:
        for one in serving.values():
            one.kill()
    show(out)


def take_turns(
    serving: dict[tuple[int, str], subprocess.Popen[str]], requests: int, end: float
) -> Iterator[dict[str, Any]]:
    """What arms did, turn by turn."""
    rng, first = random.Random(0), dict.fromkeys((rows for rows, _ in serving), 0)
    while time.monotonic() < end:
        for rows in first:
            each = max(LEAST, EACH * rows)
            if first[rows] + each > requests - 2 * rows:
                return
            for key in rng.sample(list(serving), len(serving)):
                if key[0] == rows:
                    process = serving[key]
                    assert process.stdin
                    assert process.stdout
                    print(first[rows], each, file=process.stdin, flush=True)
                    turn = json.loads(process.stdout.readline())
                    yield turn | {"arm": key[1], "rows": rows}
            first[rows] += each


@app.command
def serve(suite: str, *, arm: str, requests: int, setup: traffic.Setup = traffic.Setup()) -> None:
    """Be one arm: get ready, say so, then read "FIRST COUNT" and print what such a turn did."""
    engine, config, prompts = setup.load(suite, requests)
    longest, warm = max(map(len, prompts)), prompts[-2 * setup.rows :]
    (spec,) = parse_arms(arm)
    one = traffic.Arm(spec, engine, config, setup.rows, longest)
    one.serve(warm, len(prompts))
    freeze_heap()  # as the commands do
    print("ready", flush=True)
    for line in sys.stdin:
        first, count = map(int, line.split())
        print(json.dumps(one.serve(prompts[first : first + count], first)), flush=True)


@app.command
def show(path: Path) -> None:
    """The table of what a run wrote: each arm over plain, static and another checkout's."""
    turns = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for rows in sorted({turn["rows"] for turn in turns}):
        print(f"{rows} rows")
        found = {(t["arm"], t["first"]): t for t in turns if t["rows"] == rows}
        arms = sorted({arm for arm, _ in found})
        firsts = [f for f in sorted({f for _, f in found}) if all((a, f) in found for a in arms)]
        for arm in arms:
            own = [found[arm, first] for first in firsts]
            length = sum(t["tokens"] for t in own) / sum(t["rounds"] for t in own)
            line = f"  {arm:42} {traffic.speed(own):7.0f} tokens/s, {length:.3f} a round"
            line += f", {len(own)} turns"
            for base in arms:
                if base != arm and base.partition("@")[0] in ("plain", "static", arm):
                    pairs = [(found[arm, first], found[base, first]) for first in firsts]
                    between = common.middle_95(traffic.ratio, pairs, traffic.RESAMPLED)
                    line += f"; over {base} {traffic.ratio(pairs):.3f} {between}"
            print(line)


if __name__ == "__main__":
    common.main(app)
