"""Experts of a mixture: whether a GPU computes them without the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WITH_KERNEL = (9, 10)
"""Major compute capabilities for which torch has a kernel of grouped products, in bfloat16: Hopper
and Blackwell of data centres. For others it asks the host how many tokens each expert has."""


def experts_of(model: nn.Module) -> list[Any]:
    """A model's experts, each for a layer, if transformers can compute them in several ways.

    They are called with tokens [N, H], and the experts that each of these chose [N, k].
    """
    return [m for m in model.modules() if hasattr(m, "num_experts") and hasattr(m, "is_transposed")]


def asks_host(model: nn.Module) -> bool:
    """Whether the host must know which experts were chosen: no captured graph can hold that."""
    if not (experts := experts_of(model)):
        return True  # a model's own loop over them
    how = experts[0].config._experts_implementation
    if how != "grouped_mm":
        return how != "batched_mm"  # whose tokens read copies of their experts
    weight = next(experts[0].parameters())
    if weight.device.type != "cuda":
        return False
    capability = torch.cuda.get_device_capability(weight.device)[0]
    return weight.dtype != torch.bfloat16 or capability not in WITH_KERNEL
