"""What every drafter is: taps, weights by published name, and what is asked of them in a round.

Weights are plain tensors in a dict. A weight is either shared by all rows, with its published
shape, or one per row, with a leading row dimension: that is how many rows learn side by side. A
drafter never holds the target; it is bound once to the target's embedding and head.

A new family is one file with a subclass, entered in `checkpoint.KINDS`. It says:

- `recognises`, `_configure`: whether a config.json is its own, and what it means.
- `config_keys.TABLES`: every key that its config.json may have.
- `shapes`, `optional`, `aliases`: every tensor of its files, and its other names.
- `_check_target`, `_share`: what a target must be like, and what the drafter takes from it.
- `start`, `_extend`: an empty context, and how verified tokens become context.
- `_draft`: logits of the next tokens, handed to `choices`; `_replay`: the same with gradients.
- `_trainable`, `_layer`, `own_head`, `no_products`: which weights learn, and their names.

`features.FeatureDrafter` has most of it for layers that ttspec computes, and
`functional.FunctionalDrafter` for models that transformers computes (`causal.Causal`, `mtp.Mtp`);
`context.ContextState` has keys and values for all. Entered in `CONFIGS`
of `tests/toys.py`, a small config of it gets all of `tests/test_conformance.py`: texts are plain
decoding's, rows do not touch each other, `replay` is `propose` with gradients, and so on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.config import DraftConfig
from ttspec.drafters.blocks import Blocks, Choices, Choose, Text
from ttspec.drafters.layers import DOWN, UP, Weights
from ttspec.errors import CheckpointError
from ttspec.records import Proposal, ReplayBatch, Verification, of_rows

Shapes = dict[str, tuple[int, ...]]
AFTER_ATTENTION = ("o_proj", ".mlp.", "mlp_conv", "post_attention_layernorm")
"""Parts of the names of weights that come after a layer's attention."""
CONTEXT = ("k_proj.", "v_proj.", "fc.", "target_proj.")
"""Parts of the names of matrices that make keys and values of the context."""


