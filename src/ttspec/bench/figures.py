"""Plots from stored rounds. Never runs a model; keeps matplotlib's state to itself."""

from __future__ import annotations

import io
import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttspec.bench.runs import Arm
from ttspec.records import Round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {
    "plain": "plain decoding",
    "static": "static drafter",
    "learn-session": "learning drafter",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"plain": "#767676", "static": "#d55e00", "learn-session": "#0072b2"}
SPARE_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, GRID = "#333333", "#dddddd"


def label(arm: str) -> str:
    """An arm's name for people."""
    return LABELS.get(arm, arm)


def colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour for each arm; the known arms always have the same one."""
    spare = [name for name in arms if name not in COLOURS]
    extra = {name: SPARE_COLOURS[i % len(SPARE_COLOURS)] for i, name in enumerate(spare)}
    return {name: COLOURS.get(name) or extra[name] for name in arms}


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


def write_png(figure: Figure, path: Path) -> None:
    """The figure as a picture on white."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure.savefig(path, format="png", dpi=160, facecolor="white")


def to_svg(figure: Figure) -> str:
    """The figure as an <svg> element whose ink and grid follow the page's light or dark mode."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    text = text.replace(INK, "var(--ink)").replace(GRID, "var(--line)")
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


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
