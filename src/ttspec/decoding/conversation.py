"""One row's conversation on the host: turns, answers, where an answer ends, and its statistics."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

from ttspec.config import GenerateConfig
from ttspec.decoding.round import Decoder, Outcome
from ttspec.decoding.text import TextStream
from ttspec.records import Chunk, FinishReason, Result, Round, summarise


class Conversation:
    """A row of a decoder with the turns it has had."""

    def __init__(
        self, decoder: Decoder, row: int, config: GenerateConfig, seed: int, *, stream: bool = True
    ) -> None:
        """Start an empty conversation; without `stream`, text comes only with the result."""
        self.decoder, self.row, self.config, self.seed = decoder, row, config, seed
        self.quota: int | None = None
        """Tokens that all turns together may have; None is no limit."""
        self.thinking: bool | None = None
        """Whether the chat template asks the target to think; None where it has no switch."""
        self.turn = 0
        self.generated = 0
        """Generated tokens of all turns: the position of the next one."""
        self.finish: FinishReason | None = None
        self.opened = False
        """A first answer was begun."""
        self.tokens: list[int] = []
        self._stream = stream or bool(config.stop)
        self._first: tuple[tuple[int, ...], int] = (), 0

    def key(self, ids: Sequence[int], occurrence: int = 0) -> int:
        """Noise key of this turn; see `noise_key`."""
        if not self.turn:
            self._first = tuple(ids), occurrence
        return noise_key(self.seed, *self._first, turn=self.turn)

    def open(self, ids: list[int]) -> int:
        """Begin an answer to `ids`; the number of tokens it may have, 0 if none."""
        self.prompt_ids, self.tokens, self.rounds = ids, [], []
        self.finish, self.opened = None, True
        self._text = TextStream(
            self.decoder.target.tokenizer, self.config.stop, self.decoder.target.ends
        )
        self._shown = 0
        self._start = self.decoder.lengths[self.row], self.decoder.pending[self.row]
        self._began = time.perf_counter()
        learner = self.decoder.learner
        if learner and self.turn and learner.config.scope == "request":
            learner.reset(self.row)
        self._reverts = learner.reverts[self.row] if learner else 0
        room = self.decoder.slots - self.decoder.lengths[self.row] - len(ids)
        most = self.config.max_new_tokens
        if self.quota is not None:
            most = min(most, self.quota - self.generated)
        self._limit: FinishReason = "context" if room < most else "length"
        budget = max(0, min(most, room))
        if not budget:
            self._close(self._limit)
        return budget

    def first(self, token: int) -> None:
        """Take the token that the prefill drew; it belongs to no round."""
        self._take([token], ended=token in self.decoder.ends)

    def advance(self, outcome: Outcome) -> None:
        """Take what a round committed."""
        position = self.generated
        kept = self._take(outcome.tokens, ended=outcome.ended)
        self.rounds.append(
            Round(
                position=position,
                proposed=outcome.proposed,
                accepted=min(outcome.accepted, kept),
                emitted=kept,
                updates=int(outcome.updated),
                seconds=outcome.seconds,
                length=outcome.length,
            )
        )

    def cancel(self) -> None:
        """End the answer as it is; what the decoder knows beyond it is taken back."""
        length, pending = self._start
        if self.tokens:
            length += len(self.prompt_ids) + len(self.tokens) - 1
            pending = self.tokens[-1]
        self.decoder.crop(self.row, length, pending)
        self._close("cancelled")

    def chunk(self) -> Chunk:
        """What is new since the last chunk; with the result if the answer is over."""
        new = self.tokens[self._shown :]
        self._shown = len(self.tokens)
        text = self._text.take(final=self.finish is not None) if self._stream else ""
        return Chunk(
            text=text,
            token_ids=tuple(new),
            round=self.rounds[-1] if self.rounds and new else None,
            result=self._result() if self.finish else None,
        )

    def _take(self, tokens: list[int], *, ended: bool) -> int:
        """Append tokens up to a stop; returns how many were kept."""
        kept = len(tokens)
        stopped = False
        if self._stream:
            for i, token in enumerate(tokens):
                if self._text.push(token):
                    kept, stopped = i + 1, True
                    break
        self.tokens += tokens[:kept]
        self.generated += kept
        if kept < len(tokens):
            decoder, over = self.decoder, len(tokens) - kept
            decoder.crop(self.row, decoder.lengths[self.row] - over, tokens[kept - 1])
        if stopped:
            self._close("stop")
        elif ended:
            self._close("eos")
        elif not self.decoder.budget[self.row]:
            self._close(self._limit)
        return kept

    def _close(self, reason: FinishReason) -> None:
        self.finish = reason
        self.turn += 1
        self.decoder.rest(self.row)
        self._seconds = time.perf_counter() - self._began

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
            seed=self.seed,
            seconds=self._seconds,
            reverts=learner.reverts[self.row] - self._reverts if learner else 0,
            thinking=self.thinking,
        )
        return Result(
            text=text,  # type: ignore[arg-type]
            token_ids=list(self.tokens),
            finish_reason=self.finish,
            stats=stats,
            rounds=list(self.rounds),
            prompt_ids=list(self.prompt_ids),
        )


def noise_key(seed: int, first_prompt: Sequence[int], occurrence: int = 0, *, turn: int = 0) -> int:
    """Noise key of an answer, 64 bits: from the seed, the conversation's first prompt, the turn.

    It does not depend on what else is in the batch. Equal prompts of one call differ by
    `occurrence`, or they would get equal answers.
    """
    text = f"{seed} {list(first_prompt)} {occurrence} {turn}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def begin(decoder: Decoder, turns: Sequence[tuple[Conversation, list[int], int]]) -> None:
    """Begin answers side by side: (conversation, tokens to feed, occurrence of the prompt)."""
    live = [(c, ids, n, budget) for c, ids, n in turns if (budget := c.open(ids))]
    if not live:
        return
    first = decoder.prefill(
        [c.row for c, *_ in live],
        [ids for _, ids, *_ in live],
        [c.key(ids, n) for c, ids, n, _ in live],
        [budget for *_, budget in live],
    )
    for (conversation, *_), token in zip(live, first, strict=True):
        conversation.first(token)


def advance(decoder: Decoder, conversations: Sequence[Conversation]) -> None:
    """One round for the answers that are not over."""
    going = [c for c in conversations if not c.finish]
    if going:
        outcomes = decoder.round()
        for conversation in going:
            conversation.advance(outcomes[conversation.row])
