"""Quantised checkpoints: which are kept packed, which are unpacked as they are read, and no others.

Which of them verify right has to be tried: a verification reads tokens together that plain
decoding reads alone, and some make a token's logits depend on the tokens beside it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ttspec.errors import ResourceError, TargetError
from ttspec.models import gptq

KEPT = {"torchao": "torchao", "bitsandbytes": "bitsandbytes"}
"""Weights that stay packed, by quant_method, and the package that multiplies by them."""
UNPACKED = {
    "fp8": "accelerate",
    "compressed-tensors": "compressed_tensors",
    "mxfp4": None,
    **dict.fromkeys(gptq.METHODS),
}
"""Weights that are unpacked into --dtype as they are read, and the package that it takes. Whatever
the checkpoint says about rounding activations is left out."""
TORCHAO_KEPT = (
    "Int8WeightOnlyConfig",
    "Int4WeightOnlyConfig",
    "Float8WeightOnlyConfig",
    "IntxWeightOnlyConfig",
)
TORCHAO_UNPACKED = (
    "Int8DynamicActivationInt8WeightConfig",
    "Int8DynamicActivationIntxWeightConfig",
    "Float8DynamicActivationFloat8WeightConfig",
)
"""These round activations, each time anew: the last bits of a sum, which differ with the tokens
read together, decide where a number is rounded to. A toy's float32 logits differed by 0.3, and all
texts (docs/experiments.md)."""
KIND = re.compile(r"(WeightOnly|Activation.*Weight)Config$")
"""Of torchao, what is a kind of quantisation, and no setting of one."""


def unpacks_on_load(config: Any) -> bool:
    """Whether a model's weights are unpacked as they are read."""
    given = _settings(config)
    return _method(given) in UNPACKED or bool(_torchao_kinds(given) & set(TORCHAO_UNPACKED))


def unpacking_options(path: Path, config: Any, device: torch.device) -> dict[str, Any]:
    """The arguments of `from_pretrained` by which weights are unpacked as they are read.

    `device` is where ttspec unpacks what transformers does not.

    Raises:
        TargetError: The parts of a packed weight do not fit each other.
    """
    given, config = _settings(config), copy.deepcopy(config)
    if _method(given) in gptq.METHODS:
        del config.quantization_config
        weights = gptq.unpacked_weights(path, _method(given), given, device)
        return {"config": config, "state_dict": weights}
    if _method(given) in UNPACKED:  # of others it reads what `unpack_linears` unpacks
        config.quantization_config = {**given, "dequantize": True}
    return {"config": config}


def refuse_unsupported(path: Path, config: Any) -> None:
    """Refuse what was not tried, or what verifies wrong.

    Raises:
        TargetError: Names what the checkpoint is quantised by.
        ResourceError: The package that it takes is not installed.
    """
    given = _settings(config)
    if not given:
        return
    method = _method(given)
    if method not in KEPT | UNPACKED:
        raise TargetError(
            f"{path} is quantised by {method}, which is not read; "
            f"{', '.join([*KEPT, *UNPACKED])} and GGUF files are.\n"
            "Give the model in one of these, or without quantisation."
        )
    if method in gptq.METHODS:
        gptq.refuse_format(path, method, given)
    if method == "bitsandbytes" and given.get("load_in_8bit"):
        raise TargetError(
            f"{path} is quantised by bitsandbytes to 8 bits, where a token's logits depend on the "
            "tokens read with it: verified text would be another.\n"
            "Give the model in 4 bits, or without quantisation."
        )
    for name in sorted(_torchao_kinds(given) - {*TORCHAO_KEPT, *TORCHAO_UNPACKED}):
        raise TargetError(
            f"{path} is quantised by torchao's {name}, which was not tried; tried are "
            f"{', '.join((*TORCHAO_KEPT, *TORCHAO_UNPACKED))}.\n"
            "Give the model in one of these or without quantisation."
        )
    if method == "compressed-tensors" and given.get("kv_cache_scheme"):
        raise TargetError(
            f"{path} asks for a quantised key/value cache (kv_cache_scheme), which is not there.\n"
            "Remove the entry from config.json, or give the model without it."
        )
    if package := (KEPT | UNPACKED)[method]:
        require_package(package, f"{path}, which is quantised by {method},")


