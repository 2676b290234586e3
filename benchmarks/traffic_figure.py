"""The figure of docs/learned.md: what a memory gains over streams of requests.

    cd docs/results/traffic; python ../../../benchmarks/traffic_figure.py streams.txt streams.png

Reads lines of `NAME | static N | all | ratio ratio ...`, 48 requests a ratio.
"""

import sys
from pathlib import Path

from matplotlib import pyplot

SHOWN = 48
COLOURS = ("#0b6e4f", "#3b7dd8", "#c77700", "#8e44ad")


def main(source: str, out: str) -> None:
    """Draw all lines; what was learned offline is dashed."""
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    colours: dict[str, str] = {}
    for line in Path(source).read_text(encoding="utf-8").splitlines():
        if line.count("|") != 3 or "updates" in line:
            continue
        name, _, _, ratios = (part.strip() for part in line.split("|"))
        stream, dashed = name.removesuffix(", offline"), name.endswith("offline")
        colour = colours.setdefault(stream, COLOURS[len(colours) % len(COLOURS)])
        points = [(SHOWN * (i + 0.5), float(n)) for i, n in enumerate(ratios.split())]
        points = [p for p in points if not dashed or p[0] > 300]
        style = {"linestyle": "--", "linewidth": 1.4} if dashed else {"linewidth": 2.2}
        label = name if not dashed else None
        axes.plot(*zip(*points, strict=True), color=colour, label=label, **style)
    axes.axhline(1, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="requests seen before", ylabel="tokens a round, times static", xlim=(0, 624))
    axes.plot([], [], color="grey", linestyle="--", label="half of them taught offline, at once")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
