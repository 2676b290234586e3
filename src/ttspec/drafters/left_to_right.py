"""What DSpark and Domino share: DFlash's body, and a head in which drafts depend on each other.

The body says of all places in a block at once what may stand there. The head then goes from left to
right: the tokens that were chosen before correct the next one's logits. So what a draft is drawn
from is known only when those before it are drawn, and is what it is judged by.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ttspec.drafters.blocks import Choices
from ttspec.drafters.dflash import DFlash
from ttspec.drafters.layers import Weights, cut_or_padded, project


class LeftToRight(DFlash):
    """DFlash with a head that corrects each slot's logits by the tokens before it."""

    last: str
    """Name, without `.weight`, of the matrix that makes corrections: [V_draft, r]."""

    @property
    def recurrent(self) -> bool:
        """Whether a slot's correction needs more than the token before it."""
        return True

    @abstractmethod
    def latent(
        self, weights: Weights, states: Tensor, previous: Tensor, memory: Tensor | None, slot: int
    ) -> tuple[Tensor, Tensor | None]:
        """What the matrix `last` reads, and what a recurrent head remembers.

        Args:
            weights: The live ones.
            states: [B, A, T, H] that the target's head reads.
            previous: int64 [B, A, T], the tokens before.
            memory: Of the slot before; None at the first slot.
            slot: Index of the first of these T slots; T is 1 if the head is recurrent.

        Returns:
            [B, A, T, r], and the memory.
        """

    def corrected(self, weights: Weights, scores: Tensor, latent: Tensor) -> Tensor:
        """Logits of scores [B, A, T, V_draft] and what the head says of latent [B, A, T, r]."""
        correction = project(weights, self.last, latent)
        return self.scaled(scores + cut_or_padded(correction, scores.shape[-1]))

    def _choose(self, weights: Weights, states: Tensor, tokens: Tensor, choices: Choices) -> None:
        scores, memory = self.scores(states), None
        for i in range(states.shape[2]):
            at = slice(i, i + 1)
            previous = tokens[..., None]
            latent, memory = self.latent(weights, states[:, :, at], previous, memory, i)
            tokens = choices(self.corrected(weights, scores[:, :, at], latent)[:, 0], i)

    def next_token_logits(self, weights: Weights, states: Tensor, tokens: Tensor) -> Tensor:
        """See `FeatureDrafter.next_token_logits`."""
        length, memory, latents = states.shape[2], None, list[Tensor]()
        step = 1 if self.recurrent else length
        for i in range(0, length, step):
            at = slice(i, i + step)
            latent, memory = self.latent(weights, states[:, :, at], tokens[..., at], memory, i)
            latents.append(latent)
        return self.corrected(weights, self.scores(states), torch.cat(latents, dim=2))
