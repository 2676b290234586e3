"""Compare the working tree with a revision before: the same texts and acceptance, and how fast.

    python benchmarks/compare_revisions.py BASE
    python benchmarks/compare_revisions.py BASE --speed

The same probe runs in one process for each tree, and the two answer the same cases by turns. Texts
and acceptance are compared on fixed seeds, for every bundled drafter; exit code 1 says that
something differs. `--speed` times pairs of equal requests instead, one by each tree. A case whose
options one of the trees does not know is left out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from cyclopts import App
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
DRAFTERS = ("smollm2-135m-dflash", "smollm2-135m-eagle3", "smollm2-135m-pard")
SEED = 7
LONG = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 16
PROMPTS = (
    "Count from one to forty in words.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Say the days of the week, again and again.",
)
FOLLOW_UP = "Now the same once more, backwards."
RESAMPLES = 2000
app = App(help=__doc__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing that both trees are asked for."""

    name: str
    drafter: str = "none"
    prompts: tuple[str, ...] = PROMPTS
    learn: dict[str, Any] | None = None
    """Fields of `LearnConfig`, or {"preset": "paper"}."""
    draft: dict[str, Any] = field(default_factory=dict)
    """Fields of `DraftConfig`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other fields of `GenerateConfig`."""
    turns: int = 0
    """Above 0: a `Session` of so many turns."""
    rows: int | None = None
    """Requests at a time (`Engine.run`); None is all of them (`Engine.generate`)."""


