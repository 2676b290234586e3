"""Which tokens a drafter and its target share, and under which ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

LEAST_SHARED = 0.5
"""A draft model that knows fewer of the target's tokens is refused."""


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """Tokens that both models know; None is all, under the same ids."""

    theirs: Tensor | None = None
    """int64 [V_draft], ascending: the target's ids of what can be drafted."""
    ours: Tensor | None = None
    """int64 [V_draft]: the draft model's ids of the same tokens."""
    own: Tensor | None = None
    """int64 [V]: what the draft model reads for each of the target's tokens."""
    share: float = 1.0
    """Of the target's tokens."""

    def on(self, device: torch.device, theirs: int, ours: int) -> SharedVocabulary:
        """The same on a device, with None for what changes nothing."""

        def kept(ids: Tensor | None, size: int) -> Tensor | None:
            same = ids is None or torch.equal(ids, torch.arange(size))
            return None if same else ids.to(device)  # type: ignore[union-attr]

        own = None if self.own is None else self.own.to(device)
        return replace(self, theirs=kept(self.theirs, theirs), ours=kept(self.ours, ours), own=own)

    def translate(self, tokens: Tensor) -> Tensor:
        """The target's tokens in the draft model's vocabulary."""
        return tokens if self.own is None else self.own[tokens]

    def drafted(self, logits: Tensor) -> Tensor:
        """Logits [..., V_draft] of what both know, of the draft model's own [..., V]."""
        return logits if self.ours is None else logits[..., self.ours]


def tokenizer_of(folder: Path | None) -> PreTrainedTokenizerBase | None:
    """A draft model's own tokenizer, if its folder has one."""
    if folder is None or not any(folder.glob("tokenizer*")):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def padded(theirs: int, ours: int) -> SharedVocabulary:
    """One tokenizer, whose tables may be padded to different sizes."""
    both = torch.arange(min(theirs, ours))
    if theirs <= ours:
        return SharedVocabulary(both, both)
    every = torch.arange(theirs)  # the target's padding rows can be sampled all the same
    return SharedVocabulary(both, both, every.where(every < ours, 0))


def common(
    theirs: int, ours: int, target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase
) -> SharedVocabulary:
    """Two tokenizers: tokens that are written alike.

    Args:
        theirs: Rows of the target's embedding.
        ours: Rows of the draft model's.
        target: The target's tokenizer.
        draft: The draft model's.
    """
    vocabulary = draft.get_vocab()
    pairs = sorted((i, vocabulary[t]) for t, i in target.get_vocab().items() if t in vocabulary)
    pairs = [(i, j) for i, j in pairs if i < theirs and j < ours]  # a token without a row
    both = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    unknown = draft.unk_token_id if draft.unk_token_id is not None else draft.eos_token_id or 0
    own = torch.full((theirs,), int(unknown))  # type: ignore[arg-type]
    own[both[:, 0]] = both[:, 1]
    return SharedVocabulary(both[:, 0], both[:, 1], own, len(both) / len(target))


def ids_of(d2t: Tensor | None, vocabulary: int) -> Tensor | None:
    """The target's token for each draft token; None when they are the same.

    Args:
        d2t: int64 [V_draft], published offsets: target token = draft token + offset.
        vocabulary: The target's.
    """
    if d2t is None or len(d2t) == vocabulary:
        return None
    return d2t + torch.arange(len(d2t), device=d2t.device)
