"""Small things that every command does at the terminal: follow a stream, sum up, warn."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine
    from ttspec.records import Chunk, Result, Round, Stats

LOW_ACCEPTANCE = 1.2
ENOUGH_ROUNDS, ENOUGH_IN_VAIN = 64, 16
"""With drafts, before they are judged: where some were kept, and where none was."""


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
        parts.append(f"{stats.copied_tokens} copied")
    parts.append(f"{stats.tokens_per_second:.1f} tokens/s")
    if stats.rounds:
        parts.append(f"acceptance length {stats.acceptance_length:.2f}")
    if stats.plain_rounds:
        parts.append(f"no drafts in {stats.plain_rounds} of {stats.rounds} rounds")
    parts.append(f"{stats.updates} updates")
    if stats.reread_tokens:
        parts.append(f"{stats.reread_tokens} tokens read again")
    return " · ".join(parts)


def low_acceptance(rounds: Sequence[Round]) -> str | None:
    """What to tell a user whose drafter hardly helps; None if it does, or too little was seen.

    Only rounds in which the drafter drafted say something of it: not copies, and not the rounds in
    which the policy let it pause.
    """
    from ttspec.records import acceptance_length

    drafted = [r for r in rounds if r.proposed and not r.copied]
    enough = ENOUGH_ROUNDS if any(r.accepted for r in drafted) else ENOUGH_IN_VAIN
    length = acceptance_length(drafted)
    if len(drafted) < enough or length >= LOW_ACCEPTANCE:
        return None
    return (
        f"warning: acceptance length is {length:.2f} over {len(drafted)} rounds with drafts: "
        "the drafter hardly helps.\nRun `ttspec doctor TARGET DRAFTER` to see what was loaded; "
        "--drafter none switches it off."
    )


def note_missing_template(engine: Engine, settings: dict[str, Any]) -> None:
    """Say it where a prompt is fed as it is and nobody asked for that."""
    if not settings.get("raw") and engine.tokenizer.chat_template is None:
        say(
            f"{engine.target.name} has no chat template, so it goes on with the text as it is; "
            "--raw asks for that and drops this line."
        )
