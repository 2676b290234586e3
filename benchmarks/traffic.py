"""Tokens a second over one long stream of requests, arms in turn, as servers of their own would.

    python benchmarks/streams.py FOLDER
    python benchmarks/traffic.py FOLDER/code.jsonl --out code.jsonl --arms plain,static-copy,...

Every arm keeps one decoder for the whole stream, so nothing is captured twice and what is learned
stays; arms take turns each `--each` requests. The last requests, two a row, only warm up. An arm
named `frozen` begins after half of the stream: the drafter that the last arm has learned by then,
which learns no more. Prints tokens a second over those of the first two arms, of all turns (with
the middle 95 of 100 resamplings) and of each quarter. Texts of arms may differ in bfloat16.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
from cyclopts import App, Parameter
from matplotlib.figure import Figure

import ttspec
from ttspec.bench import plot_style
from ttspec.bench.arms import ArmSpec, parse_arms
from ttspec.bench.suites import load_suite
from ttspec.config import GenerateConfig
from ttspec.decoding.conversation import Request
from ttspec.decoding.engine import Engine
from ttspec.decoding.history import ChatHistory
from ttspec.decoding.scheduler import Scheduler
from ttspec.heap import freeze_heap

SHARED = "learn-shared[copy=true,context=auto,adaptive=true]"
PARTS, RESAMPLED = 4, 2000
LABELS = {
    "plain": "plain decoding",
    "static-copy": "static drafter",
    "learn-shared": "drafter that learns",
    "frozen": "what it learned, kept",
}
app = App(help=__doc__)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Setup:
    """Who answers the requests, and how."""

    target: str = "smollm2-135m"
    drafter: str = "smollm2-135m-eagle3"
    rows: int = 8
    max_new_tokens: int = 200
    temperature: float = 0.7
    dtype: str = "bfloat16"
    compile: bool = True

    def load(self, suite: str, requests: int) -> tuple[Engine, GenerateConfig, list[list[int]]]:
        """The pair, the options of all arms, and the prompts of a suite's first requests."""
        engine = ttspec.load(self.target, self.drafter, dtype=self.dtype, compile=self.compile)
        limits = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        config = GenerateConfig(**limits, seed=0)
        template = engine.chat_template(config)
        asked = list(load_suite(suite).requests)[:requests]
        return engine, config, [ChatHistory(template).ask(turns[0]) for turns in asked]


class Arm:
    """A decoder that serves the stream for itself."""

    def __init__(
        self, spec: ArmSpec, engine: Engine, config: GenerateConfig, rows: int, longest: int
    ) -> None:
        self.spec, self.name = spec, spec.name
        self.config = replace(config, draft=spec.draft, learn=spec.learn)
        self.engine, self.rows, self.longest = engine.sibling(), rows, longest
        self.decoder = self.engine.decoder(self.config, rows, longest, sessions=False)
        self.scheduler = Scheduler(self.decoder, self.config, stream=False)

    def serve(self, prompts: list[list[int]], first: int) -> dict[str, Any]:
        """Answer requests, the first of which has this number."""
        for number, ids in enumerate(prompts, first):
            self.scheduler.add_request(Request(ids=ids, seed=number))
        results = []

        def run() -> None:
            while self.scheduler.has_unfinished():
                results.extend(c.result for _, c in self.scheduler.step() if c.result)

        seconds = common.timed(self.engine.target.device, run)
        rounds = [r for result in results for r in result.rounds]
        learner = self.decoder.learner
        return {
            "arm": self.name,
            "first": first,
            "seconds": seconds,
            "tokens": sum(r.emitted for r in rounds),
            "rounds": len(rounds),
            "drafted": sum(r.proposed > 0 and not r.copied for r in rounds),
            "drafts": sum(r.proposed for r in rounds if not r.copied),
            "copied": sum(r.copied for r in rounds),
            "updates": int(learner.weights._steps[0]) if learner else 0,
            "strides": learner.strides if learner else 0,
        }

    def frozen(self, name: str) -> Arm:
        """An arm that drafts with what this one has learned."""
        learner, engine = self.decoder.learner, self.engine
        assert learner
        assert engine.drafter
        drafter = copy.copy(engine.drafter)
        learned = learner.weights.averaged()
        drafter.weights = drafter.weights | {n: w.clone() for n, w in learned.items()}
        spec = replace(self.spec, name=name, learn=None)
        return Arm(spec, engine.with_drafter(drafter), self.config, self.rows, self.longest)


