"""Tables, and the figure of docs/learned.md, of what `traffic_replay.py` wrote.

    python benchmarks/traffic_tables.py LINES.jsonl... [FIGURE.png] [--pack PACKED.jsonl]

For each case: tokens a round of the static drafter, and of the other arms over it, of the same
requests: all, by 50 requests, and at the places that docs/learned.md speaks of. In brackets the
middle 95 of 100 resamplings of the requests. A file that was cut is read as far as it goes; a
packed one has a line an arm.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import common

SHOWN, AFTER, RESAMPLED = 50, 64, 1000
COLOURS = ("#0b6e4f", "#3b7dd8", "#c77700", "#8e44ad", "#b03a2e", "#5d6d7e")
Counts = dict[int, tuple[int, int]]
"""Tokens and rounds of each request, by its number."""


class Case:
    """What arms did on the same requests."""

    def __init__(self) -> None:
        self.arms: dict[str, Counts] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def add(self, line: dict[str, Any]) -> None:
        """Take a line in."""
        if isinstance(line.get("n"), list):  # packed
            counts = zip(line["tokens"], line["rounds"], strict=True)
            self.arms.setdefault(line["arm"], {}).update(zip(line["n"], counts, strict=True))
        elif "n" in line:
            self.arms.setdefault(line["arm"], {})[line["n"]] = line["tokens"], line["rounds"]
        else:
            self.facts.setdefault(line["arm"], {}).update(line)

    def ratio(self, arm: str, base: str, numbers: Iterable[int]) -> float | None:
        """Tokens a round of an arm over another's, of the requests that both have."""
        ours, theirs = self.arms.get(arm, {}), self.arms.get(base, {})
        both = [n for n in numbers if n in ours and n in theirs]
        if not both:
            return None
        return per_round(ours, both) / per_round(theirs, both)

    def ratio_with_interval(self, arm: str, base: str, first: int, end: int) -> str:
        """The same of a range of requests, with its interval; a dash where there are none."""
        ratio = self.ratio(arm, base, range(first, end))
        if ratio is None:
            return "-"
        ours, theirs = self.arms[arm], self.arms[base]
        both = [n for n in range(first, end) if n in ours and n in theirs]

        def drawn(some: list[int]) -> float:
            return per_round(ours, some) / per_round(theirs, some)

        return f"{ratio:.3f} {common.middle_95(drawn, both, RESAMPLED)}"


def per_round(counts: Counts, numbers: Iterable[int]) -> float:
    """Tokens a round."""
    tokens, rounds = (sum(part) for part in zip(*(counts[n] for n in numbers), strict=True))
    return tokens / max(rounds, 1)


def read(paths: Iterable[Path]) -> dict[str, Case]:
    """All cases, in order of their names."""
    cases: dict[str, Case] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last one, of a process that was stopped
                continue
            cases.setdefault(row["case"], Case()).add(row)
    return dict(sorted(cases.items()))


def table(name: str, case: Case) -> list[str]:
    """The lines about a case."""
    static = case.arms.get("static")
    if not static:
        return [f"{name}: nothing was asked"]
    count = max(static) + 1
    half, most = count // 2, "?" if "texts" not in case.facts else case.facts["texts"]["tokens"]
    whole = per_round(static, static)
    lines = [f"{name} | {len(static)} requests, {most} tokens | static {whole:.3f}"]
    tuned = [arm for arm in case.arms if arm.startswith("tuned")]
    for arm, own in case.arms.items():
        if arm == "static" or arm.startswith("talk"):
            continue
        facts = case.facts.get(arm, {})
        parts = [case.ratio(arm, "static", range(at, at + SHOWN)) for at in range(0, count, SHOWN)]
        shown = " ".join("-" if p is None else f"{p:.3f}" for p in parts)
        if arm == "adapted" or arm in tuned:
            steps = f", {facts['steps']} steps, {facts['training']} s" if "steps" in facts else ""
            second_half = case.ratio_with_interval(arm, "static", half, count)
            lines.append(f"  {arm}{steps} | second half {second_half} | {shown}")
            continue
        updates = f", {facts['updates']} updates, {facts['reverts']} reverts" if facts else ""
        lines.append(f"  {arm}, {len(own)} requests{updates} | by {SHOWN} {shown}")
        lines.append(
            f"    all {case.ratio_with_interval(arm, 'static', 0, count)}"
            f" | from {AFTER} on {case.ratio_with_interval(arm, 'static', AFTER, 2 * AFTER)}"
            f" | second half {case.ratio_with_interval(arm, 'static', half, count)}"
        )
        windows = [
            ratio
            for at in range(count - SHOWN + 1)
            if (ratio := case.ratio(arm, "static", range(at, at + SHOWN)))
        ]
        last = [
            case.ratio(arm, "static", range(count - far, count - far + 100)) for far in (200, 100)
        ]
        if windows and all(last):
            lines.append(
                f"    lowest window of {SHOWN} {min(windows):.3f}, at {windows.index(min(windows))}"
                f" | last hundred over the one before {last[1] / last[0]:.3f}"  # type: ignore[operator]
            )
        if tuned:
            best = max(tuned, key=lambda t: case.ratio(t, "static", range(half, count)) or 0)
            lines.append(
                f"    second half, over {best}: {case.ratio_with_interval(arm, best, half, count)}"
            )
    talks = [arm for arm in case.arms if arm.startswith("talk ")]
    for arm in talks[1:]:
        lines.append(
            f"  {arm} | {case.ratio_with_interval(arm, talks[0], 0, 1 << 20)} of {talks[0]}"
        )
    if {"talk slow", "talk slow and fast"} <= set(talks):
        both = case.ratio_with_interval("talk slow and fast", "talk slow", 0, 1 << 20)
        lines.append(f"  slow and fast over slow alone | {both}")
    return lines


