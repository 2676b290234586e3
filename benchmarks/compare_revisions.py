"""Compare the working tree with a revision before: the same texts and acceptance?

    python benchmarks/compare_revisions.py BASE

The same probe runs in one process for each tree. Texts and acceptance are compared on fixed seeds,
for every bundled drafter; exit code 1 says that something differs. A case whose options one of the
trees does not know is left out.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
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


# The probe: runs in the tree that PYTHONPATH names.


def probe() -> None:
    """Answer cases from standard input, one a line; the first line has the settings."""
    answers, sys.stdout = sys.stdout, sys.stderr  # a library's prints must not get among them
    settings = json.loads(sys.stdin.readline())
    import torch

    import ttspec
    from ttspec.errors import OptionError

    here, expected = Path(str(ttspec.__file__)).resolve(), Path(settings["source"]).resolve()
    if expected not in here.parents:
        raise SystemExit(f"ttspec was read from {here.parent}, not from {expected}.")
    torch.set_num_threads(settings["threads"])
    engines: dict[str, Any] = {}
    for line in sys.stdin:
        case = json.loads(line)
        try:
            found = answer(case, engine_of(case["drafter"], engines, settings))
        except OptionError as error:  # an option that this tree does not have
            found = {"skipped": str(error).splitlines()[0]}
        print(json.dumps(found), file=answers, flush=True)


def engine_of(drafter: str, engines: dict[str, Any], settings: dict[str, Any]) -> Any:
    """An engine for a drafter; the target is loaded once."""
    import ttspec

    if drafter not in engines:
        known = next(iter(engines.values()), None)
        target = (known.target.model, known.tokenizer) if known else settings["target"]
        how = {name: settings[name] for name in ("device", "dtype", "compile")}
        engines[drafter] = ttspec.load(target, drafter, **how)
    return engines[drafter]


def answer(case: dict[str, Any], engine: Any) -> dict[str, Any]:
    """What a case gives: its results, and how long they took."""
    import ttspec

    learn, prompts = case["learn"], case["prompts"]
    if learn is not None:
        learn = ttspec.LearnConfig.paper() if "preset" in learn else ttspec.LearnConfig(**learn)
    # What a policy does goes by the clock, which no two runs have in common.
    draft = ttspec.DraftConfig(**{"adaptive": False, **case["draft"]})
    options = {"seed": SEED, "learn": learn, "draft": draft, **case["options"]}
    if engine.target.device.type == "cuda":
        options["deterministic"] = True
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

    def ask(self, case: Case) -> None:
        """Let it begin with a case."""
        self._write(asdict(case))

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
    tokens: int = 96,
    only: str = "",
    target: str = "smollm2-135m",
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
    tokens
        Of an answer.
    only
        A regular expression that a case's name must contain.
    target
        A folder with the built-in target, where it has another name.
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
    settings = {
        "target": target,
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
        import common  # not at the top: the probe of an older tree knows other modules

        causal = common.plain_draft_model(Path(folder, "causal"))
        cases = [case for case in text_cases(tokens, causal) if re.search(only, case.name)]
        if not cases:
            raise SystemExit(f"No case's name contains {only!r}.")
        old, new = (Tree(tree / "src", settings) for tree in (base_folder, ROOT))
        try:
            return 1 if compare_texts(old, new, cases, console) else 0
        finally:
            old.close()
            new.close()


if __name__ == "__main__":
    start: Callable[[], Any] = probe if sys.argv[1:] == ["--probe"] else app
    sys.exit(start())
