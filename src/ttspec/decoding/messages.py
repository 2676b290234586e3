"""Prompts and conversations in the forms that people and data sets have them in.

One request is a text, or messages as OpenAI's API takes them. A file has one request a line, or is
a JSON list of them. Knows no template and no tokens.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ttspec.errors import DataError

Message = dict[str, Any]
"""Role and content, which is text; other keys, such as `tool_calls`, are for the template."""
Turn = str | list[Message] | None
"""What a user says: a text, messages that end with it, or nothing, which the target then writes."""
ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"} | {
    role: role for role in ROLES
}
"""ShareGPT's names for roles."""
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
FORMS = (
    '{"prompt": text or messages}, {"messages": [{"role", "content"}, ...]}, {"turns": [text, '
    '...]} or {"conversations": [{"from", "value"}, ...]}'
)
"""Of a line, for error messages."""


def as_messages(turn: str | Sequence[Message]) -> list[Message]:
    """A user's text, or messages of the API, with text as content.

    Raises:
        DataError: A message has no such role, or no text.
    """
    if isinstance(turn, str):
        return [{"role": "user", "content": turn}]
    if not turn:
        raise DataError("A prompt is an empty list of messages.\nGive at least the user's.")
    return [_message(value) for value in turn]


def text_of_content(content: Any) -> str:
    """What a message says: a text, or the texts of its parts one after the other.

    Raises:
        DataError: There is a part of another kind, such as an image.
    """
    if content is None:
        return ""
    parts = [content] if isinstance(content, str | dict) else content
    if not isinstance(parts, Sequence):
        raise DataError(f"A message's content is {content!r:.60}; allowed are a text and parts.")
    texts: list[str] = []
    for part in parts:
        match part:
            case str():
                texts.append(part)
            case {"type": "text" | "input_text" | "output_text", "text": str(text)}:
                texts.append(text)
            case _:
                kind = part.get("type") if isinstance(part, dict) else part
                raise DataError(
                    f"A message has a part {kind!r:.60}; a text model reads parts of type text "
                    "only.\nLeave the part out."
                )
    return "".join(texts)


def with_text_arguments(message: Message) -> Message:
    """The message with the arguments of its tool calls as JSON text, as OpenAI has them."""
    calls = []
    for call in message.get("tool_calls", []):
        match call:
            case {"function": {"arguments": dict(arguments)} as function}:
                text = json.dumps(arguments, ensure_ascii=False)
                calls.append({**call, "function": {**function, "arguments": text}})
            case _:
                calls.append(call)
    return {**message, "tool_calls": calls} if calls else message


def read_text(path: Path) -> str:
    """A file's text, in UTF-8, or as its byte-order mark says.

    Raises:
        DataError: It cannot be read, or is no such text.
    """
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.\nGive a text file.") from error
    except ValueError as error:
        raise DataError(f"{path} is no text: {error}.\nGive a file in UTF-8.") from error


def decode(data: bytes) -> str:
    """Text of bytes, without the byte-order mark that they may begin with.

    Raises:
        ValueError: They are no text.
    """
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return data.decode(encoding).removeprefix("\ufeff")
    return data.decode("utf-8")


def rows_of(text: str, where: str) -> Iterator[tuple[str, Any]]:
    """(where, value) of JSON lines, or of a file that is one JSON list.

    Raises:
        DataError: It is no JSON.
    """
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError):
            pass  # lines, of which the first is told to be none
        else:
            for number, row in enumerate(rows, 1):
                yield _place(row, f"{where}, row {number}"), row
            return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is no JSON: {error}.\nOne object a line: {FORMS}.") from error
        yield _place(row, place), row


def _place(row: Any, place: str) -> str:
    """Where a row is, if what it says can be written.

    Raises:
        DataError: It holds half a character, as an escape of JSON may, or is nested too deep.
    """
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise DataError(f"{place} is no text: {error}.\nMend it, or leave it out.") from None
    return place