def text_cases(tokens: int, causal: str) -> Iterator[Case]:
    """What texts and acceptance are compared on.

    Args:
        tokens: Of the longest answers; of several together, each has a quarter of it.
        causal: Folder of a draft model.
    """

    def asked(name: str, prompts: int, share: int, temperature: float) -> dict[str, Any]:
        how = {"max_new_tokens": max(2, tokens // share), "temperature": temperature, "top_p": 0.95}
        return {"drafter": name, "prompts": PROMPTS[:prompts], "options": how}

    learn = {"stride": 3, "blocks": 4}
    for name in ("none", "ngram", *DRAFTERS, causal):
        short = Path(name).name.removeprefix("smollm2-135m-")
        one, whole = asked(name, 1, 2, 0.0), asked(name, 1, 1, 0.0)
        one_warm = asked(name, 1, 2, 0.7)
        three, three_warm = asked(name, 3, 4, 0.0), asked(name, 3, 4, 0.7)
        long = three_warm | {"prompts": (LONG, *PROMPTS[:2])}
        rejection = one_warm["options"] | {"acceptance": "rejection"}
        yield Case(name=f"{short} 1 row 0.7", **one_warm)
        yield Case(name=f"{short} 3 rows 0", **three)
        yield Case(name=f"{short} 2 rows, long prompt 0.7", rows=2, **long)
        if name in ("none", "ngram"):
            yield Case(name=f"{short} 1 row 0", **whole)
            yield Case(name=f"{short} 3 rows 0.7", **three_warm)
            yield Case(name=f"{short} session 0.7", turns=2, **three_warm)
            continue
        learns: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
            ("default 0", {}, whole),
            ("3 rows 0.7", learn, three_warm),
            ("session 0.7", learn | {"scope": "session"}, three_warm | {"turns": 2}),
            ("shared, 2 rows 0", learn | {"scope": "shared"}, three | {"rows": 2}),
            ("lora 3 rows 0", learn | {"weights": "lora"}, three),
            ("accepted rows 0", learn | {"supervision": "accepted"}, one),
            ("paper 0.7", {"preset": "paper"}, one_warm),
            ("window 16 0", learn, one | {"draft": {"window": 16}}),
            ("rebase 16 0", learn, one | {"draft": {"rebase": 16}}),
        ]
        yield Case(name=f"{short} rejection rule 0.7", **one_warm | {"options": rejection})
        for what, config, given in learns:
            yield Case(name=f"{short} learning: {what}", learn=config, **given)


def speed_cases(tokens: int, drafter: str, rows: int) -> Iterator[Case]:
    """What is timed: plain decoding, a drafter that does not learn, and one that does."""
    prompts = tuple(PROMPTS[i % len(PROMPTS)] for i in range(rows))
    options = {"max_new_tokens": tokens, "temperature": 0.7, "ignore_eos": True}
    shared: dict[str, Any] = {"prompts": prompts, "options": options, "drafter": drafter}
    plural = "" if rows == 1 else "s"
    yield Case(name=f"plain, {rows} row{plural}", **shared | {"draft": {"length": 0}})
    yield Case(name=f"static, {rows} row{plural}", **shared)
    yield Case(name=f"learning, {rows} row{plural}", learn={}, **shared)


# The probe: runs in the tree that PYTHONPATH names.


def probe() -> None:
    """Answer cases from standard input, one a line; the first line has the settings."""
    answers, sys.stdout = sys.stdout, sys.stderr  # a library's prints must not get among them
    settings = json.loads(sys.stdin.readline())
    import torch

    import ttspec
    from ttspec.errors import OptionError

    here, wanted = Path(str(ttspec.__file__)).resolve(), Path(settings["source"]).resolve()
    if wanted not in here.parents:
        raise SystemExit(f"ttspec was read from {here.parent}, not from {wanted}.")
    torch.set_num_threads(settings["threads"])
    engines: dict[str, Any] = {}
    for line in sys.stdin:
        case = json.loads(line)
        try:
            found = answer(case, engine_of(case["drafter"], engines, settings), settings["context"])
        except OptionError as error:  # an option that this tree does not have
            found = {"skipped": str(error).splitlines()[0]}
        print(json.dumps(found), file=answers, flush=True)


def engine_of(drafter: str, engines: dict[str, Any], settings: dict[str, Any]) -> Any:
    """An engine for a drafter; the target is loaded once."""
    import ttspec

    how = {name: settings[name] for name in ("device", "dtype", "compile")}
    if settings["random_weights"] is not None and not engines:
        from ttspec.decoding.forced import load_random

        engines[drafter] = load_random(settings["random_weights"], settings["accept"], **how)
    elif drafter not in engines:
        known = next(iter(engines.values()), None)
        target = (known.target.model, known.tokenizer) if known else settings["target"]
        engines[drafter] = ttspec.load(target, drafter, **how)
    return engines[drafter]


def answer(case: dict[str, Any], engine: Any, context: int | None) -> dict[str, Any]:
    """What a case gives: its results, and how long they took."""
    import torch

    import ttspec

    learn, on_gpu = case["learn"], engine.target.device.type == "cuda"
    if learn is not None:
        learn = ttspec.LearnConfig.paper() if "preset" in learn else ttspec.LearnConfig(**learn)
    # What a policy does goes by the clock, which no two runs have in common.
    draft = ttspec.DraftConfig(**{"adaptive": case["timed"], **case["draft"]})
    options = {"seed": SEED, "learn": learn, "draft": draft, **case["options"]}
    if on_gpu and not case["timed"]:
        options["deterministic"] = True
    prompts: list[Any] = case["prompts"]
    if context:
        draw, size = Random(SEED), int(engine.target.config.vocab_size)
        prompts = [[draw.randrange(size) for _ in range(context)] for _ in prompts]
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    if case["turns"]:
        session = engine.session(**options)
        asked = [prompts[0], *[FOLLOW_UP] * (case["turns"] - 1)]
        results = [session.send(text) for text in asked]
    elif case["rows"] is None:
        results = engine.generate(prompts, **options)
    else:
        run = engine.run([[p] for p in prompts], rows=case["rows"], stream=False, **options)
        found = {index: chunk.result for index, chunk in run if chunk.result}
        results = [found[index] for index in sorted(found)]
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "results": [recorded(result) for result in results]}


def recorded(result: Any) -> dict[str, Any]:
    """What of a result must not differ."""
    counts = ("proposed", "accepted", "emitted", "updates")
    return {
        "prompt": result.prompt_ids,
        "tokens": result.token_ids,
        "finish": result.finish_reason,
        **{name: [getattr(r, name) for r in result.rounds] for name in counts},
        "reverts": result.stats.reverts,
    }


