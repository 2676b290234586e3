"""Suites: requests from a data file, as JSON lines."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttspec.decoding.messages import FORMS, Message, decode, request_of, rows_of, text_of_content
from ttspec.errors import DataError

BUILT_IN = Path(__file__).with_name("suites")
Dialogue = list[str] | list[list[Message]] | list[str | list[Message]]
"""What a user says, turn by turn: texts or messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Requests, and what tells these from any others."""

    name: str
    sha256: str
    requests: Sequence[Dialogue]
    parts: dict[str, tuple[int, int]]
    """The first request of each suite that this one is made of, and the one after its last."""


def load_suites(names: str, first: int | None = None) -> Suite:
    """Several suites as one, with commas between their names, or one; see `load_suite`.

    Args:
        names: Built-in names or files.
        first: Only so many requests of each, from its beginning; None is all.

    Raises:
        DataError: See `load_suite`; or a suite is named twice.
    """
    # A file may have a comma in its name.
    listed = [names] if Path(names).is_file() else [n.strip() for n in names.split(",")]
    if len(set(listed)) < len(listed):
        raise DataError(f"--suite {names} names a suite twice.\nName each once.")
    suites = [load_suite(name) for name in listed]
    requests: list[Dialogue] = []
    parts, sums = {}, ""
    for suite in suites:
        chosen = suite.requests[:first]
        parts[suite.name] = len(requests), len(requests) + len(chosen)
        requests += chosen
        sums += f"{suite.sha256} {len(chosen)}\n"
    whole = len(suites) == 1 and len(requests) == len(suites[0].requests)
    return Suite(
        name="+".join(suite.name for suite in suites),
        sha256=suites[0].sha256 if whole else hashlib.sha256(sums.encode()).hexdigest(),
        requests=requests,
        parts=parts,
    )


def load_suite(name: str) -> Suite:
    """A built-in suite by name, or a file of JSON lines.

    A line is {"prompt": text}, {"messages": [{"role", "content"}, ...]}, or {"turns": [text, ...]},
    answered one after the other in one session; or a form of data sets, see `request_of` of
    `decoding/messages.py`. Other fields are notes.

    Raises:
        DataError: There is no such suite, or a line is of none of the forms.
    """
    path = BUILT_IN / f"{name}.jsonl"
    if not path.is_file():
        path = Path(name)
    try:
        data = path.read_bytes()
        text = decode(data)
    except (OSError, ValueError) as error:
        names = ", ".join(sorted(p.stem for p in BUILT_IN.glob("*.jsonl")))
        raise DataError(
            f"{name} is no suite: {getattr(error, 'strerror', None) or error}.\n"
            f"Give a built-in one ({names}) or a UTF-8 file of JSON lines."
        ) from error
    requests = [_request(row, where) for where, row in rows_of(text, name)]
    if not requests:
        raise DataError(f"{name} has no requests.\nWrite one JSON object a line: {FORMS}.")
    return Suite(
        name=path.stem,
        sha256=hashlib.sha256(data).hexdigest(),
        requests=requests,
        parts={path.stem: (0, len(requests))},
    )


def text_of(turn: Any) -> str:
    """A turn as one text, for records: the prompt, or the last message."""
    return turn if isinstance(turn, str) else text_of_content(turn[-1]["content"])


def _request(row: Any, where: str) -> Dialogue:
    turns = request_of(row, where)
    if any(turn is None for turn in turns):
        raise DataError(
            f"{where}: a turn is null, which asks the target to write it; that is for training.\n"
            "Leave it out."
        )
    return turns  # type: ignore[return-value]
