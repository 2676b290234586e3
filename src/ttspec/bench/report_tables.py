"""The tables of a report, about matched arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ttspec.bench import metrics as m
from ttspec.bench.manifest import run_label
from ttspec.bench.metrics import SideBySide
from ttspec.bench.results import Arm
from ttspec.bench.table import EMPTY, Table, interval, number, ratio

FEW_REQUESTS = 20
STRETCH_TITLE = "Acceptance length, early and late"


def all_tables(arms: Sequence[Arm], manifest: Mapping[str, Any]) -> list[Table]:
    """Everything a report says in numbers."""
    parts = (manifest.get("suite") or {}).get("parts") or {}
    rows = manifest.get("rows") or 1
    tables = [
        acceptance_table(arms, manifest),
        speed_table(arms, rows),
        pair_table(arms, rows),
        stretch_table(arms),
    ]
    if len(parts) > 1:
        tables += [
            stretch_table(m.of_requests(arms, *span), f"{STRETCH_TITLE}: {name}")
            for name, span in parts.items()
        ]
    tables += position_tables(arms)
    if found := run_label(manifest):
        tables = [replace(table, title=f"{table.title} ({found})") for table in tables]
    return [table for table in tables if table.rows]


def acceptance_table(arms: Sequence[Arm], manifest: Mapping[str, Any]) -> Table:
    """Acceptance length of each arm, and what flatters it."""
    first = arms[0]
    same = {arm.name: len(arm.units) - len(m.different_texts(arm, first)) for arm in arms}
    # A replay emits what was recorded.
    incomparable = list(same) if run_label(manifest) else [first.name]
    differ = any(same[arm.name] < len(arm.units) for arm in arms if arm.name not in incomparable)
    why = _why_texts_differ(manifest) if differ else ""
    return Table(
        title="Acceptance",
        note="Acceptance length: tokens committed by rounds / rounds, the target's own token "
        "included, tokens past a stop excluded; as a ratio of sums, and as the mean over requests. "
        "Drafts accepted: of those proposed. Repeated 8-grams: of all eight tokens in a row of an "
        f"answer, the share that it had before. In brackets {intervals(arms)}.{why}",
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
        rows=[
            (
                arm.name,
                f"{len(arm.units)}",
                f"{arm.tokens:,}",
                interval(m.acceptance(arm)),
                interval(m.acceptance_over_requests(arm)),
                number(m.draft_acceptance_rate(arm), ".1%"),
                f"{arm.repeated_8grams:.1%}",
                EMPTY if arm.name in incomparable else f"{same[arm.name]} of {len(arm.units)}",
            )
            for arm in arms
        ],
    )


def _why_texts_differ(manifest: Mapping[str, Any]) -> str:
    dtype = manifest.get("dtype", "float32")
    if dtype == "float32" or manifest.get("sampling", {}).get("acceptance") == "rejection":
        return ""
    return (
        f" Texts differ since in {dtype} two likely tokens may change places: a sum is rounded by "
        "how many tokens are read together. With --dtype float32 all arms write one text."
    )


def intervals(arms: Sequence[Arm]) -> str:
    """What the brackets of a table are, and whether to trust them.

    Of values with a normal distribution, such an interval held the mean in 80 % of cases with 4
    requests, in 91 % with 10, in 93 % with 20 and in 94 % with 40.
    """
    count = len({turn.request for turn in arms[0].turns})
    few = f", too narrow with fewer than {FEW_REQUESTS}" if count < FEW_REQUESTS else ""
    return f"95 % bootstrap intervals over {count} requests{few}"


def speed_table(arms: Sequence[Arm], side_by_side: int = 1) -> Table:
    """Wall clock of each arm, all of it; `side_by_side` requests shared the machine."""

    def waits(arm: Arm) -> str:
        found = m.inter_token_latency(arm)
        return EMPTY if found is None else " / ".join(number(w, ".1f", 1000) for w in found)

    peaks = {a.name: max((t.peak_memory or 0 for t in a.turns), default=0) for a in arms}
    columns: dict[str, Any] = {
        "arm": lambda arm: arm.name,
        "tokens per second": lambda arm: interval(m.speed(arm), 1),
        f"of {side_by_side} rows": lambda arm: interval(SideBySide(side_by_side).speed(arm), 1),
        "first token (ms)": lambda arm: number(m.time_to_first_token(arm), ".0f", 1000),
        "a token p50 / p95 / p99 (ms)": waits,
        "share of learning": lambda arm: number(
            arm.learning_share if arm.updates and arm.seconds else None, ".1%"
        ),
        "updates": lambda arm: f"{arm.updates:,}",
        "reverts": lambda arm: f"{sum(t.result.stats.reverts for t in arm.turns):,}",
        "peak memory (MiB)": lambda arm: f"{peaks[arm.name] / 2**20:,.0f}",
    }
    note = (
        "Tokens per second count everything: prefill, updates, text. First token: median. "
        "A token's time is its round's wait over the round's tokens. "
        "Reverts: times that worse weights were put back."
    )
    if side_by_side > 1:
        note += (
            f" Of one of {side_by_side} requests side by side; beside it, of full batches, all "
            "rows' tokens by the clock on the wall."
        )
    else:
        del columns[f"of {side_by_side} rows"]
    if any(peaks.values()):
        note += " Peak memory is the process's, all arms' caches included."
    else:
        del columns["peak memory (MiB)"]
    rows = [tuple(cell(arm) for cell in columns.values()) for arm in arms]
    return Table(title="Speed", note=note, head=tuple(columns), rows=rows)


LEARNING = ("learn", "default")
"""How the kinds of arms that learn begin."""


def pairs_of(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Who is compared with whom: all with plain and static, learning also with the best static.

    Of several folders, every arm is compared with those of its own.
    """
    pairs = []
    for arm in arms:
        own = [other for other in arms if other.folder == arm.folder]
        statics = [other for other in own if other.kind.startswith("static")]
        others = [other for other in own if other.kind == "plain"]
        others += [other for other in statics if other.kind == "static"][:1]
        if arm.kind.startswith(LEARNING) and statics:
            others.append(max(statics, key=lambda other: other.acceptance() or 0.0))
        if arm.kind != "plain":
            names = {other.name: other for other in others if other.name != arm.name}
            pairs += [(arm, other) for other in names.values()]
    return pairs


