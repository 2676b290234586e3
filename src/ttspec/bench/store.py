"""A run folder: written unit by unit, and read back.

It holds `manifest.json` (how it was made), `rounds.jsonl` (one line a round) and `requests.jsonl`
(one line a turn, with its text). A unit, one (arm, request, seed), is finished when all of its
turns stand in `requests.jsonl`; its rounds are written before, so an interrupted run has at most
one unit's rounds too many, which are dropped. Anything else that does not fit together is an error
(see the checks at the end).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ttspec.bench import jsonl
from ttspec.bench.jsonl import (
    NEW,
    Key,
    Row,
    append,
    key_of,
    replace_file,
    to_lines,
    turn_key,
    write_json,
)
from ttspec.bench.results import Arm, Turn
from ttspec.config import SamplingConfig
from ttspec.errors import DataError, ResourceError

MANIFEST, ROUNDS, REQUESTS = "manifest.json", "rounds.jsonl", "requests.jsonl"
RESTORE = "Restore it from a copy, or delete the folder and run again."
SETTINGS = (
    *("max_new_tokens", "session_tokens", "rows", "temperature", "ignore_eos"),
    *("dtype", "device", "threads", "replay"),
)
"""What one run has one value of, besides models, suite and the meaning of its arms."""
OBJECTS = ("target", "drafter", "drafters", "suite", "sampling", "arm_options", "replay", "failed")
"""Entries of a manifest that are objects, where they are there."""


class Store:
    """A run folder that grows. A unit is in it as a whole or not at all."""

    def __init__(self, folder: Path, manifest: Row) -> None:
        """Open a folder for this run: a new one, or one that the same run has begun.

        Raises:
            DataError: The folder holds something else, another run, or damaged records.
            ResourceError: Another process writes into it.
        """
        self.folder, self.manifest = folder, manifest
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ResourceError(
                f"Another process is writing into {folder}.\nWait for it, or name another --out."
            ) from error
        self.done: set[Key] = set()
        try:
            if (folder / MANIFEST).exists():
                self._go_on()
            elif {path.name for path in folder.iterdir()} - {".lock", MANIFEST + NEW}:
                raise DataError(f"{folder} holds other files, no run.\nName a new or empty folder.")
            self.write_manifest()
        except BaseException:
            self.close()
            raise

    def add(self, arm: str, turns: Sequence[Turn]) -> None:
        """Write a finished unit; if that fails, nothing of it stays."""
        more = {"of": len(turns), "models": models_of(self.manifest, arm)}
        parts = {
            self.folder / ROUNDS: [row for turn in turns for row in jsonl.round_rows(arm, turn)],
            self.folder / REQUESTS: [jsonl.turn_row(arm, turn) | more for turn in turns],
        }
        sizes = {path: path.stat().st_size if path.exists() else 0 for path in parts}
        try:
            for path, rows in parts.items():
                append(path, to_lines(rows))
        except BaseException:
            for path, size in sizes.items():
                with suppress(OSError):
                    os.truncate(path, size)
            raise
        self.done.add((arm, *turns[0].unit))

    def write_manifest(self) -> None:
        """Write the manifest again."""
        write_json(self.folder / MANIFEST, self.manifest, indent=2)

    def close(self) -> None:
        """Let others write."""
        self._lock.release()

    def _go_on(self) -> None:
        before, rounds, requests = _load(self.folder)
        require_same_run(self.folder, before, self.manifest)
        self.done = set(map(key_of, requests))
        for name, rows in ((ROUNDS, rounds), (REQUESTS, requests)):
            replace_file(self.folder / name, to_lines(rows))  # without an interrupted unit's rows
        now = self.manifest
        kept = dict(before)
        for name in ("arms", "seeds"):  # may have grown
            kept[name] = list(dict.fromkeys([*before.get(name, []), *now.get(name, [])]))
        for name in ("arm_options", "drafters"):
            if both := before.get(name, {}) | now.get(name, {}):
                kept[name] = both
        kept["failed"] = None  # what failed may do so no more
        self.manifest = continued(kept, now)


def continued(before: Row, now: Row) -> Row:
    """A manifest that says that its run went on, and under what."""
    again = {name: now.get(name) for name in ("date", "command", "git", "versions")}
    return {**before, "continued": [*before.get("continued", []), again]}


def require_same_run(folder: Path, before: Row, now: Row) -> None:
    """Refuse to go on with another run.

    Raises:
        DataError: The manifests differ in what makes a run.
    """
    if differs := different_settings(before, now):
        raise DataError(
            f"{folder} holds a run with another {differs}.\n"
            "Repeat the command that began it, or name another --out."
        )


def different_settings(a: Row, b: Row) -> str | None:
    """What two manifests must share to be one run, and do not."""
    for part in ("target", "drafter", "suite"):
        mine, other = a.get(part) or {}, b.get(part) or {}
        if any(mine.get(name) != other.get(name) for name in ("name", "sha256")):
            return part
    for part, what in (("arm_options", "meaning of the arm"), ("drafters", "drafter called")):
        mine, other = a.get(part) or {}, b.get(part) or {}
        for name in mine.keys() & other.keys():
            if mine[name] != other[name]:
                return f"{what} {name}"
    neutral = asdict(SamplingConfig())  # older runs had fewer options
    mine, other = (json.loads(json.dumps(neutral | (m.get("sampling") or {}))) for m in (a, b))
    changed = [name for name in neutral if mine[name] != other[name]]
    return next((n for n in SETTINGS if a.get(n) != b.get(n)), changed[0] if changed else None)


def begun_run(folder: Path) -> Row:
    """The manifest of a run that was begun in a folder; empty where none was."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def write_run(folder: Path, manifest: Row, arms: Iterable[Arm]) -> None:
    """Write a whole run folder."""
    write_json(folder / MANIFEST, manifest, indent=2)
    turns = [(arm.name, turn) for arm in arms for turn in arm.turns]
    rounds = (row for arm, turn in turns for row in jsonl.round_rows(arm, turn))
    replace_file(folder / ROUNDS, to_lines(rounds))
    replace_file(folder / REQUESTS, to_lines(jsonl.turn_row(arm, turn) for arm, turn in turns))


