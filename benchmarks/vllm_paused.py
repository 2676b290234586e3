"""What the plugin adds to a step of vLLM while learning is paused: short stretches of one engine.

    python benchmarks/vllm_paused.py --target TARGET --drafter EXPORT --out FOLDER --seconds 170

8 requests write on and on. Before each stretch of steps a call of the worker says what holds:
`paused` (nothing of ttspec is in place), `idle` (all hooks are in place, and none reads), and
`again` (as paused, which shows what such a comparison finds between equals). All three, in an order
of their own, are a cycle. Prints each one's usual step, and the median over cycles of the ratio to
`paused`, with the middle 95 of 100 resamplings. Ends in order, with its table, on SIGTERM. Updates
are neither made nor captured, which would take a minute of the start. With `--after FILE` it begins
when that file is there, so that it can start beside another benchmark and measure after it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from streams import stream

MODES = {
    "paused": "nothing of ttspec is in place",
    "idle": "all hooks are in place, none reads",
    "again": "as paused",
}
ROWS, WARM, TIMED = 8, 4, 12
"""Requests at a time; steps of a stretch that are not timed, and those that are."""
RESAMPLED = 2000


class Modes:
    """A worker's extension besides ttspec's."""

    ttspec: Any

    def mode(self, name: str) -> bool:
        """One of `MODES` from now on; whether hooks are in place."""
        self.ttspec.pause()
        if name == "idle":
            self.ttspec._hook()
        return bool(self.ttspec._hooks)


def extension() -> type:
    """Both together, in the worker, where updates are not captured."""
    from ttspec.vllm import capturing
    from ttspec.vllm.control import Control

    capturing._capture = lambda *_: None
    return type("Both", (Control, Modes), {})


def __getattr__(name: str) -> Any:
    if name == "Both":
        return extension()
    raise AttributeError(name)


class Engine:
    """vLLM with 8 requests that never end for long."""

    def __init__(self, a: argparse.Namespace) -> None:
        """Start it, and let it write a while."""
        from vllm import LLM  # type: ignore[import-not-found]

        speculative = {
            "method": a.method,
            "model": str(a.drafter),
            "num_speculative_tokens": a.length,
        }
        self.llm = LLM(
            a.target,
            dtype=a.dtype,
            max_model_len=1024,
            max_num_seqs=ROWS,
            gpu_memory_utilization=0.12,
            kv_cache_memory_bytes=a.cache_mb << 20,
            enforce_eager=a.eager,
            speculative_config=speculative,
            additional_config={"ttspec": {}},
            worker_extension_cls="vllm_paused.Both",
        )
        while a.after and not a.after.exists():
            time.sleep(0.2)
        tokenizer = self.llm.get_tokenizer()
        self._prompts = itertools.cycle(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            for text in stream("code")
        )
        self._asked = self._open = 0
        for _ in range(10):
            self.step()

    def step(self) -> float:
        """Seconds of one step; a request that ended is followed by another."""
        from vllm import SamplingParams  # type: ignore[import-not-found]
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

        while self._open < ROWS:
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=600 + 25 * (self._asked % ROWS),  # so they do not all end at once
                ignore_eos=True,
                output_kind=RequestOutputKind.DELTA,
            )
            ids = {"prompt_token_ids": next(self._prompts)}
            self.llm.llm_engine.add_request(str(self._asked), ids, sampling)
            self._asked, self._open = self._asked + 1, self._open + 1
        began = time.perf_counter()
        self._open -= sum(out.finished for out in self.llm.llm_engine.step())
        return time.perf_counter() - began

    def stretch(self, mode: str) -> float:
        """Milliseconds of the usual step in a mode."""
        hooked = self.llm.collective_rpc("mode", args=(mode,))[0]
        assert hooked == (mode == "idle")
        for _ in range(WARM):
            self.step()
        return 1e3 * statistics.median(self.step() for _ in range(TIMED))


def show(cycles: list[dict[str, float]]) -> None:
    """The table."""
    rng = random.Random(0)
    print(f"{len(cycles)} cycles of {TIMED} steps each, {ROWS} requests at a time, greedy")
    for name, does in MODES.items() if cycles else ():
        ratios = [cycle[name] / cycle["paused"] for cycle in cycles]
        draws = [statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLED)]
        low, *_, high = statistics.quantiles(draws, n=40)
        usual = statistics.median(cycle[name] for cycle in cycles)
        ratio = statistics.median(ratios)
        print(f"  {name:7s} {usual:.3f} ms, {ratio:.4f} [{low:.4f}, {high:.4f}] of paused: {does}")
    sys.stdout.flush()


def main() -> None:
    """Read the command line, measure, print."""
    from vllm_speed import cores_near_gpu, leave, pin

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="its folder")
    parser.add_argument("--drafter", type=Path, required=True, help="what `ttspec export` wrote")
    parser.add_argument("--method", default="eagle3")
    parser.add_argument("--length", type=int, default=3, help="tokens drafted a round")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=170.0, help="in all")
    parser.add_argument("--after", type=Path, help="a file to wait for, once the engine is ready")
    parser.add_argument("--cycles", type=int, default=1000, help="at most")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--cache-mb", type=int, default=1024)
    parser.add_argument("--pin", type=int, default=0, help="cores for all of it; 0: any")
    a = parser.parse_args()
    began = time.monotonic()
    a.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, leave)
    engine = Engine(a)
    if a.pin:
        cores = cores_near_gpu(a.pin)
        pin([os.getpgrp()], cores)
        print(f"all on cores {sorted(cores)}", flush=True)
    print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
    cycles: list[dict[str, float]] = []
    orders = itertools.cycle(itertools.permutations(MODES))
    try:
        with (a.out / "cycles.jsonl").open("w") as file:
            while time.monotonic() - began < a.seconds and len(cycles) < a.cycles:
                cycles.append({mode: engine.stretch(mode) for mode in next(orders)})
                file.write(json.dumps(cycles[-1]) + "\n")
                file.flush()
    finally:
        show(cycles)


if __name__ == "__main__":
    main()
