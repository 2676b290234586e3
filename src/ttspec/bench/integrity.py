"""What must fit together in a run folder; each check raises `DataError` and says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ttspec.bench.jsonl import Key, Row, key_of, turn_key
from ttspec.errors import DataError

MANIFEST, ROUNDS, REQUESTS = "manifest.json", "rounds.jsonl", "requests.jsonl"
CLOCK_TOLERANCE = 2.0
"""Seconds by which a network may set back a healthy clock."""
RESTORE = "Restore it from a copy, or delete the folder and run again."


def finished(folder: Path, rounds: list[Row], requests: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rounds and turns without those of a unit that was being written at the end."""
    turns: dict[Key, list[int]] = {}
    for row in requests:
        numbers = turns.setdefault(key_of(row), [])
        if row["turn"] in numbers:
            raise DataError(
                f"{folder / REQUESTS} has request {row['request']} of arm {row['arm']}, seed "
                f"{row['stats']['seed']}, twice.\nDelete the folder and run again: every figure "
                "would count it twice."
            )
        numbers.append(row["turn"])
    sizes = {key_of(row): row.get("of", 0) for row in requests}
    short = [key for key, numbers in turns.items() if len(numbers) < sizes[key]]
    if short and (len(short) > 1 or key_of(requests[-1]) not in short):
        arm, request, _ = short[0]
        raise DataError(
            f"{folder / REQUESTS} lacks turns of arm {arm}, request {request}.\n{RESTORE}"
        )
    done = turns.keys() - set(short)
    unfinished = {key_of(row) for row in rounds} - done
    if len(unfinished) > 1 or (unfinished and key_of(rounds[-1]) not in unfinished):
        raise DataError(
            f"{folder / REQUESTS} lacks {len(unfinished)} requests whose rounds are there: it was "
            f"cut.\n{RESTORE}"
        )
    kept, turns_kept = ([row for row in rows if key_of(row) in done] for rows in (rounds, requests))
    return kept, turns_kept


def check_counts(folder: Path, rounds: list[Row], requests: list[Row]) -> None:
    """Every turn has all of its rounds, once and in order."""
    numbers: dict[tuple[Any, ...], list[int]] = {}
    for row in rounds:
        numbers.setdefault(turn_key(row), []).append(row["round"])
    for row in requests:
        found, wanted = numbers.get(turn_key(row), []), row["stats"]["rounds"]
        if found != list(range(wanted)):
            what = "twice or out of order" if len(found) >= wanted else "missing"
            raise DataError(
                f"{folder / ROUNDS} has rounds of arm {row['arm']}, request {row['request']}, "
                f"{what}: {len(found)} lines for {wanted} rounds.\n{RESTORE}"
            )


def models_of(manifest: Row, arm: str | None = None) -> str:
    """The pair of models in short, which every request line carries."""
    drafter = manifest.get("drafter")
    named = ((manifest.get("arm_options") or {}).get(arm) or {}).get("drafter")
    if named:
        drafter = (manifest.get("drafters") or {}).get(named)
    sums = [(model or {}).get("sha256") for model in (manifest.get("target"), drafter)]
    return "/".join((s or "none")[:12] for s in sums)


def check_models(folder: Path, manifest: Row, requests: list[Row]) -> None:
    """Every turn was made with the manifest's models."""
    for row in requests:
        wanted = models_of(manifest, row["arm"])
        if row.get("models", wanted) != wanted:
            raise DataError(
                f"{folder} mixes models: request {row['request']} of arm {row['arm']} was made "
                f"with {row['models']}, the manifest says {wanted} (target/drafter checksums).\n"
                "Runs of different models belong into different folders; run them again."
            )


def check_clock(folder: Path, manifest: Row, rounds: list[Row], requests: list[Row]) -> None:
    """No time is negative, and nothing ended before it began."""
    alone = manifest.get("rows", 1) == 1  # rows of a batch begin together and overlap

    def wrong(row: Row, what: str) -> DataError:
        return DataError(
            f"{folder}: a clock went backwards in arm {row['arm']}, request {row['request']}: "
            f"{what}.\nIts times mean nothing; mend the clock, then run again into a new folder."
        )

    for row in rounds:
        for stage, spent in {**row["milliseconds"], "wait": row.get("wait") or 0.0}.items():
            if spent < 0:
                raise wrong(row, f"{stage} took {spent} ms in round {row['round']}")
    latest = 0.0
    for row in requests:
        if min(row["seconds"], row.get("first_token") or 0.0) < 0:
            raise wrong(row, f"it took {row['seconds']} s")
        began, ended = row.get("began"), row.get("ended")
        if began is None or ended is None:
            continue
        ordered = alone or row["turn"] == 0
        if ended < began - CLOCK_TOLERANCE or (ordered and began < latest - CLOCK_TOLERANCE):
            raise wrong(row, f"from {began:.1f} s to {ended:.1f} s, after {latest:.1f} s")
        if ordered:
            latest = max(latest, ended if alone else began)
