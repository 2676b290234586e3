"""The rows' texts on the device, for penalties: every drafted token counts for those after it.

A text lies there by position, as keys do in a cache, and the host's lengths say how much of it is
there. So rows that are cropped, interrupted or used again need no care, and nothing is counted
that could be counted wrong: what a round needs to know of its text it reads from the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttspec.compiled import of_any_size
from ttspec.config import GenerateConfig, SamplingConfig
from ttspec.errors import OptionError
from ttspec.models.target import Target
from ttspec.penalties import Rules, penalise


class RowPenalties:
    """What the rules of a decoder make of logits, row by row."""

    def __init__(self, rules: Rules, rows: int, slots: int, device: torch.device) -> None:
        """All rows are empty."""
        self._rules = rules
        # Made here and never replaced: captured graphs read them where they are.
        self._text = torch.zeros(rows, slots + 1, dtype=torch.long, device=device)
        """By position; the last place takes what falls outside."""
        self._answer = torch.zeros(rows, dtype=torch.long, device=device)
        """Where each row's answer begins."""

    @classmethod
    def of(
        cls, sampling: SamplingConfig, target: Target, rows: int, slots: int
    ) -> RowPenalties | None:
        """For a decoder; None where nothing is penalised."""
        rules = Rules.of(sampling, target.ends, int(target.config.vocab_size), target.device)
        return None if rules is None else cls(rules, rows, slots, target.device)

    def begin(self, rows: list[int], texts: Sequence[Sequence[int]]) -> None:
        """Answers begin after these texts: all that their rows hold, earlier turns too."""
        device = self._text.device
        for row, text in zip(rows, texts, strict=True):
            self._text[row, : len(text)] = torch.tensor(text, device=device)
        self._answer[torch.tensor(rows, device=device)] = torch.tensor(
            [len(text) for text in texts], device=device
        )

    def write(self, tokens: Tensor, first: Tensor) -> None:
        """Put tokens int64 [B, T] of all rows at the positions from `first` int64 [B] on.

        They count for what is asked behind them, until others are written there.
        """
        position = first[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self._text.scatter_(1, position.clamp(max=self._text.shape[1] - 1), tokens)

    def __call__(
        self, logits: Tensor, end: Tensor, longest: int, subset: Tensor | None = None
    ) -> Tensor:
        """Penalised logits.

        Args:
            logits: [B, T, V]: column j is about the token at position end + j.
            end: int64 [B]; what stands before it is known.
            longest: The largest end, known on the host.
            subset: int64 [B], the rows meant; None is all.

        Returns:
            float32 [B, T, V].
        """
        text, answer = self._text[:, : longest + logits.shape[1] - 1], self._answer
        if subset is not None:
            text, answer = text[subset], answer[subset]
        return penalise(logits, of_any_size(text, 1), end, answer, self._rules)


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
