"""vLLM's own draft module: what was learned goes into it in place.

Whoever holds a parameter, a CUDA graph or compiled code, sees it: no tensor moves. What is shared
with the target, embedding and head, is never given, for then the text would change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.layers import Weights, multiplied_out
from ttspec.learning.memory_learner import MemoryLearner

TABLES = ("embed_tokens", "lm_head", "d2t", "t2d")
"""In names of tensors that never learn, and that vLLM may share with the target."""


def learned_names(drafter: Drafter, learn: LearnConfig) -> list[str]:
    """Published names of what learns, as it is given to vLLM; `learn` is resolved."""
    names = drafter.learnable(learn.parameters)
    if learn.weights != "full":
        names = [name + ".weight" for name in drafter.matrices(learn.parameters)]
    return [n for n in names if not any(table in n for table in TABLES)]


def learned_weights(learner: MemoryLearner, learned: Weights) -> dict[str, Tensor]:
    """What a learner `learned`, by published name, with low-rank changes multiplied out."""
    if learner.config.weights != "full":
        learned = multiplied_out({**learner.drafter.weights, **learned})
    return {name: learned[name] for name in learned_names(learner.drafter, learner.config)}


def load_in_place(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a module of vLLM new weights, of which it makes what it runs with.

    DFlash makes new fused tensors of them at every load. A captured graph would read the old ones
    on: so the new values go into the old tensors.
    """
    held = [(part, dict(_plain_tensors(part))) for part in module.modules()]
    module.load_weights(weights.items())  # type: ignore[operator]
    for part, before in held:
        for name, new in _plain_tensors(part):
            old = before.get(name)
            if old is not None and old is not new and old.shape == new.shape:
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
                setattr(part, name, old)


def _plain_tensors(part: nn.Module) -> list[tuple[str, Tensor]]:
    """Tensors that are attributes, neither parameters nor buffers."""
    return [(n, t) for n, t in vars(part).items() if isinstance(t, Tensor)]


def flat(weights: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """One row [numbers] of them all, in their order, as ranks send it."""
    return torch.cat([w.to(dtype).flatten() for w in weights.values()])


def unflattened(row: Tensor, names: Sequence[str], shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The opposite of `flat`."""
    parts = row.split([torch.Size(shapes[n]).numel() for n in names])
    return {n: part.view(shapes[n]) for n, part in zip(names, parts, strict=True)}
