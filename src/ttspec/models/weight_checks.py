"""What must hold of a target's weights: they fit its config, all are there, they are numbers.

transformers makes what a config asks for, however large, draws at random what a file lacks, and
loads a NaN like any number.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ttspec.errors import TargetError

_AGAIN = "Copy or download the model again."
_LAYERS = {"num_hidden_layers", "n_layer", "num_layers", "block_count"}
"""What configs call the number of layers; the last one is of GGUF files."""
_MOST_LAYERS = 1000
"""More than any model has."""
_TIMES_STORED = 4
"""A model may have as many times the weights of its files: two may be one matrix there."""


def refuse_layers(config: Mapping[str, Any], tensors: int) -> None:
    """Refuse layers that no file can hold, before anything is made for each of them.

    EAGLE-3 and MTP heads have the number of the target's layers there: files may have fewer.

    Raises:
        TargetError: Names the number, and how many tensors there are.
        ValueError: It is a text that is no number.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            refuse_layers(value, tensors)
        elif key not in _LAYERS or not isinstance(value, int | float | str):
            continue
        elif float(value) > max(_MOST_LAYERS, tensors):
            raise TargetError(
                f"{key} is {float(value):,.0f}; the files hold {tensors:,} tensors.\n"
                "A config and its weights must belong together."
            )


def require_size(path: Path, config: Any, stored: int) -> None:
    """Refuse a config whose model is far larger than its files, before memory is taken for it.

    Args:
        path: Where both are.
        config: transformers' config of the model.
        stored: Weights in the files, none of them packed.

    Raises:
        TargetError: Says how many weights there would be, and how many there are.
    """
    try:
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(deepcopy(config))
    except Exception:  # loading says it better
        return
    if (wanted := sum(weight.numel() for weight in made.parameters())) > _TIMES_STORED * stored:
        raise TargetError(
            f"{path} asks for a model of {wanted:,} weights; its files hold {stored:,}.\n"
            f"A config and its weights must belong together. {_AGAIN}"
        )


def require_whole(path: Path, found: dict[str, Any]) -> None:
    """Refuse weights that were drawn at random in place of the model's.

    Args:
        path: Where they were read from.
        found: transformers' loading info: `missing_keys`, `mismatched_keys` as (name, shape in the
            files, shape of the model), and `unexpected_keys`.

    Raises:
        TargetError: Names a tensor that is not there, or of another shape than the config says.
    """
    odd = sorted(found["mismatched_keys"])
    if odd:
        name, stored, expected = odd[0]
        more = f" (and {len(odd) - 1} more)" if odd[1:] else ""
        advice = _AGAIN
        if list(stored[1:]) == list(expected[1:]) and ("embed" in name or "head" in name):
            advice = f"If the vocabulary was resized, set vocab_size to {stored[0]} there."
        raise TargetError(
            f"{path} has {name}{more} of {list(stored)}; its config.json makes {list(expected)}.\n"
            f"{advice}"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
        near = sorted(found["unexpected_keys"])
        extra = f"; it has {near[0]}, for which the model has no place" if near else ""
        raise TargetError(
            f"{path} has no tensor {missing[0]}{more}, which its config.json asks for{extra}.\n"
            f"{_AGAIN}"
        )


def require_finite(path: Path, name: str, weight: Tensor) -> None:
    """Refuse a weight that is no number: all that is computed from it would be none either.

    Raises:
        TargetError: Names the tensor and its dtype.
    """
    # One pass that takes no memory: a NaN is both the least and the greatest.
    ends = torch.stack(torch.aminmax(weight)) if weight.numel() else weight
    if ends.isfinite().all():
        return
    what = "NaN" if ends.isnan().any() else "infinity"
    kind = str(weight.dtype).removeprefix("torch.")
    raise TargetError(
        f"{path}: {name} holds {what} in {kind}.\n"
        + (f"Try --dtype bfloat16 or float32. {_AGAIN}" if kind == "float16" else _AGAIN)
    )


def require_finite_weights(path: Path, model: nn.Module) -> None:
    """The same of all weights that are not packed.

    Raises:
        TargetError: Names the first.
    """
    for name, weight in model.named_parameters():
        if type(weight) is nn.Parameter and weight.is_floating_point():
            require_finite(path, name, weight)


def not_finite(name: str, dtype: torch.dtype) -> TargetError:
    """What to say of a target whose logits are NaN: every token would be the same one."""
    kind = str(dtype).removeprefix("torch.")
    reason = (
        "its numbers grow past 65504, the largest there.\nUse --dtype bfloat16 or float32."
        if dtype == torch.float16
        else "its weights or its config.json cannot be right.\nTry --dtype float32, or fetch the "
        "model again."
    )
    return TargetError(f"The logits of {name} are no numbers (NaN) in {kind}: {reason}")
