"""How a round's cost grows with context and with rows: `run` measures, `show` draws and judges.

Random weights in published shapes, so that no checkpoint is needed; acceptance is forced. Every
point is written as soon as it is measured, and `run` repeated goes on where it was.
"""

import gc
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import common
import growth_report as report
import torch
from cyclopts import App

from ttspec.bench import timing
from ttspec.bench.jsonl import write_json
from ttspec.bench.manifest import describe, forced, forced_sentence, gpu_clocks
from ttspec.bench.plot_style import stamp, write_figure
from ttspec.bench.store import continued, different_settings
from ttspec.bench.timing import Plan, Timed
from ttspec.config import DraftConfig, LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.errors import DataError, OptionError, ResourceError

FILE = "growth.json"
app = App(help=__doc__)


@dataclass(frozen=True)
class Point:
    """What is measured at once."""

    rows: int
    context: int
    learn: dict[str, Any] | None
    """Fields of a `LearnConfig`; None is a static drafter."""


def points(
    contexts: Sequence[int], rows: Sequence[int], at: tuple[int, int], learn: dict | None
) -> list[Point]:
    """Every point once, the small ones first; `at` has the rows and the context of the others."""
    shapes = [*((at[0], n) for n in contexts), *((n, at[1]) for n in rows)]
    kinds = [None] if learn is None else [None, learn]
    found = [Point(*shape, kind) for kind in kinds for shape in shapes]
    return [point for i, point in enumerate(found) if point not in found[:i]]


@app.command
def run(
    *,
    shapes: common.Shapes = common.Shapes(),
    out: Path = Path("runs/growth"),
    contexts: str = "1024,2048,4096,8192,16384,32768",
    rows: str = "1,2,4,8,16,32",
    at_rows: int = 1,
    at_context: int = 2048,
    rounds: int = 20,
    learn: bool = True,
    scope: str = "shared",
    stride: int = 4,
) -> int:
    """Measure every point that the folder does not have yet.

    Parameters
    ----------
    out
        Where the figures go.
    contexts
        Tokens in every row's cache, with commas between them.
    rows
        Rows side by side.
    at_rows
        Rows while the context grows.
    at_context
        Tokens of context while the rows grow.
    rounds
        Rounds to measure at least.
    learn
        Measure every point with a learning drafter too.
    scope
        Who learns: request, session (each row its own weights) or shared.
    stride
        Rounds between updates.
    """
    # Published now, so that an update has a time of its own.
    config = LearnConfig(stride=stride, scope=scope, publish="now") if learn else None  # type: ignore[arg-type]
    wanted = points(
        common.numbers("contexts", contexts),
        common.numbers("rows", rows),
        (at_rows, at_context),
        asdict(config) if config else None,
    )
    engine = shapes.load()
    assert engine.drafter is not None
    room, limit = Plan.of(rounds, engine.drafter.length, config).tokens, engine.target.context
    most = max(point.context for point in wanted)
    if most + room > limit:
        raise OptionError(
            f"A context is {most}, but the rounds write up to {room} tokens more and the target "
            f"has room for {limit}.\nAllowed is up to {limit - room}."
        )
    manifest = describe(engine, title="How cost grows") | {"rounds": rounds}
    print(forced_sentence(manifest), flush=True)
    kept = open_folder(out, manifest)
    done = [Point(p["rows"], p["context"], p["learn"]) for p in kept["points"]]
    for number, point in enumerate(wanted, 1):
        if point in done:
            continue
        began = time.perf_counter()
        found = asdict(point) | measure(engine, point, rounds)
        kept["points"].append(found | {"clocks": gpu_clocks(engine.target.device)})
        write_json(out / FILE, kept)
        took = time.perf_counter() - began
        result = found.get("error") or f"{1e3 * found['seconds']['round']:.2f} ms a round"
        name = report.name_of(found)
        print(f"{number} of {len(wanted)}: {name}: {result} ({took:.0f} s)", flush=True)
    print(f"Next: python benchmarks/growth.py show --out {out}")
    return 0


