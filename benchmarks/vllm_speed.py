"""What learning inside vLLM costs and brings by the clock: engines in turn, on one device.

    python benchmarks/vllm_speed.py --target TARGET --drafter EXPORT --out FOLDER --seconds 330

    python benchmarks/vllm_speed.py --out FOLDER --show        # the tables of what was measured

Where vLLM and ttspec are installed. Every arm is an engine of its own process; all get the same
requests of one kind (benchmarks/streams.py), and only one of them works at a time. `learned` learns
until `--learn` requests were answered, then it is paused and drafts on. Prints tokens a second over
those of `static`, with the middle 95 of 100 resamplings of turns; then what each part of the plugin
adds to a step, in short turns of one engine. `ttspec` is ttspec's own engine of 8 rows; `ttspec-1`
and `ttspec-32` have other rows, for the parts with so many requests at a time. They decode plainly,
with a static drafter and learning (the default of `ttspec serve`); `ttspec-32:plain` and so on is a
process that does one of these, which is ready sooner. Where no vLLM learns, all of the time goes
into 8, 1 and 32 requests at a time, in turn, arms in random order. With `--pin N` all
engines run on the same N cores near the GPU once they are warm: without it turns of one engine
differed by 1.4, whatever it did. With `--watch` those that learn answer one turn more after the
stream, in which each part of their learner is timed. Ends in order, with its tables, on SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from streams import stream

LEARNING = ("learning", "learned")
MODES = {
    "paused": "nothing of ttspec is in place",
    "still": "learning, nobody is read",
    "read": "all requests are read in every step, no updates",
}
"""What the plugin may do while its drafter stays the same."""
VLLM_ARMS = ("plain", "static", *LEARNING)
OURS = ("plain", "static", "learning")
SIZES = {1: 4, 32: 64}
"""Requests of a turn with so many at a time; else `--each`."""
RESAMPLED = 2000


class Switch:
    """A worker's extension besides ttspec's: what it does, part by part."""

    ttspec: Any

    def mode(self, name: str) -> None:
        """One of `MODES`: what the plugin does from now on, besides what it says of itself."""
        learner = self.ttspec.learner
        (self.ttspec.pause if name == "paused" else self.ttspec.resume)()
        learner.rounds_an_update = 1 << 60  # none of them updates
        learner.share._saved = 1.0 if name == "read" else -1e9

    def watch(self) -> None:
        """Time what the learner does from now on, part by part."""
        learner = self.ttspec.learner
        parts = [(learner, name) for name in PARTS]
        parts += [(learner.shared, "begin_update"), (learner.pieces, "tell")]
        self._times = {name: list[tuple[float, float]]() for _, name in parts}
        for owner, name in parts:
            setattr(owner, name, timed(getattr(owner, name), self._times[name]))
        self._watched = parts

    def times(self) -> dict[str, Any]:
        """Of each part how often, and milliseconds: the median and most, in all, of the CPU.

        No longer watches.
        """
        for owner, name in self._watched:
            delattr(owner, name)
        found = {name: list(zip(*times, strict=True)) for name, times in self._times.items()}
        return {
            name: [len(wall), *(round(1e3 * t, 3) for t in of(wall, cpu))]
            for name, (wall, cpu) in ((n, both) for n, both in found.items() if both)
        }


PARTS = ("forget", "keep_logits", "absorb", "_read_step", "_read_anew", "_tell", "finish")
"""Of an `EngineLearner`; some call others."""


def of(wall: tuple[float, ...], cpu: tuple[float, ...]) -> tuple[float, float, float, float]:
    """The median, the most, the sum, and the sum of the thread's own time."""
    return statistics.median(wall), max(wall), sum(wall), sum(cpu)


def timed(work: Any, times: list[tuple[float, float]]) -> Any:
    """The same function, which writes down what it took by the clock and by the thread's own."""

    def work_and_note(*args: Any, **kwargs: Any) -> Any:
        began, own = time.perf_counter(), time.thread_time()
        out = work(*args, **kwargs)
        times.append((time.perf_counter() - began, time.thread_time() - own))
        return out

    return work_and_note


def extension() -> type:
    """Both together; ttspec's is imported in the worker only."""
    from ttspec.vllm.control import Control

    return type("Both", (Control, Switch), {})


def __getattr__(name: str) -> Any:
    if name == "Both":
        return extension()
    raise AttributeError(name)


