"""Plots from stored rounds. Never runs a model; keeps matplotlib's state to itself."""

from __future__ import annotations

import io
import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttspec.bench.measures import (
    Bin,
    by_position,
    draft_positions,
    emitted,
    pair,
    rounds,
    seconds,
    seconds_without_learning,
    speed,
    stage_seconds,
    tokens,
)
from ttspec.bench.runs import Arm
from ttspec.bench.tables import kind, pairs_of, run_of
from ttspec.records import Round

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "plain": "plain decoding",
    "static": "static drafter",
    "learn-session": "learning drafter",
}
"""What `ttspec demo` calls its arms; a benchmark's arms go by their own names."""
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "plain": "#767676",
    "ngram": "#009e73",
    "static": "#d55e00",
    "static-window": "#e69f00",
    "static-rebased": "#cc79a7",
    "learn": "#56b4e9",
    "learn-session": "#0072b2",
    "learn-shared": "#5a3e99",
}
SPARE_COLOURS = (
    *("#8a6fd1", "#8c8c00", "#00a3a3", "#b5544d"),
    *("#5a7d2a", "#b86fb0", "#3f5f8a", "#a87f3f"),
)
STAGE_COLOURS = {
    "draft": "#56b4e9",
    "verify": "#767676",
    "learn": "#d55e00",
    "other": "#e0c080",
}
COST_COLOURS = ("#0072b2", "#e69f00", "#d55e00")
WIDTHS = ((512, 64), (2048, 128), (4096, 256))
"""(longest run, width of a bin of generated position); 512 beyond."""
LONG = 26
"""Letters of a name, above which two do not fit beside each other on a phone."""
INK, GRID = "#333333", "#dddddd"


def label(arm: str) -> str:
    """An arm's name for people."""
    return LABELS.get(arm, arm)


def colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour for each arm: that of its kind, if no other arm has it yet."""
    spare, palette = cycle(SPARE_COLOURS), {}
    for name in arms:
        usual = COLOURS.get(name) or COLOURS.get(name.rpartition(": ")[2].partition("[")[0])
        taken = usual in palette.values() or (
            name not in COLOURS and usual in map(COLOURS.get, arms)
        )
        palette[name] = usual if usual and not taken else next(spare)
    return palette


def sliding_acceptance(
    rounds: Sequence[Round], span: int, step: int = 8
) -> tuple[list[float], list[float]]:
    """Positions, and the acceptance length of the rounds within span / 2 tokens of each."""
    ordered = sorted(rounds, key=lambda r: r.position)
    if not ordered:
        return [], []
    starts = [r.position for r in ordered]
    sums = [0, *accumulate(r.emitted for r in ordered)]
    first, last = starts[0], starts[-1]
    low, high = first + span // 4, last - span // 4
    positions, values = [], []
    for centre in range(low, max(high, low) + 1, step):
        a = bisect_left(starts, centre - span // 2)
        b = bisect_left(starts, centre + span // 2)
        if b > a:
            positions.append(float(centre))
            values.append((sums[b] - sums[a]) / (b - a))
    return positions, values


def natural_span(arms: Sequence[Arm]) -> int:
    """A window wide enough to be calm and narrow enough to show a change."""
    tokens = max((r.position for arm in arms for r in arm.rounds), default=0)
    return 256 if tokens < 3000 else 512


def acceptance_figure(arms: Sequence[Arm], span: int | None = None) -> Figure:
    """Acceptance length against the generated position, one labelled line an arm."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    span = span or natural_span(arms)
    palette = colours([arm.name for arm in arms])
    with rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        axes = figure.subplots()
        ends, top = [], 2.0
        for arm in arms:
            x, y = sliding_acceptance(arm.rounds, span)
            if x:
                axes.plot(x, y, color=palette[arm.name], linewidth=2, solid_capstyle="round")
                ends.append((y[-1], arm.name))
                top = max(top, *y)
        right = max((r.position for arm in arms for r in arm.rounds), default=1)
        axes.set(xlim=(0, max(right, 1)), ylim=(0.8, top + 0.25))
        axes.set_xlabel("generated tokens")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylabel(f"tokens per target forward\n(mean over {span} tokens)")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        for height, name in _apart(ends, gap=0.07 * (top + 0.25 - 0.8)):
            axes.annotate(
                label(name),
                xy=(1.015, height),
                xycoords=axes.get_yaxis_transform(),
                color=palette[name],
                va="center",
                weight="bold",
                annotation_clip=False,
            )
    return figure


