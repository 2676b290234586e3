"""The README's main figure and table, from nothing: `run` measures, `show` draws, `paste` writes.

`run` starts one `ttspec bench run` per drafter and temperature, as many at a time as there are
GPUs times `--each`, and may be stopped and repeated: it goes on where it was. Acceptance does not
mind company; times do, so no speed is taken from these runs. `--small` is a version for a CPU.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from cyclopts import App

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "headline"
EMPTY = "–"
BEGIN, END = "<!-- headline: {} -->", "<!-- end -->"
DRAFTERS = {"DFlash": "dflash", "EAGLE-3": "eagle3", "PARD": "pard"}
ARMS = {
    "static": "static",
    "static-rebased": "static, re-based positions (512)",
    "static-window": "static, window (512)",
    "learn-session[stride=4,window=512]": "learning, window (512)",
}
MEASURED = "weights=full,blocks=16,publish=now,guard=0"
"""What the learning arm was when it was measured; these were the defaults."""
BEST = {"dflash": "static-window", "eagle3": "static-rebased", "pard": "static-window"}
"""The static cure that measured best before (docs/experiments.md): greedy runs have only this."""
TIMES = (
    "tokens_per_second",
    "first_token_seconds",
    "inter_token_seconds",
    "seconds_a_token",
    "learning_share",
)
app = App(help=__doc__)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    requests: Mapping[str, int]
    """Of each suite, by temperature."""
    tokens: int
    turn: int
    rows: int


FULL = Size({"0.7": 10, "0": 3}, tokens=4000, turn=256, rows=20)
SMALL = Size({"0.7": 1, "0": 1}, tokens=128, turn=64, rows=2)


def commands(out: Path, size: Size) -> Iterator[tuple[str, list[str]]]:
    """A name and a command line for each run folder; the slowest first."""
    shared = ["--max-new-tokens", str(size.turn), "--session-tokens", str(size.tokens)]
    shared += ["--dtype", "float32", "--seeds", "1", "--rows", str(size.rows)]
    for temperature, requests in size.requests.items():
        for kind in ("pard", "eagle3", "dflash", "n-gram"):
            arms = ["ngram"] if kind == "n-gram" else list(ARMS)
            if kind in BEST and temperature == "0":
                arms = ["static", BEST[kind], next(arm for arm in ARMS if arm.startswith("learn"))]
            drafter = "none" if kind == "n-gram" else f"smollm2-135m-{kind}"
            arms = [a.replace("]", f",{MEASURED}]") if a.startswith("learn") else a for a in arms]
            folder = out / f"temperature-{temperature}" / kind
            yield (
                f"{kind} at temperature {temperature}",
                [
                    *(sys.executable, "-m", "ttspec.cli", "bench", "run"),
                    *("--suite", "session,mixed", "--requests", str(requests)),
                    *("--drafter", drafter, "--arms", ",".join(arms), "--out", str(folder)),
                    *("--temperature", temperature, *shared),
                ],
            )


@app.command
def run(out: Path = Path("runs/headline"), *, small: bool = False, each: int = 1) -> int:
    """Measure all there is to measure; repeat the command after an interrupt.

    Parameters
    ----------
    out
        Where the run folders go.
    small
        Two short sessions, for a CPU.
    each
        Runs at a time on each GPU.
    """
    out.mkdir(parents=True, exist_ok=True)
    gpus: Queue[str] = Queue()
    for _ in range(each):
        for gpu in _gpus():
            gpus.put(gpu)

    def go(job: tuple[str, list[str]]) -> int:
        name, command = job
        gpu = gpus.get()
        log = out / f"{name.replace(' ', '-')}.log"
        with log.open("a") as file:
            env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
            code = subprocess.run(command, stdout=file, stderr=file, env=env, check=False)
        gpus.put(gpu)
        print(name, "done" if code.returncode == 0 else f"ended with {code.returncode}: {log}")
        return code.returncode

    with ThreadPoolExecutor(gpus.qsize()) as pool:
        codes = list(pool.map(go, commands(out, SMALL if small else FULL)))
    return max(codes)


@app.command
def show(out: Path = Path("runs/headline"), *, to: Path = RESULTS) -> None:
    """Draw figures and tables from the run folders; `to` gets what is small enough to commit."""
    from ttspec.bench.report import open_runs, write_bench_report

    for temperature in ("0.7", "0"):
        folder = out / f"temperature-{temperature}"
        runs = [folder / kind for kind in (*DRAFTERS.values(), "n-gram")]
        page = write_bench_report(open_runs([r for r in runs if r.exists()]), folder / "report")
        kept = to / f"temperature-{temperature}"
        kept.mkdir(parents=True, exist_ok=True)
        for name in ("across.png", "across.svg"):
            (kept / name).write_bytes((page.parent / name).read_bytes())
        summary = json.loads((page.parent / "summary.json").read_text(encoding="utf-8"))
        text = json.dumps(_timeless(summary), indent=1, ensure_ascii=False)
        text = re.sub(
            r"--out \S*?(temperature-)", r"--out runs/headline/\1", text
        )  # wherever it was
        text = text.replace(f",{MEASURED}", "")
        (kept / "summary.json").write_text(text + "\n", encoding="utf-8")
        print(page)


def _timeless(summary: dict[str, Any]) -> dict[str, Any]:
    """Without times: several runs shared a device."""
    for one in (*summary["arms"].values(), *summary["pairs"]):
        for name in TIMES:
            one.pop(name, None)
    return summary


@app.command
def paste(readme: Path = ROOT / "README.md", *, results: Path = RESULTS) -> None:
    """Write the tables into the README, between their marks."""
    readme.write_text(pasted(readme.read_text(encoding="utf-8"), results), encoding="utf-8")


def pasted(text: str, results: Path = RESULTS) -> str:
    """The README with every table as the committed summaries say it."""
    for folder in sorted(results.glob("temperature-*")):
        begin = BEGIN.format(folder.name)
        before, mark, rest = text.partition(begin)
        if not mark:
            continue
        _, end, after = rest.partition(END)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        text = f"{before}{begin}\n{table(summary)}{end}{after}"
    return text


def table(summary: dict[str, Any]) -> str:
    """Acceptance lengths and ratios of a summary, as Markdown."""
    arms, pairs = summary["arms"], summary["pairs"]
    stretches = list(next(iter(arms.values()))["stretches"])
    lines = ["| drafter | arm | " + " | ".join(stretches) + " |", "|---|---|" + "---|" * 3]
    if "n-gram: ngram" in arms:
        cells = [_value(v) for v in arms["n-gram: ngram"]["stretches"].values()]
        lines.append("| n-gram | static | " + " | ".join(cells) + " |")
    for title, folder in DRAFTERS.items():
        first = title
        for arm, words in ARMS.items():
            if own := arms.get(f"{folder}: {arm}"):
                cells = [_value(v) for v in own["stretches"].values()]
                if arm.startswith("learn"):
                    cells = [f"**{c}**" if c != EMPTY else c for c in cells]
                lines.append(f"| {first} | {words} | " + " | ".join(cells) + " |")
                first = ""
        for pair in pairs:
            if pair["arm"].startswith(f"{folder}: learn") and "static" in pair["against"]:
                cells = [_ratio(v) for v in pair["stretches"].values()]
                names = [ARMS[pair[side].partition(": ")[2]] for side in ("arm", "against")]
                lines.append(f"| | *{' / '.join(names)}* | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _value(estimate: dict[str, float] | None) -> str:
    return f"{estimate['value']:.3f}" if estimate else EMPTY


def _ratio(pair: dict[str, Any] | None) -> str:
    if not pair:
        return EMPTY
    r = pair["ratio"]
    return f"{r['value']:.3f}" + (f" [{r['low']:.3f}, {r['high']:.3f}]" if r["low"] else "")


def _gpus() -> list[str]:
    import torch

    return [str(n) for n in range(torch.cuda.device_count())] or [""]


if __name__ == "__main__":
    sys.exit(app())
