"""What the plugin's work for vLLM takes, host and device, without vLLM: on a GPU, one process.

    python benchmarks/vllm_hooks.py            # --compile: updates compiled, as where vLLM compiles

The bundled EAGLE-3 of SmolLM2 with a random table for the target's, 8 requests, 3 drafts, bfloat16.
The steps are made up, and the device sleeps 3 ms in each, as it would work for an engine. First
operation by operation, then by CUDA graphs: of each kind of work microseconds of the host, by its
clock, and milliseconds from before it to after it on the device, of its stream.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import ttspec
from ttspec.drafters.checkpoint import load_drafter
from ttspec.vllm.settings import Settings
from ttspec.vllm.steps import EngineLearner
from ttspec.vllm.verified import EngineStep, on_device

ROWS, DRAFTS, PROMPT, STEPS, BUSY = 8, 3, 60, 240, 3e-3
DRAFTER = Path(ttspec.__file__).parent / "drafters/bundled/smollm2-135m-eagle3"


class Clock:
    """Times of kinds of work."""

    def __init__(self) -> None:
        self.host = defaultdict[str, list[float]](list)
        self.device = defaultdict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]](list)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time what is done within."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        began = time.perf_counter()
        yield
        self.host[name].append(1e6 * (time.perf_counter() - began))
        end.record()
        self.device[name].append((begin, end))

    def show(self) -> None:
        """A line for each."""
        torch.cuda.synchronize()
        for name, host in self.host.items():
            device = statistics.median(begin.elapsed_time(end) for begin, end in self.device[name])
            low, *_, high = statistics.quantiles(host, n=10)
            print(
                f"  {name:24s} {len(host):4d} times; host us: median {statistics.median(host):7.0f}"
                f", middle 80 % {low:.0f} to {high:.0f}, most {max(host):.0f}, first {host[0]:.0f};"
                f" device ms: median {device:.3f}"
            )


class Engine:
    """Steps as vLLM would tell them."""

    def __init__(self) -> None:
        """Random tensors; they stay what they are."""
        device = torch.device("cuda")
        shape = ROWS * (DRAFTS + 1), 49_152
        self.logits = torch.randn(shape, device=device, dtype=torch.bfloat16)
        self.features = [
            torch.randn(256, 576, device=device, dtype=torch.bfloat16) for _ in range(3)
        ]
        self.tokens = torch.randint(0, 49_000, (256,), device=device, dtype=torch.int32)
        self.emitted = torch.full((ROWS,), 2, device=device, dtype=torch.int32)
        self.positions = torch.arange(256, device=device)

    def step(self, ids: list[str], at: int, size: int, drafts: int) -> EngineStep:
        """One of requests that all read `size` tokens from position `at` on."""
        n = len(ids)
        return EngineStep(
            ids=list(ids),
            bounds=[size * i for i in range(n + 1)],
            drafts=[drafts] * n,
            ends=[at + size] * n,
            tokens=self.tokens,
            positions=self.positions[at : at + size].repeat(n),
            features=self.features,
            emitted=self.emitted[:n],
        )


def work(learner: EngineLearner, clock: Clock, cycles: int) -> None:
    """Prompts, rounds, requests that end and others that come, updates."""
    engine, ids = Engine(), [f"request-{n}" for n in range(ROWS)]
    for one in ids:
        with clock.timed("a prompt"):
            learner.absorb(engine.step([one], 0, PROMPT, 0))
    for number in range(STEPS):
        torch.cuda._sleep(cycles)
        step = engine.step(ids, PROMPT + number % 100, DRAFTS + 1, DRAFTS)
        is_last = learner.rounds.kept == learner.rounds.rounds - 1
        with clock.timed("a round: logits kept"):
            learner.keep_logits(step.ids, step.drafts, engine.logits)
        with clock.timed("a round: the rest" + ", told" * is_last):
            learner.absorb(step)
        with clock.timed("indices to the device"):
            on_device([1] * 48, learner.device)
        if number % 24 == 20:
            with clock.timed("a request ends"):
                learner.forget(ids[:1])
            ids[0] += "+"
            with clock.timed("a prompt, rounds told"):
                learner.absorb(engine.step(ids[:1], 0, PROMPT, 0))
        if number > 60 and number % 8 == 0:
            with clock.timed("an update begins"):
                learner.shared.begin_update()
        if learner.shared.is_updating:
            with clock.timed("an update: is it over?"):
                learner.shared.publish()
        if number % 8 == 7:  # the host is never far ahead of an engine's device
            torch.cuda.synchronize()


def main() -> None:
    """Both ways, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", action="store_true")
    a = parser.parse_args()
    drafter = load_drafter("eagle3", DRAFTER)
    table = torch.randn(49_152, 576, device="cuda", dtype=torch.bfloat16) * 0.05
    drafter.bind(table, table, 30)
    cycles = 1_000_000
    torch.cuda.synchronize()
    began = time.perf_counter()
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    cycles = int(cycles * BUSY / (time.perf_counter() - began))
    for captured in (False, True):
        learner, clock = EngineLearner(Settings(), drafter, DRAFTS, lambda _: None), Clock()
        with torch.inference_mode(False), torch.no_grad():
            if captured:
                began, held = time.monotonic(), torch.cuda.memory_reserved()
                needed = learner.memory_of_update()
                learner.capture(compile=a.compile)
                took = time.monotonic() - began, (torch.cuda.memory_reserved() - held) / 1e6
                print(f"captured in {took[0]:.1f} s: {took[1]:.0f} MB, of {needed / 1e6:.0f}")
            learner.share.share = 1.0
            learner.rounds_an_update = 1 << 30  # it begins no update by itself
            work(learner, clock, cycles)
            torch.cuda.synchronize()
            learner.finish()
        device = 1e3 * learner.shared.seconds
        print("by graphs" if captured else "operation by operation", end=": ")
        print(f"{learner.shared.updates} updates, the last one {device:.2f} ms on the device")
        clock.show()


if __name__ == "__main__":
    main()
