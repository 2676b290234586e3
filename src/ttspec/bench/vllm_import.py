"""A run folder from what vLLM says of each request, so that its runs get ttspec's plots.

A file has a JSON object a line: a response of vLLM's server that runs with
`--per-request-spec-decode-metrics detailed`, or what `scripts/record_vllm.py` writes, which has
every step of the engine. docs/vllm-import.md describes both. No round is made up: a request whose
rounds are not known is left out, and the report says so.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ttspec.bench.results import Arm, Turn
from ttspec.bench.store import write_run
from ttspec.errors import DataError
from ttspec.records import FinishReason, Result, Round, summarise

Row = dict[str, Any]
REASONS: dict[str, FinishReason] = {"stop": "eos", "tool_calls": "eos", "length": "length"}
"""vLLM's reasons to finish, and ttspec's names of them."""
DETAILED = "Start vLLM with --per-request-spec-decode-metrics detailed; 0.32.0 has it."
RECORD = "Record with scripts/record_vllm.py, which sees every step."
UNTIMED = "vLLM does not say how long drafting and verifying took: all its time counts as other."
NO_SPEED = "The responses have no times, so no speed: vLLM needs --enable-per-request-metrics."


@dataclass(slots=True)
class Imported:
    """What came of a file."""

    turns: list[Turn] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """A sentence for each request whose rounds are not known."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what the figures cannot say."""


class _UnknownRoundsError(Exception):
    """The request is sound, and its rounds are not known."""


def import_run(file: Path, out: Path, arm: str = "vllm") -> Imported:
    """Write a run folder of one arm from a file of vLLM's responses, or from a recording.

    Raises:
        DataError: The file is damaged or has no rounds, or the folder is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is there already and not empty.\nName a new or empty folder.")
    rows = _read(file)
    head = rows.pop(0)[1] if rows and "recording" in rows[0][1] else {}
    with _naming_line(f"{file}, line 1"):
        expected = head["suite"]["requests"] if head else max(len(rows), 1)
    if len(rows) != expected:
        raise DataError(f"{file} has {len(rows)} requests of {expected}.\nRecord it again.")
    found, places = Imported(), {}
    for count, (where, row) in enumerate(rows):
        row.setdefault("request", count)
        with _naming_line(where):
            for mark in {(row["request"], row.get("seed", 0)), row.get("id")} - {None}:
                if mark in places:
                    raise DataError(
                        f"{where} is request {row['request']} again, after {places[mark]}.\n"
                        "Delete one of the lines: every figure would count it twice."
                    )
                places[mark] = where
            try:
                found.turns.append(_turn(where, row))
            except _UnknownRoundsError as error:
                found.left_out.append(f"request {row['request']}: {error}")
    if not found.turns:
        raise DataError(
            f"{file} has nothing to import; {found.left_out[0]}\n"
            "docs/vllm-import.md says what can be imported."
        )
    timed = sum(turn.seconds > 0 for turn in found.turns)
    if 0 < timed < len(found.turns):
        raise DataError(
            f"{file} has times in {timed} of {len(found.turns)} requests.\nImport those with times "
            "and those without apart: their tokens per second would be wrong."
        )
    found.notes.append(UNTIMED if timed else NO_SPEED)
    manifest = _manifest(file, head, rows, arm, found)
    write_run(out, manifest, [Arm(name=arm, turns=found.turns)])
    return found


def _read(file: Path) -> list[tuple[str, Row]]:
    """The objects of a file, each with its place."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} cannot be read: {getattr(error, 'strerror', None) or error}.\n"
            "Give a UTF-8 file of JSON lines: vLLM's responses, or a recording."
        ) from error
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        with _naming_line(where):
            if line.strip():
                rows.append((where, dict(json.loads(line))))
    return rows


