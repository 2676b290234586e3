"""What a target's chat template writes. A template is a program of others: it may refuse anything.

Its errors become ours, and what it would leave out of a conversation without a word is noticed: it
is shown a marker in each role, as text and as a list of parts, and gets messages as it reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from typing import Any, Literal, cast

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.decoding.messages import Message, with_text_arguments
from ttspec.errors import DataError, OptionError

SWITCHES = ("enable_thinking", "thinking")
"""What templates call the switch: Qwen3 and SmolLM3 the first, Granite and DeepSeek the second."""
_MARKER = "\u2402ttspec\u2403"
"""Stands for what somebody says."""
_USER: Message = {"role": "user", "content": "-"}
_CALL = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": {}}}
_AROUND: dict[str, tuple[list[Message], list[Message]]] = {
    "user": ([], []),
    "system": ([], [_USER]),
    "developer": ([], [_USER]),
    "assistant": ([_USER], [_USER]),
    "tool": ([_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}], []),
}
"""Messages before and after one of each role that templates expect."""
Form = Literal["text", "parts", "left out", "unknown"]
"""How a template reads what a message of a role says; unknown where it refused every try."""
FORMS: tuple[Form, ...] = ("text", "parts")


class ChatTemplate:
    """A tokenizer's template with its options, or the lack of one."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        raw: bool = False,
        thinking: bool | None = None,
    ) -> None:
        """Render nothing yet, of the tokenizer's template if it has one, or without it (`raw`).

        `system` is a system message to begin with, `thinking` says how its switch is set; None
        leaves either to the template.

        Raises:
            OptionError: There is a system message and no template to write it.
        """
        self.tokenizer, self.thinking = tokenizer, thinking
        self.applies = not raw and tokenizer.chat_template is not None
        if system is not None and not self.applies:
            reason = "--raw switches it off" if raw else "this target has none"
            raise OptionError(
                f"A system message was given, which a chat template would write; {reason}.\n"
                "Leave it out, or say it in the prompt."
            )
        self._opening: list[Message] = []
        if system is not None:
            self._opening = [{"role": "system", "content": system}]
        self._forms: dict[str, Form] = {}

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a whole conversation, up to where the target answers; see `render`."""
        return token_ids(self.tokenizer, self.render(messages))

    def render(
        self,
        messages: Sequence[Message],
        *,
        reply: bool = True,
        tools: Sequence[dict[str, Any]] = (),
    ) -> str:
        """What the template writes, up to where the target answers.

        Messages have text as content; a last one of the assistant is to be continued. Without
        `reply` what follows the last message is left out. `tools` is what the target may call, as
        OpenAI's API has them.

        Raises:
            OptionError: The template refuses the system message, or leaves it out.
            DataError: It cannot write the conversation, or leaves a message out.
        """
        whole = [*self._opening, *messages]
        for role in {m["role"]: None for m in whole}:
            self._require(role)
        shaped = [self._shaped(message) for message in whole]
        proceed = reply and whole[-1]["role"] == "assistant"
        how: dict[str, Any] = {"reply": reply and not proceed, "proceed": proceed}
        how["tools"] = list(tools) or None
        try:
            return self._apply(shaped, **how)
        except Exception as error:  # a program of others may raise whatever there is
            if any("tool_calls" in m for m in shaped):  # most want an object, some a text
                with suppress(Exception):
                    return self._apply([with_text_arguments(m) for m in shaped], **how)
            raise self._explained(error, shaped) from error

    def before_user_turn(self, messages: Sequence[Message]) -> list[int]:
        """Tokens after which the target writes a user turn itself."""
        text = self.render([*messages, {"role": "user", "content": _MARKER}], reply=False)
        return token_ids(self.tokenizer, text[: text.rindex(_MARKER)])

    def after_answer(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of what the template writes after an answer, for one that it did not write."""
        turn = [_USER, {"role": "assistant", "content": _MARKER}, *messages]
        text = self.render(turn)
        if _MARKER not in text:
            raise DataError(
                "The target's chat template leaves answers out, and the conversation began with "
                "tokens, which it did not write.\nBegin it with a text or with messages."
            )
        return token_ids(self.tokenizer, text[text.rindex(_MARKER) + len(_MARKER) :])

    def thinks(self) -> bool | None:
        """See `thinking_of`."""
        if not self.applies:
            return None
        shaped = [self._shaped(m) for m in [*self._opening, _USER]]
        try:
            on, off, default = (
                self._apply(shaped, reply=True, thinking=value) for value in (True, False, None)
            )
        except Exception:  # who needs the template is told why
            return None
        if on == off:
            return None
        return {on: True, off: False}.get(default) if self.thinking is None else self.thinking

    def _apply(
        self,
        messages: list[Message],
        *,
        reply: bool,
        proceed: bool = False,
        thinking: bool | Literal["as asked"] | None = "as asked",
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        value = self.thinking if thinking == "as asked" else thinking
        switches: dict[str, Any] = {} if value is None else dict.fromkeys(SWITCHES, value)
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,  # type: ignore[arg-type]
            tokenize=False,
            add_generation_prompt=reply,
            continue_final_message=proceed,
            **switches,
        )
        return cast(str, text)

    def _form(self, role: str) -> Form:
        """How messages of a role are given, found out once."""
        if role not in self._forms:
            self._forms[role] = self._find_form(role)
        return self._forms[role]

    def _find_form(self, role: str) -> Form:
        before, after = _AROUND.get(role, ([], [_USER]))
        form: Form = "unknown"
        # Some templates do not begin without a system message.
        for first in ([], [{"role": "system", "content": "-"}]):
            for others, tried in product(FORMS, FORMS):
                marked = _given({"role": role, "content": _MARKER}, tried)
                around = [[_given(m, others) for m in part] for part in ([*first, *before], after)]
                probe = [*around[0], marked, *around[1]]
                try:
                    text = self._apply(probe, reply=role != "assistant")
                except Exception:  # another form may do; if none, it says why later
                    continue
                if _MARKER in text:
                    return tried
                form = "left out"
            if role == "system":
                break
        return form

    def _require(self, role: str) -> None:
        """Refuse messages that the template would leave out without a word."""
        # Of an answer, all may be thoughts; a developer's may be the system's by another name.
        if role in ("assistant", "developer") or self._form(role) != "left out":
            return
        given = f"The target's chat template leaves out what messages of role {role} say."
        if role == "system":
            raise OptionError(f"{given}\nLeave the system message out, or say it in the prompt.")
        advice = "Use --raw" if role == "user" else "Leave them out, or use --raw"
        raise DataError(f"{given}\n{advice}, which does without the template.")

    def _shaped(self, message: Message) -> Message:
        """A message as the template reads it."""
        role = message["role"]
        form = self._form(role)
        if role == "developer" and form not in FORMS:
            role, form = "system", self._form("system")
            message = {**message, "role": role}
            self._require(role)
        return _given(message, form if form in FORMS else self._form("user"))

    def _explained(self, error: Exception, messages: list[Message]) -> OptionError | DataError:
        """Why the template failed, in our words: was it the system message?"""
        others = [m for m in messages if m["role"] != "system"]
        if len(others) < len(messages):
            try:
                proceed = others[-1]["role"] == "assistant"
                self._apply(others, reply=not proceed, proceed=proceed)
            except Exception:  # it is something else, then
                pass
            else:
                return OptionError(
                    "A system message was given where the target's chat template refuses one: "
                    f"{_reason(error)}.\nLeave it out, or say it in the prompt."
                )
        roles = ", ".join(m["role"] for m in messages[:8]) + (", ..." if len(messages) > 8 else "")
        return DataError(
            f"The target's chat template cannot write messages of {roles}: {_reason(error)}.\n"
            "Give messages that it takes, or a text with --raw, which does without the template."
        )


