"""Requests in, events out: who has a row, whose prompt is read, and when a round is due.

A step reads a piece of waiting prompts, has one round of the rows that decode, or both. So a long
prompt holds up nobody for longer than a piece of it. Whoever serves adds a queue of its own.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from ttspec.config import GenerateConfig, SamplingConfig
from ttspec.decoding.conversation import Conversation, shared_prefix
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.penalties import sampling_of
from ttspec.decoding.prefill import Prompts
from ttspec.errors import OptionError
from ttspec.records import Chunk, LogitMask

ROWS_PER_PREFILL = 16
"""Turns begin together when more than a row in so many waits for one: reading a prompt holds up
all rows, so in a large batch rows wait for company. Not where it is captured, and takes as long
alone (docs/experiments.md)."""
SHARED_OPTIONS = ("acceptance", "draft", "learn", "deterministic")
"""Options that all rows of a decoder have in common."""
LEAST_COPIED = 64
"""Tokens that two texts begin with alike, for which what was read is copied from row to row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A conversation that begins, or one turn."""

    ids: list[int]
    """Tokens of the first prompt."""
    seed: int
    """Of all noise of the conversation."""
    occurrence: int = 0
    """Tells equal prompts of equal seeds apart."""
    quota: int | None = None
    """Tokens that all turns together may have; None is no limit."""
    thinking: bool | None = None
    """What the chat template asked for; only told in the statistics."""
    config: GenerateConfig | None = None
    """Sampling, limits and stops of its own, each turn's; None is the scheduler's. `SHARED_OPTIONS`
    must be alike."""
    mask: LogitMask | None = None
    """What the first answer may be, as a grammar says."""
    logprobs: int | None = None
    """Tell of each token what the target says of it, and of the so many likeliest in its place;
    None tells nothing."""
    tenant: str | None = None
    """Whose it is; None is whose its config says. In scope shared all must be one tenant's. Where a
    free row holds the beginning of its prompt, from a request of the same tenant, that is not read
    again; None finds no such row."""
    keeps_row: bool = False
    """More turns may follow: the row is freed by `release`, not at the end of the answer."""


@dataclass(slots=True)
class Admitted:
    """A request that was added, until its row is freed."""

    talk: Conversation
    sampling: SamplingConfig
    mask: LogitMask | None
    logprobs: int | None
    tenant: str | None
    keeps_row: bool
    ids: list[int] | None
    """The prompt of a turn that was not begun."""


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
        self._requests: dict[int, Admitted] = {}
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
        """
        config = request.config or self.config
        sampling = self._sampling_of(config)
        self._check_tenant(request.tenant or config.tenant)
        number, self._next_id = self._next_id, self._next_id + 1
        talk = Conversation(
            self.decoder,
            config,
            request.seed,
            occurrence=request.occurrence,
            quota=request.quota,
            thinking=request.thinking,
            stream=self._stream,
        )
        self._requests[number] = Admitted(
            talk,
            sampling,
            request.mask,
            request.logprobs,
            request.tenant,
            request.keeps_row,
            request.ids,
        )
        self._queue.append(number)
        return number

    def add_turn(
        self,
        request: int,
        ids: list[int],
        *,
        config: GenerateConfig | None = None,
        seed: int | None = None,
        mask: LogitMask | None = None,
    ) -> None:
        """Queue the next turn of a conversation that keeps its row.

        Args:
            request: Which one.
            ids: The whole conversation up to the answer. What its row holds of it is not read
                again, up to the first token that is another.
            config: From now on; None is as before.
            seed: With one, the answer is what a new request of this seed for `ids` would get; None
                goes on with the noise of the conversation.
            mask: What this answer may be.

        Raises:
            OptionError: As `add_request`.
        """
        known = self._requests[request]
        if config is not None:
            known.sampling = self._sampling_of(config)
        known.mask, known.ids = mask, ids
        known.talk.renew(config, seed)
        self._ready.append(request)

    def conversation(self, request: int) -> Conversation:
        """What is known of a request, until its row is freed."""
        return self._requests[request].talk

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
        events = [(request, self._requests[request].talk.chunk()) for request in moved]
        for request, chunk in events:
            if chunk.result and not self._requests[request].keeps_row:
                self.release(request)
        return events

    def abort(self, request: int) -> Chunk | None:
        """End a request's answer as it is. Its row is free at once, unless it keeps it.

        Returns:
            Its last chunk; None if its answer was over, or it is not known.
        """
        known = self._requests.get(request)
        if known is None or (known.ids is None and known.talk.finish):
            return None
        talk = known.talk
        if known.ids is None:
            if self._reading and request in self._reading[1]:
                self._reading[0].drop(talk.row)
                self._reading[1].remove(request)
                self._end_reading()
            elif request in self._decoding:
                self._decoding.remove(request)
            talk.cancel()
        else:
            (self._ready if request in self._ready else self._queue).remove(request)
            talk.cancel(known.ids)
            known.ids = None
        chunk = talk.chunk()
        if talk.row < 0 or not known.keeps_row:
            self.release(request)
        return chunk

    def abort_all(self) -> list[tuple[int, Chunk]]:
        """End all answers, those that were not begun too."""
        chunks = [(request, self.abort(request)) for request in list(self._requests)]
        return [(request, chunk) for request, chunk in chunks if chunk]

    def release(self, request: int) -> None:
        """Forget a conversation that is over; its row is free."""
        known = self._requests.pop(request)
        if known.talk.row >= 0:
            self._free.append(known.talk.row)
            self._left_by[known.talk.row] = known.tenant

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
            known = self._requests[request]
            row = self._row_for(known)
            self._free.remove(row)
            known.talk.row = row
            self._ready.append(request)

    def _row_for(self, request: Admitted) -> int:
        """A free row, which holds what there is of a request's text from the same tenant.

        That is the row of a conversation that comes back. Who only begins alike, with the same
        system message as a rule, has a copy of that: each conversation keeps a row.
        """
        decoder, tenant, ids = self.decoder, request.tenant, request.ids or []
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
        live, over = list[tuple[int, Admitted]](), list[int]()
        budgets = []
        for request in requests:
            known = self._requests[request]
            assert known.ids is not None
            budget = known.talk.open(known.ids)
            known.ids = None
            if not budget:
                over.append(request)
                continue
            live.append((request, known))
            budgets.append(budget)
            self.decoder.row_sampling.set(
                known.talk.row,
                known.sampling,
                ignore_eos=known.talk.config.ignore_eos,
                mask=known.mask,
                logprobs=known.logprobs,
            )
        if live:
            talks = [known.talk for _, known in live]
            prompts = self.decoder.prompts.begin(
                [talk.row for talk in talks],
                [talk.prompt_ids for talk in talks],
                [talk.noise_key() for talk in talks],
                budgets,
            )
            self._reading = prompts, [request for request, _ in live]
        return over

    def _read_piece(self) -> list[int]:
        """Read on; once all is read, the requests, which have their first token now."""
        assert self._reading is not None
        prompts, requests = self._reading
        self.decoder.prompts.read_piece(prompts)
        if not prompts.is_read:
            return []
        first = zip(requests, prompts.first_tokens, prompts.logprobs, strict=True)
        for request, token, told in first:
            self._requests[request].talk.begin(token, told)
        self._end_reading()
        self._decoding += [r for r in requests if not self._requests[r].talk.finish]
        return requests

    def _end_reading(self) -> None:
        if self._reading and self._reading[0].is_read:
            self._reading = None

    def _round(self) -> list[int]:
        """One round; the requests that took part."""
        ahead = self.decoder.works_ahead and not (self._reading or self._in_company)
        outcomes, moved = self.decoder.round(ahead=ahead), self._decoding
        for request in moved:
            talk = self._requests[request].talk
            talk.advance(outcomes[talk.row])
        self._decoding = [r for r in moved if not self._requests[r].talk.finish]
        return moved
