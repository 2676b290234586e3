"""The tables of a report: text in rows, for the terminal, Markdown and the page alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ttspec.bench import measures as m
from ttspec.bench.arms import PEERS
from ttspec.bench.manifest import mark
from ttspec.bench.measures import Estimate
from ttspec.bench.runs import Arm

EMPTY = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A heading, what its columns mean, and text in rows; the first column names the row."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """The table for a README."""
        lines = [self.head, tuple("---" for _ in self.head), *self.rows]
        cells = (" | ".join(cell.replace("|", r"\|") for cell in line) for line in lines)
        return f"**{self.title}**\n\n" + "\n".join(f"| {c} |" for c in cells) + f"\n\n{self.note}\n"


def all_tables(arms: Sequence[Arm], manifest: Mapping[str, Any]) -> list[Table]:
    """Everything a report says in numbers, about matched arms."""
    parts = (manifest.get("suite") or {}).get("parts") or {}
    tables = [acceptance_table(arms, manifest), speed_table(arms, manifest.get("rows") or 1)]
    tables += [pair_table(arms, manifest.get("rows") or 1), stretch_table(arms)]
    if len(parts) > 1:
        tables += [
            stretch_table(m.only(arms, *span), f"{STRETCH_TITLE}: {name}")
            for name, span in parts.items()
        ]
    tables += position_tables(arms)
    if said := mark(manifest):
        tables = [replace(table, title=f"{table.title} ({said})") for table in tables]
    return [table for table in tables if table.rows]


def acceptance_table(arms: Sequence[Arm], manifest: Mapping[str, Any] | None = None) -> Table:
    """Acceptance length of each arm, and what flatters it."""
    peers = [arm.name for arm in arms if kind(arm) in PEERS]
    first = next((arm for arm in arms if arm.name not in peers), arms[0])
    # Other implementations draw with other noise: their samples say nothing about ours.
    apart = [first.name, *(peers if (manifest or {}).get("temperature") else [])]
    given = bool(mark(manifest or {}))  # what is drafted is emitted there, or what was recorded
    rows = []
    for arm in arms:
        same = len(arm.units) - len(m.different_texts(arm, first))
        rows.append(
            (
                arm.name,
                f"{len(arm.units)}",
                f"{arm.tokens:,}",
                interval(m.acceptance(arm)),
                interval(m.acceptance_over_requests(arm)),
                percent(m.drafted_share(arm)),
                f"{arm.repeated_8grams:.1%}",
                EMPTY if given or arm.name in apart else f"{same} of {len(arm.units)}",
            )
        )
    return Table(
        title="Acceptance",
        note="Acceptance length: tokens committed by rounds / rounds, the target's own token "
        "included, tokens past a stop excluded; as a ratio of sums, and as the mean over requests. "
        "In brackets 95 % bootstrap intervals over requests."
        + (" Other implementations draw other samples." if len(apart) > 1 else ""),
        head=(
            "arm",
            "units",
            "tokens",
            "acceptance length",
            "mean over requests",
            "drafts accepted",
            "repeated 8-grams",
            f"text as {first.name}",
        ),
        rows=rows,
    )


def speed_table(arms: Sequence[Arm], side_by_side: int = 1) -> Table:
    """Wall clock of each arm, all of it; `side_by_side` requests shared the machine."""
    peaks = {a.name: max((t.peak_memory or 0 for t in a.turns), default=0) for a in arms}
    rows = []
    for arm in arms:
        waits = m.inter_token(arm)
        first = m.first_token(arm)
        row = (
            arm.name,
            interval(m.speed(arm), 1),
            EMPTY if first is None else f"{1000 * first:.0f}",
            EMPTY if waits is None else " / ".join(f"{1000 * w:.1f}" for w in waits),
            percent(arm.learning_share if arm.updates and arm.seconds else None),
            f"{arm.updates:,}",
            f"{sum(t.result.stats.reverts for t in arm.turns):,}",
        )
        rows.append((*row, f"{peaks[arm.name] / 2**20:,.0f}") if any(peaks.values()) else row)
        if side_by_side > 1:
            whole = interval(m.Batches(side_by_side).speed(arm), 1)
            rows[-1] = (*rows[-1][:2], whole, *rows[-1][2:])
    rows_each, more = "", ()
    if side_by_side > 1:
        more = (f"of {side_by_side} rows",)
        rows_each = (
            f" Of one of {side_by_side} requests side by side; beside it, of full batches, all "
            "rows' tokens by the clock on the wall."
        )
    head = (
        "arm",
        "tokens per second",
        *more,
        "first token (ms)",
        "a token p50 / p95 / p99 (ms)",
        "share of learning",
        "updates",
        "reverts",
    )
    return Table(
        title="Speed",
        note="Tokens per second count everything: prefill, updates, text. First token: median. "
        "A token's time is its round's wait over the round's tokens. Peak memory is the process's, "
        "all arms' caches included." + rows_each,
        head=(*head, "peak memory (MiB)") if any(peaks.values()) else head,
        rows=rows,
    )


def pairs_of(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Who is compared with whom: all with plain and static, learning also with the best static.

    Of several folders, every arm is compared with those of its own.
    """
    pairs = []
    for arm in arms:
        own = [other for other in arms if run_of(other) == run_of(arm)]
        statics = [other for other in own if kind(other).startswith("static")]
        others = [other for other in own if kind(other) == "plain"]
        others += [other for other in statics if kind(other) == "static"][:1]
        if kind(arm).startswith("learn") and statics:
            others.append(max(statics, key=lambda other: other.acceptance() or 0.0))
        if kind(arm) != "plain":
            names = {other.name: other for other in others if other.name != arm.name}
            pairs += [(arm, other) for other in names.values()]
    return pairs