def position_figure(arms: Sequence[Arm], *, across: bool = False) -> Figure:
    """Acceptance length in bins of generated position, with intervals over requests.

    Arms of several folders get a panel a folder, one below the other or `across` the page. A
    folder of one arm is a dotted line in every panel instead.
    """
    folders = list(dict.fromkeys(map(run_of, arms)))
    panels = {f: [arm for arm in arms if run_of(arm) == f] for f in folders}
    several = {f: own for f, own in panels.items() if len(own) > 1} or panels
    everywhere = [own[0] for f, own in panels.items() if f not in several]
    last = max((r.position for arm in arms for r in arm.rounds), default=1)
    width = next((w for most, w in WIDTHS if last <= most), 512)
    figure, grid = _figures(len(several), across=across)
    top = 2.0
    for axes, (folder, own) in zip(grid, several.items(), strict=True):
        bins = by_position(own + everywhere, range(0, last + width + 1, width))
        for name, colour in colours(list(bins)).items():
            x = [(b.low + min(b.high, last)) / 2 for b in bins[name]]
            y = [b.acceptance.value for b in bins[name]]
            top = max(top, *y) if y else top
            short = name.rpartition(": ")[2]
            if any(name == arm.name for arm in everywhere):
                axes.plot(x, y, color=colour, label=short, lw=1.4, ls=":")
                continue
            dot = "o" if len(x) == 1 else None  # a line of one point cannot be seen
            axes.plot(x, y, color=colour, label=short, lw=1.8, marker=dot)
            low = [b.acceptance.low for b in bins[name]]
            high = [b.acceptance.high for b in bins[name]]
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        axes.set(xlim=(0, max(last, 1)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        _say_alive(axes, bins)
        if folder:
            axes.set_title(folder, fontsize=10, pad=16, color=INK)
    for axes in grid:
        axes.set_ylim(0.8, top + 0.25)
    for axes in grid if across else grid[-1:]:
        axes.set_xlabel("generated tokens")
    for axes in grid[:1] if across else grid:
        axes.set_ylabel(f"tokens per target forward\n(bins of {width})")
    _legend(figure, *grid, columns=5 if across else 2)
    return figure


def _say_alive(axes: Axes, bins: dict[str, list[Bin]]) -> None:
    """How many units each stretch of the plot rests on, above it."""
    longest = max(bins.values(), key=len, default=[])
    axes.set_title("units alive", loc="left", fontsize=8, pad=16, color=INK)
    right = axes.get_xlim()[1]
    for b in longest[:: -(-len(longest) // 6) or 1]:
        at = ((b.low + min(b.high, right)) / 2, 1.0)
        style: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8, "color": INK}
        place = axes.get_xaxis_transform()
        axes.annotate(f"{b.alive}", at, (0, 3), place, textcoords="offset points", **style)


def draft_figure(arms: Sequence[Arm]) -> Figure:
    """How often the i-th drafted token is accepted, of the rounds that drafted so many."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure()
    for name, colour in colours([arm.name for arm in arms]).items():
        shares = draft_positions(next(arm for arm in arms if arm.name == name))
        if shares:
            x = range(1, len(shares) + 1)
            axes.plot(x, shares, color=colour, label=name, lw=1.8, marker="o", ms=3.5)
    axes.set(ylim=(0, 1))
    axes.set_xlabel("drafted token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes.set_ylabel("accepted up to here")
    _legend(figure, axes)
    return figure


def speed_figure(arms: Sequence[Arm]) -> Figure:
    """Tokens per second, with intervals over requests."""
    figure, axes = _figure(rows=len(arms))
    palette = colours([arm.name for arm in arms])
    for y, arm in enumerate(arms):
        found = speed(arm)
        if found is None:
            continue
        axes.barh(y, found.value, color=palette[arm.name], height=0.6)
        if found.low == found.low:  # not nan
            edges = [[max(found.value - found.low, 0)], [max(found.high - found.value, 0)]]
            axes.errorbar(found.value, y, xerr=edges, color=INK, lw=1.2, capsize=3)
    _name_rows(axes, arms)
    axes.set_xlabel("tokens per second")
    return figure


def stage_figure(arms: Sequence[Arm]) -> Figure:
    """Where the time of a token goes."""
    figure, axes = _figure(rows=len(arms) + 1)
    left = [0.0] * len(arms)
    for stage, colour in STAGE_COLOURS.items():
        parts = [1000 * stage_seconds(arm)[stage] for arm in arms]
        axes.barh(range(len(arms)), parts, left=left, color=colour, label=stage, height=0.6)
        left = [a + b for a, b in zip(left, parts, strict=True)]
    _name_rows(axes, arms)
    axes.set_xlabel("milliseconds a generated token")
    _legend(figure, axes, columns=len(STAGE_COLOURS))
    return figure


def cost_figure(arms: Sequence[Arm]) -> Figure:
    """What learning gains in rounds, and what is left of it once the updates are paid for."""
    pairs = [(a, b) for a, b in pairs_of(arms) if a.updates and kind(b).startswith("static")]
    figure, axes = _figure(rows=3 * len(pairs) + 1)
    kinds = ((emitted, rounds), (tokens, seconds_without_learning), (tokens, seconds))
    names = ("acceptance length", "speed, were updates free", "speed")
    marks = {name: [] for name in names}
    for number, (a, b) in enumerate(pairs):
        for offset, (name, counts) in enumerate(zip(names, kinds, strict=True)):
            if found := pair(a, b, *counts):
                marks[name].append((number + (offset - 1) * 0.22, found.ratio))
    for (name, found), colour in zip(marks.items(), COST_COLOURS, strict=True):
        y, x = [at for at, _ in found], [ratio.value for _, ratio in found]
        edges = [(r.low, r.high) if r.low == r.low else (r.value, r.value) for _, r in found]
        axes.hlines(y, [e[0] for e in edges], [e[1] for e in edges], color=colour, lw=1.4)
        axes.plot(x, y, "o", color=colour, ms=5, label=name)
    axes.axvline(1, color=INK, lw=0.8)
    labels = [f"{a.name.replace('[', chr(10) + '[')}\n/ {b.name}" for a, b in pairs]
    axes.set_yticks(range(len(pairs)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("ratio; right of 1 is better with learning")
    _legend(figure, axes, columns=3)
    return figure


def stamp(figure: Figure, text: str) -> None:
    """Write above all plots what must not be lost when a figure is shown alone."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure.suptitle(text, fontsize=9)


def write_svg(figure: Figure, path: Path) -> None:
    """The figure as a file of vectors on white."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def write_png(figure: Figure, path: Path) -> None:
    """The figure as a picture on white."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure.savefig(path, format="png", dpi=160, facecolor="white")


def to_svg(figure: Figure, prefix: str = "") -> str:
    """The figure as an <svg> element whose ink and grid follow the page's light or dark mode.

    Several on one page need a `prefix` each, or their ids would meet.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    text = text.replace(INK, "var(--ink)").replace(GRID, "var(--line)")
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def _figure(rows: int | None = None) -> tuple[Figure, Axes]:
    """A figure small enough for a phone, with one plot; `rows` is its number of bars."""
    figure, (axes,) = _figures(1, height=None if rows is None else 0.9 + 0.36 * rows)
    if rows is not None:
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=GRID, linewidth=0.8)
    return figure, axes


def _figures(
    count: int, *, across: bool = False, height: float | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of several plots beside or below each other, which share their axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shape, own = ((1, count) if across else (count, 1)), height or 3.6
    with rc_context(_STYLE):
        size = (4.2 * count, own) if across else (5.0, own * count)
        figure = Figure(figsize=size, layout="constrained")
        grid = list(figure.subplots(*shape, squeeze=False, sharey=across).flat)
    for axes in grid:
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _legend(figure: Figure, *grid: Axes, columns: int = 2) -> None:
    """One legend for all plots, a name once."""
    from matplotlib import rc_context

    lines = {}
    for axes in grid:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(name, handle)
    if lines:
        if columns == 2 and max(map(len, lines)) > LONG:
            columns = 1
            figure.set_figheight(figure.get_figheight() + 0.1 * len(lines))
        style: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
        with rc_context(_STYLE):
            figure.legend(list(lines.values()), list(lines), ncols=columns, **style)


def _name_rows(axes: Axes, arms: Sequence[Arm]) -> None:
    axes.set_yticks(range(len(arms)), [arm.name.replace("[", "\n[") for arm in arms], fontsize=9)
    axes.invert_yaxis()


def _apart(ends: Sequence[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """Move labels up until each is at least `gap` above the one below."""
    placed: list[tuple[float, str]] = []
    for height, name in sorted(ends):
        lowest = placed[-1][0] + gap if placed else height
        placed.append((max(height, lowest), name))
    return placed


_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "ttspec",
}
