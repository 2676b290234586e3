"""Two arms on the same requests, and a verdict that a script can act on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ttspec.bench import metrics as m
from ttspec.bench.estimates import Estimate, Pair
from ttspec.bench.manifest import run_label
from ttspec.bench.metrics import SideBySide
from ttspec.bench.results import Arm
from ttspec.bench.run_set import Manifest, check_texts, different_part
from ttspec.bench.store import read_run
from ttspec.bench.table import Table, interval, ratio
from ttspec.errors import DataError, OptionError

Metric = Literal["acceptance", "speed"]
SAME_OPTIONS = ("max_new_tokens", "session_tokens", "temperature", "ignore_eos")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A against B: paired ratios by metric, with intervals over requests."""

    a: str
    b: str
    units: int
    pairs: dict[str, Pair]
    mark: str = ""
    """What is to be said where one of them is no ordinary run."""

    @property
    def names(self) -> str:
        """Both arms, or one name where it is the same."""
        return self.a if self.a == self.b else f"{self.a} / {self.b}"

    def ratio(self, metric: Metric) -> Estimate | None:
        """A / B; None for the speed of a run without times, as a replay."""
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
    if part := different_part(one, other):
        raise DataError(
            f"{a} and {b} ran different {part}s, so no request of one has its pair in the "
            f"other.\nCompare runs of the same {part}; drafters may differ."
        )
    changed = [name for name in SAME_OPTIONS if one.get(name) != other.get(name)]
    if changed:
        raise DataError(
            f"{a} and {b} ran with another {changed[0]}, so their texts are not pairs.\n"
            "Compare runs with the same options."
        )
    found = []
    for arms in _arm_pairs(mine, theirs, a, b):
        x, y = _on_common_units(*arms, a, b)
        if not different_texts:
            check_texts(one if one.get("dtype") == other.get("dtype") else {}, [y, x])
        pairs = {"acceptance": m.pair_acceptance(x, y), "speed": m.pair_speed(x, y)}
        rows = one.get("rows") or 1
        if rows > 1 and rows == other.get("rows") and (speed := SideBySide(rows).pair(x, y)):
            pairs["speed"] = speed  # rows side by side share their seconds
        known = {name: pair for name, pair in pairs.items() if pair}
        if "acceptance" not in known:
            raise DataError(f"{x.name} of {a} or {y.name} of {b} has no rounds.\nCompare others.")
        marked, units = run_label(one) or run_label(other), len(x.units)
        found.append(Comparison(a=x.name, b=y.name, units=units, pairs=known, mark=marked))
    return found


def comparison_table(found: Sequence[Comparison], a: str, b: str) -> Table:
    """What `compare` found, for people; `a` and `b` are what it was asked for."""
    marked = f" ({found[0].mark})" if found[0].mark else ""
    return Table(
        title=f"{a} against {b}{marked}",
        note="Paired over requests, 95 % bootstrap intervals.",
        head=("arm", "units", "acceptance length, ratio", "difference", "tokens/s, ratio"),
        rows=[
            (
                c.names,
                str(c.units),
                ratio(c.pairs["acceptance"]),
                interval(c.pairs["acceptance"].difference, 3, sign=True),
                ratio(c.pairs.get("speed")),
            )
            for c in found
        ],
    )


def verdict(
    found: Sequence[Comparison], metric: Metric, fail_below: float | None
) -> tuple[str, bool]:
    """One line for a log, and whether all is well: no ratio may lie below `fail_below`."""
    known = [(ratio, c) for c in found if (ratio := c.ratio(metric))]
    if len(known) < len(found):
        raise DataError(f"A run has no times, so no {metric}.\nCompare --metric acceptance.")
    lowest, worst = min(known, key=lambda pair: pair[0].value)
    marked = f" ({worst.mark})" if worst.mark else ""
    text = f"{metric} of {worst.names}, A / B, is {lowest.value:.3f}{marked}"
    if fail_below is None:
        return f"verdict: none asked for; {text}", True
    good = lowest.value >= fail_below
    unsure = ""
    if lowest.low <= fail_below <= lowest.high:
        unsure = f"; the interval [{lowest.low:.3f}, {lowest.high:.3f}] has both sides of it"
    word, side = ("pass", "not below") if good else ("FAIL", "below")
    return f"verdict: {word}: {text}, {side} {fail_below:g}{unsure}", good


def _open(name: str) -> tuple[Manifest, list[Arm]]:
    folder, colon, arm = name.rpartition(":")
    if not colon or Path(name).is_dir():
        return read_run(Path(name))
    manifest, arms = read_run(Path(folder))
    chosen = [x for x in arms if x.name == arm]
    if not chosen:
        names = ", ".join(x.name for x in arms)
        raise OptionError(f"{folder} has no arm {arm}; it has {names}.\nGive FOLDER:ARM.")
    return manifest, chosen


def _arm_pairs(mine: list[Arm], theirs: list[Arm], a: str, b: str) -> list[tuple[Arm, Arm]]:
    if len(mine) == len(theirs) == 1:
        return [(mine[0], theirs[0])]
    by_name = {arm.name: arm for arm in theirs}
    couples = [(arm, by_name[arm.name]) for arm in mine if arm.name in by_name]
    if not couples:
        raise OptionError(f"{a} and {b} have no arm in common.\nName one each: FOLDER:ARM.")
    return couples


def _on_common_units(x: Arm, y: Arm, a: str, b: str) -> list[Arm]:
    kept = m.on_common_units([x, y])
    if len(kept) < 2 or not kept[0].turns:
        raise DataError(
            f"{x.name} of {a} and {y.name} of {b} have no finished request in common.\n"
            "Go on with `ttspec bench run`, with the same seeds."
        )
    return kept
