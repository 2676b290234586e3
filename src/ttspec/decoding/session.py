"""One conversation, turn by turn, with what its drafter has learned."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ttspec.config import GenerateConfig
from ttspec.decoding.conversation import Conversation, Request
from ttspec.decoding.history import ChatHistory, Prompt
from ttspec.decoding.scheduler import Scheduler
from ttspec.drafters.base import Drafter
from ttspec.drafters.layers import multiplied_out
from ttspec.errors import OptionError
from ttspec.records import Chunk, Result

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine


class Session:
    """One conversation, turn by turn. Its drafter keeps what it learned until it is closed.

    Owns what was said so far, and a scheduler of one row from the first turn on.
    """

    def __init__(self, engine: Engine, config: GenerateConfig) -> None:
        """Made by `Engine.session`; limits hold for each turn."""
        self.engine, self.config = engine, config
        self.seed = secrets.randbits(31) if config.seed is None else config.seed
        self._scheduler: Scheduler | None = None
        self._request = 0
        self._history: ChatHistory
        self._cancelled: list[Chunk] = []
        """Of the newest stream: its last chunk, if it was ended before its answer was over."""

    def send(self, text: Prompt) -> Result:
        """Answer a user turn."""
        *_, last = self.stream(text)
        assert last.result is not None
        return last.result

    def stream(self, text: Prompt) -> Iterator[Chunk]:
        """Answer a user turn chunk by chunk.

        An interrupt, a dropped stream or another turn cancels it: the answer so far is the answer.
        """
        self._cancel()
        self._cancelled = cancelled = list[Chunk]()
        scheduler = self._ask(text)
        try:
            while not cancelled and scheduler.has_unfinished():
                for _, chunk in scheduler.step():
                    self._note(chunk)
                    yield chunk
        except KeyboardInterrupt:
            pass  # what is written is the answer
        finally:
            if cancelled is self._cancelled:  # else another turn has ended it
                self._cancel()
        yield from cancelled

    @property
    def conversation(self) -> Conversation | None:
        """What was said so far; None before the first turn."""
        return self._scheduler.conversation(self._request) if self._scheduler else None

    @property
    def generated(self) -> int:
        """Tokens generated in all turns."""
        return self.conversation.generated if self.conversation else 0

    def learned(self) -> Drafter:
        """A new drafter with the weights as they are now, to be used or exported like any other.

        Raises:
            OptionError: There is no drafter, or nothing was drafted yet.
        """
        drafter = self.engine.drafter
        if drafter is None:
            raise OptionError("The session has no drafter.\nLoad the engine with one.")
        state = self._scheduler.decoder.state if self._scheduler else None
        if state is None:
            raise OptionError(
                "The session has drafted nothing: it has not begun, or is closed, or "
                "draft.length is 0.\nAsk for what was learned after a turn."
            )
        new = copy.copy(drafter)
        live = multiplied_out(drafter.weights_of_one(state.weights))
        new.weights = {n: w.detach().clone() for n, w in live.items()}
        return new

    def close(self) -> None:
        """Free the session's caches and what its drafter learned."""
        self._cancel()
        self._scheduler = None

    def _ask(self, text: Prompt) -> Scheduler:
        engine, config, scheduler = self.engine, self.config, self._scheduler
        if scheduler is not None:
            scheduler.add_turn(self._request, self._history.ask(text))
            return scheduler
        thinking = engine.thinking(config)
        self._history = ChatHistory(engine.chat_template(config))
        ids = self._history.ask(text)
        decoder = engine.decoder(config, 1, len(ids), sessions=True)
        scheduler = Scheduler(decoder, config)
        request = Request(ids=ids, seed=self.seed, thinking=thinking, keeps_row=True)
        self._request, self._scheduler = scheduler.add_request(request), scheduler
        return scheduler

    def _cancel(self) -> None:
        """End the answer that is being written, if there is one."""
        if self._scheduler and (last := self._scheduler.abort(self._request)):
            self._note(last)
            self._cancelled.append(last)

    def _note(self, chunk: Chunk) -> None:
        if chunk.result:
            self._history.answer(chunk.result.text, chunk.result.token_ids)
