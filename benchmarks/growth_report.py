"""The verdict, tables and figure of `growth.py`, from its points: JSON objects, one a shape."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ttspec.bench.manifest import forced_sentence
from ttspec.bench.plot_style import COST_COLOURS, INK, STAGE_COLOURS, legend, styled
from ttspec.bench.table import EMPTY, Table, number

Point = dict[str, Any]
TOLERANCE = 0.05
"""Growth by more than this above linear is worse than linear: medians of 20 rounds differ so."""
STAGES = ("draft", "verify", "learn", "round")
AXES = {"context": "rows", "rows": "context"}
"""What grows, and what stays the same meanwhile."""


class Step(NamedTuple):
    """From one point to the next along an axis."""

    where: str
    what: str
    grew: float
    """How many times as much there is of what grows."""
    ratio: float
    """How many times as much it takes."""


def series(point: Point) -> str:
    """Static, or how it learns."""
    learn = point["learn"]
    return f"learning, scope {learn['scope']}, stride {learn['stride']}" if learn else "static"


def name_of(point: Point) -> str:
    """A point for people."""
    return f"{series(point)}, {point['rows']} x {point['context']}"


def lines(points: Sequence[Point], axis: str) -> dict[tuple[str, int], list[Point]]:
    """Points along an axis, by series and what stays the same; only where there are several."""
    grouped: dict[tuple[str, int], list[Point]] = {}
    for point in sorted(points, key=lambda p: p[axis]):
        grouped.setdefault((series(point), point[AXES[axis]]), []).append(point)
    return {key: line for key, line in grouped.items() if len(line) > 1}


def value(point: Point, what: str) -> float | None:
    """Seconds of a stage, or bytes beyond the weights; None where nobody knows."""
    if "error" in point:
        return None
    if what == "memory":
        peak = point["memory_peak"]
        return None if peak is None else peak - point["memory_before"]
    return point["seconds"][what]


def steps(points: Sequence[Point]) -> Iterator[Step]:
    """Every stage from each point to the next that was measured."""
    for axis in AXES:
        for (name, _), line in lines(points, axis).items():
            for what in (*STAGES, "memory"):
                known = [(p[axis], v) for p in line if (v := value(p, what)) is not None]
                for (a, before), (b, after) in pairwise(known):
                    where = f"{name}, {axis} {a:,} to {b:,}"
                    yield Step(where, what, b / a, after / (before or 1.0))


def verdict(points: Sequence[Point]) -> str:
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


def _row(point: Point, before: Point | None, axis: str) -> tuple[str, ...]:
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


@styled
def figure(points: Sequence[Point]) -> Figure:
    """Time by stage for each series, and memory, along both axes; dashed is linear growth."""
    names = list(dict.fromkeys(map(series, points)))
    has_memory = any(value(p, "memory") for p in points)
    height = len(names) + has_memory
    drawn = Figure(figsize=(8.6, 2.9 * height + 0.6), layout="constrained")
    grid = drawn.subplots(height, 2, squeeze=False, sharey="row")
    shades = dict(zip(names, COST_COLOURS, strict=False))
    for column, (axis, rest) in enumerate(AXES.items()):
        on_axis = lines(points, axis)
        for (name, same), line in on_axis.items():
            axes = grid[names.index(name)][column]
            axes.set_title(f"{name}, {rest} {same:,}", fontsize=9.5)
            for what in STAGES:
                _curve(axes, line, axis, what, STAGE_COLOURS.get(what, INK), what, 1e3)
            _mark_out_of_memory(axes, line, axis)
            if has_memory:
                _curve(grid[-1][column], line, axis, "memory", shades[name], name, 1e-9)
        if has_memory:
            grid[-1][column].set_title(f"memory beyond the weights, {rest} as above", fontsize=9.5)
        ticks = sorted({p[axis] for line in on_axis.values() for p in line})
        for axes in grid[:, column]:
            _logarithmic(axes, axis, ticks)
    for axes in grid[:, 0]:
        axes.set_ylabel("milliseconds a round")
    if has_memory:
        grid[-1][0].set_ylabel("peak, GB")
    legend(drawn, *grid.flat, columns=5)
    return drawn


def _curve(
    axes: Axes, line: Sequence[Point], axis: str, what: str, colour: str, label: str, unit: float
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


def _mark_out_of_memory(axes: Axes, line: Sequence[Point], axis: str) -> None:
    place = axes.get_xaxis_transform()
    style: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 8}
    for p in line:
        if "error" in p:
            axes.text(p[axis], 0.03, p["error"], transform=place, **style)


def _logarithmic(axes: Axes, axis: str, ticks: Sequence[int]) -> None:
    if not ticks:
        axes.set_axis_off()
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    labels = [f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else f"{n:,}" for n in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set_xlabel("tokens of context" if axis == "context" else "rows")
