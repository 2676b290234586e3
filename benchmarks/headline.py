"""The main figure and tables, from nothing: `run` measures, `show` draws, `paste` writes.

`run` starts one `ttspec bench run` per drafter and temperature, as many at a time as there are
GPUs times `--each`, and may be stopped and repeated: it goes on where it was. Acceptance does not
mind company; times do, so no speed is taken from these runs. `--small` is a version for a CPU.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import common
import torch
from common import ROOT
from cyclopts import App

from ttspec.bench.estimates import Estimate
from ttspec.bench.jsonl import write_json
from ttspec.bench.table import EMPTY, Table, interval

RESULTS = common.RESULTS / "headline"
BEGIN, END = "<!-- headline: {} -->", "<!-- end -->"
DRAFTERS = {"DFlash": "dflash", "EAGLE-3": "eagle3", "PARD": "pard"}
LEARNING = "learn-session[stride=4,window=512]"
ARMS = {
    "static": "static",
    "static-rebased": "static, re-based positions (512)",
    "static-window": "static, window (512)",
    LEARNING: "learning, window (512)",
}
MEASURED = "weights=full,blocks=16,publish=now,guard=0"
"""What the learning arm was when it was measured; these were the defaults."""
BEST = {"dflash": "static-window", "eagle3": "static-rebased", "pard": "static-window"}
"""The static cure that measured best before (docs/experiments.md): greedy runs have only this."""
TIMES = (
    *("tokens_per_second", "first_token_seconds", "inter_token_seconds"),
    *("seconds_a_token", "learning_share"),
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


def runs(size: Size) -> Iterator[tuple[str, dict[str, Any]]]:
    """Folder and options of each `ttspec bench run`; the slowest first."""
    for temperature, requests in size.requests.items():
        for kind in ("pard", "eagle3", "dflash", "n-gram"):
            arms = ["static", BEST[kind], LEARNING] if kind in BEST else ["ngram"]
            if kind in BEST and temperature != "0":
                arms = list(ARMS)
            arms = [LEARNING[:-1] + f",{MEASURED}]" if arm == LEARNING else arm for arm in arms]
            yield (
                f"temperature-{temperature}/{kind}",
                {
                    "suite": "session,mixed",
                    "requests": requests,
                    "drafter": "none" if kind == "n-gram" else f"smollm2-135m-{kind}",
                    "arms": ",".join(arms),
                    "temperature": temperature,
                    "max_new_tokens": size.turn,
                    "session_tokens": size.tokens,
                    "dtype": "float32",
                    "seeds": 1,
                    "rows": size.rows,
                },
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
    for gpu in [str(n) for n in range(torch.cuda.device_count())] * each or [""] * each:
        gpus.put(gpu)

    def go(job: tuple[str, dict[str, Any]]) -> int:
        name, options = job
        gpu = gpus.get()
        log = out / f"{name.replace('/', '-')}.log"
        with log.open("a") as file:
            code = common.bench_run(out / name, options, gpu=gpu, log=file)
        gpus.put(gpu)
        print(name, "done" if code == 0 else f"ended with {code}: {log}")
        return code

    with ThreadPoolExecutor(gpus.qsize()) as pool:
        return max(pool.map(go, runs(SMALL if small else FULL)))


@app.command
def show(out: Path = Path("runs/headline"), *, to: Path = RESULTS) -> None:
    """Draw figures and tables from the run folders; `to` gets what is small enough to commit."""
    from ttspec.bench.report import write_bench_report
    from ttspec.bench.run_set import open_runs

    for temperature in ("0.7", "0"):
        folder = out / f"temperature-{temperature}"
        folders = [folder / kind for kind in (*DRAFTERS.values(), "n-gram")]
        page = write_bench_report(open_runs([f for f in folders if f.exists()]), folder / "report")
        kept = to / folder.name
        summary = json.loads((page.parent / "summary.json").read_text(encoding="utf-8"))
        for one in (*summary["arms"].values(), *summary["pairs"]):
            for name in TIMES:  # several runs shared a device
                one.pop(name, None)
        text = common.portable(json.dumps(summary), "headline", "temperature-").replace(
            f",{MEASURED}", ""
        )
        write_json(kept / "summary.json", json.loads(text))
        for name in ("across.png", "across.svg"):
            (kept / name).write_bytes((page.parent / name).read_bytes())
        print(page)


@app.command
def paste(page: Path = ROOT / "docs" / "results.md", *, results: Path = RESULTS) -> None:
    """Write the tables into docs/results.md, between their marks."""
    page.write_text(pasted(page.read_text(encoding="utf-8"), results), encoding="utf-8")


def pasted(text: str, results: Path = RESULTS) -> str:
    """The page with every table as the committed summaries say it."""
    for folder in sorted(results.glob("temperature-*")):
        begin = BEGIN.format(folder.name)
        before, mark, rest = text.partition(begin)
        if not mark:
            continue
        _, end, after = rest.partition(END)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        text = f"{before}{begin}\n{table(summary).markdown()}{end}{after}"
    return text


def table(summary: dict[str, Any]) -> Table:
    """Acceptance lengths and ratios of a summary."""
    arms = summary["arms"]
    rows: list[tuple[str, ...]] = []

    def values(arm: dict[str, Any]) -> list[str]:
        return [EMPTY if v is None else f"{v['value']:.3f}" for v in arm["stretches"].values()]

    if ngram := arms.get("n-gram: ngram"):
        rows.append(("n-gram", "static", *values(ngram)))
    for title, folder in DRAFTERS.items():
        shown = [(arm, arms[f"{folder}: {arm}"]) for arm in ARMS if f"{folder}: {arm}" in arms]
        for i, (arm, own) in enumerate(shown):
            cells = [f"**{c}**" if arm == LEARNING and c != EMPTY else c for c in values(own)]
            rows.append(("" if i else title, ARMS[arm], *cells))
        for pair in summary["pairs"]:
            if pair["arm"].startswith(f"{folder}: learn") and "static" in pair["against"]:
                names = [ARMS[pair[side].partition(": ")[2]] for side in ("arm", "against")]
                cells = [_ratio(pair) for pair in pair["stretches"].values()]
                rows.append(("", f"*{' / '.join(names)}*", *cells))
    stretches = next(iter(arms.values()))["stretches"]
    return Table(head=("drafter", "arm", *stretches), rows=rows)


def _ratio(pair: dict[str, Any] | None) -> str:
    """A ratio as `estimates` knows it: null is nan."""
    known = {k: v for k, v in pair["ratio"].items() if v is not None} if pair else None
    return interval(known and Estimate(**known), 3)


if __name__ == "__main__":
    common.main(app)
