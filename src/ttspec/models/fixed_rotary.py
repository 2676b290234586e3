"""Rotary positions whose frequencies follow the longest text that is read: a target's are fixed.

transformers changes them as a text grows, for all rows at once, and of cached keys it cannot.
vLLM and llama.cpp choose by the context that there is, and so does this.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

CHANGING = ("dynamic", "longrope")
"""Kinds of rotary positions that do so."""


@torch.no_grad()
def fix_rotary(model: PreTrainedModel) -> None:
    """Let a model rotate texts of all lengths alike, up to the context that its config gives.

    Of longrope by the long factors, if this context is longer than what the model was first trained
    for, else by the short ones; of dynamic by the frequencies that hold up to there.
    """
    context = int(model.config.get_text_config().max_position_embeddings)
    for module in model.modules():
        rotary: Any = module
        if (kind := getattr(rotary, "rope_type", None)) not in CHANGING:
            continue
        frequencies = rotary.original_inv_freq
        if kind == "longrope":
            known = int(rotary.config.rope_parameters["original_max_position_embeddings"])
            if context > known:
                make, device = ROPE_INIT_FUNCTIONS[kind], frequencies.device
                frequencies, _ = make(rotary.config, device, seq_len=known + 1)
        rotary.inv_freq.copy_(frequencies)
        rotary.rope_type = "default"  # by this transformers decides whether to change them
