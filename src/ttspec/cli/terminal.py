"""Small things that every command does at the terminal: follow a stream, sum up, warn."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttspec.records import Chunk, Result, Stats

LOW_ACCEPTANCE = 1.2
ENOUGH_ROUNDS = 64


def say(message: str) -> None:
    """Print a notice where it does not mix with the answer."""
    print(message, file=sys.stderr, flush=True)


def show_text(chunk: Chunk) -> None:
    """Print a chunk's text at once."""
    if chunk.text:
        print(chunk.text, end="", flush=True)


def to_json(value: Any) -> str:
    """One line of JSON that standard output can encode whole."""
    plain = json.dumps(value, ensure_ascii=False)
    try:
        plain.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return plain


def show_nothing(_: Chunk) -> None:
    """For answers that are printed when they are whole."""


def follow(stream: Iterator[Chunk], show: Callable[[Chunk], None]) -> Result:
    """Show every chunk and return the result.

    Ctrl-C ends the stream, whose last chunk then says "cancelled". If it arrives while a chunk is
    being shown, it is handed to the stream, so that its state stays valid all the same.
    """
    chunk = next(stream)
    while True:
        try:
            show(chunk)
            if chunk.result is not None:
                return chunk.result
            chunk = next(stream)
        except KeyboardInterrupt as interrupt:
            if chunk.result is not None:
                return chunk.result
            chunk = stream.throw(interrupt)  # type: ignore[attr-defined]


def summary(stats: Stats) -> str:
    """One line of figures."""
    parts = [f"{stats.emitted_tokens} tokens"]
    if stats.copied_tokens:
        parts.append(f"{stats.copied_tokens} of them copied")
    parts.append(f"{stats.tokens_per_second:.1f} tokens/s")
    if stats.rounds:
        parts.append(f"acceptance length {stats.acceptance_length:.2f}")
    parts.append(f"{stats.updates} updates")
    if stats.reread_tokens:
        parts.append(f"{stats.reread_tokens} tokens read again")
    return " · ".join(parts)


def low_acceptance(stats: Stats) -> str | None:
    """What to tell a user whose drafter hardly helps; None if it does, or too little was seen."""
    if stats.rounds < ENOUGH_ROUNDS or stats.acceptance_length >= LOW_ACCEPTANCE:
        return None
    return (
        f"warning: acceptance length is {stats.acceptance_length:.2f} over {stats.rounds} rounds: "
        "the drafter hardly helps.\nRun `ttspec doctor TARGET DRAFTER` to see what was loaded; "
        "--drafter none switches it off."
    )