def thinking_of(
    tokenizer: PreTrainedTokenizerBase,
    asked: bool | None = None,
    *,
    system: str | None = None,
    raw: bool = False,
) -> bool | None:
    """Whether prompts ask the target to think: what was asked, or the template's own default.

    None where no switch changes a prompt, which says nothing about what the target then does. The
    `system` message can settle it too: /no_think in SmolLM3's. `raw`: no template is used.

    Raises:
        OptionError: It was asked, and there is no switch.
    """
    thinks = ChatTemplate(tokenizer, system=system, raw=raw, thinking=asked).thinks()
    if thinks is None and asked is not None:
        raise OptionError(
            f"thinking is {asked}, but the target's chat template has no switch for it "
            f"({' or '.join(SWITCHES)}), or the system message settles it.\n"
            "Leave it out, or say it in the prompt."
        )
    return thinks


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """Tokens of a text, with the tokenizer's own first ones if `special`.

    Raises:
        DataError: The text holds what is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"The prompt holds {text[error.start]!r}, which is no character (half of a pair, or a "
            "byte that was no text).\nGive the prompt as UTF-8."
        ) from error
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])  # type: ignore[arg-type]


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _given(message: Message, form: Form) -> Message:
    return {**message, "content": _parts(message["content"])} if form == "parts" else message


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text[:200] or type(error).__name__