def pair_table(arms: Sequence[Arm], side_by_side: int = 1) -> Table:
    """Arms against each other on the same requests, `side_by_side` at a time."""
    rows = []
    for a, b in pairs_of(arms):
        tau = m.pair(a, b, m.emitted, m.rounds)
        if side_by_side > 1:
            speed = m.Batches(side_by_side).pair(a, b)
        else:
            speed = m.pair(a, b, m.tokens, m.seconds)
        rows.append(
            (
                f"{a.name} / {b.name}",
                interval(tau and tau.ratio, 3),
                interval(tau and tau.difference, 3, sign=True),
                interval(speed and speed.ratio, 3),
            )
        )
    return Table(
        title="Paired differences",
        note="The same requests and seeds in both arms; 95 % bootstrap intervals over requests."
        + (" Tokens per second are those of full batches." if side_by_side > 1 else ""),
        head=("pair", "acceptance length, ratio", "difference", "tokens per second, ratio"),
        rows=rows,
    )


STRETCH_TITLE = "Acceptance length, early and late"


def stretch_table(arms: Sequence[Arm], title: str = STRETCH_TITLE) -> Table:
    """Acceptance length before and after learning can show; nothing if no unit is that long."""
    rows = [
        (arm.name, *(interval(s.acceptance(arm), 3).partition(" [")[0] for s in m.STRETCHES))
        for arm in arms
    ]
    for a, b in pairs_of(arms):
        if kind(a).startswith("learn") and kind(b) != "plain":
            ratios = [s.pair(a, b) for s in m.STRETCHES]
            cells = [interval(found and found.ratio, 3) for found in ratios]
            rows.append((f"{a.name} / {b.name}", *cells))
    late = any(m.STRETCHES[1].rounds(arm.turns) for arm in arms)
    return Table(
        title=title,
        note=f"{m.STRETCHES[2].name.split(', ')[1].capitalize()}: windows of {m.WINDOW} generated "
        f"tokens in which at most {m.REPEATS:.0%} of 8-grams repeat.",
        head=("arm", *(s.name for s in m.STRETCHES)),
        rows=rows if late else [],
    )


def position_tables(arms: Sequence[Arm]) -> list[Table]:
    """Acceptance length by generated position: over all requests alive, and over common ones."""
    bins = m.by_position(arms)
    names = [arm.name for arm in arms]
    at = {name: {b.low: b for b in bins[name]} for name in names}
    every, common = [], []
    for low in sorted({b.low for name in names for b in bins[name]}):
        here = [at[name].get(low) for name in names]
        some = next(b for b in here if b)
        where = f"{low:,}–{some.high:,}" if some.high < 1 << 62 else f"{low:,} and on"
        cells = [EMPTY if b is None else f"{b.acceptance.value:.2f} ({b.alive})" for b in here]
        every.append((where, f"{some.repeated:.1%}", *cells))
        if some.everywhere and all(here):
            values = [f"{b.acceptance_everywhere:.2f}" for b in here if b]
            common.append((where, f"{some.everywhere}", *values))
    return [
        Table(
            title="Acceptance length by generated position",
            note="In parentheses the units (request and seed) alive there; intervals stand in the "
            "plot. Only long answers reach the last rows. Repeated 8-grams: of "
            f"{names[0]}'s text there, mean over units.",
            head=("position", "repeated 8-grams", *names),
            rows=every,
        ),
        Table(
            title="The same, only over units alive in every arm",
            note="A round counts where it begins.",
            head=("position", "units", *names),
            rows=common,
        ),
    ]


def kind(arm: Arm) -> str:
    """An arm's kind: its name without folder and options."""
    return arm.name.rpartition(": ")[2].partition("[")[0]


def run_of(arm: Arm) -> str:
    """Where several folders are reported on together, the arm's; else nothing."""
    return arm.name.rpartition(": ")[0]


def interval(found: Estimate | None, digits: int = 2, *, sign: bool = False) -> str:
    """A value with its interval, if it has one."""
    if found is None:
        return EMPTY
    form = f"{'+' if sign else ''}.{digits}f"
    if math.isnan(found.low):
        return f"{found.value:{form}}"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def percent(value: float | None) -> str:
    """A share, or a dash."""
    return EMPTY if value is None else f"{value:.1%}"
