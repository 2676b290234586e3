"""What runs say: the short table and the sentences of `ttspec demo`, and those of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ttspec.bench import measures
from ttspec.bench.runs import Arm
from ttspec.bench.tables import kind, pairs_of

EARLY, LATE = 512, 1024
"""Positions before which learning has had little time, and after which it should show."""


def table(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """What was measured: a row is a quantity and its value in each arm."""
    plain = next((arm for arm in arms if arm.name == "plain"), None)

    def row(title: str, value: Any) -> tuple[str, list[str]]:
        return title, [value(arm) for arm in arms]

    rows = [
        row("tokens generated", lambda arm: f"{arm.tokens:,}"),
        row("tokens per second", lambda arm: f"{arm.tokens_per_second:.1f}"),
        row("acceptance length", lambda arm: _number(arm.acceptance())),
        row(f"  first {EARLY} tokens", lambda arm: _number(arm.acceptance(0, EARLY))),
        row(f"  after {LATE:,} tokens", lambda arm: _number(arm.acceptance(LATE))),
        row("updates", lambda arm: f"{arm.updates:,}"),
        row("share of time learning", _learning),
        row("repeated 8-grams", lambda arm: f"{arm.repeated_8grams:.1%}"),
    ]
    if plain is not None and plain.tokens_per_second > 0:
        base = plain.tokens_per_second
        speed = row("speed against plain", lambda arm: f"{arm.tokens_per_second / base:.2f}x")
        rows.insert(2, speed)
        rows.append(row("text", lambda arm: _sameness(arm, plain)))
    return rows


def findings(arms: Sequence[Arm]) -> list[str]:
    """The comparison between learning and static in sentences, whichever way it went."""
    by_name = {arm.name: arm for arm in arms}
    static, learning = by_name.get("static"), by_name.get("learn-session")
    if static is None or learning is None:
        return []
    sentences = []
    for low, high, where in ((LATE, 1 << 62, f"After token {LATE:,}"), (0, EARLY, None)):
        before, after = static.acceptance(low, high), learning.acceptance(low, high)
        if before and after:
            sentences.append(
                f"{where or f'In the first {EARLY} tokens'} a target forward yields {after:.2f} "
                f"tokens with the learning drafter and {before:.2f} with the static one: "
                f"{after / before:.2f} times as many."
            )
    if static.tokens_per_second > 0:
        ratio = learning.tokens_per_second / static.tokens_per_second
        sentences.append(
            f"Learning ran at {ratio:.2f} times the static drafter's speed, its updates included."
        )
    return sentences


def bench_findings(arms: Sequence[Arm], left_out: Sequence[str] = ()) -> list[str]:
    """What was compared and what came of it, in sentences, whichever way it went."""
    sentences = [
        f"{len(arms)} arms on {len(arms[0].units)} units (request and seed), "
        f"{sum(arm.tokens for arm in arms):,} generated tokens.",
        *left_out,
    ]
    for a, b in pairs_of(arms):
        if not kind(a).startswith("learn") or kind(b) == "plain":
            continue
        tau = measures.pair(a, b, measures.emitted, measures.rounds)
        rate = measures.pair(a, b, measures.tokens, measures.seconds)
        if tau:
            speed = f", speed {_times(rate.ratio)}" if rate else ""
            sentences.append(
                f"{a.name} against {b.name}: acceptance length {_times(tau.ratio)}{speed}."
            )
    return sentences


def _times(ratio: measures.Estimate) -> str:
    if ratio.low != ratio.low:  # nan: one request
        return f"{ratio.value:.3f} times"
    known = "" if not ratio.low <= 1 <= ratio.high else ", not told apart from 1"
    return f"{ratio.value:.3f} times [{ratio.low:.3f}, {ratio.high:.3f}]{known}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _learning(arm: Arm) -> str:
    return f"{arm.learning_share:.1%}" if arm.updates else "–"


def _sameness(arm: Arm, plain: Arm) -> str:
    if arm is plain:
        return "–"
    position = arm.first_difference(plain)
    return "as plain" if position is None else f"differs at {position:,}"
