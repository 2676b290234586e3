"""Thoughts apart from the answer, where the target's template marks them."""

from __future__ import annotations

from ttspec.decoding.text import begun_mark

OPEN, CLOSE = "<think>", "</think>"


class ReasoningParser:
    """Text comes in pieces; thoughts and answer go out, white space around them left out."""

    def __init__(self, *, marks: bool, begun: bool) -> None:
        """Nothing was written yet.

        Args:
            marks: The template knows thoughts; without it all text is answer, as it is.
            begun: The prompt ends inside a thought.
        """
        self._marks = marks
        self._stage = "open" if begun else "start"
        self._held = ""

    def push(self, text: str, *, final: bool = False) -> tuple[str, str]:
        """(thoughts, answer) that are new; with `final` also what was held back."""
        if not self._marks:
            return "", text
        self._held += text
        thoughts = ""
        if self._stage == "start":
            begun = self._held.lstrip()
            if begun.startswith(OPEN):
                self._stage, self._held = "open", begun.removeprefix(OPEN)
            elif final or not OPEN.startswith(begun):
                self._stage = "answer"
        if self._stage == "open":
            self._held = self._held.lstrip()
            if self._held:
                self._stage = "thought"
        if self._stage == "thought":
            thoughts, closed, rest = self._held.partition(CLOSE)
            if closed:
                self._stage, self._held = "gap", rest
                thoughts = thoughts.rstrip()
            else:
                thoughts = thoughts.rstrip() if final else before_mark(thoughts, CLOSE)
                self._held = self._held[len(thoughts) :]
        if self._stage == "gap":
            self._held = self._held.lstrip()
            if self._held:
                self._stage = "answer"
        answer = ""
        if self._stage == "answer":
            answer, self._held = self._held, ""
        return thoughts, answer


def before_mark(text: str, mark: str) -> str:
    """Without an end that may be the beginning of a mark, or white space before it."""
    return text[: len(text) - begun_mark(text, (mark,))].rstrip()
