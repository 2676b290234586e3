"""One conversation, turn by turn, with what its drafter has learned."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ttspec.config import GenerateConfig
from ttspec.decoding.conversation import Conversation
from ttspec.decoding.history import ChatHistory, Prompt
from ttspec.decoding.scheduler import Request, Scheduler
from ttspec.drafters.base import Drafter
from ttspec.drafters.layers import Weights, multiplied_out
from ttspec.errors import OptionError
from ttspec.learning.delta import difference, read_delta, write_delta
from ttspec.records import Chunk, Result

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine


class Session:
    """One conversation, turn by turn. Its drafter keeps what it learned until it is closed.

    Owns what was said so far, and a scheduler of one row from the first turn on.
    """

    def __init__(
        self,
        engine: Engine,
        config: GenerateConfig,
        *,
        start: Weights | None = None,
        origin: Drafter | None = None,
    ) -> None:
        """Made by `Engine.session`.

        Args:
            engine: Its pair.
            config: Limits hold for each turn.
            start: Where what learns begins; None is at the drafter's weights.
            origin: Has the weights that the engine's drafter is a change of.
        """
        self.engine, self.config = engine, config
        self._start, self._origin = start, origin or engine.drafter
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
        live = {n: w[0] if drafter.is_own(n, w) else w for n, w in state.weights.items()}
        new.weights = {n: w.detach().clone() for n, w in multiplied_out(live).items()}
        return new

    def save(self, path: str | Path) -> None:
        """Write what was learned to a new .safetensors file, for `resume`: only the change.

        Raises:
            OptionError: Nothing was learned yet, or `path` is taken or ends otherwise.
        """
        learner = self._scheduler.decoder.learner if self._scheduler else None
        if learner is None or self._origin is None:
            raise OptionError(
                "The session has learned nothing: it has not begun, is closed, or does not learn."
                "\nSave what was learned after a turn."
            )
        changes = learner.learned(0)
        if self._origin is self.engine.drafter:
            if learner.config.weights == "full":
                changes = difference(changes, self._origin.weights)
        else:  # what it went on from counts
            floats = {n: w for n, w in self.learned().weights.items() if w.is_floating_point()}
            moved = {n: w for n, w in floats.items() if not w.equal(self._origin.weights[n])}
            changes = difference(moved, self._origin.weights)
        write_delta(Path(path), self._origin, learner.config, changes)

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
        if self._start is not None and decoder.learner:
            decoder.learner.weights.start_from(self._start)
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


def resumed_session(engine: Engine, config: GenerateConfig, path: Path) -> Session:
    """A session whose drafter begins with what another one has learned, in the file of a change.

    Raises:
        CheckpointError, OptionError: The file is unusable, or of another drafter.
    """
    if config.learn and config.learn.scope == "shared":
        raise OptionError(
            "learn.scope is shared, and a session goes on from what one has learned.\n"
            "Use learn.scope session, or leave out what it goes on from."
        )
    delta, drafter = read_delta(path), engine.drafter
    delta.require(drafter)
    assert drafter is not None
    start = delta.start(drafter, config.learn)
    if start is not None:
        return Session(engine, config, start=start)
    other = engine.sibling()
    other.drafter = delta.changed(drafter)
    return Session(other, config, origin=drafter)
