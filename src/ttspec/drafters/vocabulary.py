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

    target_ids: Tensor | None = None
    """int64 [V_draft], ascending: the target's ids of what can be drafted."""
    draft_ids: Tensor | None = None
    """int64 [V_draft]: the draft model's ids of the same tokens."""
    translation: Tensor | None = None
    """int64 [V]: what the draft model reads for each of the target's tokens."""
    share: float = 1.0
    """Of the target's tokens."""

    def on(self, device: torch.device, target_size: int, draft_size: int) -> SharedVocabulary:
        """The same on a device, with None for what changes nothing."""

        def kept(ids: Tensor | None, size: int) -> Tensor | None:
            same = ids is None or torch.equal(ids, torch.arange(size))
            return None if same else ids.to(device)  # type: ignore[union-attr]

        return replace(
            self,
            target_ids=kept(self.target_ids, target_size),
            draft_ids=kept(self.draft_ids, draft_size),
            translation=None if self.translation is None else self.translation.to(device),
        )

    def translate(self, tokens: Tensor) -> Tensor:
        """The target's tokens, int64 of any shape, in the draft model's vocabulary."""
        return tokens if self.translation is None else self.translation[tokens]

    def drafted(self, logits: Tensor) -> Tensor:
        """Logits [..., V_draft] of what both know, of the draft model's own [..., V]."""
        return logits if self.draft_ids is None else logits[..., self.draft_ids]


def tokenizer_of(folder: Path | None) -> PreTrainedTokenizerBase | None:
    """A draft model's own tokenizer, if its folder has one."""
    if folder is None or not any(folder.glob("tokenizer*")):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def padded(target_size: int, draft_size: int) -> SharedVocabulary:
    """One tokenizer, whose tables may be padded to different sizes."""
    both = torch.arange(min(target_size, draft_size))
    if target_size <= draft_size:
        return SharedVocabulary(both, both)
    every = torch.arange(target_size)  # the target's padding rows can be sampled all the same
    return SharedVocabulary(both, both, every.where(every < draft_size, 0))


def common(
    target_size: int,
    draft_size: int,
    target: PreTrainedTokenizerBase,
    draft: PreTrainedTokenizerBase,
) -> SharedVocabulary:
    """Two tokenizers: tokens that are written alike.

    Args:
        target_size: Rows of the target's embedding.
        draft_size: Rows of the draft model's.
        target: The target's tokenizer.
        draft: The draft model's.
    """
    vocabulary = draft.get_vocab()
    pairs = sorted((i, vocabulary[t]) for t, i in target.get_vocab().items() if t in vocabulary)
    pairs = [(i, j) for i, j in pairs if i < target_size and j < draft_size]  # others have no row
    both = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    unknown = draft.unk_token_id if draft.unk_token_id is not None else draft.eos_token_id or 0
    translation = torch.full((target_size,), int(unknown))  # type: ignore[arg-type]
    translation[both[:, 0]] = both[:, 1]
    return SharedVocabulary(both[:, 0], both[:, 1], translation, len(both) / len(target))


def ids_of(d2t: Tensor | None, vocabulary: int) -> Tensor | None:
    """The target's token for each draft token; None when they are the same.

    Args:
        d2t: int64 [V_draft], published offsets: target token = draft token + offset.
        vocabulary: The target's.
    """
    if d2t is None or len(d2t) == vocabulary:
        return None
    return d2t + torch.arange(len(d2t), device=d2t.device)
