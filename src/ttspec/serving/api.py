"""From a request to the answers that are queued for it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ttspec.config import GenerateConfig
from ttspec.decoding.penalties import sampling_of
from ttspec.errors import TtspecError
from ttspec.serving.answers import Answers
from ttspec.serving.errors import ApiError, bad_request
from ttspec.serving.jobs import Event, Job
from ttspec.serving.options import MAX_CHOICES
from ttspec.serving.prompts import PromptRenderer, RenderedPrompts
from ttspec.serving.schema import ChatRequest, CompletionRequest, Sampled
from ttspec.serving.worker import Worker

SAMPLING = (
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "ignore_eos"),
)
"""Fields that go to the engine under their own names."""


class Api:
    """What routes share: the worker, and who writes prompts."""

    def __init__(self, worker: Worker, model: str) -> None:
        self.worker, self.model = worker, model
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="ttspec-prompts")
        self._renderer: PromptRenderer | None = None

    def require_model(self, name: str) -> None:
        """Refuse any model but the one that is here.

        Raises:
            ApiError: It is another.
        """
        if name != self.model:
            raise ApiError(
                404,
                f"The model {name[:80]!r} is not here; this server has {self.model}.",
                param="model",
                code="model_not_found",
            )

    async def answers(self, body: Sampled, tenant: str, request_id: str) -> Answers:
        """Queue what a request asks for.

        Raises:
            ApiError: It cannot be answered, or not now.
        """
        worker = self.worker
        if body.model is not None:
            self.require_model(body.model)
        worker.require_ready()
        loop = asyncio.get_running_loop()
        rendered = await loop.run_in_executor(self._threads, self._render, body)
        if len(rendered.prompts) * body.n > MAX_CHOICES:
            raise bad_request(f"Prompts times n are more than {MAX_CHOICES}.", "n")
        events: asyncio.Queue[Event] = asyncio.Queue()
        seed = secrets.randbits(31) if body.seed is None else body.seed % 2**63
        asked_before: Counter[tuple[int, ...]] = Counter()
        jobs = []
        for ids in rendered.prompts:
            config = self._config(body, len(ids))
            for _ in range(body.n):
                jobs.append(
                    Job(
                        ids=ids,
                        config=config,
                        seed=seed,
                        occurrence=asked_before[tuple(ids)],
                        tenant=tenant,
                        thinking=rendered.thinking,
                        deadline=time.monotonic() + worker.options.deadline,
                        index=len(jobs),
                        mask=rendered.mask.copy() if rendered.mask else None,
                        logprobs=body.num_logprobs,
                        events=events,
                    )
                )
                asked_before[tuple(ids)] += 1
        worker.submit(jobs)
        return Answers(body, worker, self.model, request_id, rendered, jobs, events)

    def close(self) -> None:
        """End the thread of prompts."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _render(self, body: Sampled) -> RenderedPrompts:
        if self._renderer is None:
            self._renderer = PromptRenderer(self.worker.engine)
        if isinstance(body, ChatRequest):
            return self._renderer.chat(body)
        assert isinstance(body, CompletionRequest)
        return self._renderer.completion(body)

    def _config(self, body: Sampled, prompt: int) -> GenerateConfig:
        """How one answer is generated."""
        room = self.worker.slots - prompt
        asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
        if room < (asked or 1):
            raise bad_request(
                f"The prompt has {prompt} tokens and {asked or 1} are asked for; this server has "
                f"room for {self.worker.slots} in all. Shorten the prompt or ask for less.",
                "messages" if isinstance(body, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        changes: dict[str, Any] = {n: v for n in SAMPLING if (v := getattr(body, n)) is not None}
        if body.top_k is not None:
            changes["top_k"] = max(0, body.top_k)  # -1 is vLLM's word for all
        if body.min_tokens is not None:
            changes["min_new_tokens"] = body.min_tokens
        try:
            config = replace(
                self.worker.config, max_new_tokens=asked or room, stop=body.stops, **changes
            )
            sampling_of(replace(config, seed=0), self.worker.engine.target)
        except TtspecError as error:  # the engine has longer names for two fields
            message = str(error).replace("_new_tokens", "_tokens")
            raise bad_request(message, message.partition(" ")[0]) from error
        return config
