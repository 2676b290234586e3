"""How all plots look, and how they are written. Leaves matplotlib's own settings alone."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "plain": "#767676",
    "ngram": "#009e73",
    "static": "#d55e00",
    "static-window": "#e69f00",
    "static-rebased": "#cc79a7",
    "static-copy": "#009e73",
    "learn": "#56b4e9",
    "learn-session": "#0072b2",
    "learn-shared": "#5a3e99",
    "default": "#332288",
}
SPARE_COLOURS = (
    *("#8a6fd1", "#8c8c00", "#00a3a3", "#b5544d"),
    *("#5a7d2a", "#b86fb0", "#3f5f8a", "#a87f3f"),
)
LONG = 26
"""Letters of a name, above which two do not fit beside each other on a phone."""
INK, GRID = "#333333", "#dddddd"
RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "ttspec",
}


styled = rc_context(RC)
"""Draws in the style of this module, and puts matplotlib's settings back."""


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


def panels(
    count: int, *, across: bool = False, height: float = 3.6, grid: str = "y"
) -> tuple[Figure, list[Axes]]:
    """A figure of several plots beside or below each other; one alone fits a phone."""
    size = (4.2 * count, height) if across else (5.0, height * count)
    figure = Figure(figsize=size, layout="constrained")
    shape = (1, count) if across else (count, 1)
    axes = list(figure.subplots(*shape, squeeze=False, sharey=across).flat)
    for own in axes:
        own.grid(axis=grid)
    return figure, axes


def legend(figure: Figure, *grid: Axes, columns: int = 2) -> None:
    """One legend for all plots, a name once."""
    lines = {}
    for axes in grid:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(name, handle)
    if not lines:
        return
    if columns == 2 and max(map(len, lines)) > LONG:
        columns = 1
        figure.set_figheight(figure.get_figheight() + 0.1 * len(lines))
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=columns)


@styled
def stamp(figure: Figure, text: str) -> None:
    """Write above all plots what must not be lost when a figure is shown alone."""
    figure.suptitle(text, fontsize=9)


@styled
def write_figure(figure: Figure, stem: Path, *formats: str) -> None:
    """The figure on white, as STEM.png and STEM.svg unless other formats are named."""
    for form in formats or ("png", "svg"):
        metadata = {"Date": None} if form == "svg" else None
        figure.savefig(f"{stem}.{form}", dpi=160, facecolor="white", metadata=metadata)


@styled
def to_svg(figure: Figure, prefix: str) -> str:
    """The figure as an <svg> element whose ink and grid follow the page's light or dark mode.

    Several on one page need a `prefix` each, or their ids would meet.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for size in ("width", "height"):
        text = re.sub(rf'(<svg [^>]*?)\s{size}="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    variables = {INK: "ink", GRID: "line"} | {colour: name for name, colour in COLOURS.items()}
    for colour, name in variables.items():
        text = text.replace(colour, f"var(--{name})")
    return text
