"""Targets that a cache with a length per row would get wrong: each is refused by name.

transformers gives all causal models one interface, behind which some count positions themselves,
change what is cached already, or keep state elsewhere. Their text would be fluent and wrong.
"""

from __future__ import annotations

import sys
from inspect import signature
from typing import Any

from transformers import PreTrainedModel

from ttspec.errors import TargetError

CHANGING = ("dynamic", "longrope")
"""Kinds of rotary positions whose frequencies depend on the longest text that is read."""

_CAUSAL = "Give a causal language model: tokens see only those before them."


def refuse_config(config: Any) -> None:
    """Refuse what the config says.

    Raises:
        TargetError: Names what cannot be right.
    """
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise TargetError(f"The target ({config.model_type}) has an encoder.\n{_CAUSAL}")
    kinds = _rope_kinds(getattr(text, "rope_parameters", None) or {})
    for kind in CHANGING:
        if kind in kinds:
            raise TargetError(
                f"The target's rotary positions are {kind}: their frequencies follow the longest "
                "text of a batch, so what is cached would no longer be right.\n"
                "Supported are fixed ones, such as llama3, yarn and linear; use another target."
            )
    if getattr(text, "altup_num_inputs", None):
        raise TargetError(
            f"The target ({text.model_type}) has several hidden states a token (AltUp).\n"
            "A drafter reads one; use another target."
        )
    if hasattr(text, "attention_layers"):
        raise TargetError(
            f"The target ({text.model_type}) counts positions by the length of its cache.\n"
            "Supported are models that go by position_ids; use another target."
        )
    if getattr(text, "alibi", False):
        raise TargetError(
            "The target's attention is biased by distance (alibi), which it counts by itself.\n"
            "Supported are models that take position_ids; use another target."
        )


def refuse_model(model: PreTrainedModel, windows: tuple[int | None, ...]) -> None:
    """Refuse what only the model's code tells.

    Raises:
        TargetError: Names what cannot be right.
    """
    given = signature(type(model.base_model).forward).parameters
    for name in ("position_ids", "use_cache"):
        if name not in given:
            raise TargetError(
                f"{type(model).__name__} takes no {name}: it counts positions itself, or keeps no "
                "keys and values.\nRows of different lengths need both; use another target."
            )
    text = model.config.get_text_config()
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    if getattr(text, "is_decoder", None) is False and not causal:  # GPT-NeoX says so too, and is
        raise TargetError(f"The target ({text.model_type}) is an encoder.\n{_CAUSAL}")
    kinds = set(getattr(text, "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) and kinds <= {"full_attention", "sliding_attention"}:
        raise TargetError(
            f"{type(model).__name__} keeps state that its config's layer_types do not tell of.\n"
            "Supported are keys and values; use another target."
        )
    code = sys.modules[type(model).__module__]
    if any(windows) and not hasattr(code, "create_sliding_window_causal_mask"):
        raise TargetError(
            f"The target's config says sliding_window = {text.sliding_window}, but the code of "
            f"{text.model_type} knows no window.\nRemove it from config.json if it means nothing."
        )
    kind = model.config._attn_implementation
    if (softcap := softcap_of(model.config)) and kind != "eager":
        raise TargetError(
            f"The target softcaps attention (attn_logit_softcapping = {softcap:g}), which {kind} "
            'attention leaves out.\nLoad the model with attn_implementation="eager".'
        )


def softcap_of(config: Any) -> float | None:
    """At what attention scores are capped; None if they are not."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def _rope_kinds(rope: dict[str, Any]) -> set[str]:
    """Of all layers; some configs give each kind of layer its own."""
    inner = [value for value in rope.values() if isinstance(value, dict)]
    return {str(r.get("rope_type") or r.get("type")) for r in (inner or [rope])}
