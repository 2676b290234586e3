"""The rows' texts on the device, for penalties: every drafted token counts for those after it.

A text lies there by position, as keys do in a cache, and the host's lengths say how much of it is
there. So rows that are cropped, interrupted or used again need no care, and nothing is counted
that could be counted wrong: what a round needs to know of its text it reads from the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from ttspec.compiled import of_any_size
from ttspec.config import GenerateConfig, SamplingConfig
from ttspec.decoding.rows import Processors
from ttspec.errors import OptionError
from ttspec.models.target import Target
from ttspec.penalties import ANY, Rules, penalise


class RowPenalties:
    """What each row's own rules make of its logits.

    Tensors are made when a row first has such a rule and stay where they are: captured graphs read
    them there.
    """

    def __init__(self, target: Target, rows: int, slots: int) -> None:
        self._ends, self._size = target.ends, int(target.config.vocab_size)
        self._rows, self._slots, self._device = rows, slots, target.device
        self._of_row: list[Rules | None] = [None] * rows
        self._tensors: dict[str, Tensor] = {}
        self._end_mask: Tensor
        self.words = 0, 0
        """Words that a row may have, and their tokens but the last: never less than before."""
        self._text: Tensor
        """int64 [B, slots + 1], by position; the last place takes what falls outside."""
        self._answer: Tensor
        """int64 [B], where each row's answer begins."""

    def set(self, row: int, sampling: SamplingConfig) -> None:
        """Let a row have a request's rules."""
        rules = Rules.of(sampling, self._ends, self._size, self._device)
        before, self._of_row[row] = self._of_row[row], rules
        if rules is not None and not self._tensors:
            self._end_mask = rules.ends
            self._text = self._end_mask.new_zeros(self._rows, self._slots + 1, dtype=torch.long)
            self._answer = self._text.new_zeros(self._rows)
        if rules is not None and rules.words is not None:
            self._make_room(*rules.words.shape[1:])
        for name in names_of(before) | names_of(rules):
            self._write(name, row)

    def names(self, row: int) -> frozenset[str]:
        """Rules that a row has."""
        return names_of(self._of_row[row])

    def begin(self, rows: list[int], texts: Sequence[Sequence[int]]) -> None:
        """Answers begin after these texts: all that their rows hold, earlier turns too."""
        for row, text in zip(rows, texts, strict=True):
            self._text[row, : len(text)] = torch.tensor(text, device=self._device)
        self._answer[torch.tensor(rows, device=self._device)] = torch.tensor(
            [len(text) for text in texts], device=self._device
        )

    def write(self, tokens: Tensor, first: Tensor) -> None:
        """Put tokens int64 [B, T] of all rows at the positions from `first` int64 [B] on.

        They count for what is asked behind them, until others are written there.
        """
        position = first[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self._text.scatter_(1, position.clamp(max=self._text.shape[1] - 1), tokens)

    def __call__(
        self,
        logits: Tensor,
        end: Tensor,
        longest: int,
        processors: Processors,
        subset: Tensor | slice = slice(None),
    ) -> Tensor:
        """Penalised logits float32 [B, T, V], of which column j is about the token at `end` + j.

        What stands before `end` int64 [B] is known; `longest` is the largest, known on the host.
        `subset` int64 [B] are the rows meant.
        """
        text = self._text[:, : longest + logits.shape[1] - 1][subset]
        of_rows = {n: t[subset] for n, t in self._tensors.items() if n in processors.names}
        rules = Rules(**of_rows, most_ngram=processors.most_ngram, ends=self._end_mask)
        return penalise(logits, of_any_size(text, 1), end, self._answer[subset], rules)

    def _write(self, name: str, row: int) -> None:
        """Bring one of a row's values to its place; without it, what changes nothing."""
        rules = self._of_row[row]
        neutral = self._size if name == "word_ends" else NEUTRAL.get(name, 0)
        value = None if rules is None else getattr(rules, name)
        if name not in self._tensors:
            assert value is not None
            shape = {"words": self.words, "word_ends": self.words[:1]}.get(name, value.shape[1:])
            self._tensors[name] = value.new_full((self._rows, *shape), neutral)
        place = self._tensors[name][row].fill_(neutral)
        if value is not None:
            many = tuple(slice(size) for size in value.shape[1:2])
            last = tuple(slice(-size, None) for size in value.shape[2:])
            place[many + last] = value[0]

    def _make_room(self, words: int, tokens: int) -> None:
        """Have room for so many banned words of so many tokens; graphs of less are done with."""
        room = max(self.words[0], words), max(self.words[1], tokens)
        if room == self.words:
            return
        self.words = 1 << (room[0] - 1).bit_length(), 1 << (room[1] - 1).bit_length()
        for name in self._tensors.keys() & {"words", "word_ends"}:
            del self._tensors[name]
        for row, rules in enumerate(self._of_row):
            for name in names_of(rules) & {"words", "word_ends"}:
                self._write(name, row)


NEUTRAL = {"repetition": 1.0, "words": ANY}
"""What changes nothing, where it is not 0."""
RULES = frozenset(field.name for field in fields(Rules)) - {"most_ngram", "ends"}


def names_of(rules: Rules | None) -> frozenset[str]:
    """Rules that a request has."""
    return frozenset(name for name in RULES if getattr(rules, name, None) is not None)


def penalises(processors: Processors) -> bool:
    """Whether some row has a rule."""
    return not RULES.isdisjoint(processors.names)


def sampling_of(config: GenerateConfig, target: Target) -> SamplingConfig:
    """How a target's tokens are chosen: what was asked, and its own defaults for the rest.

    Bad words that are texts become tokens: as they stand in a text, and after a space.

    Raises:
        OptionError: A token is none of the target's.
    """
    words: list[tuple[int, ...]] = []
    for word in config.bad_words:
        bare = word.lstrip() or word
        for text in (bare, " " + bare):
            ids = target.tokenizer(text, add_special_tokens=False)["input_ids"]
            words.append(tuple(ids))  # type: ignore[arg-type]
    sampling = config.sampling(target.defaults, bad_words=[w for w in words if w])
    size = int(target.config.vocab_size)
    for name, tokens in sampling.tokens_named().items():
        wrong = next((token for token in tokens if token >= size), None)
        if wrong is not None:
            raise OptionError(
                f"{name} names the token {wrong}; the target has {size}, from 0.\n"
                "Give tokens of its tokenizer."
            )
    return sampling
