"""Answers that are JSON of a given schema: what may come next, token by token.

llguidance was chosen over xgrammar because it refuses by name what it cannot keep to; measured in
docs/experiments.md. Runs where prompts are written (compiling) and in the engine's thread (masks).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from ttspec.serving.errors import ApiError, bad_request
from ttspec.serving.logs import log
from ttspec.serving.schema import ResponseFormat

WHITE_SPACE = r"[ \n\r\t]{0,12}"
"""Between two parts of an answer. Without a bound, small models write spaces for ever."""


class Grammars:
    """Compiles schemas for one tokenizer, and knows the bytes of its tokens."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Collection[int]) -> None:
        """Read a fast tokenizer's vocabulary, which takes a second; `vocabulary` is of the logits.

        `ends` are end tokens, which may come once an answer is whole.
        """
        self._tokenizer: LLTokenizer = from_tokenizer(
            tokenizer, n_vocab=vocabulary, eos_token=sorted(ends)
        )

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for; half a character, perhaps."""
        return self._tokenizer.decode_bytes([token])

    def mask(self, form: ResponseFormat, begins_after: int | None = None) -> GrammarMask:
        """What an answer may be made of: an object, or what a schema says.

        Before the token `begins_after`, the end of a thought, nothing is masked.

        Raises:
            ApiError: The schema is none, or says what cannot be kept to.
        """
        schema: dict[str, Any] = {"type": "object"}
        if form.json_schema is not None:
            schema = form.json_schema.schema_
        options: Any = {"whitespace_pattern": WHITE_SPACE}
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=options)
        except (ValueError, RecursionError) as error:
            raise _unsupported_schema(str(error)) from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _unsupported_schema(matcher.get_error())
        matcher.compute_bitmask()
        if matcher.is_error():  # as of a schema that only refers to itself
            raise _unsupported_schema("no text could begin an answer")
        return GrammarMask(matcher, begins_after)


class GrammarMask:
    """One answer's `LogitMask`. Its state is that of the accepted text; drafts leave no trace."""

    def __init__(self, matcher: LLMatcher, begins_after: int | None = None) -> None:
        """Nothing was written; arguments as in `Grammars.mask`."""
        self._matcher, self._begins_after = matcher, begins_after
        self._read = 0
        """Tokens of the text that the matcher has read, or that came before it begins."""
        self._begun = begins_after is None
        self.failed = False
        """Whether the grammar could not be followed: what comes then is nothing."""

    def copy(self) -> GrammarMask:
        """The same for another answer, of which nothing was written."""
        return GrammarMask(self._matcher.deep_copy(), self._begins_after)

    def fill(self, bitmask: Tensor, text: Sequence[int], drafted: Sequence[int]) -> None:
        """See `ttspec.records.LogitMask`."""
        for token in text[self._read :]:
            self._take(token)
        self._read = len(text)
        begun, taken = self._begun, 0
        for row, token in enumerate([*drafted, None]):
            if self._begun:
                bitmask[row] = self._allowed()[: bitmask.shape[1]]  # it may have a word more
            if token is None:
                break
            if self._begun and not self._matcher.is_stopped():
                if self._matcher.try_consume_tokens([token]) != 1:
                    break
                taken += 1
            self._begun = self._begun or token == self._begins_after
        if taken and not self._matcher.rollback(taken):
            self._fail()
        self._begun = begun

    def _take(self, token: int) -> None:
        # Behind a whole answer there are end tokens only, which a request may ask to ignore.
        over = self._matcher.is_stopped()
        if self._begun and not over and not self._matcher.consume_token(token):
            self._fail()
        self._begun = self._begun or token == self._begins_after

    def _allowed(self) -> Tensor:
        bits = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            self._fail()
        row = torch.frombuffer(bits, dtype=torch.int32)
        return torch.zeros_like(row) if self.failed else row

    def _fail(self) -> None:
        """No exception: it would end the round of all rows."""
        if not self.failed:
            log.error("a grammar failed", extra={"event": "grammar_failed"})
        self.failed = True


def _unsupported_schema(reason: str) -> ApiError:
    first = next(iter(reason.strip().splitlines()), "it is no JSON schema")
    return bad_request(f"The schema cannot be kept to: {first[:300]}.", "response_format")