def learns(arm: str) -> bool:
    """Whether an engine has the plugin."""
    return arm in LEARNING


def engine_of(arm: str, a: argparse.Namespace) -> Any:
    """A vLLM engine."""
    from vllm import LLM  # type: ignore[import-not-found]

    options: dict[str, Any] = {}
    if arm != "plain":
        options["speculative_config"] = {
            "method": a.method,
            "model": str(a.drafter),
            "num_speculative_tokens": a.length,
        }
    if learns(arm):
        settings = a.learned_settings if arm == "learned" else a.settings
        options["additional_config"] = {"ttspec": json.loads(settings)}
        options["worker_extension_cls"] = "vllm_speed.Both"
    if a.eager:
        options["enforce_eager"] = True
    return LLM(
        a.target,
        dtype=a.dtype,
        max_model_len=1024,
        max_num_seqs=max(a.at_once),
        gpu_memory_utilization=0.12,
        kv_cache_memory_bytes=a.cache_mb << 20,
        **options,
    )


def serve_vllm(arm: str, a: argparse.Namespace, pipe: Connection) -> None:
    """Answer turns until the parent closes the pipe."""
    from vllm import SamplingParams  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    llm = engine_of(arm, a)
    engine, tokenizer, count = llm.llm_engine, llm.get_tokenizer(), 0

    def answer(job: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            for text in job["texts"]
        ]
        waiting = list(zip(job["numbers"], prompts, strict=True))[::-1]
        tokens = rounds = open_ = 0
        steps: list[float] = []
        began = last = time.perf_counter()
        while waiting or open_:
            while waiting and open_ < job["at_once"]:
                number, ids = waiting.pop()
                sampling = SamplingParams(
                    temperature=job["temperature"],
                    seed=number,
                    max_tokens=job["tokens"],
                    ignore_eos=job["ignore_eos"],
                    detokenize=False,  # ttspec's own engine writes no text meanwhile, either
                    output_kind=RequestOutputKind.DELTA,
                )
                count += 1
                engine.add_request(str(count), {"prompt_token_ids": ids}, sampling)
                open_ += 1
            for out in engine.step():
                new = len(out.outputs[0].token_ids)
                tokens, rounds = tokens + new, rounds + (new > 0)
                open_ -= out.finished
            now = time.perf_counter()
            steps.append(now - last)
            last = now
        usual = statistics.median(steps)
        return {
            "seconds": last - began,
            "tokens": tokens,
            "rounds": rounds,
            "steps": len(steps),
            "median_ms": 1e3 * usual,
            "beyond": sum(max(0.0, s - 2 * usual) for s in steps) / (last - began),
        }

    def ask(job: dict[str, Any]) -> Any:
        if "rpc" in job:
            return llm.collective_rpc(job["rpc"], args=tuple(job.get("args", ())))[0]
        return answer(job)

    handle(pipe, ask)


def serve_ours(arm: str, a: argparse.Namespace, pipe: Connection) -> None:
    """The same with ttspec's own engine; a job says which of its arms is meant."""
    from dataclasses import replace

    from traffic import SHARED, Arm

    import ttspec
    from ttspec.bench.arms import parse_arms
    from ttspec.config import GenerateConfig
    from ttspec.decoding.history import ChatHistory

    kind, _, only = arm.partition(":")
    rows = int(kind.partition("-")[2] or 8)
    engine = ttspec.load(
        a.ours_target, a.ours_drafter, dtype=a.dtype, compile=a.dtype == "bfloat16"
    )
    config = GenerateConfig(max_new_tokens=a.tokens, temperature=a.temperature, seed=0)
    template, warm = engine.chat_template(config), stream("science")[: 2 * rows]
    specs = parse_arms(f"plain,static-copy,{SHARED}")
    arms = {
        name: Arm(replace(spec, name=name), engine, config, rows, 160)
        for name, spec in zip(OURS, specs, strict=True)
        if only in ("", name)
    }
    for one in arms.values():  # what is met first is compiled and captured
        one.serve([ChatHistory(template).ask(text) for text in warm], 0)

    def ask(job: dict[str, Any]) -> Any:
        if job.get("rpc") == "freeze":
            arms["learned"] = arms["learning"].frozen("learned")
            return None
        prompts = [ChatHistory(template).ask(text) for text in job["texts"]]
        found = arms[job["arm"].partition(":")[2]].serve(prompts, job["numbers"][0])
        for key in ("tokens", "rounds"):  # the first one is a prompt's, which vLLM's arms count too
            found[key] += len(prompts)
        return found

    handle(pipe, ask)