@dataclass(slots=True)
class DraftState:
    """What belongs to the rows; a drafter adds the context as it sees it."""

    weights: Weights
    """The live weights, shared by all rows or one per row."""
    options: DraftConfig

    def of_rows(self, rows: slice, weights: Weights) -> Self:
        """The context of some rows, in the same memory, with weights of theirs."""
        return replace(of_rows(self, rows), weights=weights)

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
    drafts: ClassVar[bool] = True
    """False if nothing is asked of it in a round."""
    takes_padding: ClassVar[bool] = False
    """Whether `extend` can be told that some tokens are padding, and waits for nothing."""
    reads_late: ClassVar[bool] = False
    """Whether `absorb` leaves tokens to the next proposal, or to `catch_up`."""
    at_once: ClassVar[bool] = False
    """Whether a block is drafted by one pass, not by one for each token."""
    first_alone: ClassVar[bool] = False
    """Whether the first drafts of such a block are the same, and cost less, in a shorter one."""
    name: str
    path: Path | None
    config: Mapping[str, Any]
    """The checkpoint's config.json."""
    layers: int = 0
    """Number of its decoder layers."""
    taps: tuple[int, ...] = ()
    """Hidden states to read, as indices into the target's `hidden_states` tuple. Final once
    bound: a default may depend on the target's number of layers."""
    length: int
    """Tokens drafted a round by default."""
    default_length: int = 5
    """The same where the config says nothing."""
    default_window: int | None = None
    """Last tokens that a drafter of this kind sees unless told otherwise: what measured best on
    long texts (docs/experiments.md); None is all."""
    learning_rate: float = 1e-4
    """Of online learning by default: what measured best (docs/experiments.md)."""
    memory_rate: float | None = None
    """The same where a memory of all requests teaches; None is no other."""
    memory_warm_up: int = 24
    """Updates over which that rate rises, since Adam's first steps are as long as any."""
    lora_rate: float = 1e-3
    """The same where low-rank changes learn."""
    weights: dict[str, Tensor]
    """The anchor weights: what the checkpoint holds, under its names."""
    interpretation: dict[str, str]
    """What the checkpoint leaves open, and how it was read."""
    draft_ids: Tensor | None = None
    """int64 [V_draft], ascending: the target's tokens that can be drafted; None is all."""
    embedding: Tensor
    """[V, H] of the target, once bound."""
    own_head: ClassVar[tuple[str, ...]] = ()
    """How names of weights begin that correct the target's head, and learn."""
    no_products: ClassVar[tuple[str, ...]] = ()
    """How names of matrices begin that get no low-rank change: tables, and those of a GRU."""
    aliases: ClassVar[tuple[tuple[str, str], ...]] = ()
    """What its tensors are called elsewhere: patterns, and what replaces them."""
    vectors: ClassVar[tuple[str, ...]] = ()
    """Tensors before whose last dimension files have any number of dimensions of size 1."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: dict[str, Tensor],
        *,
        name: str = "",
        path: Path | None = None,
        names: Collection[str] = (),
    ) -> None:
        """Read a config.json.

        Args:
            config: config.json.
            weights: By canonical name.
            name: What to call it.
            path: Its folder.
            names: Tensors that the files hold: some variants show there only.

        Raises:
            KeyError, TypeError, ValueError: The config is not complete.
        """
        self.config, self.weights, self.name, self.path = config, weights, name or self.kind, path
        self.embedding, self.interpretation = torch.empty(0), {}
        self._configure(names)

    def _configure(self, names: Collection[str]) -> None:
        """Read `config`; see `__init__`."""
        raise NotImplementedError

    def _given_length(self) -> int:
        """Tokens drafted a round, as the config says or by default."""
        methods = (self.config.get("speculators_config") or {}).get("proposal_methods") or [{}]
        own = (self.config.get("ttspec") or {}).get("length")
        length = own or methods[0].get("speculative_tokens") or self.config.get("ttt_length")
        return int(length or self.default_length)

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:  # noqa: ARG003
        """Whether a config.json, and the canonical names of its tensors, are of this kind."""
        return False

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
        self.taps = self.taps or self._default_taps(layers)
        self._check_target(embedding)
        self._bind_taps(layers)
        self._share(embedding, head, tokenizer)

    def _default_taps(self, layers: int) -> tuple[int, ...]:  # noqa: ARG002
        """Taps where the config names none, of a target of so many layers."""
        return ()

    def _check_target(self, embedding: Tensor) -> None:  # noqa: B027
        """Refuse a target, of whom this is the embedding [V, H], that does not fit."""

    def _share(
        self, embedding: Tensor, head: Tensor, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """Take what is the target's, and its device and dtype; see `bind`."""
        raise NotImplementedError

    def with_context(self, options: DraftConfig) -> DraftConfig:
        """The same, with what is left open about the context chosen for this kind."""
        chosen = options.context == "whole" or options.window or options.rebase
        return options if chosen else replace(options, window=self.default_window)

    @abstractmethod
    def start(self, rows: int, slots: int, options: DraftConfig) -> DraftState:
        """An empty context for `rows` rows, with the anchor weights."""

    @torch.no_grad()
    def extend(
        self,
        state: DraftState,
        tokens: Tensor,
        features: Tensor,
        start: Tensor,
        subset: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Make verified tokens context.

        Args:
            state: Changed at the slots of these tokens only.
            tokens: int64 [B, T].
            features: [B, T, W] of the same tokens.
            start: int64 [B], position of each row's first token.
            subset: int64 [B], the rows meant; None is all.
            counts: int64 [B], how many of each row's tokens are meant, where the drafter
                `takes_padding`; None is all.
        """
        text = Text.after(start, tokens, features, subset, counts)
        self._extend(state, self.weights_of(state.weights, subset), text)

    def _extend(self, state: DraftState, weights: Weights, text: Text) -> None:
        """Make text of some rows context, with these weights of theirs."""
        raise NotImplementedError

    @torch.no_grad()
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
            pending: int64 [B], the last committed token.
            start: int64 [B], where it stands.
            count: How many drafts of each row are meant.
            length: Width of the proposal.
            longest: The largest start, known on the host.
            choose: Turns logits into tokens, and says from what q.
        """
        choices = Choices(choose)
        blocks = Blocks(pending[:, None], start[:, None], length, longest)
        before = self._draft(state, blocks, choices)
        return choices.proposal(count, before)

    def _draft(self, state: DraftState, blocks: Blocks, choices: Choices) -> Tensor | None:
        """Hand logits [B, g, V_draft] of a block a row to `choices`; returns `Proposal.before`."""
        raise NotImplementedError

    def _replay(self, state: DraftState, batch: ReplayBatch, blocks: Blocks) -> Tensor:
        """Logits [B, A, length, V_draft]; see `replay`."""
        raise NotImplementedError

    def replay(self, state: DraftState, batch: ReplayBatch, length: int, longest: int) -> Tensor:
        """Draft logits as `propose` would compute them now, with gradients to `state.weights`.

        Args:
            state: Context at and past a block's start is not looked at.
            batch: A blocks a row; of its target logits nothing is read.
            length: Drafted rows per block.
            longest: The largest start, known on the host.

        Returns:
            [B, A, length, V_draft]: row j predicts the token at start + j + 1.
        """
        if state.options.rebase and (blocks := batch.start.shape[1]) > 1:  # each turns its keys
            parts = [self.replay(state, batch.part(i), length, longest) for i in range(blocks)]
            return torch.cat(parts, dim=1)
        return self._replay(
            state, batch, Blocks(batch.tokens[..., 0], batch.start, length, longest)
        )

    def shapes(self) -> Shapes:
        """Every tensor that a checkpoint must hold, with its shape; known before loading."""
        return {}

    def optional(self) -> Shapes:
        """What a checkpoint may hold besides."""
        return {}

    def learnable(self, parameters: str) -> list[str]:
        """Names of the weights that learn under a `LearnConfig.parameters` choice."""
        full = self._trainable()
        if parameters == "full":
            return full
        # No keys and values change behind the last attention: the context stays what it is.
        last = [n for n in full if self._layer(self.layers - 1) in n]
        after = [n for n in last if any(part in n for part in AFTER_ATTENTION)]
        return [*after, *(n for n in full if n.startswith(("norm.weight", *self.own_head)))]

    def _trainable(self) -> list[str]:
        """Names of all weights that may learn."""
        return []

    def _layer(self, index: int) -> str:
        """What the names of a layer's weights have in common."""
        raise NotImplementedError

    def matrices(self, parameters: str) -> list[str]:
        """Names of the learnable matrices that get low-rank changes, without `.weight`.

        None of those that make context, where they can be told: then its keys and values never
        come from older weights, and rows share them.
        """
        names = [n for n in self.learnable(parameters) if self.weights[n].dim() == 2]
        names = [n for n in names if not n.startswith(self.no_products)]
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

    def catch_up(self, state: DraftState, start: Tensor, count: int) -> None:
        """Read the last `count` tokens before `start` int64 [B], where it `reads_late`."""
        raise NotImplementedError

    def weights_read(self, length: int) -> int:
        """Weights that are read to draft a block of `length` tokens, the head's among them."""
        if not self.weights:
            return 0
        own = sum(w.numel() for n, w in self.weights.items() if "embed_tokens" not in n)
        if "lm_head.weight" not in self.weights:
            rows, hidden = self.embedding.shape
            own += hidden * (rows if self.draft_ids is None else len(self.draft_ids))
        return own * (1 if self.at_once else length)

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

    def weights_of(self, weights: Weights, rows: Tensor | slice | None) -> Weights:
        """Live weights as some rows have them; None is all rows."""
        if rows is None:
            return weights
        return {n: w[rows] if self.is_own(n, w) else w for n, w in weights.items()}

    def weights_of_one(self, weights: Weights) -> dict[str, Tensor]:
        """Live weights that have one owner, without a dimension for who that is."""
        return {n: w[0] if self.is_own(n, w) else w for n, w in weights.items()}

    def is_own(self, name: str, weight: Tensor) -> bool:
        """Whether a live weight is one per row: it then has a dimension more, the first."""
        return weight.dim() > (self.weights[name].dim() if name in self.weights else 2)
