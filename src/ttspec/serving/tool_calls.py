"""Calls of tools apart from the answer, where the target's template marks them as Qwen's do."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from typing import Any

from ttspec.serving.reasoning import before_mark

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolCallParser:
    """Text comes in pieces; text and whole calls go out. What is no call stays text, as it is."""

    def __init__(self, tools: Collection[str]) -> None:
        """Nothing was written yet; `tools` are the names that may be called, none for no calls."""
        self._tools, self._held, self._called = tools, "", False

    def push(self, text: str, *, final: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """What is new: text, and calls as OpenAI has them; with `final` also what was held back."""
        if not self._tools:
            return text, []
        self._held += text
        out, calls = "", list[dict[str, Any]]()
        while self._held:
            if self._called:  # white space behind a call is nobody's
                self._held = self._held.lstrip()
            before, opened, rest = self._held.partition(OPEN)
            if not opened:
                new = before if final else before_mark(before, OPEN)
                out, self._held = out + new, before[len(new) :]
                self._called = self._called and not new
                break
            inside, closed, after = rest.partition(CLOSE)
            if not (closed or final):
                cut = before.rstrip()
                out, self._held = out + cut, self._held[len(cut) :]
                break
            call = self._call(inside)
            calls += [call] if call else []
            out += before.rstrip() if call else before + opened + inside + closed
            self._held, self._called = after, call is not None
        return out, calls

    def _call(self, text: str) -> dict[str, Any] | None:
        """A call of one of the tools; None if it is none."""
        try:
            call = json.loads(text)
        except ValueError:
            return None
        match call:
            case {"name": str(name), "arguments": dict(arguments)} if name in self._tools:
                function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
                return {"id": f"call_{secrets.token_hex(12)}", "type": "function"} | {
                    "function": function
                }
        return None