def measure(engine: Engine, point: Point, rounds: int) -> dict[str, Any]:
    """Seconds of a round by stage and bytes on the device; or that memory ran out."""
    assert engine.drafter is not None
    device = engine.target.device
    cuda = device.type == "cuda"
    gc.collect()  # what the point before held
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = common.allocated(device) if cuda else None
    learn = LearnConfig(**point.learn) if point.learn else None
    plan = Plan.of(rounds, engine.drafter.length, learn)
    shape = {"rows": point.rows, "context": point.context}
    try:
        # A sibling learns for itself, and what it learned goes with it.
        found, filled, _ = timing.timed(engine.sibling(), DraftConfig(), learn, plan, **shape)
    except Exception as error:
        if not ran_out(error):
            raise
        return {"error": "out of memory", "memory_before": before}
    return {
        "seconds": summary(found, plan.stride),
        "filled": filled,
        "memory_before": before,
        "memory_peak": torch.cuda.max_memory_allocated(device) if cuda else None,
    }


def ran_out(error: BaseException | None) -> bool:
    """Memory ran out, perhaps while a graph was captured, which then complains of that."""
    while error is not None:
        kinds = (ResourceError, torch.OutOfMemoryError, MemoryError)
        if isinstance(error, kinds) or "out of memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def summary(found: Sequence[Timed], stride: int) -> dict[str, float | None]:
    """Medians over rounds; where an update comes only now and then, over strides of rounds.

    On a GPU the host does not wait for an update's last part, the step itself, before the round
    after it, so that only a whole stride's time says what its rounds took.
    """
    strides = [found[i : i + stride] for i in range(0, len(found), stride)]
    updates = [t.learn for t in found if t.updated]
    learn = median(fmean(t.learn for t in own) for own in strides)
    return {
        "draft": median(t.draft for t in found),
        "verify": median(t.verify for t in found),
        "learn": learn if updates else None,  # else a microsecond of asking
        "update": median(updates) if updates else None,
        "round": median(fmean(t.wall for t in own) for own in strides),
    }


def open_folder(out: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the folder has, if it is of this run; else the beginning.

    The file's key for the manifest is `facts`, as in the committed results.
    """
    if not (out / FILE).exists():
        return {"facts": manifest, "points": []}
    kept = read(out)
    before = kept["facts"]
    differs = different_settings(before, manifest)
    if differs is None and before["rounds"] != manifest["rounds"]:
        differs = "number of rounds"
    if differs:
        raise DataError(
            f"{out} holds figures with another {differs}.\n"
            "Repeat the command that began it, or name another --out."
        )
    return kept | {"facts": continued(before, manifest)}


def read(out: Path) -> dict[str, Any]:
    """The figures of a folder.

    Raises:
        DataError: There are none.
    """
    try:
        return json.loads((out / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{out / FILE} cannot be read: {error}.\nMeasure with `run` first."
        ) from error


@app.command
def show(out: Path = Path("runs/growth"), *, to: Path = common.RESULTS / "growth") -> None:
    """Draw the figure, print tables and the verdict; `to` gets all of it.

    Parameters
    ----------
    out
        Where `run` put its figures.
    to
        Where what is small enough to commit goes.
    """
    kept = read(out)
    to.mkdir(parents=True, exist_ok=True)
    figure = report.figure(kept["points"])
    if mark := forced(kept["facts"]):
        stamp(figure, f"{kept['facts']['target']['name'].partition(' (')[0]}: {mark}")
    write_figure(figure, to / "growth")
    text = f"{report.tables(kept)}\n{report.verdict(kept['points'])}\n"
    (to / "growth.md").write_text(text, encoding="utf-8")
    if (out / FILE).resolve() != (to / FILE).resolve():
        shutil.copy(out / FILE, to / FILE)
    print(text)


if __name__ == "__main__":
    common.main(app)
