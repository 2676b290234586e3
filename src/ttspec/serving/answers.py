"""One request's answers: whole, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ttspec.records import Chunk, Result, Round, TokenLogprobs, acceptance_length
from ttspec.serving import logprobs, usage
from ttspec.serving.errors import ApiError
from ttspec.serving.jobs import Event, Job
from ttspec.serving.logs import log
from ttspec.serving.prompts import RenderedPrompts
from ttspec.serving.reasoning import ReasoningParser
from ttspec.serving.schema import ChatRequest, Sampled
from ttspec.serving.tool_calls import ToolCallParser
from ttspec.serving.worker import Worker


@dataclass(eq=False)
class Choice:
    """One answer so far."""

    job: Job
    reasoning_parser: ReasoningParser
    tool_parser: ToolCallParser
    calls: list[dict[str, Any]] = field(default_factory=list)
    """Tools that it calls."""
    reasoning: str = ""
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the tokens, where they are asked for."""
    offset: int = 0
    """Characters of the tokens whose log-probabilities were told."""
    rounds: list[Round] = field(default_factory=list)
    result: Result | None = None


@dataclass(eq=False)
class Answers:
    """The answers of one request, which its jobs write."""

    body: Sampled
    worker: Worker
    model: str
    request_id: str
    rendered: RenderedPrompts
    jobs: list[Job]
    events: asyncio.Queue[Event]
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.is_chat, self.failed = isinstance(self.body, ChatRequest), False
        self.choices = [
            Choice(
                job,
                ReasoningParser(
                    marks=self.rendered.marks_reasoning, begun=self.rendered.begins_in_reasoning
                ),
                ToolCallParser(self.rendered.tools),
            )
            for job in self.jobs
        ]

    async def whole(self) -> dict[str, Any]:
        """The response.

        Raises:
            ApiError: An answer failed; the others are given up.
        """
        try:
            async for _ in self._updates():
                pass
        finally:
            self.abort()
        answers = {"choices": [self._choice(choice) for choice in self.choices]}
        return self._envelope(streams=False) | answers | self._usage() | self._metrics()

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events; whoever sends them calls `abort` at the end."""
        options = self.body.stream_options
        silent = set(self.choices if self.is_chat else ())
        try:
            async for choice, reasoning, text, calls, chunk in self._updates():
                part = self._delta(choice, reasoning, text, calls, chunk)
                if choice in silent:
                    silent.remove(choice)  # now, not before: clients time the first token by it
                    delta = {"role": "assistant", "content": ""}
                    yield self._event([_of_choice(choice, delta=delta)])
                if part:
                    yield self._event([part])
            if options and options.include_usage:
                last = self._envelope(streams=True) | {"choices": []}
                yield _sse(last | self._usage() | self._metrics())
        except ApiError as error:
            yield _sse(error.body())
        yield "data: [DONE]\n\n"

    def abort(self) -> None:
        """Cancel what is not over, and write the request to the log."""
        missing = [choice.job for choice in self.choices if choice.result is None]
        self.worker.cancel(missing)
        ended = "failed" if self.failed else "cancelled" if missing else "done"
        log.info(ended, extra={"event": "request", "fields": self._account()})

    def _account(self) -> dict[str, Any]:
        """The request in figures; none of its texts."""
        first = [job.first_token - job.queued for job in self.jobs if job.first_token]
        rounds = [r for choice in self.choices for r in choice.rounds]
        return {
            "request_id": self.request_id,
            "id": self.id,
            "tenant": self.jobs[0].tenant,
            "chat": self.is_chat,
            "stream": self.body.stream,
            "answers": len(self.jobs),
            "prompt_tokens": len(self.jobs[0].ids),
            "completion_tokens": sum(len(choice.tokens) for choice in self.choices),
            "first_token_seconds": round(min(first), 4) if first else None,
            "seconds": round(time.monotonic() - self.jobs[0].queued, 4),
            "acceptance_length": round(acceptance_length(rounds), 3),
        }

    async def _updates(self) -> AsyncIterator[tuple[Choice, str, str, int, Chunk]]:
        """(choice, reasoning, text, number of calls, chunk) as they come, until all are over."""
        missing = len(self.choices)
        while missing:
            job, event = await self.events.get()
            if isinstance(event, ApiError):
                self.failed = True
                raise event
            choice = self.choices[job.index]
            choice.tokens += event.token_ids
            choice.logprobs += event.logprobs
            if event.round:
                choice.rounds.append(event.round)
            final = event.result is not None
            reasoning, text = choice.reasoning_parser.push(event.text, final=final)
            text, calls = choice.tool_parser.push(text, final=final)
            choice.reasoning += reasoning
            choice.text += text
            choice.calls += calls
            if final:
                choice.result = event.result
                missing -= 1
            yield choice, reasoning, text, len(calls), event

    def _delta(
        self, choice: Choice, reasoning: str, text: str, calls: int, chunk: Chunk
    ) -> dict[str, Any] | None:
        """What a stream says of a chunk, if anything; the last `calls` of the choice are new."""
        ids = {"token_ids": list(chunk.token_ids)} if self.body.return_token_ids else {}
        end = _end(choice) if chunk.result else {}
        logprob_part = self._logprobs(choice, chunk.token_ids, chunk.logprobs)
        if not (reasoning or text or calls or end or ids.get("token_ids") or chunk.logprobs):
            return None
        if not self.is_chat:
            return _of_choice(choice, text=text) | logprob_part | end | ids
        delta: dict[str, Any] = {"reasoning_content": reasoning} if reasoning else {}
        delta |= {"content": text} if text else {}
        if calls:
            numbered = list(enumerate(choice.calls))[-calls:]
            delta["tool_calls"] = [{"index": number, **call} for number, call in numbered]
        return _of_choice(choice, delta=delta) | logprob_part | end | ids

    def _logprobs(
        self, choice: Choice, tokens: Sequence[int], of_tokens: Sequence[TokenLogprobs]
    ) -> dict[str, Any]:
        """What is told of the next tokens of an answer, if anything is asked."""
        bytes_of = self.rendered.bytes_of
        if bytes_of is None:
            return {}
        if self.is_chat:
            return {"logprobs": logprobs.of_chat(tokens, of_tokens, bytes_of)}
        found = logprobs.of_completion(tokens, of_tokens, bytes_of, choice.offset)
        choice.offset += sum(map(len, found["tokens"]))
        return {"logprobs": found}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        result = choice.result
        assert result is not None
        ids: dict[str, Any] = {}
        if self.body.return_token_ids:
            ids = {"token_ids": result.token_ids, "prompt_token_ids": choice.job.ids}
        logprob_part = self._logprobs(choice, choice.tokens, choice.logprobs)
        if not self.is_chat:
            return _of_choice(choice, text=choice.text) | logprob_part | _end(choice) | ids
        text = choice.text if choice.text or not choice.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.calls:
            message["tool_calls"] = choice.calls
        if self.rendered.marks_reasoning:
            message["reasoning_content"] = choice.reasoning or None
        return _of_choice(choice, message=message) | logprob_part | _end(choice) | ids

    def _event(self, choices: list[dict[str, Any]]) -> str:
        options = self.body.stream_options
        event = self._envelope(streams=True) | {"choices": choices}
        if options and options.continuous_usage_stats:
            event |= self._usage()
        elif options and options.include_usage:
            event["usage"] = None  # as OpenAI has it; the last event tells it
        return _sse(event)

    def _envelope(self, *, streams: bool) -> dict[str, Any]:
        if self.is_chat:
            prefix, kind = "chatcmpl-", "chat.completion.chunk" if streams else "chat.completion"
        else:
            prefix, kind = "cmpl-", "text_completion"
        return {
            "id": prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _usage(self) -> dict[str, Any]:
        held = {
            id(c.job.ids): usage.cached_tokens(c.job, c.result) for c in self.choices if c.result
        }
        done = [(choice.job, len(choice.tokens)) for choice in self.choices]
        return {"usage": usage.usage(done, sum(held.values()))}

    def _metrics(self) -> dict[str, Any]:
        """As in vLLM, of a single answer only."""
        if len(self.choices) > 1:
            return {"metrics": None}
        (choice,) = self.choices
        assert choice.result is not None
        level = self.worker.options.per_request_spec_decode_metrics
        most = self.worker.draft_length
        return {"metrics": usage.metrics(choice.job, choice.result, level, most)}


def _of_choice(choice: Choice, **content: Any) -> dict[str, Any]:
    return {"index": choice.job.index, **content, "logprobs": None, "finish_reason": None}


def _end(choice: Choice) -> dict[str, Any]:
    assert choice.result is not None
    reason = usage.finish_reason(choice.result)
    return {"finish_reason": "tool_calls" if choice.calls and reason == "stop" else reason}


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
