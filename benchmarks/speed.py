"""Tokens per second of the built-in pair at several batch sizes: `run` measures, `show` prints.

`run` starts one `ttspec bench run` per drafter and number of rows, one after the other, for their
times are the point; it may be stopped and repeated. Speed is that of whole batches by the wall
clock. Past 1,000 tokens: from when the rows have generated so many each, in the mean.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import common
from cyclopts import App

from ttspec.bench.jsonl import write_json
from ttspec.bench.metrics import Batches
from ttspec.bench.results import Arm
from ttspec.bench.table import Table, interval, ratio
from ttspec.errors import DataError, OptionError

SUITES = {"session": 20, "mixed": 20}
"""Multi-turn suites, and how many requests each has."""
PEERS = "hf,hf-compiled"
app = App(help=__doc__)


def sizes(rows: int, batches: int) -> tuple[int, int]:
    """Requests of each suite and seeds, so that every arm has so many batches, all of them full."""
    most = min(SUITES.values()) * len(SUITES)
    if not 1 <= rows <= most:
        raise OptionError(f"--rows has {rows}; allowed is 1 to {most}, the requests there are.")
    step = rows if rows % len(SUITES) == 0 else rows * len(SUITES)
    if step > most:
        raise OptionError(f"--rows has {rows}; allowed above {most // 2} are even numbers.")
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
        transformers' own `generate` too, at one row.
    """
    options = {"temperature": temperature, "device": device, "dtype": dtype, "compile": compile}
    options |= {"max_new_tokens": turn, "session_tokens": tokens, "suite": ",".join(SUITES)}
    worst = 0
    for name in drafter or ["smollm2-135m-dflash"]:
        for count in common.numbers("rows", rows):
            requests, seeds = sizes(count, batches)
            code = common.bench_run(
                out / Path(name).name / f"rows-{count}",
                {
                    **options,
                    "requests": requests,
                    "seeds": ",".join(str(n + 1) for n in range(seeds)),
                    "drafter": name,
                    "arms": f"{arms},{PEERS}" if peers and count == 1 else arms,
                    "rows": count,
                },
            )
            print(f"{name}, {count} rows: {'done' if code == 0 else f'ended with {code}'}")
            if code == common.INTERRUPTED:
                return code
            worst = max(worst, code)
    return worst


@app.command
def show(
    out: Path = Path("runs/speed"), *, to: Path = common.RESULTS / "speed", past: int = 1000
) -> None:
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
    from ttspec.bench.report import json_values

    texts, kept = [], {}
    for folder in sorted({path.parent for path in out.glob("*/rows-*")}):
        if runs := dict(read(folder)):
            pays = "\n".join(where_it_pays(runs))
            texts.append(f"{table(folder.name, runs, past).markdown()}\n{pays}\n")
            kept[folder.name] = {rows: numbers(own, rows, past) for rows, own in runs.items()}
    text = common.portable(json.dumps(json_values(kept)), "speed", r"\w[^/\s]*/rows-")
    write_json(to / "speed.json", json.loads(text))
    (to / "speed.md").write_text("\n".join(texts), encoding="utf-8")
    print("\n".join(texts))


def read(folder: Path) -> Iterator[tuple[int, Any]]:
    """The runs of a drafter by their number of rows."""
    from ttspec.bench.run_set import open_runs

    for path in sorted(folder.glob("rows-*"), key=lambda p: int(p.name[5:])):
        try:
            found = open_runs([path])
        except DataError as error:  # not finished, say: the others are worth having
            print(f"Left out: {error}", file=sys.stderr)
        else:
            yield int(found.manifest["rows"]), found


def table(title: str, runs: Mapping[int, Any], past: int) -> Table:
    """Speeds and ratios by number of rows."""
    lines, notes = [], []
    for rows, own in runs.items():
        plain, static = find(own.arms, "plain"), find(own.arms, "static")
        whole, late = Batches(rows), Batches(rows, past)
        for arm in own.arms:
            learned = static if arm.name.startswith("learn") else None
            pairs = ((whole, plain), (late, plain), (late, learned))
            lines.append(
                (
                    str(rows),
                    arm.name,
                    str(len(whole.of(arm))),
                    interval(whole.speed(arm), 1),
                    interval(late.speed(arm), 1),
                    *(ratio(b.pair(arm, o) if o and o is not arm else None) for b, o in pairs),
                )
            )
        notes += [f"{rows} rows: {sentence}" for sentence in own.left_out]
    m = next(iter(runs.values())).manifest
    note = (
        f"{m['device']}, {m['dtype']}, temperature {m['temperature']}, {m['session_tokens']:,} "
        f"tokens a session, torch {m['versions']['torch']}, commit {m['git'] or 'unknown'}. Tokens "
        f"of all rows over the wall clock of their batch; past {past:,}: from when its rows have "
        "generated so many each, in the mean. Ratios are of the same batches; in brackets 95 % "
        "bootstrap intervals over batches."
    )
    head = ("rows", "arm", "batches", "tokens/s", f"past {past:,}", "/ plain")
    head += (f"/ plain past {past:,}", f"/ static past {past:,}")
    return Table(title=title, note="\n".join([note, *notes]), head=head, rows=lines)


def where_it_pays(runs: Mapping[int, Any]) -> Iterator[str]:
    """For static and learning arms, the first number of rows at which plain is faster."""
    names = {arm.name: None for own in runs.values() for arm in own.arms}
    for name in (n for n in names if n.startswith(("static", "learn"))):
        ratios = {}
        for rows, own in runs.items():
            arm, plain = find(own.arms, name), find(own.arms, "plain")
            if pair := arm and plain and Batches(rows).pair(arm, plain):
                ratios[rows] = pair.ratio.value
        slower = [rows for rows, value in ratios.items() if value < 1]
        tried = ", ".join(map(str, ratios))
        if slower:
            yield f"- {name}: first slower than plain at {slower[0]} rows (of {tried} tried)."
        elif ratios:
            yield f"- {name}: faster than plain at every number of rows tried ({tried})."


def numbers(run: Any, rows: int, past: int) -> dict[str, Any]:
    """Manifest and speeds as plain values."""
    from ttspec.bench.report import json_values

    arms = {}
    others = [found for name in ("plain", "static") if (found := find(run.arms, name))]
    for arm in run.arms:
        arms[arm.name] = {
            "batches": len(Batches(rows).of(arm)),
            "tokens": arm.tokens,
            "peak_memory": max((t.peak_memory or 0 for t in arm.turns), default=0) or None,
        }
        for name, batches in (("all", Batches(rows)), (f"past_{past}", Batches(rows, past))):
            ratios = {f"against {o.name}": batches.pair(arm, o) for o in others if o is not arm}
            arms[arm.name][name] = {
                "tokens_per_second": json_values(batches.speed(arm)),
                **{against: json_values(pair and pair.ratio) for against, pair in ratios.items()},
            }
    return {"manifest": run.manifest, "arms": arms}


def find(arms: list[Arm], name: str) -> Arm | None:
    """The arm of this name; None without."""
    return next((arm for arm in arms if arm.name == name), None)


if __name__ == "__main__":
    common.main(app)
