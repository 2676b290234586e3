"""Plots from stored rounds. Never runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttspec.bench import metrics as m
from ttspec.bench.plot_style import INK, colours, legend, panels, styled
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
        bins = m.position_bins(own + dotted, range(0, last + width + 1, width))
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
def speed_figure(arms: Sequence[Arm]) -> Figure:
    """Tokens per second, with intervals over requests."""
    names = [arm.name for arm in arms]
    figure, (axes,) = panels(1, height=0.9 + 0.36 * len(names), grid="x")
    axes.set_yticks(range(len(names)), [name.replace("[", "\n[") for name in names], fontsize=9)
    axes.invert_yaxis()
    for y, (arm, colour) in enumerate(zip(arms, colours(names).values(), strict=True)):
        if (found := m.speed(arm)) is None:
            continue
        axes.barh(y, found.value, color=colour, height=0.6)
        if found.has_interval:
            edges = [[max(found.value - found.low, 0)], [max(found.high - found.value, 0)]]
            axes.errorbar(found.value, y, xerr=edges, color=INK, lw=1.2, capsize=3)
    axes.set_xlabel("tokens per second")
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
    "speed": Plot(
        speed_figure,
        "Speed",
        "Wall clock, all of it. Bars are ratios of sums, whiskers 95 % intervals over requests.",
    ),
}
