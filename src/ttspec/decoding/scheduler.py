"""Requests in, events out: who has a row, whose prompt is read, and when a round is due.

A step reads a chunk of waiting prompts, has one round of the rows that decode, or both. So a long
prompt holds up nobody for longer than a chunk of it. Whoever serves adds a queue of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from ttspec.config import GenerateConfig, SamplingConfig
from ttspec.decoding.conversation import Conversation, Request, shared_prefix
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.penalties import sampling_of
from ttspec.decoding.prefill import PrefillBatch
from ttspec.errors import DataError, OptionError
from ttspec.records import Chunk

Method = TypeVar("Method", bound=Callable[..., Any])
ROWS_PER_PREFILL = 16
"""Turns begin together when more than a row in so many waits for one: reading a prompt holds up
all rows, so in a large batch rows wait for company. Not where it is captured, and takes as long
alone (docs/experiments.md)."""
SHARED_OPTIONS = ("acceptance", "draft", "learn", "deterministic")
"""Options that all rows of a decoder have in common."""
MIN_SHARED_PREFIX = 64
"""Tokens that two texts begin with alike, for which what was read is copied from row to row."""


def in_own_modes(method: Method) -> Method:
    """Let a caller's inference mode or autocast bear on nothing.

    What is made in inference mode cannot be written to outside of it, and caches live longer.
    """

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not (kinds or torch.is_inference_mode_enabled()):
            return method(*args, **kwargs)
        with torch.inference_mode(False), ExitStack() as modes:
            for kind in kinds:
                modes.enter_context(torch.autocast(kind, enabled=False))
            return method(*args, **kwargs)

    return cast(Method, run)


class Scheduler:
    """Gives the rows of one decoder to requests.

    Owns who waits, whose prompt is read, who decodes and which rows are free. What an answer has
    become is its `Conversation`'s to know.
    """

    def __init__(
        self, decoder: Decoder, config: GenerateConfig, *, stream: bool = True, text: bool = True
    ) -> None:
        """No request yet.

        Args:
            decoder: Its rows are this scheduler's alone.
            config: Of requests without their own; limits hold for each turn.
            stream: Without it, nothing comes before a result.
            text: Without it, text comes only with a result.
        """
        self.decoder, self.config = decoder, config
        self._stream, self._text = stream, stream and text
        self._conversations: dict[int, Conversation] = {}
        """By the request's id, until their rows are freed."""
        self._waiting: deque[Conversation] = deque()
        """Without a row."""
        self._ready: list[Conversation] = []
        """With a row, whose turn was not begun."""
        self._prefilling: list[Conversation] = []
        """Whose prompts `_prefill` reads."""
        self._prefill: PrefillBatch | None = None
        self._running: list[Conversation] = []
        """That decode."""
        self._had_round = False
        """Whether the last step had a round."""
        self._free = list(range(decoder.rows.count))
        self._tenant_of_free: dict[int, str | None] = {}
        """Whose text a free row holds."""
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
        conversation = Conversation(
            number, self.decoder, request, config, sampling, stream=self._text
        )
        self._conversations[number] = conversation
        self._waiting.append(conversation)
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
        conversation = self._conversations[request]
        conversation.queued = ids
        self._ready.append(conversation)

    def conversation(self, request: int) -> Conversation:
        """What is known of a request, until its row is freed."""
        return self._conversations[request]

    def has_unfinished(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._ready or self._prefilling or self._running)

    @in_own_modes
    def step(self) -> list[tuple[int, Chunk]]:
        """Read a chunk of prompts, or have a round; both where a long prompt would hold up others.

        Returns:
            (request, chunk) of each request with something new. A chunk with a result ends a turn.
        """
        moved = [] if self.decoder.launched else self._see_to_prompts(begins=self._begins_before)
        self._had_round = bool(self._running and (self._prefill or not moved))
        if self._had_round:
            moved += self._round()
            if self.decoder.launched and self._joins_beside:
                moved += self._see_to_prompts(begins=True)
        told = moved if self._stream else [one for one in moved if one.finish]
        events = [(conversation, conversation.chunk()) for conversation in told]
        for conversation, chunk in events:
            conversation.mark_sent(chunk)
            if chunk.result and not conversation.request.keeps_row:
                self.release(conversation.id)
        return [(conversation.id, chunk) for conversation, chunk in events]

    def abort(self, request: int) -> Chunk | None:
        """End a request's answer as it is. Its row is free at once, unless it keeps it.

        Returns:
            Its last chunk; None if its result was sent, or it is not known.
        """
        conversation = self._conversations.get(request)
        if conversation is None or (conversation.queued is None and conversation.is_sent):
            return None
        if conversation in self._ready:
            self._ready.remove(conversation)
        elif conversation in self._waiting:
            self._waiting.remove(conversation)
        elif self._prefill and conversation in self._prefilling:
            self._prefill.drop(conversation.row)
            self._prefilling.remove(conversation)
            if not self._prefilling:
                self._prefill = None
                self.decoder.prompts.drop()
        elif conversation in self._running:
            self._running.remove(conversation)
        if conversation.queued is not None or not conversation.finish:
            conversation.cancel()  # else an interrupt came between the end and the telling
        chunk = conversation.chunk()
        conversation.mark_sent(chunk)
        if conversation.row < 0 or not conversation.request.keeps_row:
            self.release(request)
        return chunk

    def abort_all(self) -> list[tuple[int, Chunk]]:
        """End all answers, those that were not begun too."""
        chunks = [(request, self.abort(request)) for request in list(self._conversations)]
        return [(request, chunk) for request, chunk in chunks if chunk]

    def release(self, request: int) -> None:
        """Forget a conversation that is over; its row is free."""
        conversation = self._conversations.pop(request)
        if conversation.row >= 0:
            self._free.append(conversation.row)
            self._tenant_of_free[conversation.row] = conversation.request.tenant

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
        wrong = [token for token in ids if not (type(token) is int and 0 <= token < size)]
        if wrong:
            raise DataError(
                f"A prompt has the token {wrong[0]!r}; the target has {size}, from 0.\n"
                "Give tokens of its tokenizer, of an array .tolist()."
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
    def _begins_before(self) -> bool:
        """Whether rows are given to requests before a round is launched.

        Rather while one is under way, where that can be.
        """
        beside = bool(self._running) and self.decoder.begins_beside
        return not beside or (self._had_round and not self._prefill)

    @property
    def _joins_beside(self) -> bool:
        """Whether who is read, or will be, may join the rows while a round is under way."""
        is_launched = self._prefill is None or self._prefill.is_launched
        return is_launched and self.decoder.begins_beside

    @property
    def _prefill_is_due(self) -> bool:
        """Whether prompts should be read, or were, before the next round is launched."""
        prompts, rows = self.decoder.prompts, self.decoder.rows.count
        if self._prefill:
            return not prompts.is_busy
        waiting = len(self._ready) + min(len(self._waiting), len(self._free))
        return waiting > (0 if prompts.captured else rows // ROWS_PER_PREFILL)

    def _see_to_prompts(self, *, begins: bool) -> list[Conversation]:
        """Give rows to requests if one `begins`, and read prompts on.

        Returns:
            Conversations that have their first token now, or ended without one.
        """
        moved, decoder = list[Conversation](), self.decoder
        if begins and (self._waiting or self._ready):
            if self._prefill_is_due and not self._prefill:
                decoder.launch_following()  # to begin takes longer than a round
            self._assign_rows()
            if self._ready and not self._prefill and (self._prefill_is_due or not self._running):
                moved = self._begin_prefill()
                if self._prefill and decoder.launched:
                    decoder.prompts.launch(self._prefill)
        if self._prefill and (self._joins_beside or not decoder.launched):
            moved += self._read_chunk(self._prefill)
        return moved

    def _assign_rows(self) -> None:
        while self._free and self._waiting:
            conversation = self._waiting.popleft()
            conversation.row = self._row_for(conversation.request)
            self._free.remove(conversation.row)
            self._ready.append(conversation)

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
            if self._tenant_of_free.get(row) == tenant
        }
        oldest = self._free[0]  # the one that was left longest ago
        best = max(alike, key=lambda row: alike[row], default=oldest)
        same = alike.get(best, 0)
        extends = decoder.rows.extends_prompt(best, same)
        if extends or (best == oldest and same >= MIN_SHARED_PREFIX):
            if decoder.learner and decoder.learner.config.scope == "request":
                decoder.learner.reset(best)
            return best
        if same >= MIN_SHARED_PREFIX and not decoder.target.recurrent:
            decoder.copy(best, oldest, same)
        else:
            decoder.clear(oldest)
        return oldest

    def _begin_prefill(self) -> list[Conversation]:
        """Begin to read what is ready; conversations whose answers are over before they begin.

        Some at a time where that is captured: the first decode while the others are read.
        """
        most = self.decoder.prompts.most_rows
        ready, self._ready = self._ready[:most], self._ready[most:]
        budgets = {conversation.row: conversation.start_turn() for conversation in ready}
        live = [conversation for conversation in ready if budgets[conversation.row]]
        for conversation in live:
            self.decoder.row_sampling.set(
                conversation.row,
                conversation.sampling,
                ignore_eos=conversation.config.ignore_eos,
                mask=None if conversation.turn else conversation.request.mask,
                logprobs=conversation.request.logprobs,
            )
        if live:
            self._prefilling = live
            self._prefill = self.decoder.prompts.begin(
                [conversation.row for conversation in live],
                [conversation.prompt_ids for conversation in live],
                [conversation.noise_key() for conversation in live],
                [budgets[conversation.row] for conversation in live],
            )
        return [conversation for conversation in ready if conversation not in live]

    def _read_chunk(self, batch: PrefillBatch) -> list[Conversation]:
        """Read on; once all is read, the conversations, which have their first token now.

        Beside rounds, if it can be.
        """
        prompts = self.decoder.prompts
        if batch.is_launched or prompts.launch(batch):
            if self._running and prompts.is_busy:
                return []
            prompts.finish(batch)
        else:
            prompts.read_chunk(batch)
        if not batch.is_read:
            return []
        begun, self._prefilling, self._prefill = self._prefilling, [], None
        first = zip(begun, batch.first_tokens, batch.logprobs, strict=True)
        for conversation, token, logprobs in first:
            conversation.take_first_token(token, logprobs)
        self._running += [conversation for conversation in begun if not conversation.finish]
        return begun

    def _round(self) -> list[Conversation]:
        """One round; the conversations that took part."""
        decoder, running = self.decoder, self._running
        waits = self._prefill_is_due and not self._joins_beside
        outcomes = decoder.round(ahead=decoder.works_ahead and not waits)
        moved = [conversation for conversation in running if conversation.row in outcomes]
        if not waits and any(not decoder.rows.budget[conversation.row] for conversation in moved):
            decoder.launch_following()  # results take time
        for conversation in moved:
            conversation.take_round(outcomes[conversation.row])
        self._running = [conversation for conversation in running if not conversation.finish]
        return moved
