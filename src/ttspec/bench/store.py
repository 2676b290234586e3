"""A run folder: written unit by unit, read back, and distrusted while it is read.

It holds `manifest.json` (how it was made), `rounds.jsonl` (one line a round) and `requests.jsonl`
(one line a turn, with its text). A unit, one (arm, request, seed), is finished when all of its
turns stand in `requests.jsonl`; its rounds are written before, so an interrupted run has at most
one unit's rounds too many, which are dropped. Anything else that does not fit together is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ttspec.bench.runs import Arm, Turn
from ttspec.errors import DataError, ResourceError
from ttspec.records import Result, Round, summarise

MANIFEST, ROUNDS, REQUESTS = "manifest.json", "rounds.jsonl", "requests.jsonl"
STAGES = ("draft", "verify", "learn")
SLACK = 2.0
"""Seconds by which a network may set back a healthy clock."""
Row = dict[str, Any]
Key = tuple[str, int, int]
"""A finished unit's arm, request and seed."""


class Store:
    """A run folder that grows. A unit is in it as a whole or not at all."""

    def __init__(self, folder: Path, manifest: Row) -> None:
        """Open a folder for this run: a new one, or one that the same run has begun.

        Raises:
            DataError: The folder holds something else, another run, or damaged records.
            ResourceError: Another process writes into it.
        """
        from filelock import FileLock, Timeout

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
            elif any(path.name != ".lock" for path in folder.iterdir()):
                raise DataError(f"{folder} holds other files, no run.\nName a new or empty folder.")
            write_manifest(folder, self.manifest)
        except BaseException:
            self.close()
            raise

    def add(self, arm: str, turns: Sequence[Turn]) -> None:
        """Write a finished unit; if that fails, nothing of it stays."""
        models = model_mark(self.manifest, arm)
        parts = {
            ROUNDS: _lines(row for turn in turns for row in _round_rows(arm, turn)),
            REQUESTS: _lines(
                {**_turn_row(arm, turn), "of": len(turns), "models": models} for turn in turns
            ),
        }
        paths = {self.folder / name: data for name, data in parts.items()}
        sizes = {path: path.stat().st_size if path.exists() else 0 for path in paths}
        try:
            for path, data in paths.items():
                _append(path, data)
        except BaseException:
            for path, size in sizes.items():
                with suppress(OSError):
                    os.truncate(path, size)
            raise
        self.done.add((arm, *turns[0].unit))

    def close(self) -> None:
        """Let others write."""
        self._lock.release()

    def _go_on(self) -> None:
        before, rounds, requests = _load(self.folder)
        differs = different_settings(before, self.manifest)
        if differs:
            raise DataError(
                f"{self.folder} holds a run with another {differs}.\n"
                "Repeat the command that began it, or name another --out."
            )
        self.done = {_key(row) for row in requests}
        for name, rows in ((ROUNDS, rounds), (REQUESTS, requests)):
            _replace(self.folder / name, _lines(rows))  # without an interrupted unit's leavings
        again = {k: self.manifest.get(k) for k in ("date", "command", "git", "versions")}
        new = {"arms", "seeds"}  # may have grown
        kept = {k: self.manifest[k] if k in new else v for k, v in before.items()}
        for name in new:
            kept[name] = list(dict.fromkeys([*before.get(name, []), *self.manifest.get(name, [])]))
        for name in ("arm_options", "drafters"):
            both = before.get(name, {}) | self.manifest.get(name, {})
            kept |= {name: both} if both else {}
        kept["skipped"] = self.manifest.get("skipped")  # what is missing may have been installed
        self.manifest = {**kept, "failed": None, "continued": [*before.get("continued", []), again]}


SETTINGS = (
    "max_new_tokens",
    "session_tokens",
    "rows",
    "temperature",
    "ignore_eos",
    "dtype",
    "device",
    "threads",
    "random_weights",
    "replay",
)


def different_settings(a: Row, b: Row) -> str | None:
    """What two manifests must share to be one run, and do not."""
    for part in ("target", "drafter", "suite"):
        mine, other = a.get(part) or {}, b.get(part) or {}
        if (mine.get("name"), mine.get("sha256")) != (other.get("name"), other.get("sha256")):
            return part
    for part, what in (("arm_options", "meaning of the arm"), ("drafters", "drafter called")):
        mine, other = a.get(part) or {}, b.get(part) or {}
        for name in mine.keys() & other.keys():
            if mine[name] != other[name]:
                return f"{what} {name}"
    return next((name for name in SETTINGS if a.get(name) != b.get(name)), None)