def handle(pipe: Connection, ask: Any) -> None:
    """Answer what the parent asks, one job after the other."""
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(ask(pipe.recv()))


def child(arm: str, a: argparse.Namespace, pipe: Connection) -> None:
    """A process of an arm, with a group of its own, whose output goes to a file."""
    os.setpgrp()
    log = (a.out / f"{arm}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ.update(
        VLLM_CACHE_ROOT=str(a.cache / arm),
        VLLM_USE_V2_MODEL_RUNNER=str(int(a.runner == "V2")),
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        VLLM_USE_FLASHINFER_SAMPLER="0",
        TORCHINDUCTOR_COMPILE_THREADS="3",  # all arms compile at the same time
    )
    (serve_ours if arm.startswith("ttspec") else serve_vllm)(arm, a, pipe)


def end(process: BaseProcess) -> None:
    """Kill an arm: vLLM's engine is a child of it that would live on."""
    assert process.pid
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group yet
        process.kill()


def cores_near_gpu(count: int) -> set[int]:
    """So many of the cores that this process may use, others for each GPU of a host."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    cores = sorted(os.sched_getaffinity(0))
    try:
        from vllm.utils.import_utils import import_pynvml  # type: ignore[import-not-found]

        nvml = import_pynvml()
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(int(gpu))
        words = nvml.nvmlDeviceGetCpuAffinity(handle, cores[-1] // 64 + 1)
        cores = [core for core in cores if words[core // 64] >> core % 64 & 1] or cores
    except Exception as error:  # no GPU, or one that is named otherwise
        print(f"not known which cores are near the GPU: {error}", flush=True)
    first = count * int(gpu) if gpu.isdigit() else 0
    return set(cores[first : first + count] or cores[:count])


def pin(groups: Iterable[int | None], cores: set[int]) -> None:
    """Let all threads of some groups of processes run on these cores only."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) in groups:
                for thread in (folder / "task").iterdir():
                    os.sched_setaffinity(int(thread.name), cores)


class Arms:
    """The processes, and what they did."""

    def __init__(self, a: argparse.Namespace) -> None:
        """Nothing is started yet."""
        self.a, self.turns, self.pipes = a, list[dict](), dict[str, Connection]()
        self.began, self.requests = time.monotonic(), (stream(a.kind), stream("science"))
        self.file = (a.out / "turns.jsonl").open("w")

    def start(self, names: list[str]) -> None:
        """Start them all, and wait until each is ready; who fails is left out."""
        context, a = multiprocessing.get_context("spawn"), self.a
        pipes, processes = {}, {}
        for name in names:
            pipes[name], theirs = context.Pipe()
            processes[name] = context.Process(target=child, args=(name, a, theirs))
            processes[name].start()
            theirs.close()
        for name, pipe in pipes.items():
            try:
                if pipe.poll(max(1.0, a.start_seconds - self.passed)):
                    pipe.recv()
                    self.pipes[name] = pipe
            except EOFError:
                pass
            state = "ready" if name in self.pipes else "NOT READY"
            if name not in self.pipes:
                end(processes[name])
            print(f"{name}: {state} after {self.passed:.0f} s", flush=True)

    @property
    def passed(self) -> float:
        """Seconds since they were started."""
        return time.monotonic() - self.began

    def home(self, arm: str) -> str:
        """The process of an arm, which may be another's too; empty if there is none."""
        return next((n for n in (arm, arm.partition(":")[0]) if n in self.pipes), "")

    def ours(self, rows: int) -> list[str]:
        """The arms of ttspec's own engine with so many rows."""
        kind = "ttspec" if rows == 8 else f"ttspec-{rows}"
        return [f"{kind}:{name}" for name in OURS if self.home(f"{kind}:{name}")]

    def ask(self, arm: str, **job: Any) -> Any:
        """What an arm answers to a job; it is left out from then on if it ends."""
        home = self.home(arm)
        if not home:
            return None
        try:
            self.pipes[home].send({"arm": arm, **job})
            if not self.pipes[home].poll(self.a.patience):  # an engine that fails may never end
                raise EOFError
            return self.pipes[home].recv()
        except (EOFError, OSError):
            print(f"{arm} has ended", flush=True)
            del self.pipes[home]
            return None

    def turn(
        self, part: str, arm: str, numbers: list[int], label: str = "", **changes: Any
    ) -> None:
        """Let an arm answer requests, and write down how long it took, under another name maybe."""
        texts = [self.requests[part == "warm"][n] for n in numbers]
        job = {
            "at_once": 8,
            "tokens": self.a.tokens,
            "temperature": self.a.temperature,
            "ignore_eos": False,
            **changes,
        }
        found = self.ask(arm, texts=texts, numbers=numbers, **job)
        if found:
            self.turns.append({**found, "part": part, "arm": label or arm, "first": numbers[0]})
            self.file.write(json.dumps(self.turns[-1]) + "\n")
            self.file.flush()


