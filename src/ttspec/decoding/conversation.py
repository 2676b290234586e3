"""One row's conversation on the host: turns, answers, where an answer ends, and its statistics.

The scheduler makes one for each `Request` and tells it what rounds emitted.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ttspec.config import GenerateConfig, SamplingConfig
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.rows import RowOutcome
from ttspec.decoding.text import TextStream
from ttspec.records import Chunk, FinishReason, LogitMask, Result, Round, TokenLogprobs, summarise


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
    """What the chat template asked for; only the statistics have it."""
    config: GenerateConfig | None = None
    """Sampling, limits and stops of its own, each turn's; None is the scheduler's. `SHARED_OPTIONS`
    must be alike."""
    mask: LogitMask | None = None
    """What the first answer may be, as a grammar says."""
    logprobs: int | None = None
    """Give each token's log-probability, and those of the so many likeliest in its place; None
    gives none."""
    tenant: str | None = None
    """Whose it is; None is whose its config says. In scope shared all must be one tenant's. Where a
    free row holds the beginning of its prompt, from a request of the same tenant, that is not read
    again; None finds no such row."""
    keeps_row: bool = False
    """More turns may follow: the row is freed by `release`, not at the end of the answer."""


class Conversation:
    """The turns of one user, who has a row of a decoder as long as it goes on.

    Owns the answer under way: its tokens, text and rounds, and why it ends. What the row holds of
    the conversation, the decoder knows.
    """

    row = -1
    """Its row, once it has one."""
    turn = 0
    generated = 0
    """Generated tokens of all turns: the position of the next one."""
    reread_tokens = 0
    """Tokens that the row had held and that are read again; see `Stats`."""

    def __init__(
        self,
        id: int,
        decoder: Decoder,
        request: Request,
        config: GenerateConfig,
        sampling: SamplingConfig,
        *,
        stream: bool,
    ) -> None:
        """Start an empty conversation.

        Its options are the request's own, or those of all. Without `stream` text comes at
        the end.
        """
        self.id, self.decoder, self.request = id, decoder, request
        self.config, self.sampling = config, sampling
        self.queued: list[int] | None = request.ids
        """The prompt of a turn that was not begun."""
        self.prompt_ids: list[int] = []
        """What the last answer's prompt had to be read of: all that the row did not hold."""
        self._stream = stream or bool(config.stop)
        self._start = 0, 0
        self._limit: FinishReason = "length"
        self._reset()

    def is_over(self, *, turns: int) -> bool:
        """Whether nothing follows an answer that is over, in a dialogue of so many turns."""
        spent = self.request.quota is not None and self.generated >= self.request.quota
        return spent or self.turn == turns or self.finish in ("context", "cancelled")

    def noise_key(self) -> int:
        """Noise key of this turn; see `noise_key`."""
        asked = self.request
        return noise_key(asked.seed, asked.ids, asked.occurrence, turn=self.turn)

    def start_turn(self) -> int:
        """Begin the queued turn, an answer to the whole conversation up to it.

        What the row holds of it stays, as far as it is the same; the rest is taken back.

        Returns:
            Tokens that it may have; 0 if none, and then it is over.
        """
        decoder, row, ids = self.decoder, self.row, self.queued
        assert ids is not None
        self.queued = None
        self._reset()
        held, length = decoder.rows.tokens[row], decoder.rows.lengths[row]
        kept = min(shared_prefix(held, ids), length, len(ids) - 1)
        self.prompt_ids = ids[kept:]
        learner = decoder.learner
        if learner and self.turn and learner.config.scope == "request":
            learner.reset(row)
        self._reverts = learner.reverts[row] if learner else 0
        room = decoder.rows.slots - len(ids)
        most = self.config.max_new_tokens
        if self.request.quota is not None:
            most = min(most, self.request.quota - self.generated)
        self._limit = "context" if room < most else "length"
        budget = max(0, min(most, room))
        if not budget:
            self._close(self._limit)
            return 0
        if kept < length:
            decoder.crop(row, kept, held[kept])
            self.reread_tokens = min(length, len(ids)) - kept
        if decoder.prompts.rollback.is_lost(row):
            self.reread_tokens += kept
        self._start = kept, held[kept] if held else ids[0]
        return budget

    def take_first_token(self, token: int, logprobs: Sequence[TokenLogprobs]) -> None:
        """Take the token that the prefill drew; it belongs to no round."""
        self._logprobs += logprobs
        ends = () if self.config.ignore_eos else self.decoder.target.ends
        self._take([token], ended=token in ends)

    def take_round(self, outcome: RowOutcome) -> None:
        """Take what a round emitted."""
        position = self.generated
        kept = self._take(outcome.tokens, ended=outcome.ended)
        self._logprobs += outcome.logprobs[:kept]
        self.rounds.append(
            Round(
                position=position,
                proposed=outcome.proposed,
                accepted=min(outcome.accepted, kept),
                emitted=kept,
                updates=int(outcome.updated),
                seconds=outcome.seconds,
                length=outcome.length,
                copied=outcome.copied,
            )
        )

    def cancel(self) -> None:
        """End the answer as it is; what the decoder knows beyond it is taken back.

        One that was not begun ends as well, without a token.
        """
        if self.queued is not None:
            self._reset()
            self.prompt_ids, self.queued = list(self.queued), None
        elif self.row >= 0:
            length, pending = self._start
            if self.tokens:
                length += len(self.prompt_ids) + len(self.tokens) - 1
                pending = self.tokens[-1]
            self.decoder.crop(self.row, length, pending)
            if self._stream:  # an interrupt may have come after a token's text, before the token
                self._text = self._text.anew(self.tokens)
        self._close("cancelled")

    def chunk(self) -> Chunk:
        """What is new since the last chunk that was sent; the result too if the answer is over."""
        new = self.tokens[self._shown :]
        return Chunk(
            text=self._text.peek(final=self.finish is not None) if self._stream else "",
            token_ids=tuple(new),
            round=self.rounds[-1] if self.rounds and new else None,
            result=self._result() if self.finish else None,
            logprobs=tuple(self._logprobs),
        )

    def mark_sent(self, chunk: Chunk) -> None:
        """Count a chunk as sent. Apart, since an interrupt may come while it is made."""
        self._shown += len(chunk.token_ids)
        self._text.skip(len(chunk.text))
        del self._logprobs[: len(chunk.logprobs)]
        self.is_sent = chunk.result is not None

    def _reset(self) -> None:
        """Nothing is written of the next answer."""
        self.finish: FinishReason | None = None
        """Why the last answer ended; None while one is being written."""
        self.is_sent = False
        """Whether its result was sent."""
        self.tokens: list[int] = []
        self.rounds: list[Round] = []
        self._logprobs: list[TokenLogprobs] = []
        """Of what was not given out yet."""
        target = self.decoder.target
        self._text = TextStream(target.tokenizer, self.config.stop, target.ends)
        self._shown = self._reverts = self.reread_tokens = 0
        self._began = time.perf_counter()

    def _take(self, tokens: list[int], *, ended: bool) -> int:
        """Append tokens up to a stop; returns how many were kept."""
        kept, stopped, decoder, row = len(tokens), False, self.decoder, self.row
        if self._stream:
            for i, token in enumerate(tokens):
                if self._text.push(token):
                    kept, stopped = i + 1, True
                    break
        self.tokens += tokens[:kept]
        self.generated += kept
        if kept < len(tokens):
            over = len(tokens) - kept
            decoder.crop(row, decoder.rows.lengths[row] - over, tokens[kept - 1])
        is_over = ended or not decoder.rows.budget[row]
        if stopped or (is_over and self._stream and self._text.end()):
            self._close("stop")
        elif ended:
            self._close("eos")
        elif not decoder.rows.budget[row]:
            self._close(self._limit)
        return kept

    def _close(self, reason: FinishReason) -> None:
        if self.row >= 0:
            self.decoder.rest(self.row)
        self._seconds = time.perf_counter() - self._began
        self.turn += 1
        self.finish = reason  # last: after an interrupt, what is not finished is cancelled

    def _result(self) -> Result:
        assert self.finish is not None
        text = self._text.text
        if not self._stream:
            shown = [t for t in self.tokens if t not in self.decoder.target.ends]
            text = self.decoder.target.tokenizer.decode(shown, skip_special_tokens=True)
        learner = self.decoder.learner
        stats = summarise(
            self.rounds,
            token_ids=self.tokens,
            prompt_tokens=len(self.prompt_ids),
            seed=self.request.seed,
            seconds=self._seconds,
            reverts=learner.reverts[self.row] - self._reverts if learner and self.row >= 0 else 0,
            thinking=self.request.thinking,
            reread_tokens=self.reread_tokens,
        )
        return Result(
            text=text,  # type: ignore[arg-type]
            token_ids=list(self.tokens),
            finish_reason=self.finish,
            stats=stats,
            rounds=list(self.rounds),
            prompt_ids=list(self.prompt_ids),
        )


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def noise_key(seed: int, first_prompt: Sequence[int], occurrence: int = 0, *, turn: int = 0) -> int:
    """Noise key of an answer, 64 bits: from the seed, the conversation's first prompt, the turn.

    It does not depend on what else is in the batch. Equal prompts of one call differ by
    `occurrence`, or they would get equal answers.
    """
    text = f"{seed} {list(first_prompt)} {occurrence} {turn}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
