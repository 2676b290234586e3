"""From a request's body to the tokens of its prompts. Runs beside the event loop, in one thread.

Its tokenizer is a copy: the engine's thread decodes with its own at the same time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ttspec.decoding.engine import Engine
from ttspec.decoding.history import ChatHistory
from ttspec.decoding.messages import as_messages
from ttspec.decoding.template import ChatTemplate, thinking_of, token_ids
from ttspec.errors import TtspecError
from ttspec.serving import tool_calls
from ttspec.serving.errors import bad_request
from ttspec.serving.reasoning import CLOSE, OPEN
from ttspec.serving.schema import ChatRequest, CompletionRequest, Sampled

if TYPE_CHECKING:
    from ttspec.serving.grammar import GrammarMask, Grammars


@dataclass(frozen=True, slots=True)
class RenderedPrompts:
    """Prompts as tokens, and what answers to them look like."""

    prompts: list[list[int]]
    thinking: bool | None = None
    """As `thinking_of`."""
    marks_reasoning: bool = False
    begins_in_reasoning: bool = False
    mask: GrammarMask | None = None
    """What answers may be made of."""
    tools: frozenset[str] = frozenset()
    """Names that answers may call, where the template marks calls."""
    bytes_of: Callable[[int], bytes] | None = None
    """What a token stands for, where log-probabilities are asked for."""


class PromptRenderer:
    """Writes prompts for one target."""

    def __init__(self, engine: Engine) -> None:
        """Take a copy of the engine's tokenizer."""
        self._tokenizer: Any = copy.deepcopy(engine.tokenizer)
        self._vocabulary = int(engine.target.config.vocab_size)
        self._templates: dict[bool | None, tuple[ChatTemplate, bool | None]] = {}
        self._ends = engine.target.ends
        template = str(self._tokenizer.chat_template or "")
        self._marks_reasoning, self._marks_calls = CLOSE in template, tool_calls.CLOSE in template

    def chat(self, body: ChatRequest) -> RenderedPrompts:
        """The prompt that the template writes.

        Raises:
            ApiError: It cannot, or would leave something out.
        """
        if self._tokenizer.chat_template is None:
            raise bad_request("This target has no chat template. Use /v1/completions.", "messages")
        messages = [m.model_dump(exclude_none=True) for m in body.messages]
        tools = [] if body.tool_choice == "none" else body.tools or []
        given = [tool.model_dump(exclude_none=True) for tool in tools]
        try:
            template, thinking = self._template(body)
            if given:
                text = self._with_tools(template, messages, given)
                ids = token_ids(self._tokenizer, text)
            else:
                ids = ChatHistory(template).ask(messages)
        except TtspecError as error:
            raise bad_request(str(error), "messages") from error
        end = self._tokenizer.decode(ids[-8:]).rstrip() if self._marks_reasoning else ""
        begun = end.endswith(OPEN)
        mask = self._mask(body, in_reasoning=begun)
        names = frozenset(tool.function.name for tool in tools if self._marks_calls)
        return RenderedPrompts(
            [ids], thinking, self._marks_reasoning, begun, mask, names, self._bytes_of(body)
        )

    def completion(self, body: CompletionRequest) -> RenderedPrompts:
        """The prompts as they are.

        Raises:
            ApiError: One is no text, has no token, or tokens that the target does not have.
        """
        given = body.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
        return RenderedPrompts(
            [self._ids(prompt) for prompt in given], bytes_of=self._bytes_of(body)
        )

    def _bytes_of(self, body: Sampled) -> Callable[[int], bytes] | None:
        return None if body.num_logprobs is None else self._grammars.bytes_of

    def _mask(self, body: ChatRequest, *, in_reasoning: bool) -> GrammarMask | None:
        form, after = body.response_format, None
        if form is None or form.type == "text":
            return None
        if in_reasoning:
            after = self._tokenizer.convert_tokens_to_ids(CLOSE)
            if after is None or self._tokenizer.convert_ids_to_tokens(after) != CLOSE:
                raise bad_request(
                    f"This target thinks first, and has no token {CLOSE} after which an answer "
                    "could be masked. Switch thinking off.",
                    "response_format",
                )
        return self._grammars.mask(form, after)

    @cached_property
    def _grammars(self) -> Grammars:
        from ttspec.serving.grammar import Grammars

        return Grammars(self._tokenizer, self._vocabulary, self._ends)

    def _template(self, body: ChatRequest) -> tuple[ChatTemplate, bool | None]:
        asked = None
        if options := body.chat_template_kwargs:
            asked = options.thinking if options.enable_thinking is None else options.enable_thinking
        if asked not in self._templates:
            thinking = thinking_of(self._tokenizer, asked)
            self._templates[asked] = ChatTemplate(self._tokenizer, thinking=asked), thinking
        return self._templates[asked]

    @staticmethod
    def _with_tools(template: ChatTemplate, messages: list[Any], tools: list[Any]) -> str:
        text = template.render(as_messages(messages), tools=tools)
        if text == template.render(as_messages(messages)):
            raise bad_request("This target's chat template has no place for tools.", "tools")
        return text

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            try:
                ids = token_ids(self._tokenizer, prompt, special=True)
            except TtspecError as error:
                raise bad_request(str(error), "prompt") from error
            first = self._tokenizer.bos_token_id
            if not ids and first is None:
                raise bad_request(
                    "The prompt has no tokens. Give at least one character.", "prompt"
                )
            return ids or [first]
        if worst := [token for token in prompt if token >= self._vocabulary]:
            raise bad_request(
                f"The prompt has token {worst[0]}; allowed are 0 to {self._vocabulary - 1}.",
                "prompt",
            )
        return list(prompt)
