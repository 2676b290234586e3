"""What the target itself says of the tokens of an answer: log-probabilities.

They are of the target's own logits, before penalties, bans, masks, temperature and filters, as
in OpenAI's API and vLLM (`raw_logprobs`): so they do not depend on how tokens are chosen, nor on
what was drafted.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ttspec.records import TokenLogprobs


class RowLogprobs:
    """Which rows ask for them, and how many likely tokens beside each that came."""

    def __init__(self, rows: int) -> None:
        self._most: list[int | None] = [None] * rows

    def set(self, row: int, most: int | None) -> None:
        """Ask for a row's tokens and the `most` likeliest in each place; None asks for none."""
        self._most[row] = most

    def asked(self, rows: Sequence[int]) -> bool:
        """Whether one of these rows asks for them."""
        return any(self._most[row] is not None for row in rows)

    def of(
        self, row: int, logits: Tensor, at: int, tokens: Sequence[int]
    ) -> tuple[TokenLogprobs, ...]:
        """Those of tokens that came in a row; none if none are asked for.

        Its logits [B, T, V] of the target are those `at` this index; each token was chosen from
        one, in order.
        """
        most = self._most[row]
        if most is None or not tokens:
            return ()
        logprobs = logits[at, : len(tokens)].float().log_softmax(-1)
        chosen = logprobs.gather(-1, logprobs.new_tensor(tokens).long()[:, None])[:, 0].tolist()
        best = logprobs.topk(most, dim=-1)
        pairs = zip(chosen, best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple(
            TokenLogprobs(value, tuple(zip(ids, values, strict=True)))
            for value, ids, values in pairs
        )
