"""Tokens per second of the built-in pair at several batch sizes: `run` measures, `show` prints.

`run` starts one `ttspec bench run` per drafter and number of rows, one after the other, for their
times are the point; it may be stopped and repeated. Speed is that of whole batches by the wall
clock. Past 1,000 tokens: from when the rows have generated so many each, in the mean.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cyclopts import App

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "speed"
SUITES = {"session": 20, "mixed": 20}
"""Multi-turn suites, and how many requests each has."""
PEERS = "hf,hf-compiled,dflash,hf-dflash"
INTERRUPTED = 130
app = App(help=__doc__)


def sizes(rows: int, batches: int) -> tuple[int, int]:
    """Requests of each suite and seeds, so that every arm has so many batches, all of them full."""
    most = min(SUITES.values()) * len(SUITES)
    if not 1 <= rows <= most:
        raise SystemExit(f"--rows has {rows}; allowed is 1 to {most}, the requests there are.")
    step = rows if rows % len(SUITES) == 0 else rows * len(SUITES)
    if step > most:
        raise SystemExit(f"--rows has {rows}; allowed above {most // 2} are even numbers.")
    requests = min(-(-rows * batches // step), most // step) * step
    return requests // len(SUITES), -(-rows * batches // requests)


@app.command
def run(
    out: Path = Path("runs/speed"),
    *,
    rows: str = "1,4,16,32",
    drafter: list[str] | None = None,
    arms: str = "plain,static,learn-session",
    tokens: int = 1500,
    turn: int = 256,
    batches: int = 4,
    temperature: float = 0.7,
    device: str = "auto",
    dtype: str = "bfloat16",
    compile: bool = True,
    peers: bool = False,
) -> int:
    """Measure all there is to measure; repeat the command after an interrupt.

    Parameters
    ----------
    out
        Where the run folders go.
    rows
        Requests side by side, with commas between them.
    drafter
        One or, given several times, several. [default: smollm2-135m-dflash]
    arms
        Of `ttspec bench run`.
    tokens
        Generated tokens of a session, over all its turns.
    turn
        Generated tokens of a turn at most.
    batches
        Of each arm and number of rows; at one row, requests.
    temperature
        0 is greedy.
    device
        auto, cpu or cuda.
    dtype
        Number format.
    compile
        Compile the models' layers, on a GPU.
    peers
        Other implementations too, at one row.
    """
    worst = 0
    for name in drafter or ["smollm2-135m-dflash"]:
        for count in map(int, rows.split(",")):
            requests, seeds = sizes(count, batches)
            chosen = f"{arms},{PEERS}" if peers and count == 1 else arms
            command = [
                *(sys.executable, "-m", "ttspec.cli", "bench", "run"),
                *("--suite", ",".join(SUITES), "--requests", str(requests)),
                *("--seeds", ",".join(str(n + 1) for n in range(seeds))),
                *("--drafter", name, "--arms", chosen, "--rows", str(count)),
                *("--max-new-tokens", str(turn), "--session-tokens", str(tokens)),
                *("--temperature", str(temperature), "--device", device, "--dtype", dtype),
                *(["--compile"] if compile else []),
                *("--out", str(out / Path(name).name / f"rows-{count}")),
            ]
            try:
                code = subprocess.run(command, check=False).returncode
            except KeyboardInterrupt:
                code = INTERRUPTED
            print(f"{name}, {count} rows: {'done' if code == 0 else f'ended with {code}'}")
            if code == INTERRUPTED:
                return code
            worst = max(worst, code)
    return worst


@app.command
def show(out: Path = Path("runs/speed"), *, to: Path = RESULTS, past: int = 1000) -> None:
    """Print a table of each drafter's runs; `to` gets it, and the numbers with the manifests.

    Parameters
    ----------
    out
        Where the run folders are.
    to
        Where what is small enough to commit goes.
    past
        Generated tokens after which speed is given once more.
    """
    to.mkdir(parents=True, exist_ok=True)
    texts, kept = [], {}
    for folder in sorted({path.parent for path in out.glob("*/rows-*")}):
        runs = dict(read(folder))
        if not runs:
            continue
        texts.append(text(folder.name, runs, past))
        kept[folder.name] = {n: numbers(found, n, past) for n, found in runs.items()}
    (to / "speed.md").write_text("\n".join(texts), encoding="utf-8")
    said = json.dumps(kept, indent=1, ensure_ascii=False).replace("NaN", "null")
    said = re.sub(r"--out \S*?(\w[^/\s]*/rows-)", r"--out runs/speed/\1", said)  # wherever it was
    (to / "speed.json").write_text(said + "\n", encoding="utf-8")
    print("\n".join(texts))


def read(folder: Path) -> Iterator[tuple[int, Any]]:
    """The runs of a drafter by their number of rows."""
    from ttspec.bench.report import open_runs
    from ttspec.errors import DataError

    for path in sorted(folder.glob("rows-*"), key=lambda p: int(p.name[5:])):
        try:
            found = open_runs([path])
        except DataError as error:  # not finished, say: the others are worth having
            print(f"Left out: {error}", file=sys.stderr)
        else:
            yield int(found.manifest["rows"]), found


def text(title: str, runs: dict[int, Any], past: int) -> str:
    """The table, and where speculation stops paying."""
    from ttspec.bench.measures import Batches
    from ttspec.bench.tables import Table, interval

    lines, notes = [], []
    for rows, found in runs.items():
        plain, static = first(found.arms, "plain"), first(found.arms, "static")
        whole, late = Batches(rows), Batches(rows, past)
        for arm in found.arms:
            ratios = [
                whole.pair(arm, plain) if plain and arm is not plain else None,
                late.pair(arm, plain) if plain and arm is not plain else None,
                late.pair(arm, static) if static and arm.name.startswith("learn") else None,
            ]
            lines.append(
                (
                    str(rows),
                    arm.name,
                    str(len(whole.of(arm))),
                    interval(whole.speed(arm), 1),
                    interval(late.speed(arm), 1),
                    *(interval(pair and pair.ratio, 3) for pair in ratios),
                )
            )
        notes += [f"{rows} rows: {sentence}" for sentence in found.left_out]
    head = ("rows", "arm", "batches", "tokens/s", f"past {past:,}", "/ plain")
    head += (f"/ plain past {past:,}", f"/ static past {past:,}")
    m = next(iter(runs.values())).manifest
    note = (
        f"{m['device']}, {m['dtype']}, temperature {m['temperature']}, {m['session_tokens']:,} "
        f"tokens a session, torch {m['versions']['torch']}, commit {m['git'] or 'unknown'}. Tokens "
        f"of all rows over the wall clock of their batch; past {past:,}: from when its rows have "
        "generated so many each, in the mean. Ratios are of the same batches; in brackets 95 % "
        "bootstrap intervals over batches."
    )
    table = Table(title=title, note="\n".join([note, *notes]), head=head, rows=lines)
    return table.markdown() + "\n" + "\n".join(pays(runs)) + "\n"


def pays(runs: dict[int, Any]) -> Iterator[str]:
    """For static and learning arms, the first number of rows at which plain is faster."""
    from ttspec.bench.measures import Batches

    kinds = {arm.name: None for found in runs.values() for arm in found.arms}
    for name in (n for n in kinds if n.startswith(("static", "learn"))):
        ratios = {}
        for rows, found in runs.items():
            arm, plain = first(found.arms, name), first(found.arms, "plain")
            pair = arm and plain and Batches(rows).pair(arm, plain)
            if pair:
                ratios[rows] = pair.ratio.value
        loses = [rows for rows, ratio in ratios.items() if ratio < 1]
        tried = ", ".join(map(str, ratios))
        if loses:
            yield f"- {name}: first slower than plain at {loses[0]} rows (of {tried} tried)."
        elif ratios:
            yield f"- {name}: faster than plain at every number of rows tried ({tried})."


def numbers(found: Any, rows: int, past: int) -> dict[str, Any]:
    """Manifest and speeds as plain values."""
    from ttspec.bench.measures import Batches

    arms = {}
    plain, static = first(found.arms, "plain"), first(found.arms, "static")
    for arm in found.arms:
        own: dict[str, Any] = {"batches": len(Batches(rows).of(arm)), "tokens": arm.tokens}
        own["peak_memory"] = max((t.peak_memory or 0 for t in arm.turns), default=0) or None
        for name, batches in (("all", Batches(rows)), (f"past_{past}", Batches(rows, past))):
            speed = batches.speed(arm)
            own[name] = {"tokens_per_second": speed and asdict(speed)}
            for other in (plain, static):
                if other and other is not arm:
                    pair = batches.pair(arm, other)
                    own[name][f"against {other.name}"] = pair and asdict(pair.ratio)
        arms[arm.name] = own
    return {"manifest": found.manifest, "arms": arms}


def first(arms: list[Any], name: str) -> Any:
    """The arm of this name; None without."""
    return next((arm for arm in arms if arm.name == name), None)


if __name__ == "__main__":
    sys.exit(app())