@contextmanager
def _naming_line(where: str) -> Iterator[None]:
    """Name the line where something in it is not what it should be."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{where} is damaged or no response of vLLM: {error!r}.\nIt needs a JSON object with "
            "choices, usage, and metrics or steps, as docs/vllm-import.md says; write it again."
        ) from error


def _turn(where: str, row: Row) -> Turn:
    """A line as a finished answer."""
    (choice,), usage, seed = row["choices"], row["usage"], row.get("seed", 0)
    ids = choice.get("token_ids")
    if not ids:
        raise DataError(f'{where} has no token_ids.\nAsk vLLM with "return_token_ids": true.')
    _require_counts(row["request"], seed, usage["prompt_tokens"], *ids)
    if usage["completion_tokens"] != len(ids):
        raise ValueError(f"{len(ids)} token_ids for {usage['completion_tokens']} tokens")
    if choice["finish_reason"] not in REASONS:
        raise _UnknownRoundsError(f"its answer broke off ({choice['finish_reason']}).")
    if isinstance(choice.get("stop_reason"), str):
        raise _UnknownRoundsError("it ended with a stop text, and vLLM then gives no figures.")
    if "steps" in row:
        rounds = _rounds([step[1:3] for step in row["steps"][1:]], len(ids))
        if [step[0] for step in row["steps"]] != [1, *(r.emitted for r in rounds)]:
            raise ValueError("the steps do not add up to the tokens")
        first, *waits = (_seconds(step[3]) for step in row["steps"])
        seconds = first + sum(waits)
    else:
        metrics = row.get("metrics") or {}
        rounds, waits = _rounds(_counts(where, metrics, len(ids)), len(ids)), []
        first = _seconds(metrics.get("time_to_first_token_ms") or 0)
        seconds = first and first + _seconds(metrics.get("generation_time_ms") or 0)
    given = {"prompt_tokens": usage["prompt_tokens"], "seed": seed, "seconds": seconds}
    return Turn(
        request=row["request"],
        user=str(row.get("prompt") or ""),
        result=Result(
            text=choice.get("text") or (choice.get("message") or {}).get("content") or "",
            token_ids=ids,
            finish_reason=REASONS[choice["finish_reason"]],
            stats=summarise(rounds, token_ids=ids, **given),
            rounds=rounds,
        ),
        seconds=seconds,
        first_token=first,
        waits=waits,
    )


def _counts(where: str, metrics: Row, tokens: int) -> list[tuple[int, int]]:
    """Drafted and accepted tokens of each round, from a response's metrics."""
    counts = metrics.get("speculative_decoding") or {}
    if not counts:
        raise DataError(f"{where} has no metrics.speculative_decoding.\n{DETAILED}")
    kept, drafted = (counts.get(f"per_step_{n}") or [] for n in ("accepted", "drafted"))
    steps, accepted = counts["num_spec_steps"], counts["num_accepted_draft_tokens"]
    if steps and not kept:
        raise DataError(
            f"{where} has only a summary: {steps} rounds, acceptance length about "
            f"{1 + accepted / steps:.2f}. It does not say which round came when, so there is no "
            f"plot by position, and no round is made up.\n{DETAILED}"
        )
    if (len(kept), sum(kept), sum(drafted)) != (steps, accepted, counts["num_draft_tokens"]):
        raise ValueError("the rounds do not add up to their sums")
    # A step that drafts nothing commits one token, and vLLM's lists leave it out.
    undrafted = tokens - 1 - sum(kept) - len(kept)
    if undrafted > 0:
        raise _UnknownRoundsError(
            f"{undrafted} of its {tokens} tokens came in steps that drafted nothing, and vLLM does "
            f"not say where. {RECORD}"
        )
    return list(zip(drafted, kept, strict=True))


def _rounds(counts: Sequence[Sequence[int]], tokens: int) -> list[Round]:
    """Rounds from drafted and accepted counts; the prefill's token belongs to none.

    vLLM counts what the last round accepted past the end, and ttspec does not.
    """
    rounds, position = [], 1
    for proposed, accepted in counts:
        _require_counts(proposed, accepted)
        emitted = min(accepted + 1, tokens - position)
        if accepted > proposed or emitted < 1:
            raise ValueError(f"{accepted} of {proposed} drafts accepted after token {position}")
        kept = min(accepted, emitted)
        rounds.append(Round(position=position, proposed=proposed, accepted=kept, emitted=emitted))
        position += emitted
    if position != tokens:
        raise ValueError(f"the rounds end at token {position} of {tokens}")
    return rounds


def _require_counts(*values: Any) -> None:
    for value in values:
        if type(value) is not int or value < 0:
            raise ValueError(f"{value!r} is no whole number from 0 up")


def _seconds(milliseconds: float) -> float:
    if not 0 <= milliseconds < float("inf"):
        raise ValueError(f"a time of {milliseconds} ms")
    return milliseconds / 1000


def _manifest(file: Path, head: Row, rows: list[tuple[str, Row]], arm: str, found: Imported) -> Row:
    """What the file says of how it was made; what it does not say is left out."""
    models = {row.get("model"): where for where, row in rows}
    if len(models) > 1:
        raise DataError(
            f"{file} mixes the models {', '.join(map(str, models))}.\nImport each alone."
        )
    asked = [_prompt_identity(row) for _, row in rows]
    return {
        "title": f"ttspec bench import: {file.name}",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": {"name": next(iter(models)), "sha256": None},
        "suite": {
            "name": file.stem,
            "requests": len(rows),
            "sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        },
        **{name: value for name, value in head.items() if name not in ("recording", "version")},
        "imported": {
            "from": "vLLM",
            "version": head.get("version"),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        },
        "arms": [arm],
        "seeds": sorted({turn.result.stats.seed for turn in found.turns}),
        "failed": {arm: found.left_out} if found.left_out else None,
        "notes": found.notes,
    }


def _prompt_identity(row: Row) -> Any:
    """What tells a request's prompt from others: its tokens where vLLM returned them."""
    ids = row.get("prompt_token_ids") or row["choices"][0].get("prompt_token_ids")
    return ids or [row.get("prompt"), row["usage"]["prompt_tokens"]]