def figures(turns: list[dict], part: str, arm: str, low: int = 0) -> str:
    """Tokens a second and a round, and over those of vLLM's arms that do not learn."""
    some = [t for t in turns if t["part"] == part and t["first"] >= low]
    own = {t["first"]: t for t in some if t["arm"] == arm}
    if not own:
        return "nothing measured"
    n, s, rounds = (sum(t[key] for t in own.values()) for key in ("tokens", "seconds", "rounds"))
    parts = [
        f"{n / max(s, 1e-9):7.0f} tokens/s, {n / max(rounds, 1):.3f} a round, {len(own)} turns"
    ]
    for base in ("static", "plain"):
        others = {t["first"]: t for t in some if t["arm"] == base}
        pairs = [(own[f], others[f]) for f in sorted(own.keys() & others.keys())]
        if pairs and base != arm:
            parts.append(f"over {base} {ratio_of(pairs)}")
    return "; ".join(parts)


def ratio_of(pairs: list[tuple[dict, dict]]) -> str:
    """Tokens a second over another arm's, of turns with the same requests."""

    def ratio(some: list[tuple[dict, dict]]) -> float:
        (n, s), (m, t) = (
            [sum(pair[i][key] for pair in some) for key in ("tokens", "seconds")] for i in (0, 1)
        )
        return n / s / (m / t)

    rng = random.Random(0)
    drawn = sorted(ratio(rng.choices(pairs, k=len(pairs))) for _ in range(RESAMPLED))
    low_, high = drawn[RESAMPLED // 40], drawn[-RESAMPLED // 40]
    return f"{ratio(pairs):.3f} [{low_:.3f}, {high:.3f}]"


def measure(arms: Arms, names: list[str], a: argparse.Namespace) -> None:
    """All parts, as far as the time goes."""
    end = a.seconds - 5
    for name in names:  # what is met first is not measured; ttspec's own engine has met it
        for at_once in a.at_once if ":" not in name else ():
            arms.turn("warm", name, list(range(at_once)), at_once=at_once, tokens=32)
    for name in names:
        if learns(name):
            print(f"{name}:", json.dumps(arms.ask(name, rpc="ttspec_status")), flush=True)
    if a.pin:
        cores = cores_near_gpu(a.pin)
        pin([p.pid for p in multiprocessing.active_children()], cores)
        print(f"all engines on cores {sorted(cores)}", flush=True)
    print(f"warm after {arms.passed:.0f} s", flush=True)
    others = [n for n in names if ":" not in n]
    if not any(map(learns, names)):
        measure_loads(arms, others, a.at_once, end)
        return
    main_end = arms.passed + (end - arms.passed) * a.stream_part
    last = time.monotonic()
    for turn, first in enumerate(range(0, min(600 - a.each, a.requests), a.each)):
        if arms.passed + (time.monotonic() - last) > main_end:
            break
        last = time.monotonic()
        if first >= a.learn and first - a.each < a.learn:
            if "learned" in names:
                print("learned:", json.dumps(arms.ask("learned", rpc="ttspec_pause")), flush=True)
            if "ttspec" in arms.pipes:
                arms.ask("ttspec:learning", rpc="freeze")
                arms.turn("warm", "ttspec:learned", list(range(8)))
                names = [*names, "ttspec:learned"]
        for name in names if turn % 2 else names[::-1]:
            arms.turn("stream", name, list(range(first, first + a.each)))
            if learns(name) and arms.turns and arms.turns[-1]["arm"] == name:
                arms.turns[-1]["status"] = found = arms.ask(name, rpc="ttspec_status")
                arms.file.write(json.dumps({"status": found, "arm": name, "first": first}) + "\n")
    print(f"stream over after {arms.passed:.0f} s", flush=True)
    for name in filter(learns, names) if a.watch else ():
        arms.ask(name, rpc="watch")
        arms.turn("watched", name, [(a.requests + n) % 600 for n in range(a.each)])
        steps = arms.turns[-1].get("steps") if arms.turns else None
        print(f"{name}, what its parts took in {steps} steps: times, ms: median, most, all, of CPU")
        for part, found in (arms.ask(name, rpc="times") or {}).items():
            print(f"  {part:18s} {found}")
    show(arms.turns, a)
    others_end = arms.passed + (end - arms.passed) * 0.4
    measure_loads(arms, others, [n for n in a.at_once if n != 8], others_end)
    if "learning" in names:
        measure_modes(arms, end)


def measure_loads(arms: Arms, others: list[str], loads: list[int], end: float) -> None:
    """So many requests at a time, one load after the other; arms in an order of their own.

    `others` are arms of vLLM; ttspec's own engines have as many rows as requests at a time.
    """
    rng = random.Random(0)
    for number in itertools.count():
        if arms.passed >= end or not loads or not arms.pipes:
            return
        for at_once in loads:
            names = others + arms.ours(at_once)
            rng.shuffle(names)
            size = SIZES.get(at_once, arms.a.each)
            numbers = [(number * size + n) % 600 for n in range(size)]
            part = "stream" if at_once == 8 else f"{at_once} at a time"
            for name in names:
                if arms.passed >= end or not arms.pipes:
                    return
                arms.turn(part, name, numbers, at_once=at_once)


def measure_modes(arms: Arms, end: float) -> None:
    """What each part of the plugin adds to a step: short turns of one engine, in random order.

    An engine is slower for some turns after another has worked, so no order may be the rule.
    """
    order = [*MODES, "static"] if "static" in arms.pipes else list(MODES)
    rng = random.Random(0)
    for number in range(0, 1 << 20, 8):
        rng.shuffle(order)
        for name in order:
            if arms.passed >= end:
                return
            arm = "static" if name == "static" else "learning"
            if arm == "learning":
                arms.ask(arm, rpc="mode", args=[name])
            numbers = [(number + n) % 600 for n in range(8)]
            same = {"tokens": 64, "temperature": 0.0, "ignore_eos": True}
            arms.turn("modes", arm, numbers, f"mode {name}", **same)


def show(turns: list[dict], a: argparse.Namespace) -> None:
    """The tables."""
    names = list(dict.fromkeys(t["arm"] for t in turns if t["part"] == "stream"))
    for low in (0, a.learn):
        print(f"8 at a time, requests from {low} on")
        for name in names:
            print(f"  {name:20s} {figures(turns, 'stream', name, low)}")
    show_steps(turns)
    show_modes(turns)
    for at_once in (1, 32):
        print(f"{at_once} at a time")
        part = f"{at_once} at a time"
        for name in dict.fromkeys(t["arm"] for t in turns if t["part"] == part):
            print(f"  {name:20s} {figures(turns, part, name)}")


def show_modes(turns: list[dict]) -> None:
    """The usual step of each mode, and over paused, of turns of the same requests."""
    steps = {(t["arm"].removeprefix("mode "), t["first"]): t for t in turns if t["part"] == "modes"}
    print("one engine, 8 at a time, greedy, 64 tokens: the usual step; median of neighbours")
    rng = random.Random(0)
    for name, does in {**MODES, "static": "another engine, which never learned"}.items():
        own = {first: t["median_ms"] for (arm, first), t in steps.items() if arm == name}
        others = {f: steps["paused", f]["median_ms"] for f in own if ("paused", f) in steps}
        if ratios := [own[f] / other for f, other in others.items()]:
            draws = (
                statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLED)
            )
            low, *_, high = statistics.quantiles(draws, n=40)
            usual, ratio = statistics.median(own.values()), statistics.median(ratios)
            print(
                f"  {name:8s} {usual:.3f} ms, {ratio:.4f} [{low:.4f}, {high:.4f}] of paused, "
                f"{len(ratios)} pairs: {does}"
            )


