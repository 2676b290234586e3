"""A conversation as a fresh request would read it: whole, as its template writes it now.

Answers enter as the user saw them. So thoughts that a template leaves out of the history, a stop
text, and end tokens other than the template's own are read by no later turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import cast

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.decoding.messages import Message, as_messages
from ttspec.decoding.template import ChatTemplate, token_ids
from ttspec.errors import DataError

Prompt = str | Sequence[Message] | Sequence[int]


def as_prompts(given: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or a list of them, as a list.

    Raises:
        DataError: It is neither.
    """
    _require_prompt(given)
    if isinstance(given, str) or (given and isinstance(given[0], dict | Integral)):
        return [cast(Prompt, given)]
    return list(cast(Sequence[Prompt], given))


def _require_prompt(given: object) -> None:
    if isinstance(given, bytes | bytearray) or not isinstance(given, Sequence):
        raise DataError(
            f"A prompt is a {type(given).__name__}; allowed are a text, a list of messages and a "
            "list of token ids.\nOf bytes give .decode(), of a tensor or an array .tolist()."
        )


class ChatHistory:
    """Messages and answers so far. Without a template, the tokens so far, which go on."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._messages: list[Message] | None = []
        """None where there are tokens that no template wrote."""
        self._ids: list[int] = []
        """Tokens so far, answers as they were generated."""
        self._asked: tuple[list[Message] | None, list[int]] = [], []

    def ask(self, turn: Prompt) -> list[int]:
        """Tokens of the whole conversation with another turn; it counts once it is answered.

        Args:
            turn: A text of the user's, messages, or tokens, which are read as they are.

        Raises:
            DataError: It is no prompt; messages are not well-formed, or there is no template to
                write them; the prompt has no tokens and the tokenizer has no token to begin with.
            OptionError: The template refuses the system message.
        """
        self._asked = self._with(turn)
        return self._asked[1]

    def answer(self, text: str, ids: Sequence[int]) -> None:
        """Add the answer to what was asked last: as it was shown, and its tokens.

        A turn that was answered by no token was not asked.
        """
        messages, asked = self._asked
        if not ids:
            return
        self._ids = [*asked, *ids]
        if messages and messages[-1]["role"] == "assistant":  # it was continued
            begun = messages[-1]
            messages = [*messages[:-1], {**begun, "content": begun["content"] + text}]
        elif messages is not None:
            messages = [*messages, {"role": "assistant", "content": text}]
        self._messages = messages

    def ask_for_turn(self) -> list[int]:
        """Tokens of the whole conversation, after which the target writes a user turn itself."""
        return self._template.before_user_turn(self._messages or [])

    def _with(self, turn: Prompt) -> tuple[list[Message] | None, list[int]]:
        _require_prompt(turn)
        template, tokenizer = self._template, self._template.tokenizer
        if not isinstance(turn, str) and turn and isinstance(turn[0], Integral):
            return None, [*self._ids, *turn]  # type: ignore[list-item]
        if not template.applies:
            if not isinstance(turn, str):
                raise DataError(
                    "Messages need a chat template, which this tokenizer lacks or --raw switches "
                    "off.\nGive the prompt as one text."
                )
            return None, self._continued(tokenizer, turn)
        new = as_messages(cast(str | Sequence[Message], turn))
        if self._messages is None:
            after = template.after_answer(new)
            written = after[:1] == self._ids[-1:]  # the template may write the last token itself
            return None, [*self._ids, *after[written:]]
        messages = [*self._messages, *new]
        return messages, template.ids(messages)

    def _continued(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        if self._ids:
            return [*self._ids, *token_ids(tokenizer, text)]
        ids = token_ids(tokenizer, text, special=True)
        if not ids and tokenizer.bos_token_id is None:
            raise DataError("The prompt has no tokens, and the tokenizer no token to begin with.")
        return ids or [tokenizer.bos_token_id]  # type: ignore[list-item]
