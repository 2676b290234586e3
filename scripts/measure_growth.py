"""How a round's cost grows with context and with rows: `run` measures, `show` draws and judges.

Random weights in published shapes, so that no checkpoint is needed; acceptance is forced. Every
point is written as soon as it is measured, and `run` repeated goes on where it was.
"""

import gc
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from cyclopts import App

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "growth"
FILE = "growth.json"
TOLERANCE = 0.05
"""Growth by more than this above linear is worse than linear: medians of 20 rounds differ so."""
STAGES = ("draft", "verify", "learn", "round", "memory")
AXES = {"context": "rows", "rows": "context"}
"""What grows, and what stays the same meanwhile."""
EMPTY = "–"
app = App(help=__doc__)


@dataclass(frozen=True)
class Point:
    """What is measured at once."""

    rows: int
    context: int
    learn: dict[str, Any] | None
    """Fields of a `LearnConfig`; None is a static drafter."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{series(asdict(self))}, {self.rows} x {self.context}"


def points(
    contexts: Sequence[int], rows: Sequence[int], at: tuple[int, int], learn: dict | None
) -> list[Point]:
    """Every point once, the small ones first; `at` has the rows and the context of the others."""
    kinds = [None] if learn is None else [None, learn]
    found = [
        Point(*shape, kind)
        for kind in kinds
        for shape in [*((at[0], n) for n in contexts), *((n, at[1]) for n in rows)]
    ]
    return [point for i, point in enumerate(found) if point not in found[:i]]


@app.command
def run(
    *,
    random_weights: str = "qwen3-8b+dflash",
    accept: str = "3,2,4",
    out: Path = Path("runs/growth"),
    contexts: str = "1024,2048,4096,8192,16384,32768",
    rows: str = "1,2,4,8,16,32",
    at_rows: int = 1,
    at_context: int = 2048,
    rounds: int = 20,
    learn: bool = True,
    scope: str = "shared",
    stride: int = 4,
    device: str = "auto",
    dtype: str = "bfloat16",
    compile: bool = True,
) -> int:
    """Measure every point that the folder does not have yet.

    Parameters
    ----------
    random_weights
        Shapes, as of `ttspec bench roofline`.
    accept
        Drafts kept a round, in turn.
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
    device
        auto, cpu or cuda.
    dtype
        Number format.
    compile
        Compile the models' layers, on a GPU.
    """
    from ttspec.bench.manifest import describe, forced_sentence, gpu_clocks
    from ttspec.bench.timing import Plan
    from ttspec.config import LearnConfig
    from ttspec.decoding.forced import load_random

    # Published now, so that an update has a time of its own.
    config = LearnConfig(stride=stride, scope=scope, publish="now") if learn else None  # type: ignore[arg-type]
    wanted = points(
        numbers("contexts", contexts),
        numbers("rows", rows),
        (at_rows, at_context),
        asdict(config) if config else None,
    )
    engine = load_random(random_weights, accept, device=device, dtype=dtype, compile=compile)
    assert engine.drafter is not None
    room = Plan.of(rounds, engine.drafter.length, config).tokens
    check_contexts(wanted, room, engine.target.context)
    facts = describe(engine, title="How cost grows") | {"rounds": rounds}
    print(forced_sentence(facts), flush=True)
    kept = open_folder(out, facts)
    done = [Point(p["rows"], p["context"], p["learn"]) for p in kept["points"]]
    for number, point in enumerate(wanted, 1):
        if point in done:
            continue
        began = time.perf_counter()
        found = measure(engine, point, rounds)
        found |= {"clocks": gpu_clocks(engine.target.device)}
        kept["points"].append(asdict(point) | found)
        write(out, kept)
        took = time.perf_counter() - began
        said = found.get("error") or f"{1e3 * found['seconds']['round']:.2f} ms a round"
        print(f"{number} of {len(wanted)}: {point.name}: {said} ({took:.0f} s)", flush=True)
    print(f"Next: python scripts/measure_growth.py show --out {out}")
    return 0


def numbers(name: str, text: str) -> list[int]:
    """Whole numbers from 1 up, with commas between them, in order."""
    from ttspec.errors import OptionError

    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise OptionError(f"--{name} is {text!r}; allowed are whole numbers from 1 up, as in 1,2.")
    return found


def check_contexts(wanted: Sequence[Point], room: int, limit: int) -> None:
    """Refuse contexts that leave no room for the rounds, before anything is measured."""
    from ttspec.errors import OptionError

    most = max(point.context for point in wanted)
    if most + room > limit:
        raise OptionError(
            f"A context is {most}, but the rounds write up to {room} tokens more and the target "
            f"has room for {limit}.\nAllowed is up to {limit - room}."
        )


def measure(engine: Any, point: Point, rounds: int) -> dict[str, Any]:
    """Seconds of a round by stage and bytes on the device; or that memory ran out."""
    import torch

    from ttspec.bench.timing import Plan, timed
    from ttspec.config import DraftConfig, LearnConfig

    device = engine.target.device
    cuda = device.type == "cuda"
    gc.collect()  # what the point before held
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else None
    learn = LearnConfig(**point.learn) if point.learn else None
    plan = Plan.of(rounds, engine.drafter.length, learn)
    try:
        # A sibling learns for itself, and what it learned goes with it.
        found, filled, _ = timed(
            engine.sibling(), DraftConfig(), learn, plan, rows=point.rows, context=point.context
        )
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
    import torch

    from ttspec.errors import ResourceError

    while error is not None:
        kinds = (ResourceError, torch.OutOfMemoryError, MemoryError)
        if isinstance(error, kinds) or "out of memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def summary(found: Sequence[Any], stride: int) -> dict[str, float | None]:
    """Medians over rounds; where an update comes only now and then, over strides of rounds.

    On a GPU the host does not wait for an update's last part, the step itself, before the round
    after it, so that only a whole stride's time says what its rounds took.
    """
    strides = [found[i : i + stride] for i in range(0, len(found), stride)]

    def each(name: str) -> float:
        return median(fmean(getattr(t, name) for t in own) for own in strides)

    updates = [t.learn for t in found if t.updated]
    return {
        "draft": median(t.draft for t in found),
        "verify": median(t.verify for t in found),
        "learn": each("learn") if updates else None,  # else a microsecond of asking
        "update": median(updates) if updates else None,
        "round": each("wall"),
    }


def open_folder(out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What the folder has, if it is of this run; else the beginning."""
    from ttspec.bench.store import different_settings
    from ttspec.errors import DataError

    if not (out / FILE).exists():
        return {"facts": facts, "points": []}
    kept = read(out)
    before = kept["facts"]
    differs = different_settings(before, facts)
    if differs is None and before["rounds"] != facts["rounds"]:
        differs = "number of rounds"
    if differs:
        raise DataError(
            f"{out} holds figures with another {differs}.\n"
            "Repeat the command that began it, or name another --out."
        )
    again = {name: facts[name] for name in ("date", "command", "git", "versions")}
    before["continued"] = [*before.get("continued", []), again]
    return kept