def learning_pairs(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Those of `pairs_of` that compare a learning arm with a drafting one."""
    pairs = pairs_of(arms)
    return [(a, b) for a, b in pairs if a.kind.startswith(LEARNING) and b.kind != "plain"]


def pair_table(arms: Sequence[Arm], side_by_side: int = 1) -> Table:
    """Arms against each other on the same requests, `side_by_side` at a time."""
    rows = []
    for a, b in pairs_of(arms):
        tau = m.pair_acceptance(a, b)
        speed = SideBySide(side_by_side).pair(a, b) if side_by_side > 1 else m.pair_speed(a, b)
        difference = interval(tau and tau.difference, 3, sign=True)
        rows.append((f"{a.name} / {b.name}", ratio(tau), difference, ratio(speed)))
    return Table(
        title="Paired differences",
        note=f"The same requests and seeds in both arms; {intervals(arms)}."
        + (" Tokens per second are those of full batches." if side_by_side > 1 else ""),
        head=("pair", "acceptance length, ratio", "difference", "tokens per second, ratio"),
        rows=rows,
    )


def stretch_table(arms: Sequence[Arm], title: str = STRETCH_TITLE) -> Table:
    """Acceptance length before and after learning can show; nothing if no unit is that long."""
    rows = []
    for arm in arms:
        found = [s.acceptance(arm) for s in m.STRETCHES]
        rows.append((arm.name, *(number(f and f.value, ".3f") for f in found)))
    for a, b in learning_pairs(arms):
        rows.append((f"{a.name} / {b.name}", *(ratio(s.pair(a, b)) for s in m.STRETCHES)))
    _, late, calm = m.STRETCHES
    return Table(
        title=title,
        note=f"{calm.name.split(', ')[1].capitalize()}: windows of {m.WINDOW} generated "
        f"tokens in which at most {m.REPEATS:.0%} of 8-grams repeat.",
        head=("arm", *(s.name for s in m.STRETCHES)),
        rows=rows if any(late.rounds(arm.turns) for arm in arms) else [],
    )


def position_tables(arms: Sequence[Arm]) -> list[Table]:
    """Acceptance length by generated position: over all requests alive, and over common ones."""
    bins = m.position_bins(arms)
    at = {name: {b.low: b for b in own} for name, own in bins.items()}
    every, common = [], []
    for low in sorted({low for own in at.values() for low in own}):
        here = [own.get(low) for own in at.values()]
        some = next(b for b in here if b)
        where = f"{low:,}–{some.high:,}" if some.high < m.END else f"{low:,} and on"
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
            f"{arms[0].name}'s text there, mean over units.",
            head=("position", "repeated 8-grams", *bins),
            rows=every,
        ),
        Table(
            title="The same, only over units alive in every arm",
            note="A round counts where it begins.",
            head=("position", "units", *bins),
            rows=common,
        ),
    ]
