"""What every drafter is: taps, weights by published name, and four verbs.

Weights are plain tensors in a dict. A weight is either shared by all rows, with its published
shape, or one per row, with a leading row dimension: that is how many rows learn side by side. A
drafter never holds the target; it is bound once to the target's embedding and head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.config import DraftConfig
from ttspec.drafters.layers import DOWN, UP, Weights
from ttspec.errors import CheckpointError
from ttspec.records import Lesson, Proposal, Verification

Choose = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
"""(logits [B, g, V_draft], index of the first drafted token) -> the target's tokens int64 [B, g],
and q [B, g, V] or None."""
Shapes = dict[str, tuple[int, ...]]
BEHIND = ("o_proj", ".mlp.", "post_attention_layernorm")
"""Parts of the names of weights that lie behind a layer's attention."""
CONTEXT = ("k_proj.", "v_proj.", "fc.", "target_proj.")
"""Parts of the names of matrices that make keys and values of the context."""


@dataclass(slots=True)
class DraftState:
    """What belongs to the rows; a drafter adds the context as it sees it."""

    weights: Weights
    """The live weights, shared by all rows or one per row."""
    options: DraftConfig

    @property
    def spans(self) -> bool:
        """Whether a draft costs what its context holds, however long it might be."""
        return False

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
    taps: tuple[int, ...] = ()
    """Hidden states to read, as indices into the target's `hidden_states` tuple. Final once
    bound: a default may depend on the target's number of layers."""
    length: int
    """Tokens drafted a round unless told otherwise."""
    learning_rate: float = 1e-4
    """Of online learning unless told otherwise: what measured best (docs/experiments.md)."""
    lora_rate: float = 1e-3
    """The same where low-rank changes learn."""
    weights: dict[str, Tensor]
    """The anchor weights: what the checkpoint holds, under its names."""
    facts: dict[str, str]
    """How what a checkpoint leaves open was read, for `doctor`."""
    draft_ids: Tensor | None = None
    """int64 [V_draft], ascending: the target's tokens that can be drafted; None is all."""
    embedding: Tensor
    """[V, H] of the target, once bound."""

    @abstractmethod
    def bind(
        self,
        embedding: Tensor,
        head: Tensor,
        layers: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Receive the target's embedding and head [V, H] and its number of layers.

        The weights move to the embedding's device and dtype. `tokenizer` is the target's.

        Raises:
            CheckpointError: The drafter was made for another target.
        """

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
    def _replay(self, state: DraftState, lesson: Lesson, length: int, longest: int) -> Tensor: ...

    def replay(self, state: DraftState, lesson: Lesson, length: int, longest: int) -> Tensor:
        """Draft logits as `propose` would compute them now, with gradients to `state.weights`.

        Args:
            state: Context at and past a block's start is not looked at.
            lesson: A blocks a row; of its target logits nothing is read.
            length: Drafted rows per block.
            longest: The largest start, known on the host.

        Returns:
            [B, A, length, V_draft]: row j predicts the token at start + j + 1.
        """
        if not state.options.rebase:
            return self._replay(state, lesson, length, longest)
        # Where a context token seems to be depends on the block: one block at a time.
        parts = (lesson.part(i) for i in range(lesson.start.shape[1]))
        return torch.cat([self._replay(state, p, length, longest) for p in parts], dim=1)

    def shapes(self) -> Shapes:
        """Every tensor that a checkpoint must hold, with its shape; known before loading."""
        return {}

    def optional(self) -> list[Shapes]:
        """What a checkpoint may hold besides."""
        return []

    @abstractmethod
    def learnable(self, parameters: str) -> list[str]:
        """Names of the weights that learn under a `LearnConfig.parameters` choice."""

    def matrices(self, parameters: str) -> list[str]:
        """Names of the learnable matrices that get low-rank changes, without `.weight`.

        None of those that make context, where they can be told: then its keys and values never
        come from older weights, and rows share them.
        """
        names = [n for n in self.learnable(parameters) if self.weights[n].dim() == 2]
        whole = [n for n in names if not any(part in n for part in CONTEXT)]
        return [n.removesuffix(".weight") for n in whole]

    def changes(self, parameters: str, rank: int) -> dict[str, Tensor]:
        """Low-rank changes of `matrices` that change nothing yet: {name}.down and {name}.up."""
        made: dict[str, Tensor] = {}
        noise = torch.Generator().manual_seed(0)  # the same for all rows, devices and runs
        for name in self.matrices(parameters):
            weight = self.weights[name + ".weight"]
            out, into = weight.shape
            down = torch.randn(rank, into, generator=noise) * into**-0.5
            made[name + DOWN], made[name + UP] = down.to(weight), weight.new_zeros(out, rank)
        return made

    def absorb(self, state: DraftState, verification: Verification) -> None:
        """Make what a round committed context; what it rejected stays outside every row."""
        self.extend(state, verification.fed, verification.features, verification.start)

    def catch_up(self, state: DraftState, start: Tensor, count: int) -> None:  # noqa: B027
        """Read what `absorb` left to the next proposal, if that comes late or is short.

        Args:
            state: The context.
            start: int64 [B], where each row's pending token stands; past the slots in rows at rest.
            count: Tokens before it of which some may be unread.
        """

    @property
    def parameters(self) -> int:
        """Number of own parameters."""
        return sum(w.numel() for w in self.weights.values() if w.is_floating_point())

    def widen(self, values: Tensor, other: float = -math.inf) -> Tensor:
        """Values [..., V_draft] over the target's vocabulary; `other` where none is drafted."""
        if self.draft_ids is None:
            return values
        wide = values.new_full((*values.shape[:-1], self.embedding.shape[0]), other)
        return wide.index_copy_(-1, self.draft_ids, values)

    def _require(self, what: str, ours: int, theirs: int) -> None:
        """Refuse a target that does not fit."""
        if ours != theirs:
            raise CheckpointError(
                f"Drafter {self.name} was made for a {what} of {ours}; the target has {theirs}."
                "\nGive the drafter of this target, or train one with `ttspec train`."
            )

    def _bind_taps(self, layers: int) -> None:
        """Count taps from the end where they are negative; refuse a layer that is not there."""
        self.taps = tuple(t if t >= 0 else layers + 1 + t for t in self.taps)
        if any(not 0 <= t <= layers for t in self.taps):
            raise CheckpointError(
                f"Drafter {self.name} reads the target's hidden states {list(self.taps)}; the "
                f"target has {layers} layers, from 0.\nGive the drafter of this target."
            )

    def _live(self, state: DraftState, subset: Tensor | None) -> Weights:
        """The weights of some rows; those of all rows when `subset` is None."""
        if subset is None:
            return state.weights
        mine = self.is_own
        return {k: w[subset] if mine(k, w) else w for k, w in state.weights.items()}

    def is_own(self, name: str, weight: Tensor) -> bool:
        """Whether a live weight is one per row."""
        return weight.dim() > (self.weights[name].dim() if name in self.weights else 2)


FEATURES_KEPT = 1024
"""Features of so many last tokens are at hand: more than any prefill reads at once."""


@dataclass(slots=True)
class FeatureState(DraftState):
    """Remembers the features of a row's last tokens, for drafters that set out from one."""

    slots: int
    features: Tensor
    """[B, FEATURES_KEPT + 1, W], a ring by position; the last place takes what falls outside."""
    held: Tensor
    """int64 [B, FEATURES_KEPT + 1]: the position that each place holds; -1 for none."""

    def remember(self, features: Tensor, position: Tensor, row: Tensor) -> None:
        """Keep features [B, T, W] of the tokens at position int64 [B, T] of rows int64 [B]."""
        place = (position % FEATURES_KEPT).masked_fill(position >= self.slots, FEATURES_KEPT)
        self.features[row[:, None], place] = features
        self.held[row[:, None], place] = position

    def recall(self, position: Tensor, row: Tensor) -> Tensor:
        """Features [B, T, W] of the tokens at position int64 [B, T]; zeros where not at hand."""
        place = position % FEATURES_KEPT
        there = self.held[row[:, None], place] == position
        return self.features[row[:, None], place].masked_fill(~there[..., None], 0.0)


def feature_ring(rows: int, width: int, like: Tensor) -> dict[str, Tensor]:
    """The empty fields of a `FeatureState`."""
    held = torch.full((rows, FEATURES_KEPT + 1), -1, dtype=torch.long, device=like.device)
    return {"features": like.new_zeros(rows, FEATURES_KEPT + 1, width), "held": held}


def placed(weights: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Weights on the target's device, floating ones in its dtype."""
    return {k: w.to(like if w.is_floating_point() else like.device) for k, w in weights.items()}
