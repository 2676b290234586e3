"""How a round's cost grows with context and with rows: `run` measures, `show` prints and judges.

Random weights in published shapes, so that no checkpoint is needed; acceptance is forced. Every
point is written as soon as it is measured, and `run` repeated goes on where it was.
"""

import gc
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import common
import torch
from cyclopts import App

from ttspec.bench import timing
from ttspec.bench.jsonl import write_json
from ttspec.bench.manifest import describe, forced_sentence, gpu_clocks
from ttspec.bench.store import continued, different_settings
from ttspec.bench.table import EMPTY, Table, number
from ttspec.bench.timing import Plan, Timed
from ttspec.config import DraftConfig, LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.errors import DataError, OptionError, ResourceError

FILE = "growth.json"
Measured = dict[str, Any]
"""A point and what was measured there, as its file has it."""
TOLERANCE = 0.05
"""Growth by more than this above linear is worse than linear: medians of 20 rounds differ so."""
STAGES = ("draft", "verify", "learn", "round")
AXES = {"context": "rows", "rows": "context"}
"""What grows, and what stays the same meanwhile."""
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
    for count, point in enumerate(wanted, 1):
        if point in done:
            continue
        began = time.perf_counter()
        found = asdict(point) | measure(engine, point, rounds)
        kept["points"].append(found | {"clocks": gpu_clocks(engine.target.device)})
        write_json(out / FILE, kept)
        took = time.perf_counter() - began
        result = found.get("error") or f"{1e3 * found['seconds']['round']:.2f} ms a round"
        name = name_of(found)
        print(f"{count} of {len(wanted)}: {name}: {result} ({took:.0f} s)", flush=True)
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
    """Print tables and the verdict; `to` gets all of it.

    Parameters
    ----------
    out
        Where `run` put its figures.
    to
        Where what is small enough to commit goes.
    """
    kept = read(out)
    to.mkdir(parents=True, exist_ok=True)
    text = f"{tables(kept)}\n{verdict(kept['points'])}\n"
    (to / "growth.md").write_text(text, encoding="utf-8")
    if (out / FILE).resolve() != (to / FILE).resolve():
        shutil.copy(out / FILE, to / FILE)
    print(text)


class Step(NamedTuple):
    """From one point to the next along an axis."""

    where: str
    what: str
    grew: float
    """How many times as much there is of what grows."""
    ratio: float
    """How many times as much it takes."""


def series(point: Measured) -> str:
    """Static, or how it learns."""
    learn = point["learn"]
    return f"learning, scope {learn['scope']}, stride {learn['stride']}" if learn else "static"


def name_of(point: Measured) -> str:
    """A point for people."""
    return f"{series(point)}, {point['rows']} x {point['context']}"


def lines(points: Sequence[Measured], axis: str) -> dict[tuple[str, int], list[Measured]]:
    """Points along an axis, by series and what stays the same; only where there are several."""
    grouped: dict[tuple[str, int], list[Measured]] = {}
    for point in sorted(points, key=lambda p: p[axis]):
        grouped.setdefault((series(point), point[AXES[axis]]), []).append(point)
    return {key: line for key, line in grouped.items() if len(line) > 1}


def value(point: Measured, what: str) -> float | None:
    """Seconds of a stage, or bytes beyond the weights; None where nobody knows."""
    if "error" in point:
        return None
    if what == "memory":
        peak = point["memory_peak"]
        return None if peak is None else peak - point["memory_before"]
    return point["seconds"][what]


def steps(points: Sequence[Measured]) -> Iterator[Step]:
    """Every stage from each point to the next that was measured."""
    for axis in AXES:
        for (name, _), line in lines(points, axis).items():
            for what in (*STAGES, "memory"):
                known = [(p[axis], v) for p in line if (v := value(p, what)) is not None]
                for (a, before), (b, after) in pairwise(known):
                    where = f"{name}, {axis} {a:,} to {b:,}"
                    yield Step(where, what, b / a, after / (before or 1.0))


def verdict(points: Sequence[Measured]) -> str:
    """Whether no step is worse than linear, and what is."""
    every = list(steps(points))
    rule = f"time(2x) / time(x) at most 2, tolerance {TOLERANCE:.0%}; memory likewise"
    if not every:
        return "No verdict: there are no two points along an axis."
    top = max(every, key=lambda s: s.ratio / s.grew)
    steepest = f"{top.ratio:.2f} times for {top.grew:g} times, {top.what}, {top.where}"
    text = (
        f"**No step is worse than linear** ({rule}): {len(every)} steps, the steepest {steepest}."
    )
    if worse := [s for s in every if s.ratio > s.grew * (1 + TOLERANCE)]:
        text = "\n".join(
            [
                f"**{len(worse)} of {len(every)} steps are worse than linear** ({rule}):",
                *(
                    f"- {s.what}, {s.where}: {s.ratio:.2f} times for {s.grew:g} times"
                    for s in worse
                ),
            ]
        )
    if full := [name_of(p) for p in points if "error" in p]:
        text += f"\n\nOut of memory, so in no step: {'; '.join(full)}."
    if not any(step.what == "memory" for step in every):
        text += "\n\nMemory is counted on a GPU only."
    return text


def tables(kept: dict[str, Any]) -> str:
    """A table for each axis and series, as Markdown."""
    manifest = kept["facts"]
    clocks = ", ".join(f"{k} {v}" for k, v in (manifest["clocks"] or {}).items())
    note = (
        f"{manifest['device']}{f' ({clocks})' if clocks else ''}, {manifest['dtype']}, torch "
        f"{manifest['versions']['torch']}, commit {manifest['git'] or 'unknown'}. Medians of at "
        f"least {manifest['rounds']} rounds, greedy, random tokens. Learn: its share in every "
        "round. Growth: the round's, over the line above. Peak: the most on the device; beyond: "
        f"without what was there before, which are the weights. {forced_sentence(manifest)}"
    )
    made = [
        Table(
            title=f"{name}, {AXES[axis]} {same:,}",
            head=(
                *(axis, "draft, ms", "verify, ms", "learn, ms", "round, ms", "growth"),
                *("an update, ms", "peak, GB", "beyond, GB"),
            ),
            rows=[_row(p, before, axis) for before, p in zip([None, *line], line, strict=False)],
        ).markdown()
        for axis in AXES
        for (name, same), line in lines(kept["points"], axis).items()
    ]
    return "\n".join(made) + f"\n{note}\n"


def _row(point: Measured, before: Measured | None, axis: str) -> tuple[str, ...]:
    draft, verify, learn, whole, update = (
        number(value(point, what), scale=1e3) for what in (*STAGES, "update")
    )
    own, previous = value(point, "round"), before and value(before, "round")
    beyond = value(point, "memory")
    return (
        *(f"{point[axis]:,}", draft, verify, learn, point.get("error", whole)),
        f"{own / previous:.2f}" if own and previous else EMPTY,
        update,
        number(None if beyond is None else point["memory_peak"], scale=1e-9),
        number(beyond, scale=1e-9),
    )


if __name__ == "__main__":
    common.main(app)
