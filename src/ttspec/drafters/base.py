"""What every drafter is: taps, weights by published name, and four verbs.

Weights are plain tensors in a dict. A weight is either shared by all rows, with its published
shape, or one per row, with a leading row dimension: that is how many rows learn side by side. A
drafter never holds the target; it is bound once to the target's embedding and head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.config import DraftConfig
from ttspec.records import Proposal, Verification

Weights = Mapping[str, Tensor]
Choose = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
"""(logits [B, g, V], index of the first drafted token) -> tokens int64 [B, g], q or None."""


@dataclass(slots=True)
class DraftState:
    """What belongs to the rows; a drafter adds the context as it sees it."""

    weights: Weights
    """The live weights, shared by all rows or one per row."""
    options: DraftConfig

    @property
    def nbytes(self) -> int:
        """Bytes of the context."""
        held = [getattr(self, f.name) for f in fields(self)]
        return sum(t.nbytes for t in held if isinstance(t, Tensor))


class Drafter(ABC):
    """Anything that proposes tokens and may learn to do it better."""

    kind: str
    name: str
    path: Path | None
    config: Mapping[str, Any]
    """The checkpoint's config.json."""
    taps: tuple[int, ...]
    """Hidden states to read, as indices into the target's `hidden_states` tuple."""
    length: int
    """Tokens drafted a round unless told otherwise."""
    weights: dict[str, Tensor]
    """The anchor weights: what the checkpoint holds, under its names."""

    @abstractmethod
    def bind(self, embedding: Tensor, head: Tensor, taps_width: int) -> None:
        """Receive the target's embedding and head [V, H]; refuse a target that does not fit."""

    @abstractmethod
    def start(self, rows: int, slots: int, options: DraftConfig) -> DraftState:
        """An empty context for `rows` rows, with the anchor weights."""

    @abstractmethod
    def extend(
        self,
        state: DraftState,
        tokens: Tensor,
        features: Tensor,
        start: Tensor,
        subset: Tensor | None = None,
    ) -> None:
        """Make verified tokens context.

        Args:
            state: Changed at the slots of these tokens only.
            tokens: int64 [B, T].
            features: [B, T, W] of the same tokens.
            start: int64 [B], position of each row's first token.
            subset: int64 [B], the rows meant; None is all.
        """

    @abstractmethod
    def propose(
        self,
        state: DraftState,
        pending: Tensor,
        start: Tensor,
        count: Tensor,
        length: int,
        longest: int,
        choose: Choose,
    ) -> Proposal:
        """Draft `length` tokens a row, of which `count` int64 [B] will be used.

        Args:
            state: Context up to, not including, the pending token.
            pending: int64 [B], the last committed token, at position `start` int64 [B].
            start: See `pending`.
            count: How many drafts of each row are meant.
            length: Width of the proposal.
            longest: The largest start, known on the host.
            choose: Turns logits into tokens, and says from what q.
        """

    @abstractmethod
    def replay(
        self, state: DraftState, tokens: Tensor, start: Tensor, length: int, longest: int
    ) -> Tensor:
        """Draft logits as `propose` would compute them now, with gradients to `state.weights`.

        Args:
            state: Context at and past a block's start is not looked at.
            tokens: int64 [B, A], the pending token of each of A blocks a row.
            start: int64 [B, A], its position.
            length: Drafted rows per block.
            longest: The largest start, known on the host.

        Returns:
            [B, A, length, V]: row j predicts the token at start + j + 1.
        """

    @abstractmethod
    def learnable(self, parameters: str) -> list[str]:
        """Names of the weights that learn under a `LearnConfig.parameters` choice."""

    def absorb(self, state: DraftState, verification: Verification) -> None:
        """Make what a round committed context; what it rejected stays outside every row."""
        self.extend(state, verification.fed, verification.features, verification.start)

    @property
    def parameters(self) -> int:
        """Number of own parameters."""
        return sum(w.numel() for w in self.weights.values())


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """X [B, ..., in] times one weight [out, in], or one per row [B, out, in]."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    if weight.shape[0] == 1:
        return F.linear(x, weight[0])
    return torch.bmm(x.flatten(1, -2), weight.mT).unflatten(1, x.shape[1:-1])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in float32; weight [H], or one per row [B, H]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight.dim() == 2:
        weight = weight.view(weight.shape[0], *[1] * (x.dim() - 2), -1)
    return weight * wide.to(x.dtype)


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary embedding, half-rotation form.

    Args:
        x: [B, heads, T, D].
        position: int64 [B, T]. Angles are computed, not looked up: no table can be too short.
        theta: Base.
    """
    half = x.shape[-1] // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angle = position[:, None, :, None].float() * theta**-steps  # [B, 1, T, D/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