def read_run(folder: Path) -> tuple[Row, list[Arm]]:
    """Read a run folder back: its manifest and the finished units.

    Raises:
        DataError: A file is missing or damaged, or the records do not fit together.
    """
    manifest, all_rounds, requests = _load(folder)
    rounds: dict[tuple[Any, ...], list[Row]] = {}
    for row in all_rounds:
        rounds.setdefault(turn_key(row), []).append(row)
    arms = {name: Arm(name=name) for name in manifest.get("arms") or []}
    for row in requests:
        arm = arms.setdefault(row["arm"], Arm(name=row["arm"]))
        arm.turns.append(jsonl.to_turn(row, rounds.get(turn_key(row), [])))
    return manifest, list(arms.values())


def _load(folder: Path) -> tuple[Row, list[Row], list[Row]]:
    """Manifest, rounds and turns of the finished units, all checked."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        check_manifest(manifest)
        rounds, requests = (
            jsonl.read_lines(folder / name, check) if (folder / name).exists() else []
            for name, check in (
                (ROUNDS, lambda row: (turn_key(row), jsonl.to_round(row))),
                (REQUESTS, lambda row: jsonl.to_turn(row, [])),
            )
        )
    except (OSError, *jsonl.UNREADABLE) as error:
        raise DataError(
            f"{folder} is not a readable run folder: {error}.\nIt needs {MANIFEST}, "
            f"{ROUNDS} and {REQUESTS} as `ttspec bench run` and `ttspec demo` write them."
        ) from error
    rounds, requests = without_unfinished(folder, rounds, requests)
    check_counts(folder, rounds, requests)
    check_models(folder, manifest, requests)
    return manifest, rounds, requests


# What must fit together in a run folder: each check raises `DataError` and says what to do.


def check_manifest(manifest: Any) -> None:
    """A manifest is an object, and so are some entries of it; else a `ValueError` says which."""
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} holds no object")
    if manifest.get("random_weights"):  # until 0.1.0 runs of speed alone could be made
        raise ValueError("its weights were random, and what it accepted was forced")
    for name in OBJECTS:
        if not isinstance(manifest.get(name) or {}, dict):
            raise ValueError(f"{MANIFEST} has {manifest[name]!r:.40} as {name}, no object")
    suite, named = manifest.get("suite") or {}, manifest.get("drafters") or {}
    options = {**(manifest.get("arm_options") or {}), **named, "parts": suite.get("parts")}
    for name, part in options.items():
        if not isinstance(part or {}, dict):
            raise ValueError(f"{MANIFEST} has {part!r:.40} for {name}, no object")
    for model in (manifest.get("target"), manifest.get("drafter"), *named.values()):
        if not isinstance((model or {}).get("sha256") or "", str):
            raise ValueError(f"{MANIFEST} has a model whose sha256 is no text")
    for name, kind in (("arms", str), ("seeds", int), ("continued", dict), ("notes", str)):
        found = manifest.get(name) or []
        if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
            raise ValueError(f"{MANIFEST} has {found!r:.40} as {name}, no such list")
    for name in ("rows", "max_new_tokens", "session_tokens"):
        if (value := manifest.get(name)) is not None and type(value) is not int:
            raise ValueError(f"{MANIFEST} has {value!r:.40} as {name}, no whole number")


def without_unfinished(
    folder: Path, rounds: list[Row], requests: list[Row]
) -> tuple[list[Row], list[Row]]:
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
        found, expected = numbers.get(turn_key(row), []), row["stats"]["rounds"]
        if found != list(range(expected)):
            what = "twice or out of order" if len(found) >= expected else "missing"
            raise DataError(
                f"{folder / ROUNDS} has rounds of arm {row['arm']}, request {row['request']}, "
                f"{what}: {len(found)} lines for {expected} rounds.\n{RESTORE}"
            )


def models_of(manifest: Row, arm: str) -> str:
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
        expected = models_of(manifest, row["arm"])
        if row.get("models", expected) != expected:
            raise DataError(
                f"{folder} mixes models: request {row['request']} of arm {row['arm']} was made "
                f"with {row['models']}, the manifest says {expected} (target/drafter checksums).\n"
                "Runs of different models belong into different folders; run them again."
            )
