"""What several arms did on the same requests. Knows no model, no files, and draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ttspec.records import Result, Round, acceptance_length, repeated_8grams

Unit = tuple[int, int]
"""A request and a seed: what arms are compared on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One finished answer within a request."""

    request: int
    user: str
    result: Result
    seconds: float
    """Wall clock inside the engine; showing the text is not counted."""
    turn: int = 0
    """Its number within the unit."""
    first_token: float = 0.0
    """Seconds until the first token."""
    waits: list[float] = field(default_factory=list)
    """Seconds until each round's tokens came, counted from those before."""
    began: float | None = None
    """When its batch began, by the calendar clock (s): rows side by side have this in common."""
    peak_memory: int | None = None
    """Bytes on the device at most, where it counts them."""

    @property
    def unit(self) -> Unit:
        """What it is compared on."""
        return self.request, self.result.stats.seed

    def order(self) -> tuple[int, int, int]:
        """A key to sort by: request, seed, turn."""
        return *self.unit, self.turn


def token_ids(turns: Sequence[Turn]) -> list[int]:
    """Generated tokens of turns, end tokens included."""
    return [token for turn in turns for token in turn.result.token_ids]


def units_of(turns: Sequence[Turn]) -> dict[Unit, list[Turn]]:
    """Turns by what they are compared on."""
    units: dict[Unit, list[Turn]] = {}
    for turn in turns:
        units.setdefault(turn.unit, []).append(turn)
    return units


@dataclass(kw_only=True)
class Arm:
    """One way of decoding, and all that it has generated so far."""

    name: str
    turns: list[Turn] = field(default_factory=list)

    def finish(
        self, user: str, result: Result, waits: Sequence[float], request: int = 0, **clock: Any
    ) -> None:
        """Add an answer.

        Args:
            user: What was said.
            result: The answer.
            waits: Seconds until each of its chunks, counted from the one before.
            request: Which one.
            **clock: Further fields of the `Turn`.
        """
        first, *rest = waits
        unit = request, result.stats.seed
        turn = Turn(
            request=request,
            user=user,
            result=result,
            seconds=sum(waits),
            turn=sum(t.unit == unit for t in self.turns),
            first_token=first,
            waits=rest,
            **clock,
        )
        self.turns.append(turn)

    @property
    def kind(self) -> str:
        """Its name without folder and options."""
        return self.name.rpartition(": ")[2].partition("[")[0]

    @property
    def folder(self) -> str:
        """Where it is from, if several run folders are reported on together; else nothing."""
        return self.name.rpartition(": ")[0]

    @property
    def units(self) -> dict[Unit, list[Turn]]:
        """The turns by what they are compared on."""
        return units_of(self.turns)

    @property
    def rounds(self) -> list[Round]:
        """All rounds in order."""
        return [r for turn in self.turns for r in turn.result.rounds]

    @property
    def token_ids(self) -> list[int]:
        """Generated tokens, end tokens included."""
        return token_ids(self.turns)

    @property
    def tokens(self) -> int:
        """How many generated tokens."""
        return sum(len(turn.result.token_ids) for turn in self.turns)

    @property
    def seconds(self) -> float:
        """Wall clock inside the engine."""
        return sum(turn.seconds for turn in self.turns)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over wall clock, prefills and updates included."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def learning_share(self) -> float:
        """Share of the wall clock spent on updates; none where none was made."""
        spent = sum(r.seconds[2] for r in self.rounds) if self.updates else 0.0
        return spent / self.seconds if self.seconds > 0 else 0.0

    @property
    def updates(self) -> int:
        """Updates of the drafter."""
        return sum(r.updates for r in self.rounds)

    @property
    def copied_tokens(self) -> int:
        """Tokens that were copied from the text so far, and kept."""
        return sum(r.accepted for r in self.rounds if r.copied)

    @property
    def repeated_8grams(self) -> float:
        """Share of the generated 8-grams that had occurred before in their unit; the mean."""
        texts = [token_ids(turns) for turns in self.units.values()]
        return sum(map(repeated_8grams, texts)) / len(texts) if texts else 0.0

    def acceptance(self, low: int = 0, high: int = 1 << 62) -> float | None:
        """Acceptance length of the rounds that begin at these positions; None without any."""
        inside = [r for r in self.rounds if low <= r.position < high]
        return acceptance_length(inside) if inside else None

    def first_difference(self, other: Arm) -> int | None:
        """The first generated token in which two arms differ; None if the texts are the same."""
        return first_difference(self.token_ids, other.token_ids)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place where two texts differ; None where they are the same."""
    if a == b:
        return None
    places = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(places, min(len(a), len(b)))