def write(out: Path, kept: dict[str, Any]) -> None:
    """Replace the figures at once: an interrupt leaves the old ones."""
    out.mkdir(parents=True, exist_ok=True)
    new = out / f"{FILE}.new"
    new.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(out / FILE)


def read(out: Path) -> dict[str, Any]:
    """The figures of a folder.

    Raises:
        DataError: There are none.
    """
    from ttspec.errors import DataError

    try:
        return json.loads((out / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{out / FILE} cannot be read: {error}.\nMeasure with `run` first."
        ) from error


@app.command
def show(out: Path = Path("runs/growth"), *, to: Path = RESULTS) -> None:
    """Draw the figure, print tables and the verdict; `to` gets all of it.

    Parameters
    ----------
    out
        Where `run` put its figures.
    to
        Where what is small enough to commit goes.
    """
    from ttspec.bench.figures import stamp, write_png, write_svg
    from ttspec.bench.manifest import forced

    kept = read(out)
    to.mkdir(parents=True, exist_ok=True)
    drawn = figure(kept["points"])
    if mark := forced(kept["facts"]):
        stamp(drawn, f"{kept['facts']['target']['name'].partition(' (')[0]}: {mark}")
    write_png(drawn, to / "growth.png")
    write_svg(drawn, to / "growth.svg")
    text = tables(kept) + "\n" + verdict(kept["points"]) + "\n"
    (to / "growth.md").write_text(text, encoding="utf-8")
    if (out / FILE).resolve() != (to / FILE).resolve():
        shutil.copy(out / FILE, to / FILE)
    print(text)


@dataclass(frozen=True)
class Step:
    """From one point to the next along an axis."""

    where: str
    what: str
    grew: float
    """How many times as much there is of what grows."""
    ratio: float
    """How many times as much it takes."""

    @property
    def is_worse(self) -> bool:
        """Worse than linear."""
        return self.ratio > self.grew * (1 + TOLERANCE)


def lines(found: Sequence[dict], axis: str) -> dict[tuple[str, int], list[dict]]:
    """Points along an axis, by series and what stays the same; only where there are several."""
    rest, grouped = AXES[axis], {}
    for point in sorted(found, key=lambda p: p[axis]):
        grouped.setdefault((series(point), point[rest]), []).append(point)
    return {key: line for key, line in grouped.items() if len(line) > 1}


def series(point: dict[str, Any]) -> str:
    """Static, or how it learns."""
    learn = point["learn"]
    return f"learning, scope {learn['scope']}, stride {learn['stride']}" if learn else "static"


def value(point: dict[str, Any], what: str) -> float | None:
    """Seconds of a stage, or bytes beyond the weights; None where nobody knows."""
    if "error" in point:
        return None
    if what == "memory":
        peak = point["memory_peak"]
        return None if peak is None else peak - point["memory_before"]
    return point["seconds"][what]


def steps(found: Sequence[dict]) -> Iterator[Step]:
    """Every stage from each point to the next that was measured."""
    for axis in AXES:
        for (name, _), line in lines(found, axis).items():
            for what in STAGES:
                known = [p for p in line if value(p, what) is not None]
                for a, b in pairwise(known):
                    yield Step(
                        f"{name}, {axis} {a[axis]:,} to {b[axis]:,}",
                        what,
                        b[axis] / a[axis],
                        (value(b, what) or 0.0) / (value(a, what) or 1.0),
                    )


def verdict(found: Sequence[dict]) -> str:
    """Whether no step is worse than linear, and what is."""
    every = list(steps(found))
    rule = f"time(2x) / time(x) at most 2, tolerance {TOLERANCE:.0%}; memory likewise"
    if not every:
        return "No verdict: there are no two points along an axis."
    top = max(every, key=lambda s: s.ratio / s.grew)
    said = f"{top.ratio:.2f} times for {top.grew:g} times, {top.what}, {top.where}"
    worse = [step for step in every if step.is_worse]
    text = f"**No step is worse than linear** ({rule}): {len(every)} steps, the steepest {said}."
    if worse:
        text = f"**{len(worse)} of {len(every)} steps are worse than linear** ({rule}):\n"
        text += "\n".join(
            f"- {s.what}, {s.where}: {s.ratio:.2f} times for {s.grew:g} times" for s in worse
        )
    out = [Point(p["rows"], p["context"], p["learn"]).name for p in found if "error" in p]
    if out:
        text += f"\n\nOut of memory, so in no step: {'; '.join(out)}."
    if not any(step.what == "memory" for step in every):
        text += "\n\nMemory is counted on a GPU only."
    return text


def tables(kept: dict[str, Any]) -> str:
    """A table for each axis and series, as Markdown."""
    from ttspec.bench.manifest import forced_sentence
    from ttspec.bench.tables import Table

    facts = kept["facts"]
    clocks = ", ".join(f"{k} {v}" for k, v in (facts["clocks"] or {}).items())
    note = (
        f"{facts['device']}{f' ({clocks})' if clocks else ''}, {facts['dtype']}, torch "
        f"{facts['versions']['torch']}, commit {facts['git'] or 'unknown'}. Medians of at least "
        f"{facts['rounds']} rounds, greedy, random tokens. Learn: its share in every round. "
        "Growth: the round's, over the line above. Peak: the most on the device; beyond: without "
        f"what was there before, which are the weights. {forced_sentence(facts)}"
    )
    made = []
    for axis, rest in AXES.items():
        for (name, same), line in lines(kept["points"], axis).items():
            rows, before = [], None
            for p in line:
                times = [value(p, what) for what in (*STAGES[:4], "update")]
                cells = [EMPTY if t is None else f"{1e3 * t:.2f}" for t in times]
                if "error" in p:
                    cells[3] = p["error"]
                own = value(p, "round")
                grew = f"{own / before:.2f}" if own and before else EMPTY
                before = own
                beyond = value(p, "memory")
                memory = [EMPTY, EMPTY]
                if beyond is not None:
                    memory = [f"{p['memory_peak'] / 1e9:.2f}", f"{beyond / 1e9:.2f}"]
                rows.append((f"{p[axis]:,}", *cells[:4], grew, cells[4], *memory))
            head = (axis, "draft, ms", "verify, ms", "learn, ms", "round, ms", "growth")
            made.append(
                Table(
                    title=f"{name}, {rest} {same:,}",
                    note="",
                    head=(*head, "an update, ms", "peak, GB", "beyond, GB"),
                    rows=rows,
                ).markdown()
            )
    return "\n".join(made) + "\n" + note + "\n"


def figure(found: Sequence[dict]) -> "Figure":
    """Time by stage for each series, and memory, along both axes; dashed is linear growth."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    from ttspec.bench import figures as f

    names = list(dict.fromkeys(map(series, found)))
    has_memory = any(value(p, "memory") for p in found)
    height = len(names) + has_memory
    with rc_context(f._STYLE):
        drawn = Figure(figsize=(8.6, 2.9 * height + 0.6), layout="constrained")
        grid = drawn.subplots(height, 2, squeeze=False, sharey="row")
    colours = {name: f.STAGE_COLOURS[name] for name in STAGES[:3]} | {"round": f.INK}
    shades = dict(zip(names, f.COST_COLOURS, strict=False))
    for column, (axis, rest) in enumerate(AXES.items()):
        for (name, same), line in lines(found, axis).items():
            axes = grid[names.index(name)][column]
            axes.set_title(f"{name}, {rest} {same:,}", fontsize=9.5, color=f.INK)
            for what, colour in colours.items():
                curve(axes, line, axis, what, colour, what, 1e3)
            say_full(axes, line, axis)
            if has_memory:
                curve(grid[-1][column], line, axis, "memory", shades[name], name, 1e-9)
    for row, panels in enumerate(grid):
        for (axis, rest), axes in zip(AXES.items(), panels, strict=True):
            ticks = sorted({p[axis] for line in lines(found, axis).values() for p in line})
            if not ticks:
                axes.set_axis_off()
                continue
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(ticks, [short(n) for n in ticks])
            axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            axes.grid(axis="y", color=f.GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel("tokens of context" if axis == "context" else "rows")
            if has_memory and row == height - 1:
                axes.set_title(f"memory beyond the weights, {rest} as above", fontsize=9.5)
        is_memory = has_memory and row == height - 1
        panels[0].set_ylabel("peak, GB" if is_memory else "milliseconds a round")
    f._legend(drawn, *grid.flat, columns=5)
    return drawn


def curve(
    axes: Any, line: Sequence[dict], axis: str, what: str, colour: str, label: str, unit: float
) -> None:
    """A measured line and, for a whole round and for memory, what linear growth would be."""
    known = [(p[axis], unit * v) for p in line if (v := value(p, what)) is not None]
    if not known:
        return
    x, y = zip(*known, strict=True)
    axes.plot(x, y, color=colour, label=label, lw=1.8, marker="o", ms=3.5)
    if what in ("round", "memory"):
        linear = [y[0] * n / x[0] for n in x]
        axes.plot(x, linear, color=colour, lw=1, ls="--", label="linear from the first point")


def say_full(axes: Any, line: Sequence[dict], axis: str) -> None:
    """Where memory ran out."""
    for p in line:
        if "error" in p:
            at, place = (p[axis], 0.03), axes.get_xaxis_transform()
            style: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 8}
            axes.text(*at, p["error"], transform=place, **style)


def short(number: int) -> str:
    """A number for an axis."""
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else f"{number:,}"


def main() -> int:
    """Run one command line; what a user can mend is said in two lines."""
    from ttspec.errors import TtspecError

    try:
        return app() or 0
    except TtspecError as error:
        print(f"measure_growth: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