def require_package(name: str, what: str, extra: str = "quantised") -> None:
    """Refuse to go on without a package.

    Raises:
        ResourceError: It is not installed.
    """
    if find_spec(name) is None:
        raise ResourceError(
            f"{what[0].upper()}{what[1:]} needs the package {name.replace('_', '-')}, which is not "
            f"installed.\nInstall it with: pip install 'ttspec[{extra}]'."
        )


def require_plain(path: Path, model: PreTrainedModel) -> None:
    """Drafters read the target's embedding and head as they are.

    Raises:
        TargetError: One of them is packed.
    """
    for what, module in (
        ("embedding", model.get_input_embeddings()),
        ("output head", model.get_output_embeddings()),
    ):
        weight = getattr(module, "weight", None)
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise TargetError(
                f"{path} has a quantised {what} ({type(weight).__name__}); drafters read it as it "
                "is.\nQuantise the model without its embedding and head."
            )


def unpack_linears(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Leave nothing of what unpacked a model: linear modules with weights in `dtype`.

    compressed-tensors keeps scales, and a forward of its own that rounds activations
    (findings/compressed_tensors_dequantized_still_rounds.sh).
    """
    for module in model.modules():
        if vars(module).pop("quantization_scheme", None) is None:
            continue
        for name in ("forward", "_original_forward_func"):
            vars(module).pop(name, None)
        for store in (module._parameters, module._buffers):
            for name in set(store) - {"weight", "bias"}:
                del store[name]
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and type(weight) is not nn.Parameter:
                whole = weight.dequantize().to(dtype)
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
            elif weight is not None and weight.dtype == torch.bfloat16:
                weight.data = weight.data.to(dtype)  # transformers 5.17 so unpacks mxfp4


def require_products(path: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Refuse packed weights that do not multiply states in `dtype`.

    Raises:
        TargetError: Says in which they do.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or type(weight) is nn.Parameter or weight is None:
            continue
        try:
            module(torch.zeros(1, module.in_features, dtype=dtype, device=weight.device))
        except Exception as error:  # each package has its own
            asked, own = (str(kind).removeprefix("torch.") for kind in (dtype, weight.dtype))
            raise TargetError(
                f"{path} is packed in {own}, and its weights do not multiply {asked}: "
                f"{str(error).splitlines()[0]}\n"
                f"Give --dtype {own if weight.is_floating_point() else 'bfloat16'}."
            ) from error
        return


def unpacked_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in `dtype`, from its config alone."""
    own = {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(config).from_dict(own))
    return sum(weight.numel() for weight in model.parameters()) * dtype.itemsize


def stored_nbytes(weight: torch.Tensor) -> int:
    """Bytes that a weight takes, packed or not: a packed one's own `nbytes` are those unpacked."""
    flatten: Any = getattr(weight, "__tensor_flatten__", None)
    if flatten is None:
        return weight.nbytes
    names, _ = flatten()
    return sum(stored_nbytes(getattr(weight, name)) for name in names)


def _method(given: dict[str, Any]) -> str:
    return str(getattr(given.get("quant_method"), "value", given.get("quant_method")))


def _settings(config: Any) -> dict[str, Any]:
    given = getattr(config, "quantization_config", None) or {}
    return given if isinstance(given, dict) else given.to_dict()


def _torchao_kinds(given: dict[str, Any]) -> set[str]:
    """The kinds of quantisation that torchao's serialised settings name."""
    return {name for name in _types(given.get("quant_type")) if KIND.search(name)}


def _types(value: Any) -> Iterator[str]:
    """All that torchao's serialised settings name by `_type`."""
    if isinstance(value, dict):
        yield from [value["_type"]] if isinstance(value.get("_type"), str) else []
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _types(part)
