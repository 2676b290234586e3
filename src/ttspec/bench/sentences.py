"""What runs say: the short table and the sentences of `ttspec demo`, and those of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ttspec.bench.estimates import Estimate
from ttspec.bench.metrics import pair_acceptance, pair_speed
from ttspec.bench.report_tables import learning_pairs
from ttspec.bench.results import Arm
from ttspec.bench.table import EMPTY, Table, interval, number

EARLY, LATE = 512, 1024
"""Positions before which learning has had little time, and after which it should show."""
LABELS = {
    "plain": "plain decoding",
    "static": "static drafter",
    "static-copy": "with copies",
    "default": "default",
}
"""What `ttspec demo` calls its arms; a benchmark's arms go by their own names."""


def label(arm: str) -> str:
    """An arm's name for people."""
    return LABELS.get(arm, arm)


def demo_table(arms: Sequence[Arm]) -> Table:
    """What was measured: a row is a quantity and its value in each arm."""
    plain = next((arm for arm in arms if arm.name == "plain"), None)
    base = plain.tokens_per_second if plain else 0.0
    cells: dict[str, Callable[[Arm], str]] = {
        "tokens generated": lambda arm: f"{arm.tokens:,}",
        "tokens per second": lambda arm: f"{arm.tokens_per_second:.1f}",
        "speed against plain": lambda arm: f"{arm.tokens_per_second / base:.2f}x",
        "acceptance length": lambda arm: number(arm.acceptance()),
        f"  first {EARLY} tokens": lambda arm: number(arm.acceptance(0, EARLY)),
        f"  after {LATE:,} tokens": lambda arm: number(arm.acceptance(LATE)),
        "tokens copied": lambda arm: (
            f"{arm.copied_tokens / arm.tokens:.1%}" if arm.tokens else EMPTY
        ),
        "updates": lambda arm: f"{arm.updates:,}",
        "share of time learning": lambda arm: number(
            arm.learning_share if arm.updates else None, ".1%"
        ),
        "repeated 8-grams": lambda arm: f"{arm.repeated_8grams:.1%}",
        "text": lambda arm: _sameness(arm, plain) if plain else EMPTY,
    }
    if not base:
        del cells["speed against plain"], cells["text"]
    rows = [(name, *map(value, arms)) for name, value in cells.items()]
    return Table(title="Figures", head=("", *(label(arm.name) for arm in arms)), rows=rows)


def demo_sentences(arms: Sequence[Arm]) -> list[str]:
    """What copying and learning brought, in sentences, whichever way it went."""
    by_name = {arm.name: arm for arm in arms}
    pairs = (("static-copy", "static", "Copying"), ("default", "static-copy", "Learning"))
    sentences = []
    for name, other, what in pairs:
        if name not in by_name or other not in by_name:
            continue
        after, before = by_name[name], by_name[other]
        if what == "Learning" and not after.updates:
            sentences.append(
                "Learning: no update, since in one conversation of this length they cost more than "
                "they bring. With `--learn.stride 8` they come all the same; `ttspec serve` "
                "learns from all requests."
            )
            continue
        accepted = after.acceptance(LATE), before.acceptance(LATE)
        if all(accepted):
            sentences.append(
                f"{what}: after token {LATE:,} a target forward yields {accepted[0]:.2f} tokens, "
                f"without it {accepted[1]:.2f}."
            )
        if before.tokens_per_second > 0:
            ratio = after.tokens_per_second / before.tokens_per_second
            sentences.append(f"{what}: {ratio:.2f} times the speed without it, everything counted.")
    return sentences


def bench_sentences(arms: Sequence[Arm], left_out: Sequence[str]) -> list[str]:
    """What was compared and what came of it, in sentences, whichever way it went."""
    sentences = [
        f"{len(arms)} arms on {len(arms[0].units)} units (request and seed), "
        f"{sum(arm.tokens for arm in arms):,} generated tokens.",
        *left_out,
    ]
    for a, b in learning_pairs(arms):
        if tau := pair_acceptance(a, b):
            rate = pair_speed(a, b)
            speed = f", speed {_times(rate.ratio)}" if rate else ""
            sentences.append(
                f"{a.name} against {b.name}: acceptance length {_times(tau.ratio)}{speed}."
            )
    return sentences


def _times(ratio: Estimate) -> str:
    if not ratio.has_interval:
        return f"{ratio.value:.3f} times"
    undecided = ", not told apart from 1" if ratio.low <= 1 <= ratio.high else ""
    return interval(ratio, 3).replace(" ", " times ", 1) + undecided


def _sameness(arm: Arm, plain: Arm) -> str:
    if arm is plain:
        return EMPTY
    position = arm.first_difference(plain)
    return "as plain" if position is None else f"differs at {position:,}"
