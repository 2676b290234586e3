"""Attention for targets: query heads that share a key head become query rows of it.

transformers' own SDPA path repeats keys and values for every query head whenever there is a mask,
and ours always has one. Folding reads each key once.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ttspec.errors import TargetError
from ttspec.spans import span_attention

NAME = "ttspec"


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention with a mask, no key repeated: [B, T, heads, D] and None.

    As transformers' attention registry calls it, with query [B, heads, T, D], and key and value [B,
    kv heads, S, D]. A mask is [B, 1, T, S], bool or added to the scores, or int64 [B, 1, T, 2],
    what is seen from slot to slot; anything else goes to transformers' own function. `dropout` is
    not used in inference.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise TargetError(
                f"The target's attention has a {name}, which sdpa attention leaves out.\n"
                'Load the model with attn_implementation="eager".'
            )
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        return span_attention(query, key, value, attention_mask, scaling), None
    batch, heads, width, size = query.shape
    group = heads // key.shape[1]
    if (
        group == 1
        or attention_mask is None
        or attention_mask.shape[1] != 1
        or dropout
        or kwargs.get("position_bias") is not None
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    folded = query.reshape(batch, key.shape[1], group * width, size)
    if width == 1:
        mask = attention_mask.expand(-1, -1, group, -1)
    else:
        mask = attention_mask.repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    # Some models view it in another shape, which takes it in one piece.
    return out.reshape(batch, heads, width, value.shape[-1]).transpose(1, 2).contiguous(), None


def use_folded_attention(model: nn.Module) -> None:
    """Switch a model that uses SDPA to `folded_attention`; others stay as they are."""
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        AttentionInterface.register(NAME, folded_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)  # type: ignore[operator]
