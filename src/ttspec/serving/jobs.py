"""What the event loop asks of the engine's thread: one answer each."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ttspec.config import GenerateConfig
from ttspec.decoding.conversation import Request
from ttspec.records import Chunk
from ttspec.serving.errors import ApiError

if TYPE_CHECKING:
    from ttspec.serving.grammar import GrammarMask


@dataclass(eq=False, kw_only=True)
class Job:
    """One answer that is asked for. The engine's thread writes the times, the event loop reads."""

    ids: list[int]
    config: GenerateConfig
    seed: int
    occurrence: int
    tenant: str
    thinking: bool | None
    deadline: float
    """When it is over, in `time.monotonic`'s seconds."""
    index: int
    """Its place among the answers of its request."""
    mask: GrammarMask | None = None
    """What it may be made of."""
    logprobs: int | None = None
    """As in `ttspec.decoding.scheduler.Request`."""
    events: asyncio.Queue[Event]
    """Of all answers of its request: chunks, the last one with the result; or what went wrong."""
    queued: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None

    def request(self) -> Request:
        """The same for a scheduler."""
        return Request(
            ids=self.ids,
            seed=self.seed,
            occurrence=self.occurrence,
            tenant=self.tenant,
            mask=self.mask,
            logprobs=self.logprobs,
            thinking=self.thinking,
            config=self.config,
        )


Event = tuple[Job, Chunk | ApiError]
"""What is new of an answer: a chunk, the last one with the result, or what went wrong."""