def show_steps(turns: list[dict]) -> None:
    """What a step takes, as the front end sees it; and what `learning` did, turn by turn."""
    print("steps of the stream, 8 at a time")
    stream_turns = [t for t in turns if t["part"] == "stream" and "steps" in t]
    for name in dict.fromkeys(t["arm"] for t in stream_turns):
        some = [t for t in stream_turns if t["arm"] == name]
        n, s = (sum(t[key] for t in some) for key in ("steps", "seconds"))
        usual = statistics.median(t["median_ms"] for t in some)
        beyond = statistics.mean(t["beyond"] for t in some)
        print(
            f"  {name:16s} {1e3 * s / n:6.3f} ms a step, {usual:6.3f} the median; in steps of more "
            f"than twice that, {beyond:.3f} of the time is beyond it"
        )
    print("learning by turns, beside static: first request, tokens a second, tokens a round")
    static = {t["first"]: t for t in stream_turns if t["arm"] == "static"}
    for t in sorted(stream_turns, key=lambda t: t["arm"]):
        if t["arm"].startswith("learning") and t["first"] in static:
            other, found = static[t["first"]], t.get("status") or {}
            speed, length = (
                t["tokens"] / t[key] / (other["tokens"] / other[key])
                for key in ("seconds", "rounds")
            )
            keys = ("updates", "share", "share_of_reading", "device_ms_an_update")
            keys += ("accepted_to_anchor", "anchor_drafts")
            facts = ", ".join(f"{k} {found[k]:.4g}" for k in keys if k in found)
            print(f"  {t['arm']:12s} {t['first']:4d} {speed:.3f} {length:.3f}  {facts}")


