"""Two arms on the same requests, and a verdict that a script can act on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ttspec.bench import measures
from ttspec.bench.manifest import mark
from ttspec.bench.measures import Estimate, Pair, matched
from ttspec.bench.report import check_alike, check_texts, mark_of
from ttspec.bench.runs import Arm
from ttspec.bench.store import read_run
from ttspec.errors import DataError, OptionError

Metric = Literal["acceptance", "speed"]
COUNTS = {
    "acceptance": (measures.emitted, measures.rounds),
    "speed": (measures.tokens, measures.seconds),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A against B: paired ratios by metric, with intervals over requests."""

    a: str
    b: str
    units: int
    pairs: dict[str, Pair]
    mark: str = ""
    """What is to be said where one of them is no ordinary run."""

    def ratio(self, metric: Metric) -> Estimate | None:
        """A / B; None for the speed of a run without times: imported, or a replay."""
        found = self.pairs.get(metric)
        return found and found.ratio


def compare(a: str, b: str, *, different_texts: bool = False) -> list[Comparison]:
    """Compare two runs, or two arms, on the units that both have finished.

    Args:
        a: A run folder, or FOLDER:ARM.
        b: The same; where both are folders, every arm that both have is compared.
        different_texts: Go on where arms that must say the same do not.

    Raises:
        OptionError: There is no such arm, or no arm that both have.
        DataError: A folder is damaged, or the runs have no pairs.
    """
    (one, mine), (other, theirs) = _open(a), _open(b)
    check_alike(one, other, a, b)
    for part in ("target", "suite"):
        if mark_of(one, part) != mark_of(other, part):
            raise DataError(
                f"{a} and {b} ran different {part}s, so no request of one has its pair in the "
                f"other.\nCompare runs of the same {part}; drafters may differ."
            )
    same = ("max_new_tokens", "session_tokens", "temperature", "ignore_eos")
    changed = [name for name in same if one.get(name) != other.get(name)]
    if changed:
        raise DataError(
            f"{a} and {b} ran with another {changed[0]}, so their texts are not pairs.\n"
            "Compare runs with the same options."
        )
    found = []
    for x, y in _couples(mine, theirs, a, b):
        x, y = _pair(x, y, a, b)
        if not different_texts:
            check_texts(one if one.get("dtype") == other.get("dtype") else {}, [y, x])
        pairs = {n: p for n, counts in COUNTS.items() if (p := measures.pair(x, y, *counts))}
        rows = one.get("rows") or 1
        if rows > 1 and rows == other.get("rows") and (p := measures.Batches(rows).pair(x, y)):
            pairs["speed"] = p  # rows side by side share their seconds
        if "acceptance" not in pairs:
            raise DataError(f"{x.name} of {a} or {y.name} of {b} has no rounds.\nCompare others.")
        said = mark(one) or mark(other)
        found.append(Comparison(a=x.name, b=y.name, units=len(x.units), pairs=pairs, mark=said))
    return found


def verdict(
    found: Sequence[Comparison], metric: Metric, fail_below: float | None
) -> tuple[str, bool]:
    """One line for a log, and whether all is well: no ratio may lie below `fail_below`."""
    told = [(ratio, c) for c in found if (ratio := c.ratio(metric))]
    if len(told) < len(found):
        raise DataError(f"A run has no times, so no {metric}.\nCompare --metric acceptance.")
    ratio, worst = min(told, key=lambda pair: pair[0].value)
    names = worst.a if worst.a == worst.b else f"{worst.a} / {worst.b}"
    said = f"{metric} of {names}, A / B, is {ratio.value:.3f}"
    if worst.mark:
        said += f" ({worst.mark})"
    if fail_below is None:
        return f"verdict: none asked for; {said}", True
    good = ratio.value >= fail_below
    sure = ""
    if ratio.low <= fail_below <= ratio.high:
        sure = f"; the interval [{ratio.low:.3f}, {ratio.high:.3f}] has both sides of it"
    word, side = ("pass", "not below") if good else ("FAIL", "below")
    return f"verdict: {word}: {said}, {side} {fail_below:g}{sure}", good


def _open(name: str) -> tuple[dict[str, Any], list[Arm]]:
    folder, colon, arm = name.rpartition(":")
    if not colon or Path(name).is_dir():
        return read_run(Path(name))
    manifest, arms = read_run(Path(folder))
    chosen = [x for x in arms if x.name == arm]
    if not chosen:
        names = ", ".join(x.name for x in arms)
        raise OptionError(f"{folder} has no arm {arm}; it has {names}.\nGive FOLDER:ARM.")
    return manifest, chosen


def _couples(mine: list[Arm], theirs: list[Arm], a: str, b: str) -> list[tuple[Arm, Arm]]:
    if len(mine) == len(theirs) == 1:
        return [(mine[0], theirs[0])]
    by_name = {arm.name: arm for arm in theirs}
    couples = [(arm, by_name[arm.name]) for arm in mine if arm.name in by_name]
    if not couples:
        raise OptionError(f"{a} and {b} have no arm in common.\nName one each: FOLDER:ARM.")
    return couples


def _pair(x: Arm, y: Arm, a: str, b: str) -> tuple[Arm, Arm]:
    kept = matched([x, y])
    if len(kept) < 2 or not kept[0].turns:
        raise DataError(
            f"{x.name} of {a} and {y.name} of {b} have no finished request in common.\n"
            "Go on with `ttspec bench run`, with the same seeds."
        )
    return kept[0], kept[1]
