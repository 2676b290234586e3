"""From tokens to text that is safe to show, for a `Conversation` that streams."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token that is one byte of a character: such decoders read a whole run of them, or none."""
_CLEANED = 4
"""The longest end of a text that transformers' cleaning of spaces may still change, as " n't"."""
_TO_CLEAN = "a . b ? c ! d , e ' f n't g 'm h 's i 've j 're"
"""All that it changes."""


class TextStream:
    """Decodes tokens one by one; its text is what they decode to together.

    Holds back half characters and what may become a stop text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], ends: Sequence[int]
    ) -> None:
        """`ends` are end tokens, which have no text."""
        self._tokenizer, self._stops, self._ends = tokenizer, tuple(stops), set(ends)
        # What is cleaned may change what was decoded before: then all is decoded, every time.
        self._cleans = _cleans(tokenizer)
        self._ids: list[int] = []
        self._before = 0  # a token's text can depend on those before it: decode from here
        self._decoded = 0  # ids whose text is in `text`
        self._shown = 0
        self._in_bytes = False
        byte = tokenizer.convert_tokens_to_ids("<0x0A>")  # an unknown token's, if there is none
        self._has_bytes = byte is not None and tokenizer.convert_ids_to_tokens(byte) == "<0x0A>"
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> bool:
        """Take one token; True when a stop text is complete, which then ends `text`."""
        if token not in self._ends:
            self._ids.append(token)
            if self._has_bytes:
                self._follow_bytes(token)
            self._decode(final=False)
        return self._find_stop()

    def end(self) -> bool:
        """No token follows: add what was held back; True when a stop text is complete in it."""
        if not self.stopped:
            self._decode(final=True)
        return self._find_stop()

    def peek(self, *, final: bool = False) -> str:
        """New text since the last `skip`; with `final` also what was held back."""
        if final:
            self.end()
        held = 0 if final or self.stopped else begun_mark(self.text, self._stops)
        return self.text[self._shown : len(self.text) - held]

    def anew(self, tokens: Sequence[int]) -> TextStream:
        """The stream of these tokens, of whose text as much was taken."""
        other = TextStream(self._tokenizer, self._stops, tuple(self._ends))
        other._shown = self._shown
        for token in tokens:
            other.push(token)
        return other

    def skip(self, characters: int) -> None:
        """Count so many characters more as taken."""
        self._shown += characters

    def _find_stop(self) -> bool:
        """Whether a stop text is complete; the first one ends `text`."""
        found = [at for stop in self._stops if (at := self.text.find(stop, self._shown)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return self.stopped

    def _decode(self, *, final: bool) -> None:
        if self._in_bytes and not final:
            return
        before = self._string(self._ids[self._before : self._decoded])
        after = self._string(self._ids[self._before :])
        if after.endswith("\ufffd") and not final:
            return  # the rest of the character is still to come
        if self._cleans:
            self.text = after if final else after[: max(len(after) - _CLEANED, len(self.text))]
            return
        self.text += after[len(before) :]
        # Many decoders take a space off the first text: what is decoded from must have some.
        if len(after) > len(before):
            self._before = self._decoded
        self._decoded = len(self._ids)

    def _follow_bytes(self, token: int) -> None:
        """Note whether a token is one byte, and so its text depends on the next one."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(name, str) and _BYTE.fullmatch(name):
            self._in_bytes = True
        elif self._in_bytes:  # special tokens, which have no text, do not end a run
            self._in_bytes = not self._string([token])

    def _string(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[return-value]


def _cleans(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether spaces are cleaned; Llama 3's tokenizer says so, and no text of BPE is."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    ids = tokenizer(_TO_CLEAN, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def begun_mark(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of a text that begins one of some marks, and may become it."""
    longest = max(map(len, marks), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(mark.startswith(text[-n:]) for mark in marks)), 0)