def leave(*_: object) -> None:
    """End in order; `timeout` sends its signal twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", help="its folder")
    parser.add_argument("--drafter", type=Path, help="what `ttspec export` wrote")
    parser.add_argument("--method", default="eagle3")
    parser.add_argument("--length", type=int, default=3, help="tokens drafted a round")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/vllm-cache"))
    parser.add_argument("--seconds", type=float, default=330.0, help="in all")
    parser.add_argument("--start-seconds", type=float, default=150.0)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds of a turn, at most")
    parser.add_argument("--arms", default=",".join((*VLLM_ARMS, "ttspec")))
    parser.add_argument("--kind", default="code")
    parser.add_argument(
        "--watch", action="store_true", help="time parts of the learner in a turn after the stream"
    )
    parser.add_argument("--each", type=int, default=32, help="requests of a turn")
    parser.add_argument("--requests", type=int, default=600, help="of the stream, at most")
    parser.add_argument("--stream-part", type=float, default=0.58, help="of the time, at most")
    parser.add_argument("--learn", type=int, default=192, help="requests until `learned` pauses")
    parser.add_argument("--at-once", type=int, nargs="+", default=[8, 1, 32])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--settings", default="{}", help="of ttspec, as JSON")
    parser.add_argument("--learned-settings", default='{"share": 0.25}')
    parser.add_argument("--runner", choices=("V1", "V2"), default="V2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--cache-mb", type=int, default=2048)
    parser.add_argument("--pin", type=int, default=0, help="cores for all engines; 0: any")
    parser.add_argument("--ours-target", default="smollm2-135m")
    parser.add_argument("--ours-drafter", default="smollm2-135m-eagle3")
    parser.add_argument("--show", action="store_true", help="print the tables of --out again")
    a = parser.parse_args()
    if a.show:
        lines = [json.loads(line) for line in (a.out / "turns.jsonl").open()]
        turns = [line for line in lines if "part" in line]
        for line in lines:
            for t in turns if "part" not in line else ():
                if (t["part"], t["arm"], t["first"]) == ("stream", line["arm"], line["first"]):
                    t["status"] = line["status"]
        show(turns, a)
        return
    if not (a.target and a.drafter):
        parser.error("give --target and --drafter")
    a.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, leave)
    wanted = a.arms.split(",")
    arms = Arms(a)
    try:
        arms.start(wanted)
        names = [n for n in wanted if n in arms.pipes and not n.startswith("ttspec")]
        measure(arms, names + arms.ours(8), a)
        for name in names:
            if learns(name):
                print(f"{name}:", json.dumps(arms.ask(name, rpc="ttspec_status")), flush=True)
    finally:
        show(arms.turns, a)
        sys.stdout.flush()
        for process in multiprocessing.active_children():
            end(process)


if __name__ == "__main__":
    main()
