"""From tokens to text that is safe to show."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class TextStream:
    """Decodes tokens one by one; holds back half characters and what may become a stop text."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], ends: Sequence[int]
    ) -> None:
        """`ends` are end tokens, which have no text."""
        self._tokenizer, self._stops, self._ends = tokenizer, tuple(stops), set(ends)
        self._ids: list[int] = []
        self._before = 0  # a token's text can depend on those before it: decode from here
        self._decoded = 0  # ids whose text is in `text`
        self._shown = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> bool:
        """Take one token; True when a stop text is complete, which then ends `text`."""
        if token not in self._ends:
            self._ids.append(token)
            self._decode(final=False)
        found = [at for stop in self._stops if (at := self.text.find(stop, self._shown)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return self.stopped

    def take(self, *, final: bool = False) -> str:
        """New text since the last call; with `final` also what was held back."""
        if final and not self.stopped:
            self._decode(final=True)
        safe = len(self.text) if final or self.stopped else len(self.text) - self._held()
        new, self._shown = self.text[self._shown : safe], max(self._shown, safe)
        return new

    def _decode(self, *, final: bool) -> None:
        before = self._string(self._ids[self._before : self._decoded])
        after = self._string(self._ids[self._before :])
        if after.endswith("\ufffd") and not final:
            return  # the rest of the character is still to come
        self.text += after[len(before) :]
        self._before, self._decoded = self._decoded, len(self._ids)

    def _string(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[return-value]

    def _held(self) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        longest = max((len(s) for s in self._stops), default=1) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stops):
                return size
        return 0
