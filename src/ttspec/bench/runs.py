"""What several arms did on the same requests: kept while they run, written to a folder, read back.

A run folder holds `manifest.json` (how it was made), `rounds.jsonl` (one line a round) and
`requests.jsonl` (one line a turn, with its text). Knows no model and draws nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttspec.errors import DataError
from ttspec.records import Chunk, Result, Round, acceptance_length, repeated_ngrams, summarise

STAGES = ("draft", "verify", "learn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One finished answer within a request."""

    request: int
    user: str
    result: Result
    seconds: float
    """Wall clock inside the engine; showing the text is not counted."""


@dataclass(kw_only=True)
class Arm:
    """One way of decoding, and all that it has generated so far."""

    name: str
    turns: list[Turn] = field(default_factory=list)
    open_rounds: list[Round] = field(default_factory=list)
    """Rounds, tokens and seconds of the turn that is under way."""
    open_tokens: int = 0
    open_seconds: float = 0.0

    def record(self, chunk: Chunk, seconds: float) -> None:
        """Count a chunk of the turn that is under way."""
        self.open_seconds += seconds
        self.open_tokens += len(chunk.token_ids)
        if chunk.round is not None:
            self.open_rounds.append(chunk.round)

    def finish(self, user: str, result: Result, request: int = 0) -> None:
        """Replace what was counted by the result."""
        turn = Turn(request=request, user=user, result=result, seconds=self.open_seconds)
        self.turns.append(turn)
        self.drop_open()

    def drop_open(self) -> None:
        """Forget the turn that is under way."""
        self.open_rounds, self.open_tokens, self.open_seconds = [], 0, 0.0

    @property
    def rounds(self) -> list[Round]:
        """All rounds in order, those of the open turn last."""
        return [r for turn in self.turns for r in turn.result.rounds] + self.open_rounds

    @property
    def token_ids(self) -> list[int]:
        """Generated tokens of the finished turns, end tokens included."""
        return [token for turn in self.turns for token in turn.result.token_ids]

    @property
    def tokens(self) -> int:
        """Generated tokens, those of the open turn included."""
        return sum(len(turn.result.token_ids) for turn in self.turns) + self.open_tokens

    @property
    def seconds(self) -> float:
        """Wall clock inside the engine."""
        return sum(turn.seconds for turn in self.turns) + self.open_seconds

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over wall clock, prefills and updates included."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def learning_share(self) -> float:
        """Share of the wall clock spent on updates."""
        spent = sum(r.seconds[2] for r in self.rounds)
        return spent / self.seconds if self.seconds > 0 else 0.0

    @property
    def updates(self) -> int:
        """Updates of the drafter."""
        return sum(r.updates for r in self.rounds)

    @property
    def repeated_8grams(self) -> float:
        """Share of the generated 8-grams that had occurred before, over all finished turns."""
        return repeated_ngrams(self.token_ids)

    def acceptance(self, low: int = 0, high: int = 1 << 62) -> float | None:
        """Acceptance length of the rounds that begin at these positions; None without any."""
        inside = [r for r in self.rounds if low <= r.position < high]
        return acceptance_length(inside) if inside else None

    def first_difference(self, other: Arm) -> int | None:
        """The first generated token in which two arms differ; None if the texts are the same."""
        mine, theirs = self.token_ids, other.token_ids
        for position, (a, b) in enumerate(zip(mine, theirs, strict=False)):
            if a != b:
                return position
        return None if len(mine) == len(theirs) else min(len(mine), len(theirs))


def write_run(folder: Path, manifest: dict[str, Any], arms: Iterable[Arm]) -> None:
    """Write a run folder."""
    arms = list(arms)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")
    _write_lines(folder / "rounds.jsonl", (row for arm in arms for row in _round_rows(arm)))
    _write_lines(folder / "requests.jsonl", (_turn_row(arm, t) for arm in arms for t in arm.turns))


def read_run(folder: Path) -> tuple[dict[str, Any], list[Arm]]:
    """Read a run folder back.

    Raises:
        DataError: A file is missing or damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        rounds: dict[tuple[str, int, int], list[Round]] = {}
        for row in _read_lines(folder / "rounds.jsonl"):
            key = (row["arm"], row["request"], row["turn"])
            rounds.setdefault(key, []).append(_round(row))
        arms: dict[str, Arm] = {}
        for row in _read_lines(folder / "requests.jsonl"):
            arm = arms.setdefault(row["arm"], Arm(name=row["arm"]))
            arm.turns.append(_turn(row, rounds.get((arm.name, row["request"], row["turn"]), [])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is not a readable run folder: {error!r}.\nIt needs manifest.json, "
            "rounds.jsonl and requests.jsonl as `ttspec demo` writes them."
        ) from error
    return manifest, list(arms.values())


def _round_rows(arm: Arm) -> Iterable[dict[str, Any]]:
    for index, turn in enumerate(arm.turns):
        for number, r in enumerate(turn.result.rounds):
            yield {
                "arm": arm.name,
                "request": turn.request,
                "turn": index,
                "round": number,
                "position": r.position,
                "proposed": r.proposed,
                "accepted": r.accepted,
                "emitted": r.emitted,
                "updates": r.updates,
                "milliseconds": dict(
                    zip(STAGES, (round(1000 * s, 3) for s in r.seconds), strict=True)
                ),
            }


def _round(row: dict[str, Any]) -> Round:
    draft, verify, learn = (row["milliseconds"][stage] / 1000 for stage in STAGES)
    return Round(
        position=row["position"],
        proposed=row["proposed"],
        accepted=row["accepted"],
        emitted=row["emitted"],
        updates=row["updates"],
        seconds=(draft, verify, learn),
    )


def _turn_row(arm: Arm, turn: Turn) -> dict[str, Any]:
    result = turn.result
    return {
        "arm": arm.name,
        "request": turn.request,
        "turn": arm.turns.index(turn),
        "user": turn.user,
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "seconds": turn.seconds,
        "stats": result.stats.to_dict(),
    }


def _turn(row: dict[str, Any], rounds: list[Round]) -> Turn:
    stats = summarise(
        rounds,
        token_ids=row["token_ids"],
        prompt_tokens=row["stats"]["prompt_tokens"],
        seed=row["stats"]["seed"],
        seconds=row["stats"]["seconds"],
        reverts=row["stats"]["reverts"],
    )
    result = Result(
        text=row["text"],
        token_ids=row["token_ids"],
        finish_reason=row["finish_reason"],
        stats=stats,
        rounds=rounds,
    )
    return Turn(request=row["request"], user=row["user"], result=result, seconds=row["seconds"])


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