# The comparison.


class Tree:
    """A process that answers cases with the code of one tree."""

    def __init__(self, source: Path, settings: dict[str, Any]) -> None:
        """Start it; `source` is the folder that holds the package."""
        threads = str(settings["threads"])
        first = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--probe"],
            env={**os.environ, "PYTHONPATH": first, "OMP_NUM_THREADS": threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._write({"source": str(source), **settings})

    def ask(self, case: Case, *, timed: bool = False) -> None:
        """Let it begin with a case."""
        plain = {name: getattr(case, name) for name in case.__slots__}
        self._write({**plain, "timed": timed})

    def answer(self) -> dict[str, Any]:
        """What it found; ends the comparison if it ended itself."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"The probe ended with {self.process.wait()}; see above.")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()

    def _write(self, record: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        print(json.dumps(record), file=self.process.stdin, flush=True)


def different(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two answers to a case, in words."""
    found = []
    for index, (was, now) in enumerate(zip(old["results"], new["results"], strict=True)):
        for name, before in was.items():
            after = now[name]
            if before == after:
                continue
            what = f"answer {index}: {name}"
            if isinstance(before, list):
                pairs = enumerate(zip(before, after, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
                before, after = f"{before[at : at + 4]}", f"{after[at : at + 4]}"
                what += f" from {at} on"
            found.append(f"{what}: {before} -> {after}")
    return found


def compare_texts(old: Tree, new: Tree, cases: list[Case], console: Console) -> int:
    """Run the cases in both trees, at the same time; how many differ."""
    table = Table("case", "what differs, before -> now", title="Differences")
    skipped, began = [], time.perf_counter()
    count = 0
    for case in cases:
        old.ask(case)
        new.ask(case)
        was, now = old.answer(), new.answer()
        reasons = [a["skipped"] for a in (was, now) if "skipped" in a]
        if reasons:
            skipped.append(f"{case.name}: {reasons[0]}")
            continue
        found = different(was, now)
        tokens = sum(len(r["tokens"]) for r in now["results"])
        rounds = sum(len(r["accepted"]) for r in now["results"])
        updates = sum(sum(r["updates"]) for r in now["results"])
        console.print(
            f"{'differs' if found else 'same':8}{case.name:46}{tokens:5} tokens{rounds:5} rounds"
            f"{updates:4} updates{was['seconds']:7.1f} s{now['seconds']:7.1f} s",
            highlight=False,
        )
        count += bool(found)
        for text in found:
            table.add_row(case.name, text)
    if count:
        console.print(table)
    for text in skipped:
        console.print(f"Left out: {text}.", highlight=False)
    done = len(cases) - len(skipped)
    seconds = time.perf_counter() - began
    console.print(f"{count} of {done} cases differ ({seconds:.0f} s).", highlight=False)
    return count


def compare_speed(old: Tree, new: Tree, cases: list[Case], pairs: int, console: Console) -> None:
    """Time every case in both trees by turns; print tokens per second, and how they compare.

    In bfloat16 the trees may write other texts, which are accepted otherwise: rounds per second
    are compared beside them.
    """
    heads = ("case", "before", "now", "now / before, 95 %", "rounds: now / before, 95 %")
    table = Table(*heads, title="Tokens per second")
    for case in cases:
        for tree in (old, new):  # loads, compiles and fills what is kept between requests
            for _ in range(2):
                speed_of(tree, case)
        before, now = [], []
        for number in range(pairs):
            for tree in ((old, new), (new, old))[number % 2]:
                (before if tree is old else now).append(speed_of(tree, case))
        both = list(zip(now, before, strict=True))
        tokens, rounds = ([a[i] / b[i] for a, b in both] for i in (0, 1))
        speeds = (f"{median(tokens for tokens, _ in own):.1f}" for own in (before, now))
        table.add_row(case.name, *speeds, with_interval(tokens), with_interval(rounds))
        console.print(f"{case.name}: {median(tokens):.3f}", highlight=False)
    console.print(table)
    console.print(f"Medians of {pairs} pairs, with 95 % bootstrap intervals.", highlight=False)


def speed_of(tree: Tree, case: Case) -> tuple[float, float]:
    """Tokens a second of all rows, and rounds a second of the row that had most."""
    tree.ask(case, timed=True)
    found = tree.answer()
    results, seconds = found["results"], found["seconds"]
    rounds = max(len(r["emitted"]) for r in results)
    return sum(len(r["tokens"]) for r in results) / seconds, rounds / seconds


def with_interval(values: list[float]) -> str:
    """The median and its 95 % bootstrap interval."""
    import common  # not at the top: the probe of an older tree knows other modules

    return f"{median(values):.3f} {common.middle_95(median, values, RESAMPLES)}"


def checked_out(revision: str, folder: Path) -> Path:
    """The source tree of a revision, written to a folder."""
    archive = folder / "base.tar"
    command = ["git", "-C", str(ROOT), "archive", f"--output={archive}", revision, "src"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git has no sources of {revision}: {done.stderr.strip()}")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder


@app.default
def compare(
    base: str | None = None,
    *,
    base_folder: Path | None = None,
    speed: bool = False,
    tokens: int | None = None,
    only: str = "",
    pairs: int = 8,
    target: str = "smollm2-135m",
    drafter: str = DRAFTERS[0],
    random_weights: str | None = None,
    accept: str = "3,2,4",
    rows: tuple[int, ...] = (1,),
    context: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    compile: bool = False,
    threads: int = 1,
) -> int:
    """Compare the working tree with a revision before.

    Parameters
    ----------
    base
        A git revision.
    base_folder
        A folder with its source tree instead, where there is no git history.
    speed
        Time pairs of requests instead of comparing what they give.
    tokens
        Of an answer. [default: 96; with --speed 128]
    only
        A regular expression that a case's name must contain.
    pairs
        Requests that are timed in each tree.
    target
        What --speed runs, or a folder with the built-in target.
    drafter
        What --speed runs.
    random_weights
        With --speed: published shapes without weights, as in `ttspec bench roofline`.
    accept
        With random weights: drafts kept a round, in turn.
    rows
        With --speed: numbers of requests side by side.
    context
        With --speed: tokens of a prompt, drawn at random. [default: texts; 512 with random weights]
    device
        auto, cpu or cuda.
    dtype
        Number format.
    compile
        Compile the models' layers, on a GPU.
    threads
        Of torch, in each process.
    """
    if (base is None) == (base_folder is None):
        raise SystemExit("Name what to compare with: a git revision, or --base-folder.")
    if random_weights and not speed:
        raise SystemExit("--random-weights is for --speed: random weights write nothing.")
    if random_weights and context is None:
        context = 512
    settings = {
        "target": target,
        "random_weights": random_weights,
        "accept": accept,
        "context": context if speed else None,
        "device": device,
        "dtype": dtype,
        "compile": compile,
        "threads": threads,
    }
    console = Console(width=None if sys.stdout.isatty() else 160)
    with TemporaryDirectory() as folder:
        if base is not None:
            base_folder = checked_out(base, Path(folder))
        assert base_folder is not None
        if speed:
            each = [list(speed_cases(tokens or 128, drafter, count)) for count in rows]
            cases = [case for some in each for case in some]
        else:
            import common

            causal = common.plain_draft_model(Path(folder, "causal"))
            cases = list(text_cases(tokens or 96, causal))
        cases = [case for case in cases if re.search(only, case.name)]
        if not cases:
            raise SystemExit(f"No case's name contains {only!r}.")
        old, new = (Tree(tree / "src", settings) for tree in (base_folder, ROOT))
        try:
            if speed:
                compare_speed(old, new, cases, pairs, console)
                return 0
            return 1 if compare_texts(old, new, cases, console) else 0
        finally:
            old.close()
            new.close()


if __name__ == "__main__":
    start: Callable[[], Any] = probe if sys.argv[1:] == ["--probe"] else app
    sys.exit(start())
