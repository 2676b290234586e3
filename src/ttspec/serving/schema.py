"""Bodies of requests as OpenAI's clients send them. What is not supported is refused by name.

Null is the same as not given. What a server may ignore without changing an answer is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Len
from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from ttspec.serving.options import MAX_CHOICES, MAX_LOGPROBS, MAX_MESSAGES, MAX_STOPS, MAX_TOOLS

IGNORED = (
    *("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "service_tier", "store", "prediction"),
)
"""Change no answer here."""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "prompt_logprobs": (0,),
    "add_special_tokens": (),
    "priority": (0,),
    "n_probs": (0,),
}
"""Known to OpenAI or vLLM and not supported here, and the values that ask for nothing."""
TokenKey = Annotated[int, Field(strict=False)]
"""A token as JSON has it where it is a key: text."""
Bias = Annotated[float, Ge(-100), Le(100)]


class Strict(BaseModel):
    """A text is no number, and an unknown name is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class Part(Strict):
    """A part of a message; a text model reads texts only."""

    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    """What a tool is called with; arguments are JSON text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: str = ""
    index: int | None = Field(None, exclude=True)
    """Streams have it, and clients send it back."""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Len(1)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_clients_send_back(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        empty = ("annotations", "audio", "function_call", "refusal")
        return {n: v for n, v in given.items() if not (n in empty and v in (None, [], ""))}


class Function(Strict):
    """A tool's name and what it takes, as a JSON schema."""

    name: Annotated[str, Len(1, 64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the template tells the target of."""

    type: Literal["function"]
    function: Function


class JsonSchema(Strict):
    """A schema that the answer keeps to."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _require_a_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is for type json_schema, and needed there")
        return self


class StreamOptions(Strict):
    """What a stream tells besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class TemplateOptions(Strict):
    """How the template's switch for thinking is set."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


class Sampled(Strict):
    """What both kinds of requests may say. None leaves it to the target's own defaults."""

    model: str | None = None
    max_tokens: Annotated[int, Ge(1)] | None = None
    temperature: Annotated[float, Ge(0), Le(2)] | None = None
    top_p: Annotated[float, Ge(0), Le(1)] | None = None
    top_k: Annotated[int, Ge(-1)] | None = None
    min_p: Annotated[float, Ge(0), Le(1)] | None = None
    presence_penalty: Annotated[float, Ge(-2), Le(2)] | None = None
    frequency_penalty: Annotated[float, Ge(-2), Le(2)] | None = None
    repetition_penalty: Annotated[float, Le(10)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Len(0, 1024)] | None = None
    n: Annotated[int, Ge(1), Le(MAX_CHOICES)] = 1
    stop: str | Annotated[list[str], Len(0, MAX_STOPS)] | None = None
    seed: Annotated[int, Ge(-(2**63)), Le(2**63 - 1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Ge(0)] | None = None
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if name in IGNORED or (name in UNSUPPORTED and value in (None, *UNSUPPORTED[name])):
                continue
            if name in UNSUPPORTED:
                raise ValueError(f"{name} is not supported by this server; leave it out")
            kept[name] = value
        return kept

    @model_validator(mode="after")
    def _require_a_stream(self) -> Sampled:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is for requests with stream true; leave it out")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Likely tokens to tell of beside each token of an answer; None tells nothing at all."""
        raise NotImplementedError

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(Sampled):
    """Body of /v1/chat/completions."""

    logprobs: bool | None = None
    top_logprobs: Annotated[int, Ge(0), Le(MAX_LOGPROBS)] | None = None

    messages: Annotated[list[Message], Len(1, MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Ge(1)] | None = None
    tools: Annotated[list[Tool], Len(0, MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: TemplateOptions | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _require_what_is_done(self) -> ChatRequest:
        continues = self.messages[-1].role == "assistant"
        done = {"continue_final_message": continues, "add_generation_prompt": not continues}
        for name, value in done.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(
                    f"{name} must be {str(value).lower()} here: a last message of the assistant is "
                    "continued, any other is answered"
                )
        return self

    @model_validator(mode="after")
    def _require_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is for requests with logprobs true; leave it out")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """See `Sampled.num_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampled):
    """Body of /v1/completions."""

    logprobs: Annotated[int, Ge(0), Le(MAX_LOGPROBS)] | None = None

    prompt: (
        str
        | Annotated[list[str], Len(1, MAX_CHOICES)]
        | Annotated[list[Annotated[StrictInt, Ge(0)]], Len(1)]
        | Annotated[list[Annotated[list[Annotated[StrictInt, Ge(0)]], Len(1)]], Len(1, MAX_CHOICES)]
    )

    @property
    def num_logprobs(self) -> int | None:
        """See `Sampled.num_logprobs`."""
        return self.logprobs