def request_of(row: Any, where: str) -> list[Turn]:
    """The turns of one row of a file.

    A dialogue that was recorded with its answers (ShareGPT's `conversations`, `messages` beside
    their `prompt` in UltraChat) is its user's turns: the target gives answers of its own.
    `messages` alone are one turn, the last message the user's or an answer to be continued.

    Raises:
        DataError: It is none of the forms.
    """
    given = _fields(row, where)
    try:
        match given:
            case {"turns": [*turns]} if turns and all(t is None or _says(t) for t in turns):
                return turns
            case {"messages": [*messages], "prompt": _}:
                return user_turns(as_messages(messages))
            case {"messages": [*messages]} | {"prompt": [*messages]}:
                found = as_messages(messages)
                asked = any(m["role"] == "user" for m in found)
                if asked and (found[-1]["role"] in ("user", "tool") or _is_begun(found[-1])):
                    return [found]
            case {"conversations": [*messages]}:
                return user_turns(as_messages([_shared(m) for m in messages]))
            case {"prompt": str(prompt)} if prompt.strip():
                return [prompt]
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    found = " and ".join(f"{name} is {value!r:.60}" for name, value in given.items())
    raise DataError(
        f"{where}: {found}, which is no request.\nAllowed: {FORMS}, no text empty, the last "
        "message the user's, a tool's or an answer that is begun."
    )


def user_turns(messages: Sequence[Message]) -> list[Turn]:
    """What others than the assistant say in a recorded dialogue, turn by turn.

    Turns end where a tool answers a call, which the target's own answer may not make.

    Raises:
        DataError: No user says anything.
    """
    turns: list[Turn] = []
    turn: list[Message] = []
    for message in messages:
        role = message["role"]
        if role == "tool":
            break
        if role != "assistant":
            turn.append(message)
        if role == "user":
            turns.append(message["content"] if len(turn) == 1 else turn)
            turn = []
    if not turns:
        raise DataError("no message is a user's.\nGive at least one.")
    return turns


def _fields(row: Any, where: str) -> dict[str, Any]:
    """The fields of a row that say what is asked; `prompt` may stand beside `messages`."""
    names = ("prompt", "messages", "turns", "conversations")
    given = {n: row[n] for n in names if isinstance(row, dict) and row.get(n) is not None}
    if len(given) == 1 or given.keys() == {"prompt", "messages"}:
        return given
    found = " and ".join(given) or f"{row!r:.60}, none of them"
    raise DataError(
        f"{where} has {found}; allowed is an object with exactly one of {', '.join(names)}."
    )


def _message(value: Any) -> Message:
    match value:
        case {"role": str(role)} if role in ROLES and (
            value.get("content") is not None or value.get("tool_calls")
        ):
            message = {**value, "content": text_of_content(value.get("content"))}
            if calls := value.get("tool_calls"):
                if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
                    raise DataError(
                        f"A message's tool_calls are {calls!r:.60}; allowed is a list of objects.\n"
                        "Mend them, or leave them out."
                    )
                message["tool_calls"] = [_call(call) for call in calls]
            return message
    raise DataError(
        f"A message is {value!r:.60}; it has a role ({', '.join(ROLES)}) and a content.\n"
        "Mend it, or leave it out."
    )


def _call(call: Any) -> Any:
    """A tool call whose arguments are an object, as templates write them; OpenAI has a text."""
    match call:
        case {"function": {"arguments": str(text)} as function}:
            try:
                arguments = json.loads(text)
            except ValueError:
                return call
            return {**call, "function": {**function, "arguments": arguments}}
    return call


def _shared(value: Any) -> Message:
    """A message of ShareGPT's form, or of ours."""
    match value:
        case {"from": str(speaker), "value": content} if speaker in _SPEAKERS:
            return {"role": _SPEAKERS[speaker], "content": content}
        case {"role": str(), "content": _}:
            return value
    raise DataError(
        f"a message is {value!r:.60}; it has from ({', '.join(_SPEAKERS)}) and value.\nMend it."
    )


def _says(turn: Any) -> bool:
    return isinstance(turn, str) and bool(turn.strip())


def _is_begun(message: Message) -> bool:
    """Whether an answer is there to be continued."""
    return message["role"] == "assistant" and bool(message["content"])