def draw(cases: dict[str, Case], out: str) -> None:
    """The learner over static by requests seen before, a panel a pair; the best fine-tuning dashed.

    A case is called by its pair, a comma and its stream.
    """
    from matplotlib import pyplot

    pairs = list(dict.fromkeys(name.rpartition(", ")[0] for name in cases))
    streams = list(dict.fromkeys(name.rpartition(", ")[2] for name in cases))
    size = {"figsize": (4.6 * len(pairs), 4.2), "layout": "constrained"}
    figure, found = pyplot.subplots(1, len(pairs), sharey=True, squeeze=False, **size)
    panels = dict(zip(pairs, found[0], strict=True))
    for name, case in cases.items():
        pair, _, stream = name.rpartition(", ")
        count, colour = max(case.arms["static"]) + 1, COLOURS[streams.index(stream)]
        for arm in drawn(case, count):
            points = [
                (at + SHOWN / 2, ratio)
                for at in range(0, count, SHOWN)
                if (ratio := case.ratio(arm, "static", range(at, at + SHOWN)))
            ]
            line = {"color": colour, "linewidth": 2.2, "label": stream}
            if arm.startswith("tuned"):
                line = {"color": colour, "linewidth": 1.4, "linestyle": "--"}
            panels[pair].plot(*zip(*points, strict=True), **line)  # type: ignore[arg-type]
    for pair, axes in panels.items():
        axes.axhline(1, color="black", linestyle=":", linewidth=1)
        axes.plot([], [], color="grey", linestyle="--", label="fine-tuned on the first half")
        axes.set(title=pair, xlabel="requests seen before", xlim=(0, None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    found[0][0].set_ylabel("tokens a round, times static")
    shown = found[0][0].get_legend_handles_labels()
    figure.legend(*shown, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(out, dpi=130)


def drawn(case: Case, count: int) -> list[str]:
    """The learner, and the fine-tuning that drafts best."""
    learners = [arm for arm in case.arms if arm.startswith("learn")][:1]
    tuned = [arm for arm in case.arms if arm.startswith("tuned")]
    best = sorted(tuned, key=lambda arm: case.ratio(arm, "static", range(count)) or 0)[-1:]
    return learners + best


def pack(cases: dict[str, Case], out: str) -> None:
    """Write all that the tables need, small enough to be kept."""
    with Path(out).open("w", encoding="utf-8") as file:
        for name, case in cases.items():
            records = [{**facts, "case": name, "arm": arm} for arm, facts in case.facts.items()]
            for arm, own in case.arms.items():
                numbers = sorted(own)
                tokens, rounds = zip(*(own[n] for n in numbers), strict=True)
                counts = {"n": numbers, "tokens": tokens, "rounds": rounds}
                records.append({"case": name, "arm": arm, **counts})
            file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in records)


def main(*given: str) -> None:
    """Print; draw, and pack, where a file is named for it."""
    at = given.index("--pack") if "--pack" in given else len(given)
    pictures = [name for name in given[:at] if name.endswith(".png")]
    cases = read(Path(name) for name in given[:at] if name not in pictures)
    for name, case in cases.items():
        print("\n".join(table(name, case)), flush=True)
    for out in pictures:
        draw(cases, out)
    for out in given[at + 1 :]:
        pack(cases, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
