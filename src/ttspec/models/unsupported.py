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
from ttspec.models.fixed_rotary import CHANGING

ORDINARY = {"full_attention", "sliding_attention"}
RECURRENT = "linear_attention"
"""What a config calls a gated delta net, and some other layers that `use_states` refuses."""

COUNTS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_size", "vocab_size", "max_position_embeddings"),
)
"""Config entries that are sizes; not every config class looks at those that it does not know."""

NUMBERS: dict[str, tuple[type, ...]] = {
    "eos_token_id": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
}
"""Entries of generation_config.json that are read, and their types; token ids may be a list."""

_CAUSAL = "Give a causal language model: tokens see only those before them."


def refuse_config(config: Any, *, fixes_rotary: bool) -> None:
    """Refuse what the config says; `fixes_rotary` of a model that `fix_rotary` is called for.

    Raises:
        TargetError: Names what cannot be right.
    """
    text = config.get_text_config()
    for name in COUNTS:
        try:
            value = getattr(text, name, None)
        except Exception:  # Gemma 4 has one for each layer, and asks for that
            continue
        if value is not None and (type(value) is not int or value < 1):
            raise TargetError(
                f"config.json has {name} = {value!r}; it must be a whole number from 1 up.\n"
                "Correct it, or fetch the model again."
            )
    if getattr(config, "is_encoder_decoder", False):
        raise TargetError(f"The target ({config.model_type}) has an encoder.\n{_CAUSAL}")
    rope = getattr(text, "rope_parameters", None) or {}
    for kind in sorted(_rope_kinds(rope) & set(CHANGING)):
        # Of a target they are fixed, where one rule holds for all layers and nothing else changes.
        if not fixes_rotary or rope.get("rope_type") != kind or "long_mscale" in rope:
            raise TargetError(
                f"The model's rotary positions are {kind}: their frequencies follow the longest "
                "text of a batch, so what is cached would no longer be right.\n"
                "Supported are fixed ones, such as llama3, yarn and linear; use another model."
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


def refuse_generation(generation: Any) -> None:
    """Refuse entries of generation_config.json that are of another type than they must be.

    Raises:
        TargetError: Names the entry.
    """
    for name, kinds in NUMBERS.items():
        value = getattr(generation, name, None)
        of_each = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if any(each is not None and type(each) not in kinds for each in of_each):
            what = "a number" if float in kinds else "a whole number"
            raise TargetError(
                f"generation_config.json sets {name} = {value!r}; it must be {what}.\n"
                "Correct it there, or fetch the model again."
            )


def refuse_model(model: PreTrainedModel, windows: tuple[int | None, ...]) -> None:
    """Refuse what only the model's code tells.

    Raises:
        TargetError: Names what cannot be right.
    """
    if model.get_output_embeddings() is None:
        raise TargetError(
            f"{type(model).__name__} has no head that says what comes next.\n"
            "Load the model with AutoModelForCausalLM."
        )
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


def attention_windows(config: Any, *, states: bool = False) -> tuple[int | None, ...]:
    """The window of each layer, None where all is seen.

    `states` of a target: 0 where a layer is recurrent; and its rotary positions are fixed.

    Raises:
        TargetError: A layer is of a kind that cannot be rolled back.
    """
    refuse_config(config, fixes_rotary=states)
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 0)
    types = getattr(text, "layer_types", None) or ["full_attention"] * layers
    gated = {RECURRENT} if states and hasattr(text, "linear_key_head_dim") else set()
    odd = sorted(set(types) - ORDINARY - gated)
    if odd or not layers or not hasattr(text, "num_attention_heads"):
        kinds = ", ".join(sorted(ORDINARY)) + (", gated delta nets" if states else "")
        raise TargetError(
            f"The {'target' if states else 'model'}'s layers are "
            f"{', '.join(odd) or 'not attention layers'}; supported are {kinds}.\n"
            "Other state than keys and values cannot be rolled back; use another model."
        )
    window = getattr(text, "sliding_window", None)
    if getattr(text, "use_sliding_window", True) is False:
        window = None
    if getattr(text, "layer_types", None) is None and window is not None:
        types = ["sliding_attention"] * layers  # as Mistral: one window for all layers
    windows = {"sliding_attention": window, RECURRENT: 0}
    return tuple(windows.get(kind) for kind in types)


def last_position(config: Any) -> int | None:
    """The last position of a model that looks them up; None where any position can be computed."""
    text = config.get_text_config()
    if getattr(text, "rope_parameters", None):
        return None
    known = getattr(text, "max_position_embeddings", None)
    return None if known is None else int(known) - 1


def softcap_of(config: Any) -> float | None:
    """At what attention scores are capped; None if they are not."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def _rope_kinds(rope: dict[str, Any]) -> set[str]:
    """Of all layers; some configs give each kind of layer its own."""
    inner = [value for value in rope.values() if isinstance(value, dict)]
    return {str(r.get("rope_type") or r.get("type")) for r in (inner or [rope])}