def model_mark(manifest: Row, arm: str | None = None) -> str:
    """The pair of models in short, which every request line carries."""
    drafter = manifest.get("drafter")
    named = ((manifest.get("arm_options") or {}).get(arm) or {}).get("drafter")
    if named:
        drafter = (manifest.get("drafters") or {}).get(named)
    sums = [(model or {}).get("sha256") for model in (manifest.get("target"), drafter)]
    return "/".join((s or "none")[:12] for s in sums)


def write_manifest(folder: Path, manifest: Row) -> None:
    """Write or replace the manifest, at once."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    _replace(folder / MANIFEST, text.encode())


def write_run(folder: Path, manifest: Row, arms: Iterable[Arm]) -> None:
    """Write a whole run folder."""
    arms = list(arms)
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, manifest)
    pairs = [(arm.name, turn) for arm in arms for turn in arm.turns]
    _replace(folder / ROUNDS, _lines(row for pair in pairs for row in _round_rows(*pair)))
    _replace(folder / REQUESTS, _lines(_turn_row(*pair) for pair in pairs))


def read_run(folder: Path) -> tuple[Row, list[Arm]]:
    """Read a run folder back: its manifest and the finished units.

    Raises:
        DataError: A file is missing or damaged, or the records do not fit together.
    """
    manifest, round_rows, request_rows = _load(folder)
    rounds: dict[tuple[Any, ...], list[Row]] = {}
    for row in round_rows:
        rounds.setdefault((*_key(row), row["turn"]), []).append(row)
    arms: dict[str, Arm] = {name: Arm(name=name) for name in manifest.get("arms") or []}
    for row in request_rows:
        arm = arms.setdefault(row["arm"], Arm(name=row["arm"]))
        arm.turns.append(_turn(row, rounds.get((*_key(row), row["turn"]), [])))
    return manifest, list(arms.values())


def _load(folder: Path) -> tuple[Row, list[Row], list[Row]]:
    """Manifest, rounds and turns of the finished units, all checked."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        rounds = _read_lines(folder / ROUNDS, lambda row: (_key(row), row["turn"], _round(row)))
        requests = _read_lines(folder / REQUESTS, lambda row: _turn(row, []))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder} is not a readable run folder: {error}.\nIt needs {MANIFEST}, "
            f"{ROUNDS} and {REQUESTS} as `ttspec bench run` and `ttspec demo` write them."
        ) from error
    requests = _finished(folder, requests)
    done = {_key(row) for row in requests}
    spare = {_key(row) for row in rounds} - done
    if len(spare) > 1 or (spare and _key(rounds[-1]) not in spare):
        raise DataError(
            f"{folder / REQUESTS} lacks {len(spare)} requests whose rounds are there: it was cut.\n"
            "Restore it from a copy, or delete the folder and run again."
        )
    rounds = [row for row in rounds if _key(row) in done]
    _check_counts(folder, rounds, requests)
    _check_models(folder, manifest, requests)
    _check_clock(folder, manifest, rounds, requests)
    return manifest, rounds, requests


def _finished(folder: Path, requests: list[Row]) -> list[Row]:
    """The turns without those of a unit that was being written at the end."""
    turns: dict[Key, list[int]] = {}
    for row in requests:
        seen = turns.setdefault(_key(row), [])
        if row["turn"] in seen:
            raise DataError(
                f"{folder / REQUESTS} has request {row['request']} of arm {row['arm']}, seed "
                f"{row['stats']['seed']}, twice.\nDelete the folder and run again: every figure "
                "would count it twice."
            )
        seen.append(row["turn"])
    sizes = {_key(row): row.get("of", 0) for row in requests}
    short = [key for key, seen in turns.items() if len(seen) < sizes[key]]
    if short and (len(short) > 1 or _key(requests[-1]) not in short):
        raise DataError(
            f"{folder / REQUESTS} lacks turns of arm {short[0][0]}, request {short[0][1]}.\n"
            "Restore it from a copy, or delete the folder and run again."
        )
    return [row for row in requests if _key(row) not in short]


def _check_counts(folder: Path, rounds: list[Row], requests: list[Row]) -> None:
    numbers: dict[tuple[Any, ...], list[int]] = {}
    for row in rounds:
        numbers.setdefault((*_key(row), row["turn"]), []).append(row["round"])
    for row in requests:
        found = numbers.get((*_key(row), row["turn"]), [])
        wanted = row["stats"]["rounds"]
        if found != list(range(wanted)):
            what = "twice or out of order" if len(found) >= wanted else "missing"
            raise DataError(
                f"{folder / ROUNDS} has rounds of arm {row['arm']}, request {row['request']}, "
                f"{what}: {len(found)} lines for {wanted} rounds.\n"
                "Restore it from a copy, or delete the folder and run again."
            )