@app.default
def run(
    suite: str,
    *,
    out: Path,
    setup: Setup = Setup(),
    arms: str = f"plain,static-copy,{SHARED}",
    requests: int = 600,
    each: int = 50,
    minutes: float = 8.0,
) -> None:
    """Serve a suite's first requests; stops early when the minutes are over."""
    began = time.monotonic()
    names = arms.removesuffix(",frozen")
    engine, config, prompts = setup.load(suite, requests)
    longest, warm = max(map(len, prompts)), prompts[-2 * setup.rows :]
    del prompts[-2 * setup.rows :]
    serving = [Arm(spec, engine, config, setup.rows, longest) for spec in parse_arms(names)]
    for arm in serving:  # what is met first is not captured in a turn
        arm.serve(warm, len(prompts))
    freeze_heap()  # as the commands do
    turns: list[dict[str, Any]] = []
    with out.open("w", encoding="utf-8") as file:
        for first in range(0, len(prompts), each):
            if names != arms and first >= len(prompts) // 2 and serving[-1].name != "frozen":
                serving.append(serving[-1].frozen("frozen"))
                serving[-1].serve(warm, len(prompts))
            if time.monotonic() - began > 60 * minutes:
                break
            for arm in serving:
                turns.append(arm.serve(prompts[first : first + each], first))
                file.write(json.dumps(turns[-1]) + "\n")
    show(out)


@app.command
def show(path: Path, *, plot: Path | None = None) -> None:
    """The table of what a run wrote; and a `plot` of tokens a second by request."""
    turns = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if plot:
        draw(turns).savefig(plot, dpi=130)
    arms = list(dict.fromkeys(turn["arm"] for turn in turns))
    firsts = sorted({turn["first"] for turn in turns})
    found = {(turn["arm"], turn["first"]): turn for turn in turns}
    for arm in arms:
        own = [found[arm, f] for f in firsts if (arm, f) in found]
        length = sum(t["tokens"] for t in own) / sum(t["rounds"] for t in own)
        print(
            f"{arm}: {speed(own):.0f} tokens/s, {length:.3f} a round, {own[-1]['updates']} updates"
        )
        for base in arms[:2]:
            if base != arm:
                parts = " ".join(ratios(found, arm, base, firsts))
                print(f"  over {base}: {parts}")


@plot_style.styled
def draw(turns: list[dict[str, Any]]) -> Figure:
    """Tokens a second of each turn, a line an arm; a turn takes some seconds."""
    figure, (axes,) = plot_style.panels(1, height=3.4)
    figure.set_size_inches(7.2, 3.4)
    arms = list(dict.fromkeys(turn["arm"] for turn in turns))
    kinds, colours = [arm.partition("[")[0] for arm in arms], plot_style.colours(arms)
    for arm, kind in zip(arms, kinds, strict=True):
        own = [turn for turn in turns if turn["arm"] == arm]
        speeds = [turn["tokens"] / turn["seconds"] for turn in own]
        name = LABELS.get(kind, kind) if kinds.count(kind) == 1 else arm
        axes.plot([turn["first"] for turn in own], speeds, label=name, color=colours[arm])
    axes.set(xlabel="requests answered before", ylabel="tokens a second")
    axes.set(xlim=(0, None), ylim=(0, None))
    plot_style.legend(figure, axes, columns=4)
    return figure


def speed(turns: Iterable[dict[str, Any]]) -> float:
    """Tokens a second."""
    tokens, seconds = zip(*((turn["tokens"], turn["seconds"]) for turn in turns), strict=True)
    return sum(tokens) / sum(seconds)


def ratio(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """The speed of the first of each over that of the second."""
    ours, theirs = zip(*pairs, strict=True)
    return speed(ours) / speed(theirs)


def ratios(
    found: dict[tuple[str, int], dict[str, Any]], arm: str, base: str, firsts: list[int]
) -> Iterator[str]:
    """Speed over another arm's, of all turns and of each part of the stream."""
    met = (f for f in firsts if (arm, f) in found and (base, f) in found)
    both = [(found[arm, f], found[base, f]) for f in met]
    size = max(1, len(firsts) // PARTS)

    yield f"{ratio(both):.3f} {common.middle_95(ratio, both, RESAMPLED)} |"
    for at in range(0, len(both), size):
        yield f"{ratio(both[at : at + size]):.3f}"


if __name__ == "__main__":
    common.main(app)
