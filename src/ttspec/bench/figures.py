"""Plots from stored rounds. Never runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ttspec.bench import metrics as m
from ttspec.bench.plot_style import (
    COST_COLOURS,
    INK,
    STAGE_COLOURS,
    bars,
    colours,
    legend,
    panels,
    styled,
)
from ttspec.bench.report_tables import pairs_of
from ttspec.bench.results import Arm

WIDTHS = ((512, 64), (2048, 128), (4096, 256))
"""(longest run, width of a bin of generated position); 512 beyond."""
BOTTOM, ABOVE = 0.8, 0.25
"""Where axes of acceptance length begin, and their room above the highest value."""


@styled
def position_figure(arms: Sequence[Arm], *, across: bool = False) -> Figure:
    """Acceptance length in bins of generated position, with intervals over requests.

    Arms of several folders get a panel a folder, one below the other or `across` the page. A
    folder of one arm is a dotted line in every panel instead.
    """
    folders: dict[str, list[Arm]] = {}
    for arm in arms:
        folders.setdefault(arm.folder, []).append(arm)
    several = {folder: own for folder, own in folders.items() if len(own) > 1} or folders
    dotted = [own[0] for folder, own in folders.items() if folder not in several]
    last = max([1, *(r.position for arm in arms for r in arm.rounds)])
    width = next((w for most, w in WIDTHS if last <= most), 512)
    figure, grid = panels(len(several), across=across)
    top = 2.0
    for axes, (folder, own) in zip(grid, several.items(), strict=True):
        bins = m.by_position(own + dotted, range(0, last + width + 1, width))
        for name, colour in colours(list(bins)).items():
            x = [(b.low + min(b.high, last)) / 2 for b in bins[name]]
            y = [b.acceptance.value for b in bins[name]]
            top = max([top, *y])
            short = name.rpartition(": ")[2]
            if any(name == arm.name for arm in dotted):
                axes.plot(x, y, color=colour, label=short, lw=1.4, ls=":")
                continue
            dot = "o" if len(x) == 1 else None  # a line of one point cannot be seen
            axes.plot(x, y, color=colour, label=short, lw=1.8, marker=dot)
            low = [b.acceptance.low for b in bins[name]]
            high = [b.acceptance.high for b in bins[name]]
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        axes.set(xlim=(0, last))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        _write_alive(axes, max(bins.values(), key=len, default=[]))
        if folder:
            axes.set_title(folder, fontsize=10, pad=16)
    for axes in grid:
        axes.set_ylim(BOTTOM, top + ABOVE)
    for axes in grid if across else grid[-1:]:
        axes.set_xlabel("generated tokens")
    for axes in grid[:1] if across else grid:
        axes.set_ylabel(f"tokens per target forward\n(bins of {width})")
    legend(figure, *grid, columns=5 if across else 2)
    return figure


def _write_alive(axes: Axes, bins: Sequence[m.Bin]) -> None:
    """How many units each stretch of the plot rests on, above it."""
    axes.set_title("units alive", loc="left", fontsize=8, pad=16)
    right, place = axes.get_xlim()[1], axes.get_xaxis_transform()
    style: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8}
    for b in bins[:: -(-len(bins) // 6) or 1]:
        at = ((b.low + min(b.high, right)) / 2, 1.0)
        axes.annotate(f"{b.alive}", at, (0, 3), place, textcoords="offset points", **style)


@styled
def draft_figure(arms: Sequence[Arm]) -> Figure:
    """How often the i-th drafted token is accepted, of the rounds that drafted so many."""
    figure, (axes,) = panels(1)
    palette = colours([arm.name for arm in arms])
    for arm in arms:
        if shares := m.draft_positions(arm):
            x, colour = range(1, len(shares) + 1), palette[arm.name]
            axes.plot(x, shares, color=colour, label=arm.name, lw=1.8, marker="o", ms=3.5)
    axes.set(ylim=(0, 1), xlabel="drafted token", ylabel="accepted up to here")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend(figure, axes)
    return figure


@styled
def speed_figure(arms: Sequence[Arm]) -> Figure:
    """Tokens per second, with intervals over requests."""
    names = [arm.name for arm in arms]
    figure, axes = bars(names)
    for y, (arm, colour) in enumerate(zip(arms, colours(names).values(), strict=True)):
        if (found := m.speed(arm)) is None:
            continue
        axes.barh(y, found.value, color=colour, height=0.6)
        if found.has_interval:
            edges = [[max(found.value - found.low, 0)], [max(found.high - found.value, 0)]]
            axes.errorbar(found.value, y, xerr=edges, color=INK, lw=1.2, capsize=3)
    axes.set_xlabel("tokens per second")
    return figure


@styled
def stage_figure(arms: Sequence[Arm]) -> Figure:
    """Where the time of a token goes."""
    figure, axes = bars([arm.name for arm in arms], more=1)
    left = [0.0] * len(arms)
    for stage, colour in STAGE_COLOURS.items():
        parts = [1000 * m.stage_seconds(arm)[stage] for arm in arms]
        axes.barh(range(len(arms)), parts, left=left, color=colour, label=stage, height=0.6)
        left = [a + b for a, b in zip(left, parts, strict=True)]
    axes.set_xlabel("milliseconds a generated token")
    legend(figure, axes, columns=len(STAGE_COLOURS))
    return figure


@styled
def cost_figure(arms: Sequence[Arm]) -> Figure:
    """What learning gains in rounds, and what is left of it once the updates are paid for."""
    pairs = [(a, b) for a, b in pairs_of(arms) if a.updates and b.kind.startswith("static")]
    kinds = {
        "acceptance length": (m.emitted, m.rounds),
        "speed, were updates free": (m.tokens, m.seconds_without_learning),
        "speed": (m.tokens, m.seconds),
    }
    figure, (axes,) = panels(1, height=0.9 + 0.36 * (3 * len(pairs) + 1), grid="x")
    for offset, ((name, counts), colour) in enumerate(
        zip(kinds.items(), COST_COLOURS, strict=True)
    ):
        ratios = [
            (y + (offset - 1) * 0.22, found.ratio)
            for y, (a, b) in enumerate(pairs)
            if (found := m.pair(a, b, *counts))
        ]
        axes.plot(
            [r.value for _, r in ratios], [y for y, _ in ratios], "o", c=colour, ms=5, label=name
        )
        for y, r in ratios:
            if r.has_interval:
                axes.hlines(y, r.low, r.high, color=colour, lw=1.4)
    axes.axvline(1, color=INK, lw=0.8)
    labels = [f"{a.name.replace('[', chr(10) + '[')}\n/ {b.name}" for a, b in pairs]
    axes.set_yticks(range(len(pairs)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("ratio; right of 1 is better with learning")
    legend(figure, axes, columns=3)
    return figure


class Plot(NamedTuple):
    """A plot of a benchmark's page."""

    draw: Any
    title: str
    caption: str


PLOTS = {
    "acceptance": Plot(
        position_figure,
        "Acceptance length while the text grows",
        "Tokens that one forward of the target adds to the text, its own included: 1.0 means that "
        "drafting gained nothing. Bands are 95 % bootstrap intervals over requests. Only long "
        "answers reach the right end; the tables below say how many.",
    ),
    "drafts": Plot(
        draft_figure,
        "Acceptance by drafted token",
        "Of the rounds that drafted at least so many tokens, the share that accepted all up to it.",
    ),
    "speed": Plot(
        speed_figure,
        "Speed",
        "Wall clock, all of it. Bars are ratios of sums, whiskers 95 % intervals over requests.",
    ),
    "cost": Plot(
        cost_figure,
        "What learning costs",
        "Learning against static, on the same requests: rounds saved, what that is worth, and what "
        "is left once the updates are paid for. Lines are 95 % intervals over requests.",
    ),
    "stages": Plot(
        stage_figure,
        "Where the time goes",
        "Wall clock a generated token; other is prefill, text and bookkeeping.",
    ),
}