def _check_models(folder: Path, manifest: Row, requests: list[Row]) -> None:
    for row in requests:
        wanted = model_mark(manifest, row["arm"])
        if row.get("models", wanted) != wanted:
            raise DataError(
                f"{folder} mixes models: request {row['request']} of arm {row['arm']} was made "
                f"with {row['models']}, the manifest says {wanted} (target/drafter checksums).\n"
                "Runs of different models belong into different folders; run them again."
            )


def _check_clock(folder: Path, manifest: Row, rounds: list[Row], requests: list[Row]) -> None:
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
        late = alone or row["turn"] == 0
        if ended < began - SLACK or (late and began < latest - SLACK):
            raise wrong(row, f"from {began:.1f} s to {ended:.1f} s, after {latest:.1f} s")
        if late:
            latest = max(latest, ended if alone else began)


def _key(row: Row) -> Key:
    return row["arm"], row["request"], row["seed"]


def _round_rows(arm: str, turn: Turn) -> Iterable[Row]:
    waits = turn.waits if len(turn.waits) >= len(turn.result.rounds) else []
    for number, r in enumerate(turn.result.rounds):
        yield {
            "arm": arm,
            "request": turn.request,
            "seed": turn.result.stats.seed,
            "turn": turn.turn,
            "round": number,
            "position": r.position,
            "proposed": r.proposed,
            "accepted": r.accepted,
            "emitted": r.emitted,
            "updates": r.updates,
            **({} if r.length is None else {"length": r.length}),
            "milliseconds": dict(zip(STAGES, (round(1000 * s, 3) for s in r.seconds), strict=True)),
            "wait": round(1000 * waits[number], 3) if waits else None,
        }


def _round(row: Row) -> Round:
    draft, verify, learn = (row["milliseconds"][stage] / 1000 for stage in STAGES)
    return Round(
        position=row["position"],
        proposed=row["proposed"],
        accepted=row["accepted"],
        emitted=row["emitted"],
        updates=row["updates"],
        seconds=(draft, verify, learn),
        length=row.get("length"),
    )


def _turn_row(arm: str, turn: Turn) -> Row:
    result = turn.result
    return {
        "arm": arm,
        "request": turn.request,
        "seed": result.stats.seed,
        "turn": turn.turn,
        "user": turn.user,
        "text": result.text,
        "text_hash": _hash(result.text),
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "seconds": turn.seconds,
        "first_token": turn.first_token,
        "began": turn.began,
        "ended": turn.ended,
        "peak_memory": turn.peak_memory,
        "reverts": result.stats.reverts,
        "stats": result.stats.to_dict(),
    }


def _turn(row: Row, rounds: list[Row]) -> Turn:
    made = [_round(r) for r in rounds]
    stats = summarise(
        made,
        token_ids=row["token_ids"],
        prompt_tokens=row["stats"]["prompt_tokens"],
        seed=row["seed"],
        seconds=row["stats"]["seconds"],
        reverts=row["stats"]["reverts"],
    )
    if _hash(row["text"]) != row.get("text_hash", _hash(row["text"])):
        raise ValueError("the text is not the one that was written (text_hash)")
    result = Result(
        text=row["text"],
        token_ids=row["token_ids"],
        finish_reason=row["finish_reason"],
        stats=stats,
        rounds=made,
    )
    return Turn(
        request=row["request"],
        user=row["user"],
        result=result,
        seconds=row["seconds"],
        turn=row["turn"],
        first_token=row.get("first_token") or 0.0,
        waits=[r["wait"] / 1000 for r in rounds if r.get("wait") is not None],
        began=row.get("began"),
        ended=row.get("ended"),
        peak_memory=row.get("peak_memory"),
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(path.name + ".new")
    new.write_bytes(data)
    new.replace(path)


def _read_lines(path: Path, understand: Any) -> list[Row]:
    """The rows of a file; half a last line is what an interrupted run leaves, and dropped."""
    if not path.exists() and (path.parent / MANIFEST).exists():
        return []  # interrupted before its first unit
    *whole, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate([*whole, last], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            understand(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number > len(whole):
                break
            raise DataError(
                f"{path}, line {number} is damaged: {error!r}.\n"
                "Restore the file from a copy, or delete the folder and run again."
            ) from error
        rows.append(row)
    return rows
