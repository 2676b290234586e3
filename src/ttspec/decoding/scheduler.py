"""Requests in, events out: who has a row, whose prompt is read, and when a round is due.

A step reads a piece of waiting prompts, has one round of the rows that decode, or both. So a long
prompt holds up nobody for longer than a piece of it. Whoever serves adds a queue of its own.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from ttspec.config import GenerateConfig, SamplingConfig
from ttspec.decoding.conversation import Conversation, Request, shared_prefix
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.penalties import sampling_of
from ttspec.decoding.prefill import Prompts
from ttspec.errors import DataError, OptionError
from ttspec.records import Chunk

ROWS_PER_PREFILL = 16
"""Turns begin together when more than a row in so many waits for one: reading a prompt holds up
all rows, so in a large batch rows wait for company. Not where it is captured, and takes as long
alone (docs/experiments.md)."""
SHARED_OPTIONS = ("acceptance", "draft", "learn", "deterministic")
"""Options that all rows of a decoder have in common."""
LEAST_COPIED = 64
"""Tokens that two texts begin with alike, for which what was read is copied from row to row."""


class Scheduler:
    """Gives the rows of one decoder to requests."""

    def __init__(self, decoder: Decoder, config: GenerateConfig, *, stream: bool = True) -> None:
        """No request yet.

        Args:
            decoder: Its rows are this scheduler's alone.
            config: Of requests without their own; limits hold for each turn.
            stream: Without it, text comes only with a result.
        """
        self.decoder, self.config, self._stream = decoder, config, stream
        self._free = list(range(decoder.rows.count))
        self._queue: deque[int] = deque()
        """Requests without a row."""
        self._requests: dict[int, Conversation] = {}
        """Until their rows are freed."""
        self._left_by: dict[int, str | None] = {}
        """Whose text a free row holds."""
        self._ready: list[int] = []
        """Requests with a row whose turn was not begun."""
        self._reading: tuple[Prompts, list[int]] | None = None
        """Prompts that are being read, and whose."""
        self._decoding: list[int] = []
        self._next_id = 0

    def add_request(self, request: Request) -> int:
        """Queue a conversation.

        Returns:
            Its id, which is never used again.

        Raises:
            OptionError: It asks for something that the decoder was not made for, or names a token
                that the target does not have.
            DataError: Its prompt has such a token.
        """
        config = request.config or self.config
        sampling = self._sampling_of(config)
        self._check_tokens(request.ids)
        self._check_tenant(request.tenant or config.tenant)
        number, self._next_id = self._next_id, self._next_id + 1
        talk = Conversation(self.decoder, request, config, sampling, stream=self._stream)
        self._requests[number] = talk
        self._queue.append(number)
        return number

    def add_turn(self, request: int, ids: list[int]) -> None:
        """Queue the next turn of a conversation that keeps its row.

        Args:
            request: Which one.
            ids: The whole conversation up to the answer. What its row holds of it is not read
                again, up to the first token that is another.

        Raises:
            DataError: There is a token that the target does not have.
        """
        self._check_tokens(ids)
        self._requests[request].queued = ids
        self._ready.append(request)

    def conversation(self, request: int) -> Conversation:
        """What is known of a request, until its row is freed."""
        return self._requests[request]

    def has_unfinished(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._queue or self._ready or self._reading or self._decoding)

    def step(self) -> list[tuple[int, Chunk]]:
        """Read a piece of prompts, or have a round; both where a long prompt would hold up others.

        Returns:
            (request, chunk) of each request with something new. A chunk with a result ends a turn.
        """
        moved: list[int] = []
        if not self.decoder.launched:  # graphs of prompts and memory may work where its results lie
            self._give_rows()
            if self._ready and not self._reading and (self._in_company or not self._decoding):
                moved = self._begin()
            if self._reading:
                moved += self._read_piece()
        if self._decoding and (self._reading or not moved):
            moved += self._round()
        events = [(request, self._requests[request].chunk()) for request in moved]
        for request, chunk in events:
            if chunk.result and not self._requests[request].request.keeps_row:
                self.release(request)
        return events

    def abort(self, request: int) -> Chunk | None:
        """End a request's answer as it is. Its row is free at once, unless it keeps it.

        Returns:
            Its last chunk; None if its answer was over, or it is not known.
        """
        talk = self._requests.get(request)
        if talk is None or (talk.queued is None and talk.finish):
            return None
        if talk.queued is not None:
            (self._ready if request in self._ready else self._queue).remove(request)
        elif self._reading and request in self._reading[1]:
            self._reading[0].drop(talk.row)
            self._reading[1].remove(request)
            self._end_reading()
        elif request in self._decoding:
            self._decoding.remove(request)
        talk.cancel()
        chunk = talk.chunk()
        if talk.row < 0 or not talk.request.keeps_row:
            self.release(request)
        return chunk

    def abort_all(self) -> list[tuple[int, Chunk]]:
        """End all answers, those that were not begun too."""
        chunks = [(request, self.abort(request)) for request in list(self._requests)]
        return [(request, chunk) for request, chunk in chunks if chunk]

    def release(self, request: int) -> None:
        """Forget a conversation that is over; its row is free."""
        talk = self._requests.pop(request)
        if talk.row >= 0:
            self._free.append(talk.row)
            self._left_by[talk.row] = talk.request.tenant

    def _sampling_of(self, config: GenerateConfig) -> SamplingConfig:
        """How a request's tokens are chosen.

        Raises:
            OptionError: The decoder was not made for it.
        """
        for name in SHARED_OPTIONS:
            given, ours = getattr(config, name), getattr(self.config, name)
            if given != ours:
                raise OptionError(
                    f"A request's {name} is {given!r}; all rows of its scheduler have {ours!r}.\n"
                    "Give it to a scheduler of its own."
                )
        if config is self.config:
            return self.decoder.sampling
        return sampling_of(replace(config, seed=0), self.decoder.target)

    def _check_tokens(self, ids: list[int]) -> None:
        """Refuse what a table of tokens would be read at, out of it: on a GPU that ends all."""
        size = int(self.decoder.target.config.vocab_size)
        wrong = [token for token in ids if not (isinstance(token, int) and 0 <= token < size)]
        if wrong:
            raise DataError(
                f"A prompt has the token {wrong[0]!r}; the target has {size}, from 0.\n"
                "Give tokens of its tokenizer."
            )

    def _check_tenant(self, tenant: str | None) -> None:
        """Refuse a tenant that would draft with, and teach, another one's weights."""
        learner, ours = self.decoder.learner, self.decoder.tenant
        if learner and learner.shared and tenant != ours:
            raise OptionError(
                f"A request is of tenant {tenant!r}, and all rows of its scheduler share the "
                f"weights of tenant {ours!r}.\nGive it to a scheduler of its own: with learn.scope "
                "shared there is one for each tenant."
            )

    @property
    def _in_company(self) -> bool:
        """Whether enough turns wait for their prompts to be read."""
        prompts, rows = self.decoder.prompts, self.decoder.rows.count
        waiting = len(self._ready) + min(len(self._queue), len(self._free))
        return waiting > (0 if prompts.graphs else rows // ROWS_PER_PREFILL)

    def _give_rows(self) -> None:
        while self._free and self._queue:
            request = self._queue.popleft()
            talk = self._requests[request]
            talk.row = self._row_for(talk.request)
            self._free.remove(talk.row)
            self._ready.append(request)

    def _row_for(self, request: Request) -> int:
        """A free row, which holds what there is of a request's text from the same tenant.

        That is the row of a conversation that comes back. Who only begins alike, with the same
        system message as a rule, has a copy of that: each conversation keeps a row.
        """
        decoder, tenant, ids = self.decoder, request.tenant, request.ids
        if tenant is None:
            decoder.clear(row := self._free[-1])
            return row
        alike = {
            row: shared_prefix(decoder.rows.tokens[row][: decoder.rows.lengths[row]], ids)
            for row in self._free
            if self._left_by.get(row) == tenant
        }
        oldest = self._free[0]  # the one that was left longest ago
        best = max(alike, key=lambda row: alike[row], default=oldest)
        same = alike.get(best, 0)
        if decoder.rows.goes_on(best, same) or (best == oldest and same >= LEAST_COPIED):
            if decoder.learner and decoder.learner.config.scope == "request":
                decoder.learner.reset(best)
            return best
        if same >= LEAST_COPIED and not decoder.target.recurrent:
            decoder.copy(best, oldest, same)
        else:
            decoder.clear(oldest)
        return oldest

    def _begin(self) -> list[int]:
        """Begin to read what is ready; requests whose answers are over before they begin."""
        requests, self._ready = self._ready, []
        budgets = {request: self._requests[request].open() for request in requests}
        live = [request for request in requests if budgets[request]]
        talks = [self._requests[request] for request in live]
        for talk in talks:
            self.decoder.row_sampling.set(
                talk.row,
                talk.sampling,
                ignore_eos=talk.config.ignore_eos,
                mask=None if talk.turn else talk.request.mask,
                logprobs=talk.request.logprobs,
            )
        if live:
            prompts = self.decoder.prompts.begin(
                [talk.row for talk in talks],
                [talk.prompt_ids for talk in talks],
                [talk.noise_key() for talk in talks],
                [budgets[request] for request in live],
            )
            self._reading = prompts, live
        return [request for request in requests if not budgets[request]]

    def _read_piece(self) -> list[int]:
        """Read on; once all is read, the requests, which have their first token now."""
        assert self._reading is not None
        prompts, requests = self._reading
        self.decoder.prompts.read_piece(prompts)
        if not prompts.is_read:
            return []
        first = zip(requests, prompts.first_tokens, prompts.logprobs, strict=True)
        for request, token, logprobs in first:
            self._requests[request].begin(token, logprobs)
        self._end_reading()
        self._decoding += [r for r in requests if not self._requests[r].finish]
        return requests

    def _end_reading(self) -> None:
        if self._reading and self._reading[0].is_read:
            self._reading = None

    def _round(self) -> list[int]:
        """One round; the requests that took part."""
        ahead = self.decoder.works_ahead and not (self._reading or self._in_company)
        outcomes, moved = self.decoder.round(ahead=ahead), self._decoding
        for request in moved:
            talk = self._requests[request]
            talk.advance(outcomes[talk.row])
        self._decoding = [r for r in moved if not self._requests[r].finish]
        return moved
