"""From tokens to text that is safe to show, and from a conversation to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.errors import DataError, OptionError

Message = dict[str, str]
SWITCHES = ("enable_thinking", "thinking")
"""What templates call the switch: Qwen3 and SmolLM3 the first, Granite and DeepSeek the second."""
_ANSWER = "\u2402ttspec\u2403"
"""Stands for the answer when a template is asked what follows one."""


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


def thinking_of(
    tokenizer: PreTrainedTokenizerBase,
    asked: bool | None = None,
    *,
    system: str | None = None,
    raw: bool = False,
) -> bool | None:
    """Whether prompts ask the target to think: what was asked, or the template's own default.

    Args:
        tokenizer: Has the template.
        asked: The option.
        system: The system message, which can settle it too: /no_think in SmolLM3's.
        raw: No template is used.

    Returns:
        None where no switch changes a prompt, which says nothing about what the target then does.

    Raises:
        OptionError: It was asked, and there is no switch.
    """
    on, off, default = None, None, None
    if tokenizer.chat_template is not None and not raw:
        turn = _opened("-", system)
        on, off, default = (_written(tokenizer, turn, value) for value in (True, False, None))
    if on == off and asked is not None:
        raise OptionError(
            f"thinking is {asked}, but the target's chat template has no switch for it "
            f"({' or '.join(SWITCHES)}), or the system message settles it.\n"
            "Leave it out, or say it in the prompt."
        )
    if on == off or asked is not None:
        return asked
    return {on: True, off: False}.get(default)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message] | Sequence[int],
    *,
    system: str | None = None,
    raw: bool = False,
    thinking: bool | None = None,
) -> list[int]:
    """Tokens of a prompt: a text, a list of messages, or tokens already.

    Raises:
        DataError: The prompt has no tokens and the tokenizer has no token to begin with.
    """
    if not isinstance(prompt, str) and prompt and isinstance(prompt[0], int):
        return list(prompt)  # type: ignore[arg-type]
    if raw or tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise DataError(
                "Messages need a chat template, which this tokenizer lacks or --raw switches off.\n"
                "Give the prompt as one text."
            )
        ids = list(tokenizer(prompt)["input_ids"])  # type: ignore[arg-type]
        if not ids and tokenizer.bos_token_id is None:
            raise DataError("The prompt has no tokens, and the tokenizer no token to begin with.")
        return ids or [tokenizer.bos_token_id]  # type: ignore[list-item]
    messages = _opened(cast("str | Sequence[Message]", prompt), system)
    return _ids(tokenizer, _written(tokenizer, messages, thinking))


def next_turn_ids(
    tokenizer: PreTrainedTokenizerBase,
    user: str,
    pending: int,
    *,
    raw: bool = False,
    thinking: bool | None = None,
) -> list[int]:
    """Tokens to feed for the next turn of a session, the pending token first.

    What was generated stays as it is, thoughts too, which some templates would leave out of the
    history: only what the template writes after an answer is new.
    """
    if raw or tokenizer.chat_template is None:
        return [pending, *_ids(tokenizer, user)]
    turn = [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": user},
    ]
    text = _written(tokenizer, turn, thinking)
    return _after(pending, _ids(tokenizer, text[text.rindex(_ANSWER) + len(_ANSWER) :]))


def written_turn_ids(tokenizer: PreTrainedTokenizerBase, pending: int | None) -> list[int]:
    """Tokens after which the target writes a user turn itself; no `pending` begins a dialogue."""
    mark = [{"role": "user", "content": _ANSWER}]
    if pending is None:
        text: str = tokenizer.apply_chat_template(mark, tokenize=False)  # type: ignore[assignment]
        return _ids(tokenizer, text[: text.rindex(_ANSWER)])
    talk = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _ANSWER}, *mark]
    text = tokenizer.apply_chat_template(talk, tokenize=False)  # type: ignore[assignment]
    between = text[text.index(_ANSWER) + len(_ANSWER) : text.rindex(_ANSWER)]
    return _after(pending, _ids(tokenizer, between))


def answer_ids(tokenizer: PreTrainedTokenizerBase, pending: int) -> list[int]:
    """Tokens to feed after a user turn that the target wrote, for it to answer."""
    mark = [{"role": "user", "content": _ANSWER}]
    text = _written(tokenizer, mark, None)
    return _after(pending, _ids(tokenizer, text[text.rindex(_ANSWER) + len(_ANSWER) :]))


def _opened(prompt: str | Sequence[Message], system: str | None) -> list[Message]:
    """The messages of a first turn."""
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*([] if system is None else [{"role": "system", "content": system}]), *given]


def _written(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool | None
) -> str:
    """What the template writes, up to where the target answers."""
    switches: dict[str, Any] = {} if thinking is None else dict.fromkeys(SWITCHES, thinking)
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, **switches
    )
    return cast(str, text)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def _after(pending: int, ids: list[int]) -> list[int]:
    """Tokens to feed: the pending one, which a template may write itself, and the rest."""
    return ids if ids[:1] == [pending] else [pending, *ids]
