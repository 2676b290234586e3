"""What a recipe of training is: how a new drafter begins, and what a step's loss is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from ttspec.compiled import compiling
from ttspec.config import DraftConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.blocks import Blocks
from ttspec.drafters.context import context_of_texts
from ttspec.drafters.rotary import DEFAULT_BASE, rope_parameters
from ttspec.errors import OptionError, ResourceError
from ttspec.free_memory import free_memory, mib
from ttspec.losses import agreement, forward_kl
from ttspec.models.target import Target
from ttspec.records import ReplayBatch
from ttspec.training.batches import Anchors, Batch, Example
from ttspec.training.config import TrainConfig
from ttspec.training.states import TargetStates

LEAST_LAYERS = 5
"""Fewer have no place for three taps."""
SMALLER_STEP = "Use a smaller --batch, --anchors or --max-length, or more memory."
D = TypeVar("D", bound=Drafter)


class Recipe(ABC, Generic[D]):
    """How one kind is trained."""

    kind: ClassVar[str]
    """Of the drafter."""
    lr: ClassVar[float] = 6e-4
    """Peak learning rate where `TrainConfig` names none."""
    wide: ClassVar[int] = 3
    """Tensors over the vocabulary that a step holds: logits of target and drafter, and a gradient;
    a second head adds its own."""
    states: TargetStates
    """What the target says of the examples; given before the first step."""

    def __init__(self, target: Target, config: TrainConfig) -> None:
        self.target, self.config = target, config
        self.layers = int(target.config.num_hidden_layers)
        if self.layers < LEAST_LAYERS:
            raise OptionError(
                f"The target has {self.layers} layers; a drafter can be trained for one of "
                f"{LEAST_LAYERS} or more.\nGive another --target."
            )

    @abstractmethod
    def new(self, examples: list[Example]) -> D:
        """A drafter that knows nothing yet."""

    @abstractmethod
    def loss(self, drafter: D, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a batch, float32 [], and by place the share [G] of right likeliest tokens."""

    def replayed(self, drafter: Any, batch: Batch, blocks: Anchors, features: Tensor) -> Tensor:
        """What a drafter's head reads of blocks of whole texts, [N, A, length, H]."""
        row = torch.arange(len(features), device=features.device)[:, None]
        length, before = blocks.labels.shape[-1], features[row, blocks.start - 1]
        context = context_of_texts(
            drafter, drafter.weights, batch.ids, features, DraftConfig(), length
        )
        lesson = ReplayBatch.of(blocks.text, blocks.start, before, blocks.mask)
        places = Blocks(blocks.tokens, blocks.start, length, features.shape[1])
        return drafter.replayed(context, lesson, places)

    def drafted(self, longest: int) -> int:
        """Tokens of a dialogue of `longest` that a step drafts."""
        return min(self.config.anchors, longest) * max(self.config.block - 1, 1)

    def step_bytes(self, longest: int) -> int:
        """Bytes of a step at its height, on dialogues of `longest` tokens.

        Every state between the target's layers; and what is as wide as the vocabulary, of all that
        is drafted.
        """
        text, size = self.target.config, self.target.dtype.itemsize
        states = (self.layers + 1) * int(text.hidden_size)
        logits = self.wide * int(text.vocab_size) * self.drafted(longest)
        return self.config.batch * size * (longest * states + logits)

    def notice(self) -> str | None:
        """What should be told before hours are spent on answers: a step may not fit."""
        c, device = self.config, self.target.device
        need, free = self.step_bytes(c.max_length), free_memory(device)
        if free is None or need <= free:
            return None
        return (
            f"A step on {c.batch} dialogues of {c.max_length:,} tokens takes {mib(need)}; "
            f"{device.type}: {mib(free)} free. It will do if answers are shorter. {SMALLER_STEP}"
        )

    def require_room(self, trained: Iterable[Tensor], longest: int) -> int:
        """Refuse training that does not fit, before anything of it is made.

        `longest` are the tokens of the longest example.

        Returns:
            The bytes that it takes.

        Raises:
            ResourceError: There is less memory than it takes.
        """
        free, device = free_memory(self.target.device), self.target.device
        masters = 16 * sum(w.numel() for w in trained)  # float32, with gradients and two moments
        step = self.step_bytes(longest)
        if free is None or masters + step <= free:
            return masters + step
        raise ResourceError(
            f"Training takes {mib(masters + step)} (weights and moments {mib(masters)}, a step on "
            f"{self.config.batch} dialogues of up to {longest:,} tokens {mib(step)}); "
            f"{device.type}: {mib(free)} free.\n{SMALLER_STEP}"
        )

    def trained(self, drafter: D) -> list[str]:
        """Names of the weights that train: all but what the target lends."""
        lent = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d")
        return [n for n in drafter.weights if not n.endswith(lent)]

    def layer_config(self) -> dict[str, Any]:
        """Config entries of a layer shaped like the target's."""
        c = self.target.config
        heads = int(c.num_attention_heads)
        return {
            "hidden_size": int(c.hidden_size),
            "intermediate_size": int(c.intermediate_size),
            "num_attention_heads": heads,
            "num_key_value_heads": int(c.num_key_value_heads),
            "head_dim": int(getattr(c, "head_dim", None) or c.hidden_size // heads),
            "rms_norm_eps": float(c.rms_norm_eps),
            "rope_theta": float(rope_parameters(c.to_dict()).get("rope_theta", DEFAULT_BASE)),
            "max_position_embeddings": int(c.max_position_embeddings),
            "vocab_size": int(c.vocab_size),
            "tie_word_embeddings": False,
            "attention_bias": False,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        }

    def random(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """First weights: norms of 1, the rest small."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return {
            name: torch.ones(shape)
            if len(shape) == 1
            else 0.02 * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }

    def row_loss(self, q: Tensor, states: Tensor, ids: Tensor | None = None) -> Tensor:
        """KL to the target's distribution, per row.

        Args:
            q: Draft logits [..., V_draft].
            states: What the target's head reads, [..., H], at the token before.
            ids: The target's token for each draft token; None is the same.
        """
        p = self.target.compute_logits(states)
        if ids is None:
            return kl(p, q)
        # Over the tokens that can be drafted, weighed by the target's probability of those.
        covered = p[..., ids]
        share = (covered.float().logsumexp(-1) - p.float().logsumexp(-1)).exp()
        return kl(covered, q) * share


def kl(p: Tensor, q: Tensor) -> Tensor:
    """See `forward_kl`. On a GPU most of a step goes there, so it is compiled; layers are not."""
    with compiling() if q.is_cuda else nullcontext():
        return forward_kl(p, q)


def compiled_agreement(p: Tensor, q: Tensor) -> Tensor:
    """See `agreement`; compiled in the same way."""
    with compiling() if q.is_cuda else nullcontext():
        return agreement(p, q)


def mask_token(target: Target) -> int:
    """A token that never occurs in text: padding rows first, then unused special tokens."""
    size = int(target.config.vocab_size)
    if len(target.tokenizer) < size:
        return size - 1
    special = set(target.tokenizer.all_special_ids) | set(target.ends)
    added = sorted(target.tokenizer.added_tokens_decoder)
    free = [token for token in added if token not in special]
    return free[-1] if free else max(special)
