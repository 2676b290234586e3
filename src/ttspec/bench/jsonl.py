"""Rounds and turns as JSON lines, and files that change as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from ttspec.bench.results import Turn
from ttspec.errors import DataError, writing
from ttspec.records import Result, Round, summarise

Row = dict[str, Any]
Key = tuple[str, int, int]
"""A unit's arm, request and seed."""
NEW = ".new"
"""Behind the name of a file that is being written. A process that is killed may leave it."""
STAGES = ("draft", "verify", "learn")
ROUND_FIELDS = ("position", "proposed", "accepted", "emitted", "updates")
CLOCK_FIELDS = ("began", "peak_memory")
STATS = ("rounds", "prompt_tokens", "reverts", "seconds")
COUNTS = ("request", "turn", "round", *ROUND_FIELDS, "length", "of", "peak_memory", *STATS[:3])
TIMES = ("seconds", "first_token", "began", "wait", *STAGES)
TEXTS = ("arm", "user", "text")
OPTIONAL = ("length", "of", "peak_memory", "first_token", "began", "wait")
"""Values that may be null."""
MOST = 1 << 53
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What a row that is no round, or no turn, raises."""


def check_values(row: Row) -> None:
    """Every value that is counted with is a number, in a round's line or a turn's.

    Raises:
        ValueError: Names one that is not.
        KeyError: It is of no turn.
    """
    turn_key(row)
    values = [*row.items(), *(row.get("milliseconds") or {}).items()]
    if "stats" in row:
        values += [(name, row["stats"][name]) for name in STATS]
    for name, value in values:
        if value is None and name in OPTIONAL:
            continue
        if name in TEXTS:
            right = isinstance(value, str)
        elif name in COUNTS:
            right = type(value) is int and 0 <= value < MOST
        elif name in TIMES:
            right = type(value) in (int, float) and 0 <= cast(float, value) < MOST
        else:
            continue
        if not right:
            raise ValueError(f"{name} is {value!r:.40}")
    if type(row["seed"]) is not int or not all(type(t) is int for t in row.get("token_ids", ())):
        raise ValueError("seed and token_ids are whole numbers")


def key_of(row: Row) -> Key:
    """The unit that a line is of."""
    return row["arm"], row["request"], row["seed"]


def turn_key(row: Row) -> tuple[Any, ...]:
    """The turn that a line is of."""
    return *key_of(row), row["turn"]


def _begin_row(arm: str, turn: Turn) -> Row:
    seed = turn.result.stats.seed
    return {"arm": arm, "request": turn.request, "seed": seed, "turn": turn.turn}


def round_rows(arm: str, turn: Turn) -> Iterator[Row]:
    """A line for each round; times in milliseconds."""
    waits = turn.waits if len(turn.waits) >= len(turn.result.rounds) else None
    for number, r in enumerate(turn.result.rounds):
        yield {
            **_begin_row(arm, turn),
            "round": number,
            **{name: getattr(r, name) for name in ROUND_FIELDS},
            **({} if r.length is None else {"length": r.length}),
            **({"copied": True} if r.copied else {}),
            "milliseconds": dict(zip(STAGES, (round(1000 * s, 3) for s in r.seconds), strict=True)),
            "wait": None if waits is None else round(1000 * waits[number], 3),
        }


def to_round(row: Row) -> Round:
    """The round that a line holds."""
    draft, verify, learn = (row["milliseconds"][stage] / 1000 for stage in STAGES)
    values = {name: row[name] for name in ROUND_FIELDS}
    more = {"length": row.get("length"), "copied": bool(row.get("copied"))}
    return Round(**values, seconds=(draft, verify, learn), **more)


def turn_row(arm: str, turn: Turn) -> Row:
    """A turn's line: its text and statistics; its rounds have lines of their own."""
    result = turn.result
    return {
        **_begin_row(arm, turn),
        "user": turn.user,
        "text": result.text,
        "text_hash": _hash(result.text),
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "seconds": turn.seconds,
        "first_token": turn.first_token,
        **{name: getattr(turn, name) for name in CLOCK_FIELDS},
        "reverts": result.stats.reverts,
        "stats": asdict(result.stats),
    }


def to_turn(row: Row, round_rows: list[Row]) -> Turn:
    """The turn of a line, with the rounds of its lines.

    Raises:
        ValueError: The text is not the one that was written.
        KeyError, TypeError, AttributeError: It is no turn.
    """
    rounds, stats = [to_round(r) for r in round_rows], row["stats"]
    given = {name: stats[name] for name in ("prompt_tokens", "seconds", "reverts")}
    given["reread_tokens"] = stats.get("reread_tokens", 0)
    made = summarise(rounds, token_ids=row["token_ids"], seed=row["seed"], **given)
    if _hash(row["text"]) != row.get("text_hash", _hash(row["text"])):
        raise ValueError("the text is not the one that was written (text_hash)")
    result = Result(
        **{name: row[name] for name in ("text", "token_ids", "finish_reason")},
        stats=made,
        rounds=rounds,
    )
    values: Row = {name: row[name] for name in ("request", "user", "seconds", "turn")}
    values |= {name: row.get(name) for name in CLOCK_FIELDS}
    return Turn(
        **values,
        result=result,
        first_token=row.get("first_token") or 0.0,
        waits=[r["wait"] / 1000 for r in round_rows if r.get("wait") is not None],
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def to_lines(rows: Iterable[Row]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read_lines(path: Path, check: Callable[[Row], Any]) -> list[Row]:
    """The rows of a file; half a last line is what an interrupted run leaves, and dropped.

    Raises:
        DataError: `check` does not understand a line before the last one.
    """
    *whole, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate([*whole, last], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            check_values(row)
            check(row)
        except UNREADABLE as error:
            if number > len(whole):
                break
            raise DataError(
                f"{path}, line {number} is damaged: {error!r}.\n"
                "Restore the file from a copy, or delete the folder and run again."
            ) from error
        rows.append(row)
    return rows


def append(path: Path, data: bytes) -> None:
    """Write at a file's end, and wait until it is on the disk."""
    with writing(path), path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write or replace a file at once: an interrupt leaves the old one."""
    new = path.with_name(path.name + NEW)
    try:
        with writing(path):
            new.write_bytes(data)
            new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """Write or replace a JSON file, at once; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    replace_file(path, f"{text}\n".encode())
